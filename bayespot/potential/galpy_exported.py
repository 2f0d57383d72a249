"""Ours as galpy's; this file and the bridge beside it are the only importers of galpy."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
import torch
from galpy.potential.Potential import Potential as GalpyPotential
from galpy.potential.SphericalPotential import SphericalPotential
from galpy.util.conversion import parse_length_kpc, parse_velocity_kms
from numpy.typing import NDArray

from bayespot.potential.base import Potential
from bayespot.potential.callables import TorchCallables
from bayespot.potential.radial_density import RadialDensity
from bayespot.units import G

#: Radii in kpc where limits at infinity are looked at.
_FAR = (1e9, 1e12)
#: Most positions whose derivatives are remembered.
_KEPT = 64


class _Masses:
    """What galpy asks of a potential's mass, up to infinity; beside one of its potentials."""

    callables: TorchCallables
    length: float
    speed: float

    @cached_property
    def _total(self) -> float:
        """Mass at infinity in galpy's units; infinite where it grows."""
        near, far = (self._enclosed(r) for r in _FAR)
        return far if abs(far - near) <= 1e-3 * abs(far) else np.inf

    @cached_property
    def _at_infinity(self) -> float:
        """Phi at infinity in galpy's units."""
        one, near, far = self.callables.phi(_on_axis(np.array([1.0, *_FAR])))
        return float(far) / self.speed**2 if abs(far - near) <= 1e-6 * abs(near - one) else np.inf

    def _enclosed(self, r: float) -> float:
        with torch.no_grad():
            mass = self.callables.potential.enclosed_mass(torch.tensor(r, dtype=torch.float64))
        return float(mass) * G / (self.length * self.speed**2)

    def _mass(self, R: Any, z: Any = None, t: float = 0.0) -> Any:
        if z is not None:
            # galpy then integrates over the slab itself
            raise AttributeError
        values = [self._total if np.isposinf(r) else self._enclosed(float(r) * self.length) for r in np.ravel(R)]
        return np.reshape(values, np.shape(R)) if np.ndim(R) else values[0]

    def rhalf(self, t: float = 0.0, INF: Any = np.inf, **kwargs: Any) -> Any:
        """Return the radius of half the mass within ``INF``, as galpy's own."""
        if np.isposinf(np.asarray(INF, dtype=float)) and not np.isfinite(self._total):
            raise ValueError(
                "the mass of this potential grows without end, so that it has no half-mass radius: give INF=, the "
                "radius within which the mass counts"
            )
        return super().rhalf(t=t, INF=INF, **kwargs)  # type: ignore[misc]


