"""Whether to trust a fit: the ELBO, posterior predictive checks, parameters and chains."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from bayespot.diagnostics import posterior_arrays
from bayespot.inference.symmetry import QUADRUPOLE
from bayespot.posterior.predictive import Predictive
from bayespot.report.plots.style import (
    ALPHA68,
    ALPHA95,
    BLUE,
    DOUBLE,
    GREEN,
    ORANGE,
    TRUTH,
    VERMILION,
    new_figure,
    radius_axis,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_CHECKS = {
    "counts": "stars per bin",
    "sigma_r": r"$\sigma_r$ [km s$^{-1}$]",
    "sigma_t": r"$\sigma_t$ [km s$^{-1}$]",
    "beta": r"$\beta$",
    "heights": "stars per bin",
    "mean_v_phi": r"$\langle v_\phi \rangle$ [km s$^{-1}$]",
    "sigma_R": r"$\sigma_R$ [km s$^{-1}$]",
    "sigma_phi": r"$\sigma_\phi$ [km s$^{-1}$]",
    "sigma_z": r"$\sigma_z$ [km s$^{-1}$]",
}
#: What of the stars has the five quadrupole moments.
_QUADRUPOLES = {"directions": "quadrupole of $x$ about $n$", "planes": "quadrupole of $n$"}
_TITLES = {
    "counts": "radial profile",
    "sigma_r": "radial dispersion",
    "sigma_t": "tangential dispersion",
    "beta": "anisotropy",
    "directions": "directions in planes",
    "planes": "orbital planes",
    "angles": "phase mixing",
    "heights": "vertical profile",
    "mean_v_phi": "rotation",
    "sigma_R": "dispersion of $v_R$",
    "sigma_phi": r"dispersion of $v_\phi$",
    "sigma_z": "dispersion of $v_z$",
}


def elbo_trace(ax: Axes, elbo: Sequence[float]) -> Axes:
    """Draw the ELBO against the SVI step, relative to the mean of its last quarter."""
    values = np.asarray(elbo)
    tail = values[-max(len(values) // 4, 1) :]
    ax.plot(np.arange(1, len(values) + 1), values - tail.mean(), color=BLUE, lw=0.8)
    ax.axhline(0, **TRUTH)
    spread = max(float(np.quantile(np.abs(values - tail.mean()), 0.97)), 1e-9)
    ax.set_ylim(-1.3 * spread, 1.3 * spread)
    ax.set_xlabel("SVI step")
    ax.set_ylabel("ELBO $-$ final mean [nat]")
    return ax


def predictive_check(ax: Axes, check: Predictive, name: str) -> Axes:
    """Draw a radial statistic of the catalogue over the bands of its replicas.

    Parameters
    ----------
    ax
        Axes.
    check
        What `posterior_predictive` returned.
    name
        ``"counts"``, ``"sigma_r"``, ``"sigma_t"``, ``"beta"``, or those of
        `bayespot.posterior.cylindrical_profiles`; ``"directions"`` or ``"planes"``: five quadrupole
        moments; or ``"angles"``: chi-square of the observed angles against that of the replicated ones, draw by draw.
    """
    if name == "angles":
        seen, drawn = check.observed[name], check.replicated[name]
        ax.scatter(drawn, seen, s=8, color=BLUE, lw=0)
        ends = [float(min(seen.min(), drawn.min())), float(max(seen.max(), drawn.max()))]
        ax.plot(ends, ends, **TRUTH, label="equal")
        ax.set_xlabel(r"angle $\chi^2$, replicas")
        ax.set_ylabel(r"angle $\chi^2$, catalogue")
        return ax
    r = check.r if name in _CHECKS else np.arange(len(QUADRUPOLE))
    coordinate = "r" if check.z is None else "R"
    if name == "heights" and check.z is not None:
        r, coordinate = check.z, "|z|"
    low95, low68, _, high68, high95 = np.nanquantile(check.replicated[name], [0.025, 0.16, 0.5, 0.84, 0.975], 0)
    if name in _QUADRUPOLES:
        ax.bar(r, high95 - low95, 0.6, low95, color=BLUE, alpha=ALPHA95, lw=0)
        ax.bar(r, high68 - low68, 0.6, low68, color=BLUE, alpha=ALPHA68, lw=0)
        ax.plot(r, check.observed[name][0], "o", ms=3, color="black")
        ax.set_xticks(r, [f"${moment}$" for moment in QUADRUPOLE], rotation=45, ha="right", rotation_mode="anchor")
        ax.minorticks_off()
        ax.set_ylabel(_QUADRUPOLES[name])
        return ax
    _bands(ax, r, check.replicated[name])
    ax.plot(r, check.observed[name][0], "o", ms=3, color="black", label="catalogue")
    radius_axis(ax, coordinate)
    ax.set_ylabel(_CHECKS[name])
    return ax


def predictive_figure(check: Predictive, figure: Any = None) -> Any:
    """Return a figure, two columns wide, with every statistic of a posterior predictive check and its p-value."""
    if check.v_edges is not None:
        return _velocity_figure(check, check.v_edges, figure)
    names = [*(name for name in _CHECKS if name in check.observed), *_QUADRUPOLES, "angles"]
    figure = new_figure(figure, DOUBLE, 0.5 * DOUBLE)
    panels = figure.subplots(2, -(-(len(names) + 1) // 2))
    for ax, name in zip(panels.flat, names, strict=False):
        predictive_check(ax, check, name)
        ax.set_title(f"{_TITLES[name]}\np = {check.p_values[name]:.2g}")
    panels.flat[-1].axis("off")
    entries = [panels.flat[i].get_legend_handles_labels() for i in (0, -2)]
    panels.flat[-1].legend(*(a + b for a, b in zip(*entries, strict=True)), loc="center left")
    return figure


def _velocity_figure(check: Predictive, v_edges: np.ndarray, figure: Any) -> Any:
    """Histograms of line-of-sight velocities in bins of R, the dispersion, and places of a photometric sample."""
    n_bins = len(check.r)
    columns = -(-(n_bins + 3) // 2)
    figure = new_figure(figure, DOUBLE, 0.5 * DOUBLE)
    panels = figure.subplots(2, columns).flat
    middle = (v_edges[1:] + v_edges[:-1]) / 2
    for k in range(n_bins):
        ax = panels[k]
        _bands(ax, middle, check.replicated["velocities"][:, k], step="mid")
        ax.plot(middle, check.observed["velocities"][0, k], "o", ms=3, color="black", label="catalogue")
        ax.set_xlabel(r"$v_{\rm los}$ [km s$^{-1}$]")
        ax.set_title(f"$R$ near {check.r[k]:.2g} kpc")
    panels[0].set_ylabel("stars per bin")
    ax = panels[n_bins]
    _bands(ax, check.r, check.replicated["sigma_los"])
    ax.plot(check.r, check.observed["sigma_los"][0], "o", ms=3, color="black")
    radius_axis(ax, "R")
    ax.set_ylabel(r"$\sigma_{\rm los}$ [km s$^{-1}$]")
    ax.set_title(f"p = {check.p_values['sigma_los']:.2g}, velocities {check.p_values['velocities']:.2g}")
    used = n_bins + 1
    if check.R_edges is not None:
        ax = panels[used]
        edges = check.R_edges.copy()
        edges[0], edges[-1] = edges[1] ** 2 / edges[2], edges[-2] ** 2 / edges[-3]
        R = np.sqrt(edges[1:] * edges[:-1])
        _bands(ax, R, check.replicated["counts"])
        ax.plot(R, check.observed["counts"][0], "o", ms=3, color="black")
        radius_axis(ax, "R")
        ax.set_ylabel("photometric stars per bin")
        ax.set_title(f"p = {check.p_values['counts']:.2g}")
        used += 1
    for ax in panels[used:]:
        ax.axis("off")
    panels[2 * columns - 1].legend(*panels[0].get_legend_handles_labels(), loc="center left")
    return figure


def _bands(ax: Axes, x: np.ndarray, draws: np.ndarray, step: Any = None) -> None:
    """Draw the replicas' median and intervals."""
    low95, low68, median, high68, high95 = np.nanquantile(draws, [0.025, 0.16, 0.5, 0.84, 0.975], 0)
    ax.fill_between(x, low95, high95, color=BLUE, alpha=ALPHA95, lw=0, step=step, label="replicas, 95 %")
    ax.fill_between(x, low68, high68, color=BLUE, alpha=ALPHA68, lw=0, step=step, label="replicas, 68 %")
    ax.plot(x, median, color=BLUE, lw=1, drawstyle="default" if step is None else "steps-mid")


