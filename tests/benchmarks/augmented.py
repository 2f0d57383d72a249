"""The literal likelihood of the chain beside the closed form: convergence, and the demonstration on the isochrone.

    python tests/benchmarks/augmented.py convergence
    python tests/benchmarks/augmented.py demonstration --n-stars 5000 --seeds 651-651

Isochrone, M = 1e11 Msun, b = 3 kpc. ``convergence``: for 2000 stars (mock seed 3) and the f(J) fitted to them, mean
and sd of ln p minus the closed form's, and the move of (ln M, ln b) that the difference of the gradients stands for, in
posterior sd at N = 2000, against the number of augmented stars (several seeds each), for mixtures and kernels.
``demonstration``: the neural potential (free form, 8 features) trained by SVI with either likelihood on the same stars;
mean relative error of Phi over 100 radii in 0.1 <= r/b <= 50 with Phi(infinity) = 0, and posterior sd, against the
number of augmented stars. Writes results/augmented-<case>.json and .png beside this file. The truth enters after fits.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bayespot import FitConfig, Isochrone, MassSlopeNetwork, Posterior, SnapshotModel, SphericalMixture, fit
from bayespot.actions import IsochroneActions
from bayespot.likelihood import Chain, Smoothing
from bayespot.mock import mock
from bayespot.potential import truth_field
from bayespot.pyro_modules import freeze
from bayespot.report.plots import BLUE, GREEN, GREY, ORANGE, VERMILION

M, B = 1e11, 3.0
TRUTH = Isochrone(M, B)
#: Augmented stars of the demonstration; 0 is the closed form.
SIZES = (0, 2048, 8192, 32768)
# Cramer-Rao floors of ln M and ln b times sqrt(N), f(J) free, and their correlation
FLOOR = torch.tensor([0.92, 1.38], dtype=torch.float64)
COVARIANCE = FLOOR[:, None] * FLOOR * torch.tensor([[1, 0.76], [0.76, 1]], dtype=torch.float64)
KINDS: dict[str, tuple[dict[str, Any], list[int], str]] = {
    "mixture, 6 components": ({"n_components": 6}, [512, 2048, 8192, 32768, 131072], ORANGE),
    "mixture, 12 components": ({}, [512, 2048, 8192, 32768, 131072], BLUE),
    "the same, 400 EM steps": ({"n_steps": 400}, [32768, 131072], GREY),
    "kernel, corrected": ({"kind": "kernel"}, [512, 2048, 8192], GREEN),
    "kernel, plain": ({"kind": "kernel", "n_components": 0}, [512, 2048, 8192], VERMILION),
}


def convergence(n_seeds: int) -> list[dict[str, Any]]:
    """Value and gradient of the literal likelihood against the closed form."""
    stars = mock("isochrone", n_stars=2000, seed=3).w
    J = IsochroneActions().actions(TRUTH, stars)
    df = SphericalMixture(2).resolved(2, J)
    values = df.fit_actions(J, seed=0)
    start = torch.cat([torch.tensor([math.log(M), math.log(B)], dtype=torch.float64), *values.values()])

    def chain(u: torch.Tensor) -> Chain:
        potential = freeze(TRUTH, {"m_tot": u[0].exp(), "r_s": u[1].exp()})
        return Chain(potential, freeze(df, dict(zip(values, u[2:].split(2), strict=True))), IsochroneActions())

    u = start.clone().requires_grad_()
    exact = chain(u).log_density(stars)
    (slope,) = torch.autograd.grad(exact.sum(), u)
    rows = []
    for name, (settings, sizes, _) in KINDS.items():
        for n in sizes:
            found: dict[str, Any] = {"kind": name, "n_augmented": n, "mean": [], "sd": [], "moved": [], "shift": []}
            begun = time.perf_counter()
            for seed in range(n_seeds):
                density = Smoothing(n_augmented=n, seed=seed, **settings).density(chain(u))
                ours = density.log_prob(stars)
                (own,) = torch.autograd.grad(ours.sum(), u)
                delta = (own - slope)[:2]
                shift = COVARIANCE @ delta / len(stars)
                difference = (ours - exact).detach()
                found["mean"].append(float(difference.mean()))
                found["sd"].append(float(difference.std()))
                found["shift"].append([100 * float(x) for x in shift])
                found["moved"].append(float((delta @ shift).sqrt()))
            found["seconds"] = (time.perf_counter() - begun) / len(found["sd"])
            if hasattr(density, "_sd"):
                found["kernel_widths"] = [float(x) for x in density._sd.detach()]
            rows.append(found)
            print(json.dumps(found), flush=True)
    return rows


def demonstration(n: int, seed: int) -> list[dict[str, Any]]:
    """One mock, both likelihoods."""
    catalog = mock("isochrone", n_stars=n, seed=seed)
    r = np.geomspace(0.1 * B, 50 * B, 100)
    truth = truth_field(TRUTH, "potential", r)
    rows = []
    for n_augmented in SIZES:
        likelihood: Any = Smoothing(n_augmented=n_augmented) if n_augmented else "jeans"
        potential = MassSlopeNetwork.for_stars(catalog.w, n_features=8)
        model = SnapshotModel(potential, SphericalMixture(), likelihood=likelihood)
        begun = time.perf_counter()
        result = fit(model, catalog, FitConfig(seed=seed, n_components=2, svi_steps=100, k_hat_draws=25))
        field = Posterior.from_result(result).field("potential", r)
        row = {
            "seed": seed,
            "n_augmented": n_augmented,
            "seconds": time.perf_counter() - begun,
            "mean_error_percent": 100 * float(np.abs(field.mean / truth - 1).mean()),
            "mean_sd_percent": 100 * float((field.sd / np.abs(truth)).mean()),
            "bias_percent": list(100 * (field.mean / truth - 1)),
            "sd_percent": list(100 * field.sd / np.abs(truth)),
            "warnings": result.diagnostics.warnings,
        }
        rows.append(row)
        print(json.dumps({k: v for k, v in row.items() if not isinstance(v, list)}), flush=True)
    return rows


def draw_convergence(rows: list[dict[str, Any]], path: Path) -> None:
    """Scatter of ln p and move of the potential against the number of augmented stars."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(7.1, 3.2), constrained_layout=True)
    labels = {"sd": r"sd of $\ln p - \ln p_{\rm closed}$", "moved": "shift of the potential [sd, N = 2000]"}
    for ax, (key, label) in zip(axes, labels.items(), strict=True):
        for name, (_, _, color) in KINDS.items():
            own = [row for row in rows if row["kind"] == name]
            n = [row["n_augmented"] for row in own]
            rms = [float(np.sqrt(np.mean(np.square(row[key])))) for row in own]
            ax.loglog(n, rms, "o-", color=color, ms=4, lw=1.2, label=name)
            for row in own:
                ax.loglog([row["n_augmented"]] * len(row[key]), row[key], ".", color=color, ms=2.5, alpha=0.6)
        ax.set(xlabel="augmented stars", ylabel=label)
    axes[1].axhline(1, color="k", ls="--", lw=0.8)
    axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=200)
    plt.close(figure)


