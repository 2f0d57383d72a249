"""Snapshots of N-body simulations: HDF5 files in the layout of GADGET, AREPO, GIZMO and SWIFT, read in pieces."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from bayespot.catalog.centre import Centre, shrinking_sphere, wrapped
from bayespot.catalog.columns import CatalogError
from bayespot.catalog.snapshot_files import SnapshotFiles, particle_types
from bayespot.catalog.snapshot_units import SnapshotUnits, read_units
from bayespot.units import takes

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

#: Most particles that the centre is found from: a random sample of the rest would not move it.
CENTRE_SAMPLE = 2**19
#: Rows that a sample may hold beyond twice its size before it is thinned.
SLACK = 2**19


class Snapshot(NamedTuple):
    """Particles about their centre: w (n, 6) in kpc and km/s, identifiers if the file has them, and metadata."""

    w: Array
    names: tuple[str, ...] | None
    meta: dict[str, Any]


@takes(radius="length", centre="length")
def read_snapshot(
    path: str | os.PathLike[str],
    particles: str | int = "stars",
    *,
    max_stars: int | None = None,
    seed: int = 0,
    radius: float | None = None,
    centre: tuple[float, float, float] | None = None,
    centre_on: str | int | None = None,
    unit_length: str | None = None,
    unit_velocity: str | None = None,
    comoving: bool | None = None,
    hubble_param: float | None = None,
    hubble_flow: bool = True,
    periodic: bool | None = None,
    partial: bool = False,
) -> Snapshot:
    r"""Read particles of one type, as physical positions and velocities about the system's centre.

    Of comoving runs with scale factor a and h = H0 / (100 km/s/Mpc), :math:`x = a\,x_{file}/h`, and with the Hubble
    flow, which motion in physical coordinates includes, :math:`v = \sqrt{a}\,u_{file} - v_c + H(a)(x - x_c)` (without
    the root in SWIFT, whose velocities are peculiar). Attributes of the datasets (SWIFT, AREPO, GADGET-4, EAGLE) count
    before the header. Cells of AREPO's winds among the stars are left out.

    Files are read in blocks of 2^19 particles, and of the columns only those needed. Memory: about 450 MB, and 300
    bytes per star that is kept.

    Parameters
    ----------
    path
        File, any file of a snapshot that is spread over several (``name.0.hdf5`` ...), or their folder.
    particles
        Type: ``"stars"``, ``"gas"``, ``"dm"`` (or ``"halo"``), ``"disk"``, ``"bulge"``, ``"bh"``, a number, or several
        separated by commas: GADGET's isolated galaxies have their stars in ``"disk,bulge"``.
    max_stars, seed
        Keep a random subsample of at most so many.
    radius
        Leave out what is beyond, kpc; a selection, which the model must have too: ``SphericalShell(0, radius)``.
    centre
        Known centre in physical kpc, from a halo finder for instance; otherwise `shrinking_sphere` finds it.
    centre_on
        Type that the centre and the bulk velocity are found from, ``"all"`` for all; by default ``particles``.
    unit_length, unit_velocity
        The code's units, for instance ``"kpc"`` and ``"km/s"``, where the file does not tell; factors of a and h come
        on top in comoving runs.
    comoving, hubble_param
        State these where the header does not tell or errs.
    hubble_flow
        Whether to add it.
    periodic
        Whether positions wrap around the box; by default if they all lie in it and the file does not deny it.
    partial
        Accept fewer particles than the header announces, as in cut-outs.

    Raises
    ------
    CatalogError
        Names the file, dataset or row, and the remedy.
    """
    _check_options(max_stars, seed, radius, centre)
    kinds = particle_types(particles)
    with SnapshotFiles(Path(path), partial) as files:
        files.require(kinds)
        middle_kinds = (
            kinds if centre_on is None else files.present() if centre_on == "all" else particle_types(centre_on)
        )
        files.require(middle_kinds)
        units = read_units(files.first, files.paths[0], unit_length, unit_velocity, comoving, hubble_param)
        expansion = units.expansion() if hubble_flow else 0.0
        middle, box = _centre(files, units, middle_kinds, periodic, centre, seed)
        kept, n_seen, finest = _Sample(max_stars, seed), 0, 0.0
        for block in _blocks(files, units, kinds, ids=True):
            x = wrapped(block.x - middle.x, box)
            v = block.v - middle.v + expansion * x
            near = np.ones(len(x), bool) if radius is None else (x**2).sum(-1) < radius**2
            n_seen += len(x)
            finest = max(finest, block.grain)
            kept.add(np.concatenate([x, v], 1)[near], None if block.ids is None else block.ids[near])
        w, ids = kept.take()
        if not len(w):
            raise CatalogError(
                f"{files.paths[0]}: none of {n_seen} particles is within {radius:g} kpc of the centre "
                f"({_triple(middle.x)}) kpc; take a larger radius or check the centre"
            )
        meta = _meta(files, units, middle, box, expansion, (str(particles), n_seen, len(w)))
        meta["notes"] = _notes(files, units, middle, kept.n_offered, n_seen, radius, expansion, finest, w, centre)
        if max_stars is not None:
            meta["snapshot"]["seed"] = seed
    return Snapshot(w, None if ids is None else tuple(map(str, ids.tolist())), meta)


class _Block(NamedTuple):
    """Particles in physical kpc and km/s; ``grain`` is the spacing of the file's positions in kpc."""

    x: Array
    v: Array
    mass: Array
    ids: Array | None
    grain: float


