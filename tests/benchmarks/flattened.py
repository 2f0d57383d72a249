"""Fits of stars in a flattened galaxy: how often the bands hold the truth, and what the fudge costs.

    python tests/benchmarks/flattened.py run --stars halo --n-stars 2000 --seeds 1-12 [--out results/flattened.jsonl]
    python tests/benchmarks/flattened.py summary [--out results/flattened.jsonl]

Stars of `bayespot.mock.galaxy_mock`, in the Milky Way of `MWPotential2014`, fitted with the true family and the masses
of disc and halo and the halo's scale radius free: priors LogNormal about half the mass and twice the radius, sd 1. A
row per fit: z-scores of v_c in the plane at the radii that hold 5 to 95 % of the stars, and of the vertical force
1.1 kpc above; whether the 68 and 95 % bands hold the truth; k-hat; the seconds of mock and fit. Rows that exist are
kept: an interrupted run goes on.
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
from pyro.distributions import LogNormal

from bayespot import Catalog, FitConfig, Posterior, SnapshotModel, fit
from bayespot.df import ActionMixture
from bayespot.mock import galaxy_mock
from bayespot.potential import NFW, MiyamotoNagai, MWPotential2014, PowerLawCutoff

RESULTS = Path(__file__).parent / "results"
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
Z = 1.1


def model() -> SnapshotModel:
    """The true family with three free parameters."""
    bulge, disc, halo = MWPotential2014().members

    def near(value: float) -> LogNormal:
        return LogNormal(torch.tensor(math.log(value), dtype=torch.float64), 1.0)

    free = PowerLawCutoff(float(bulge.m_tot), float(bulge.r_c), float(bulge.gamma))
    free = free + MiyamotoNagai(near(float(disc.m_tot) / 2), 3.0, 0.28)
    return SnapshotModel(free + NFW(near(float(halo.m_s) / 2), near(2 * float(halo.r_s))), ActionMixture())


def one(stars: str, n_stars: int, seed: int) -> dict[str, Any]:
    """Mock, fit and compare."""
    begun = time.perf_counter()
    catalog: Catalog = galaxy_mock(stars, n_stars=n_stars, seed=seed)
    drawn = time.perf_counter()
    result = fit(model(), catalog, FitConfig(seed=seed), progress=False)
    done = time.perf_counter()
    posterior = Posterior.from_result(result)
    truth = MWPotential2014()
    r = np.quantile(torch.linalg.vector_norm(catalog.x, dim=-1).numpy(), QUANTILES)
    places = np.stack([r, 0 * r, 0 * r + Z], -1)
    with torch.no_grad():
        true = {
            "v_c": truth.circular_speed(torch.as_tensor(r)).numpy(),
            "K_z": truth.acceleration(torch.as_tensor(places))[:, 2].numpy(),
        }
    draws = {
        "v_c": posterior.field("circular_speed", r).draws,
        "K_z": posterior.field("acceleration", places).draws[..., 2],
    }
    row: dict[str, Any] = {
        "stars": stars, "n_stars": n_stars, "seed": seed, "r": r.tolist(), "k_hat": result.diagnostics.k_hat,
        "n_components": result.diagnostics.n_components, "gradient_norm": result.diagnostics.gradient_norm,
        "map_iterations": result.diagnostics.map_iterations, "angle_p_value": result.diagnostics.angle_p_value,
        "mock_seconds": round(drawn - begun, 1), "fit_seconds": round(done - drawn, 1),
    }  # fmt: skip
    for name, values in draws.items():
        row[name] = {
            "z": ((values.mean(0) - true[name]) / values.std(0)).tolist(),
            "relative_sd": np.abs(values.std(0) / true[name]).tolist(),
            "relative_error": np.abs(values.mean(0) / true[name] - 1).tolist(),
            **{
                f"in_{p}": (
                    (np.quantile(values, 0.5 - p / 200, 0) < true[name])
                    & (true[name] < np.quantile(values, 0.5 + p / 200, 0))
                ).tolist()
                for p in (68, 95)
            },
        }
    return row


def summary(path: Path) -> None:
    """Print coverage, rms z and errors by kind of star and number."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for key in sorted({(row["stars"], row["n_stars"]) for row in rows}):
        some = [row for row in rows if (row["stars"], row["n_stars"]) == key]
        seconds = [float(np.median([row[name] for row in some])) for name in ("mock_seconds", "fit_seconds")]
        worst = max(row["k_hat"] for row in some)
        print(f"{key[0]}, N = {key[1]}: {len(some)} fits, k-hat at most {worst:.2f}, mock and fit {seconds} s (median)")
        for name in ("v_c", "K_z"):
            parts = {part: np.array([row[name][part] for row in some]) for part in some[0][name]}
            shares = [100 * parts[f"in_{p}"].mean(1) for p in (68, 95)]
            errors = [share.std(ddof=1) / len(share) ** 0.5 if len(share) > 1 else math.nan for share in shares]
            rms = float((parts["z"] ** 2).mean() ** 0.5)
            error, sd = (100 * float(np.median(parts[part])) for part in ("relative_error", "relative_sd"))
            print(
                f"  {name}: 68 % band {shares[0].mean():.0f} +- {errors[0]:.0f} %, 95 % {shares[1].mean():.0f} +- "
                f"{errors[1]:.0f} %, rms z {rms:.2f}, mean z {np.round(parts['z'].mean(0), 2).tolist()}, median error "
                f"{error:.2f} %, median sd {sd:.2f} %"
            )


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "summary"))
    parser.add_argument("--stars", default="halo")
    parser.add_argument("--n-stars", type=int, default=2000)
    parser.add_argument("--seeds", default="1-12")
    parser.add_argument("--out", type=Path, default=RESULTS / "flattened.jsonl")
    options = parser.parse_args()
    if options.what == "summary":
        summary(options.out)
        return
    first, last = map(int, options.seeds.split("-"))
    kept = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
    made = {(row["stars"], row["n_stars"], row["seed"]) for row in kept}
    for seed in range(first, last + 1):
        if (options.stars, options.n_stars, seed) in made:
            continue
        row = one(options.stars, options.n_stars, seed)
        with options.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"seed {seed}: z of v_c {np.round(row['v_c']['z'], 2).tolist()}, fit {row['fit_seconds']} s", flush=True)


if __name__ == "__main__":
    main()
