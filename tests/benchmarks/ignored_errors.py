"""v_c where errors of 5 % in distance, 0.02 mas/yr and 2 km/s are taken into account or ignored, by JSON line.

    python tests/benchmarks/ignored_errors.py --seeds 41-43

2000 stars of the isochrone, default free form; ratio to the truth, sd and z at the radii that hold 2 to 98 % of them.
"""

from __future__ import annotations

import argparse
import json

import numpy as np
import torch
from bayespot.models import spherical

from bayespot import FitConfig, Posterior, fit
from bayespot.mock import mock, observe, truth_potential
from bayespot.potential import truth_field


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="41-43")
    parser.add_argument("--n-stars", type=int, default=2000)
    given = parser.parse_args()
    first, _, last = given.seeds.partition("-")
    torch.set_num_threads(1)
    for seed in range(int(first), int(last or first) + 1):
        stars = mock("isochrone", n_stars=given.n_stars, seed=seed)
        seen = observe(stars, seed + 1, distance_error=0.05, pm_error=0.02, v_error=2.0)
        r = np.quantile(torch.linalg.vector_norm(stars.x, dim=-1).numpy(), [0.02, 0.1, 0.5, 0.9, 0.98])
        true = truth_field(truth_potential(stars), "circular_speed", r)
        for name, catalog in (("taken into account", seen), ("ignored", seen.without_errors())):
            result = fit(spherical.build(catalog), catalog, FitConfig(seed=1))
            v_c = Posterior.from_result(result).field("circular_speed", r)
            numbers = {"ratio": v_c.mean / true, "sd": v_c.sd / true, "z": (v_c.mean - true) / v_c.sd}
            rounded = {key: value.round(3).tolist() for key, value in numbers.items()}
            print(json.dumps({"seed": seed, "errors": name, "k_hat": result.diagnostics.k_hat} | rounded), flush=True)


if __name__ == "__main__":
    main()
