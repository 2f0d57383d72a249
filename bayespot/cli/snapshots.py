"""`bayespot snapshot`: stars of an N-body simulation as a catalogue."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from bayespot.cli.tables import OUTPUT


def snapshot(
    path: Annotated[
        Path, typer.Argument(help="HDF5 file of GADGET, AREPO, GIZMO or SWIFT, one of many, or their folder.")
    ],
    output: Annotated[Path, OUTPUT],
    particles: Annotated[
        str, typer.Option(help="Type: stars, gas, dm, disk, bulge, bh, a number, or several: disk,bulge.")
    ] = "stars",
    max_stars: Annotated[int | None, typer.Option(min=1, help="Keep a random subsample of so many.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Random seed of the subsample.")] = 0,
    radius: Annotated[
        float | None, typer.Option(help="Leave out what is beyond, kpc; a selection that the model must have too.")
    ] = None,
    centre: Annotated[str | None, typer.Option(help="Known centre X,Y,Z in physical kpc.")] = None,
    centre_on: Annotated[
        str | None, typer.Option(help="Type that gives centre and bulk velocity, or all; the chosen one by default.")
    ] = None,
    unit_length: Annotated[str | None, typer.Option(help="The code's unit of length, for instance kpc.")] = None,
    unit_velocity: Annotated[str | None, typer.Option(help="The code's unit of velocity, for instance km/s.")] = None,
    comoving: Annotated[
        bool | None,
        typer.Option("--comoving/--no-comoving", help="Whether the run expands, if the file does not tell."),
    ] = None,
    hubble_param: Annotated[float | None, typer.Option(help="h, H0 in 100 km/s/Mpc.")] = None,
    hubble_flow: Annotated[bool, typer.Option(help="Add H(a) r to the velocities of comoving runs.")] = True,
    periodic: Annotated[
        bool | None, typer.Option("--periodic/--no-periodic", help="Whether the box is periodic, if in doubt.")
    ] = None,
    partial: Annotated[bool, typer.Option("--partial", help="Accept a cut-out of a snapshot.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing file.")] = False,
) -> None:
    """Write particles of an N-body snapshot, in physical kpc and km/s about their centre, as a catalogue.

    Example: `bayespot snapshot snap_099.0.hdf5 -o stars.ecsv --particles stars --max-stars 20000 --seed 1`
    """
    from bayespot.catalog.catalog import Catalog, CatalogError
    from bayespot.catalog.io import check_place

    try:
        check_place(output, overwrite)
        catalog = Catalog.read_snapshot(
            path,
            particles,
            max_stars=max_stars,
            seed=seed,
            radius=radius,
            centre=None if centre is None else _triple(centre),
            centre_on=centre_on,
            unit_length=unit_length,
            unit_velocity=unit_velocity,
            comoving=comoving,
            hubble_param=hubble_param,
            hubble_flow=hubble_flow,
            periodic=periodic,
            partial=partial,
        )
    except CatalogError as error:
        raise CatalogError(_as_options(str(error))) from error
    catalog.write(output, overwrite=overwrite)
    typer.echo(f"{output}: {catalog.summary()}")


def _triple(text: str) -> tuple[float, float, float]:
    try:
        x, y, z = (float(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f"--centre takes X,Y,Z in kpc, for instance 35000,35000,12000.5; got {text!r}") from error
    return x, y, z


def _as_options(message: str) -> str:
    """Turn Python's arguments in a message into the command line's options."""

    def option(match: re.Match[str]) -> str:
        name, value = match[1].replace("_", "-"), match[2].strip("'")
        flags = {"True": f"--{name}", "False": f"--no-{name}"}
        return flags.get(value, f"--{name} {value}")

    return re.sub(
        r"\b(unit_length|unit_velocity|comoving|hubble_param|hubble_flow|periodic|partial|overwrite)=('[^']*'|[\w.]+)",
        option,
        message,
    )
