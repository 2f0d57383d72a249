"""Whether a posterior can be trusted, in words, from the diagnostics of its fit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bayespot.inference.phase_mixing import ALARM, AngleTest, phase_mixing_warning
from bayespot.inference.symmetry import SymmetryTest, symmetry_warnings

LEVELS = ("trusted", "to be taken with care", "not to be trusted")
#: Guides whose draws are resampled by their exact weights: they do not lean on their maximum.
RESAMPLED = ("emulated", "marginal")
#: Below this Pareto shape importance weights correct the guide (Vehtari et al. 2024, JMLR 25, 72).
K_HAT_LIMIT = 0.7
#: Weights that leave this fraction of the draws effective matter little: no probability changes by over 0.17, no mean
#: by over a third of an sd, and both usually by far less. k-hat judges the shape of the weights' tail, not what it
#: weighs: of guides that are right but for a little skewness of the posterior it came out 0.5 to 1.3 with 1000 draws
#: or more.
NEARLY_EQUAL_WEIGHTS = 0.9
#: Fraction of stars that may have fewer than 2 effective samples within their errors.
POORLY_SAMPLED = 0.01
#: Fraction of stars that may be outliers.
MANY_OUTLIERS = 0.05


#: Bias of a field by the action finder, in posterior sd, from which a result is to be taken with care, and not to be
#: trusted; and by how many of its standard errors it must be real: the largest of half a dozen fields is reported.
FINDER_BIAS = (0.5, 1.0)
FINDER_SURE = 2.6


@dataclass(frozen=True)
class Verdict:
    """One of `LEVELS`, and the reasons, worst first; none when nothing speaks against the posterior."""

    level: str
    reasons: list[str]

    def __str__(self) -> str:
        if not self.reasons:
            return "The posterior can be trusted: nothing in the diagnostics speaks against it."
        words = {"to be taken with care": "is to be taken with care", "not to be trusted": "is not to be trusted"}
        return "\n".join([f"The posterior {words[self.level]}:", *(f"- {reason}" for reason in self.reasons)])


def verdict(diagnosis: Mapping[str, Any]) -> Verdict:
    """Judge a fit by its diagnostics.

    Parameters
    ----------
    diagnosis
        `bayespot.inference.Diagnostics` as a dictionary (a run's ``diagnostics.json``), with ``predictive`` if the run
        has been checked; or an ensemble's, with those of its ``members`` and their ``spread`` (`member_spread`).
    """
    found: list[tuple[int, str]] = []
    for k, member in enumerate(diagnosis.get("members", [])):
        judged = verdict(member)
        found += [(LEVELS.index(judged.level), f"member {k}: {reason}") for reason in judged.reasons]
    if (spread := diagnosis.get("spread", 0.0)) > 1:
        found.append((1, f"the members differ by {spread:.1f} times their own sd: a single fit would be too sure"))
    for judge in () if "members" in diagnosis else (_fit, _guide, _elbo, _chains, _data, _finder):
        found += judge(diagnosis)
    found += [(1, note) for note in diagnosis.get("notes", [])]
    found += [(1, note) for note in diagnosis.get("predictive", {}).get("warnings", [])]
    found.sort(key=lambda pair: -pair[0])
    return Verdict(LEVELS[max((level for level, _ in found), default=0)], [reason for _, reason in found])


def _fit(d: Mapping[str, Any]) -> list[tuple[int, str]]:
    found = []
    # weights judge what is resampled
    if not d["gradient_norm"] <= 0.2 and d.get("guide") not in RESAMPLED:
        level = 1 if d["gradient_norm"] <= 1 else 2
        text = f"the MAP is {d['gradient_norm']:.2g} posterior sd from the maximum"
        found.append((level, f"{text}; raise map_iterations"))
    if n := d["n_unbound"]:
        level = 2 if n > max(1, 0.01 * d.get("n_stars", 0)) else 1
        found.append((level, f"{n} stars are unbound in the posterior mean potential, wherever within their errors"))
    return found


def _guide(d: Mapping[str, Any]) -> list[tuple[int, str]]:
    found = []
    k = _number(d["k_hat"])
    alike = (_number(d.get("weight_fraction")) or 0.0) >= NEARLY_EQUAL_WEIGHTS
    if k is not None and k > (1.0 if alike else K_HAT_LIMIT):
        shown = "is infinite (a weight is not finite)" if math.isinf(k) else f"is {k:.2f} (> {K_HAT_LIMIT})"
        level = 1 if k <= 1 or alike else 2
        text = f"PSIS k-hat {shown}: the guide misses part of the posterior"
        found.append((level, f"{text} and may be too narrow; {_remedy(d)}"))
    if (narrowing := d.get("narrowing")) is not None and narrowing < 0.95:
        # fields mix latents whose correlations are lost: their bands may come out too narrow or too wide
        text = f"the mean field's worst latent has {narrowing:.2f} of the sd it should have, too narrow by construction"
        found.append((1 if narrowing > 0.5 else 2, f"{text}, and bands lack its correlations; take guide full_rank"))
    return found


def _remedy(d: Mapping[str, Any]) -> str:
    """What to do about a guide that misses part of the posterior."""
    joint = bool(d.get("error_samples") or d.get("selection_points") or d.get("conditional"))
    if joint and d.get("df", "").endswith("Mixture"):
        return "try df logistic_gp, with which the posterior of f(J) and the potential is closer to a Gaussian"
    if d.get("guide") in RESAMPLED:
        return "try another seed, or nuts for few stars"
    return "try another guide"


def _elbo(d: Mapping[str, Any]) -> list[tuple[int, str]]:
    if len(d["elbo"]) < 40:
        return []
    trace = elbo_trend(d["elbo"])
    if trace.converged:
        return []
    if trace.drift < 0 and trace.significant:
        return [(2, f"the ELBO fell by {-trace.drift:.1f} over its last quarter: lower svi_learning_rate")]
    if trace.significant:
        return [(1, f"the ELBO still rose by {trace.drift:.1f} over its last quarter: raise svi_steps")]
    text = f"the ELBO wanders, {trace.scatter:.1f} about its trend where steps alone scatter by {trace.noise:.1f}"
    return [(1, f"{text}: raise svi_steps or lower svi_learning_rate")]


def _chains(d: Mapping[str, Any]) -> list[tuple[int, str]]:
    found = []
    if (r_hat := d.get("r_hat")) is not None and not r_hat <= 1.05:
        found.append((1 if r_hat <= 1.2 else 2, f"the chains disagree, r-hat {r_hat:.2f} (> 1.05): raise n_draws"))
    if (ess := d.get("ess")) is not None and not ess >= 100:
        found.append((1 if ess >= 25 else 2, f"the sample holds {ess:.0f} independent draws (< 100): raise n_draws"))
    if (divergences := d.get("divergences") or 0.0) > 0.01:
        text = f"{100 * divergences:.0f} % of NUTS's transitions diverge"
        found.append((1, f"{text}: part of the posterior is not reached"))
    return found


def _data(d: Mapping[str, Any]) -> list[tuple[int, str]]:
    found = []
    if (p := _number(d.get("angle_p_value"))) is not None and p < ALARM:
        test = AngleTest(d.get("angle_statistic") or math.nan, d.get("angle_dof") or 0, p)
        found.append((2, phase_mixing_warning(test) or ""))
    if d.get("symmetry"):
        test_of_symmetry = SymmetryTest.from_dict(d["symmetry"])
        found += symmetry_warnings(d["potential_symmetry"], d["df_symmetry"], test_of_symmetry)
    if d.get("projected"):
        text = (
            "line-of-sight velocities: where places count bands of M held the truth at 66 and 90 % (of 68 and 95) of "
            "the radii of 14 mocks, and cusps came out too shallow; without places it has not been measured"
        )
        found.append((2, f"{text}: do not quote bands without this"))
    elif d.get("conditional") and d.get("guide") != "marginal":
        text = (
            "velocities given positions: bands are too narrow (68 and 95 % held the truth in 51 and 79 % of the radii"
        )
        found.append((2, f"{text} of 40 mocks with a Gaussian guide): take guide marginal with df logistic_gp"))
    elif d.get("conditional") and not d.get("adaptive"):
        text = (
            "velocities given positions: with this prior of f(J) bands of M were biased (68 and 95 % held the truth "
            "in 42 and 82 % of the radii of 25 mocks)"
        )
        found.append((2, f"{text}: take LogisticGaussianProcess.of_velocities()"))
    elif d.get("conditional"):
        text = (
            "velocities given positions: M of isotropic tracers is too large (by 1.9 sd in 4 mocks; of radially biased "
            "ones bands held the truth in 66 and 95 % of the radii of 40)"
        )
        found.append((2, f"{text}: state the selection and fit with it where it can be known"))
    few = d.get("n_poorly_sampled", 0)
    of = f" of {n}" if (n := d.get("n_error_samples")) else ""
    remedy = "raise n_samples of the model's errors"
    if (samples := d.get("error_samples")) and samples[1] < 4:
        text = f"5 % of the stars have at most {samples[1]:.1f} (< 4) effective samples{of} within their errors"
        also = f", {few} of them fewer than 2" if few else ""
        found.append((1 if samples[2] >= 4 else 2, f"{text}{also}: {remedy}"))
    elif few > POORLY_SAMPLED * d.get("n_stars", 0):
        text = f"{few} stars have fewer than 2 effective samples{of} within their errors"
        found.append((1, f"{text}: {remedy}"))
    n, lost = d.get("n_stars", 0), d.get("n_outliers", 0)
    if lost > max(1, MANY_OUTLIERS * n):
        text = (
            f"{lost} of {n} stars ({100 * lost / n:.0f} %) are probably no members: the background is for a few; clean"
        )
        found.append((1 if lost <= 0.2 * n else 2, f"{text} the catalogue, or give the other population its own model"))
    if (error := d.get("selection_error") or 0.0) > 0.1:
        points = f"other points than the {d['selection_points']} that normalise the selection"
        text = f"{points} would move the result by {error:.2f} posterior sd: raise selection_max_points"
        found.append((1 if error <= 0.5 else 2, text))
    return found


def _finder(d: Mapping[str, Any]) -> list[tuple[int, str]]:
    """The Staeckel fudge's own error, where it is larger than chance makes it."""
    measured = d.get("finder_bias") or {}
    sure = [
        (abs(row["bias"]), row) for row in measured.get("fields", []) if abs(row["bias"]) > FINDER_SURE * row["error"]
    ]
    if not sure or not max(sure, key=lambda pair: pair[0])[0] > FINDER_BIAS[0]:
        return []
    bias, row = max(sure, key=lambda pair: pair[0])
    scatter, most = (100 * value for value in measured["scatter"])
    text = (
        f"the action finder's own error moves {row['name']} by {row['bias']:+.1f} +- {row['error']:.1f} posterior sd, "
        f"which the bands do not cover (J varies along orbits by {scatter:.1g} %, {most:.2g} % for the worst tenth)"
    )
    return [(1 if bias <= FINDER_BIAS[1] else 2, text)]


def _number(value: Any) -> float | None:
    """A number, or None for what was not computed."""
    return None if value is None or math.isnan(value) else float(value)


@dataclass(frozen=True)
class ElboTrend:
    """The last quarter of an ELBO trace: ``drift`` over it by a straight line and that line's ``error``, ``scatter``
    about it and the ``noise`` of single steps, from differences of successive values; all in nats."""

    drift: float
    error: float
    scatter: float
    noise: float

    @property
    def significant(self) -> bool:
        """Whether the drift is real, 3 standard errors, and matters: half a nat is what a shift by one sd costs."""
        return abs(self.drift) > 3 * self.error and abs(self.drift) > 0.5

    @property
    def converged(self) -> bool:
        """Whether neither a drift nor slow wandering is left."""
        return not self.significant and not self.scatter > max(2 * self.noise, 0.5)


def elbo_trend(elbo: Sequence[float]) -> ElboTrend:
    """Fit a line to the last quarter of a trace; noise and scatter are robust (a single bad draw is neither)."""
    last = np.asarray(elbo, dtype=float)[-max(10, len(elbo) // 4) :]
    n = len(last)
    t = np.linspace(-0.5, 0.5, n)
    low, high = np.quantile(last, [0.02, 0.98])
    clipped = np.clip(last, low, high)
    slope = float((t * clipped).sum() / (t**2).sum())
    rest = clipped - clipped.mean() - slope * t
    scatter = float(1.4826 * np.median(np.abs(rest - np.median(rest))))
    noise = float(1.4826 * np.median(np.abs(np.diff(last))) / math.sqrt(2))
    error = float(rest.std(ddof=2) / math.sqrt((t**2).sum()))
    return ElboTrend(slope, error, scatter, noise)
