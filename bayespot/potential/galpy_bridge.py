"""galpy: its potentials as ours and ours as its own. The only importer of galpy."""

from __future__ import annotations

from typing import Any

import numpy as np
from galpy import potential as galpy_potential
from galpy.potential.Potential import Potential as GalpyPotential
from galpy.potential.SphericalPotential import SphericalPotential
from galpy.util.conversion import get_physical
from numpy.typing import NDArray

from bayespot.potential.base import Potential
from bayespot.potential.callables import TorchCallables


class ExportedSphere(SphericalPotential):  # type: ignore[misc]
    """A spherical `Potential` in galpy; galpy calls these methods with lengths in units of ro."""

    def __init__(self, potential: Potential, ro: float, vo: float) -> None:
        SphericalPotential.__init__(self, amp=1.0, ro=ro, vo=vo)
        self.hasC = self.hasC_dxdv = self.hasC_dens = False
        self.callables, self.length, self.speed = TorchCallables(potential), ro, vo

    def _positions(self, r: Any) -> NDArray[Any]:
        flat = np.atleast_1d(np.asarray(r, dtype=float)).ravel() * self.length
        return np.stack([flat, 0 * flat, 0 * flat], -1)

    def _shaped(self, values: NDArray[Any], r: Any) -> Any:
        return values.reshape(np.shape(r)) if np.ndim(r) else float(values[0])

    def _revaluate(self, r: Any, t: float = 0.0) -> Any:
        return self._shaped(self.callables.phi(self._positions(r)), r) / self.speed**2

    def _rforce(self, r: Any, t: float = 0.0) -> Any:
        return -self._shaped(self.callables.gradient(self._positions(r))[:, 0], r) * self.length / self.speed**2

    def _r2deriv(self, r: Any, t: float = 0.0) -> Any:
        second = self.callables.hessian(self._positions(r))[:, 0, 0]
        return self._shaped(second, r) * self.length**2 / self.speed**2


class Exported(GalpyPotential):  # type: ignore[misc]
    """A `Potential` of any symmetry in galpy; galpy calls these methods with lengths in units of ro."""

    def __init__(self, potential: Potential, ro: float, vo: float) -> None:
        GalpyPotential.__init__(self, amp=1.0, ro=ro, vo=vo)
        self.hasC = self.hasC_dxdv = self.hasC_dens = False
        self.isNonAxi = potential.symmetry == "triaxial"
        self.callables, self.length, self.speed = TorchCallables(potential), ro, vo

    def _frame(self, R: Any, z: Any, phi: Any) -> tuple[NDArray[Any], NDArray[Any], tuple[int, ...]]:
        """Positions in kpc (n, 3), the unit vectors (n, 3, 3) along R, phi and z as rows, and the shape."""
        R, z, phi = np.broadcast_arrays(np.asarray(R, dtype=float), z, 0.0 if phi is None else phi)
        shape = R.shape
        frame = _unit_vectors(phi.ravel())
        x = (R.ravel()[:, None] * frame[:, 0] + z.ravel()[:, None] * frame[:, 2]) * self.length
        return x, frame, shape

    def _first(self, R: Any, z: Any, phi: Any) -> NDArray[Any]:
        """Gradient along R, phi and z (3, *shape), galpy's units."""
        x, frame, shape = self._frame(R, z, phi)
        gradient = (frame @ self.callables.gradient(x)[..., None])[..., 0] * self.length / self.speed**2
        return gradient.T.reshape(3, *shape)

    def _second(self, R: Any, z: Any, phi: Any) -> NDArray[Any]:
        """Second derivatives along R, phi and z (3, 3, *shape), galpy's units."""
        x, frame, shape = self._frame(R, z, phi)
        hessian = frame @ self.callables.hessian(x) @ frame.transpose(0, 2, 1) * self.length**2 / self.speed**2
        return np.moveaxis(hessian, 0, -1).reshape(3, 3, *shape)

    def _evaluate(self, R: Any, z: Any, phi: Any = 0.0, t: float = 0.0) -> Any:
        x, _, shape = self._frame(R, z, phi)
        return self.callables.phi(x).reshape(shape) / self.speed**2

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
        second = self.callables.hessian(x).trace(axis1=1, axis2=2).reshape(shape)
        return second * self.length**2 / self.speed**2 / (4 * np.pi)


def _unit_vectors(phi: NDArray[Any]) -> NDArray[Any]:
    """Unit vectors along R, phi and z as rows (n, 3, 3)."""
    c, s, zero = np.cos(phi), np.sin(phi), np.zeros(len(phi))
    return np.stack([np.stack(row, -1) for row in ((c, s, zero), (-s, c, zero), (zero, zero, zero + 1))], -2)


def exported(potential: Potential, ro: float, vo: float) -> Any:
    """Return the potential as galpy's, for galpy's units ro (kpc) and vo (km/s)."""
    if not (ro > 0 and vo > 0):
        raise ValueError(f"galpy's units ro (kpc) and vo (km/s) must be positive, got {ro} and {vo}")
    return (ExportedSphere if potential.symmetry == "spherical" else Exported)(potential, ro, vo)


class GalpyCallables:
    """A galpy potential, or a list of them, as `bayespot.potential.callables.Callables`."""

    def __init__(self, potential: Any, ro: float | None, vo: float | None) -> None:
        physical = get_physical(potential)
        self.potential = potential
        self.ro, self.vo = physical["ro"] if ro is None else ro, physical["vo"] if vo is None else vo
        self.axisymmetric = not is_non_axisymmetric(potential)

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
        R, z, phi = self._cylindrical(x)
        function = getattr(galpy_potential, f"evaluate{quantity}")
        return np.broadcast_to(np.asarray(function(self.potential, R, z, phi=phi, use_physical=False), float), R.shape)

    def _gradient(self, x: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        """Gradient along R, phi and z (n, 3) in galpy's units, and these unit vectors as rows (n, 3, 3)."""
        R, _, phi = self._cylindrical(x)
        along_phi = np.zeros(len(x)) if self.axisymmetric else -self._evaluate("phitorques", x) / R
        gradient = [-self._evaluate("Rforces", x), along_phi, -self._evaluate("zforces", x)]
        return np.stack(gradient, -1), _unit_vectors(phi)


def is_non_axisymmetric(potential: Any) -> bool:
    """Whether a galpy potential, or one of a list, depends on the azimuth."""
    members = potential if isinstance(potential, list) else [potential]
    wrong = [one for one in members if not isinstance(one, GalpyPotential)]
    if wrong:
        raise ValueError(f"not a three-dimensional galpy potential: {wrong[0]!r}; give one, or a list of them")
    return any(bool(one.isNonAxi) for one in members)
