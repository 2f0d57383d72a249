"""Fields against radius: bands, truths, formulas, standard deviations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from bayespot.potential.fields import Field
from bayespot.report.plots.style import (
    ALPHA68,
    ALPHA95,
    BLUE,
    GREEN,
    GREY,
    LOGARITHMIC,
    ORANGE,
    SINGLE,
    SYMBOLS,
    TRUTH,
    VERMILION,
    label,
    new_figure,
    radius_axis,
)
from bayespot.units import plain, takes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import ArrayLike


def band(
    ax: Axes, field: Field, color: str = BLUE, name: str = "posterior", reference: ArrayLike | None = None
) -> Axes:
    """Draw median, 68 and 95 % bands of a field of radius.

    Parameters
    ----------
    ax
        Axes.
    field
        Field at radii (n,).
    color, name
        Of the median; the bands are the same colour, paler, and are called by the name in a legend.
    reference : (n,), optional
        Divide by it and subtract one, in per cent.
    """
    low95, low68, median, high68, high95 = field.quantile([0.025, 0.16, 0.5, 0.84, 0.975])
    if reference is not None:
        ratio = np.asarray(plain(reference, field.unit, "reference"))
        low95, low68, median, high68, high95 = (
            100 * (y - ratio) / np.abs(ratio) for y in (low95, low68, median, high68, high95)
        )
    ax.fill_between(field.points, low95, high95, color=color, alpha=ALPHA95, lw=0, label=f"{name}, 95 %")
    ax.fill_between(field.points, low68, high68, color=color, alpha=ALPHA68, lw=0, label=f"{name}, 68 %")
    ax.plot(field.points, median, color=color)
    return ax


@takes(r="length")
def stars(ax: Axes, r: ArrayLike) -> Axes:
    """Shade the distribution of the stars' radii along the bottom of the axes."""
    r = np.asarray(r)
    low, high = ax.get_xlim()
    counts, edges = np.histogram(np.log(r), bins=np.linspace(np.log(low), np.log(high), 60))
    heights = 0.16 * counts / max(counts.max(), 1)
    ax.fill_between(
        np.exp(edges[:-1]),
        heights,
        step="post",
        transform=ax.get_xaxis_transform(),
        color=GREY,
        alpha=0.3,
        lw=0,
        label="stars",
    )
    return ax


@takes(stars_r="length")
def two_panel(
    field: Field,
    truth: ArrayLike | None = None,
    stars_r: ArrayLike | None = None,
    figure: Any = None,
    coordinate: str = "r",
) -> Any:
    """Return a figure, one column wide: the field with its bands above, residuals or relative widths below.

    Parameters
    ----------
    field
        Field at radii (n,).
    truth : (n,), optional
        True values; the lower panel then shows the error, otherwise the bands about the median.
    stars_r
        Radii of the stars, shaded in the upper panel.
    figure
        Draw into this figure or subfigure.
    coordinate
        ``"r"``, or ``"R"`` for the radius in the plane.
    """
    figure = new_figure(figure, SINGLE, SINGLE)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[2.2, 1])
    band(upper, field)
    reference = field.quantile(0.5)
    if truth is not None:
        reference = np.asarray(plain(truth, field.unit, "truth"))
        upper.plot(field.points, reference, **TRUTH, label="truth")
    radius_axis(upper, coordinate)
    upper.set_xlabel("")
    upper.set_xlim(field.points.min(), field.points.max())
    if field.name in LOGARITHMIC:
        upper.set_yscale("log")
    if stars_r is not None:
        stars(upper, stars_r)
    upper.set_ylabel(label(field.name))
    upper.legend()
    band(lower, field, reference=reference)
    lower.axhline(0, **TRUTH)
    # where no star constrains it a band may be enormous; the panel shows the bulk
    widths = 100 * np.abs(field.quantile([0.025, 0.975]) - reference) / np.abs(reference)
    limit = 1.15 * np.quantile(widths.max(0), 0.85)
    # a positive quantity is never more than 100 % too small
    lower.set_ylim(-min(limit, 110) if (reference > 0).all() else -limit, limit)
    lower.set_ylabel("error [%]" if truth is not None else "band [%]")
    radius_axis(lower, coordinate)
    return figure


