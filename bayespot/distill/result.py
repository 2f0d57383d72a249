"""The result of a distillation: formulas with weights and constants, as table, text and files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bayespot.distill.formulas import Formula
from bayespot.distill.grammar import DistillConfig
from bayespot.distill.ranking import Ranking, softmax
from bayespot.distill.search import Search, write_json
from bayespot.distill.target import Target
from bayespot.potential.fields import Field
from bayespot.units import UNITS

if TYPE_CHECKING:
    from astropy.table import QTable
    from numpy.typing import NDArray

#: A formula counts as within the data's power when its weight is above this.
LISTED = 0.01
#: Below this probability of its chi-square a formula does not describe the posterior.
REJECTED = 1e-3
#: Below this one the verdict says that the right formula may be missing.
DOUBTFUL = 0.05


@dataclass(frozen=True)
class Distillation:
    """Formulas for the potential, best first, with what speaks for each.

    Parameters
    ----------
    formulas
        Distinct formulas by weight.
    ranking
        Their fits to the stars, in the same order for the first of them; None without the stars.
    config, target
        What was asked, and of what.
    searches, failures
        What was done, and what went wrong.
    """

    formulas: tuple[Formula, ...]
    ranking: Ranking | None
    config: DistillConfig
    target: Target
    searches: tuple[Search, ...]
    failures: tuple[str, ...]

    @property
    def weights(self) -> NDArray[Any]:
        """Posterior probability of every formula, equal beforehand: from the stars, else from the posterior of Phi.

        Zero for formulas that the settings forbid, and for those that were not fitted to the stars.
        """
        return softmax(self._ln_evidence)

    @property
    def _ln_evidence(self) -> NDArray[Any]:
        if self.ranking is None:
            forbidden = [bool(self.config.forbidden(f.faults, f.gauge)) for f in self.formulas]
            return np.where(forbidden, -np.inf, [f.ln_evidence for f in self.formulas])
        values = [one.ln_evidence if one else -np.inf for one in self.ranking.fits]
        return np.array(values + [-np.inf] * (len(self.formulas) - len(values)))

    @property
    def ln_weights(self) -> NDArray[Any]:
        """Logarithms of the weights relative to the largest; minus infinity where a formula was not weighed."""
        values = self._ln_evidence
        return values - values.max() if np.isfinite(values).any() else values

    @property
    def best(self) -> Formula:
        """The formula of the highest weight."""
        return self.formulas[0]

    def verdict(self) -> str:
        """Say in words whether any formula describes the data, and how many do."""
        likeliest = min(self.formulas, key=lambda f: f.chi2_per_dof)
        lines = []
        if likeliest.p_value < REJECTED:
            lines.append(
                f"no formula within the budget describes the data; the best is off by {abs(likeliest.worst):.1f} sigma "
                f"at r = {likeliest.worst_r:.3g} kpc (chi-square {likeliest.chi2:.0f} for "
                f"{likeliest.n_directions - len(likeliest.constants)} degrees of freedom): {likeliest.text}. The "
                "weights compare wrong formulas with each other; use the free form"
            )
        else:
            within = [f.text for f, w in zip(self.formulas, self.weights, strict=True) if w >= LISTED]
            if len(within) == 1:
                lines.append(f"one formula holds {100 * self.weights.max():.0f} % of the weight: {within[0]}")
            else:
                lines.append(
                    f"{len(within)} formulas hold at least {100 * LISTED:.0f} % of the weight each; the data do not "
                    f"choose between them: {'; '.join(within)}"
                )
            if self.best.p_value < DOUBTFUL:
                lines.append(
                    f"the first agrees poorly with the posterior (probability of its chi-square "
                    f"{self.best.p_value:.1g}): the right form may not be among those found; search longer"
                )
        if self.ranking is not None:
            free = self.ranking.loo["free form"]
            others = [row["elpd"] for key, row in self.ranking.loo.items() if key != "free form"]
            if others and free["elpd"] > max(others):
                best = min((r for k, r in self.ranking.loo.items() if k != "free form"), key=lambda r: r["elpd_diff"])
                if best["elpd_diff"] > max(4.0, 3 * best["dse"]):
                    lines.append(
                        f"the stars prefer the free form to every formula, by {best['elpd_diff']:.1f} +- "
                        f"{best['dse']:.1f} in the leave-one-out log-likelihood"
                    )
        return "; ".join(lines)

    def table(self) -> QTable:
        """Return a row per formula and one of the free form: weight, misfit, likelihood, constants, LaTeX."""
        from astropy.table import QTable

        rows = [self._row(i) for i in range(len(self.formulas))]
        if self.ranking is not None:
            free = self.ranking.free_form
            empty: dict[type, Any] = {float: np.nan, int: 0, str: ""}
            blank = {key: empty[type(value)] for key, value in rows[0].items()}
            rows.append(
                blank
                | {"formula": "free form", "complexity": 0, "n_constants": 0, "chi2": 0.0, "n_directions": 0}
                | {"ln_likelihood": free.ln_likelihood, "ln_evidence": free.ln_evidence}
                | _loo(self.ranking, "free form")
            )
        table = QTable(rows=rows)
        table.meta["verdict"] = self.verdict()
        table.meta["mode"] = self.config.mode
        if self.ranking is not None:
            table.meta["n_stars"] = self.ranking.n_stars
        return table

    def _row(self, i: int) -> dict[str, Any]:
        formula = self.formulas[i]
        star_fit = None
        if self.ranking is not None and i < len(self.ranking.fits):
            star_fit = self.ranking.fits[i]
        constants = ", ".join(
            f"{name} = {one['mean']:.5g} +- {one['sd']:.2g} {one['unit']}".rstrip()
            for name, one in formula.summary().items()
        )
        return {
            "formula": formula.text,
            "weight": float(self.weights[i]),
            "ln_weight": float(self.ln_weights[i]),
            "complexity": formula.complexity,
            "n_constants": len(formula.constants),
            "chi2": formula.chi2,
            "n_directions": formula.n_directions,
            "p_value": formula.p_value,
            "worst_sigma": formula.worst,
            "worst_r": formula.worst_r,
            "ln_evidence_field": formula.ln_evidence,
            "ln_likelihood": star_fit.ln_likelihood if star_fit else np.nan,
            "ln_evidence": star_fit.ln_evidence if star_fit else np.nan,
            **_loo(self.ranking, i),
            "faults": " ".join(formula.faults),
            "gauge": formula.gauge,
            "constants": constants,
            "n_searches": len(formula.sources),
            "latex": formula.latex,
        }

    def latex(self) -> str:
        """Return the formulas with weights and constants as a LaTeX table."""
        lines = [r"\begin{tabular}{llll}", r"$\Phi(r)$ & weight & $\chi^2$ & constants \\ \hline"]
        for formula, weight in zip(self.formulas, self.weights, strict=True):
            body = formula.latex.removeprefix(r"\Phi(r) = ")
            constants = ", ".join(
                rf"${name} = {_tex_number(one['mean'], one['sd'])}${_tex_unit(one['unit'])}"
                for name, one in formula.summary().items()
            )
            lines.append(rf"${body}$ & {weight:.3f} & {formula.chi2:.1f}/{formula.n_directions} & {constants} \\")
        return "\n".join([*lines, r"\end{tabular}", ""])

    def records(self) -> dict[str, Any]:
        """Return everything but the draws of Phi as plain data."""
        out = []
        for i, formula in enumerate(self.formulas):
            star_fit = self.ranking.fits[i] if self.ranking and i < len(self.ranking.fits) else None
            row = {key: _plain(value) for key, value in self._row(i).items() if key != "constants"}
            from_stars = (
                {name: {"mean": float(x.mean()), "sd": float(x.std(ddof=1))} for name, x in star_fit.constants.items()}
                if star_fit
                else None
            )
            out.append(
                row
                | {
                    "constants": formula.summary(),
                    "constants_from_stars": from_stars,
                    "best": formula.best.tolist(),
                    "correlation": formula.correlation.tolist(),
                    "draws": formula.draws.tolist(),
                    "normalised": formula.normalised,
                    "python": formula.potential().python(),
                    "sources": list(formula.sources),
                }
            )
        searches = [{"name": s.name, "epochs": s.epochs, "seconds": s.seconds} for s in self.searches]
        return {
            "verdict": self.verdict(),
            "mode": self.config.mode,
            "r_0": self.target.r_0,
            "v_0": self.target.v_0,
            "n_stars": self.ranking.n_stars if self.ranking else None,
            "formulas": out,
            "searches": searches,
            "failures": list(self.failures),
        }

    def save(self, folder: Path) -> None:
        """Write ``table.ecsv``, ``candidates.json``, ``formulas.tex`` and the figure (PNG, PDF) to a folder."""
        from bayespot.files import replacing
        from bayespot.report import plots

        write_json(folder / "candidates.json", self.records())
        with replacing(folder / "table.ecsv") as temporary:
            self.table().write(temporary, format="ascii.ecsv", overwrite=True)
        with replacing(folder / "formulas.tex") as temporary:
            temporary.write_text(self.latex())
        with plots.style():
            figure = plots.formulas_figure(self.field(), self.curves(), self.target.stars_r)
            for name in ("formulas.png", "formulas.pdf"):
                plots.save(figure, folder / name)

    def field(self) -> Field:
        """Return the posterior draws of Phi that were distilled, in (km/s)^2."""
        v2 = self.target.v_0**2
        return Field("potential", UNITS["potential"], self.target.x * self.target.r_0, -v2 * self.target.draws)

    def curves(self, most: int = 4) -> dict[str, NDArray[Any]]:
        """Return Phi of the first formulas at the target's radii by label.

        An offset that a formula leaves open is set by the posterior mean at the normalising radius.
        """
        field, found = self.field(), {}
        r = torch.as_tensor(field.points)
        for formula, weight in list(zip(self.formulas, self.weights, strict=True))[:most]:
            potential = formula.potential()
            values = potential.phi_r(r).detach().numpy()
            if formula.gauge != "absolute":
                r_0 = torch.tensor(self.target.r_0, dtype=torch.float64)
                at_one = -(self.target.v_0**2) * self.target.at_one.mean()
                values = values + at_one - float(potential.phi_r(r_0).detach())
            body = formula.latex.removeprefix(r"\Phi(r) = ")
            found[rf"${body}$ ({weight:.2f})"] = values
        return found


def _loo(ranking: Ranking | None, key: int | str) -> dict[str, float]:
    row = ranking.loo.get(key) if ranking is not None else None
    return {
        "elpd": row["elpd"] if row else np.nan,
        "elpd_diff": row["elpd_diff"] if row else np.nan,
        "elpd_diff_se": row["dse"] if row else np.nan,
        "stacking_weight": row["weight"] if row else np.nan,
    }


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _tex_number(mean: float, sd: float) -> str:
    if 1e-3 < abs(mean) < 1e4:
        return rf"{mean:.4g} \pm {sd:.2g}"
    exponent = int(np.floor(np.log10(abs(mean)))) if mean else 0
    return rf"({mean / 10**exponent:.4g} \pm {sd / 10**exponent:.2g}) \times 10^{{{exponent}}}"


def _tex_unit(unit: str) -> str:
    text = unit.replace("Msun", r"M$_\odot$").replace("km2 / s2", r"km$^2$ s$^{-2}$")
    return rf"\,{text}" if text else ""