def draw_demonstration(rows: list[dict[str, Any]], path: Path) -> None:
    """Error of Phi against radius per number of augmented stars, with the posterior's 68 % band."""
    import matplotlib.pyplot as plt

    seeds = sorted({row["seed"] for row in rows})
    figure, axes = plt.subplots(1, len(seeds), figsize=(3.6 * len(seeds), 3.2), constrained_layout=True, squeeze=False)
    colors = dict(zip(SIZES, ("black", VERMILION, BLUE, GREEN), strict=True))
    r = np.geomspace(0.1 * B, 50 * B, 100)
    for ax, seed in zip(axes[0], seeds, strict=True):
        for row in (row for row in rows if row["seed"] == seed):
            bias, sd = np.array(row["bias_percent"]), np.array(row["sd_percent"])
            n = row["n_augmented"]
            ax.plot(r, bias, color=colors[n], lw=1.3, label=f"{n} augmented" if n else "closed form")
            if n in (0, SIZES[-1]):
                ax.fill_between(r, bias - sd, bias + sd, color=colors[n], alpha=0.15, lw=0)
        ax.axhline(0, color="k", ls="--", lw=0.8)
        ax.set(xscale="log", xlabel="r [kpc]", title=f"seed {seed}")
    axes[0][0].set_ylabel(r"error of $\Phi$ [%]")
    axes[0][0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=200)
    plt.close(figure)


def main() -> None:
    """Run one case and write its JSON and figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=["convergence", "demonstration"])
    parser.add_argument("--n-stars", type=int, default=5000)
    parser.add_argument("--seeds", default="651-651", help="FIRST-LAST (demonstration)")
    arguments = parser.parse_args()
    path = Path(__file__).parent / "results" / f"augmented-{arguments.case}.json"
    machine = {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    rows: list[dict[str, Any]] = []

    def write() -> None:
        path.write_text(json.dumps({"machine": machine, "n_stars": arguments.n_stars, "rows": rows}, indent=1) + "\n")

    if arguments.case == "convergence":
        arguments.n_stars = 2000
        rows = convergence(2)
        write()
        draw_convergence(rows, path.with_suffix(".png"))
        return
    first, last = map(int, arguments.seeds.split("-"))
    for seed in range(first, last + 1):
        rows += demonstration(arguments.n_stars, seed)
        write()
        draw_demonstration(rows, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
