"""What selection and measurement errors do to a fit, with and without being modelled: the README's figures.

    python tests/benchmarks/survey.py selection --n-stars 87500 --seeds 605-608
    python tests/benchmarks/survey.py errors --n-stars 5000 --seeds 703-705

``selection`` keeps the stars within 10 kpc of (8.2, 0, 0.02) kpc. ``errors`` adds 10 % in distance, 0.05 mas/yr
and 2 km/s to Plummer tracers. Isochrone, M = 1e11 Msun, b = 3 kpc, free-form network of 8 features; f(J) a logistic
Gaussian process.
Each fit is reported as bias and posterior sd in percent and z at RADII, Phi with Phi(infinity) = 0.
Writes results/<case>-<n>.json and .png beside this file, a row after each fit. The truth enters only after the fit.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bayespot import Catalog, FitConfig, LogisticGaussianProcess, MassSlopeNetwork, Posterior, SnapshotModel, fit
from bayespot.likelihood import HeliocentricDistance, MeasurementErrors
from bayespot.mock import mock, observe, truth_potential
from bayespot.potential import Plummer, truth_field

RADII = np.array([0.5, 1.0, 2.0, 4.0, 6.0, 8.0, 10.0, 12.0, 15.0, 20.0])
FIELDS = ("potential", "enclosed_mass", "circular_speed")
SUN = (8.2, 0.0, 0.02)
#: Largest error (%) in the figure: without the correction the potential is almost unbounded.
TOP = 600.0


def measured(model: SnapshotModel, catalog: Catalog, config: FitConfig) -> tuple[dict[str, Any], Posterior]:
    """Fit and compare with the truth at RADII."""
    begun = time.perf_counter()
    result = fit(model, catalog, config)
    row: dict[str, Any] = {"seconds": time.perf_counter() - begun, "n_kept": len(catalog)}
    found = result.diagnostics
    for name in (
        "k_hat",
        "weight_fraction",
        "selected_fraction",
        "selection_points",
        "selection_error",
        "error_samples",
    ):
        row[name] = getattr(found, name)
    row["warnings"] = found.warnings
    posterior = Posterior.from_result(result).thinned(500)
    truth = truth_potential(catalog)
    assert truth is not None  # mocks know theirs
    for name in FIELDS:
        field, true = posterior.field(name, RADII), truth_field(truth, name, RADII)
        row[f"{name}_bias_percent"] = list(100 * (field.mean / true - 1))
        row[f"{name}_sd_percent"] = list(100 * field.sd / np.abs(true))
        row[f"{name}_z"] = list((field.mean - true) / field.sd)
    return row, posterior


def selection(n: int, seed: int) -> dict[str, Any]:
    """With and without the correction, and how far twice as many points move the result."""
    whole = mock("isochrone", n_stars=n, seed=seed)
    cut = HeliocentricDistance(10.0, observer=SUN)
    catalog = whole[cut(whole.w) > 0]
    potential = MassSlopeNetwork.for_stars(catalog.w, n_features=8)
    config = FitConfig(seed=seed)
    corrected, posterior = measured(SnapshotModel(potential, LogisticGaussianProcess(), selection=cut), catalog, config)
    without, _ = measured(SnapshotModel(potential, LogisticGaussianProcess()), catalog, config)
    points = 2 * corrected["selection_points"]
    twice = FitConfig(seed=seed, selection_points=points, selection_tolerance=float("inf"))
    doubled, again = measured(SnapshotModel(potential, LogisticGaussianProcess(), selection=cut), catalog, twice)
    for name in FIELDS:
        one, two = posterior.field(name, RADII), again.field(name, RADII)
        doubled[f"{name}_shift_in_sd"] = list((two.mean - one.mean) / one.sd)
    return {"corrected": corrected, "without": without, "doubled": doubled}


def errors(n: int, seed: int) -> dict[str, Any]:
    """With and without deconvolution: Plummer tracers of scale 4 kpc, all stars observed."""
    true = mock("isochrone", tracers=Plummer(1.0, 4.0), n_stars=n, seed=seed)
    catalog = observe(true, seed + 1, distance_error=0.1, pm_error=0.05, v_error=2.0)
    rows = {}
    for name, model_errors in (("deconvolved", MeasurementErrors(n_samples=64)), ("without", None)):
        potential = MassSlopeNetwork.for_stars(catalog.w, n_features=8)
        model = SnapshotModel(potential, LogisticGaussianProcess(), errors=model_errors)
        rows[name], _ = measured(model, catalog, FitConfig(seed=seed))
    return rows


def draw(case: str, rows: list[dict[str, Any]], path: Path) -> None:
    """Bias of the enclosed mass with 68 % bands, modelled and not."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(7.1, 3.0), constrained_layout=True)
    styles = {"corrected": "#0072B2", "deconvolved": "#0072B2", "without": "#D55E00"}
    for ax, name, label in zip(axes, ("enclosed_mass", "potential"), (r"$M(<r)$", r"$\Phi$"), strict=True):
        for kind in rows[0]:
            if kind not in styles:
                continue
            for i, row in enumerate(rows):
                bias, sd = (np.array(row[kind][f"{name}_{what}_percent"]) for what in ("bias", "sd"))
                shown = {"corrected": "modelled", "deconvolved": "modelled"}.get(kind, "ignored")
                if (bias > TOP).all():
                    # a band as wide as the scale would hide the rest
                    ax.text(
                        0.5, 0.93, "ignored: off the scale", color=styles[kind], ha="center", transform=ax.transAxes
                    )
                    break
                ax.plot(RADII, bias, color=styles[kind], label=shown if i == 0 else None)
                ax.fill_between(RADII, bias - sd, bias + sd, color=styles[kind], alpha=0.25, lw=0)
        ax.axhline(0, color="k", ls="--", lw=0.8)
        ax.set(xscale="log", yscale="symlog", xlabel="r [kpc]", ylabel=f"error of {label} [%]")
        ax.set_yscale("symlog", linthresh=10)
        ax.set_ylim(-60, TOP)
    axes[0].legend(title=case, frameon=False)
    figure.savefig(path, dpi=200)
    plt.close(figure)


def main() -> None:
    """Run one case over its seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=["selection", "errors"])
    parser.add_argument("--n-stars", type=int, required=True)
    parser.add_argument("--seeds", required=True, help="FIRST-LAST")
    arguments = parser.parse_args()
    first, last = map(int, arguments.seeds.split("-"))
    case = {"selection": selection, "errors": errors}[arguments.case]
    path = Path(__file__).parent / "results" / f"{arguments.case}-{arguments.n_stars}.json"
    rows = []
    for seed in range(first, last + 1):
        rows.append({"seed": seed} | case(arguments.n_stars, seed))
        print(json.dumps(rows[-1]), flush=True)
        machine = {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
        document = {"n_stars": arguments.n_stars, "radii": list(RADII), "machine": machine, "rows": rows}
        path.write_text(json.dumps(document, indent=1) + "\n")
        draw(arguments.case, rows, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
