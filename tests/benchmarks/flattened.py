"""Fits of stars in a flattened galaxy: how often the bands hold the truth, and what the fudge costs.

    python tests/benchmarks/flattened.py run --model disc_and_halo --stars halo --n-stars 2000 --seeds 101-115
    python tests/benchmarks/flattened.py run --model prior --stars disc --n-stars 2000 --seeds 5201-5230
    python tests/benchmarks/flattened.py summary

Stars of `bayespot.mock.galaxy_mock`, in the Milky Way of `MWPotential2014`. ``--model parametric`` has the true
family, with the masses of disc and halo and the halo's scale radius free: priors LogNormal about half the mass and
twice the radius, sd 1. ``--model prior`` draws the potential of every mock from the prior it is fitted with, that of
`bayespot.models.disc_and_halo` for one catalogue of `galaxy_mock` (`REFERENCE`), and its stars with the f(J) of
`galaxy_mock`'s; shapes have the prior `PRIOR_SHAPE_SD`, in which Staeckel's actions hold: bands hold the truth as often
as they say if and only if the posterior is right. The others are the built-in models, which know nothing of the mocks.
A row per fit, with the z-scores, widths and errors of fields and whether the 68 and 95 % bands hold the truth: v_c in
the plane at the radii that hold 5 to 95 % of the stars, K_z 1.1 kpc above them; for the free forms, over the
cylindrical radii that hold 1 to 99 % of the stars and the heights that hold none, half and nine tenths, a_R, a_z and
rho, and in the plane v_c and the flattening of Phi; the error of the acceleration at the stars; k-hat, the verdict's
reasons, the finder's bias, the seconds of mock and fit.
Rows that exist are kept: an interrupted run goes on. A mock of the prior that cannot be drawn or fitted leaves a row
with ``error``, which the summary counts.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bayespot.models import axisymmetric, disc_and_halo
from pyro.distributions import LogNormal

from bayespot import Catalog, FitConfig, Posterior, SnapshotModel, fit
from bayespot.actions import StaeckelFudge
from bayespot.df import ActionMixture, AxisymmetricMixture
from bayespot.mock import galaxy_mock, orbit_mock
from bayespot.mock.flattened import GALAXY_STARS
from bayespot.potential import (
    NFW,
    AxisymmetricNetwork,
    ExponentialDiscs,
    MiyamotoNagai,
    MWPotential2014,
    Potential,
    PowerLawCutoff,
)
from bayespot.pyro_modules import freeze

RESULTS = Path(__file__).parent / "results"
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
Z = 1.1
#: Quantiles of the cylindrical radii and heights of the grid over which bands of the built-in models are judged.
R_QUANTILES, Z_QUANTILES = (0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99), (0.5, 0.9)
#: Stars at which the acceleration is compared.
N_COMPARED = 1000
BUILT_IN = {"axisymmetric": axisymmetric, "disc_and_halo": disc_and_halo}
#: Number of stars and seed of the catalogue whose prior ``prior`` draws from.
REFERENCE = (2000, 7000)
#: Prior sd of the shape's weights in ``prior``. At 0.7, the built-in models', and at 0.3 flattened and elongated shells
#: follow one another in a draw (q of Phi 0.9 and 1.3, say), where no coordinates separate and J varies along orbits by
#: 5 to 20 %: fits of such mocks go astray, and say so.
PRIOR_SHAPE_SD = 0.1


def model() -> SnapshotModel:
    """The true family with three free parameters."""
    bulge, disc, halo = MWPotential2014().members

    def near(value: float) -> LogNormal:
        return LogNormal(torch.tensor(math.log(value), dtype=torch.float64), 1.0)

    free = PowerLawCutoff(float(bulge.m_tot), float(bulge.r_c), float(bulge.gamma))
    free = free + MiyamotoNagai(near(float(disc.m_tot) / 2), 3.0, 0.28)
    return SnapshotModel(free + NFW(near(float(halo.m_s) / 2), near(2 * float(halo.r_s))), ActionMixture())


def prior_mock(stars: str, n_stars: int, seed: int) -> tuple[Catalog, SnapshotModel, Potential]:
    """Return stars in a potential of the prior, the model with that prior, and the potential."""
    reference = galaxy_mock(stars, n_stars=REFERENCE[0], seed=REFERENCE[1])
    monopole = AxisymmetricNetwork.for_stars(reference.w).monopole
    free = AxisymmetricNetwork(monopole, shape_sd=PRIOR_SHAPE_SD) + ExponentialDiscs.for_stars(reference.w)
    of_stars = SnapshotModel(free, AxisymmetricMixture(), finder=StaeckelFudge())
    drawn = {name: value[0] for name, value in of_stars.sample_prior(1, seed).items()}
    prefix = "potential."
    truth = freeze(free, {name.removeprefix(prefix): v for name, v in drawn.items() if name.startswith(prefix)})
    population = GALAXY_STARS[stars](MWPotential2014())
    return orbit_mock(truth, population, n_stars=n_stars, seed=seed), of_stars, truth


def one(name: str, stars: str, n_stars: int, seed: int) -> dict[str, Any]:
    """Mock, fit and compare."""
    begun = time.perf_counter()
    catalog: Catalog
    truth: Potential = MWPotential2014()
    if name == "prior":
        catalog, model_of_stars, truth = prior_mock(stars, n_stars, seed)
    else:
        catalog = galaxy_mock(stars, n_stars=n_stars, seed=seed)
        model_of_stars = model() if name == "parametric" else BUILT_IN[name].build(catalog)
    drawn = time.perf_counter()
    result = fit(model_of_stars, catalog, FitConfig(seed=seed), progress=False)
    done = time.perf_counter()
    posterior = Posterior.from_result(result)
    r = np.quantile(torch.linalg.vector_norm(catalog.x, dim=-1).numpy(), QUANTILES)
    places = np.stack([r, 0 * r, 0 * r + Z], -1)
    row: dict[str, Any] = {
        "model": name, "stars": stars, "n_stars": n_stars, "seed": seed, "r": r.tolist(),
        "k_hat": result.diagnostics.k_hat, "n_components": result.diagnostics.n_components,
        "gradient_norm": result.diagnostics.gradient_norm, "map_iterations": result.diagnostics.map_iterations,
        "angle_p_value": result.diagnostics.angle_p_value, "warnings": result.diagnostics.warnings,
        "finder_bias": result.diagnostics.finder_bias, "stages": result.diagnostics.seconds,
        "mock_seconds": round(drawn - begun, 1), "fit_seconds": round(done - drawn, 1),
    }  # fmt: skip
    with torch.no_grad():
        v_c = truth.circular_speed(torch.as_tensor(r)).numpy()
        K_z = truth.acceleration(torch.as_tensor(places))[:, 2].numpy()
    row["v_c"] = compared(posterior.field("circular_speed", r).draws, v_c)
    row["K_z"] = compared(posterior.field("acceleration", places).draws[..., 2], K_z)
    if name != "parametric":
        row |= over_the_region(posterior.thinned(200), catalog, truth)
    return row


def over_the_region(posterior: Posterior, catalog: Catalog, truth: Potential) -> dict[str, Any]:
    """Compare fields over the region that holds 1 to 99 % of the stars, and the acceleration at the stars."""
    R = np.quantile(torch.linalg.vector_norm(catalog.x[:, :2], dim=-1).numpy(), R_QUANTILES)
    z = np.concatenate([[0.0], np.quantile(catalog.x[:, 2].abs().numpy(), Z_QUANTILES)])
    found = posterior.meridional_fields(R, z, ["acceleration_R", "acceleration_z", "density"])
    x = torch.as_tensor(np.stack([np.tile(R, len(z)), np.zeros(len(R) * len(z)), np.repeat(z, len(R))], -1))
    a = truth.acceleration(x).detach().numpy()
    above = x[:, 2].numpy() > 0
    q = posterior.axial_fields(R, ["potential_flattening"])["potential_flattening"].draws
    true_q = truth.potential_flattening(torch.as_tensor(R)).detach().numpy()
    sound = np.isfinite(q).all(0) & np.isfinite(true_q)
    at_stars = catalog.x[:N_COMPARED].numpy()
    acceleration = posterior.field("acceleration", at_stars).draws.mean(0)
    true_a = truth.acceleration(catalog.x[:N_COMPARED]).detach().numpy()
    error = np.linalg.norm(acceleration - true_a, axis=-1) / np.linalg.norm(true_a, axis=-1)
    v_c = truth.circular_speed(torch.as_tensor(R)).detach().numpy()
    return {
        "R": R.tolist(), "z": z.tolist(), "error_at_stars": np.quantile(error, [0.5, 0.9, 0.99]).tolist(),
        "grid_v_c": compared(posterior.field("circular_speed", R).draws, v_c),
        "grid_a_R": compared(found["acceleration_R"].draws, a[:, 0]),
        "grid_a_z": compared(found["acceleration_z"].draws[:, above], a[above, 2]),
        "grid_rho": compared(found["density"].draws, truth.density(x).detach().numpy()),
        "grid_q": compared(q[:, sound], true_q[sound]),
        "least_density": float(found["density"].draws.min()),
    }  # fmt: skip


def compared(draws: np.ndarray, true: np.ndarray) -> dict[str, Any]:
    """Return z-scores, relative sd and error, and whether the bands hold the truth."""
    return {
        "z": ((draws.mean(0) - true) / draws.std(0)).tolist(),
        "relative_sd": np.abs(draws.std(0) / true).tolist(),
        "relative_error": np.abs(draws.mean(0) / true - 1).tolist(),
        **{
            f"in_{p}": (
                (np.quantile(draws, 0.5 - p / 200, 0) < true) & (true < np.quantile(draws, 0.5 + p / 200, 0))
            ).tolist()
            for p in (68, 95)
        },
    }


def summary(path: Path) -> None:
    """Print coverage, rms z and errors by model, kind of star and number."""
    every = [{"model": "parametric"} | json.loads(line) for line in path.read_text().splitlines()]
    rows = [row for row in every if "error" not in row]
    for key in sorted({(row["model"], row["stars"], row["n_stars"]) for row in rows}):
        some = [row for row in rows if (row["model"], row["stars"], row["n_stars"]) == key]
        seconds = [float(np.median([row[name] for row in some])) for name in ("mock_seconds", "fit_seconds")]
        worst = max(row["k_hat"] for row in some)
        failed = [row for row in every if row["model"] == key[0] and row["stars"] == key[1] and "error" in row]
        if failed:
            print(f"{', '.join(map(str, key))}: {len(failed)} mocks without a fit, seeds {[r['seed'] for r in failed]}")
        print(
            f"{', '.join(map(str, key))}: {len(some)} fits, k-hat at most {worst:.2f}, mock, fit {seconds} s (median)"
        )
        if "error_at_stars" in some[0]:
            errors = 100 * np.array([row["error_at_stars"] for row in some])
            print(f"  error of the acceleration at the stars, median, 90, 99 %: {np.round(np.median(errors, 0), 2)} %")
        for name in (field for field in some[0] if field in ("v_c", "K_z") or field.startswith("grid_")):
            # a mean per fit: places of one fit are not independent
            shares = [np.array([100 * np.mean(row[name][f"in_{p}"]) for row in some]) for p in (68, 95)]
            errors_of = [share.std(ddof=1) / len(share) ** 0.5 if len(share) > 1 else math.nan for share in shares]
            each = np.array([np.mean(np.square(row[name]["z"])) for row in some])
            rms = float(each.mean() ** 0.5)
            rms_error = float(each.std(ddof=1) / len(each) ** 0.5 / (2 * rms)) if len(each) > 1 else math.nan
            error, sd = (
                100 * float(np.median(np.concatenate([row[name][part] for row in some])))
                for part in ("relative_error", "relative_sd")
            )
            print(
                f"  {name}: 68 % band {shares[0].mean():.0f} +- {errors_of[0]:.0f} %, 95 % {shares[1].mean():.0f} +- "
                f"{errors_of[1]:.0f} %, rms z {rms:.2f} +- {rms_error:.2f}, median error {error:.2f} %, sd {sd:.2f} %"
            )


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "summary"))
    parser.add_argument("--model", choices=("parametric", "prior", *BUILT_IN), default="parametric")
    parser.add_argument("--stars", default="halo")
    parser.add_argument("--n-stars", type=int, default=2000)
    parser.add_argument("--seeds", default="1-12")
    parser.add_argument("--out", type=Path, default=RESULTS / "flattened.jsonl")
    options = parser.parse_args()
    if options.what == "summary":
        summary(options.out)
        return
    first, last = map(int, options.seeds.split("-"))
    kept = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
    made = {(row.get("model", "parametric"), row["stars"], row["n_stars"], row["seed"]) for row in kept}
    for seed in range(first, last + 1):
        if (options.model, options.stars, options.n_stars, seed) in made:
            continue
        try:
            row = one(options.model, options.stars, options.n_stars, seed)
        except ValueError as error:
            if options.model != "prior":
                raise
            row = {"model": options.model, "stars": options.stars, "n_stars": options.n_stars, "seed": seed}
            row |= {"error": str(error)}
        with options.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        if "error" in row:
            print(f"seed {seed}: {row['error']}", flush=True)
            continue
        print(f"seed {seed}: z of v_c {np.round(row['v_c']['z'], 2).tolist()}, fit {row['fit_seconds']} s", flush=True)


if __name__ == "__main__":
    main()
