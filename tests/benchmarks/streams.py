"""What stellar streams add to a snapshot, and how far their posterior can be trusted: the README's figures.

    python tests/benchmarks/streams.py parametric --seeds 801-808
    python tests/benchmarks/streams.py bands --seeds 801-801

Isochrone, M = 1e11 Msun, b = 3 kpc; a snapshot of 2000 stars and three streams of 80 stars, of three kinds:

``arc``       actions scatter by 1 %, independently of the angles, which cover an arc of 2 rad;
``stripped``  actions scatter by 1 %, stars left the progenitor at times uniform over 4 Gyr and drifted apart since:
              actions are ordered along the stream;
``spray``     particle spray: stars left a progenitor of 2e3 Msun at its Lagrange points during 5 Gyr, with
              leading and trailing arms (dispersions of J about 1 %).

``parametric`` fits M and b (exact actions) to the snapshot, to each kind alone (and alone with slope=False), and to
both; a row per seed with z and posterior sd of ln M and ln b, then rms z over seeds and ratios of sd.
``bands`` fits the free-form network of 8 features to snapshot, and snapshot and ``stripped`` streams: v_c(r).
Writes results/streams.json or streams-bands.json, and .png, beside this file after each row. The truth enters only
after the fit.
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
from bayespot.models import isochrone

from bayespot import Catalog, FitConfig, Isochrone, MassSlopeNetwork, Posterior, SnapshotModel, SphericalMixture, fit
from bayespot.actions import IsochroneActions
from bayespot.likelihood import Stream, UniformOrbits, stacked
from bayespot.mock import mock
from bayespot.potential import truth_field
from bayespot.report.plots import BLUE, ORANGE, VERMILION, save, stars, style

TRUE = Isochrone(1e11, 3.0)
FINDER = IsochroneActions()
#: (J_r, J_phi, J_z) of the progenitors in kpc km/s.
ORBITS = {"one": (300.0, 900.0, 700.0), "two": (150.0, -1200.0, 400.0), "three": (500.0, 600.0, 1500.0)}
N_SNAPSHOT, N_STREAM = 2000, 80
#: Gyr in kpc/(km/s).
GYR = 1 / 0.9778
RADII = np.geomspace(0.5, 40.0, 40)
CASES = ("snapshot", "arc", "stripped", "spray", "stripped-no-slope", "spray-no-slope", "both-arc", "both-stripped")
NAMES = {"m_tot": 1e11, "r_s": 3.0}


def place(J: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
    """Phase-space positions of actions and angles."""
    return FINDER.phase_space(TRUE, J, torch.remainder(theta, 2 * math.pi)).detach()


def mock_stream(kind: str, orbit: tuple[float, float, float], seed: int) -> Catalog:
    """A stream of the kind about the progenitor's orbit, at a random place on it."""
    g, n = torch.Generator().manual_seed(seed), N_STREAM

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=g, dtype=torch.float64)

    J_p = torch.tensor(orbit, dtype=torch.float64).expand(n, 3)
    theta_p = (2 * math.pi * uniform(3)).expand(n, 3)
    Omega_p = FINDER.actions_angles(TRUE, place(J_p, theta_p)).Omega
    if kind == "spray":
        return Catalog(_spray(J_p, theta_p, Omega_p, 5 * GYR * uniform(n, 1), normal))
    J = J_p * (1 + 0.01 * normal(n, 3))
    if kind == "arc":
        return Catalog(place(J, theta_p + 2 * (uniform(n, 1) - 0.5) * Omega_p / Omega_p[:, 2:].abs()))
    drift = (FINDER.actions_angles(TRUE, place(J, theta_p)).Omega - Omega_p) * 4 * GYR * uniform(n, 1)
    return Catalog(place(J, theta_p + drift + 0.01 * normal(n, 3)))


