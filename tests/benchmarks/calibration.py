"""Simulation-based calibration of the posterior of the potential: coverage, ranks and widths against radius.

    python tests/benchmarks/calibration.py isochrone --jobs 2           # its 60 seeds, 2001-2060
    python tests/benchmarks/calibration.py prior --seeds 2301-2310 --jobs 2
    python tests/benchmarks/calibration.py summary                      # table, calibration.json and .png

Cases (`CASES`): three systems of known truth at N = 5000, the first also at N = 1e5, all fitted by the free-form model
of `bayespot.models.spherical` with the settings of `FitConfig(seed=seed)`; the parametric isochrone; and ``prior``,
where potential and f(J) of every mock are a draw of the very prior it is fitted with (`PRIOR_NETWORK`,
`FixedPriorMixture`), so that ranks are uniform if and only if the posterior is right. Its stars are J ~ f, theta ~ U,
mapped to (x, v) in the drawn potential: an exact equilibrium.

``selection`` (N before the cut, a third is kept) and ``errors`` (tracers a Plummer sphere of 4 kpc, 64 samples a star)
are isochrones with the network of 8 features and a logistic Gaussian process for f(J), as `bayespot.models.gaia_sphere`
have them; their guide is joint.

``conditional``: of 20 000 Hernquist tracers in an NFW potential a rule of position (`unknown_rule`: a wedge, a shell
and a radial gradient) keeps about 5000, and the fit, `bayespot.models.unknown_selection`, does not know it (radially
biased; ``conditional-isotropic``: isotropic);
``conditional-known`` are the same mocks with the same network and f(J) and the rule as the selection function.

``dwarf-cusp`` and ``dwarf-core`` are `bayespot.models.dwarf_spheroidal`: Hernquist tracers in a cusp and a Plummer
sphere in a core, radial outside of their scale radius, of 1000 stars with errors of 2 km/s, whose velocities along the
line of sight are given their places on the sky; with ``-complete`` the places count. Radii are `HALF_LIGHT_RADII`.

``contaminated`` is the isochrone with one star in a hundred replaced by a foreign one, where a member was and of a
speed uniform up to three times the escape speed there, in a random direction; ``uncontaminated`` are the same mocks
as they were. Both are fitted with the outlier component; ``-parametric`` the same with the parametric isochrone.

One line of JSON per mock is appended to results/calibration/<case>.jsonl as it finishes, with commit, versions and
settings; a seed that is there is skipped, so an interrupted run resumes. No mock is dropped: one that cannot be drawn
or fitted leaves a row with ``error``, which the summary counts.

Radii: `FRACTIONS` of the true tracers inside; in ``prior`` of the mock's own stars, a function of the data alone as
rank statistics demand. ``potential`` is Phi with Phi(infinity) = 0; ``potential_step`` is Phi(r) - Phi(r_50), which no
extrapolation enters (the truths of two systems have infinite mass). Acceleration and circular speed are monotonic
in the enclosed mass at fixed radius, so their ranks are its ranks. A rank is the number of `N_RANKS` posterior draws
below the truth; z = (mean - truth) / sd. Tuning used seeds below 1000, results seeds above 2000.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bayespot.models import dwarf_spheroidal, isochrone, spherical, unknown_selection
from numpy.typing import NDArray

from bayespot import (
    Catalog,
    FitConfig,
    LogisticGaussianProcess,
    MassSlopeNetwork,
    Posterior,
    SnapshotModel,
    SphericalMixture,
    fit,
)
from bayespot.catalog import ProjectedCatalog
from bayespot.df.mixture import SitePrior
from bayespot.likelihood import Chain, Custom, HeliocentricDistance, MeasurementErrors
from bayespot.mock import MOCKS, mock, observe
from bayespot.potential import Plummer, Potential, truth_field
from bayespot.progress import Progress
from bayespot.report.runs import versions

Array = NDArray[Any]

RESULTS = Path(__file__).parent / "results"
#: Fractions of the tracers inside the radii; the middle one is the reference of ``potential_step``.
FRACTIONS = np.linspace(0.01, 0.99, 21)
N_RANKS = 499
FIELDS = ("potential", "potential_step", "radial_acceleration", "enclosed_mass", "density", "circular_speed")
#: Cramer-Rao floor of ln M and ln b of the isotropic isochrone with f(J) free, times sqrt(N).
FLOOR = {"potential.m_tot": 0.92, "potential.r_s": 1.38}


@dataclasses.dataclass(frozen=True)
class Case:
    """What is drawn and fitted: a system of `MOCKS` (None: the prior), N, the seeds reported, the model."""

    system: str | None
    n_stars: int
    first_seed: int
    n_mocks: int
    parametric: bool = False
    #: ``"selection"``: stars within 10 kpc of `SUN` only; ``"errors"``: 10 % in distance, 0.05 mas/yr, 2 km/s;
    #: ``"unknown"`` and ``"known"``: stars that `unknown_rule` keeps; ``"sky"``: places on the sky and line-of-sight
    #: velocities with errors of 2 km/s, ``"sky-complete"``: places count.
    survey: str | None = None
    #: Fraction of the stars replaced by foreign ones.
    contaminants: float = 0.0
    #: Whether the fit has the outlier component; the cases before it were calibrated without.
    outliers: bool = False


SUN = (8.2, 0.0, 0.02)
CASES = {
    "isochrone": Case("isochrone", 5000, 2001, 60),
    "hernquist-in-nfw": Case("hernquist-in-nfw-radial", 5000, 2101, 60),
    "plummer-in-core": Case("plummer-in-core", 5000, 2201, 60),
    "prior": Case(None, 2000, 2301, 100),
    "isochrone-large": Case("isochrone", 100_000, 2401, 10),
    "parametric": Case("isochrone", 5000, 2501, 60, parametric=True),
    "selection": Case("isochrone", 10_000, 2601, 20, survey="selection"),
    "errors": Case("isochrone", 2000, 2701, 20, survey="errors"),
    "conditional": Case("hernquist-in-nfw-radial", 20_000, 3101, 40, survey="unknown"),
    "conditional-isotropic": Case("hernquist-in-nfw", 20_000, 3201, 40, survey="unknown"),
    "conditional-known": Case("hernquist-in-nfw-radial", 20_000, 3101, 40, survey="known"),
    "dwarf-cusp": Case("dwarf-cusp", 1000, 3001, 30, survey="sky", outliers=True),
    "dwarf-core": Case("dwarf-core", 1000, 3001, 30, survey="sky", outliers=True),
    "dwarf-cusp-complete": Case("dwarf-cusp", 1000, 3001, 30, survey="sky-complete", outliers=True),
    "dwarf-core-complete": Case("dwarf-core", 1000, 3001, 30, survey="sky-complete", outliers=True),
    "contaminated": Case("isochrone", 1000, 2821, 20, contaminants=0.01, outliers=True),
    "uncontaminated": Case("isochrone", 1000, 2821, 20, outliers=True),
    "contaminated-parametric": Case("isochrone", 1000, 2821, 20, parametric=True, contaminants=0.01, outliers=True),
    "uncontaminated-parametric": Case("isochrone", 1000, 2821, 20, parametric=True, outliers=True),
}

# ---------------------------------------------------------------------------- the prior as the truth

#: Pivot 10 kpc, features from 0.5 to 150 kpc, and a mass prior narrow enough that the stars of `DF_PRIOR` are there.
PRIOR_NETWORK = {"s_0": math.log(10.0), "s_inner": math.log(0.5), "s_outer": math.log(150.0), "ln_mass": 25.0}
PRIOR_MASS_SD = 0.3
N_COMPONENTS = 2
#: Scales are a third of the circular orbit's angular momentum at the pivot; tails are steep enough for no star to
#: leave the range of the torus map (5e8 kpc: one star in 1e9).
_LN_SCALE = 0.5 * math.log(4.30091e-6 * 10.0) + 12.5 - math.log(3.0)
DF_PRIOR = {
    "logits": SitePrior(0.0, 1.0),
    "ln_scale_r": SitePrior(_LN_SCALE, 0.5),
    "ln_scale_L": SitePrior(_LN_SCALE, 0.5),
    "ln_shape_r": SitePrior(-1.5, 1.0),
    "ln_shape_L": SitePrior(-1.0, 1.0),
    "ln_tail": SitePrior(1.8, 0.3),
}


class FixedPriorMixture(SphericalMixture):
    """The mixture with `DF_PRIOR` in place of priors scaled to the data, which are no prior a truth could follow."""

    def _site_priors(self, J: torch.Tensor) -> dict[str, SitePrior]:
        return DF_PRIOR


def prior_model(network: dict[str, Any]) -> SnapshotModel:
    """The model of case ``prior``; nothing of it depends on data."""
    potential = MassSlopeNetwork(**PRIOR_NETWORK, **({"mass_sd": PRIOR_MASS_SD} | network))
    df = FixedPriorMixture(N_COMPONENTS).resolved(N_COMPONENTS, torch.ones(1, 3, dtype=torch.float64))
    return SnapshotModel(potential, df)


def prior_truth(model: SnapshotModel, n: int, seed: int) -> tuple[Catalog, SnapshotModel, dict[str, torch.Tensor]]:
    """Draw every site from its prior and n stars from the population there."""
    values = {name: value[0] for name, value in model.sample_prior(1, seed).items()}
    truth = model.at(values)
    J = truth.df.sample(n, seed + 1_000_000)
    lost = int((~truth.finder.reaches(truth.potential, J)).sum())
    if lost:
        # leaving them out would change f(J): rather an honest failure
        raise ValueError(f"{lost} stars are beyond the reach of the torus map")
    generator = torch.Generator().manual_seed(seed + 2_000_000)
    theta = 2 * math.pi * torch.rand(n, 3, generator=generator, dtype=torch.float64)
    chain = Chain(truth.potential, truth.df, truth.finder)
    with torch.no_grad():
        return Catalog(chain._map.phase_space(truth.potential, J, theta)), truth, values


# ---------------------------------------------------------------------------- one mock


def tracer_radii(tracers: Potential) -> Array:
    """Radii (kpc) that hold `FRACTIONS` of the tracers, by bisection in ln r."""
    with torch.no_grad():
        total = tracers.enclosed_mass(torch.tensor(1e9, dtype=torch.float64))
        low, high = (torch.full((len(FRACTIONS),), s, dtype=torch.float64) for s in (-20.0, 20.0))
        for _ in range(80):
            middle = (low + high) / 2
            inside = tracers.enclosed_mass(middle.exp()) / total < torch.as_tensor(FRACTIONS)
            low, high = torch.where(inside, middle, low), torch.where(inside, high, middle)
    return low.exp().numpy()


def star_radii(catalog: Catalog) -> Array:
    """Radii that hold `FRACTIONS` of the stars."""
    return np.quantile(torch.linalg.vector_norm(catalog.x, dim=-1).numpy(), FRACTIONS)


def statistics(draws: Array, truth: Array) -> dict[str, list[float]]:
    """Rank of the truth, z and the sd over |truth|, for draws (n_draws, n) of n numbers."""
    sd = draws.std(0, ddof=1)
    return {
        "rank": (draws < truth).sum(0).tolist(),
        "z": _short((draws.mean(0) - truth) / sd),
        "sd": _short(sd / np.abs(truth)),
    }


def _short(values: Array) -> list[float]:
    return [float(f"{v:.5g}") for v in np.atleast_1d(values)]


def fields(posterior: Posterior, truth: Potential, r: Array) -> dict[str, dict[str, list[float]]]:
    """Statistics of `FIELDS` at radii r; acceleration and circular speed follow from the enclosed mass."""
    found = {}
    draws = {name: posterior.field(name, r).draws for name in ("potential", "enclosed_mass", "density")}
    true = {name: truth_field(truth, name, r) for name in draws}
    middle = len(r) // 2
    others = np.arange(len(r)) != middle
    for values in (draws, true):
        # the truth without the axis of draws
        values["potential_step"] = (values["potential"] - values["potential"][..., [middle]])[..., others]
        values["radial_acceleration"] = values["enclosed_mass"] / r**2
        values["circular_speed"] = np.sqrt(values["enclosed_mass"] / r)
    for name in FIELDS:
        found[name] = statistics(draws[name], true[name])
    return found


def parameters(draws: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Statistics of the potential's sites, parametric ones as logarithms."""
    found = {}
    for name, value in truth.items():
        if name.startswith("potential."):
            sample, true = draws[name].reshape(len(draws[name]), -1).numpy(), value.reshape(-1).numpy()
            found[name] = statistics(sample, true)
    return found


