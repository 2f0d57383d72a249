"""galpy's potentials as ours; `exported`, the other way round, comes from the file beside it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
from galpy import potential as galpy_potential
from galpy.potential import Force
from galpy.potential.Potential import Potential as GalpyPotential
from galpy.util.conversion import get_physical, physical_compatible
from numpy.typing import NDArray

from bayespot.potential.galpy_exported import exported, parse_units, unit_vectors

__all__ = ["GalpyCallables", "exported"]

#: What changes near one time only, so that other times need not show it.
_PASSING = {
    "DehnenSmoothWrapperPotential", "GaussianAmplitudeWrapperPotential", "TimeDependentAmplitudeWrapperPotential",
    "MovingObjectPotential", "DehnenBarPotential",
}  # fmt: skip
#: Times (galpy's units) at which a static potential must be what it is at 0; no bar turns by whole periods in all.
_TIMES = (-300.1, -41.3, -5.29, -0.37, 0.37, 5.29, 41.3, 300.1)
_AXISYMMETRIC = ("Potentials", "Rforces", "zforces", "R2derivs", "z2derivs", "Rzderivs")
_AZIMUTHAL = ("phitorques", "phi2derivs", "Rphiderivs", "phizderivs")
#: Positions in kpc at which answers for arrays are compared with those for points.
_PROBES = np.array([[3.1, 2.0, 0.7], [-0.4, 0.2, 0.1], [6.0, -9.0, -4.0], [1.0, 1.5, -2.5]])


class GalpyCallables:
    """A galpy potential, or a sum of them, as `bayespot.potential.callables.Callables`, as galpy computes them.

    Parameters
    ----------
    potential
        A potential, a sum ``a + b`` (in galpy 1.12 an object, before a list), or a list.
    ro, vo
        What galpy's internal units stand for, in kpc and km/s or with units; None: the potential's own.

    Raises
    ------
    ValueError
        If it is not three-dimensional, depends on time or velocity, its units contradict each other, or galpy fails.
    """

    def __init__(self, potential: Any, ro: Any = None, vo: Any = None) -> None:
        members = _members(potential)
        for member in members:
            if changing := _changing(member):
                raise ValueError(
                    f"{changing} depends on time or rotates and would be frozen at t = 0: give a static potential, for "
                    "instance the axisymmetric part alone"
                )
        self.ro, self.vo = _units(members, ro, vo)
        self.potential = _one(potential, members)
        self.axisymmetric = not any(bool(one.isNonAxi) for one in members)
        quantities = _AXISYMMETRIC if self.axisymmetric else _AXISYMMETRIC + _AZIMUTHAL
        #: Quantities that galpy computes for arrays as it does for points.
        self.vectorised = frozenset(quantity for quantity in quantities if self._agrees(quantity))

    def phi(self, x: NDArray[Any]) -> NDArray[Any]:
        """Return Phi ``(n,)`` in (km/s)^2."""
        return self._evaluate("Potentials", x) * self.vo**2

    def gradient(self, x: NDArray[Any]) -> NDArray[Any]:
        """Return its gradient ``(n, 3)`` in (km/s)^2/kpc."""
        gradient, frame = self._gradient(x)
        return (frame.transpose(0, 2, 1) @ gradient[..., None])[..., 0] * self.vo**2 / self.ro

    def hessian(self, x: NDArray[Any]) -> NDArray[Any]:
        """Return its second derivatives ``(n, 3, 3)`` in (km/s)^2/kpc^2."""
        gradient, frame = self._gradient(x)
        R = self._cylindrical(x)[0]
        second = np.zeros((len(x), 3, 3))
        second[:, 0, 0] = self._evaluate("R2derivs", x)
        second[:, 2, 2] = self._evaluate("z2derivs", x)
        second[:, 0, 2] = second[:, 2, 0] = self._evaluate("Rzderivs", x)
        second[:, 1, 1] = gradient[:, 0] / R
        if not self.axisymmetric:
            second[:, 1, 1] += self._evaluate("phi2derivs", x) / R**2
            second[:, 0, 1] = second[:, 1, 0] = (self._evaluate("Rphiderivs", x) - gradient[:, 1]) / R
            second[:, 1, 2] = second[:, 2, 1] = self._evaluate("phizderivs", x) / R
        return frame.transpose(0, 2, 1) @ second @ frame * self.vo**2 / self.ro**2

    def _cylindrical(self, x: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        # galpy divides by R
        R = np.maximum(np.hypot(x[:, 0], x[:, 1]), 1e-12) / self.ro
        return R, x[:, 2] / self.ro, np.arctan2(x[:, 1], x[:, 0])

    def _evaluate(self, quantity: str, x: NDArray[Any]) -> NDArray[Any]:
        if quantity in self.vectorised:
            return self._of_arrays(quantity, x)
        return self._of_points(quantity, x)

    def _of_arrays(self, quantity: str, x: NDArray[Any]) -> NDArray[Any]:
        R, z, phi = self._cylindrical(x)
        function = getattr(galpy_potential, f"evaluate{quantity}")
        return np.broadcast_to(np.asarray(function(self.potential, R, z, phi=phi, use_physical=False), float), R.shape)

    def _of_points(self, quantity: str, x: NDArray[Any]) -> NDArray[Any]:
        function = getattr(galpy_potential, f"evaluate{quantity}")
        out = np.empty(len(x))
        for i, (R, z, phi) in enumerate(zip(*self._cylindrical(x), strict=True)):
            try:
                value = function(self.potential, float(R), float(z), phi=float(phi), use_physical=False)
                out[i] = np.asarray(value, dtype=float).item()
            except Exception as error:  # each of galpy's potentials fails with an exception of its own
                raise ValueError(
                    f"galpy does not give {quantity} of {_label(self.potential)} at R = {R * self.ro:.3g}, "
                    f"z = {z * self.ro:.3g} kpc ({type(error).__name__}: {error})"
                ) from error
        return out

    def _agrees(self, quantity: str) -> bool:
        """Whether arrays get the answers of points; what is not given at all is not asked for arrays either."""
        try:
            points = self._of_points(quantity, _PROBES)
            arrays = self._of_arrays(quantity, _PROBES)
        except Exception:  # see above: TypeError, ValueError, AttributeError, IndexError, ...
            return False
        size = np.abs(points[np.isfinite(points)]).max(initial=0.0)
        return np.allclose(arrays, points, rtol=1e-8, atol=1e-10 * size, equal_nan=True)

    def _gradient(self, x: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        """Gradient along R, phi and z (n, 3) in galpy's units, and these unit vectors as rows (n, 3, 3)."""
        R, _, phi = self._cylindrical(x)
        along_phi = np.zeros(len(x)) if self.axisymmetric else -self._evaluate("phitorques", x) / R
        gradient = [-self._evaluate("Rforces", x), along_phi, -self._evaluate("zforces", x)]
        return np.stack(gradient, -1), unit_vectors(phi)


