"""`bayespot demo`: a simulated sphere and the Milky Way's globular clusters."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from bayespot.cli.fitting import fit_to_folder
from bayespot.cli.formulas import print_formulas
from bayespot.cli.tables import OUTPUT, interval, print_table

if TYPE_CHECKING:
    from bayespot.catalog.catalog import Catalog
    from bayespot.distill.result import Distillation
    from bayespot.inference.result import FitResult
    from bayespot.posterior.posterior import Posterior, PotentialDraws

#: Fewer than a fit's default for the sphere: the guide begins at the Laplace approximation, and k-hat tells how close
#: it came. The clusters, with errors, need the default.
SVI_STEPS = 100
#: Elsewhere than on a terminal a line per stage.
PROGRESS: Literal["lines"] = "lines"


def demo(
    output: Annotated[Path, OUTPUT] = Path("bayespot-demo"),
    seed: Annotated[int, typer.Option(min=0, help="Random seed.")] = 1,
    overwrite: Annotated[bool, typer.Option(help="Replace an earlier demo.")] = False,
) -> None:
    """Fit a simulated isochrone sphere, whose truth is known, and the Milky Way's globular clusters; find a formula.

    Example: `bayespot demo`
    """
    import multiprocessing
    import pickle
    from concurrent.futures import Future, ProcessPoolExecutor

    import torch

    from bayespot.inference.result import FitConfig
    from bayespot.mock.sample import mock
    from bayespot.posterior.posterior import Posterior
    from bayespot.progress import Progress
    from bayespot.report.output import check_free
    from bayespot.report.runs import load_run

    started = time.perf_counter()
    sphere, galaxy, formulas = output / "isochrone", output / "milky_way", output / "formulas"
    for folder in (sphere, galaxy):
        check_free(folder, overwrite, False, look=True)
    if formulas.exists() and not overwrite:
        raise ValueError(f"{formulas} exists; choose another folder or pass --overwrite")
    typer.echo("1. An isochrone sphere, 1e11 Msun, b = 3 kpc: 5000 stars, free-form potential; then its formula")
    typer.echo("2. The Milky Way from 161 globular clusters (Vasiliev & Baumgardt 2021), as a sphere, at the same time")
    torch.set_num_threads(max(1, torch.get_num_threads() // 2))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            clusters = pool.submit(_fit_galaxy, galaxy, seed, overwrite)
            stars = mock("isochrone", n_stars=5000, seed=seed)
            settings = FitConfig(seed=seed, svi_steps=SVI_STEPS)
            searched: list[Future[Distillation]] = []

            def fitted(result: FitResult) -> None:
                """Search for formulas while tables and figures are written."""
                # as bytes: torch would move the tensors to shared memory, under the feet of arrays that view them
                task = pickle.dumps((Posterior.from_result(result), stars))
                searched.append(pool.submit(_distil, task, formulas, seed, overwrite))

            posterior = fit_to_folder(
                "spherical", stars, settings, sphere, overwrite=overwrite, fitted=fitted, progress=PROGRESS
            )
            _print_truth(posterior)
            clusters.result()
            _print_milky_way(load_run(galaxy)[0])
            with Progress(PROGRESS) as bar:
                bar.stage("searching a formula and weighing it by the stars")
                found = searched[0].result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    _print_formula(found, posterior)
    typer.echo(f"\nFigures: {sphere}/figures, {galaxy}/figures; {time.perf_counter() - started:.0f} s in all")


def _fit_galaxy(folder: Path, seed: int, overwrite: bool) -> None:
    """Fit the globular clusters in a process of its own, without a line of progress beside the other's."""
    from bayespot.catalog.catalog import Catalog
    from bayespot.inference.result import FitConfig

    clusters, settings = Catalog.example("globular_clusters"), FitConfig(seed=seed)
    fit_to_folder("milky_way_globular_clusters", clusters, settings, folder, overwrite=overwrite, progress=False)


def _distil(task: bytes, folder: Path, seed: int, overwrite: bool) -> Distillation:
    """Search once, in a process of its own; the true formula is -G M/(b + sqrt(b^2 + r^2))."""
    import pickle
    from concurrent.futures import ThreadPoolExecutor

    from bayespot.distill.distill import distill
    from bayespot.distill.grammar import DistillConfig

    posterior: Posterior
    stars: Catalog
    posterior, stars = pickle.loads(task)
    config = DistillConfig(
        seed=seed, budget_minutes=None, budget_epochs=8, searches=1, families=("kepler",), max_length=10,
        max_candidates=3, max_ranked=2, max_stars=2000,
    )  # fmt: skip
    with ThreadPoolExecutor(1) as here:
        return distill(posterior, config, here, folder, progress=False, catalog=stars, overwrite=overwrite)


def _print_formula(found: Distillation, posterior: PotentialDraws) -> None:
    from bayespot.mock.sample import truth_potential

    print_formulas(found, 3)
    truth: Any = truth_potential(posterior.meta["meta"])
    typer.echo(
        f"truth: -G*M/(b + sqrt(b**2 + r**2)), M = {float(truth.m_tot):.3g} Msun, b = {float(truth.r_s):.3g} kpc"
    )


def _print_truth(posterior: PotentialDraws) -> None:
    import numpy as np

    from bayespot.mock.sample import truth_potential
    from bayespot.potential.fields import truth_field

    truth = truth_potential(posterior.meta["meta"])
    assert truth is not None  # the demo simulated it
    r = np.array([0.6, 1.5, 3.0, 6.0, 15.0, 60.0])
    few = posterior.thinned(300)
    found = few.radial_fields(r, ("potential", "circular_speed", "enclosed_mass"))
    rows = []
    for i, radius in enumerate(r):
        row = [f"{radius:.3g}"]
        for name, field in found.items():
            true = truth_field(truth, name, r)
            error, sd = 100 * (field.mean / true - 1), 100 * field.sd / np.abs(true)
            row.append(f"{error[i]:+.2f} +- {sd[i]:.2f} %")
        rows.append(row)
    print_table("Error against the truth +- posterior sd", ["r [kpc]", "potential", "v_c", "M(<r)"], rows)


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
