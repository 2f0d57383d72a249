"""How time and memory of a fit grow with the number of stars, stage by stage, and how builds compare.

    python tests/benchmarks/scaling.py run --n-stars 1000,10000,100000,1000000 [--out results/scaling.jsonl]
    python tests/benchmarks/scaling.py run --python BEFORE/bin/python --python AFTER/bin/python --repeats 3
    python tests/benchmarks/scaling.py commands --python BEFORE/bin/python --python AFTER/bin/python --repeats 3
    python tests/benchmarks/scaling.py figure [--out results/scaling.jsonl]       # table on stdout, scaling.png

Every fit is a process of its own: the free-form model of `bayespot.models.spherical` with default settings,
``FitConfig(seed=1)``, on a sample of the isochrone (``--system``, ``--seed``) that is drawn once and read by all.
With several interpreters, one per build in its own environment, the builds take turns. The rows have the wall time
per stage (also of importing, reading and writing), CPU time, the peak of resident memory before the fit and in the
end, and mean and sd of v_c at the radii that hold 2 to 98 % of the stars. ``commands`` times `predict`, `report` and
`check` in the same way. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
QUANTILES = (0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98)


def _peak_mb() -> float:
    """Most memory that this process has ever held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def one_fit(stars: Path, folder: Path) -> dict[str, Any]:
    """Read the stars, fit them and write the run; any build since the first ``save_run`` has what it takes."""
    clock = [("import", time.perf_counter())]
    import numpy as np
    import torch
    from bayespot.models import spherical

    from bayespot import Catalog, FitConfig, Posterior, fit, save_run
    from bayespot.progress import Progress

    clock.append(("reading", time.perf_counter()))
    catalog = Catalog(torch.as_tensor(np.load(stars)))
    model = spherical.build(catalog)
    before = _peak_mb()
    stage = Progress.stage

    def watched(self: Progress, description: str, total: int | None = None) -> None:
        clock.append((description, time.perf_counter()))
        stage(self, description, total)

    Progress.stage = watched  # type: ignore[method-assign]
    result = fit(model, catalog, FitConfig(seed=1), progress=False)
    clock.append(("writing", time.perf_counter()))
    in_fit = _peak_mb()
    save_run(folder / "run", result, catalog)
    clock.append(("end", time.perf_counter()))
    r = np.quantile(torch.linalg.vector_norm(catalog.x, dim=-1).numpy(), QUANTILES)
    v_c = Posterior.from_result(result).field("circular_speed", r)
    seconds: dict[str, float] = {}
    for (name, begun), (_, ended) in itertools.pairwise(clock):
        seconds[name] = round(seconds.get(name, 0.0) + ended - begun, 2)
    return {
        "seconds": seconds,
        "total": round(clock[-1][1] - clock[0][1], 2),
        "cpu": round(time.process_time(), 2),
        "peak_mb_before": round(before),
        "peak_mb_in_fit": round(in_fit),
        "peak_mb": round(_peak_mb()),
        "threads": torch.get_num_threads(),
        "n_components": result.diagnostics.n_components,
        "k_hat": result.diagnostics.k_hat,
        "map_iterations": result.diagnostics.map_iterations,
        "v_c": v_c.mean.tolist(),
        "v_c_sd": v_c.sd.tolist(),
    }


def run(given: argparse.Namespace) -> None:
    """Fit every number of stars with every build in turns; append a line of JSON for each."""
    from bayespot.mock import mock

    given.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for n in (int(float(x)) for x in given.n_stars.split(",")):
            import numpy as np

            stars = Path(folder) / "stars.npy"
            np.save(stars, mock(given.system, n_stars=n, seed=given.seed).w.numpy())
            for repeat in range(given.repeats):
                for python in given.python or [sys.executable]:
                    place = Path(folder) / f"{n}-{repeat}-{len(os.listdir(folder))}"
                    place.mkdir()
                    command = [python, __file__, "child", "--stars", str(stars), "--folder", str(place)]
                    # outside of the folder, or python would import the package that lies there
                    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
                    if done.returncode:
                        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
                    row = json.loads(done.stdout.splitlines()[-1])
                    about = {"build": given.label[(given.python or [sys.executable]).index(python)]}
                    row = about | {"system": given.system, "n_stars": n, "seed": given.seed, "repeat": repeat} | row
                    with given.out.open("a") as file:
                        file.write(json.dumps(row) + "\n")
                    print(f"N = {n}, {about['build']}: {row['total']} s, {row['peak_mb']} MB", flush=True)


