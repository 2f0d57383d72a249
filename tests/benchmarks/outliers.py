"""What the outlier component costs clean samples of the isochrone, and how well two parameters are calibrated with it.

    python tests/benchmarks/outliers.py shift --n-stars 1000 --seeds 101-104 [--guide laplace]
    python tests/benchmarks/outliers.py parametric --seeds 3101-3160 [--without]

``shift``: the free form fitted with and without it, the same seed: by how many posterior sd the mean of v_c moves at
the radii that hold 2 to 98 % of the stars, the ratio of the sd, and of the CPU times. ``parametric``: N = 1000,
Laplace approximation, rms z of ln M and ln b. One line of JSON each.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np
import torch
from bayespot.models import isochrone, spherical

from bayespot import FitConfig, Posterior, fit
from bayespot.mock import mock

TRUTH = np.log([1e11, 3.0])
QUANTILES = (0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98)


def shift(n_stars: int, seed: int, guide: str) -> dict[str, object]:
    """Return shift, ratio of sd and of CPU times of one sample."""
    catalog = mock("isochrone", n_stars=n_stars, seed=seed)
    r = np.quantile(torch.linalg.vector_norm(catalog.x, dim=-1).numpy(), QUANTILES)
    found = []
    for outliers in (False, True):
        begun = time.process_time()
        result = fit(spherical.build(catalog), catalog, FitConfig(seed=1, guide=guide, outliers=outliers))
        used = time.process_time() - begun
        found.append((Posterior.from_result(result).field("circular_speed", r), used))
    (off, without), (on, with_it) = found
    moved, wider = (on.mean - off.mean) / off.sd, on.sd / off.sd
    row = {"shift": moved.round(3).tolist(), "sd_ratio": wider.round(3).tolist(), "cpu_ratio": with_it / without}
    return {"n_stars": n_stars, "seed": seed, "guide": guide} | row


def parametric(seeds: range, outliers: bool) -> dict[str, object]:
    """Return the rms z of ln M and ln b over the seeds."""
    z = []
    for seed in seeds:
        catalog = mock("isochrone", n_stars=1000, seed=seed)
        config = FitConfig(seed=seed, guide="laplace", outliers=outliers, k_hat_draws=1)
        draws = fit(isochrone.build(catalog), catalog, config).draws
        u = torch.stack([draws["potential.m_tot"], draws["potential.r_s"]], -1).log().numpy()
        z.append((u.mean(0) - TRUTH) / u.std(0))
    return {"outliers": outliers, "n_mocks": len(z), "rms_z": np.sqrt(np.square(z).mean(0)).round(3).tolist()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("shift", "parametric"))
    parser.add_argument("--seeds", default="101-104")
    parser.add_argument("--n-stars", type=int, default=1000)
    parser.add_argument("--guide", default="full_rank")
    parser.add_argument("--without", action="store_true", help="parametric: fit without the component")
    given = parser.parse_args()
    first, _, last = given.seeds.partition("-")
    seeds = range(int(first), int(last or first) + 1)
    torch.set_num_threads(1)
    if given.what == "parametric":
        print(json.dumps(parametric(seeds, not given.without)))
        return
    for seed in seeds:
        print(json.dumps(shift(given.n_stars, seed, given.guide)), flush=True)


if __name__ == "__main__":
    main()
