"""From what searches found to distinct formulas with posteriors of their constants."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bayespot.distill.least_squares import Minimum, levenberg_marquardt
from bayespot.distill.rewriting import (
    Candidate,
    by_mass,
    complexity,
    homogeneous,
    plausible,
    tidy,
    tied,
    vanishes,
    varying,
    without_constant,
)
from bayespot.distill.target import Gauge, Metric, Target, shape_of
from bayespot.potential.symbolic import SymbolicPotential, compiled, parse
from bayespot.units import G

if TYPE_CHECKING:
    import sympy
    from numpy.typing import NDArray

#: Names and units (astropy syntax) of the constants of a formula in physical units.
PHYSICAL: dict[str, tuple[str, str]] = {
    "GM": ("M", "Msun"), "V2": ("V2", "km2 / s2"), "E0": ("E0", "km2 / s2"), "b": ("b", "kpc"), "c": ("c", "kpc"),
}  # fmt: skip
#: Prior standard deviation of the logarithm of a constant in normalised units, as wide as those of the built-in models.
PRIOR_SD = 1.5
#: Two formulas whose fits agree to so many posterior standard deviations are one.
SAME = 0.02
#: Draws that constants are refitted to.
REFITS = 400
#: A constant whose logarithm in normalised units is beyond the second has left the formula; the first bounds fits.
_LIMIT, _DEGENERATE = 14.0, 9.0


@dataclass(frozen=True)
class Formula:
    """A distinct formula, fitted to the posterior.

    Parameters
    ----------
    text
        Phi(r) in (km/s)^2: sympy syntax in r (kpc), the constants and G.
    normalised
        The same for y of x in normalised units.
    constants
        Names in ``text``; ``units`` are theirs (astropy syntax).
    best, draws : (p,), (K, p)
        Constants at the posterior mean and refitted to every draw, in physical units.
    chi2, n_directions
        Misfit to the posterior mean in its covariance, and how many directions that determines.
    worst, worst_r
        Largest deviation from the posterior mean in posterior sd, and the radius in kpc.
    faults
        Which of ``density``, ``asymptote`` and ``centre`` the fitted formula violates.
    ln_evidence
        Of the formula with its constants marginalised, from the posterior of Phi as a Gaussian.
    complexity
        Nodes of the expression.
    sources
        Searches that found it.
    """

    text: str
    normalised: str
    constants: tuple[str, ...]
    units: tuple[str, ...]
    best: NDArray[Any]
    draws: NDArray[Any]
    gauge: Gauge
    chi2: float
    n_directions: int
    worst: float
    worst_r: float
    faults: tuple[str, ...]
    ln_evidence: float
    complexity: int
    sources: tuple[str, ...]

    @property
    def chi2_per_dof(self) -> float:
        """Chi-square per degree of freedom; about 1 or less: within the posterior."""
        return self.chi2 / max(self.n_directions - len(self.constants), 1)

    @property
    def p_value(self) -> float:
        """Probability of a chi-square at least this large if the formula is right."""
        from scipy.stats import chi2

        return float(chi2.sf(self.chi2, max(self.n_directions - len(self.constants), 1)))

    @property
    def latex(self) -> str:
        """The formula as LaTeX."""
        import sympy

        return rf"\Phi(r) = {sympy.latex(parse(self.text))}"

    @property
    def correlation(self) -> NDArray[Any]:
        """Correlation of the constants ``(p, p)`` over the draws."""
        return np.atleast_2d(np.corrcoef(self.draws.T))

    def summary(self) -> dict[str, dict[str, Any]]:
        """Return mean, sd and quantiles of every constant with its unit."""
        quantiles = (0.025, 0.16, 0.5, 0.84, 0.975)
        out = {}
        for j, (name, unit) in enumerate(zip(self.constants, self.units, strict=True)):
            x = self.draws[:, j]
            out[name] = {"unit": unit, "mean": float(x.mean()), "sd": float(x.std(ddof=1))} | {
                f"q{100 * q:g}": float(v) for q, v in zip(quantiles, np.quantile(x, quantiles), strict=True)
            }
        return out

    def potential(self) -> SymbolicPotential:
        """Return the potential with its constants at the posterior mean's fit."""
        return SymbolicPotential(self.text, dict(zip(self.constants, map(float, self.best), strict=True)))

    def potential_at(self, i: int) -> SymbolicPotential:
        """Return the potential of refit ``i``."""
        return SymbolicPotential(self.text, dict(zip(self.constants, map(float, self.draws[i]), strict=True)))