def parameters(data: Any, names: Sequence[str], truth: Mapping[str, float] | None = None) -> Any:
    """Return ArviZ's pair plot of scalar parameters, two columns wide at most: 68 and 95 % contours and marginals.

    Parameters
    ----------
    data
        InferenceData with a group ``posterior``.
    names
        Scalar sites of it, two at least.
    truth
        True values by site, drawn dashed.
    """
    from matplotlib.figure import Figure

    values = {name: posterior_arrays(data)[name] for name in names}
    width = min(DOUBLE, 1.6 * len(names))
    figure = Figure(figsize=(width, width), layout="constrained")
    axes = figure.subplots(len(names), len(names), squeeze=False)
    for i, row in enumerate(names):
        for j, column in enumerate(names):
            ax = axes[i, j]
            if j > i:
                ax.set_axis_off()
            elif i == j:
                _marginal(ax, values[row])
            else:
                _contours(ax, values[column], values[row])
            if truth is not None and j <= i:
                ax.axvline(truth[column], **TRUTH)
            if truth is not None and j < i:
                ax.axhline(truth[row], **TRUTH)
            ax.set_xlabel(column.removeprefix("potential.") if i == len(names) - 1 else "")
            ax.set_ylabel(row.removeprefix("potential.") if j == 0 and i else "")
    return figure


