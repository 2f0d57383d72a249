"""Maps of a plane: standard deviations, contours of the mean, density of the stars."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from bayespot.potential.fields import PlaneField
from bayespot.report.plots.style import DOUBLE, SYMBOLS, UNITS, new_figure, power_of_ten
from bayespot.units import takes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import ArrayLike, NDArray


def uncertainty_map(ax: Axes, field: PlaneField, relative: bool = True, n_contours: int = 6) -> Axes:
    """Draw the posterior sd over a plane with a colour bar, and contours of the posterior mean.

    Parameters
    ----------
    ax
        Axes of a figure.
    field
        What `Posterior.plane` returned.
    relative
        Per cent of the mean, otherwise in the field's unit.
    n_contours
        About as many contours at round values, evenly spaced (the density's and the acceleration's in the logarithm).
    """
    symbol = SYMBOLS.get(field.name, field.name)
    values = 100 * field.relative_sd if relative else field.sd
    label = f"relative sd of {symbol} [%]" if relative else f"sd of {symbol} [{UNITS.get(field.name, field.unit)}]"
    _mesh(ax, field, field.edges, values, label, "viridis")
    shown = field.mean if field.name == "potential" else np.abs(field.mean)
    levels = round_levels(float(shown.min()), float(shown.max()), n_contours, field.name != "potential")
    lines = ax.contour(field.first, field.second, shown, levels=levels, colors="white", linewidths=0.7)
    lines.set_linestyle("solid")
    ax.clabel(lines, fmt=power_of_ten, fontsize=5.5)
    return ax


@takes(positions="length")
def star_map(ax: Axes, field: PlaneField, positions: ArrayLike, n_stars: float | None = None) -> Axes:
    """Draw the number density of stars in a field's plane, averaged over azimuth (Rz) or projected along z (xy).

    Parameters
    ----------
    ax
        Axes of a figure.
    field
        A field of the plane and extent.
    positions : (n, 3)
        In kpc; a sample of the stars.
    n_stars
        Number of stars that it stands for; None: n.
    """
    x = np.asarray(positions, dtype=float)
    first, second = (axis[::2] for axis in field.edges)
    rz = field.plane == "Rz"
    columns = (np.hypot(x[:, 0], x[:, 1]), x[:, 2]) if rz else (x[:, 0], x[:, 1])
    counts, _, _ = np.histogram2d(columns[0], columns[1], bins=(first, second))
    area = np.diff(second)[0] * np.diff(np.pi * first**2 if rz else first)
    scale = 1.0 if n_stars is None else n_stars / len(x)
    density = np.where(counts > 0, scale * counts / area[:, None], np.nan).T
    label = r"stars [kpc$^{-3}$]" if rz else r"stars, projected [kpc$^{-2}$]"
    _mesh(ax, field, (first, second), density, label, "cividis")
    return ax


@takes(positions="length")
def uncertainty_maps(
    fields: Sequence[PlaneField],
    positions: ArrayLike | None = None,
    n_stars: float | None = None,
    figure: Any = None,
) -> Any:
    """Return a figure, two columns wide: a map per field of a plane, the potential's in its unit, one of the stars."""
    n = len(fields) + (positions is not None)
    rz = fields[0].plane == "Rz"
    columns = n if rz else -(-n // 2)
    height = 1.8 * DOUBLE / n + 0.6 if rz else DOUBLE / columns * -(-n // columns) * 1.12
    figure = new_figure(figure, DOUBLE, height)
    panels = figure.subplots(-(-n // columns), columns, squeeze=False)
    for ax in panels.flat[n:]:
        ax.axis("off")
    for ax, field in zip(panels.flat, fields, strict=False):
        uncertainty_map(ax, field, relative=field.name != "potential")
    if positions is not None:
        star_map(panels.flat[n - 1], fields[0], positions, n_stars)
    for ax in panels[:, 1:].flat:
        ax.set_ylabel("")
    units = ", ".join(f"{SYMBOLS[field.name]} [{UNITS[field.name]}]" for field in fields)
    figure.supxlabel(f"contours: posterior mean of {units}", fontsize=7)
    return figure


def _mesh(ax: Axes, field: PlaneField, edges: tuple[Any, Any], values: NDArray[Any], label: str, cmap: str) -> None:
    """Colour the cells, with a colour bar on top, and label the axes."""
    color_bar(ax, colored_cells(ax, edges, values, cmap), label)
    ax.set_aspect("equal")
    names = (r"$R$ [kpc]", r"$z$ [kpc]") if field.plane == "Rz" else (r"$x$ [kpc]", r"$y$ [kpc]")
    ax.set_xlabel(names[0])
    ax.set_ylabel(names[1])


def colored_cells(ax: Axes, edges: tuple[Any, Any], values: NDArray[Any], cmap: str) -> Any:
    """Colour the cells, logarithmically where values span more than a factor 4; return what a colour bar needs."""
    from matplotlib.colors import LogNorm, Normalize

    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    norm = LogNorm(low, high) if low > 0 and high > 4 * low else Normalize(low, high)
    return ax.pcolormesh(*edges, values, cmap=cmap, norm=norm, rasterized=True)


def color_bar(ax: Axes, mesh: Any, label: str, thickness: float = 0.035, powers: bool = False) -> None:
    """Draw a colour bar on top of a map, as wide as the map.

    ``thickness`` is in the map's height; with ``powers`` its few numbers are powers of ten where they are large.
    """
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

    # an inset keeps the width of the map, whatever its aspect
    bar = ax.figure.colorbar(
        mesh,
        cax=ax.inset_axes((0, 1 + 0.03 / 0.035 * thickness, 1, thickness)),
        orientation="horizontal",
        ticklocation="top",
        label=label,
    )
    low, high = mesh.get_clim()
    decades = np.log10(high / low) if isinstance(mesh.norm, LogNorm) else 0.0
    digits = (1, 2, 5) if decades <= 1 else (1, 3) if decades < 2.2 else (1,)
    bar.locator = LogLocator(subs=digits, numticks=9) if decades else MaxNLocator(2 if powers else 4)
    bar.formatter = FuncFormatter(lambda x, _: power_of_ten(x)) if powers else StrMethodFormatter("{x:.4g}")
    bar.minorlocator = NullLocator()
    bar.update_ticks()


def round_levels(low: float, high: float, n: int, logarithmic: bool) -> NDArray[Any]:
    """Return about n round numbers between two values."""
    from matplotlib.ticker import MaxNLocator

    if not logarithmic:
        levels = np.asarray(MaxNLocator(n + 1).tick_values(low, high))
    else:
        decades = np.arange(np.floor(np.log10(low)), np.log10(high))
        digits = {0: (1.0,), 1: (1.0, 3.0)}.get(int(n // max(len(decades), 1)), (1.0, 2.0, 5.0))
        levels = (10.0 ** decades[:, None] * np.array(digits)).ravel()
    return levels[(levels > low) & (levels < high)]
