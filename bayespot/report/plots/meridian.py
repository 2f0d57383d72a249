"""Axisymmetric potentials: several fields of R in one panel, and maps over (R, z) of means and uncertainties."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from bayespot.potential.fields import Field, PlaneField
from bayespot.report.plots.maps import color_bar, colored_cells
from bayespot.report.plots.profiles import band, stars
from bayespot.report.plots.style import (
    BLUE,
    DOUBLE,
    GREEN,
    LOGARITHMIC,
    ORANGE,
    SINGLE,
    SYMBOLS,
    TRUTH,
    UNITS,
    VERMILION,
    label,
    new_figure,
    radius_axis,
)
from bayespot.units import plain, takes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import ArrayLike

#: Share of the stars in the region that maps mark.
REGION = 0.68
#: Cells along an axis of the histogram that the region is found with, how far beyond the map it reaches, and the
#: smoothing in cells times n^(1/6).
_REGION_CELLS, _REGION_MARGIN, _REGION_SMOOTHING = 60, 2.0, 12.0


@takes(stars_r="length")
def bands_figure(
    fields: Sequence[Field],
    truths: Mapping[str, ArrayLike] | None = None,
    stars_r: ArrayLike | None = None,
    figure: Any = None,
) -> Any:
    """Return a figure, one column wide, of fields of R with one unit in one panel: medians, 68 and 95 % bands.

    Parameters
    ----------
    fields
        At the same radii (n,): frequencies, on a logarithmic axis and with their widths in a panel below, or
        flattenings, which have no unit, on a linear one from zero.
    truths : (n,) each
        True values by name, where they are known.
    stars_r
        Radii of the stars, shaded.
    figure
        Draw into this figure or subfigure.
    """
    unit = fields[0].unit
    figure = new_figure(figure, SINGLE, SINGLE if unit else 0.8 * SINGLE)
    panels = figure.subplots(2, 1, sharex=True, height_ratios=[2.2, 1]) if unit else [figure.subplots()]
    ax, handles = panels[0], []
    for field, color in zip(fields, (BLUE, VERMILION, GREEN, ORANGE), strict=False):
        true = None if truths is None else np.asarray(plain(truths[field.name], field.unit, field.name))
        band(ax, field, color)
        handles.append((ax.lines[-1], SYMBOLS.get(field.name, field.name)))
        if true is not None:
            ax.plot(field.points, true, **TRUTH)
        if unit:
            band(panels[1], field, color, reference=field.quantile(0.5) if true is None else true)
    if truths is not None:
        handles.append((ax.lines[-1], "truth"))
    ax.set_xlim(fields[0].points.min(), fields[0].points.max())
    if unit:
        ax.set_yscale("log")
        ax.set_ylabel(f"frequency [{UNITS[fields[0].name]}]")
        panels[1].axhline(0, **TRUTH)
        panels[1].set_ylabel("band [%]" if truths is None else "error [%]")
    else:
        top = max(float(np.nanquantile(field.quantile(0.975), 0.9)) for field in fields)
        ax.set_ylim(0, 1.15 * max(top, 1.0))
        ax.axhline(1, color="black", lw=0.5, ls=":")
        ax.set_ylabel("axis ratio $q = z/R$")
    if stars_r is not None:
        stars(ax, stars_r)
    for panel in panels:
        radius_axis(panel, "R")
    if unit:
        ax.set_xlabel("")
    ax.legend(*zip(*handles, strict=True), ncols=len(handles))
    return figure


@takes(positions="length")
def star_region(ax: Axes, field: PlaneField, positions: ArrayLike) -> Axes:
    """Draw the dashed outline of the region over (R, z) where `REGION` of the stars of the map and about it crowd.

    Parameters
    ----------
    ax
        Axes of the map.
    field
        Its field, whose cells it takes.
    positions : (n, 3)
        Of the stars, or of a sample, in kpc; those below the plane count as above it where the map has z > 0 only.
    """
    from scipy.ndimage import gaussian_filter

    x = np.asarray(positions, dtype=float)
    first, second = field.edges
    R, z = np.hypot(x[:, 0], x[:, 1]), np.abs(x[:, 2]) if second[0] >= 0 else x[:, 2]
    low = _REGION_MARGIN * second[0]
    edges = [
        np.linspace(start, _REGION_MARGIN * end, _REGION_CELLS + 1)
        for start, end in ((0, first[-1]), (low, second[-1]))
    ]
    counts, _, _ = np.histogram2d(R, z, bins=edges)
    # reflected at the axis and at the plane
    smooth = gaussian_filter(counts, _REGION_SMOOTHING * max(counts.sum(), 1) ** (-1 / 6), mode="reflect")
    i, j = (np.searchsorted(axis, part, side="right") - 1 for axis, part in zip(edges, (R, z), strict=True))
    within = (i >= 0) & (i < _REGION_CELLS) & (j >= 0) & (j < _REGION_CELLS)
    # the share of the stars themselves that lie where the smooth density is higher, whatever the smoothing adds
    level = float(np.quantile(smooth[i[within], j[within]], 1 - REGION)) if within.any() else 0.0
    if 0 < level < smooth.max():
        middles = [(axis[1:] + axis[:-1]) / 2 for axis in edges]
        ax.contour(*middles, smooth.T, levels=[level], colors="white", linewidths=1.6, linestyles="solid", alpha=0.6)
        ax.contour(*middles, smooth.T, levels=[level], colors="black", linewidths=0.9, linestyles="dashed")
    ax.set_xlim(first[0], first[-1])
    ax.set_ylim(second[0], second[-1])
    return ax


@takes(positions="length")
def meridional_maps(fields: Sequence[PlaneField], positions: ArrayLike | None = None, figure: Any = None) -> Any:
    """Return a figure, two columns wide: posterior means over (R, z) above, relative standard deviations below.

    Parameters
    ----------
    fields
        What `Posterior.meridional_maps` returned; accelerations and densities are drawn by their magnitude, in the
        logarithm where they span a factor of four.
    positions : (n, 3)
        Of the stars in kpc, whose region is outlined, see `star_region`.
    figure
        Draw into this figure or subfigure.
    """
    first, second = fields[0].edges
    width = DOUBLE / len(fields) - 0.35
    height = width * float(np.ptp(second) / np.ptp(first))
    figure = new_figure(figure, DOUBLE, 2 * (height + 0.75) + 0.1)
    panels = figure.subplots(2, len(fields), squeeze=False, sharex=True, sharey=True)
    for field, column in zip(fields, panels.T, strict=True):
        symbol = SYMBOLS.get(field.name, field.name)
        signed = field.name == "potential"
        mean = field.mean if signed else np.abs(field.mean)
        name = (
            label(field.name)
            if signed or field.name in LOGARITHMIC
            else label(field.name).replace(symbol, f"|{symbol}|")
        )
        rows = ((mean, name, "magma"), (100 * field.relative_sd, f"relative sd of {symbol} [%]", "viridis"))
        for ax, (values, text, colors) in zip(column, rows, strict=True):
            mesh = colored_cells(ax, field.edges, values, colors)
            color_bar(ax, mesh, text, 0.06 / height, values is mean)
            ax.set_aspect("equal")
            if positions is not None:
                star_region(ax, field, positions)
    for ax in panels[-1]:
        ax.set_xlabel(r"$R$ [kpc]")
    for ax in panels[:, 0]:
        ax.set_ylabel(r"$z$ [kpc]")
    return figure
