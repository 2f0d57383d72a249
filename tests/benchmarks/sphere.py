"""A sphere fitted by the axisymmetric model and by the spherical one: what the freedom to be flattened costs.

    python tests/benchmarks/sphere.py --n-stars 2000 --seeds 1-2

Isotropic isochrones (`bayespot.mock.mock`). For each seed, at the radii that hold 5, 25, 50, 75 and 95 % of the stars:
the sd of M(<r) in the axisymmetric fit over that in the spherical one, the difference of their means in units of the
latter, and the 95 % band of the flattening of Phi, which is one. A row of JSON per seed is printed.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import numpy as np
import torch
from bayespot.models import axisymmetric, spherical

from bayespot import FitConfig, Posterior, fit
from bayespot.mock import mock
from bayespot.pyro_modules import freeze

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
N_DRAWS = 200


def masses(posterior: Posterior, r: np.ndarray) -> np.ndarray:
    """M(<r) of every draw ``(n_draws, n)``."""
    found = []
    for i in range(posterior.n_draws):
        model, values = posterior.source(i)
        own = {n.removeprefix("potential."): v for n, v in values.items() if n.startswith("potential.")}
        found.append(freeze(model.potential, own).enclosed_mass(torch.as_tensor(r)).detach().numpy())
    return np.array(found)


def one(n_stars: int, seed: int) -> dict[str, Any]:
    """Mock, both fits, and what they differ by."""
    catalog = mock("isochrone", n_stars=n_stars, seed=seed)
    r = np.quantile(torch.linalg.vector_norm(catalog.x, dim=-1).numpy(), QUANTILES)
    results = [
        fit(part.build(catalog), catalog, FitConfig(seed=seed), progress=False) for part in (spherical, axisymmetric)
    ]
    posteriors = [Posterior.from_result(result).thinned(N_DRAWS) for result in results]
    sphere, flattened = (masses(posterior, r) for posterior in posteriors)
    q = posteriors[1].axial_fields(r, ["potential_flattening"])["potential_flattening"].draws
    return {
        "n_stars": n_stars, "seed": seed, "r": r.tolist(), "k_hat": [result.diagnostics.k_hat for result in results],
        "sd_ratio": (flattened.std(0) / flattened.mean(0) * sphere.mean(0) / sphere.std(0)).tolist(),
        "shift": ((flattened.mean(0) - sphere.mean(0)) / sphere.std(0)).tolist(),
        "q_95": np.nanquantile(q, [0.025, 0.975], axis=0).tolist(),
    }  # fmt: skip


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n-stars", type=int, default=2000)
    parser.add_argument("--seeds", default="1-2")
    options = parser.parse_args()
    first, last = map(int, options.seeds.split("-"))
    for seed in range(first, last + 1):
        print(json.dumps(one(options.n_stars, seed)), flush=True)


if __name__ == "__main__":
    main()
