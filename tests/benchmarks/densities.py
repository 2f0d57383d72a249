"""Which density of orbits: the comparison quoted in the README.

    python tests/benchmarks/densities.py orbits --n-stars 5000 --seeds 4001-4002
    python tests/benchmarks/densities.py fits --systems isochrone --n-stars 100000 --seeds 4001-4002
    python tests/benchmarks/densities.py orbits --systems disc,halo,disc+halo --n-stars 2000 --seeds 4001-4002
    python tests/benchmarks/densities.py table

``orbits``: f(J) is fitted to the actions in the true potential; mean ln f of 20 000 other stars minus that of the
mixture, seconds and peak memory of the process. ``fits``: the complete fit with the free-form potential, Laplace
approximation; error of Phi over 0.1 to 50 scale radii for the isochrone (Phi(infinity) = 0), and of Phi - Phi(r_50)
between the radii that hold 1 and 99 % of the stars for all systems. Every row runs in a process of its own and is
appended to results/densities.jsonl; rows that are there are skipped, so an interrupted run resumes. Seeds below 1000
were for tuning. The truth enters a fit nowhere.

Systems: ``isochrone``; ``hernquist-in-nfw`` (beta = 0.3); ``two-component``: a hot halo and a cold rotating shell in an
NFW halo; ``lumpy``: twenty accreted clumps and a smooth component in the same halo. The latter two are J ~ f and
theta ~ U, mapped to (x, v): exact equilibria. ``disc``, ``halo`` and ``disc+halo``: ``orbits`` only, of the mocks of
flattened galaxies (`GALAXY_STARS` in `MWPotential2014`), whose f(J) is known: ``short`` is how much the mean ln f of
the other stars falls short of the truth's. A potential's score is a sum of slopes of ln f times changes of J, so the
fitted slopes decide what its posterior can know. With slopes s along J_r or J_z times the size of such changes,
(J_r |J|)^(1/2) and J_z, and true ones t, both at the other stars: ``efficiency_r`` and ``efficiency_z`` =
E[s t]^2 / (E[s^2] E[t^2]), the information left of the truth's, and ``claimed`` = E[s^2] / E[s t], what the outer
products of scores claim over the curvature. There are two more densities to compare with: ``action_mixture``, free
shapes and a Gaussian in J_phi, and ``sphere``, the sphere's mixture in (J_r, L, cos i).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bayespot import Catalog, FitConfig, MassSlopeNetwork, Posterior, SnapshotModel, SphericalMixture, fit
from bayespot.actions import SphericalActions
from bayespot.df import (
    AXISYMMETRIC_DENSITIES,
    DENSITIES,
    ActionMixture,
    DistributionFunction,
    TrainedDensity,
    choose_n_components,
    density,
)
from bayespot.mock import MOCKS, mock
from bayespot.mock.flattened import GALAXY_STARS
from bayespot.mock.orbits import OrbitPopulation
from bayespot.potential import NFW, MWPotential2014, Potential, truth_field
from bayespot.pyro_modules import freeze

RESULTS = Path(__file__).parent / "results" / "densities.jsonl"
HALO = NFW(m_s=8e11, r_s=20.0)
SYSTEMS = ("isochrone", "hernquist-in-nfw", "two-component", "lumpy")
FLATTENED = tuple(GALAXY_STARS)
COMPARED = (*AXISYMMETRIC_DENSITIES, "action_mixture", "sphere")
N_HELD = 20_000


def _orbits(ln_J_r: torch.Tensor, ln_L: torch.Tensor, cos_i: torch.Tensor) -> torch.Tensor:
    L = ln_L.exp()
    return torch.stack([ln_J_r.exp(), L * cos_i, L * (1 - cos_i.abs())], -1)


def two_component(n: int, generator: torch.Generator) -> torch.Tensor:
    """J of 70 % hot isotropic halo and 30 % shell: L = 2500 within 6 %, J_r about 40 kpc km/s, cos i near 1."""
    n_shell = round(0.3 * n)
    halo = SphericalActions().actions(HALO, _halo_stars(n - n_shell, generator).w)
    e = torch.rand(n_shell, 2, generator=generator, dtype=torch.float64)
    normal = torch.randn(n_shell, generator=generator, dtype=torch.float64)
    shell = _orbits((-40 * e[:, 0].log()).log(), math.log(2500) + 0.06 * normal, 1 - 0.15 * e[:, 1] ** 2)
    return torch.cat([halo, shell])


def lumpy(n: int, generator: torch.Generator) -> torch.Tensor:
    """J of 40 % smooth halo and 60 % in twenty clumps, each 8 % wide in J_r and L, whose places are the same always."""
    n_clumped = round(0.6 * n)
    halo = SphericalActions().actions(HALO, _halo_stars(n - n_clumped, generator).w)
    places = SphericalActions().actions(HALO, _halo_stars(20, torch.Generator().manual_seed(99)).w)
    ln = torch.stack([places[:, 0], places[:, 2] + places[:, 1].abs()], -1).log()
    k = torch.randint(20, (n_clumped,), generator=generator)
    ln = ln[k] + 0.08 * torch.randn(n_clumped, 2, generator=generator, dtype=torch.float64)
    c = 2 * torch.rand(n_clumped, generator=generator, dtype=torch.float64) - 1
    return torch.cat([halo, _orbits(ln[:, 0], ln[:, 1], c)])


def _halo_stars(n: int, generator: torch.Generator) -> Catalog:
    seed = int(torch.randint(2**31, (), generator=generator))
    return mock("hernquist-in-nfw", n_stars=n, seed=seed)


def actions(name: str, n: int, seed: int) -> torch.Tensor:
    """Return the true actions of n stars."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        if name == "two-component":
            return two_component(n, generator)
        if name == "lumpy":
            return lumpy(n, generator)
        catalog, truth = system(name, n, seed)
        return SphericalActions().actions(truth, catalog.w)


