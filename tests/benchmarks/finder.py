"""Accuracy and cost of the spherical action finder on one core, beside galpy and the closed form.

    python tests/benchmarks/finder.py

N = 1e5 bound stars of the isochrone M = 1e11 Msun, b = 3 kpc (mock, seed 11). Costs are medians of seven
runs after a warm-up, per star; tables are built anew in every run, as a fit does. galpy's numerical
spherical actions (actionAngleSpherical, C off) are timed on 200 of the same stars in the same run.
Writes results/finder.json beside this file.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from bayespot.actions import IsochroneActions, SphericalActions
from bayespot.mock import mock
from bayespot.potential import Isochrone

N = 100_000


def seconds_per_star(call: Callable[[], object], n: int = N) -> float:
    """Median of seven timed runs, in microseconds per star."""
    call()
    times = []
    for _ in range(7):
        begun = time.perf_counter()
        call()
        times.append(time.perf_counter() - begun)
    return 1e6 * statistics.median(times) / n


def galpy_cost(w: torch.Tensor) -> float | None:
    """galpy's numerical spherical actions, microseconds per star, or None where galpy is not installed."""
    try:
        from galpy.actionAngle import actionAngleSpherical
        from galpy.potential import IsochronePotential
    except ImportError:
        return None
    finder = actionAngleSpherical(pot=IsochronePotential(amp=1.0, b=1.0))
    few = w[:200].numpy() / [3.0, 3.0, 3.0, 400.0, 400.0, 400.0]
    R = (few[:, 0] ** 2 + few[:, 1] ** 2) ** 0.5
    vR = (few[:, 0] * few[:, 3] + few[:, 1] * few[:, 4]) / R
    vT = (few[:, 0] * few[:, 4] - few[:, 1] * few[:, 3]) / R
    begun = time.perf_counter()
    finder(R, vR, vT, few[:, 2], few[:, 5])
    return 1e6 * (time.perf_counter() - begun) / len(few)


def main() -> None:
    """Measure and write the JSON."""
    torch.set_num_threads(1)
    potential = Isochrone(1e11, 3.0)
    w = mock(potential, n_stars=N, seed=11).w
    general, closed = SphericalActions(), IsochroneActions()
    with torch.no_grad():
        exact, fast = closed.actions_angles(potential, w).J, general.actions(potential, w)
        error = (fast - exact)[:, 0].abs() / exact[:, 0]
        few = w[:5000]
        J, theta, _ = general.actions_angles(potential, few)
        back = general.phase_space(potential, J, theta) - few
        closed_back = closed.phase_space(potential, *closed.actions_angles(potential, few)[:2]) - few

    def relative(difference: torch.Tensor) -> float:
        x, v = (p.norm(dim=-1) for p in (few[:, :3], few[:, 3:]))
        return float(torch.maximum(difference[:, :3].norm(dim=-1) / x, difference[:, 3:].norm(dim=-1) / v).max())

    free = Isochrone(*(torch.nn.Parameter(torch.tensor(p, dtype=torch.float64)) for p in (1e11, 3.0)))

    def forward() -> None:
        with torch.no_grad():
            general.actions(potential, w)

    def gradient() -> None:
        general.actions(free, w)[:, 0].sum().backward()

    result = {
        "n_stars": N,
        "threads": 1,
        "J_r_relative_error": {
            "median": float(error.median()),
            "0.999": float(error.quantile(0.999)),
            "worst": float(error.max()),
        },
        "round_trip_worst": relative(back),
        "closed_form_round_trip_worst": relative(closed_back),
        "microseconds_per_star": {
            "forward": seconds_per_star(forward),
            "with_gradient": seconds_per_star(gradient),
            "galpy_spherical": galpy_cost(w),
        },
    }
    print(json.dumps(result, indent=1))
    (Path(__file__).parent / "results" / "finder.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