def _marginal(ax: Axes, x: np.ndarray) -> None:
    """Draw a kernel density of draws, the y axis without numbers."""
    from scipy.stats import gaussian_kde

    grid = np.linspace(x.min(), x.max(), 200)
    ax.plot(grid, gaussian_kde(x)(grid), color=BLUE, linewidth=1.2)
    ax.set_ylim(bottom=0)
    ax.set_yticks([])


def _contours(ax: Axes, x: np.ndarray, y: np.ndarray) -> None:
    """Fill the smallest regions that hold 68 and 95 % of the draws, by a kernel density."""
    from scipy.stats import gaussian_kde

    density = gaussian_kde([x, y])
    levels = np.quantile(density([x, y]), [0.05, 0.32])
    spread = [np.linspace(z.min() - 0.1 * np.ptp(z), z.max() + 0.1 * np.ptp(z), 80) for z in (x, y)]
    grid = np.meshgrid(*spread)
    height = density(np.reshape(grid, (2, -1))).reshape(grid[0].shape)
    ax.contourf(*grid, height, levels=[*levels, height.max()], colors=[_paler(alpha) for alpha in (ALPHA95, ALPHA68)])
    ax.contour(*grid, height, levels=levels, colors=BLUE, linewidths=0.8)


def _paler(alpha: float) -> tuple[float, ...]:
    """Return the blue of the bands as it looks on white at an opacity."""
    from matplotlib.colors import to_rgb

    return tuple(1 - alpha * (1 - part) for part in to_rgb(BLUE))


def chain_ranks(ax: Axes, data: Any, name: str) -> Axes:
    """Draw how often each chain's draws fall into 20 bins of rank among all draws: level where the chains agree.

    Lines show the excess over the mean (Vehtari et al. 2021, Bayesian Analysis 16, 667, figure 5), scaled so that half
    the distance between chains is twice the mean.

    Parameters
    ----------
    ax
        Axes.
    data
        InferenceData with several chains, as NUTS leaves in a run's ``posterior.nc``.
    name
        A scalar site of its group ``posterior``.
    """
    from scipy.stats import rankdata

    values = np.asarray(data["posterior"][name])
    ranks = rankdata(values).reshape(values.shape)
    edges = np.linspace(0.5, values.size + 0.5, 21)
    middle = (edges[1:] + edges[:-1]) / 2
    for k, (chain, colour) in enumerate(zip(ranks, itertools.cycle([BLUE, VERMILION, GREEN, ORANGE]))):
        counts, _ = np.histogram(chain, edges)
        excess = counts / counts.mean() - 1
        ax.axhline(k, color=colour, linewidth=0.6, linestyle="--")
        ax.vlines(middle, k, k + excess / 4, color=colour, linewidth=2)
    ax.set_yticks(range(len(ranks)))
    ax.set_ylabel("chain")
    ax.set_xlabel("rank of the draw")
    ax.set_title(name.removeprefix("potential."))
    return ax