class ExportedSphere(_Masses, SphericalPotential):  # type: ignore[misc]
    """A spherical `Potential` in galpy; galpy calls these methods with lengths in units of ro.

    It has what galpy's spherical distribution functions ask for: values at infinity and slopes of the density.
    """

    def __init__(self, potential: Potential, ro: float, vo: float) -> None:
        SphericalPotential.__init__(self, amp=1.0, ro=ro, vo=vo)
        self.hasC = self.hasC_dxdv = self.hasC_dens = False
        self.callables, self.length, self.speed = TorchCallables(potential), ro, vo

    @cached_property
    def _radial_density(self) -> RadialDensity:
        return RadialDensity(self.callables)

    @cached_property
    def _scale(self) -> float:
        """Radius where the density falls as r^-2; galpy's samplers and interpolators start from it."""
        scale = self._radial_density.scale_radius()
        if scale is None:
            # what galpy expects of potentials without a scale
            raise AttributeError("_scale")
        return scale / self.length

    def _radial(self, function: Callable[[NDArray[Any]], NDArray[Any]], r: Any, at_infinity: float = 0.0) -> Any:
        """Return a function of radii in kpc at radii in units of ro, which may be infinite; of the shape of ``r``."""
        flat = np.atleast_1d(np.asarray(r, dtype=float)).ravel()
        near = ~np.isposinf(flat)
        values = np.full(flat.shape, at_infinity)
        if near.any():
            values[near] = function(flat[near] * self.length)
        return values.reshape(np.shape(r)) if np.ndim(r) else float(values[0])

    def _revaluate(self, r: Any, t: float = 0.0) -> Any:
        limit = self._at_infinity if np.isposinf(r).any() else np.nan
        return self._radial(lambda r: self.callables.phi(_on_axis(r)) / self.speed**2, r, limit)

    def _rforce(self, r: Any, t: float = 0.0) -> Any:
        unit = self.length / self.speed**2
        return self._radial(lambda r: -self.callables.gradient(_on_axis(r))[:, 0] * unit, r)

    def _r2deriv(self, r: Any, t: float = 0.0) -> Any:
        unit = self.length**2 / self.speed**2
        return self._radial(lambda r: self.callables.hessian(_on_axis(r))[:, 0, 0] * unit, r)

    def _rdens(self, r: Any, t: float = 0.0) -> Any:
        return self._radial(lambda r: self.callables.density(_on_axis(r)) * self._density_unit, r)

    def _ddensdr(self, r: Any, t: float = 0.0) -> Any:
        # unlike those above galpy calls this and the next as they are, without the amplitude; where a value at infinity
        # is not finite, as of its own classes, its inversions stop at 1e12 rather than divide 0 by 0
        unit = self._amp * self._density_unit * self.length
        return self._radial(lambda r: self._radial_density.slopes(r)[1] * unit, r, np.nan)

    def _d2densdr2(self, r: Any, t: float = 0.0) -> Any:
        unit = self._amp * self._density_unit * self.length**2
        return self._radial(lambda r: self._radial_density.slopes(r)[2] * unit, r, np.nan)

    @property
    def _density_unit(self) -> float:
        """What Msun/kpc^3 is in galpy's units."""
        return G * self.length**2 / self.speed**2

    def _Rforce(self, R: Any, z: Any, phi: Any = 0.0, t: float = 0.0) -> Any:
        return self._along(R, R, z)

    def _zforce(self, R: Any, z: Any, phi: Any = 0.0, t: float = 0.0) -> Any:
        return self._along(z, R, z)

    def _along(self, side: Any, R: Any, z: Any) -> Any:
        """Force along a side of the triangle (R, z, r); galpy's own is 0/0 at the origin and inf/inf at infinity."""
        r = np.hypot(R, z)
        with np.errstate(invalid="ignore", divide="ignore"):
            cosine = np.where((r == 0) | np.isinf(r), 0.0, side / np.where(r == 0, 1.0, r))
        product = np.where(cosine == 0, 0.0, self._rforce(r)) * cosine
        return product if np.ndim(product) else float(product)


def _on_axis(r: NDArray[Any]) -> NDArray[Any]:
    return np.stack([r, np.zeros_like(r), np.zeros_like(r)], -1)