class Fitter:
    """Least squares of formulas in normalised units in the metric of one gauge; constants are positive."""

    def __init__(self, target: Target, metric: Metric) -> None:
        self.target, self.metric = target, metric
        self.nodes, self.rows = torch.as_tensor(target.nodes), torch.as_tensor(metric.rows)
        self.draws = torch.as_tensor(metric.draws)

    def values(self, text: str, names: Sequence[str], logs: Tensor) -> Tensor:
        """Return y ``(*batch, n_nodes)`` for logarithms of constants ``(*batch, p)``."""
        constants = [logs[..., j, None].exp() for j in range(len(names))]
        y = compiled(text, tuple(names))(self.nodes, *constants)
        return y.expand(*logs.shape[:-1], len(self.nodes))

    def fit(self, text: str, names: Sequence[str], start: Tensor, wanted: Tensor, iterations: int = 40) -> Minimum:
        """Fit constants (logarithms, from ``start`` (K, p)) to whitened targets ``wanted`` (K, k)."""

        def residual(logs: Tensor) -> Tensor:
            inside = (logs.abs() < _LIMIT).all(-1, keepdim=True)
            y = self.values(text, names, logs.clamp(-_LIMIT, _LIMIT))
            return torch.where(inside, y @ self.rows.T - wanted, torch.nan)

        return levenberg_marquardt(residual, start, iterations, 1e-8)


def distinct(candidates: Sequence[Candidate], target: Target, most: int, gauge: Gauge = "absolute") -> list[Formula]:
    """Fit candidates, merge those whose forces are equal whatever the posterior draw, and refit to the draws.

    Formulas that differ by a constant are one potential. The form that vanishes at infinity stands for it, if there is
    one, and the simplest of those.

    Parameters
    ----------
    candidates
        Of all searches.
    target
        Posterior of the potential.
    most
        Most formulas to return: those of the highest evidence.
    gauge
        Of formulas that a search found in another and that belong in this one: vanishing at infinity, but for a
        constant.
    """
    fitters: dict[str, Fitter] = {}
    groups: list[_Group] = []
    found = [by_mass(without_constant(one), gauge) for one in plausible(candidates, 3 * most)]
    texts = plausible(found, 3 * most)
    for candidate in [*texts, *tied(texts, most)]:
        gauges: tuple[Gauge, ...] = (candidate.gauge, "offset")
        for needed in gauges:
            if needed not in fitters:
                fitters[needed] = Fitter(target, target.metric(needed))
        one = _probe(fitters[candidate.gauge], candidate)
        if one is None:
            continue
        if not one.vanishing:
            # a constant in it, or its gauge, must not tell it from another of the same forces
            level = _probe(fitters["offset"], varying(candidate))
            one = one if level is None else one._replace(curves=level.curves)
        for group in groups:
            if group.same(one):
                group.add(one)
                break
        else:
            groups.append(_Group([one]))
    formulas = []
    for group in groups:
        formula = _finish(group, fitters[group.simplest.candidate.gauge], target)
        if formula is not None:
            formulas.append(formula)
    formulas.sort(key=lambda f: -f.ln_evidence)
    return formulas[:most]


class _Probe(NamedTuple):
    """A candidate fitted to the posterior mean and two draws.

    ``curves`` ``(3, k)`` are whitened in its own gauge if it vanishes at infinity, else in that of an open constant.
    """

    candidate: Candidate
    logs: Tensor
    curves: Tensor
    chi2: float
    size: tuple[int, int]
    vanishing: bool

    @property
    def order(self) -> tuple[int, bool, int, int]:
        """What is preferred: a limit of zero, then a constant left open; units; few constants and nodes."""
        level = 0 if self.vanishing else 1 if self.candidate.gauge != "absolute" else 2
        return (level, not homogeneous(self.candidate.text, tuple(sorted(self.candidate.constants))), *self.size)


class _Group:
    """Candidates of the same forces."""

    def __init__(self, members: list[_Probe]) -> None:
        self.members = members

    @property
    def simplest(self) -> _Probe:
        return min(self.members, key=lambda p: p.order)

    def same(self, other: _Probe) -> bool:
        mine = self.members[0]
        if mine.vanishing != other.vanishing or mine.curves.shape != other.curves.shape:
            return False
        if mine.vanishing and mine.candidate.gauge != other.candidate.gauge:
            return False
        return bool(((mine.curves - other.curves).abs() < SAME).all())

    def add(self, other: _Probe) -> None:
        self.members.append(other)


def _probe(fitter: Fitter, candidate: Candidate) -> _Probe | None:
    names = sorted(candidate.constants)
    start = torch.tensor([math.log(candidate.constants[n]) for n in names], dtype=torch.float64)
    # two draws beside the mean: forms that agree by accident on one curve part on others
    wanted = torch.stack([fitter.draws.mean(0), fitter.draws[0], fitter.draws[-1]])
    with np.errstate(all="ignore"):
        minimum = fitter.fit(candidate.text, names, start.expand(3, -1).clone(), wanted)
    if not bool(torch.isfinite(minimum.residual).all()):
        return None
    size = (len(names), complexity(candidate.text))
    fitted = candidate._replace(constants=dict(zip(names, minimum.parameters[0].exp().tolist(), strict=True)))
    curves, chi2 = minimum.residual + wanted, float(minimum.chi2[0])
    return _Probe(candidate, minimum.parameters[0], curves, chi2, size, vanishes(fitted))