def _blocks(files: SnapshotFiles, units: SnapshotUnits, kinds: list[int], ids: bool = False) -> Iterator[_Block]:
    for kind in kinds:
        for raw in files.blocks(kind, ids):
            length, velocity = (units.factor(raw.datasets[i], k) for i, k in enumerate(("length", "velocity")))
            largest = np.abs(raw.x).max(initial=0)
            grain = float(np.spacing(largest.astype(raw.x.dtype))) if raw.x.dtype.kind == "f" else 1.0
            yield _Block(
                raw.x.astype(float) * length, raw.v.astype(float) * velocity, raw.mass, raw.ids, grain * length
            )


class _Sample:
    """A uniform random sample of at most n of the rows that come block after block, whatever the blocks."""

    def __init__(self, n: int | None, seed: int) -> None:
        self._n, self._rng, self._held = n, np.random.default_rng(seed), 0
        self._parts: list[tuple[Array, ...]] = []
        self.n_offered = 0

    def add(self, rows: Array, ids: Array | None) -> None:
        # a row is kept if its random number is among the n smallest
        order = np.arange(self.n_offered, self.n_offered + len(rows))
        key = order.astype(float) if self._n is None else self._rng.random(len(rows))
        self._parts.append((key, order, rows, *(() if ids is None else (ids,))))
        self.n_offered += len(rows)
        self._held += len(rows)
        if self._n is not None and self._held > 2 * self._n + SLACK:
            self._thin()

    def _thin(self) -> None:
        columns = tuple(np.concatenate(column) for column in zip(*self._parts, strict=True))
        if self._n is not None and len(columns[0]) > self._n:
            best = np.argpartition(columns[0], self._n - 1)[: self._n]
            columns = tuple(column[best] for column in columns)
        self._parts, self._held = [columns], len(columns[0])

    def take(self) -> tuple[Array, Array | None]:
        """Return rows and identifiers in the order of the file."""
        if not self._parts:
            return np.empty((0, 6)), None
        self._thin()
        _, order, rows, *ids = self._parts[0]
        by_file = np.argsort(order)
        return rows[by_file], ids[0][by_file] if ids else None


def _centre(
    files: SnapshotFiles,
    units: SnapshotUnits,
    kinds: list[int],
    periodic: bool | None,
    at: tuple[float, float, float] | None,
    seed: int,
) -> tuple[Centre, Array | None]:
    """Find the centre from a sample of the particles, and the box that positions wrap around, if any."""
    sample, low, high = _Sample(CENTRE_SAMPLE, seed), np.inf, -np.inf
    for block in _blocks(files, units, kinds):
        sample.add(np.concatenate([block.x, block.v, block.mass[:, None]], 1), None)
        low, high = np.minimum(low, block.x.min(0, initial=np.inf)), np.maximum(high, block.x.max(0, initial=-np.inf))
    rows, _ = sample.take()
    # without masses in the file all weigh the same
    mass = rows[:, 6] if (rows[:, 6] > 0).all() else np.ones(len(rows))
    box = _box(files, units, kinds[0], periodic)
    if box is not None and periodic is None and ((low < -1e-3 * box).any() or (high > 1.001 * box).any()):
        box = None
    return shrinking_sphere(rows[:, :3], rows[:, 3:6], mass, box, at), box


