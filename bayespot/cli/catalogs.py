"""What commands that read a catalogue share: its options, reading it, and what is said of it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from bayespot.catalog.catalog import Catalog
    from bayespot.catalog.frame import Frame

DROP_INVALID = typer.Option("--drop-invalid", help="Drop rows with NaN or bad parallaxes.")
DROP_DUPLICATES = typer.Option(
    "--drop-duplicates", help="Keep one of rows with the same source_id or the same coordinates."
)
ALLOW_MISSING = typer.Option(
    "--allow-missing",
    help="Keep stars without radial velocity or distance, or with a negative parallax, for models with errors.",
)
HDU = typer.Option(
    "--hdu", help="Number or name of the table in a file with several; default: the first with coordinates."
)
R_SUN = typer.Option("--r-sun", help="Distance of the Sun from the Galactic centre, kpc; default 8.122 (astropy v4.0).")
Z_SUN = typer.Option("--z-sun", help="Height of the Sun above the Galactic plane, kpc; default 0.0208.")
V_SUN = typer.Option("--v-sun", help="VX,VY,VZ of the Sun with the Galaxy's rotation, km/s; default 12.9,245.6,7.78.")

#: What messages call the options in Python, and what they are here.
_OPTIONS = {
    r"\bdrop_invalid=True": "--drop-invalid",
    r"\bdrop_duplicates=True": "--drop-duplicates",
    r"\ballow_missing=True": "--allow-missing",
    r"\boverwrite=True": "--overwrite",
    r"\bhdu='?([^'\s,:;)]+)'?": r"--hdu \1",
    r"\bhdu=": "--hdu",
    r"\br_sun = ": "--r-sun ",
    r"\bz_sun = ": "--z-sun ",
    r"\bv_sun = ": "--v-sun ",
}


def in_options(message: str) -> str:
    """Return a message with the command line's names of the options."""
    for python, option in _OPTIONS.items():
        message = re.sub(python, option, message)
    return message


def frame_of(r_sun: float | None, z_sun: float | None, v_sun: str | None) -> Frame | None:
    """Return the frame that the options ask for, None without any.

    Raises
    ------
    ValueError
        If ``v_sun`` is not three numbers.
    """
    from bayespot.catalog.frame import Frame

    given: dict[str, object] = {}
    if r_sun is not None:
        given["r_sun"] = r_sun
    if z_sun is not None:
        given["z_sun"] = z_sun
    if v_sun is not None:
        try:
            numbers = tuple(float(part) for part in v_sun.replace(",", " ").split())
        except ValueError:
            numbers = ()
        if len(numbers) != 3:
            raise ValueError(f"--v-sun takes VX,VY,VZ in km/s, for instance 12.9,245.6,7.78; got {v_sun!r}")
        given["v_sun"] = numbers
    return Frame(**given) if given else None  # type: ignore[arg-type]


def read_catalog(
    path: Path,
    *,
    drop_invalid: bool,
    drop_duplicates: bool,
    allow_missing: bool,
    hdu: str | None,
    r_sun: float | None,
    z_sun: float | None,
    v_sun: str | None,
    frame: Any = None,
) -> Catalog:
    """Read a catalogue with the command line's options; ``frame`` is taken where these name none.

    Whether its stars may be one side of the system depends on the model's selection: that is not looked at.
    """
    from bayespot.catalog.catalog import Catalog

    return Catalog.read(
        path,
        hdu=hdu,
        frame=frame_of(r_sun, z_sun, v_sun) or frame,
        drop_invalid=drop_invalid,
        drop_duplicates=drop_duplicates,
        allow_missing=allow_missing,
        check_offset=False,
    )


def read_projected(
    path: Path,
    distance: float | None,
    distance_error: float,
    centre: str | None,
    systemic_velocity: float | None,
    hdu: str | None,
    photometry: Path | None = None,
    complete: bool = False,
) -> Catalog:
    """Read the members of a system on the sky with the command line's options.

    Raises
    ------
    ValueError
        If ``centre`` is not two numbers.
    """
    from bayespot.catalog.projected import ProjectedCatalog

    at = None
    if centre is not None:
        try:
            numbers = tuple(float(part) for part in centre.replace(",", " ").split())
        except ValueError:
            numbers = ()
        if len(numbers) != 2:
            raise ValueError(f"--centre takes RA,DEC in deg, for instance 260.06,57.92; got {centre!r}")
        at = (numbers[0], numbers[1])
    return ProjectedCatalog.read(
        path,
        distance,
        hdu,
        photometry,
        distance_error=distance_error,
        centre=at,
        systemic_velocity=systemic_velocity,
        complete=complete,
    )


def read_fitted(
    run: Path, config: dict[str, Any], path: Path, photometry: Path | None = None, **options: Any
) -> Catalog:
    """Read the catalogue that a run was fitted to, with the options of `read_catalog`, in the run's own frame.

    One of stars on the sky is read as it was for the fit.

    Raises
    ------
    RunError
        If it holds other stars.
    """
    from bayespot.report.manifest import RunError

    fitted = config["catalog"]
    meta = fitted.get("meta", {})
    if "systemic_velocity_kms" in meta:
        stars = _read_again(path, meta, options.get("hdu"), photometry)
    else:
        stars = read_catalog(path, **options, frame=meta.get("frame"))
    if len(stars) != fitted["n_stars"]:
        raise RunError(f"{path} has {len(stars)} stars, {run} was fitted to {fitted['n_stars']}")
    reach, before = float((stars.x**2).sum(-1).max() ** 0.5), fitted["r_q"][-1]
    if abs(reach / before - 1) > 1e-6:
        raise RunError(f"{path} reaches {reach:.6g} kpc, the stars that {run} was fitted to {before:.6g} kpc")
    return stars


def _read_again(path: Path, meta: dict[str, Any], hdu: str | None, photometry: Path | None) -> Catalog:
    """Read stars on the sky with the options that ``meta`` notes."""
    from bayespot.catalog.projected import ProjectedCatalog

    centre = meta.get("centre_deg")
    return ProjectedCatalog.read(
        path,
        meta.get("distance_kpc"),
        hdu,
        photometry,
        distance_error=meta.get("distance_error_kpc", 0.0),
        centre=None if centre is None else (centre[0], centre[1]),
        systemic_velocity=meta["systemic_velocity_kms"],
        complete=meta.get("complete", False),
    )


def show_notes(stars: Catalog) -> None:
    """Say what was replaced or dropped in reading, and what makes one doubt the stars."""
    for note in [*stars.meta.get("notes", []), *stars.doubts()]:
        typer.echo(f"note: {in_options(str(note))}", err=True)
