"""Figures: every function takes an Axes and returns it, or builds one figure from such Axes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from bayespot.forecast import FORECAST_FIELDS, Forecast
from bayespot.posterior import Field
from bayespot.predictive import Predictive

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import ArrayLike

#: Okabe and Ito's colours, distinguishable with every kind of colour vision.
BLUE, ORANGE, GREEN, VERMILION, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#555555"

_LABELS = {
    "potential": r"$\Phi$ [km$^2$ s$^{-2}$]",
    "radial_acceleration": r"$a_r$ [km$^2$ s$^{-2}$ kpc$^{-1}$]",
    "density": r"$\rho$ [M$_\odot$ kpc$^{-3}$]",
    "enclosed_mass": r"$M(<r)$ [M$_\odot$]",
    "circular_speed": r"$v_c$ [km s$^{-1}$]",
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
        # where the stars leave a free form open its bound may be enormous; the panel shows what the prior allows
        ax.set_ylim(40 * np.min(shown), 300 * np.max(shown))
        stars(ax, found.stars_r)
        ax.set_title(_SYMBOLS[name])
    panels[0].set_ylabel("relative sd [%]")
    panels[0].plot([], [], color=GREY, label="with the prior")
    panels[0].plot([], [], color=GREY, ls="--", label="bound")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return figure


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
