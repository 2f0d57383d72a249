"""Velocities given positions: which way the marginal posterior slopes at the truth, along its ridge.

    python tests/benchmarks/ridge.py run --stars selected --amplitude 0 --seeds 3291-3298
    python tests/benchmarks/ridge.py run --stars all --amplitude 0 --seeds 3291-3298
    python tests/benchmarks/ridge.py summary

Hernquist tracers in an NFW halo, isotropic or (``--system hernquist-in-nfw-radial``) of beta = 0.3: those of 20 000
that the rule of case ``conditional`` of calibration.py keeps (``selected``), or 5000 (``all``). The potential has the
true family and two parameters, ln m_s and ln r_s, so that no prior of a free form enters; f(J) is that of
`LogisticGaussianProcess.of_velocities`, integrated out at ln A = ``--amplitude`` prior standard deviations. M and f(J)
stand in for each other where both parameters grow by the same factor.

Of each mock: the derivative of the log marginal posterior along (1, 1) at the truth, ``slope``, and minus its second
derivative, ``information``, by differences of 0.1. Were the truth a draw of the prior, slopes would scatter about zero
with the root of the information; at one truth they scatter by what the data alone tell, about what the prior of f(J)
adds. A row per mock in results/ridge.jsonl; those that are there are skipped.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from calibration import commit, read_rows, surveyed
from pyro.distributions import LogNormal

from bayespot import FitConfig, LogisticGaussianProcess, SnapshotModel, fit
from bayespot.inference.latent import LatentSpace
from bayespot.inference.marginal import MarginalPosterior
from bayespot.mock import MOCKS, mock
from bayespot.potential import NFW

ROWS = Path(__file__).parent / "results" / "ridge.jsonl"
STEP = 0.1
N_SELECTED_FROM, N_ALL = 20_000, 5000


def number(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def one_mock(system: str, stars: str, amplitude: float, seed: int) -> dict[str, Any]:
    """Slope and information of one mock."""
    torch.set_num_threads(1)
    truth = MOCKS[system].potential
    if stars == "all":
        catalog = mock(system, n_stars=N_ALL, seed=seed)
    else:
        catalog = surveyed("unknown", N_SELECTED_FROM, seed, system)[1]
    centre = {"potential.m_s": math.log(float(truth.m_s)), "potential.r_s": math.log(float(truth.r_s))}
    potential = NFW(*(LogNormal(number(value), number(1.0)) for value in centre.values()))
    model = SnapshotModel(potential, LogisticGaussianProcess.of_velocities(), likelihood="conditional")
    # the maximum: f(J) is looked for from there
    config = FitConfig(seed=seed, guide="laplace", outliers=False, n_draws=10, k_hat_draws=0)
    found = fit(model, catalog, config, progress=False)
    space = LatentSpace(found.model)
    u = space.vector(found.map)
    target = MarginalPosterior(space, found.model.prepare(catalog), u)
    values = []
    for step in (-STEP, 0.0, STEP):
        at = u.clone()
        for name, value in centre.items():
            at[space.slices[name]] = value + step
        here = torch.cat([at[target.rest], number(amplitude)[None]])
        orbits, given = target.orbits(here)
        root = given.root(orbits.mode)
        values.append(orbits.log_p + float(root.diagonal().log().sum()))
    below, middle, above = values
    return {
        "system": system,
        "stars": stars,
        "amplitude": amplitude,
        "seed": seed,
        "n": len(catalog),
        "slope": (above - below) / (2 * STEP),
        "information": (2 * middle - below - above) / STEP**2,
        "commit": commit(),
    }


def summary() -> None:
    """Print the mean slope with its standard error, the scatter, and the information, by case."""
    keys = ("system", "stars", "amplitude")
    for case in sorted({tuple(row[key] for key in keys) for row in read_rows(ROWS)}, key=str):
        some = [row for row in read_rows(ROWS) if tuple(row[key] for key in keys) == case]
        slope = np.array([row["slope"] for row in some])
        information = np.median([row["information"] for row in some])
        error = slope.std(ddof=1) / len(slope) ** 0.5 if len(slope) > 1 else math.nan
        print(
            *case,
            f"{len(some)} mocks: slope {slope.mean():.1f} +- {error:.1f}, median {np.median(slope):.1f}, scatter "
            f"{error * len(slope) ** 0.5:.1f}; information {information:.0f}, its root {information**0.5:.1f}",
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run", "summary"])
    parser.add_argument("--system", choices=["hernquist-in-nfw", "hernquist-in-nfw-radial"], default="hernquist-in-nfw")
    parser.add_argument("--stars", choices=["selected", "all"], default="selected")
    parser.add_argument("--amplitude", type=float, default=0.0)
    parser.add_argument("--seeds", default="3291-3298", help="FIRST-LAST")
    arguments = parser.parse_args()
    if arguments.command == "summary":
        summary()
        return
    first, last = map(int, arguments.seeds.split("-"))
    case = {"system": arguments.system, "stars": arguments.stars, "amplitude": arguments.amplitude}
    for seed in range(first, last + 1):
        if any(case.items() <= row.items() and row["seed"] == seed for row in read_rows(ROWS)):
            continue
        row = one_mock(arguments.system, arguments.stars, arguments.amplitude, seed)
        with ROWS.open("a") as file:
            file.write(json.dumps(row, separators=(",", ":")) + "\n")
        print(f"{seed}: slope {row['slope']:.1f}, information {row['information']:.0f}", flush=True)


if __name__ == "__main__":
    main()
