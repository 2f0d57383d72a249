"""How often the phase-mixing warning is false, and how long after a perturbation it fires: the README's figures.

    python tests/benchmarks/phase_mixing.py --seeds 901-1060 [--keep]

Equilibrium: N = 2000 stars of the isochrone (M = 1e11 Msun, b = 3 kpc), fitted by the parametric model, one fit per
seed; then the systems FREE_FORM, fitted by the free-form network of 8 features, for the first five seeds.
Power: isochrone mocks of the first three seeds, perturbed as in PERTURBATIONS, followed by orbits in the fixed true
potential for TIMES and fitted again by the parametric model (the first seed by the free form too). One dynamical time
is the radial period of the median star. All fits: three components of f(J), guide "laplace"; the p-value is
`Diagnostics.angle_p_value`. The truth enters only as the potential that the perturbed stars move in.
Writes results/phase-mixing.json, a row after each fit, and .png beside this file; --keep takes fits of an earlier run
from there.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bayespot.models import isochrone
from torch import Tensor

from bayespot import Catalog, FitConfig, Isochrone, MassSlopeNetwork, SnapshotModel, SphericalMixture, fit
from bayespot.actions import IsochroneActions, integrate
from bayespot.inference import ALARM
from bayespot.mock import mock

N = 2000
TRUTH = Isochrone(1e11, 3.0)
FREE_FORM = ("hernquist", "jaffe", "plummer-in-core", "dwarf-in-nfw", "hernquist-in-nfw-radial", "hernquist-in-galaxy")
TIMES = (0.0, 0.25, 0.5, 1.0, 2.0, 3.0, 5.0, 10.0, 50.0)
#: Steps per dynamical time; the shortest radial period is a quarter of it.
STEPS = 80
RESULTS = Path(__file__).parent / "results"


def slowed(w: Tensor) -> Tensor:
    """Velocities of the stars at z > 0 times 0.7."""
    w = w.clone()
    w[w[:, 2] > 0, 3:] *= 0.7
    return w


def kicked(w: Tensor) -> Tensor:
    """Every star kicked outwards by 0.3 of its speed over root three; those that escape are left out."""
    w, x = w.clone(), w[:, :3]
    speed = torch.linalg.vector_norm(w[:, 3:], dim=-1, keepdim=True)
    w[:, 3:] += 0.3 / math.sqrt(3) * speed * x / torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return w[IsochroneActions().capped_actions(TRUTH, w).excess <= 0]


PERTURBATIONS: dict[str, Callable[[Tensor], Tensor]] = {"slowed at z > 0": slowed, "kicked outwards": kicked}


def parametric(catalog: Catalog) -> SnapshotModel:
    """The built-in isochrone model, with its actions in closed form."""
    model = isochrone.build(catalog)
    return SnapshotModel(model.potential, model.df, finder=IsochroneActions())


def free_form(catalog: Catalog) -> SnapshotModel:
    """The free-form sphere."""
    return SnapshotModel(MassSlopeNetwork.for_stars(catalog.w, n_features=8), SphericalMixture())


MODELS: dict[str, Callable[[Catalog], SnapshotModel]] = {"parametric": parametric, "free form": free_form}


def measured(
    case: dict[str, Any], model: str, catalog: Catalog, seed: int, kept: list[dict[str, Any]]
) -> dict[str, Any]:
    """Fit and return what the phase-mixing test says, or the row that is there already."""
    case = case | {"model": model, "seed": seed}
    for row in kept:
        if case.items() <= row.items():
            return row
    begun = time.perf_counter()
    config = FitConfig(seed=seed, n_components=3, guide="laplace", n_draws=60, k_hat_draws=25)
    found = fit(MODELS[model](catalog), catalog, config).diagnostics
    return case | {
        "n_stars": len(catalog),
        "p_value": found.angle_p_value,
        "warned": any(warning.startswith("angles are not uniform") for warning in found.warnings),
        "seconds": time.perf_counter() - begun,
    }


def equilibrium(seeds: list[int], kept: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Fits of phase-mixed systems."""
    for seed in seeds:
        yield measured({"system": "isochrone"}, "parametric", mock("isochrone", n_stars=N, seed=seed), seed, kept)
    for name in FREE_FORM:
        for seed in seeds[:5]:
            yield measured({"system": name}, "free form", mock(name, n_stars=N, seed=seed), seed, kept)


def dynamical_time() -> float:
    """Radial period of the median star, in kpc/(km/s)."""
    w = mock("isochrone", n_stars=20_000, seed=900).w
    return 2 * math.pi / float(IsochroneActions().actions_angles(TRUTH, w).Omega[:, 0].median())


@torch.no_grad()
def snapshots(w: Tensor, unit: float) -> Iterator[tuple[float, Catalog]]:
    """Follow the stars through TIMES."""
    now = 0.0
    for t in TIMES:
        if t > now:
            w = integrate(TRUTH, w, ((t - now) * unit, 1), "yoshida4", n_substeps=math.ceil((t - now) * STEPS))[-1]
            now = t
        yield t, Catalog(w)