class Exported(_Masses, GalpyPotential):  # type: ignore[misc]
    """A `Potential` of any symmetry in galpy; galpy calls these methods with lengths in units of ro."""

    def __init__(self, potential: Potential, ro: float, vo: float) -> None:
        GalpyPotential.__init__(self, amp=1.0, ro=ro, vo=vo)
        self.hasC = self.hasC_dxdv = self.hasC_dens = False
        self.isNonAxi = potential.symmetry == "triaxial"
        self.callables, self.length, self.speed = TorchCallables(potential), ro, vo
        #: What was last computed where: galpy asks for one component after the other.
        self._last: dict[str, tuple[bytes, NDArray[Any]]] = {}

    def _frame(self, R: Any, z: Any, phi: Any) -> tuple[NDArray[Any], NDArray[Any], tuple[int, ...]]:
        """Positions in kpc (n, 3), the unit vectors (n, 3, 3) along R, phi and z as rows, and the shape."""
        R, z, phi = np.broadcast_arrays(np.asarray(R, dtype=float), z, 0.0 if phi is None else phi)
        shape = R.shape
        frame = unit_vectors(phi.ravel())
        with np.errstate(invalid="ignore"):
            # infinity times zero: galpy asks for limits, and what is not finite is known to be far
            x = (R.ravel()[:, None] * frame[:, 0] + z.ravel()[:, None] * frame[:, 2]) * self.length
        return x, frame, shape

    def _kept(self, name: str, x: NDArray[Any]) -> NDArray[Any]:
        """Return a quantity of `TorchCallables` at positions, the last answer if they are the last few positions."""
        if len(x) > _KEPT:
            return getattr(self.callables, name)(x)
        key, last = x.tobytes(), self._last.get(name)
        if last is None or last[0] != key:
            last = self._last[name] = (key, getattr(self.callables, name)(x))
        return last[1]

    def _first(self, R: Any, z: Any, phi: Any) -> NDArray[Any]:
        """Gradient along R, phi and z (3, *shape), galpy's units; zero at infinity."""
        x, frame, shape = self._frame(R, z, phi)
        near = np.isfinite(x).all(1)
        gradient = np.zeros_like(x)
        if near.any():
            gradient[near] = (frame[near] @ self._kept("gradient", x[near])[..., None])[..., 0]
        return (gradient * self.length / self.speed**2).T.reshape(3, *shape)

    def _second(self, R: Any, z: Any, phi: Any) -> NDArray[Any]:
        """Second derivatives along R, phi and z (3, 3, *shape), galpy's units."""
        x, frame, shape = self._frame(R, z, phi)
        hessian = frame @ self._kept("hessian", x) @ frame.transpose(0, 2, 1) * self.length**2 / self.speed**2
        return np.moveaxis(hessian, 0, -1).reshape(3, 3, *shape)

    def _evaluate(self, R: Any, z: Any, phi: Any = 0.0, t: float = 0.0) -> Any:
        x, _, shape = self._frame(R, z, phi)
        near = np.isfinite(x).all(1)
        value = np.full(len(x), np.nan if near.all() else self._at_infinity)
        if near.any():
            value[near] = self.callables.phi(x[near]) / self.speed**2
        return value.reshape(shape)

    def _Rforce(self, R: Any, z: Any, phi: Any = 0.0, t: float = 0.0) -> Any:
        return -self._first(R, z, phi)[0]

    def _phitorque(self, R: Any, z: Any, phi: Any = 0.0, t: float = 0.0) -> Any:
        return -R * self._first(R, z, phi)[1]

    def _zforce(self, R: Any, z: Any, phi: Any = 0.0, t: float = 0.0) -> Any:
        return -self._first(R, z, phi)[2]

    def _R2deriv(self, R: Any, z: Any, phi: Any = 0.0, t: float = 0.0) -> Any:
        return self._second(R, z, phi)[0, 0]

    def _z2deriv(self, R: Any, z: Any, phi: Any = 0.0, t: float = 0.0) -> Any:
        return self._second(R, z, phi)[2, 2]

    def _Rzderiv(self, R: Any, z: Any, phi: Any = 0.0, t: float = 0.0) -> Any:
        return self._second(R, z, phi)[0, 2]

    def _phi2deriv(self, R: Any, z: Any, phi: Any = 0.0, t: float = 0.0) -> Any:
        return R**2 * self._second(R, z, phi)[1, 1] - R * self._first(R, z, phi)[0]

    def _Rphideriv(self, R: Any, z: Any, phi: Any = 0.0, t: float = 0.0) -> Any:
        return R * self._second(R, z, phi)[0, 1] + self._first(R, z, phi)[1]

    def _phizderiv(self, R: Any, z: Any, phi: Any = 0.0, t: float = 0.0) -> Any:
        return R * self._second(R, z, phi)[1, 2]

    def _dens(self, R: Any, z: Any, phi: Any = 0.0, t: float = 0.0) -> Any:
        x, _, shape = self._frame(R, z, phi)
        return self.callables.density(x).reshape(shape) * G * self.length**2 / self.speed**2


def unit_vectors(phi: NDArray[Any]) -> NDArray[Any]:
    """Unit vectors along R, phi and z as rows (n, 3, 3)."""
    c, s, zero = np.cos(phi), np.sin(phi), np.zeros(len(phi))
    return np.stack([np.stack(row, -1) for row in ((c, s, zero), (-s, c, zero), (zero, zero, zero + 1))], -2)


def parse_units(ro: Any, vo: Any) -> tuple[float | None, float | None]:
    """Return galpy's units in kpc and km/s, given as numbers, as quantities or not at all.

    Raises
    ------
    ValueError
        If one is not a positive number, or its unit is not that of a length and a speed.
    """
    found: list[float | None] = []
    for value, name, unit, parse in ((ro, "ro", "kpc", parse_length_kpc), (vo, "vo", "km/s", parse_velocity_kms)):
        try:
            number = None if value is None else float(parse(value))
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{name} must be a number of {unit} or a quantity, got {value!r} ({error})") from error
        if number is not None and not (number > 0 and np.isfinite(number)):
            raise ValueError(f"galpy's units ro (kpc) and vo (km/s) must be positive, got {name}={value}")
        found.append(number)
    return found[0], found[1]


def exported(potential: Potential, ro: Any, vo: Any) -> Any:
    """Return the potential as galpy's, for galpy's units ro (kpc) and vo (km/s)."""
    length, speed = parse_units(ro, vo)
    if length is None or speed is None:
        raise ValueError(f"galpy's units ro (kpc) and vo (km/s) must be positive, got ro={ro} and vo={vo}")
    return (ExportedSphere if potential.symmetry == "spherical" else Exported)(potential, length, speed)
