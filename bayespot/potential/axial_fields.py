"""Fields of potentials symmetric about z, in the plane and over (R, z), for one potential and for many draws."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from bayespot.potential.base import Potential
from bayespot.potential.fields import RADIAL_FIELDS, positive_radii
from bayespot.pyro_modules import freeze
from bayespot.units import takes, takes_tensors

#: Fields of a radius R in the plane z = 0, beside `RADIAL_FIELDS`; the first two belong to a height above it.
AXIAL_FIELDS = (
    "vertical_acceleration",
    "surface_density",
    "vertical_frequency",
    "epicycle_frequency",
    "density_flattening",
    "potential_flattening",
)
#: Fields over (R, z).
MERIDIONAL_FIELDS = ("potential", "density", "acceleration_R", "acceleration_z")
#: Height in kpc of the vertical force and of the column of the surface density: that of Kuijken and Gilmore (1991).
HEIGHT = 1.1
#: Draws of a potential that are evaluated together.
_DRAWS_AT_ONCE = 50


@takes_tensors(R="length", height="length")
def axial_fields(
    potential: Potential, R: Tensor, names: Sequence[str] = AXIAL_FIELDS, height: Tensor | float = HEIGHT
) -> dict[str, Tensor]:
    r"""Return `AXIAL_FIELDS` of a potential at radii in the plane.

    ``vertical_acceleration`` is :math:`K_z = -\partial\Phi/\partial z` at (R, ``height``), ``surface_density``
    :math:`\int \rho\, dz` within ``height`` of the plane; the others are methods of `Potential` by the same names.

    Parameters
    ----------
    potential
        Spherical or axisymmetric.
    R : Float[Tensor, "*batch"]
        In kpc.
    names
        Which of the fields, in this order.
    height
        Height above the plane in kpc.

    Returns
    -------
    dict of Float[Tensor, "*batch"]
        In the units of `bayespot.units.UNITS`.

    Raises
    ------
    ValueError
        If a name is unknown, the height is not positive and finite, or the potential is triaxial.

    Examples
    --------
    >>> from bayespot.potential import MWPotential2014
    >>> K_z = axial_fields(MWPotential2014(), [8.0], ["vertical_acceleration"])["vertical_acceleration"]
    >>> round(K_z.item())  # (km/s)^2/kpc
    -1937
    """
    _require_known(names, AXIAL_FIELDS)
    z = torch.as_tensor(height, dtype=R.dtype, device=R.device)
    if z.dim() or not bool(torch.isfinite(z)) or not bool(z > 0):
        raise ValueError(f"height must be one positive, finite number (kpc), got {height}")
    if potential.symmetry == "triaxial":
        raise ValueError(
            f"{type(potential).__name__} is triaxial: it has no fields of R alone; take those at positions instead"
        )
    found = {}
    for name in names:
        if name == "vertical_acceleration":
            found[name] = potential.acceleration(torch.stack([R, torch.zeros_like(R), z.expand_as(R)], -1))[..., 2]
        elif name == "surface_density":
            found[name] = potential.surface_density(R, z.expand_as(R))
        else:
            found[name] = getattr(potential, name)(R)
    return found


@takes_tensors(R="length", z="length")
def meridional_fields(
    potential: Potential, R: Tensor, z: Tensor, names: Sequence[str] = MERIDIONAL_FIELDS
) -> dict[str, Tensor]:
    r"""Return `MERIDIONAL_FIELDS` of a potential at (R, z): :math:`\Phi`, :math:`\rho`, :math:`a_R`, :math:`a_z`.

    Parameters
    ----------
    potential
        Spherical or axisymmetric; of a triaxial one the fields are those at (x, y) = (R, 0).
    R, z : Float[Tensor, "*batch"]
        In kpc.
    names
        Which of the fields, in this order.

    Returns
    -------
    dict of Float[Tensor, "*batch"]
        In the units of `bayespot.units.UNITS`.

    Raises
    ------
    ValueError
        If a name is unknown.
    """
    _require_known(names, MERIDIONAL_FIELDS)
    x = torch.stack([R, torch.zeros_like(R), z], -1)
    found = {}
    if any(name.startswith("acceleration") for name in names):
        a = potential.acceleration(x)
        found = {"acceleration_R": a[..., 0], "acceleration_z": a[..., 2]}
    if "potential" in names:
        found["potential"] = potential.phi(x)
    if "density" in names:
        found["density"] = potential.density(x)
    return {name: found[name] for name in names}


def fields_on_x_axis(potential: Potential, r: Tensor, names: Sequence[str] = RADIAL_FIELDS) -> dict[str, Tensor]:
    """Return some of `bayespot.potential.RADIAL_FIELDS` at (r, 0, 0) of any potential, by its own methods."""
    found = {}
    for name in names:
        if name == "potential":
            found[name] = potential.phi_r(r)
        elif name == "density":
            found[name] = potential.density(torch.stack([r, torch.zeros_like(r), torch.zeros_like(r)], -1))
        else:
            found[name] = getattr(potential, name)(r)
    return found


def fields_of_draws(
    evaluate: Callable[..., dict[str, Tensor]],
    potential: Potential,
    values: Mapping[str, Tensor],
    places: Sequence[Tensor],
    tick: Callable[[], None] | None = None,
) -> dict[str, NDArray[np.float64]]:
    """Return ``evaluate(potential, *places)`` for many values of a potential's sites, each ``(n_draws, n)``.

    ``values`` have a leading axis of draws, ``places`` are tensors ``(n,)``; ``tick`` is called after every draw.
    Elementwise potentials (`Potential.elementwise`) whose sites are scalars are evaluated for many draws at a time.
    """
    n_draws = max((len(value) for value in values.values()), default=1)  # without sites all draws are one
    many = potential.elementwise and bool(values) and all(value.dim() == 1 for value in values.values())
    rows: list[dict[str, Tensor]] = []
    with torch.no_grad():
        for start in range(0, n_draws, _DRAWS_AT_ONCE if many else 1):
            some = {name: value[start : start + _DRAWS_AT_ONCE].detach() for name, value in values.items()}
            n = min(_DRAWS_AT_ONCE, n_draws - start) if many else 1
            if many:
                fixed = freeze(potential, {name: value[:, None] for name, value in some.items()})
                found = evaluate(fixed, *(place.expand(n, -1) for place in places))
            else:
                fixed = freeze(potential, {name: value[0] for name, value in some.items()})
                found = {name: value[None] for name, value in evaluate(fixed, *places).items()}
            rows.append(found)
            for _ in range(n if tick is not None else 0):
                tick()  # type: ignore[misc]
    return {name: torch.cat([row[name] for row in rows]).numpy() for name in rows[0]}


@takes(radii="length", heights="length")
def meridional_grid(radii: ArrayLike, heights: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return radii ``(n,)`` and heights ``(m,)`` in kpc; ValueError unless R > 0 and all are finite."""
    R = positive_radii(radii)
    z = np.atleast_1d(np.asarray(heights, dtype=float))
    if z.ndim != 1 or not len(z) or not np.isfinite(z).all():
        raise ValueError(f"heights must be finite numbers (kpc), got {z[~np.isfinite(z)][:3].tolist()}")
    return R, z


def _require_known(names: Sequence[str], known: tuple[str, ...]) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"unknown field {name!r}; choose one of {', '.join(known)}")
