"""Execute the notebooks and store their outputs in place.

    python notebooks/execute.py [--size full] [01_isochrone 02_posterior_checks ...]

Needs ``pip install ".[test]"``. At full size each takes a few minutes on one core; run one at a time.
"""

from __future__ import annotations

import argparse
import base64
import io
import os
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from PIL import Image

FOLDER = Path(__file__).parent
_COLOURS = 128


def names() -> list[str]:
    """Return the names of the notebooks, in order."""
    return sorted(path.stem for path in FOLDER.glob("*.ipynb"))


def execute(name: str, size: str, timeout: float = 1800) -> Any:
    """Return a notebook executed at ``size`` (``"small"`` or ``"full"``) in a fresh folder and kernel.

    Raises
    ------
    nbclient.exceptions.CellExecutionError
        If a cell raises.
    """
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    settings = {
        "BAYESPOT_NOTEBOOK_SIZE": size,
        "OMP_NUM_THREADS": "1",
        # of tqdm, where ipywidgets are not installed: it holds a path of the machine
        "PYTHONWARNINGS": "ignore:IProgress not found",
    }
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook,
            timeout=int(timeout),
            kernel_name="python3",
            resources={"metadata": {"path": folder}},
            record_timing=False,
            coalesce_streams=True,
        )
        client.execute(env={**os.environ, **settings})
    quantise(notebook)
    # which Python ran it is no part of the result
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return notebook


def quantise(notebook: Any) -> None:
    """Store the pictures of a notebook in few colours: a third of the room, and no difference that one sees."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if "image/png" not in output.get("data", {}):
                continue
            picture = Image.open(io.BytesIO(base64.b64decode(output.data["image/png"]))).convert("RGB")
            file = io.BytesIO()
            picture.quantize(_COLOURS).save(file, "PNG", optimize=True)
            output.data["image/png"] = base64.b64encode(file.getvalue()).decode()


def main() -> None:
    """Execute the notebooks named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=names(), metavar="NAME")
    parser.add_argument("--size", choices=("small", "full"), default="full")
    arguments = parser.parse_args()
    for name in arguments.names:
        begun, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        notebook = execute(name, arguments.size)
        nbformat.write(notebook, FOLDER / f"{name}.ipynb")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        size = (FOLDER / f"{name}.ipynb").stat().st_size / 1024
        print(f"{name}: {time.perf_counter() - begun:.0f} s, {cpu:.0f} s CPU, {size:.0f} kB")


if __name__ == "__main__":
    main()
