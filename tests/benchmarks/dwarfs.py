"""Dwarf spheroidals from places and line-of-sight velocities: mocks of others, and real galaxies beside the literature.

    python tests/benchmarks/dwarfs.py challenge DATA --jobs 2     # six mocks of the Gaia Challenge, 1000 stars each
    python tests/benchmarks/dwarfs.py galaxies DATA --jobs 2      # rho(150 pc) of six galaxies
    python tests/benchmarks/dwarfs.py summary DATA                # tables, dwarfs.json and .png

DATA is a folder with the files gaiachallenge_*.dat, dsph_*_spec.dat, dsph_density150pc_literature.csv (github
justinread/gravsphere; Read et al. 2019 and 2021, Walker et al. 2009, Spencer et al. 2018) and lvdb_dwarf_mw.csv
(Pace 2024): public, but without a licence to ship the first three. All are fitted with
`bayespot.models.dwarf_spheroidal`, seed 1; nothing of a truth or of another's result enters.

``challenge``: places count (the samples are complete) or not (``given places``), velocities along z with errors of
2 km/s. The slope of rho is that at the half-light radius in space, 1.305 times the tracers' scale radius.
``galaxies`` (open symbols: k-hat above 0.7): members of probability above 0.9, distances, centres and proper motions of
the Local Volume Database; the places do not count.

One line of JSON per fit is appended to results/dwarfs.jsonl; what is there is skipped.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bayespot.models import dwarf_spheroidal
from calibration import commit, read_rows

from bayespot import FitConfig, Posterior, fit
from bayespot.catalog import ProjectedCatalog
from bayespot.posterior import astrophysical_factors, velocity_check

RESULTS = Path(__file__).parent / "results"
ROWS = RESULTS / "dwarfs.jsonl"
QUANTILES = (0.025, 0.16, 0.5, 0.84, 0.975)
#: Of the challenge's mocks: rho_0 (Msun/kpc^3), inner slope, scale radius of the stars (kpc).
MOCKS = {"core": (4e8, 0.0, 0.25), "cusp": (6.4e7, 1.0, 0.10)}
HALF_LIGHT = 1.305
#: Files, keys of the database and names of the table of the literature.
GALAXIES = {
    "leo2": ("leo_2", "LeoII"),
    "umi": ("ursa_minor_1", "UrsaMinor"),
    "sex": ("sextans_1", "Sextans"),
    "car": ("carina_1", "Carina"),
    "scl": ("sculptor_1", "Sculptor"),
    "for": ("fornax_1", "Fornax"),
}
LITERATURE = ("read2019", "andrade2023", "hayashi2020", "kaplinghat2019_iso", "kaplinghat2019_nfw")
RADII = np.array([0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0])


def challenge(data: Path, kind: str, number: int, complete: bool) -> tuple[ProjectedCatalog, dict[str, Any]]:
    """One mock, and what is true of it at `RADII` times the half-light radius on the sky and at the one in space."""
    (path,) = data.glob(f"gaiachallenge_*_{kind}_*_{number}_err.dat")
    w = np.loadtxt(path)
    rho_0, gamma, scale = MOCKS[kind]
    stars = ProjectedCatalog.of(w[:, 0], w[:, 1], w[:, 5], 2.0, photometric=complete)
    r = RADII * np.median(np.hypot(w[:, 0], w[:, 1]))

    def rho(x: Any) -> Any:
        return rho_0 * x**-gamma * (1 + x) ** (gamma - 3)

    fine = np.geomspace(1e-6, 10, 20_000)
    mass = np.concatenate([[0.0], np.cumsum(np.diff(fine) * 4 * np.pi * (fine**2 * rho(fine))[1:])])
    at = HALF_LIGHT * scale
    return stars, {
        "r": r.tolist(),
        "enclosed_mass": np.interp(r, fine, mass).tolist(),
        "density": rho(r).tolist(),
        "r_half": at,
        "slope": -gamma - (3 - gamma) * at / (1 + at),
    }


def galaxy(data: Path, key: str) -> ProjectedCatalog:
    """The members of a real galaxy."""
    with (data / "lvdb_dwarf_mw.csv").open() as file:
        known = next(row for row in csv.DictReader(file) if row["key"] == GALAXIES[key][0])
    number = {name: float(value) for name, value in known.items() if name in _NUMBERS}
    columns = np.loadtxt(data / f"dsph_{key}_spec.dat")
    member = (columns[:, 15] > 0.9) & (columns[:, 6] != 0)
    from astropy.table import Table

    names = ("ra", "dec", "radial_velocity", "radial_velocity_error")
    table = Table(columns[member][:, [0, 1, 6, 7]], names=names)
    distance = 10 ** (number["distance_modulus"] / 5 - 2)
    error = distance * np.log(10) / 5 * (number["distance_modulus_em"] + number["distance_modulus_ep"]) / 2
    return ProjectedCatalog.of_table(
        table,
        distance,
        error,
        (number["ra"], number["dec"]),
        number["vlos_systemic"],
        (number["pmra"], number["pmdec"]),
    )


_NUMBERS = (
    "ra",
    "dec",
    "distance_modulus",
    "distance_modulus_em",
    "distance_modulus_ep",
    "vlos_systemic",
    "pmra",
    "pmdec",
)


def one_fit(job: str, data: Path) -> dict[str, Any]:
    """Fit what ``job`` names and summarise."""
    torch.set_num_threads(1)
    kind, *which = job.split()
    truth: dict[str, Any] = {}
    if kind in MOCKS:
        stars, truth = challenge(data, kind, int(which[0]), which[1] == "complete")
        r, r_half = np.array(truth["r"]), truth["r_half"]
    else:
        stars = galaxy(data, which[0])
        half = float(np.median(np.hypot(*stars.sky_positions.T)))
        r, r_half = RADII * half, half
    begun = time.perf_counter()
    result = fit(dwarf_spheroidal.build(stars), stars, FitConfig(seed=1), progress=False)
    seconds = time.perf_counter() - begun
    posterior = Posterior.from_result(result)
    fields = {
        "enclosed_mass": posterior.field("enclosed_mass", r).draws,
        "density": posterior.field("density", r).draws,
        "slope": posterior.field("density_slope", [r_half]).draws[:, 0],
        "rho_150": posterior.field("density", [0.15]).draws[:, 0],
    }
    if "distance_kpc" in stars.meta:
        factors = astrophysical_factors(posterior.thinned(200), [0.5])
        fields |= {"log10_J": np.log10(factors.J[:, 0]), "log10_D": np.log10(factors.D[:, 0])}
    found = result.diagnostics
    return {
        "job": job,
        "n": len(stars),
        "r": r.tolist(),
        "r_half": r_half,
        "quantiles": {name: np.quantile(draws, QUANTILES, axis=0).tolist() for name, draws in fields.items()},
        "truth": truth,
        "p_values": velocity_check(posterior, stars, 100).p_values,
        "k_hat": found.k_hat,
        "outliers": found.outlier_fraction,
        "seconds": round(seconds, 1),
        "commit": commit(),
    }


def jobs_of(command: str) -> list[str]:
    """What is fitted."""
    if command == "galaxies":
        return [f"galaxy {key}" for key in GALAXIES]
    return [f"{kind} {i} {how}" for how in ("complete", "given") for i in range(3) for kind in MOCKS]


def campaign(command: str, data: Path, n_jobs: int) -> None:
    """Make the fits that are missing."""
    done = {row["job"] for row in read_rows(ROWS)}
    missing = [job for job in jobs_of(command) if job not in done]
    with ProcessPoolExecutor(n_jobs, mp_context=get_context("spawn")) as pool:
        jobs = {pool.submit(one_fit, job, data): job for job in missing}
        for finished in as_completed(jobs):
            if (error := finished.exception()) is not None:
                print(f"{jobs[finished]}: {type(error).__name__}: {error}", flush=True)
                continue
            row = finished.result()
            with ROWS.open("a") as file:
                file.write(json.dumps(row, separators=(",", ":")) + "\n")
            print(f"{row['job']}: {row['seconds']:.0f} s", flush=True)


def literature(data: Path) -> dict[str, dict[str, tuple[float, float, float]]]:
    """Published rho(150 pc) in 1e7 Msun/kpc^3 with lower and upper errors, by galaxy and work."""
    with (data / "dsph_density150pc_literature.csv").open() as file:
        header, *lines = csv.reader(file)
    found: dict[str, dict[str, tuple[float, float, float]]] = {}
    for line in lines:
        own = found[line[0]] = {}
        for work in LITERATURE:
            place = header.index(f"rho150_{work}")
            if line[place]:
                own[work] = (float(line[place]), float(line[place + 1]), float(line[place + 2]))
    return found


def summary(data: Path) -> None:
    """Print the tables, write dwarfs.json and draw dwarfs.png."""
    from matplotlib.figure import Figure

    from bayespot.report import plots

    found: dict[str, Any] = {"challenge": {}, "galaxies": {}}
    for how in ("complete", "given"):
        for kind in MOCKS:
            some = [row for row in read_rows(ROWS) if row["job"].startswith(kind) and row["job"].endswith(how)]
            if not some:
                continue
            slopes = np.array([row["quantiles"]["slope"] for row in some])
            true = np.array([row["truth"]["slope"] for row in some])
            inside = [float(np.mean([_holds(row, "enclosed_mass", edge) for row in some])) for edge in (1, 0)]
            found["challenge"][f"{kind} {how}"] = {
                "slope_error": (abs(slopes[:, 2] / true - 1)).round(3).tolist(),
                "slope_half_width": (abs((slopes[:, 3] - slopes[:, 1]) / 2 / true)).round(3).tolist(),
                "mass_coverage_68_95": [round(value, 2) for value in inside],
                "seconds": [row["seconds"] for row in some],
            }
            print(kind, how, found["challenge"][f"{kind} {how}"])
    published = literature(data)
    some = [row for row in read_rows(ROWS) if row["job"].startswith("galaxy")]
    with plots.style():
        figure = Figure(figsize=(plots.DOUBLE, 0.45 * plots.DOUBLE), layout="constrained")
        ax = figure.subplots()
        colours = [plots.ORANGE, plots.GREEN, plots.VERMILION, plots.GREY, "black"]
        for i, row in enumerate(some):
            name = GALAXIES[row["job"].split()[1]][1]
            q = np.array(row["quantiles"]["rho_150"]) / 1e7
            found["galaxies"][name] = {
                "n": row["n"],
                "rho_150": q.round(2).tolist(),
                "log10_J": np.round(row["quantiles"]["log10_J"], 2).tolist(),
                "log10_D": np.round(row["quantiles"]["log10_D"], 2).tolist(),
                "p_values": row["p_values"],
                "k_hat": row["k_hat"],
                "seconds": row["seconds"],
            }
            print(name, row["n"], f"rho_150 = {q[2]:.1f} ({q[1]:.1f} to {q[3]:.1f}) 1e7", published[name])
            ax.errorbar(
                i - 0.3,
                q[2],
                [[q[2] - q[1]], [q[3] - q[2]]],
                fmt="s",
                color=plots.BLUE,
                mfc=plots.BLUE if row["k_hat"] <= 0.7 else "white",
                label="bayespot" if not i else None,
            )
            for work, (value, low, high) in published[name].items():
                at = i - 0.18 + 0.1 * LITERATURE.index(work)
                label = _WORKS[work] if i == 0 else None
                ax.errorbar(
                    at, value, [[low], [high]], fmt="o", ms=3, color=colours[LITERATURE.index(work)], label=label
                )
        ax.set_xticks(range(len(some)), [GALAXIES[row["job"].split()[1]][1] for row in some])
        ax.set_yscale("log")
        ax.set_ylabel(r"$\rho(150\,{\rm pc})$ [$10^7\,M_\odot$ kpc$^{-3}$]")
        figure.legend(loc="outside upper center", ncols=3)
        if some:
            plots.save(figure, RESULTS / "dwarfs.png")
    (RESULTS / "dwarfs.json").write_text(json.dumps(found, indent=1))


_WORKS = {
    "read2019": "Read et al. 2019",
    "andrade2023": "Andrade et al. 2023",
    "hayashi2020": "Hayashi et al. 2020",
    "kaplinghat2019_iso": "Kaplinghat et al. 2019, isothermal",
    "kaplinghat2019_nfw": "Kaplinghat et al. 2019, NFW",
}


def _holds(row: dict[str, Any], name: str, edge: int) -> float:
    """Share of the radii whose truth lies between the quantile ``edge`` and its mirror image."""
    q, true = np.array(row["quantiles"][name]), np.array(row["truth"][name])
    return float(((q[edge] < true) & (true < q[-1 - edge])).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["challenge", "galaxies", "summary"])
    parser.add_argument("data", type=Path, help="folder of the public data")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    arguments = parser.parse_args()
    if arguments.command == "summary":
        summary(arguments.data)
    else:
        campaign(arguments.command, arguments.data, arguments.jobs)


if __name__ == "__main__":
    main()