def power(seeds: list[int], unit: float, kept: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Fits of perturbed systems at times since the perturbation."""
    for seed in seeds[:3]:
        for name, perturbed in PERTURBATIONS.items():
            for t, catalog in snapshots(perturbed(mock("isochrone", n_stars=N, seed=seed).w), unit):
                for model in MODELS if seed == seeds[0] else ("parametric",):
                    yield measured({"perturbation": name, "time": t}, model, catalog, seed, kept)


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Rates of small p-values among equilibrium fits, by model."""
    from scipy.stats import beta

    found = {}
    for model in MODELS:
        p = np.array([row["p_value"] for row in rows if row["model"] == model])
        if len(p):
            alarms = int((p < ALARM).sum())
            found[model] = {
                "fits": len(p),
                "alarms": alarms,
                "alarm_rate_upper_95": float(beta.ppf(0.95, alarms + 1, len(p) - alarms)) if alarms < len(p) else 1.0,
                "below_0.01": int((p < 0.01).sum()),
                "below_0.05": int((p < 0.05).sum()),
                "mean_p": float(p.mean()),
                "least_p": float(p.min()),
            }
    return found


def draw(calm: list[dict[str, Any]], shaken: list[dict[str, Any]], path: Path) -> None:
    """Distribution of equilibrium p-values, and p against time since the perturbation."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.5), constrained_layout=True)
    floor = 1e-20
    for model, color, style in (("parametric", "#0072B2", "-"), ("free form", "#D55E00", "--")):
        p = np.sort([row["p_value"] for row in calm if row["model"] == model])
        if len(p):
            steps = np.arange(len(p) + 1) / len(p)
            left.stairs(
                steps, [0, *p, 1], baseline=None, color=color, ls=style, lw=1.6, label=f"{model}, {len(p)} fits"
            )
    left.plot([0, 1], [0, 1], color="black", ls=":", lw=1, label="uniform")
    left.set(xlim=(0, 1), ylim=(0, 1), xlabel="p-value of the angles", ylabel="fraction of equilibrium fits below")
    left.legend(frameon=False, loc="upper left", fontsize=9)
    styles = {("slowed at z > 0", "parametric"): ("#0072B2", "o"), ("kicked outwards", "parametric"): ("#E69F00", "s")}
    styles |= {("slowed at z > 0", "free form"): ("#56B4E9", "^"), ("kicked outwards", "free form"): ("#D55E00", "D")}
    for k, ((name, model), (color, marker)) in enumerate(styles.items()):
        at = [(row["time"], row["p_value"]) for row in shaken if (row["perturbation"], row["model"]) == (name, model)]
        if at:
            times, p = np.array(at).T
            place = np.array([TIMES.index(t) for t in times]) + 0.1 * (k - 1.5)
            right.plot(place, p.clip(floor), marker, color=color, ms=4.5, label=f"{name}, {model}", mec="none")
    right.axhline(ALARM, color="black", ls="--", lw=1)
    right.text(len(TIMES) - 0.6, ALARM * 0.6, "warning below", ha="right", va="top", fontsize=9)
    right.set_xticks(range(len(TIMES)), [f"{t:g}" for t in TIMES])
    right.set(yscale="log", ylim=(floor / 3, 3), xlabel="time since the perturbation [dynamical times]")
    right.set_ylabel(r"p-value of the angles (least shown $10^{-20}$)")
    right.legend(frameon=False, loc="lower right", fontsize=8)
    figure.savefig(path, dpi=200)
    plt.close(figure)


def main() -> None:
    """Run all fits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="901-1060", help="FIRST-LAST")
    parser.add_argument("--keep", action="store_true", help="Keep fits of an earlier run.")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    first, last = map(int, arguments.seeds.split("-"))
    seeds = list(range(first, last + 1))
    unit = dynamical_time()
    old = json.loads((RESULTS / "phase-mixing.json").read_text()) if arguments.keep else {}
    calm: list[dict[str, Any]] = []
    shaken: list[dict[str, Any]] = []
    machine = {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    RESULTS.mkdir(exist_ok=True)
    sources = (
        (calm, equilibrium(seeds, old.get("equilibrium", []))),
        (shaken, power(seeds, unit, old.get("perturbed", []))),
    )
    for rows, source in sources:
        for row in source:
            rows.append(row)
            print(json.dumps(row), flush=True)
            document = {
                "dynamical_time_kpc_per_kms": unit,
                "alarm": ALARM,
                "machine": machine,
                "summary": summary(calm),
                "equilibrium": calm,
                "perturbed": shaken,
            }
            (RESULTS / "phase-mixing.json").write_text(json.dumps(document, indent=1) + "\n")
    draw(calm, shaken, RESULTS / "phase-mixing.png")


if __name__ == "__main__":
    main()