def formulas(ax: Axes, field: Field, curves: Mapping[str, ArrayLike], residual: bool = False) -> Axes:
    """Draw formulas over the posterior bands of a field of radius.

    Parameters
    ----------
    ax
        Axes with radius along x.
    field
        Posterior draws at radii (n,).
    curves : (n,) each
        Values of formulas at these radii by label.
    residual
        Draw (formula - posterior mean) / posterior sd instead.
    """
    if residual:
        for n_sd, alpha in ((2, 0.2), (1, 0.4)):
            ax.axhspan(-n_sd, n_sd, color=BLUE, alpha=alpha, lw=0)
    else:
        band(ax, field)
    for i, (name, values) in enumerate(_in_unit_of(field, curves).items()):
        y = (values - field.mean) / field.sd if residual else values
        color = (VERMILION, GREEN, ORANGE, GREY)[i % 4]
        ax.plot(field.points, y, color=color, label=name, ls=("-", "--", "-.", ":")[i % 4])
    radius_axis(ax)
    ax.set_xlim(field.points.min(), field.points.max())
    ax.set_ylabel("residual [sd]" if residual else label(field.name))
    return ax


def _in_unit_of(field: Field, curves: Mapping[str, ArrayLike]) -> dict[str, np.ndarray]:
    return {name: np.asarray(plain(values, field.unit, f"curve {name!r}")) for name, values in curves.items()}


@takes(stars_r="length")
def formulas_figure(
    field: Field, curves: Mapping[str, ArrayLike], stars_r: ArrayLike | None = None, figure: Any = None
) -> Any:
    """Return a figure, one column wide: formulas over the posterior's bands, their residuals in posterior sd below."""
    figure = new_figure(figure, SINGLE, 1.25 * SINGLE)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[2.2, 1])
    formulas(upper, field, curves)
    if stars_r is not None:
        stars(upper, stars_r)
    formulas(lower, field, curves, residual=True)
    figure.legend(*upper.get_legend_handles_labels(), loc="outside lower center")
    # a formula that is far off shall not hide how the others fit
    spread = [np.abs((v - field.mean) / field.sd).max() for v in _in_unit_of(field, curves).values()]
    limit = float(np.clip(1.2 * min(spread, default=3.0), 3.0, 30.0))
    lower.set_ylim(-limit, limit)
    lower.axhline(0, **TRUTH)
    upper.set_xlabel("")
    return figure


@takes(r="length", sd="number")
def relative_sd(
    ax: Axes, r: ArrayLike, sd: ArrayLike, color: str = BLUE, name: str | None = None, ls: str = "-"
) -> Axes:
    """Draw a relative standard deviation (a fraction) against radius, in per cent on logarithmic axes."""
    ax.plot(r, 100 * np.asarray(sd), color=color, label=name, ls=ls)
    radius_axis(ax)
    ax.set_yscale("log")
    ax.set_xlim(np.min(r), np.max(r))
    return ax


@takes(stars_r="length")
def sd_profiles(
    fields: Sequence[Field], stars_r: ArrayLike | None = None, figure: Any = None, coordinate: str = "r"
) -> Any:
    """Return a figure, one column wide, of the relative sd of fields of radius, with the stars' radii shaded."""
    figure = new_figure(figure, SINGLE, 0.8 * SINGLE)
    ax = figure.subplots()
    for field, color in zip(fields, (BLUE, VERMILION, GREEN, ORANGE, GREY), strict=False):
        relative_sd(ax, field.points, field.sd / np.abs(field.mean), color, SYMBOLS.get(field.name, field.name))
    ax.yaxis.set_major_formatter("{x:g}")
    low, high = ax.get_ylim()
    # room for the stars below the lowest curve
    ax.set_ylim(low * (low / high) ** 0.25, high)
    if stars_r is not None:
        stars(ax, stars_r)
    radius_axis(ax, coordinate)
    ax.set_ylabel("relative sd [%]")
    if coordinate == "R":
        ax.yaxis.set_minor_formatter("{x:g}")
    ax.legend(ncols=min(len(fields) + 1, 4), columnspacing=1.2)
    return figure


def draws(ax: Axes, field: Field, n: int = 30, color: str = GREEN) -> Axes:
    """Draw single curves of a field, for instance prior-predictive ones."""
    for curve in field.draws[:n]:
        ax.plot(field.points, curve, color=color, lw=0.7, alpha=0.6)
    radius_axis(ax)
    if field.name in LOGARITHMIC:
        ax.set_yscale("log")
    ax.set_ylabel(label(field.name))
    return ax
