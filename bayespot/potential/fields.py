"""Quantities that follow from potentials, with their posterior draws, on radii, positions and planes."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from bayespot.potential.base import Potential, radial_derivatives
from bayespot.pyro_modules import freeze
from bayespot.units import G, takes, takes_tensors

if TYPE_CHECKING:
    from astropy.table import QTable
    from numpy.typing import ArrayLike, NDArray

#: Quantiles written to tables.
QUANTILES = (0.025, 0.16, 0.5, 0.84, 0.975)
#: Fields of a radius that `Posterior.predict` tabulates.
RADIAL_FIELDS = ("potential", "radial_acceleration", "density", "enclosed_mass", "circular_speed")


@takes(points="length", draws="internal")
@dataclass(frozen=True)
class Field:
    """Posterior draws of one quantity.

    Parameters
    ----------
    name, unit
        Quantity (a key of `bayespot.units.UNITS`) and its unit (astropy syntax).
    points : (n,) or (n, 3)
        Radii or positions in kpc.
    draws : (n_draws, n) or (n_draws, n, 3)
        Values in the unit.
    """

    name: str
    unit: str
    points: NDArray[Any]
    draws: NDArray[Any]

    @property
    def mean(self) -> NDArray[Any]:
        """Posterior mean."""
        return self.draws.mean(0)

    @property
    def sd(self) -> NDArray[Any]:
        """Posterior standard deviation."""
        return self.draws.std(0, ddof=1)

    def quantile(self, q: float | Sequence[float]) -> NDArray[Any]:
        """Posterior quantiles along a leading axis (none for a scalar ``q``)."""
        return np.quantile(self.draws, q, axis=0)

    def to_table(self) -> QTable:
        """Return a table with units: ``r`` (or ``x y z``), ``mean``, ``sd`` and the quantiles ``q2.5`` to ``q97.5``."""
        from astropy import units as u
        from astropy.table import QTable

        places = {"r": self.points} if self.points.ndim == 1 else dict(zip("xyz", self.points.T, strict=True))
        table = QTable({name: value * u.kpc for name, value in places.items()}, meta={"field": self.name})
        columns = {"mean": self.mean, "sd": self.sd}
        columns |= {f"q{100 * q:g}": value for q, value in zip(QUANTILES, self.quantile(QUANTILES), strict=True)}
        for name, value in columns.items():
            table[name] = value * u.Unit(self.unit)
        return table


#: The quantiles that come first in a table: what a reader looks for.
_INTERVAL = (0.5, 0.16, 0.84)


def add_bands(table: QTable, fields: Mapping[str, Field]) -> QTable:
    """Add columns with units to a table: ``_q50 _q16 _q84`` of every field, then ``_mean _sd _q2.5 _q97.5`` of all."""
    from astropy import units as u

    for name, field in fields.items():
        for q, values in zip(_INTERVAL, field.quantile(_INTERVAL), strict=True):
            table[f"{name}_q{100 * q:g}"] = values * u.Unit(field.unit)
    outer = [q for q in QUANTILES if q not in _INTERVAL]
    for name, field in fields.items():
        table[f"{name}_mean"] = field.mean * u.Unit(field.unit)
        table[f"{name}_sd"] = field.sd * u.Unit(field.unit)
        for q, values in zip(outer, field.quantile(outer), strict=True):
            table[f"{name}_q{100 * q:g}"] = values * u.Unit(field.unit)
    return table


#: Draws of a potential that are evaluated together: enough that the number of operations does not matter.
_DRAWS_AT_ONCE = 50
#: Half the step in ln r of the slope of the density.
_SLOPE_STEP = 0.02
#: Planes of `Posterior.plane`.
PLANES = ("Rz", "xy")
#: Fields of a plane: of the acceleration its magnitude.
PLANE_FIELDS = ("potential", "acceleration", "density")


@takes(first="length", second="length", mean="internal", sd="internal")
@dataclass(frozen=True)
class PlaneField:
    """Posterior mean and standard deviation of one quantity on a grid of cells in a plane.

    Parameters
    ----------
    name, unit
        Quantity (``"acceleration"``: its magnitude; ``"acceleration_R"``, ``"acceleration_z"``: its components) and
        its unit (astropy syntax).
    plane
        ``"Rz"`` (the half-plane y = 0, x = R > 0, or its quarter z > 0) or ``"xy"`` (z = 0).
    first, second : (n,), (m,)
        Centres of the cells along R or x, and along z or y, in kpc.
    mean, sd : (m, n)
        In the unit.
    """

    name: str
    unit: str
    plane: str
    first: NDArray[Any]
    second: NDArray[Any]
    mean: NDArray[Any]
    sd: NDArray[Any]

    @property
    def relative_sd(self) -> NDArray[Any]:
        """Posterior standard deviation over the magnitude of the mean."""
        return self.sd / np.abs(self.mean)

    @property
    def points(self) -> NDArray[Any]:
        """Positions of the cells ``(m, n, 3)`` in kpc."""
        return plane_points(self.plane, self.first, self.second)

    @property
    def edges(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """Edges of the cells along both axes, in kpc."""
        step = self.second[1] - self.second[0]
        first, second = (np.append(axis - step / 2, axis[-1] + step / 2) for axis in (self.first, self.second))
        return first, second


@takes(first="length", second="length")
def plane_points(plane: str, first: NDArray[Any], second: NDArray[Any]) -> NDArray[Any]:
    """Return the positions ``(m, n, 3)`` of the cells with centres ``first (n,)`` and ``second (m,)`` in kpc."""
    a, b = np.meshgrid(first, second)
    return np.stack([a, 0 * a, b] if plane == "Rz" else [a, b, 0 * a], -1)


def positive_radii(radii: ArrayLike) -> NDArray[Any]:
    """Return radii ``(n,)`` in kpc; ValueError unless all are positive and finite."""
    r = np.atleast_1d(np.asarray(radii, dtype=float))
    bad = ~(np.isfinite(r) & (r > 0))
    if r.ndim != 1 or bad.any():
        raise ValueError(f"radii must be positive and finite (kpc), got {r[bad][:3].tolist()}")
    return r


def _require_places(x: Tensor, positions: bool) -> None:
    bad = ~torch.isfinite(x) if positions else ~(torch.isfinite(x) & (x >= 0))
    if bool(bad.any()):
        what = "positions must be finite" if positions else "radii must be finite and not negative"
        raise ValueError(f"{what} (kpc), got {x[bad][:3].tolist()}")


@takes_tensors(x="length")
def evaluator(name: str, x: Tensor) -> Callable[[Potential], Tensor]:
    """Return what evaluates a quantity of a potential at radii ``(n,)`` or positions ``(n, 3)``.

    Raises
    ------
    ValueError
        If the quantity is unknown, the points do not fit it, or one is not finite or a radius is negative.
    """
    positions = x.dim() == 2 and x.shape[-1] == 3
    known = (*RADIAL_FIELDS, "density_slope", "acceleration")
    if name not in known:
        raise ValueError(f"unknown field {name!r}; choose one of {', '.join(known)}")
    if x.dim() != 1 and not positions:
        raise ValueError(f"points must be radii (n,) or positions (n, 3), got shape {tuple(x.shape)}")
    _require_places(x, positions)
    if positions:
        method = {"potential": "phi", "acceleration": "acceleration", "density": "density"}.get(name)
        if method is None:
            raise ValueError(f"{name} is a function of radius: give radii (n,)")
        return functools.partial(_call, method, x)
    if name == "acceleration":
        raise ValueError("acceleration needs positions (n, 3); for radii ask radial_acceleration")
    if name == "density":
        return functools.partial(_call, "density", torch.stack([x, 0 * x, 0 * x], -1))
    if name == "density_slope":
        return functools.partial(_density_slope, x)
    return functools.partial(_call, "phi_r" if name == "potential" else name, x)


def _density_slope(r: Tensor, potential: Potential) -> Tensor:
    """d ln rho / d ln r, by central differences."""
    at = r * torch.tensor([[-_SLOPE_STEP], [_SLOPE_STEP]], dtype=r.dtype).exp()
    low, high = potential.density(torch.stack([at, 0 * at, 0 * at], -1)).detach().log()
    return (high - low) / (2 * _SLOPE_STEP)


def _call(method: str, x: Tensor, potential: Potential) -> Tensor:
    return getattr(potential, method)(x).detach()


@takes_tensors(r="length")
def radial_fields(potential: Potential, r: Tensor) -> dict[str, Tensor]:
    r"""Return all of `RADIAL_FIELDS` of a spherical potential at radii ``(n,)`` from one evaluation of Phi.

    With primes for d/dr: :math:`v_c^2 = r \Phi'`, :math:`M = r^2 \Phi' / G` and
    :math:`\rho = M' / 4 \pi r^2`; the numbers are those of the potential's own methods.
    """
    # as in `Potential.density`, the centre counts as 1e-60 kpc
    r = r.detach().clamp(min=1e-60)
    return _fields(r, *radial_derivatives(potential, r))


@takes_tensors(r="length")
def radial_fields_of_draws(
    potential: Potential, values: Mapping[str, Tensor], r: Tensor, tick: Callable[[], None] | None = None
) -> dict[str, Tensor]:
    """Return `radial_fields` for many values of a potential's sites, each ``(n_draws, n)``.

    ``values`` have a leading axis of draws; ``tick`` is called after every draw. Potentials that compute many draws at
    once (`Potential.radial_draws`) are asked for some at a time.
    """
    r = r.detach()
    n_draws = max((len(value) for value in values.values()), default=1)  # without sites all draws are one
    rows: list[dict[str, Tensor]] = []
    with torch.no_grad():
        for start in range(0, n_draws, _DRAWS_AT_ONCE):
            some = {name: value[start : start + _DRAWS_AT_ONCE].detach() for name, value in values.items()}
            n = min(_DRAWS_AT_ONCE, n_draws - start)
            # as in `Potential.density`, the centre counts as 1e-60 kpc
            found = potential.radial_draws(some, r.clamp(min=1e-60))
            if found is not None:
                rows.append(_fields(r.clamp(min=1e-60), *found))
            for i in range(n):
                if found is None:
                    one = radial_fields(freeze(potential, {name: value[i] for name, value in some.items()}), r)
                    rows.append({name: value[None] for name, value in one.items()})
                if tick is not None:
                    tick()
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


def _fields(r: Tensor, phi: Tensor, slope: Tensor, mass_slope: Tensor) -> dict[str, Tensor]:
    return {
        "potential": phi,
        "radial_acceleration": -slope,
        "density": mass_slope / (4 * math.pi * r**2),
        "enclosed_mass": r**2 * slope / G,
        "circular_speed": (r * slope).sqrt(),
    }


@takes_tensors(points="length")
def truth_field(potential: Potential, name: str, points: ArrayLike | Tensor) -> NDArray[Any]:
    """Return a quantity of a known potential at the same kind of points, for comparison."""
    x = torch.as_tensor(points, dtype=torch.float64).detach()
    with torch.no_grad():
        return evaluator(name, x)(potential).numpy()
