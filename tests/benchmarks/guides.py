"""Which guide: coverage, width and time of every guide and sampler on the same mocks, the README's table.

    python tests/benchmarks/guides.py parametric --seeds 1001-1010
    python tests/benchmarks/guides.py free-form --seeds 1001-1010 --nuts 3

Isochrone, M = 1e11 Msun, b = 3 kpc. ``parametric``: M and b free, closed-form actions, N = 1000. ``free-form``: the
mass-slope network with 6 features (8 latents), N = 2000. Per mock and guide, of v_c at 20 radii between the 5 and
95 % stars: whether the 68 and 95 % bands hold the truth, z, posterior sd over that of NUTS (mean over radii) and
seconds. NUTS moves f(J) too (free form: 400 draws after 100 steps per chain); ``--nuts`` is
the number of mocks it is run on. SVGD is refused in free form. Seeds below 1000 were for tuning.
``re-weighted``: draws resampled to the exact posterior. ``ensemble`` and
``ensemble-evidence``: the same 4 members, weighted equally and by evidence; seconds of one core.
Writes results/guides-<case>.json beside this file after each fit; what is there already is not run again; and a .png.
The truth enters only after the fit.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bayespot.models import isochrone

from bayespot import (
    Catalog,
    EnsemblePosterior,
    FitConfig,
    Isochrone,
    MassSlopeNetwork,
    Posterior,
    SnapshotModel,
    SphericalMixture,
    fit,
    fit_ensemble,
)
from bayespot.actions import IsochroneActions
from bayespot.inference import EnsembleResult
from bayespot.mock import mock
from bayespot.posterior import PotentialDraws, member_spread
from bayespot.potential import truth_field

TRUE = Isochrone(1e11, 3.0)
N_STARS = {"parametric": 1000, "free-form": 2000}
#: Guide and guide of f(J).
SINGLE = {
    "full_rank": ("full_rank", "point"),
    "full_rank, joint": ("full_rank", "joint"),
    "low_rank": ("low_rank", "point"),
    "low_rank, joint": ("low_rank", "joint"),
    "mean_field": ("mean_field", "point"),
    "mean_field, joint": ("mean_field", "joint"),
    "laplace": ("laplace", "point"),
    "laplace, joint": ("laplace", "joint"),
    "svgd": ("svgd", "point"),
    "nuts": ("nuts", "joint"),
}
#: Re-weighted to the exact posterior as well.
WEIGHTED = ("full_rank, joint", "mean_field, joint")
ORDER = ["nuts", *SINGLE, *(f"{name}, re-weighted" for name in WEIGHTED), "ensemble", "ensemble, evidence"]


def model(case: str, catalog: Catalog) -> SnapshotModel:
    """The model of a case."""
    if case == "parametric":
        return SnapshotModel(isochrone.build(catalog).potential, SphericalMixture(), IsochroneActions())
    return SnapshotModel(MassSlopeNetwork.for_stars(catalog.w, n_features=6), SphericalMixture())


def judged(posterior: PotentialDraws, r: np.ndarray) -> dict[str, Any]:
    """Bands against the truth."""
    field, true = posterior.thinned(1000).field("circular_speed", r), truth_field(TRUE, "circular_speed", r)
    q = field.quantile([0.025, 0.16, 0.84, 0.975])
    return {
        "in_68": float(((true > q[1]) & (true < q[2])).mean()),
        "in_95": float(((true > q[0]) & (true < q[3])).mean()),
        "z": list((field.mean - true) / field.sd),
        "sd": list(field.sd),
    }


def rows(case: str, catalog: Catalog, name: str, seed: int) -> dict[str, dict[str, Any]]:
    """Fit with one guide; return its row, and those of what follows from the same fit."""
    r_stars = torch.linalg.vector_norm(catalog.x, dim=-1)
    r = np.geomspace(float(r_stars.quantile(0.05)), float(r_stars.quantile(0.95)), 20)
    begun = time.process_time()
    if name == "ensemble":
        ensemble = fit_ensemble(model(case, catalog), catalog, FitConfig(seed=seed), 4, jobs=1, progress=False)
        seconds = time.process_time() - begun
        found = {}
        for label, weighting in (("ensemble", "equal"), ("ensemble, evidence", "evidence")):
            mixture = EnsemblePosterior.from_result(EnsembleResult(ensemble.members, weighting))
            found[label] = judged(mixture, r) | {
                "seconds": seconds,
                "weights": mixture.weights.tolist(),
                "spread": member_spread(mixture, r),
                "log_evidence": [member.diagnostics.log_evidence for member in ensemble.members],
                "n_components": [member.diagnostics.n_components for member in ensemble.members],
            }
        return found
    guide, df_guide = SINGLE[name]
    config = FitConfig(seed=seed, guide=guide, df_guide=df_guide)
    if name == "nuts" and case == "free-form":
        config = replace(config, n_draws=400, nuts_warmup=100)
    result = fit(model(case, catalog), catalog, config, progress=False)
    seconds, d = time.process_time() - begun, result.diagnostics
    about = {"seconds": seconds, "k_hat": d.k_hat, "r_hat": d.r_hat, "ess": d.ess, "n_components": d.n_components}
    posterior = Posterior.from_result(result)
    found = {name: judged(posterior, r) | about}
    if name in WEIGHTED:
        found[f"{name}, re-weighted"] = judged(posterior.reweighted(), r) | about
    return found


def summary(table: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Over mocks: coverage, rms z, sd over that of NUTS on the mocks that have it, seconds."""
    out = {}
    names = [name for name in dict.fromkeys(ORDER) if any(name in row for row in table.values())]
    for name in names:
        own = [row[name] for row in table.values() if name in row]
        ratio = [np.mean(np.array(row[name]["sd"]) / row["nuts"]["sd"]) for row in table.values()
                 if name in row and "nuts" in row]  # fmt: skip
        out[name] = {
            "mocks": len(own),
            "in_68": float(np.mean([row["in_68"] for row in own])),
            "in_95": float(np.mean([row["in_95"] for row in own])),
            "rms_z": float(np.mean([np.mean(np.square(row["z"])) for row in own]) ** 0.5),
            "sd_over_nuts": float(np.mean(ratio)) if ratio else None,
            "seconds": float(np.median([row["seconds"] for row in own])),
            "k_hat": float(np.median([row.get("k_hat") or np.nan for row in own])),
        }
    return out