def one_mock(case_name: str, seed: int, config: dict[str, Any], network: dict[str, Any]) -> dict[str, Any]:
    """Draw the mock of a seed, fit it and compare with the truth; ``config`` and ``network`` are for tuning."""
    torch.set_num_threads(1)
    case = CASES[case_name]
    settings = FitConfig(**({"seed": seed, "outliers": case.outliers} | config))
    row: dict[str, Any] = {"seed": seed, "n": case.n_stars, "config": config, "network": network}
    begun = time.perf_counter()
    try:
        true_values: dict[str, torch.Tensor] = {}
        if case.system is None:
            model = prior_model(network)
            catalog, drawn, true_values = prior_truth(model, case.n_stars, seed)
            truth, r = drawn.potential, star_radii(catalog)
        else:
            system = MOCKS[case.system]
            truth = system.potential
            if case.survey in ("unknown", "known"):
                _, catalog, model = surveyed(case.survey, case.n_stars, seed, case.system)
                r = star_radii(catalog)
                row["n_kept"] = len(catalog)
            elif case.survey in ("sky", "sky-complete"):
                catalog, r = on_the_sky(case.system, case.n_stars, seed, case.survey == "sky-complete")
                model = dwarf_spheroidal.build(catalog)
            elif case.survey:
                r = star_radii(surveyed(case.survey, 400_000, 0)[0])
                _, catalog, model = surveyed(case.survey, case.n_stars, seed)
            else:
                r = tracer_radii(system.tracers or truth)
                catalog = mock(case.system, n_stars=case.n_stars, seed=seed)
                if case.contaminants:
                    catalog, foreign = contaminated(catalog, truth, case.contaminants, seed)
                model = isochrone.build(catalog) if case.parametric else _free_form(catalog, network)
        if case.parametric:
            true_values = {f"potential.{name}": getattr(truth, name).log() for name in ("m_tot", "r_s")}
        result = fit(model, catalog, settings, progress=False)
        posterior = Posterior.from_result(result).thinned(N_RANKS)
        row["r"] = _short(r)
        row["fields"] = fields(posterior, truth, r)
        draws = {k: v.log() for k, v in posterior.draws.items()} if case.parametric else posterior.draws
        row["parameters"] = parameters(draws, true_values)
        if case.parametric:
            row["sd_over_floor"] = {
                k: float(posterior.draws[k].log().std()) / (floor / case.n_stars**0.5) for k, floor in FLOOR.items()
            }
        found = result.diagnostics
        row |= {
            "k_hat": round(found.k_hat, 3),
            "weight_fraction": round(found.weight_fraction or math.nan, 3),
            "n_components": found.n_components,
            "n_unbound": found.n_unbound,
            "n_outliers": found.n_outliers,
            "outlier_fraction": found.outlier_fraction,
            "gradient_norm": round(found.gradient_norm, 4),
            "angle_p_value": found.angle_p_value,
            "warnings": found.warnings,
            "fit_seconds": {k: round(v, 2) for k, v in found.seconds.items()},
        }
        if case.contaminants and result.outliers is not None:
            likely = result.outliers.numpy() > 0.5
            unbound = foreign & (star_speeds(catalog, truth) > 1)
            row["outliers"] = {
                "foreign": int(foreign.sum()),
                "found": int((likely & foreign).sum()),
                "unbound": int(unbound.sum()),
                "unbound_found": int((likely & unbound).sum()),
                "members_lost": int((likely & ~foreign).sum()),
            }
    except (ValueError, RuntimeError) as error:
        row["error"] = f"{type(error).__name__}: {error}"
    return row | {"seconds": round(time.perf_counter() - begun, 1)}


