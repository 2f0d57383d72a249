"""Figures: every function takes an Axes and returns it, or builds one figure from such Axes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from bayespot.forecast import FORECAST_FIELDS, Forecast
from bayespot.posterior import Field, PlaneField
from bayespot.predictive import Predictive

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import ArrayLike, NDArray

#: Okabe and Ito's colours, distinguishable with every kind of colour vision.
BLUE, ORANGE, GREEN, VERMILION, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#555555"

_LABELS = {
    "potential": r"$\Phi$ [km$^2$ s$^{-2}$]",
    "radial_acceleration": r"$a_r$ [km$^2$ s$^{-2}$ kpc$^{-1}$]",
    "density": r"$\rho$ [M$_\odot$ kpc$^{-3}$]",
    "enclosed_mass": r"$M(<r)$ [M$_\odot$]",
    "circular_speed": r"$v_c$ [km s$^{-1}$]",
}
_UNITS = {
    "potential": r"km$^2$ s$^{-2}$",
    "acceleration": r"km$^2$ s$^{-2}$ kpc$^{-1}$",
    "density": r"M$_\odot$ kpc$^{-3}$",
}
_SYMBOLS = {
    "potential": r"$\Phi$",
    "acceleration": r"$|a|$",
    "radial_acceleration": r"$a_r$",
    "density": r"$\rho$",
    "enclosed_mass": r"$M(<r)$",
    "circular_speed": r"$v_c$",
}
_LOGARITHMIC = ("density", "enclosed_mass")


@contextmanager
def style() -> Iterator[None]:
    """Matplotlib settings of all figures: one column wide, legible, ticks inside."""
    import matplotlib as mpl

    settings: dict[Any, Any] = {
        "figure.figsize": (4.6, 4.4),
        "figure.dpi": 150,
        "savefig.dpi": 200,
        "font.size": 10,
        "axes.linewidth": 0.8,
        "xtick.direction": "in",
        "ytick.direction": "in",
        "xtick.top": True,
        "ytick.right": True,
        "legend.frameon": False,
        "legend.fontsize": 9,
    }
    with mpl.rc_context(settings):
        yield


def band(
    ax: Axes, field: Field, color: str = BLUE, label: str = "posterior", reference: ArrayLike | None = None
) -> Axes:
    """Draw median, 68 and 95 % bands of a field of radius.

    Parameters
    ----------
    ax
        Axes.
    field
        Field at radii (n,).
    color, label
        Of the median; the bands are the same colour, paler.
    reference : (n,), optional
        Divide by it and subtract one, in per cent.
    """
    low95, low68, median, high68, high95 = field.quantile([0.025, 0.16, 0.5, 0.84, 0.975])
    if reference is not None:
        ratio = np.asarray(reference)
        low95, low68, median, high68, high95 = (
            100 * (y - ratio) / np.abs(ratio) for y in (low95, low68, median, high68, high95)
        )
    ax.fill_between(field.points, low95, high95, color=color, alpha=0.2, lw=0, label=f"{label}, 95 %")
    ax.fill_between(field.points, low68, high68, color=color, alpha=0.4, lw=0, label=f"{label}, 68 %")
    ax.plot(field.points, median, color=color, lw=1.3)
    return ax


def stars(ax: Axes, r: ArrayLike) -> Axes:
    """Shade the distribution of the stars' radii along the bottom of the axes."""
    r = np.asarray(r)
    low, high = ax.get_xlim()
    counts, edges = np.histogram(np.log(r), bins=np.linspace(np.log(low), np.log(high), 60))
    heights = 0.16 * counts / max(counts.max(), 1)
    ax.fill_between(
        np.exp(edges[:-1]), heights, step="post", transform=ax.get_xaxis_transform(), color=GREY, alpha=0.3, lw=0
    )
    return ax