def _members(potential: Any) -> list[Any]:
    """Return the members of a sum, nested or not, or of a potential itself."""
    # sums are objects with the members inside since galpy 1.12, lists before
    inside = potential if isinstance(potential, list) else getattr(potential, "_potlist", None)
    if inside is not None:
        found = [member for one in inside for member in _members(one)]
        if not found:
            raise ValueError("an empty list: give a galpy potential, or a sum of them")
        return found
    if isinstance(potential, Force) and not isinstance(potential, GalpyPotential):
        raise ValueError(f"{_label(potential)} depends on the velocity and has no potential: leave it out of the sum")
    if not isinstance(potential, GalpyPotential):
        raise ValueError(f"not a three-dimensional galpy potential: {potential!r}; give one, or a sum of them")
    return [potential]


def _one(potential: Any, members: list[Any]) -> Any:
    """Return what galpy's functions take: a sum of its own kind in place of a list, which it is about to drop."""
    composite = getattr(galpy_potential, "CompositePotential", None)
    if isinstance(potential, list) and composite is not None:
        return members[0] if len(members) == 1 else composite(members)
    return potential


def _units(members: list[Any], ro: Any, vo: Any) -> tuple[float, float]:
    """Return ro (kpc) and vo (km/s) of all members, and of the caller where they have none."""
    for i, one in enumerate(members):
        other = next((m for m in members[:i] if not physical_compatible(m, one)), None)
        if other is not None:
            raise ValueError(
                f"the members' units differ: {_label(other)} {_in_words(other)}, {_label(one)} {_in_words(one)}: "
                "build them with the same ro and vo"
            )
    asked = parse_units(ro, vo)
    found: list[float] = []
    unset = []
    for key, given in zip(("ro", "vo"), asked, strict=True):
        own = [(one, physical[key]) for one in members if (physical := get_physical(one, True))[f"{key}Set"]]
        if given is None:
            unset += [] if own else [key]
            found.append(own[0][1] if own else get_physical(members[0])[key])
        elif own and not np.isclose(given, own[0][1], rtol=1e-8):
            raise ValueError(
                f"{key}={given:g} contradicts {_label(own[0][0])}, which was built with {key}={own[0][1]:g}: leave "
                f"{key} out, or build the potential with yours"
            )
        else:
            found.append(given)
    if unset:
        # once: a line each would say the same
        words = ", ".join(f"{key}={found[('ro', 'vo').index(key)]:g}" for key in unset)
        warnings.warn(
            f"{_label(members[0])} has no units of its own: {words} is taken from galpy's configuration; give ro= "
            "(kpc) and vo= (km/s)",
            UserWarning,
            stacklevel=4,
        )
    return found[0], found[1]


def _in_words(potential: Any) -> str:
    physical = get_physical(potential)
    return f"ro={physical['ro']:g}, vo={physical['vo']:g}"


def _label(potential: Any) -> str:
    # galpy makes the classes of wrappers as it goes, with an underscore before the name
    return type(potential).__name__.removeprefix("_")


def _inside(potential: Any) -> Iterator[Any]:
    """What a wrapper wraps."""
    wrapped = getattr(potential, "_pot", None)
    if isinstance(wrapped, (Force, list)):
        yield from (wrapped if isinstance(wrapped, list) else getattr(wrapped, "_potlist", [wrapped]))


def _changing(potential: Any) -> str:
    """Return the name of what depends on time in a potential, and what it is inside of, or nothing."""
    for inner in _inside(potential):
        if found := _changing(inner):
            return f"{found} in {_label(potential)}"
    passing = any(one.__name__ in _PASSING for one in type(potential).__mro__)
    return _label(potential) if passing or _varies(potential) else ""


def _varies(potential: Any) -> bool:
    names = ("Potentials", "Rforces", *(("phitorques",) if potential.isNonAxi else ()))

    def values(t: float) -> NDArray[Any]:
        return np.array(
            [
                np.asarray(
                    getattr(galpy_potential, f"evaluate{n}")(potential, R, z, phi=phi, t=t, use_physical=False), float
                ).item()
                for n in names
                for R, z, phi in ((1.1, 0.13, 0.3), (0.3, -0.4, 2.0))
            ]
        )

    try:
        now = values(0.0)
    except Exception:  # not evaluated here at all: the comparison of arrays and points says so by name
        return False
    for t in _TIMES:
        try:
            then = values(t)
        except Exception:  # known at some times only
            return True
        if not np.allclose(then, now, rtol=1e-11, atol=1e-13 * np.abs(now).max(), equal_nan=True):
            return True
    return False