def commands(given: argparse.Namespace) -> None:
    """Time `predict`, `report` and `check` of every build, start-up included, on runs of 5000 stars of its own."""
    builds = list(zip(given.python or [sys.executable], given.label, strict=True))
    with tempfile.TemporaryDirectory() as folder:

        def call(python: str, *words: str) -> float:
            begun = time.perf_counter()
            done = subprocess.run(
                [python, "-m", "bayespot", *words], cwd=folder, capture_output=True, text=True, check=False
            )
            if done.returncode:
                raise SystemExit(f"bayespot {' '.join(words)} failed:\n{done.stderr}")
            return time.perf_counter() - begun

        size = ("--n-stars", "5000", "--seed", str(given.seed))
        call(builds[0][0], "simulate", given.system, *size, "-o", "stars.ecsv")
        for python, label in builds:
            call(python, "fit", "spherical", "stars.ecsv", "--seed", "1", "-o", label)
        for repeat in range(given.repeats):
            for name, words in {
                "predict": ("--radii", "0.5:80:50", "-o", "fields.ecsv", "--overwrite"),
                "report": (),
                "check": ("stars.ecsv",),
            }.items():
                for python, label in builds:
                    for drawn in (Path(folder) / label / "figures").glob("*.pdf"):
                        drawn.unlink()  # as after the fit
                    row = {"command": name, "build": label, "repeat": repeat}
                    row["seconds"] = round(call(python, name, label, *words), 2)
                    with given.out.with_stem(given.out.stem + "-commands").open("a") as file:
                        file.write(json.dumps(row) + "\n")
                    print(f"{name}, {label}: {row['seconds']} s", flush=True)


def _medians(path: Path) -> dict[str, dict[int, dict[str, float]]]:
    """By build and number of stars: medians over repeats of the stages' seconds, ``total`` and ``peak_mb``."""
    import numpy as np

    groups: dict[str, dict[int, list[dict[str, float]]]] = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        numbers = row["seconds"] | {key: row[key] for key in ("total", "peak_mb", "k_hat")} | {"runs": 1}
        groups.setdefault(row["build"], {}).setdefault(row["n_stars"], []).append(numbers)
    found: dict[str, dict[int, dict[str, float]]] = {}
    for build, sizes in groups.items():
        for n, rows in sorted(sizes.items()):
            median = {key: float(np.median([row.get(key, 0.0) for row in rows])) for key in rows[0]}
            found.setdefault(build, {})[n] = median | {"runs": len(rows)}
    return found


def figure(path: Path) -> None:
    """Print the medians as a table and draw time and memory against the number of stars, with their slopes."""
    import numpy as np
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter

    from bayespot.report import plots

    found = _medians(path)
    for build, sizes in found.items():
        names = list(next(iter(sizes.values())))
        print(f"| {build} | " + " | ".join(f"N = {n:g}" for n in sizes) + " |\n" + "|---" * (len(sizes) + 1) + "|")
        for name in names:
            print(f"| {name} | " + " | ".join(f"{one.get(name, 0.0):.4g}" for one in sizes.values()) + " |")
    with plots.style():
        drawn = Figure(figsize=(plots.DOUBLE, 0.45 * plots.DOUBLE), layout="constrained")
        for ax, key, label in zip(
            drawn.subplots(1, 2), ("total", "peak_mb"), ("wall time [s]", "peak memory [MB]"), strict=True
        ):
            for (build, sizes), marker in zip(found.items(), "osv^", strict=False):
                n, y = np.array(list(sizes)), np.array([one[key] for one in sizes.values()])
                name = build
                if len(n) > 1:
                    slope = np.log(y[-1] / y[-2]) / np.log(n[-1] / n[-2])
                    name = f"{build}, slope {slope:.2f} at the end"
                ax.semilogx(n, y, marker=marker, ms=3, label=name)
            if key == "total":
                ax.set_yscale("log")
                for axis in (ax.yaxis.set_major_formatter, ax.yaxis.set_minor_formatter):
                    axis(LogFormatter(minor_thresholds=(2, 0.5)))
            else:
                ax.set_ylim(bottom=0)
            ax.set_xlabel("stars")
            ax.set_ylabel(label)
            ax.legend()
        plots.save(drawn, path.with_suffix(".png"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "commands", "figure", "child"))
    parser.add_argument("--n-stars", default="1000,10000,100000,1000000")
    parser.add_argument("--system", default="isochrone")
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--python", action="append", help="interpreter of a build; may be given several times")
    parser.add_argument("--label", action="append", help="its name in the rows, in the same order")
    parser.add_argument("--out", type=Path, default=RESULTS / "scaling.jsonl")
    parser.add_argument("--stars", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.what == "child":
        print(json.dumps(one_fit(given.stars, given.folder)))
        return
    given.label = given.label or given.python or ["this"]
    if given.what == "run":
        run(given)
    elif given.what == "commands":
        commands(given)
    else:
        figure(given.out)


if __name__ == "__main__":
    main()
