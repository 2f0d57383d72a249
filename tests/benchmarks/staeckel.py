"""Accuracy and cost of the Staeckel fudge on one core, beside galpy's in C.

    python tests/benchmarks/staeckel.py

N = 1e5 disc stars and as many halo stars (contracts.axisymmetric, seeds 11 and 12; radii of 3 to 30 kpc) of a
Milky-Way-like sum of a Miyamoto-Nagai disc, a Hernquist bulge and an NFW halo, with Delta = 2.5 kpc. Costs are
medians of five runs after a warm-up, per star; tables are built anew in every run, as a fit does. galpy's
actionAngleStaeckel (C, the same Delta, order 10) is timed on 5000 of the same stars in the same run. Writes
results/staeckel.json beside this file.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from contracts.actions import bound_stars
from contracts.axisymmetric import disc_stars, milky_way

from bayespot.actions import StaeckelFudge
from bayespot.units import G

N, N_GALPY = 100_000, 5000
DELTA = 2.5


def seconds_per_star(call: Callable[[], object], n: int = N, runs: int = 5) -> float:
    """Median of timed runs, in microseconds per star."""
    call()
    times = []
    for _ in range(runs):
        begun = time.perf_counter()
        call()
        times.append(time.perf_counter() - begun)
    return 1e6 * statistics.median(times) / n


def galpy_cost(w: torch.Tensor) -> float | None:
    """galpy's actions, microseconds per star, or None where galpy is not installed."""
    try:
        from galpy.actionAngle import actionAngleStaeckel
        from galpy.potential import HernquistPotential, MiyamotoNagaiPotential, NFWPotential
    except ImportError:
        return None
    ro, vo = 8.0, 220.0
    unit = ro * vo**2 / G
    members = [
        MiyamotoNagaiPotential(amp=6e10 / unit, a=3.0 / ro, b=0.28 / ro),
        HernquistPotential(amp=2 * 1e10 / unit, a=0.5 / ro),
        NFWPotential(amp=8e11 / unit, a=16.0 / ro),
    ]
    finder = actionAngleStaeckel(pot=members, delta=DELTA / ro, c=True)
    few = w[:N_GALPY]
    R = few[:, :2].norm(dim=-1)
    v_R = (few[:, 0] * few[:, 3] + few[:, 1] * few[:, 4]) / R
    v_T = (few[:, 0] * few[:, 4] - few[:, 1] * few[:, 3]) / R
    arguments = [part.numpy() for part in (R / ro, v_R / vo, v_T / vo, few[:, 2] / ro, few[:, 5] / vo)]
    return seconds_per_star(lambda: finder(*arguments), N_GALPY, 3)


def measure(w: torch.Tensor) -> dict[str, object]:
    """Return errors and costs for stars ``w``."""
    finder, potential = StaeckelFudge(DELTA), milky_way()
    with torch.no_grad():
        few = w[:2000]
        exact = finder.actions_angles(potential, few).J
        error = (finder.actions(potential, few) - exact).abs().amax(-1) / exact.abs().sum(-1)
        scatter = finder.scatter(potential, w[:200])[:, [0, 2]]
        share = scatter / finder.actions(potential, w[:200]).abs().sum(-1, keepdim=True)
    masses = [torch.tensor(m, dtype=torch.float64, requires_grad=True) for m in (6e10, 1e10, 8e11)]

    def forward() -> None:
        with torch.no_grad():
            finder.actions(potential, w)

    def gradient() -> None:
        finder.actions(milky_way(*masses), w).sum().backward()

    return {
        "error_of_J_over_sum": {"median": float(error.median()), "0.99": float(error.quantile(0.99))},
        "scatter_over_sum": {
            "median": share.nanmedian(0).values.tolist(),
            "0.9": share.nanquantile(0.9, dim=0).tolist(),
        },
        "microseconds_per_star": {
            "forward": seconds_per_star(forward),
            "with_gradient": seconds_per_star(gradient),
            "galpy_c": galpy_cost(w),
        },
    }


def main() -> None:
    """Measure and write the JSON."""
    torch.set_num_threads(1)
    potential = milky_way()
    result = {
        "n_stars": N,
        "threads": 1,
        "delta": DELTA,
        "disc": measure(disc_stars(potential, N, 11)),
        "halo": measure(bound_stars(potential, N, 12, (3.0, 30.0))),
    }
    print(json.dumps(result, indent=1))
    (Path(__file__).parent / "results" / "staeckel.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