def _spray(J_p: torch.Tensor, theta_p: torch.Tensor, Omega_p: torch.Tensor, t: torch.Tensor, normal: Any) -> Any:
    """Stars released a time t ago about 2 tidal radii from the progenitor, without its pull since."""
    n = len(t)
    x, v = place(J_p, theta_p - Omega_p * t).split(3, -1)
    r = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    L = torch.linalg.cross(x, v)
    outward, size = x / r, torch.linalg.vector_norm(L, dim=-1, keepdim=True)
    forward = torch.linalg.cross(L / size, outward)
    tidal = r * (2e3 / (2 * TRUE.enclosed_mass(r).detach())) ** (1 / 3)
    side = torch.where(normal(n, 1) < 0, -1.0, 1.0)
    x = x + side * (2 + 0.4 * normal(n, 1)) * tidal * outward + 0.5 * tidal * normal(n, 3)
    v = v + side * (0.3 + 0.4 * normal(n, 1)) * size / r**2 * tidal * forward + 0.2 * normal(n, 3)
    J, theta, Omega = FINDER.actions_angles(TRUE, torch.cat([x, v], -1))
    return place(J, theta + Omega * t)


def mock_streams(kind: str, seed: int, slope: bool = True) -> list[Stream]:
    """Three streams."""
    orbits = enumerate(ORBITS.items())
    return [Stream(name, mock_stream(kind, orbit, 1000 * seed + i), slope=slope) for i, (name, orbit) in orbits]


def parametric(seed: int) -> dict[str, Any]:
    """z and sd of ln M and ln b for every case."""
    catalog = mock("isochrone", n_stars=N_SNAPSHOT, seed=seed)
    config = FitConfig(seed=seed, n_draws=1000, k_hat_draws=50)
    row: dict[str, Any] = {"seed": seed}
    for case in CASES:
        kind = case.removeprefix("both-").removesuffix("-no-slope")
        streams = [] if case == "snapshot" else mock_streams(kind, seed, slope="no-slope" not in case)
        with_snapshot = case == "snapshot" or case.startswith("both")
        data = catalog if with_snapshot else stacked(streams)
        df = SphericalMixture() if with_snapshot else UniformOrbits()
        begun = time.perf_counter()
        result = fit(SnapshotModel(isochrone.build(data).potential, df, FINDER, streams=streams), data, config)
        found: dict[str, Any] = {"seconds": time.perf_counter() - begun, "warnings": result.diagnostics.warnings}
        for name, true in NAMES.items():
            draws = result.draws[f"potential.{name}"].log()
            found[name] = {"z": float((draws.mean() - math.log(true)) / draws.std()), "sd": float(draws.std())}
        row[case] = found
    return row


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Over seeds: rms and mean z, median sd, and the median ratio of sd to the snapshot's."""
    out: dict[str, Any] = {}
    for case in CASES:
        for name in NAMES:
            z, sd = (np.array([row[case][name][key] for row in rows]) for key in ("z", "sd"))
            ratio = sd / np.array([row["snapshot"][name]["sd"] for row in rows])
            out[f"{case} {name}"] = {
                "rms_z": float((z**2).mean() ** 0.5),
                "mean_z": float(z.mean()),
                "median_sd": float(np.median(sd)),
                "median_ratio_to_snapshot": float(np.median(ratio)),
            }
    return out


def bands(seed: int) -> dict[str, Any]:
    """v_c(r) in free form with and without the streams."""
    catalog = mock("isochrone", n_stars=N_SNAPSHOT, seed=seed)
    truth = truth_field(TRUE, "circular_speed", RADII)
    streams = mock_streams("stripped", seed)
    r = torch.linalg.vector_norm(stacked(streams).x, dim=-1)
    row: dict[str, Any] = {"seed": seed, "truth": list(truth), "stream_radii": [float(x) for x in r]}
    for name, used in (("snapshot", []), ("both", streams)):
        potential = MassSlopeNetwork.for_stars(catalog.w, n_features=8)
        begun = time.perf_counter()
        result = fit(SnapshotModel(potential, SphericalMixture(), streams=used), catalog, FitConfig(seed=seed))
        field = Posterior.from_result(result).thinned(500).field("circular_speed", RADII)
        row[name] = {
            "seconds": time.perf_counter() - begun,
            "warnings": result.diagnostics.warnings,
            "k_hat": result.diagnostics.k_hat,
            "quantiles": field.quantile([0.025, 0.16, 0.5, 0.84, 0.975]).tolist(),
            "sd_percent": list(100 * field.sd / truth),
            "z": list((field.mean - truth) / field.sd),
        }
    return row