def contaminated(catalog: Catalog, truth: Potential, fraction: float, seed: int) -> tuple[Catalog, Array]:
    """Give a fraction of the stars random velocities, of speeds up to three times escape; return which they are."""
    generator = np.random.default_rng(seed + 3_000_000)
    rows = generator.choice(len(catalog), round(fraction * len(catalog)), replace=False)
    w, foreign = catalog.w.numpy().copy(), np.zeros(len(catalog), dtype=bool)
    foreign[rows] = True
    direction = generator.standard_normal((len(rows), 3))
    direction /= np.linalg.norm(direction, axis=-1, keepdims=True)
    with torch.no_grad():
        escape = (-2 * truth.phi(catalog.x[torch.as_tensor(rows)])).sqrt().numpy()
    w[rows, 3:] = direction * (generator.uniform(0, 3, len(rows)) * escape)[:, None]
    return Catalog(torch.as_tensor(w), meta=catalog.meta), foreign


def star_speeds(catalog: Catalog, truth: Potential) -> Array:
    """Speeds over the speed of escape."""
    with torch.no_grad():
        return (torch.linalg.vector_norm(catalog.v, dim=-1) / (-2 * truth.phi(catalog.x)).sqrt()).numpy()


#: Radii of the mocks on the sky, in those that hold half of the stars in projection.
HALF_LIGHT_RADII = np.linspace(0.3, 3.0, 10)


