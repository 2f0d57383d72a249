"""The figures of a run, one file each, and what they show in words."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bayespot.mock.sample import truth_potential
from bayespot.posterior.posterior import PotentialDraws
from bayespot.potential.base import Potential
from bayespot.potential.fields import PLANE_FIELDS, truth_field
from bayespot.report import plots
from bayespot.report.axial_figures import axial_run_figures, default_radii, star_positions

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Fields that a run draws, one figure each.
FIGURES = ("potential", "circular_speed", "enclosed_mass", "density")
#: Fields whose uncertainty a run draws against radius.
SD_FIELDS = ("potential", "radial_acceleration", "density")
#: Most parameters of a pair plot.
MAX_PARAMETERS = 5


def draw_figures(
    folder: Path,
    posterior: PotentialDraws,
    elbo: list[float],
    formats: tuple[str, ...] = ("png",),
    tick: Callable[[], None] | None = None,
    missing_only: bool = False,
) -> list[Path]:
    """Draw every figure of a run; return the files.

    Fields of `FIGURES`, their uncertainty against radius and in a plane, the parameters of the potential if they are
    few, and the ELBO.

    Parameters
    ----------
    folder
        Made if need be.
    posterior, elbo
        What to draw.
    formats
        ``"png"``, ``"pdf"`` or both.
    tick
        Called after every figure.
    missing_only
        Leave files that are there as they are.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with plots.style():
        for name, draw in run_figures(posterior, elbo):
            paths = [folder / f"{name}.{suffix}" for suffix in formats]
            written.extend(paths)
            paths = [path for path in paths if not (missing_only and path.exists())]
            if paths:
                figure = draw()
                for path in paths:
                    plots.save(figure, path)
                    # the layout is found once, not again for the other format
                    figure.set_layout_engine("none")
            if tick is not None:
                tick()
    return written


def run_figures(posterior: PotentialDraws, elbo: list[float]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield the names of a run's figures and what draws them."""
    truth = truth_potential(posterior.meta.get("meta", {}))
    axial = posterior.symmetry == "axisymmetric"
    yield from axial_run_figures(posterior, truth) if axial else _radial_figures(posterior, truth)

    def trace() -> Figure:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(plots.SINGLE, 0.65 * plots.SINGLE), layout="constrained")
        plots.elbo_trace(figure.subplots(), elbo)
        return figure

    names = few_parameters(posterior)
    if len(names) > 1:
        true = _true_parameters(truth, names)
        yield "parameters", lambda: plots.parameters(posterior.to_inference_data(), names, true)
    if elbo:
        yield "elbo", trace


def _radial_figures(posterior: PotentialDraws, truth: Potential | None) -> Iterator[tuple[str, Callable[[], Any]]]:
    r = default_radii(posterior.meta, 100)
    few = posterior.thinned(300)
    found = functools.cache(lambda: few.radial_fields(r))

    def field(name: str) -> Figure:
        true = None if truth is None else truth_field(truth, name, r)
        return plots.two_panel(found()[name], true, posterior.meta.get("radii"))

    def maps() -> Figure:
        planes = [few.plane(name) for name in PLANE_FIELDS]
        return plots.uncertainty_maps(planes, star_positions(posterior.meta), posterior.meta["n_stars"])

    for name in FIGURES:
        yield name, functools.partial(field, name)
    yield "sd_profiles", lambda: plots.sd_profiles([found()[name] for name in SD_FIELDS], posterior.meta.get("radii"))
    yield "uncertainty_maps", maps


def few_parameters(posterior: PotentialDraws) -> list[str]:
    """Return the scalar sites of the potential, if no draw has others; none if they are more than `MAX_PARAMETERS`."""
    sites = [{k: v for k, v in posterior.source(i)[1].items() if k.startswith("potential.")} for i in (0, -1)]
    names = list(sites[0])
    scalar = all(v.dim() == 0 for site in sites for v in site.values())
    return names if scalar and list(sites[1]) == names and len(names) <= MAX_PARAMETERS else []


def _true_parameters(truth: Any, names: list[str]) -> dict[str, float] | None:
    """The truth's parameters by site, where it has all of them."""
    found: dict[str, Any] = {name: getattr(truth, name.removeprefix("potential."), None) for name in names}
    if truth is None or any(value is None for value in found.values()):
        return None
    return {name: float(value) for name, value in found.items()}