def draw_parametric(rows: list[dict[str, Any]], path: Path) -> None:
    """Error of ln M and ln b with posterior sd, seed by seed."""
    from matplotlib.figure import Figure

    shown = {"snapshot": BLUE, "stripped": ORANGE, "both-stripped": VERMILION}
    labels = {"snapshot": "snapshot", "stripped": "streams", "both-stripped": "both"}
    with style():
        figure = Figure(figsize=(7.1, 3.2), layout="constrained")
        axes = figure.subplots(1, 2)
        for ax, name, label in zip(axes, NAMES, (r"$M$", r"$b$"), strict=True):
            for k, (case, color) in enumerate(shown.items()):
                sd = np.array([row[case][name]["sd"] for row in rows])
                error = np.array([row[case][name]["z"] for row in rows]) * sd
                seeds = np.array([row["seed"] for row in rows]) + 0.2 * (k - 1)
                ax.errorbar(seeds, 100 * error, 100 * sd, fmt="o", ms=3.5, color=color, lw=1.2, label=labels[case])
            ax.axhline(0, color="black", ls="--", lw=0.8)
            ax.set_xlabel("seed")
            ax.set_ylabel(f"error of {label} [%]")
            ax.set_xticks([row["seed"] for row in rows])
            ax.set_xticklabels([row["seed"] for row in rows], rotation=45)
        low, high = axes[0].get_ylim()
        axes[0].set_ylim(low, high + 0.3 * (high - low))
        axes[0].legend(ncol=3, columnspacing=0.8, handletextpad=0.2, loc="upper center")
        save(figure, path)


def draw_bands(rows: list[dict[str, Any]], path: Path) -> None:
    """Bands of v_c of the first seed over the truth, and their errors; radii of the streams' stars shaded."""
    from matplotlib.figure import Figure

    row = rows[0]
    truth = np.array(row["truth"])
    with style():
        figure = Figure(layout="constrained")
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[1.6, 1])
        for name, color, label in (("snapshot", BLUE, "snapshot"), ("both", VERMILION, "snapshot and streams")):
            low95, low68, median, high68, high95 = np.array(row[name]["quantiles"])
            for ax, scaled in ((upper, lambda y: y), (lower, lambda y: 100 * (y / truth - 1))):
                ax.fill_between(RADII, scaled(low95), scaled(high95), color=color, alpha=0.15, lw=0)
                ax.fill_between(RADII, scaled(low68), scaled(high68), color=color, alpha=0.35, lw=0, label=label)
                ax.plot(RADII, scaled(median), color=color, lw=1.2)
        upper.plot(RADII, truth, color="black", ls="--", lw=1.1, label="truth")
        lower.axhline(0, color="black", ls="--", lw=0.9)
        upper.set_xscale("log")
        upper.set_xlim(RADII[0], RADII[-1])
        stars(upper, row["stream_radii"])
        upper.set_ylabel(r"$v_c$ [km s$^{-1}$]")
        upper.set_ylim(0)
        upper.legend(title="68 and 95 % bands", alignment="left", loc=(0.5, 0.2))
        # inside 2 kpc, where few stars and no streams are, bands are several times wider than shown
        ends = np.array(row["snapshot"]["quantiles"])[[0, -1]][:, RADII > 2] / truth[RADII > 2]
        width = 110 * np.abs(ends - 1).max()
        lower.set_ylim(-width, width)
        lower.set_ylabel("error [%]")
        lower.set_xlabel(r"$r$ [kpc]")
        lower.set_xticks([0.5, 1, 2, 5, 10, 20, 40], ["0.5", "1", "2", "5", "10", "20", "40"])
        lower.minorticks_off()
        save(figure, path)


def main() -> None:
    """Run one case over its seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=["parametric", "bands"])
    parser.add_argument("--seeds", required=True, help="FIRST-LAST")
    arguments = parser.parse_args()
    first, last = map(int, arguments.seeds.split("-"))
    of_bands = arguments.case == "bands"
    path = Path(__file__).parent / "results" / ("streams-bands.json" if of_bands else "streams.json")
    machine = {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    document: dict[str, Any] = {"n_snapshot": N_SNAPSHOT, "n_stream": N_STREAM, "machine": machine, "rows": []}
    for seed in range(first, last + 1):
        row = bands(seed) if of_bands else parametric(seed)
        print(json.dumps(row), flush=True)
        document["rows"].append(row)
        document |= {"radii": list(RADII)} if of_bands else {"summary": summary(document["rows"])}
        path.write_text(json.dumps(document, indent=1) + "\n")
        (draw_bands if of_bands else draw_parametric)(document["rows"], path.with_suffix(".png"))


if __name__ == "__main__":
    main()
