"""Distillation of fits to mock snapshots: is the true form found, and are its constants right?

    python tests/benchmarks/distill.py isochrone --n-stars 100000 --seeds 3001-3010
    python tests/benchmarks/distill.py plummer --n-stars 100000 --seeds 3001-3005
    python tests/benchmarks/distill.py hernquist --n-stars 100000 --seeds 3001-3005
    python tests/benchmarks/distill.py nfw --n-stars 100000 --seeds 3001-3005 --budget-minutes 5
    python tests/benchmarks/distill.py outside --n-stars 100000 --seeds 3001-3001

For every seed: mock, free-form fit, distillation of 3 minutes (or ``--budget-minutes``) in one process, a direct fit of
the true form to the stars, and on the first five seeds pyoperon (if installed) on the same posterior mean for as many
seconds as the searches had. ``outside`` is a bulge in a halo, which no formula of the families describes. Writes
results/distill-<case>-<n>.json beside this file after each seed; a seed that is there already is not repeated. The
truth enters only after the fits.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bayespot.models import spherical
from pyro.distributions import LogNormal

from bayespot import FitConfig, Posterior, SnapshotModel, SphericalMixture, fit
from bayespot.distill import Distillation, DistillConfig, distill
from bayespot.distill.formulas import Fitter
from bayespot.distill.ranking import constant_prior
from bayespot.distill.target import Target
from bayespot.mock import mock
from bayespot.potential import NFW, Hernquist, Isochrone, Plummer

#: True form in normalised units, its constants' true values in physical units, and the closed-form class.
TRUTHS: dict[str, tuple[str, dict[str, float], Any]] = {
    "isochrone": ("GM/(b+sqrt(b**2+r**2))", {"M": 1e11, "b": 3.0}, Isochrone),
    "plummer": ("GM/sqrt(b**2+r**2)", {"M": 1e10, "b": 1.0}, Plummer),
    "hernquist": ("GM/(b+r)", {"M": 1e11, "b": 5.0}, Hernquist),
    "nfw": ("GM*log(1+r/b)/r", {"M": 8e11, "b": 20.0}, NFW),
}
#: Simulated system of every case, of these constants; the stars of the last two are tracers, not the source of Phi.
SYSTEMS = {name: name for name in TRUTHS} | {"nfw": "hernquist-in-nfw", "outside": "hernquist-in-galaxy"}
SAME = 0.05


def is_form(text: str, truth: str, target: Target, gauge: str) -> bool:
    """Say whether a normalised formula is the true form: equal best fits to the mean and to four draws (0.05 sd)."""
    fitter = Fitter(target, target.metric(gauge))  # type: ignore[arg-type]
    wanted = torch.cat([fitter.draws.mean(0)[None], fitter.draws[::100][:4]])
    curves = []
    for form in (text, truth):
        names = sorted(n for n in ("GM", "b", "c", "V2", "E0") if n in form)
        start = torch.zeros(len(wanted), len(names), dtype=torch.float64)
        curves.append(fitter.fit(form, names, start, wanted, 100).residual + wanted)
    return bool(((curves[0] - curves[1]).abs() < SAME).all())


def direct(case: str, catalog: Any, target: Target, n_components: int, seed: int) -> dict[str, dict[str, float]]:
    """Fit the true form to the stars with priors on its two constants: mean and sd of each."""
    _, values, cls = TRUTHS[case]
    first, second = ("m_s" if cls is NFW else "m_tot"), "r_s"
    prior: list[LogNormal] = [constant_prior("Msun", target), constant_prior("kpc", target)]
    model = SnapshotModel(cls(*prior), SphericalMixture())
    draws = fit(model, catalog, FitConfig(seed=seed, n_components=n_components)).draws
    return {
        name: {"mean": float(draws[f"potential.{site}"].mean()), "sd": float(draws[f"potential.{site}"].std())}
        for name, site in zip(values, (first, second), strict=True)
    }


def operon(target: Target, truth: str, seconds: float, seed: int) -> dict[str, Any]:
    """Search the posterior mean of y with pyoperon for so many seconds: is the true form on its Pareto front?"""
    import sympy
    from pyoperon.sklearn import SymbolicRegressor

    begun, found, n_runs, best = time.perf_counter(), False, 0, ""
    x, y = target.x[:, None], target.draws.mean(0)
    while not found and (left := seconds - (time.perf_counter() - begun)) > 1:
        regressor = SymbolicRegressor(
            allowed_symbols="add,sub,mul,div,sqrt,log,square,constant,variable",
            max_length=25, optimizer_iterations=10, objectives=["r2", "length"], n_threads=1,
            max_time=max(1, int(min(left, 15.0))), generations=10**6, max_evaluations=10**9,
            random_state=seed * 1000 + n_runs,
        )  # fmt: skip
        regressor.fit(x, y)
        n_runs += 1
        for member in regressor.pareto_front_:
            best = str(regressor.get_model_string(member["tree"], 10))
            whole = sympy.sympify(best.replace("^", "**").replace("X1", "r"))
            # its models have an intercept; the truth has none, as Phi(infinity) = 0
            form, constants = _with_constants(whole.as_independent(sympy.Symbol("r"), as_Add=True)[1])
            if len(constants) <= 6 and _equal_curves(form, constants, truth, target):
                found = True
                break
    return {"found": found, "seconds": time.perf_counter() - begun, "runs": n_runs, "last": best}


def _with_constants(expression: Any) -> tuple[Any, dict[str, float]]:
    import sympy

    constants, replaced = {}, expression
    for i, number in enumerate(sorted(expression.atoms(sympy.Float), key=float)):
        constants[f"k{i}"] = float(number)
        replaced = replaced.subs(number, sympy.Symbol(f"k{i}"))
    return replaced, constants


def _equal_curves(form: Any, constants: dict[str, float], truth: str, target: Target) -> bool:
    """Fit both forms to the mean and four draws by least squares and compare them, in posterior sd."""
    import sympy
    from scipy.optimize import least_squares

    metric = target.metric("absolute")
    nodes = target.nodes
    curves = []
    for expression, start in (
        (form, constants),
        (sympy.sympify(truth), {n: 1.0 for n in ("GM", "b") if n in truth}),
    ):
        call = sympy.lambdify([sympy.Symbol("r"), *map(sympy.Symbol, start)], expression, "numpy")
        here = []
        for wanted in (metric.mean, *metric.draws[::100][:4]):

            def residual(c: Any, wanted: Any = wanted, call: Any = call) -> Any:
                with np.errstate(all="ignore"):
                    y = np.broadcast_to(call(nodes, *c), nodes.shape)
                return np.nan_to_num(metric.rows @ y - wanted, nan=1e6, posinf=1e6, neginf=-1e6)

            here.append(residual(least_squares(residual, list(start.values()), x_scale="jac").x) + wanted)
        curves.append(np.array(here))
    return bool((np.abs(curves[0] - curves[1]) < SAME).all())


def judge(case: str, found: Distillation) -> dict[str, Any]:
    """Compare a distillation with the truth: place, log weight, constants."""
    row: dict[str, Any] = {
        "verdict": found.verdict(),
        "best": found.best.text,
        "best_weight": float(found.weights[0]),
        "n_formulas": len(found.formulas),
        "n_listed": int((found.weights > 0.01).sum()),
        "failures": len(found.failures),
    }
    if case not in TRUTHS:
        return row
    form, values, _ = TRUTHS[case]
    for i, formula in enumerate(found.formulas):
        if is_form(formula.normalised, form, found.target, formula.gauge) and set(formula.constants) == set(values):
            summary = formula.summary()
            row |= {"place": i + 1, "ln_weight": float(found.ln_weights[i]), "chi2": formula.chi2}
            row |= {"n_searches": len(formula.sources)}
            for name, true in values.items():
                row[f"{name}_z"] = (summary[name]["mean"] - true) / summary[name]["sd"]
                row[f"{name}_sd"] = summary[name]["sd"]
            return row
    return row | {"place": 0, "ln_weight": -math.inf}


def one(case: str, n: int, seed: int, minutes: float, jobs: int, folder: Path, peer: bool = True) -> dict[str, Any]:
    """Run one seed; ``peer``: pyoperon too."""
    catalog = mock(SYSTEMS[case], n_stars=n, seed=seed)
    begun = time.perf_counter()
    result = fit(spherical.build(catalog), catalog, FitConfig(seed=seed))
    row: dict[str, Any] = {"fit_seconds": time.perf_counter() - begun}
    posterior = Posterior.from_result(result)
    begun = time.perf_counter()
    work = folder / f"{case}-{n}-{seed}"
    config = DistillConfig(seed=seed, budget_minutes=minutes)
    found = distill(posterior, config, folder=work, resume=work.exists(), catalog=catalog, jobs=jobs)
    row |= {"distill_seconds": time.perf_counter() - begun} | judge(case, found)
    row["search_seconds"] = sum(s.seconds for s in found.searches)
    if case in TRUTHS:
        for name, one_constant in direct(case, catalog, found.target, result.diagnostics.n_components, seed).items():
            row[f"{name}_direct_sd"] = one_constant["sd"]
            row[f"{name}_direct_z"] = (one_constant["mean"] - TRUTHS[case][1][name]) / one_constant["sd"]
            if f"{name}_sd" in row:
                row[f"{name}_sd_ratio"] = row[f"{name}_sd"] / one_constant["sd"]
        if not peer:
            return row
        try:
            row["operon"] = operon(found.target, TRUTHS[case][0], row["search_seconds"], seed)
        except ModuleNotFoundError:
            row["operon"] = None
    return row


def main() -> None:
    """Run the seeds that are not there yet; write the JSON after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=list(SYSTEMS))
    parser.add_argument("--n-stars", type=int, required=True)
    parser.add_argument("--seeds", required=True, help="FIRST-LAST")
    parser.add_argument("--budget-minutes", type=float, default=3.0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--operon-seeds", type=int, default=5, help="Compare with pyoperon on so many of the seeds.")
    parser.add_argument("--work", type=Path, default=Path("distill-work"), help="Folder of the searches, for resuming.")
    arguments = parser.parse_args()
    first, last = map(int, arguments.seeds.split("-"))
    path = Path(__file__).parent / "results" / f"distill-{arguments.case}-{arguments.n_stars}.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    arguments.work.mkdir(parents=True, exist_ok=True)
    for seed in range(first, last + 1):
        if any(row["seed"] == seed for row in rows):
            continue
        options = (arguments.budget_minutes, arguments.jobs, arguments.work, seed - first < arguments.operon_seeds)
        found = one(arguments.case, arguments.n_stars, seed, *options)
        rows.append({"seed": seed} | found)
        print(json.dumps(rows[-1]), flush=True)
        placed = [row for row in rows if row.get("place")]
        summary = {
            "n_seeds": len(rows),
            "found": len(placed),
            "within_2_of_the_highest_weight": sum(row["ln_weight"] > -2 for row in placed),
            "operon_found": sum(bool(row.get("operon") and row["operon"]["found"]) for row in rows),
            "operon_seeds": sum(bool(row.get("operon")) for row in rows),
        }
        document = {"n_stars": arguments.n_stars, "minutes": arguments.budget_minutes, "summary": summary, "rows": rows}
        path.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    # the searches' processes import this file
    torch.set_num_threads(1)
    main()