def two_panel(field: Field, truth: ArrayLike | None = None, stars_r: ArrayLike | None = None) -> Figure:
    """Return a figure: the field with its bands above, residuals or relative widths below.

    Parameters
    ----------
    field
        Field at radii (n,).
    truth : (n,), optional
        True values; the lower panel then shows the error, otherwise the bands about the median.
    stars_r
        Radii of the stars, shaded in the upper panel.
    """
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[2.2, 1])
    band(upper, field)
    reference = field.quantile(0.5)
    if truth is not None:
        reference = np.asarray(truth)
        upper.plot(field.points, reference, color="black", ls="--", lw=1.1, label="truth")
    upper.set_xscale("log")
    upper.set_xlim(field.points.min(), field.points.max())
    if field.name in _LOGARITHMIC:
        upper.set_yscale("log")
    if stars_r is not None:
        stars(upper, stars_r)
    upper.set_ylabel(_LABELS.get(field.name, f"{field.name} [{field.unit}]"))
    upper.legend()
    band(lower, field, reference=reference)
    lower.axhline(0, color="black", ls="--", lw=0.9)
    # where no star constrains it a band may be enormous; the panel shows the bulk
    widths = 100 * np.abs(field.quantile([0.025, 0.975]) - reference) / np.abs(reference)
    limit = 1.15 * np.quantile(widths.max(0), 0.85)
    lower.set_ylim(-limit, limit)
    lower.set_ylabel("error [%]" if truth is not None else "band [%]")
    lower.set_xlabel(r"$r$ [kpc]")
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
    for i, (label, values) in enumerate(curves.items()):
        y = (np.asarray(values) - field.mean) / field.sd if residual else np.asarray(values)
        color = (VERMILION, GREEN, ORANGE, GREY)[i % 4]
        ax.plot(field.points, y, color=color, label=label, ls=("-", "--", "-.", ":")[i % 4], lw=1.2)
    ax.set_xscale("log")
    ax.set_xlim(field.points.min(), field.points.max())
    ax.set_ylabel("residual [sd]" if residual else _LABELS.get(field.name, field.name))
    return ax


def formulas_figure(field: Field, curves: Mapping[str, ArrayLike], stars_r: ArrayLike | None = None) -> Figure:
    """Return a figure: formulas over the posterior's bands above, their residuals in posterior sd below."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 5.6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[2.2, 1])
    formulas(upper, field, curves)
    if stars_r is not None:
        stars(upper, stars_r)
    formulas(lower, field, curves, residual=True)
    figure.legend(*upper.get_legend_handles_labels(), loc="outside lower center", fontsize=8)
    # a formula that is far off shall not hide how the others fit
    spread = [np.abs((np.asarray(v) - field.mean) / field.sd).max() for v in curves.values()]
    limit = float(np.clip(1.2 * min(spread, default=3.0), 3.0, 30.0))
    lower.set_ylim(-limit, limit)
    lower.axhline(0, color="black", ls="--", lw=0.9)
    lower.set_xlabel(r"$r$ [kpc]")
    return figure


def relative_sd(
    ax: Axes, r: ArrayLike, sd: ArrayLike, color: str = BLUE, label: str | None = None, ls: str = "-"
) -> Axes:
    """Draw a relative standard deviation (a fraction) against radius, in per cent on logarithmic axes."""
    ax.plot(r, 100 * np.asarray(sd), color=color, label=label, ls=ls, lw=1.3)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlim(np.min(r), np.max(r))
    ax.set_xlabel(r"$r$ [kpc]")
    return ax


def forecast_figure(found: Forecast, radii: ArrayLike, n_stars: int, factor: float = 10) -> Figure:
    """Return a figure of forecast relative sd against radius, a panel per field.

    For ``n_stars``, a ``factor`` fewer and a ``factor`` more: solid with the model's prior, dashed the Cramer-Rao
    bound; the stars' radii are shaded.
    """
    from matplotlib.figure import Figure

    r = np.asarray(radii)
    figure = Figure(figsize=(10.2, 3.7), layout="constrained")
    panels = figure.subplots(1, len(FORECAST_FIELDS))
    for ax, name in zip(panels, FORECAST_FIELDS, strict=True):
        shown = []
        for n, color in ((n_stars / factor, ORANGE), (n_stars, BLUE), (n_stars * factor, GREEN)):
            n = max(1, round(n))
            with_prior = found.relative_sd(name, r, n, True)
            shown.append(with_prior)
            relative_sd(ax, r, with_prior, color, f"N = {n:,}".replace(",", " "))
            relative_sd(ax, r, found.relative_sd(name, r, n), color, ls="--")
        ax.yaxis.set_major_formatter("{x:g}")
        # where the stars leave a free form open its bound may be enormous; the panel shows what the prior allows
        ax.set_ylim(40 * np.min(shown), 300 * np.max(shown))
        stars(ax, found.stars_r)
        ax.set_title(_SYMBOLS[name])
    panels[0].set_ylabel("relative sd [%]")
    panels[0].plot([], [], color=GREY, label="with the prior")
    panels[0].plot([], [], color=GREY, ls="--", label="bound")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return figure


def sd_profiles(fields: Sequence[Field], stars_r: ArrayLike | None = None) -> Figure:
    """Return a figure of the relative sd of fields of radius, with the stars' radii shaded along the bottom."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6, 3.6), layout="constrained")
    ax = figure.subplots()
    for field, color in zip(fields, (BLUE, VERMILION, GREEN, ORANGE, GREY), strict=False):
        relative_sd(ax, field.points, field.sd / np.abs(field.mean), color, _SYMBOLS.get(field.name, field.name))
    ax.yaxis.set_major_formatter("{x:g}")
    low, high = ax.get_ylim()
    # room for the stars below the lowest curve
    ax.set_ylim(low * (low / high) ** 0.25, high)
    if stars_r is not None:
        stars(ax, stars_r)
    ax.set_ylabel("relative sd [%]")
    ax.legend(ncols=len(fields))
    return figure


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
    symbol = _SYMBOLS.get(field.name, field.name)
    values = 100 * field.relative_sd if relative else field.sd
    label = f"relative sd of {symbol} [%]" if relative else f"sd of {symbol} [{_UNITS.get(field.name, field.unit)}]"
    _mesh(ax, field, field.edges, values, label, "viridis")
    shown = field.mean if field.name == "potential" else np.abs(field.mean)
    levels = _round_levels(float(shown.min()), float(shown.max()), n_contours, field.name != "potential")
    lines = ax.contour(field.first, field.second, shown, levels=levels, colors="white", linewidths=0.7)
    lines.set_linestyle("solid")
    ax.clabel(lines, fmt=_power_of_ten, fontsize=7)
    return ax


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


