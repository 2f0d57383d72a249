"""Accuracy of fits to mock snapshots: the figures quoted in the README.

    python tests/benchmarks/accuracy.py free-form --n-stars 100000 --seeds 101-105
    python tests/benchmarks/accuracy.py free-form --n-stars 1000000 --seeds 201-203
    python tests/benchmarks/accuracy.py free-form --n-stars 5000 --seeds 501-524
    python tests/benchmarks/accuracy.py parametric --n-stars 10000 --seeds 301-320
    python tests/benchmarks/accuracy.py plummer --n-stars 131072 --seeds 401-403

Writes results/<case>-<n>.json beside this file. The truth enters only after the fit. Radii: 100, log-spaced.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path

import numpy as np
import torch
from bayespot.models import isochrone, spherical

from bayespot import FitConfig, Posterior, SnapshotModel, SphericalMixture, fit
from bayespot.mock import mock
from bayespot.potential import Isochrone, Plummer, truth_field

M, B = 1e11, 3.0
# Cramer-Rao floor of ln M and ln b with f(J) free, times sqrt(N) (isotropic isochrone)
FLOOR = {"m_tot": 0.92, "r_s": 1.38}


def free_form(n: int, seed: int) -> dict[str, float]:
    """Isochrone, free-form network: relative error of Phi over 0.1 <= r/b <= 50, Phi(infinity) = 0.

    ``*_in_68`` and ``*_in_95``: fraction of 50 radii between the 1 and 99 % stars whose band holds the truth.
    """
    catalog = mock(Isochrone(M, B), n_stars=n, seed=seed)
    begun = time.perf_counter()
    result = fit(spherical.build(catalog), catalog, FitConfig(seed=seed))
    seconds = time.perf_counter() - begun
    r = np.geomspace(0.1 * B, 50 * B, 100)
    posterior = Posterior.from_result(result)
    field = posterior.field("potential", r)
    truth = truth_field(Isochrone(M, B), "potential", r)
    inner = np.geomspace(result.catalog["r_q"][1], result.catalog["r_q"][7], 50)
    coverage = {}
    for name in ("potential", "enclosed_mass"):
        bands = posterior.thinned(400).field(name, inner).quantile([0.025, 0.16, 0.84, 0.975])
        true = truth_field(Isochrone(M, B), name, inner)
        coverage[f"{name}_in_68"] = float(((true > bands[1]) & (true < bands[2])).mean())
        coverage[f"{name}_in_95"] = float(((true > bands[0]) & (true < bands[3])).mean())
    at_map = truth_field(result.model.at(result.map).potential, "potential", r)
    return {
        "fit_seconds": seconds,
        "mean_error_of_map": float(np.abs(at_map / truth - 1).mean()),
        "mean_error": float(np.abs(field.mean / truth - 1).mean()),
        "worst_error": float(np.abs(field.mean / truth - 1).max()),
        "mean_sd": float((field.sd / np.abs(truth)).mean()),
        "rms_z": float(np.sqrt((((field.mean - truth) / field.sd) ** 2).mean())),
        "n_components": result.diagnostics.n_components,
        "n_unbound": result.diagnostics.n_unbound,
        "k_hat": result.diagnostics.k_hat,
        "gradient_norm": result.diagnostics.gradient_norm,
    } | coverage


def parametric(n: int, seed: int) -> dict[str, float]:
    """Isochrone with M and b free: error and posterior sd of ln M and ln b in units of the floor."""
    catalog = mock(Isochrone(M, B), n_stars=n, seed=seed)
    begun = time.perf_counter()
    result = fit(isochrone.build(catalog), catalog, FitConfig(seed=seed))
    row = {"fit_seconds": time.perf_counter() - begun, "n_components": result.diagnostics.n_components}
    for name, true in (("m_tot", M), ("r_s", B)):
        draws = result.draws[f"potential.{name}"].log()
        floor = FLOOR[name] / n**0.5
        row[f"{name}_error_over_floor"] = float(draws.mean() - np.log(true)) / floor
        row[f"{name}_sd_over_floor"] = float(draws.std()) / floor
    return row


def plummer(n: int, seed: int) -> dict[str, float]:
    """Plummer M = 1e10, b = 1 kpc: relative error of the acceleration at the stars with r < 10 b."""
    truth = Plummer(1e10, 1.0)
    catalog = mock(truth, n_stars=n, seed=seed)
    begun = time.perf_counter()
    result = fit(SnapshotModel(spherical.build(catalog).potential, SphericalMixture()), catalog, FitConfig(seed=seed))
    seconds = time.perf_counter() - begun
    posterior = Posterior.from_result(result).thinned(200)
    r = torch.linalg.vector_norm(catalog.x, dim=-1)
    r = np.sort(r[r < 10].numpy())[:: max(1, n // 2000)]
    field = posterior.field("radial_acceleration", r)
    error = np.abs(field.mean / truth_field(truth, "radial_acceleration", r) - 1)
    density = posterior.field("density", np.geomspace(1e-3, 1e3, 300))
    return {
        "fit_seconds": seconds,
        "median_acceleration_error": float(np.median(error)),
        "mean_acceleration_error": float(error.mean()),
        "fraction_of_negative_densities": float((density.draws <= 0).mean()),
    }


def main() -> None:
    """Run one case over its seeds and write the JSON after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=["free-form", "parametric", "plummer"])
    parser.add_argument("--n-stars", type=int, required=True)
    parser.add_argument("--seeds", required=True, help="FIRST-LAST")
    arguments = parser.parse_args()
    first, last = map(int, arguments.seeds.split("-"))
    case = {"free-form": free_form, "parametric": parametric, "plummer": plummer}[arguments.case]
    path = Path(__file__).parent / "results" / f"{arguments.case}-{arguments.n_stars}.json"
    rows = []
    for seed in range(first, last + 1):
        rows.append({"seed": seed} | case(arguments.n_stars, seed))
        print(json.dumps(rows[-1]), flush=True)
        keys = [k for k in rows[0] if k != "seed"]
        summary = {k: float(np.median([row[k] for row in rows])) for k in keys}
        rms = {f"rms_{k}": float(np.sqrt(np.mean([row[k] ** 2 for row in rows]))) for k in keys if "error" in k}
        machine = {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
        mean = {f"mean_{k}": float(np.mean([row[k] for row in rows])) for k in keys if "_in_" in k}
        document = {
            "n_stars": arguments.n_stars,
            "machine": machine,
            "median": summary,
            "rms": rms,
            "mean": mean,
            "rows": rows,
        }
        path.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
