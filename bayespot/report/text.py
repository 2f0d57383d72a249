"""What a run found out about itself, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from bayespot.inference.verdict import K_HAT_LIMIT, LEVELS, Verdict, elbo_trend
from bayespot.likelihood.outliers import LIKELY
from bayespot.posterior.posterior import PotentialDraws
from bayespot.potential.axial_fields import AXIAL_FIELDS

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Re-weighting is shown where it moves a mean or changes a width by more than this, in posterior sd.
WORTH_SHOWING = 0.1


def describe(diagnosis: Mapping[str, Any]) -> list[str]:
    """Return one line per diagnostic that the fit has."""
    if "members" in diagnosis:
        lines = [
            f"ensemble of {len(diagnosis['members'])}; the members' v_c differ by {diagnosis['spread']:.2f} of their sd"
        ]
        for k, (weight, member) in enumerate(zip(diagnosis["weights"], diagnosis["members"], strict=True)):
            said = describe(member)
            said = [said[0], *(line for line in said[1:] if line.startswith("outliers"))]
            lines += [f"member {k}, weight {weight:.2f}: {line}" for line in said]
        return lines
    sampled = f"PSIS k-hat {diagnosis['k_hat']:.2f}"
    if (fraction := diagnosis.get("weight_fraction")) is not None:
        sampled += f" with {100 * fraction:.0f} % of the draws effective"
    if diagnosis.get("r_hat") is not None:
        sampled = (
            f"r-hat {diagnosis['r_hat']:.3f}, {diagnosis['ess']:.0f} independent draws, "
            f"{100 * diagnosis['divergences']:.1f} % divergent"
        )
    elif diagnosis["k_hat"] != diagnosis["k_hat"]:
        sampled = "no PSIS k-hat (particles, or too few draws)"
    orbits = f"{diagnosis['n_components']} components"
    if diagnosis.get("df") == "LogisticGaussianProcess":
        orbits = "logistic Gaussian process"
    if rounds := diagnosis.get("df_rounds"):
        orbits = (
            f"{diagnosis['df']}, trained in {len(rounds)} rounds, the last moved Phi by {rounds[-1]['moved']:.2g} sd"
        )
    lines = [
        f"f(J): {orbits}; MAP {diagnosis['gradient_norm']:.2g} posterior sd from the "
        f"maximum after {diagnosis['map_iterations']} iterations; {diagnosis['n_unbound']} stars unbound; "
        f"{sampled}; {sum(diagnosis['seconds'].values()):.0f} s"
    ]
    if len(diagnosis["elbo"]) >= 40:
        trend = elbo_trend(diagnosis["elbo"])
        lines.append(
            f"ELBO: {'has' if trend.converged else 'has not'} converged; over its last quarter it moved by "
            f"{trend.drift:+.2f} +- {trend.error:.2f}, steps scatter by {trend.noise:.2f}"
        )
    if diagnosis.get("error_samples"):
        least, low, median = diagnosis["error_samples"]
        few = diagnosis.get("n_poorly_sampled", 0)
        lines.append(
            f"measurement errors: effective samples per star {least:.1f} at least, {low:.1f} for 95 %, {median:.1f} in "
            "the median" + (f"; fewer than 2 for {few}, remedy: n_samples of the model's errors" if few else "")
        )
    if diagnosis.get("selected_fraction"):
        lines.append(
            f"selection: {100 * diagnosis['selected_fraction']:.1f} % of the population is in the catalogue; other "
            f"points than the {diagnosis['selection_points']} used would move the result by "
            f"{diagnosis['selection_error']:.2f} posterior sd"
        )
    if diagnosis.get("projected"):
        lines.append("likelihood: of line-of-sight velocities given places on the sky, whatever the selection of these")
    elif diagnosis.get("conditional"):
        lines.append("selection: any in position, known or not; the likelihood is that of velocities given positions")
    if diagnosis.get("outlier_fraction") is not None:
        lines.append(outlier_line(diagnosis))
    if diagnosis.get("angle_p_value") is not None:
        lines.append(f"phase mixing: uniformity of the angles p = {diagnosis['angle_p_value']:.2g}")
    lines += _symmetry(diagnosis)
    if (measured := diagnosis.get("finder_bias")) and measured["fields"]:
        worst = max(measured["fields"], key=lambda row: abs(row["bias"]))
        median, most = (100 * value for value in measured["scatter"])
        lines.append(
            f"action finder: J varies along orbits by {median:.1g} % of the sum of actions in the median, by "
            f"{most:.2g} % for the worst tenth; that moves {worst['name']} by {worst['bias']:+.2f} +- "
            f"{worst['error']:.2f} posterior sd, other fields by less ({measured['n_stars']} stars' orbits)"
        )
    return lines


def quote(judged: Verdict) -> str:
    """Return which of two tables to quote, where there is one of re-weighted draws besides."""
    if judged.level == LEVELS[-1]:
        return "Quote neither table: the posterior is not to be trusted."
    return "Quote the second table: its draws follow the exact posterior, those of the first the guide's shape."


def _symmetry(diagnosis: Mapping[str, Any]) -> list[str]:
    """What the stars say about the symmetry, or why they were not asked."""
    if tests := diagnosis.get("symmetry"):
        words = {"directions": "positions within orbital planes", "planes": "orbital planes"}
        if diagnosis["potential_symmetry"] == "axisymmetric":
            words = {"directions": "positions about the axis", "planes": "orbital planes about the axis"}
        shown = ", ".join(f"{words[name]} p = {test['p_value']:.2g}" for name, test in tests.items())
        return [f"symmetry ({diagnosis['potential_symmetry']} potential): quadrupole of the {shown}"]
    if any(diagnosis.get(name) for name in ("error_samples", "selected_fraction", "conditional")):
        return ["symmetry: not tested on stars with errors or a selection, which spread unevenly in any case"]
    return []


def outlier_line(diagnosis: Mapping[str, Any]) -> str:
    """Return what a fit with an outlier component says of its outliers, the first ten by row and name."""
    n, named = diagnosis["n_outliers"], [one for one in diagnosis["outliers"] if one["probability"] > LIKELY]
    line = f"outliers: fraction {diagnosis['outlier_fraction']:.2g} inferred; {n} of {diagnosis['n_stars']} stars"
    if not n:
        return line + " more likely outliers than members"
    shown = [
        f"row {one['row']}" + (f" ({one['name']})" if "name" in one else "") + f" p = {one['probability']:.3f}"
        for one in named[:10]
    ]
    return f"{line} probably no members (rows count from 0): " + ", ".join(shown) + (", ..." if n > 10 else "")


def bands_in_columns(few: PotentialDraws, radii: NDArray[Any], names: Sequence[str]) -> list[NDArray[Any]]:
    """Return the quantiles 16, 50 and 84 % ``(3, n)`` of fields of radius, `AXIAL_FIELDS` among them, for a table."""
    radial = few.radial_fields(radii, [name for name in names if name not in AXIAL_FIELDS])
    axial = [name for name in names if name in AXIAL_FIELDS]
    found = radial | (few.axial_fields(radii, axial) if axial else {})
    return [found[name].quantile([0.16, 0.5, 0.84]) for name in names]


def reweighted_where_it_matters(
    posterior: PotentialDraws, diagnosis: Mapping[str, Any], radii: NDArray[Any]
) -> PotentialDraws | None:
    """Return the posterior re-weighted to the exact one if that is reliable and differs in v_c, else None.

    Reliable: k-hat of every member is at most 0.7. The same draws are compared with and without weights, so that their
    own Monte-Carlo error is not taken for a difference.
    """
    members = diagnosis.get("members", [diagnosis])
    if not all(member["k_hat"] <= K_HAT_LIMIT for member in members):
        return None
    try:
        before = posterior.evaluated()
    except ValueError:  # a run of a version that did not keep weights
        return None
    after = posterior.reweighted()
    old, new = (one.radial_fields(radii, ["circular_speed"])["circular_speed"] for one in (before, after))
    change = np.maximum(np.abs(new.mean - old.mean), np.abs(new.sd - old.sd)) / old.sd
    return after if float(change.max()) > WORTH_SHOWING else None
