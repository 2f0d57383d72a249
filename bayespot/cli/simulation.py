"""`bayespot simulate`: mock catalogues with known truth."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bayespot.cli.tables import OUTPUT, check_file_place


def simulate(
    name: Annotated[str, typer.Argument(help="System; `list` shows them all.")],
    output: Annotated[Path | None, OUTPUT] = None,
    n_stars: Annotated[int, typer.Option(min=1, help="Number of stars.")] = 5000,
    seed: Annotated[int, typer.Option(min=0, help="Random seed.")] = 0,
    anisotropy_radius: Annotated[float | None, typer.Option(help="Osipkov-Merritt radius in kpc.")] = None,
    observed: Annotated[
        bool, typer.Option("--observed", help="Heliocentric columns with errors instead of exact positions.")
    ] = False,
    distance_error: Annotated[float, typer.Option(min=0, help="Relative error of distances (with --observed).")] = 0.1,
    pm_error: Annotated[float, typer.Option(min=0, help="Error of proper motions, mas/yr.")] = 0.05,
    v_error: Annotated[float, typer.Option(min=0, help="Error of radial velocities, km/s.")] = 2.0,
    max_distance: Annotated[float | None, typer.Option(help="Keep observed distances up to this, kpc.")] = None,
    min_latitude: Annotated[float | None, typer.Option(help="Keep Galactic latitudes beyond this, deg.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing file.")] = False,
) -> None:
    """Write an equilibrium snapshot with known truth.

    `halo`, `disc` and `disc+halo` are stars of a flattened galaxy, drawn by approximate actions and followed along
    their orbits until they are in equilibrium (half a minute for some thousand); the other systems are exact spheres.
    With --observed it is what a survey from the Sun would list; n-stars counts the stars before cuts.

    Example: `bayespot simulate hernquist-in-nfw --n-stars 10000 --seed 3 -o stars.fits`

    Example: `bayespot simulate isochrone --n-stars 20000 --observed --max-distance 10 --min-latitude 15 -o gaia.fits`
    """
    from bayespot.mock.flattened import GALAXY_STARS, galaxy_mock
    from bayespot.mock.sample import MOCKS, mock
    from bayespot.progress import Progress

    if name == "list":
        typer.echo("\n".join([*MOCKS, *GALAXY_STARS]))
        return
    if output is None:
        raise ValueError("give the file to write with -o, for instance -o stars.ecsv")
    if output.is_dir():
        raise ValueError(f"{output} is a folder; give a file name, for instance {output / 'stars.ecsv'}")
    check_file_place(output, overwrite)
    if not observed and (max_distance is not None or min_latitude is not None):
        raise ValueError("--max-distance and --min-latitude are cuts on what is observed: add --observed")
    if name in GALAXY_STARS:
        if anisotropy_radius is not None:
            raise ValueError(f"{name} has no anisotropy radius: leave --anisotropy-radius out")
        with Progress("lines") as bar:
            bar.stage("placing stars and following their orbits", 1000)
            done = [0]

            def tick(fraction: float) -> None:
                bar.step(n=round(1000 * fraction) - done[0])
                done[0] = round(1000 * fraction)

            catalog = galaxy_mock(name, n_stars=n_stars, seed=seed, tick=tick)
    else:
        catalog = mock(name, n_stars=n_stars, seed=seed, anisotropy_radius=anisotropy_radius)
    if observed:
        from bayespot.likelihood.selection import GalacticLatitude, HeliocentricDistance
        from bayespot.mock.observe import observe

        far = None if max_distance is None else HeliocentricDistance(max_distance)
        low = None if min_latitude is None else GalacticLatitude(min_latitude)
        cut = far * low if far and low else far or low
        catalog = observe(catalog, seed + 1, distance_error, pm_error, v_error, cut)
    catalog.write(output, overwrite=overwrite)
    typer.echo(f"{output}: {catalog.summary()}")