def _finish(group: _Group, fitter: Fitter, target: Target) -> Formula | None:
    probe = group.simplest
    names = sorted(probe.candidate.constants)
    text = tidy(probe.candidate.text, names)
    wanted = fitter.draws.mean(0)[None]
    best = None
    for form in (text, probe.candidate.text):
        if {str(symbol) for symbol in parse(form).free_symbols} != {"r", *names}:
            continue
        minimum = fitter.fit(form, names, probe.logs[None], wanted, 60)
        # simplification may lose digits or a branch: then the form as it was found stays
        if bool(torch.isfinite(minimum.residual).all()) and float(minimum.chi2[0]) < probe.chi2 * 1.01 + 1e-3:
            text, best = form, minimum
            break
    if best is None or bool((best.parameters.abs() > _DEGENERATE).any()):
        return None
    index = np.linspace(0, len(fitter.draws) - 1, min(REFITS, len(fitter.draws))).round().astype(int)
    refits = fitter.fit(text, names, best.parameters.expand(len(index), -1).clone(), fitter.draws[index], 30)
    good = torch.isfinite(refits.residual).all(-1)
    if int(good.sum()) < max(len(names) + 2, len(index) // 2):
        return None
    logs = torch.cat([best.parameters, refits.parameters[good]])
    y = fitter.values(text, names, best.parameters)[0]
    shape = shape_of(y.numpy(), len(target.x))
    deviation = _deviation(y.numpy(), target, probe.candidate.gauge)
    worst = int(np.nanargmax(np.abs(deviation)))
    physical, labels, units, scales = _physical(text, names, target)
    constants = logs.exp().numpy() * scales
    chi2 = float(best.chi2[0])
    sources = sorted({s for member in group.members for s in member.candidate.source.split()})
    return Formula(
        text=physical,
        normalised=text,
        constants=labels,
        units=units,
        best=constants[0],
        draws=constants[1:],
        gauge=probe.candidate.gauge,
        chi2=chi2,
        n_directions=fitter.metric.size,
        worst=float(deviation[worst]),
        worst_r=float(target.x[worst] * target.r_0),
        faults=tuple(name for name, wrong in shape.faults(probe.candidate.gauge).items() if wrong),
        ln_evidence=_ln_evidence(best, chi2),
        complexity=complexity(text),
        sources=tuple(sources),
    )


def _ln_evidence(best: Minimum, chi2: float) -> float:
    """Laplace approximation in the logarithms of the constants, with the prior N(0, `PRIOR_SD`)."""
    logs, jacobian = best.parameters[0], best.jacobian[0]
    p = len(logs)
    information = jacobian.T @ jacobian + torch.eye(p, dtype=torch.float64) / PRIOR_SD**2
    ln_prior = -0.5 * float((logs**2).sum()) / PRIOR_SD**2 - p * math.log(PRIOR_SD * math.sqrt(2 * math.pi))
    return -0.5 * chi2 + ln_prior + 0.5 * p * math.log(2 * math.pi) - 0.5 * float(torch.logdet(information))


def _deviation(y: NDArray[Any], target: Target, gauge: Gauge) -> NDArray[Any]:
    """Return (formula - posterior mean) / posterior sd at the target's radii; NaN where the gauge fixes both."""
    n = len(target.x)
    values = target.values(gauge)
    predicted = y[:n]
    if gauge == "offset":
        predicted = predicted - y[3 * n]
    if gauge == "force":
        predicted = -(y[n : 2 * n] - y[2 * n : 3 * n]) / (2 * math.log(target.nodes[n] / target.x[0]))
    sd = values.std(0, ddof=1)
    with np.errstate(all="ignore"):
        return np.where(sd > 1e-3 * sd.max(), (predicted - values.mean(0)) / sd, np.nan)


def _physical(
    text: str, names: Sequence[str], target: Target
) -> tuple[str, tuple[str, ...], tuple[str, ...], NDArray[Any]]:
    """Return Phi(r) in physical units, names and units of its constants, and what multiplies the normalised ones."""
    import sympy

    def symbol(name: str) -> sympy.Symbol:
        return sympy.Symbol(name, positive=True)

    expression = parse(text)
    if not homogeneous(text, tuple(names)):
        # without units in the search a formula holds in normalised units only
        v2, r_0 = sympy.Float(target.v_0**2, 12), sympy.Float(target.r_0, 12)
        phi = -v2 * expression.subs(symbol("r"), symbol("r") / r_0)
        labels = tuple(names)
        return str(phi), labels, ("",) * len(labels), np.ones(len(labels))
    scale = {"GM": target.v_0**2 * target.r_0 / G, "V2": target.v_0**2, "E0": target.v_0**2}
    phi = -expression.subs(symbol("GM"), symbol("G") * symbol("M"))
    labels = tuple(PHYSICAL[name][0] for name in names)
    units = tuple(PHYSICAL[name][1] for name in names)
    return str(phi), labels, units, np.array([scale.get(name, target.r_0) for name in names])