def _box(files: SnapshotFiles, units: SnapshotUnits, kind: int, periodic: bool | None) -> Array | None:
    """Return the box's lengths in kpc if the file has one and does not deny that positions wrap around it."""
    size = files.box_size()
    if periodic and size is None:
        raise CatalogError(f"{files.paths[0]}: no BoxSize in the header to wrap around; leave periodic=True out")
    if size is None or periodic is False or (periodic is None and files.denies_periodic()):
        return None
    return np.asarray(size * units.factor(next(files.blocks(kind)).datasets[0], "length"))


def _meta(
    files: SnapshotFiles,
    units: SnapshotUnits,
    middle: Centre,
    box: Array | None,
    expansion: float,
    counts: tuple[str, int, int],
) -> dict[str, Any]:
    particles, n_seen, n_kept = counts
    return {
        "snapshot": {
            "file": files.paths[0].name,
            "n_files": len(files.paths),
            "particles": particles,
            "n_particles": n_seen,
            "n_kept": n_kept,
            "comoving": units.comoving,
            "scale_factor": units.a,
            "h": units.h,
            "hubble_flow_km_s_kpc": expansion,
            "box_kpc": None if box is None else box.tolist(),
            "centre_kpc": middle.x.tolist(),
            "centre_error_kpc": middle.x_error,
            "bulk_velocity_km_s": middle.v.tolist(),
            "bulk_velocity_error_km_s": middle.v_error,
        }
    }


def _notes(
    files: SnapshotFiles,
    units: SnapshotUnits,
    middle: Centre,
    n_near: int,
    n_seen: int,
    radius: float | None,
    expansion: float,
    grain: float,
    w: Array,
    centre: tuple[float, float, float] | None,
) -> list[str]:
    """Say in words what was assumed and left out."""
    found = f"+- {middle.x_error:.2g} kpc" if centre is None else "kpc, as given"
    notes = [
        f"centre ({_triple(middle.x)}) {found}, moving with ({_triple(middle.v)}) +- {middle.v_error:.2g} km/s, from "
        f"{middle.n} particles within {middle.radius:.3g} kpc of it"
    ]
    if units.comoving:
        flow = f"the Hubble flow of {expansion:.4g} km/s/kpc added" if expansion else "without the Hubble flow"
        notes.append(f"comoving run at scale factor {units.a:.4g}: physical coordinates, {flow}")
    elif not units.h_is_known and units.h not in (None, 0.0, 1.0):
        notes.append(f"not a comoving run: HubbleParam = {units.h:g} of its header does not enter")
    if files.n_wind:
        notes.append(f"{files.n_wind} wind cells among the stars (GFM_StellarFormationTime <= 0) are left out")
    if radius is not None and n_near < n_seen:
        notes.append(
            f"{n_seen - n_near} of {n_seen} particles beyond {radius:g} kpc are left out; the cut is a selection: give "
            f"the model SphericalShell(0, {radius:g})"
        )
    median = float(np.median(np.sqrt((w[:, :3] ** 2).sum(-1))))
    if grain > 1e-3 * median:
        notes.append(
            f"the file's positions are multiples of {grain:.2g} kpc (few digits in a large box), beside a median "
            f"radius of {median:.2g} kpc"
        )
    return notes


def _check_options(
    max_stars: int | None, seed: int, radius: float | None, centre: tuple[float, float, float] | None
) -> None:
    if max_stars is not None and max_stars < 1:
        raise CatalogError(f"max_stars must be at least 1, got {max_stars}")
    if seed < 0:
        raise CatalogError(f"seed must not be negative, got {seed}")
    if radius is not None and not 0 < radius < np.inf:
        raise CatalogError(f"radius must be positive and finite (kpc), got {radius}")
    if centre is not None and (np.shape(centre) != (3,) or not np.isfinite(centre).all()):
        raise CatalogError(f"centre must be three numbers (physical kpc), got {centre}")


def _triple(values: Array) -> str:
    return ", ".join(f"{value:.5g}" for value in values)