def system(name: str, n: int, seed: int) -> tuple[Catalog, Potential]:
    """Return the stars and the true potential."""
    if name in ("isochrone", "hernquist-in-nfw"):
        key = name if name == "isochrone" else "hernquist-in-nfw-radial"
        return mock(key, n_stars=n, seed=seed), MOCKS[key].potential
    generator = torch.Generator().manual_seed(seed + 1)
    theta = 2 * math.pi * torch.rand(n, 3, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        return Catalog(SphericalActions().phase_space(HALO, actions(name, n, seed), theta)), HALO


def orbits(name: str, df_name: str, n: int, seed: int) -> dict[str, Any]:
    """f(J) at the true actions: held-out mean ln f, seconds, components or steps."""
    J, held = actions(name, n, seed), actions(name, N_HELD, seed + 500_000)
    fitted, size, seconds = _fitted(density(df_name, name == "two-component"), J, seed)
    with torch.no_grad():
        return {"log_f": float(fitted.log_prob(held).mean()), "size": size, "seconds": seconds}


def flattened_orbits(name: str, df_name: str, n: int, seed: int) -> dict[str, Any]:
    """f(J) of a flattened galaxy at the true actions: how far it falls short of the truth, and of its slopes."""
    population = GALAXY_STARS[name](MWPotential2014())
    J, held = population.sample(n, seed), population.sample(N_HELD, seed + 500_000)
    others = {"action_mixture": ActionMixture, "sphere": lambda: SphericalMixture(rotation=True)}
    df = others[df_name]() if df_name in others else density(df_name, flattened=True)
    fitted, size, seconds = _fitted(df, J, seed)
    x = held.clone().requires_grad_()
    log_f = fitted.log_prob(x)
    (slope,) = torch.autograd.grad(log_f.sum(), x)
    short = population.log_prob(held) - log_f.detach()
    row = {
        "log_f": float(log_f.detach().mean()), "short": float(short.mean()),
        "short_error": float(short.std() / N_HELD**0.5), "size": size, "seconds": seconds,
    }  # fmt: skip
    for axis, letter, change in ((0, "r", (held[:, 0] * held.abs().sum(-1)).sqrt()), (2, "z", held[:, 2])):
        s, t = change * slope[:, axis], change * _true_slope(population, held, axis)
        ss, st, tt = (float((a * b).mean()) for a, b in ((s, s), (s, t), (t, t)))
        row |= {f"efficiency_{letter}": st**2 / (ss * tt), f"claimed_{letter}": ss / st}
    return row


def _true_slope(population: OrbitPopulation, J: torch.Tensor, axis: int) -> torch.Tensor:
    step = torch.zeros_like(J)
    step[:, axis] = 1e-4 * J[:, axis]
    return (population.log_prob(J + step) - population.log_prob(J - step)) / (2 * step[:, axis])


def _fitted(df: DistributionFunction, J: torch.Tensor, seed: int) -> tuple[DistributionFunction, int, float]:
    """The density fitted to actions, its components or training steps, and the seconds that it took."""
    begun = time.perf_counter()
    if isinstance(df, TrainedDensity):
        fitted = df.trained(J, seed)
        size = sum(history.best_step for history in fitted.state.histories)
    else:
        size = df.n_components or choose_n_components(df, J, seed).n_components
        module = df.resolved(size, J)
        fitted = freeze(module, module.fit_actions(J[:20_000], seed))
    return fitted, size, round(time.perf_counter() - begun, 1)


def fits(name: str, df_name: str, n: int, seed: int) -> dict[str, Any]:
    """The complete fit: errors of Phi in per cent, posterior sd, coverage, seconds."""
    catalog, truth = system(name, n, seed)
    model = SnapshotModel(MassSlopeNetwork.for_stars(catalog.w), SphericalMixture(rotation=name == "two-component"))
    begun = time.perf_counter()
    result = fit(
        model, catalog, FitConfig(seed=seed, df=df_name, guide="laplace", n_draws=400, k_hat_draws=20), progress=False
    )
    row: dict[str, Any] = {"seconds": round(time.perf_counter() - begun, 1)}
    posterior = Posterior.from_result(result)
    q = result.catalog["r_q"]
    r = np.append(np.geomspace(q[1], q[7], 40), q[4])
    draws, true = posterior.field("potential", r).draws, truth_field(truth, "potential", r)
    step, true_step = (draws - draws[:, -1:])[:, :-1], (true - true[-1])[:-1]
    low, high = np.quantile(step, [0.16, 0.84], axis=0)
    z = (step.mean(0) - true_step) / step.std(0)
    scale = abs(true[-1])
    row |= {
        "step_error": 100 * float(np.abs(step.mean(0) - true_step).mean() / scale),
        "step_bias": 100 * float((step.mean(0) - true_step).mean() / scale),
        "step_sd": 100 * float(step.std(0).mean() / scale),
        "in_68": float(((true_step > low) & (true_step < high)).mean()),
        "rms_z": float(np.sqrt((z**2).mean())),
    }
    if name == "isochrone":
        r = np.geomspace(0.1 * 3.0, 50 * 3.0, 100)
        field, true = posterior.field("potential", r), truth_field(truth, "potential", r)
        row |= {
            "error": 100 * float(np.abs(field.mean / true - 1).mean()),
            "bias": 100 * float((field.mean / true - 1).mean()),
            "sd": 100 * float((field.sd / np.abs(true)).mean()),
        }
    found = result.diagnostics
    return row | {
        "n_components": found.n_components,
        "n_unbound": found.n_unbound,
        "stages": {k: round(v, 1) for k, v in found.seconds.items()},
        "rounds": [{k: round(v, 4) for k, v in one.items()} for one in found.df_rounds],
        "warnings": found.warnings,
    }


# ---------------------------------------------------------------------------- rows


def read() -> list[dict[str, Any]]:
    """The rows so far; a last line cut short by a crash is left out."""
    rows = []
    for line in RESULTS.read_text().splitlines() if RESULTS.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            print(f"{RESULTS}: left out a damaged line", file=sys.stderr)
    return rows


def append(row: dict[str, Any]) -> None:
    """Append one line in a single write."""
    RESULTS.parent.mkdir(exist_ok=True)
    handle = os.open(RESULTS, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(handle, (json.dumps(row, separators=(",", ":")) + "\n").encode())
        os.fsync(handle)
    finally:
        os.close(handle)


def one(part: str, name: str, df_name: str, n: int, seed: int) -> None:
    """Compute one row in this process and append it."""
    torch.set_num_threads(1)
    key = {"part": part, "system": name, "df": df_name, "n": n, "seed": seed}
    begun = time.process_time()
    try:
        computed = fits if part == "fits" else flattened_orbits if name in FLATTENED else orbits
        row = computed(name, df_name, n, seed)
    except (ValueError, RuntimeError) as error:
        row = {"error_message": f"{type(error).__name__}: {error}"}
    usage = resource.getrusage(resource.RUSAGE_SELF)
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    commit = subprocess.run(describe, cwd=Path(__file__).parent, capture_output=True, text=True, check=True).stdout
    cost = {"cpu_seconds": round(time.process_time() - begun, 1), "peak_mib": round(usage.ru_maxrss / 1024)}
    append(key | row | cost | {"commit": commit.strip()})
    print(json.dumps(key | row | cost), flush=True)


def campaign(arguments: argparse.Namespace) -> None:
    """Run the rows that are missing, one process after the other."""
    first, last = map(int, arguments.seeds.split("-"))
    keys = ("part", "system", "df", "n", "seed")
    done = {tuple(row[k] for k in keys) for row in read()}
    for seed in range(first, last + 1):
        for name in arguments.systems.split(","):
            for df_name in arguments.densities.split(","):
                key = (arguments.part, name, df_name, arguments.n_stars, seed)
                if key not in done:
                    # a process each, so that the peak of memory is the row's own
                    subprocess.run([sys.executable, __file__, "one", *map(str, key)], check=True)


def table() -> None:
    """Print both tables in Markdown: means over seeds, held-out ln f relative to the mixture's."""
    rows = [row for row in read() if "error_message" not in row and row["seed"] >= 1000]
    _print_row("system", "N", "f(J)", "ln f - mixture's", "CPU s", "MiB", "seeds")
    _print_row(*["---"] * 7)
    groups = _groups(rows, "orbits")
    for (name, n, df_name), group in (pair for pair in groups if pair[0][0] not in FLATTENED):
        base = {row["seed"]: row["log_f"] for row in dict(_groups(rows, "orbits")).get((name, n, "mixture"), [])}
        gain = [row["log_f"] - base[row["seed"]] for row in group if row["seed"] in base]
        shown = f"{np.mean(gain):+.4f}" if gain else "-"
        _print_row(name, n, df_name, shown, *(_mean(group, k, 0) for k in ("cpu_seconds", "peak_mib")), _seeds(group))
    columns = {
        "error": "error of Phi, %", "bias": "bias", "sd": "sd", "step_error": "error of step, %", "step_bias": "bias",
        "step_sd": "sd", "in_68": "in 68 %", "rms_z": "rms z",
    }  # fmt: skip
    print()
    _print_row("system", "N", "f(J)", *columns.values(), "CPU s", "MiB", "seeds")
    _print_row(*["---"] * (len(columns) + 6))
    for (name, n, df_name), group in _groups(rows, "fits"):
        cost = (_mean(group, k, 0) for k in ("cpu_seconds", "peak_mib"))
        _print_row(name, n, df_name, *(_mean(group, k, 2) for k in columns), *cost, _seeds(group))
    columns = {
        "short": "ln f short of the truth's", "efficiency_r": "information in J_r", "efficiency_z": "in J_z",
        "claimed_r": "claimed in J_r", "claimed_z": "in J_z",
    }  # fmt: skip
    print()
    _print_row("stars", "N", "f(J)", *columns.values(), "size", "CPU s", "seeds")
    _print_row(*["---"] * (len(columns) + 6))
    for (name, n, df_name), group in (pair for pair in groups if pair[0][0] in FLATTENED):
        shown = (_mean(group, k, 4 if k == "short" else 2) for k in columns)
        sizes = ", ".join(str(row["size"]) for row in group)
        _print_row(name, n, df_name, *shown, sizes, _mean(group, "cpu_seconds", 0), _seeds(group))


def _print_row(*cells: object) -> None:
    print("| " + " | ".join(map(str, cells)) + " |")


def _groups(rows: list[dict[str, Any]], part: str) -> list[tuple[tuple[str, int, str], list[dict[str, Any]]]]:
    found: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    for row in rows:
        if row["part"] == part:
            found.setdefault((row["system"], row["n"], row["df"]), []).append(row)
    systems, order = (*SYSTEMS, *FLATTENED), (*DENSITIES, *COMPARED[-2:])
    return sorted(found.items(), key=lambda pair: (systems.index(pair[0][0]), pair[0][1], order.index(pair[0][2])))


def _mean(rows: list[dict[str, Any]], key: str, digits: int) -> str:
    return f"{np.mean([row[key] for row in rows]):.{digits}f}" if key in rows[0] else "-"


def _seeds(rows: list[dict[str, Any]]) -> str:
    return ", ".join(str(seed) for seed in sorted(row["seed"] for row in rows))


def main() -> None:
    """Run or summarise."""
    if sys.argv[1:2] == ["one"]:
        part, name, df_name, n, seed = sys.argv[2:]
        one(part, name, df_name, int(n), int(seed))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["orbits", "fits", "table"])
    parser.add_argument("--n-stars", type=int, default=5000)
    parser.add_argument("--seeds", default="4001-4001", help="FIRST-LAST")
    parser.add_argument("--systems", default=",".join(SYSTEMS))
    parser.add_argument("--densities", help="names with commas; all of the systems' by default")
    arguments = parser.parse_args()
    flattened = set(arguments.systems.split(",")) & set(FLATTENED)
    if flattened and (arguments.part == "fits" or not set(arguments.systems.split(",")) <= set(FLATTENED)):
        parser.error(f"{', '.join(sorted(flattened))}: only with part orbits, and without other systems")
    arguments.densities = arguments.densities or ",".join(COMPARED if flattened else DENSITIES)
    if arguments.part == "table":
        table()
    else:
        campaign(arguments)


if __name__ == "__main__":
    main()