def on_the_sky(system: str, n: int, seed: int, complete: bool) -> tuple[ProjectedCatalog, Array]:
    """Stars of a system of `MOCKS` with velocities along z and errors of 2 km/s, and `HALF_LIGHT_RADII` in kpc."""
    whole = mock(system, n_stars=n, seed=seed)
    noise = np.random.default_rng(seed + 5_000_000).standard_normal(n)
    x, y, v = whole.w[:, [0, 1, 5]].numpy().T
    r = HALF_LIGHT_RADII * np.median(np.hypot(x, y))
    return ProjectedCatalog.of(x, y, v + 2 * noise, 2.0, photometric=complete), r


def unknown_rule(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """S(x): a tenth of a wedge of 108 deg, a sixth of a shell at 5 to 12 kpc, half of the south, and fewer far out."""
    r = torch.linalg.vector_norm(x, dim=-1)
    wedge = torch.where(torch.atan2(x[..., 1], x[..., 0]).abs() < 0.7 * math.pi, 1.0, 0.1)
    shell = torch.where((r > 5) & (r < 12), 0.15, 1.0)
    south = torch.where(x[..., 2] > 0, 1.0, 0.5)
    return (wedge * shell * south * 1.055 / (1 + r / 40)).clamp(max=1.0)


def surveyed(
    kind: str, n: int, seed: int, system: str = "hernquist-in-nfw-radial"
) -> tuple[Catalog, Catalog, SnapshotModel]:
    """Stars in a survey as they are and as they are observed, and the model."""
    if kind in ("unknown", "known"):
        whole = mock(system, n_stars=n, seed=seed)
        chance = torch.rand(n, generator=torch.Generator().manual_seed(seed + 4_000_000), dtype=torch.float64)
        true = catalog = whole[chance < unknown_rule(whole.x, whole.v)]
        if kind == "unknown":
            return true, catalog, unknown_selection.build(catalog)
        options: dict[str, Any] = {"selection": Custom(unknown_rule, position_only=True)}
    elif kind == "selection":
        cut = HeliocentricDistance(10.0, observer=SUN)
        whole = mock("isochrone", n_stars=n, seed=seed)
        true = catalog = whole[cut(whole.w) > 0]
        options = {"selection": cut}
    else:
        true = mock("isochrone", tracers=Plummer(1.0, 4.0), n_stars=n, seed=seed)
        catalog = observe(true, seed + 1, distance_error=0.1, pm_error=0.05, v_error=2.0)
        options = {"errors": MeasurementErrors(n_samples=64)}
    network = MassSlopeNetwork.for_stars(catalog.w, n_features=8)
    return true, catalog, SnapshotModel(network, LogisticGaussianProcess(), **options)


def _free_form(catalog: Catalog, network: dict[str, Any]) -> SnapshotModel:
    """``models.spherical``; with options of the network (tuning) the same with those."""
    model = spherical.build(catalog)
    if not network:
        return model
    p = model.potential
    options = {"n_features": p.n_features} | network
    start = float(p.initial_values()["ln_mass"])
    return SnapshotModel(MassSlopeNetwork(p.s_0, p.s_inner, p.s_outer, start, **options), model.df)


# ---------------------------------------------------------------------------- the campaign


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a file; a last line cut short by a crash is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            print(f"{path}: left out a damaged line; its seed will run again", file=sys.stderr)
    return rows


def append(path: Path, row: dict[str, Any]) -> None:
    """Append one line in a single write, on a line of its own whatever was there before."""
    whole = not path.exists() or path.stat().st_size == 0 or path.read_bytes()[-1:] == b"\n"
    line = ("" if whole else "\n") + json.dumps(row, separators=(",", ":")) + "\n"
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(handle, line.encode())
        os.fsync(handle)
    finally:
        os.close(handle)


def commit() -> str:
    """The commit of the package that runs, ``-dirty`` with uncommitted changes."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True).stdout.strip()


def campaign(name: str, seeds: range, jobs: int, folder: Path, config: dict[str, Any], network: dict[str, Any]) -> None:
    """Run the seeds that are missing, a process per mock, and report each on stdout."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.jsonl"
    known = read_rows(path)
    other = [row["seed"] for row in known if (row["config"], row["network"]) != (config, network)]
    if other:
        raise SystemExit(f"{path} holds rows with other settings (seeds {other[:5]}); give another --out")
    done = {row["seed"] for row in known}
    missing = [seed for seed in seeds if seed not in done]
    stamp = {"case": name, "commit": commit(), "versions": versions()}
    print(f"{name}: {len(seeds) - len(missing)} of {len(seeds)} mocks are there, {len(missing)} to do", flush=True)
    begun = time.perf_counter()
    context = get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool, Progress(None) as bar:
        bar.stage(name, len(missing))
        futures = [pool.submit(one_mock, name, seed, config, network) for seed in missing]
        for i, future in enumerate(as_completed(futures), 1):
            row = future.result()
            append(path, stamp | row)
            left = (time.perf_counter() - begun) / i * (len(missing) - i)
            z = (
                ""
                if "error" in row
                else f"rms z of M {np.sqrt(np.mean(np.square(row['fields']['enclosed_mass']['z']))):.2f}, "
            )
            note = f"seed {row['seed']}: {row.get('error', '')}{z}{row['seconds']:.0f} s, {left / 60:.0f} min left"
            bar.step(note)
            print(f"{i}/{len(missing)} {note}", flush=True)


# ---------------------------------------------------------------------------- the summary

LEVELS = (0.5, 0.68, 0.95)


def covered(rank: Array, level: float) -> Array:
    """Whether the central band of a level holds the truth, from its rank among `N_RANKS` draws."""
    return np.abs((rank + 0.5) / (N_RANKS + 1) - 0.5) < level / 2


def summarise(rows: list[dict[str, Any]], name: str, part: str = "fields") -> dict[str, Any]:
    """Coverage, z and widths of one field (or parameter) over mocks, by radius and averaged over radii."""
    from scipy.stats import binom, chi2

    n = len(rows)
    rank, z, sd = (np.array([row[part][name][key] for row in rows], dtype=float) for key in ("rank", "z", "sd"))
    found: dict[str, Any] = {"n": n}
    for level in LEVELS:
        inside = covered(rank, level)
        low, high = binom.ppf([0.005, 0.995], n, level) / n
        at = inside.mean(0)
        found[f"in_{100 * level:.0f}"] = {
            "mean": float(inside.mean()),
            # radii of one mock are correlated, mocks are not
            "standard_error": float(inside.mean(1).std(ddof=1) / n**0.5) if n > 1 else math.nan,
            "at_radii": _short(at),
            "interval_99": [float(low), float(high)],
            "radii_outside_interval": int(((at < low) | (at > high)).sum()),
        }
    low, high = np.sqrt(chi2.ppf([0.005, 0.995], n) / n)
    per_mock = (z**2).mean(1)
    found["rms_z"] = {
        "mean": float(np.sqrt((z**2).mean())),
        "standard_error": float(per_mock.std(ddof=1) / n**0.5 / 2 / np.sqrt((z**2).mean())) if n > 1 else math.nan,
        "at_radii": _short(np.sqrt((z**2).mean(0))),
        "interval_99": [float(low), float(high)],
    }
    found["mean_z"] = {"mean": float(z.mean()), "at_radii": _short(z.mean(0)), "standard_error": n**-0.5}
    found["relative_sd"] = {"median": float(np.median(sd)), "at_radii": _short(np.median(sd, 0))}
    return found


def simultaneous_band(n: int, n_bins: int, level: float = 0.95, n_simulated: int = 4000) -> tuple[float, float]:
    """Least and largest count that all bins of a histogram of n uniform ranks keep to, with probability ``level``.

    Pointwise binomial intervals, widened until the simulated histograms stay inside all at once
    (Saeilynoja, Buerkner & Vehtari 2022, Statistics and Computing 32, 32).
    """
    from scipy.stats import binom

    counts = np.random.default_rng(0).multinomial(n, np.full(n_bins, 1 / n_bins), n_simulated)
    for tail in np.geomspace(0.2, 1e-5, 200):
        low, high = binom.ppf(tail, n, 1 / n_bins), binom.ppf(1 - tail, n, 1 / n_bins)
        if ((counts >= low) & (counts <= high)).all(1).mean() >= level:
            break
    return float(low), float(high)


def case_summary(name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Everything of one case; failed mocks are counted, never replaced."""
    good = [row for row in rows if "error" not in row]
    summary: dict[str, Any] = {
        "n_mocks": len(rows),
        "errors": {row["seed"]: row["error"] for row in rows if "error" in row},
        "n_stars": CASES[name].n_stars,
        "seeds": sorted(row["seed"] for row in rows),
        "commits": sorted({row["commit"] for row in rows}),
        "versions": rows[-1]["versions"],
        "config": rows[-1]["config"],
        "network": rows[-1]["network"],
        ("half_light_radii" if on_sky(name) else "fractions_inside"): _short(places(name)),
        "radii": "of each mock's own stars" if good[0]["r"] != good[-1]["r"] else good[0]["r"],
        "fields": {field: summarise(good, field) for field in FIELDS},
        "parameters": {site: summarise(good, site, "parameters") for site in good[0]["parameters"]},
        "k_hat_above_0.7": int(sum(row["k_hat"] > 0.7 for row in good)),
        "n_components": sorted(row["n_components"] for row in good),
        "median_seconds": float(np.median([row["seconds"] for row in good])),
        "warnings": {row["seed"]: row["warnings"] for row in good if row["warnings"]},
    }
    if "outliers" in good[0]:
        summary["outliers"] = {key: int(sum(row["outliers"][key] for row in good)) for key in good[0]["outliers"]}
    if "sd_over_floor" in good[0]:
        summary["sd_over_floor"] = {
            key: {"mean": float(np.mean(values)), "largest": float(np.max(values))}
            for key in FLOOR
            if (values := [row["sd_over_floor"][key] for row in good])
        }
    return summary


def on_sky(name: str) -> bool:
    """Whether the stars of a case are seen in projection."""
    return CASES[name].survey in ("sky", "sky-complete")


def places(name: str) -> Array:
    """Radii of a case: `HALF_LIGHT_RADII` or `FRACTIONS`."""
    return HALF_LIGHT_RADII if on_sky(name) else FRACTIONS


def table(summary: dict[str, dict[str, Any]]) -> str:
    """The averages over radii as Markdown."""
    lines = [
        "| case | field | mocks | in 50 | in 68 | in 95 | radii out of 99 % interval (68, 95) | rms z | mean z | sd |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for case, found in summary.items():
        quantities = found["fields"] | found["parameters"]
        for field, q in quantities.items():
            inside = [
                f"{100 * q[f'in_{k}']['mean']:.1f} ± {100 * q[f'in_{k}']['standard_error']:.1f}" for k in (50, 68, 95)
            ]
            out = ", ".join(str(q[f"in_{k}"]["radii_outside_interval"]) for k in (68, 95))
            lines.append(
                f"| {case} | {field} | {q['n']} | {' | '.join(inside)} | {out} | "
                f"{q['rms_z']['mean']:.2f} ± {q['rms_z']['standard_error']:.2f} | {q['mean_z']['mean']:+.2f} | "
                f"{100 * q['relative_sd']['median']:.2f} % |"
            )
        for key, value in found.get("sd_over_floor", {}).items():
            lines.append(
                f"| {case} | {key}: sd over the Cramer-Rao floor, mean {value['mean']:.2f}, largest "
                f"{value['largest']:.2f} | | | | | | | | |"
            )
    return "\n".join(lines)


def figure(summary: dict[str, dict[str, Any]], rows: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Per case: coverage by radius, mean and rms z by radius, rank histograms with their simultaneous band."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = {"potential": "#0072B2", "potential_step": "#CC79A7", "enclosed_mass": "#D55E00", "density": "#009E73"}
    # fewer mocks show nothing but chance
    summary = {name: found for name, found in summary.items() if len(rows[name]) >= 10}
    fig, grid = plt.subplots(len(summary), 3, figsize=(13, 2.9 * len(summary)), squeeze=False, layout="constrained")
    for axes, (name, found) in zip(grid, summary.items(), strict=True):
        good = [row for row in rows[name] if "error" not in row]
        for field, colour in colours.items():
            q = found["fields"][field]
            at = places(name)
            if len(q["mean_z"]["at_radii"]) < len(at):
                # a step of the potential is from the radius in the middle
                at = np.delete(at, len(at) // 2)
            for level in LEVELS:
                axes[0].plot(at, q[f"in_{100 * level:.0f}"]["at_radii"], color=colour, lw=1.2)
            axes[1].plot(at, q["rms_z"]["at_radii"], color=colour, lw=1.4, label=field.replace("_", " "))
            axes[1].plot(at, q["mean_z"]["at_radii"], color=colour, lw=1.0, ls="--")
        for level in LEVELS:
            axes[0].axhspan(*q[f"in_{100 * level:.0f}"]["interval_99"], color="0.85", zorder=0)
            axes[0].axhline(level, color="0.4", lw=0.8)
        axes[0].set(ylim=(0, 1.02), ylabel="coverage of 50, 68, 95 %", title=f"{name}, N = {found['n_stars']}")
        axes[1].axhspan(*q["rms_z"]["interval_99"], color="0.85", zorder=0)
        axes[1].axhline(1, color="0.4", lw=0.8)
        axes[1].axhline(0, color="0.4", lw=0.8)
        axes[1].set(ylim=(-1.5, 2), ylabel="rms z (solid), mean z (dashed)")
        axes[1].legend(fontsize=7, ncol=2, loc="lower right")
        shown = {f"{at:g} half-light radii": at for at in (0.6, 1.5, 3.0)} if on_sky(name) else None
        _histograms(axes[2], good, colours, places(name), shown or {f"{at:.0%} inside": at for at in (0.1, 0.5, 0.9)})
        for ax in axes[:2]:
            ax.set_xlabel("radius over that of half the light" if on_sky(name) else "fraction of the stars inside")
    fig.savefig(path, dpi=80)
    plt.close(fig)


def _histograms(
    ax: Any,
    rows: list[dict[str, Any]],
    colours: dict[str, str],
    places: Array,
    shown: dict[str, float],
    n_bins: int = 10,
) -> None:
    """Rank histograms at three radii, side by side, with the band of each histogram."""
    low, high = simultaneous_band(len(rows), n_bins)
    for i, (label, at) in enumerate(shown.items()):
        k = int(np.abs(places - at).argmin())
        for field in ("potential", "enclosed_mass", "density"):
            rank = np.array([row["fields"][field]["rank"][k] for row in rows])
            counts, edges = np.histogram((rank + 0.5) / (N_RANKS + 1), n_bins, (0, 1))
            ax.stairs(counts, edges + 1.15 * i, color=colours[field], lw=1.2)
        ax.fill_between([1.15 * i, 1.15 * i + 1], low, high, color="0.85", zorder=0)
        ax.text(
            1.15 * i + 0.5,
            0.98,
            label,
            ha="center",
            va="top",
            fontsize=8,
            transform=ax.get_xaxis_transform(),
        )
    ax.set(ylim=(0, 1.5 * high), xticks=[], ylabel="mocks", xlabel="rank of the truth (95 % simultaneous band)")


def main() -> None:
    """Run a case, or summarise what there is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=[*CASES, "summary"])
    parser.add_argument("--seeds", help="FIRST-LAST; by default those reported")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--out", type=Path, default=RESULTS / "calibration", help="folder of the rows")
    parser.add_argument("--config", type=json.loads, default={}, help="JSON: other values of FitConfig, for tuning")
    parser.add_argument("--network", type=json.loads, default={}, help="JSON: options of MassSlopeNetwork, for tuning")
    arguments = parser.parse_args()
    if arguments.case != "summary":
        case = CASES[arguments.case]
        first, last = case.first_seed, case.first_seed + case.n_mocks - 1
        if arguments.seeds:
            first, *more = map(int, arguments.seeds.split("-"))
            last = more[0] if more else first
        seeds = range(first, last + 1)
        campaign(arguments.case, seeds, arguments.jobs, arguments.out, arguments.config, arguments.network)
        return
    rows = {name: read_rows(arguments.out / f"{name}.jsonl") for name in CASES}
    rows = {name: found for name, found in rows.items() if any("error" not in row for row in found)}
    summary = {name: case_summary(name, found) for name, found in rows.items()}
    target = arguments.out.parent / arguments.out.name
    target.with_suffix(".json").write_text(json.dumps(summary, indent=1) + "\n")
    figure(summary, rows, target.with_suffix(".png"))
    print(table(summary))


if __name__ == "__main__":
    main()
