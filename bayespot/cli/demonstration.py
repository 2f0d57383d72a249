"""`bayespot demo`: a simulated sphere and the Milky Way's globular clusters."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bayespot.cli.fitting import fit_to_folder
from bayespot.cli.formulas import print_formulas
from bayespot.cli.tables import OUTPUT, interval, print_table

if TYPE_CHECKING:
    from bayespot.posterior.posterior import PotentialDraws


def demo(
    output: Annotated[Path, OUTPUT] = Path("bayespot-demo"),
    seed: Annotated[int, typer.Option(help="Random seed.")] = 1,
    overwrite: Annotated[bool, typer.Option(help="Replace an earlier demo.")] = False,
) -> None:
    """Fit a simulated isochrone sphere, whose truth is known, and the Milky Way's globular clusters.

    Example: `bayespot demo`
    """
    from bayespot.catalog.catalog import Catalog
    from bayespot.inference.result import FitConfig
    from bayespot.mock.sample import mock
    from bayespot.report.output import check_free

    started = time.perf_counter()
    folders = [output / "isochrone", output / "milky_way"]
    for folder in folders:
        check_free(folder, overwrite, False, look=True)
    typer.echo("1. An isochrone sphere, 1e11 Msun, b = 3 kpc: 5000 stars, free-form potential")
    posterior = fit_to_folder(
        "spherical", mock("isochrone", n_stars=5000, seed=seed), FitConfig(seed=seed), folders[0], overwrite=overwrite
    )
    _print_truth(posterior)
    _demo_formulas(posterior, folders[0] / "distillation", seed)
    typer.echo("\n2. The Milky Way from 161 globular clusters (Vasiliev & Baumgardt 2021), as a sphere")
    posterior = fit_to_folder(
        "milky_way_globular_clusters",
        Catalog.example("globular_clusters"),
        FitConfig(seed=seed),
        folders[1],
        overwrite=overwrite,
    )
    _print_milky_way(posterior)
    typer.echo(f"\nFigures: {folders[0]}/figures, {folders[1]}/figures; {time.perf_counter() - started:.0f} s in all")


def _print_truth(posterior: PotentialDraws) -> None:
    import numpy as np

    from bayespot.mock.sample import truth_potential
    from bayespot.potential.fields import truth_field

    truth = truth_potential(posterior.meta["meta"])
    assert truth is not None  # the demo simulated it
    r = np.array([0.6, 1.5, 3.0, 6.0, 15.0, 60.0])
    few = posterior.thinned(300)
    rows = []
    for i, radius in enumerate(r):
        row = [f"{radius:.3g}"]
        for name in ("potential", "circular_speed", "enclosed_mass"):
            field, true = few.field(name, r), truth_field(truth, name, r)
            error, sd = 100 * (field.mean / true - 1), 100 * field.sd / np.abs(true)
            row.append(f"{error[i]:+.2f} +- {sd[i]:.2f} %")
        rows.append(row)
    print_table("Error against the truth +- posterior sd", ["r [kpc]", "potential", "v_c", "M(<r)"], rows)


def _demo_formulas(posterior: PotentialDraws, folder: Path, seed: int) -> None:
    """Distil for half a minute if physo is there; the true formula is -G M/(b + sqrt(b^2 + r^2))."""
    from importlib.util import find_spec

    if find_spec("physo") is None:
        typer.echo("no formulas: physo is not installed (pip install 'bayespot[distill]')")
        return
    from bayespot.distill.distill import distill as run_distill
    from bayespot.distill.grammar import DistillConfig
    from bayespot.report.runs import load_run

    # the run keeps its stars, the posterior in memory does not
    stored, _, _ = load_run(folder.parent)
    config = DistillConfig(seed=seed, budget_minutes=0.5, families=("kepler",), max_ranked=3)
    print_formulas(run_distill(stored, config, folder=folder), 5)


def _print_milky_way(posterior: PotentialDraws) -> None:
    from bayespot.literature import MILKY_WAY

    few = posterior.thinned(500)
    rows = []
    wanted = [("circular_speed", 8.2), ("circular_speed", 20.0), ("enclosed_mass", 20.0), ("enclosed_mass", 50.0)]
    for name, r in wanted:
        scale, label = (
            (1e11, f"M(<{r:g} kpc) [1e11 Msun]") if name == "enclosed_mass" else (1, f"v_c({r:g} kpc) [km/s]")
        )
        q = few.field(name, [r]).quantile([0.16, 0.5, 0.84])[:, 0] / scale
        near = [m for m in MILKY_WAY if m.field == name and abs(m.r / r - 1) < 0.25]
        known = "; ".join(
            f"{m.value / scale:.4g}" + (f" +{m.plus / scale:.2g} -{m.minus / scale:.2g}" if m.plus else "")
            + f" at {m.r:g} ({m.source})"
            for m in near
        )  # fmt: skip
        rows.append([label, interval(q), known])
    print_table("Milky Way, median and 68 % interval", ["quantity", "this fit", "literature"], rows)