def draw(found: dict[str, Any], case: str, path: Path) -> None:
    """Width against NUTS, and coverage, of every guide."""
    from matplotlib.figure import Figure

    names = list(found)[::-1]
    figure = Figure(figsize=(7.1, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    left.barh(names, [found[name]["sd_over_nuts"] or np.nan for name in names], color="#0072B2")
    left.axvline(1, color="k", ls="--", lw=0.8)
    left.set_xlabel("sd of $v_c$ over that of NUTS")
    for key, level, colour in (("in_68", 0.68, "#0072B2"), ("in_95", 0.95, "#D55E00")):
        right.plot([found[name][key] for name in names], names, "o", color=colour, label=f"{100 * level:.0f} % band")
        right.axvline(level, color=colour, ls="--", lw=0.8)
    right.set_xlabel("radii whose band holds the truth")
    figure.legend(frameon=False, loc="outside upper right", ncols=2)
    left.set_title(case, loc="left")
    figure.savefig(path, dpi=200)


def main() -> None:
    """Run one case over its seeds, guide by guide."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=list(N_STARS))
    parser.add_argument("--seeds", default="1001-1010", help="FIRST-LAST")
    parser.add_argument("--guides", default=";".join([*SINGLE, "ensemble"]), help="separated by semicolons")
    parser.add_argument("--nuts", type=int, default=10, help="mocks on which NUTS is run")
    parser.add_argument("--ensembles", type=int, default=10, help="mocks on which ensembles are run")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    first, last = map(int, arguments.seeds.split("-"))
    path = Path(__file__).parent / "results" / f"guides-{arguments.case}.json"
    table = json.loads(path.read_text())["rows"] if path.exists() else {}
    for seed in range(first, last + 1):
        catalog = mock("isochrone", n_stars=N_STARS[arguments.case], seed=seed)
        row = table.setdefault(str(seed), {})
        for name in arguments.guides.split(";"):
            most = {"nuts": arguments.nuts, "ensemble": arguments.ensembles}.get(name, last)
            refused = name == "svgd" and arguments.case == "free-form"  # too many latents
            if name in row or seed - first >= most or refused:
                continue
            row |= rows(arguments.case, catalog, name, seed)
            print(seed, name, {k: v for k, v in row[name].items() if k not in ("z", "sd")}, flush=True)
            document = {
                "n_stars": N_STARS[arguments.case],
                "machine": {"processor": platform.processor() or platform.machine(), "threads": 1},
                "summary": summary(table),
                "rows": table,
            }
            partial = path.with_suffix(".tmp")
            partial.write_text(json.dumps(document, indent=1) + "\n")
            os.replace(partial, path)
    draw(summary(table), arguments.case, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