def uncertainty_maps(
    fields: Sequence[PlaneField], positions: ArrayLike | None = None, n_stars: float | None = None
) -> Figure:
    """Return a figure with a map per field of one plane, the potential's in its unit, and one of the stars."""
    from matplotlib.figure import Figure

    n = len(fields) + (positions is not None)
    rz = fields[0].plane == "Rz"
    columns = n if rz else -(-n // 2)
    figure = Figure(figsize=(2.4 * n, 5.2) if rz else (3.7 * columns, 4.1 * -(-n // columns)), layout="constrained")
    panels = figure.subplots(-(-n // columns), columns, squeeze=False)
    for ax in panels.flat[n:]:
        ax.axis("off")
    for ax, field in zip(panels.flat, fields, strict=False):
        uncertainty_map(ax, field, relative=field.name != "potential")
    if positions is not None:
        star_map(panels.flat[n - 1], fields[0], positions, n_stars)
    for ax in panels[:, 1:].flat:
        ax.set_ylabel("")
    units = ", ".join(f"{_SYMBOLS[field.name]} [{_UNITS[field.name]}]" for field in fields)
    figure.supxlabel(f"contours: posterior mean of {units}", fontsize=8)
    return figure


def _mesh(ax: Axes, field: PlaneField, edges: tuple[Any, Any], values: NDArray[Any], label: str, cmap: str) -> None:
    """Colour the cells, logarithmically where values span more than a factor 4, with a colour bar on top."""
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    norm = LogNorm(low, high) if low > 0 and high > 4 * low else Normalize(low, high)
    mesh = ax.pcolormesh(*edges, values, cmap=cmap, norm=norm, rasterized=True)
    # an inset keeps the width of the map, whatever its aspect
    bar = ax.figure.colorbar(
        mesh, cax=ax.inset_axes((0, 1.03, 1, 0.035)), orientation="horizontal", ticklocation="top", label=label
    )
    decades = np.log10(high / low) if isinstance(norm, LogNorm) else 0.0
    digits = (1, 2, 5) if decades <= 1 else (1, 3) if decades < 2.2 else (1,)
    bar.locator = LogLocator(subs=digits, numticks=9) if decades else MaxNLocator(4)
    bar.formatter = StrMethodFormatter("{x:.4g}")
    bar.minorlocator = NullLocator()
    bar.update_ticks()
    ax.set_aspect("equal")
    names = (r"$R$ [kpc]", r"$z$ [kpc]") if field.plane == "Rz" else (r"$x$ [kpc]", r"$y$ [kpc]")
    ax.set_xlabel(names[0])
    ax.set_ylabel(names[1])


def _round_levels(low: float, high: float, n: int, logarithmic: bool) -> NDArray[Any]:
    """Return about n round numbers between two values."""
    from matplotlib.ticker import MaxNLocator

    if not logarithmic:
        levels = np.asarray(MaxNLocator(n + 1).tick_values(low, high))
    else:
        decades = np.arange(np.floor(np.log10(low)), np.log10(high))
        digits = {0: (1.0,), 1: (1.0, 3.0)}.get(int(n // max(len(decades), 1)), (1.0, 2.0, 5.0))
        levels = (10.0 ** decades[:, None] * np.array(digits)).ravel()
    return levels[(levels > low) & (levels < high)]


def _power_of_ten(value: float) -> str:
    """Return a short label: digits below 1e4, beyond them powers of ten."""
    if 1e-3 <= abs(value) < 1e4:
        return f"{value:g}"
    mantissa, exponent = f"{value:.1e}".split("e")
    digits = f"{float(mantissa):g}"
    times = {"1": "", "-1": "-"}.get(digits, rf"{digits}\times")
    return rf"${times}10^{{{int(exponent)}}}$"


def elbo_trace(ax: Axes, elbo: Sequence[float]) -> Axes:
    """Draw the ELBO against the SVI step, relative to the mean of its last quarter."""
    values = np.asarray(elbo)
    tail = values[-max(len(values) // 4, 1) :]
    ax.plot(np.arange(1, len(values) + 1), values - tail.mean(), color=BLUE, lw=0.8)
    ax.axhline(0, color="black", ls="--", lw=0.8)
    spread = max(float(np.quantile(np.abs(values - tail.mean()), 0.97)), 1e-9)
    ax.set_ylim(-1.3 * spread, 1.3 * spread)
    ax.set_xlabel("SVI step")
    ax.set_ylabel("ELBO $-$ final mean [nat]")
    return ax


_CHECKS = {
    "counts": "stars per bin",
    "sigma_r": r"$\sigma_r$ [km s$^{-1}$]",
    "sigma_t": r"$\sigma_t$ [km s$^{-1}$]",
    "beta": r"$\beta$",
}
_TITLES = {
    "counts": "radial profile",
    "sigma_r": "radial dispersion",
    "sigma_t": "tangential dispersion",
    "beta": "anisotropy",
    "angles": "phase mixing",
}


def predictive_check(ax: Axes, check: Predictive, name: str) -> Axes:
    """Draw a radial statistic of the catalogue over the bands of its replicas.

    Parameters
    ----------
    ax
        Axes.
    check
        What `posterior_predictive` returned.
    name
        ``"counts"``, ``"sigma_r"``, ``"sigma_t"``, ``"beta"``, or ``"angles"``: chi-square of the observed angles
        against that of the replicated ones, draw by draw.
    """
    if name == "angles":
        seen, drawn = check.observed[name], check.replicated[name]
        ax.scatter(drawn, seen, s=8, color=BLUE, lw=0)
        ends = [float(min(seen.min(), drawn.min())), float(max(seen.max(), drawn.max()))]
        ax.plot(ends, ends, color="black", ls="--", lw=0.8, label="equal")
        ax.set_xlabel(r"angle $\chi^2$, replicas")
        ax.set_ylabel(r"angle $\chi^2$, catalogue")
        return ax
    r = check.r
    low95, low68, median, high68, high95 = np.nanquantile(check.replicated[name], [0.025, 0.16, 0.5, 0.84, 0.975], 0)
    ax.fill_between(r, low95, high95, color=BLUE, alpha=0.2, lw=0, label="replicas, 95 %")
    ax.fill_between(r, low68, high68, color=BLUE, alpha=0.4, lw=0, label="replicas, 68 %")
    ax.plot(r, median, color=BLUE, lw=1)
    ax.plot(r, check.observed[name][0], "o", ms=4, color="black", label="catalogue")
    ax.set_xscale("log")
    ax.set_xlabel(r"$r$ [kpc]")
    ax.set_ylabel(_CHECKS[name])
    return ax


def predictive_figure(check: Predictive) -> Figure:
    """Return a figure with every statistic of a posterior predictive check and its p-value."""
    from matplotlib.figure import Figure

    names = [*_CHECKS, "angles"]
    figure = Figure(figsize=(9.2, 5.4), layout="constrained")
    panels = figure.subplots(2, 3)
    for ax, name in zip(panels.flat, names, strict=False):
        predictive_check(ax, check, name)
        ax.set_title(f"{_TITLES[name]}: p = {check.p_values[name]:.2g}", fontsize=10)
    panels.flat[-1].axis("off")
    entries = [panels.flat[i].get_legend_handles_labels() for i in (0, -2)]
    panels.flat[-1].legend(*(a + b for a, b in zip(*entries, strict=True)), loc="center left")
    return figure


def draws(ax: Axes, field: Field, n: int = 30, color: str = GREEN) -> Axes:
    """Draw single curves of a field, for instance prior-predictive ones."""
    for curve in field.draws[:n]:
        ax.plot(field.points, curve, color=color, lw=0.7, alpha=0.6)
    ax.set_xscale("log")
    if field.name in _LOGARITHMIC:
        ax.set_yscale("log")
    ax.set_xlabel(r"$r$ [kpc]")
    ax.set_ylabel(_LABELS.get(field.name, field.name))
    return ax


def save(figure: Any, path: Any) -> None:
    """Write a figure (PNG or PDF by suffix) without touching pyplot's state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    figure.savefig(path)
