"""The figures of a run of an axisymmetric potential that take the place of those of spheres."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bayespot.posterior.posterior import PotentialDraws
from bayespot.potential.axial_fields import AXIAL_FIELDS, axial_fields
from bayespot.potential.base import Potential
from bayespot.potential.fields import Field, truth_field
from bayespot.report import plots

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Fields of R with a figure each, by the figure's name; those of `RADIAL_FIELDS` in the plane z = 0.
AXIAL_FIGURES = {
    "circular_speed": "circular_speed",
    "vertical_force": "vertical_acceleration",
    "surface_density": "surface_density",
    "enclosed_mass": "enclosed_mass",
    "density": "density",
    "potential": "potential",
}
#: Figures with several fields.
SHARED_FIGURES = {
    "flattening": ("density_flattening", "potential_flattening"),
    "frequencies": ("epicycle_frequency", "vertical_frequency"),
}
#: Fields whose uncertainty is drawn against R.
AXIAL_SD_FIELDS = ("potential", "radial_acceleration", "vertical_acceleration", "density")
#: Draws of curves and of maps; every one costs a potential's tables and the search for surfaces.
_N_DRAWS = 200
_N_RADII = 40


def default_radii(catalog: dict[str, Any], n: int = 60) -> np.ndarray:
    """Return log-spaced radii from the 1 % to the 99 % quantile of the stars."""
    return np.geomspace(catalog["r_q"][1], catalog["r_q"][7], n)


def star_positions(meta: dict[str, Any]) -> np.ndarray | None:
    """Return positions of a sample of a run's stars; those of older runs are placed at random about the centre."""
    if "positions" in meta:
        return meta["positions"]
    if "radii" not in meta:
        return None
    directions = np.random.default_rng(0).normal(size=(40, len(meta["radii"]), 3))
    directions /= np.linalg.norm(directions, axis=-1, keepdims=True)
    return (np.asarray(meta["radii"])[:, None] * directions).reshape(-1, 3)


def axial_run_figures(posterior: PotentialDraws, truth: Potential | None) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield the names of the figures of an axisymmetric potential's fields and what draws them.

    Fields of R in the plane z = 0, flattening, frequencies, relative sd, and maps over (R, z).

    Parameters
    ----------
    posterior
        Draws with what is known of the stars.
    truth
        The true potential of a mock, or None.
    """
    R = default_radii(posterior.meta, _N_RADII)
    few = posterior.thinned(_N_DRAWS)
    stars_r = _cylindrical_radii(posterior.meta)

    @functools.cache
    def found() -> dict[str, Field]:
        fields = few.radial_fields(R) | few.axial_fields(R)
        down = fields["vertical_acceleration"]
        # drawn as it is quoted: towards the plane, positive
        return fields | {down.name: Field(down.name, down.unit, down.points, -down.draws)}

    def true(name: str) -> np.ndarray | None:
        if truth is None:
            return None
        if name not in AXIAL_FIELDS:
            return truth_field(truth, name, R)
        with torch.no_grad():
            values = axial_fields(truth, torch.as_tensor(R), [name])[name].numpy()
        return -values if name == "vertical_acceleration" else values

    def one(name: str) -> Figure:
        return plots.two_panel(found()[name], true(name), stars_r, coordinate="R")

    def several(names: tuple[str, ...]) -> Figure:
        truths = None if truth is None else {name: true(name) for name in names}
        return plots.bands_figure([found()[name] for name in names], truths, stars_r)  # type: ignore[arg-type]

    def spreads() -> Figure:
        return plots.sd_profiles([found()[name] for name in AXIAL_SD_FIELDS], stars_r, coordinate="R")

    for figure, name in AXIAL_FIGURES.items():
        yield figure, functools.partial(one, name)
    for figure, names in SHARED_FIGURES.items():
        yield figure, functools.partial(several, names)
    yield "sd_profiles", spreads
    yield "meridional_maps", lambda: plots.meridional_maps(few.meridional_maps(), star_positions(posterior.meta))


def _cylindrical_radii(meta: dict[str, Any]) -> np.ndarray | None:
    x = star_positions(meta)
    return None if x is None else np.hypot(x[:, 0], x[:, 1])
