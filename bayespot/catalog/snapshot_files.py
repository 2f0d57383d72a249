"""The HDF5 files of a snapshot: which they are, whether they are whole, and their particles block by block."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from bayespot.catalog.columns import CatalogError
from bayespot.catalog.snapshot_units import number

if TYPE_CHECKING:
    import h5py
    from numpy.typing import NDArray

    Array = NDArray[Any]

#: What users call the types.
TYPES = {
    "gas": 0,
    "dm": 1,
    "halo": 1,
    "dark_matter": 1,
    "disk": 2,
    "disc": 2,
    "bulge": 3,
    "stars": 4,
    "star": 4,
    "bh": 5,
    "black_holes": 5,
}
#: Names of the types in messages.
NAMES = ("gas", "dm", "disk", "bulge", "stars", "bh", "neutrinos")
#: Particles read at a time.
BLOCK = 2**19
#: AREPO keeps its wind cells among the stars, with this not positive.
_FORMATION = "GFM_StellarFormationTime"
_SUFFIXES = (".hdf5", ".h5", ".hdf")
_PART = re.compile(r"(.*)\.(\d+)(\.(?:hdf5|h5|hdf))", re.I)


def particle_types(text: str | int) -> list[int]:
    """Return the numbers of the types that a user names.

    Raises
    ------
    CatalogError
        If there is no such type.
    """
    kinds = []
    for word in str(text).lower().replace(" ", "").split(","):
        kind = TYPES.get(word, int(word.removeprefix("parttype")) if word.removeprefix("parttype").isdigit() else None)
        if kind is None or kind >= len(NAMES):
            raise CatalogError(
                f"no particle type {word!r}: choose stars (4), gas (0), dm or halo (1), disk (2), bulge (3), bh (5), a "
                "number, or several separated by commas"
            )
        if kind not in kinds:
            kinds.append(kind)
    return kinds


class RawBlock(NamedTuple):
    """Particles as the file has them, and the datasets of positions and velocities that they come from."""

    x: Array
    v: Array
    mass: Array
    ids: Array | None
    datasets: tuple[h5py.Dataset, h5py.Dataset]


class SnapshotFiles:
    """All files of a snapshot, open for reading.

    Parameters
    ----------
    path
        One of them, or their folder, or their name without the ending.
    partial
        Whether there may be fewer particles than the header announces.

    Raises
    ------
    CatalogError
        If a file is missing, damaged, or no snapshot.
    """

    def __init__(self, path: Path, partial: bool = False) -> None:
        self._stack, self._partial = ExitStack(), partial
        #: Wind cells of AREPO that were left out in the last pass over the stars.
        self.n_wind = 0
        try:
            self.paths = self._find(path)
            self._files = [self._open(one) for one in self.paths]
            self.first = self._files[0]
            self._check_counts()
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> SnapshotFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def present(self) -> list[int]:
        """Return the types of which there are particles with positions and velocities."""
        return [kind for kind in range(len(NAMES)) if self._count(kind) and self._moves(kind)]

    def require(self, kinds: list[int]) -> None:
        """Raise CatalogError unless there are particles of every type."""
        for kind in kinds:
            if not self._count(kind):
                there = ", ".join(f"{self._count(k)} of type {k} ({NAMES[k]})" for k in self.present())
                raise CatalogError(
                    f"{self.paths[0]}: no particles of type {kind} ({NAMES[kind]}); there are "
                    f"{there or 'none at all'}: choose another type"
                )
            if not self._moves(kind):
                raise CatalogError(
                    f"{self.paths[0]}: PartType{kind} has no Coordinates and Velocities; choose another type"
                )

    def box_size(self) -> Array | None:
        """Return BoxSize (3,) in the units of the positions, None where there is none."""
        value = self._header(self.first, self.paths[0]).get("BoxSize")
        if value is None:
            return None
        size = np.broadcast_to(np.asarray(value, float).reshape(-1), 3)
        return size if (size > 0).all() else None

    def denies_periodic(self) -> bool:
        """Return whether the file says that its box is not periodic (SWIFT, AREPO)."""
        groups: dict[str, Any] = {name: self.first[name].attrs if name in self.first else {} for name in _PERIODIC}
        return any(
            name in groups[group] and (off is None or int(np.asarray(groups[group][name]).reshape(-1)[0]) == off)
            for group, (name, off) in _PERIODIC.items()
        )

    def blocks(self, kind: int, ids: bool = False) -> Iterator[RawBlock]:
        """Yield the particles of a type, at most `BLOCK` at a time."""
        self.n_wind = 0 if kind == 4 else self.n_wind
        for file, path in zip(self._files, self.paths, strict=True):
            group = file.get(f"PartType{kind}")
            if group is None or "Coordinates" not in group:
                continue
            datasets = (group["Coordinates"], _member(group, "Velocities", path))
            names = group.get("ParticleIDs") if ids else None
            for start in range(0, len(datasets[0]), BLOCK):
                rows = slice(start, start + BLOCK)
                x, v = (_read(d, rows, path, 3) for d in datasets)
                mass = self._mass(file, path, kind, rows, len(x))
                block = [x, v, mass] if names is None else [x, v, mass, _read(names, rows, path)]
                if kind == 4 and _FORMATION in group:
                    stars = _read(group[_FORMATION], rows, path).astype(float) > 0
                    self.n_wind += int((~stars).sum())
                    block = [column[stars] for column in block]
                yield RawBlock(block[0], block[1], block[2], block[3] if names is not None else None, datasets)

    def _mass(self, file: h5py.File, path: Path, kind: int, rows: slice, n: int) -> Array:
        """Return masses in code units; zero where the file has none."""
        if "Masses" in file[f"PartType{kind}"]:
            return _read(file[f"PartType{kind}"]["Masses"], rows, path).astype(float)
        table = np.asarray(self._header(file, path).get("MassTable", [])).reshape(-1)
        return np.full(n, float(table[kind]) if kind < len(table) else 0.0)

    def _count(self, kind: int) -> int:
        return sum(_rows(file, kind) for file in self._files)

    def _moves(self, kind: int) -> bool:
        with_rows = [file[f"PartType{kind}"] for file in self._files if _rows(file, kind)]
        return all("Coordinates" in group and "Velocities" in group for group in with_rows)

    def _find(self, path: Path) -> list[Path]:
        """Return the paths of all files, in order."""
        if path.is_dir():
            path = _only_snapshot(path)
        elif not path.exists():
            endings = [ending for suffix in _SUFFIXES for ending in (suffix, f".0{suffix}")]
            there = [Path(f"{path}{ending}") for ending in endings if Path(f"{path}{ending}").exists()]
            if not there:
                raise CatalogError(f"{path}: no such file; check the path")
            path = there[0]
        header = self._header(self._open(path), path)
        n = int(number(header.get("NumFilesPerSnapshot", 1), path, "Header/NumFilesPerSnapshot"))
        part = _PART.fullmatch(path.name)
        if n == 1 or (part is None and self._partial):
            return [path]
        if part is None:
            raise CatalogError(
                f"{path}: one of {n} files by its header, but its name does not end in .0.hdf5, .1.hdf5 and so on; "
                "restore the names, or take what this file has (partial=True)"
            )
        paths = [path.with_name(f"{part[1]}.{i}{part[3]}") for i in range(n)]
        missing = [one.name for one in paths if not one.exists()]
        if missing:
            raise CatalogError(
                f"{path}: {len(missing)} of the snapshot's {n} files are missing, the first {missing[0]}"
            )
        return paths

    def _open(self, path: Path) -> h5py.File:
        import h5py

        try:
            return self._stack.enter_context(h5py.File(path, "r"))
        except OSError as error:
            raise CatalogError(
                f"{path}: not a readable HDF5 file ({str(error).splitlines()[0]}); it may be truncated (copy it "
                "again) or of GADGET's binary formats 1 and 2 (convert it to HDF5)"
            ) from error

    def _header(self, file: h5py.File, path: Path) -> Any:
        if "Header" not in file:
            raise CatalogError(
                f"{path}: no Header group, so no snapshot of GADGET, AREPO, GIZMO or SWIFT; tables of stars are "
                "catalogues already"
            )
        return file["Header"].attrs

    def _check_counts(self) -> None:
        """Compare the datasets with what the headers announce, and find virtual datasets without their files."""
        total = np.zeros(len(NAMES))
        for file, path in zip(self._files, self.paths, strict=True):
            announced = np.asarray(self._header(file, path).get("NumPart_ThisFile", [])).reshape(-1)
            for kind in range(len(NAMES)):
                group, n = file.get(f"PartType{kind}"), _rows(file, kind)
                total[kind] += n
                expected = int(announced[kind]) if kind < len(announced) else n
                if n != expected and not self._partial and (group is not None or expected):
                    raise CatalogError(
                        f"{path}: {n} particles of type {kind} of {expected} that the header announces; the file is "
                        "incomplete: copy it again (a cut-out of a snapshot: partial=True)"
                    )
                for name in ("Coordinates", "Velocities", "Masses", "ParticleIDs") if group is not None else ():
                    if name in group:
                        _check_dataset(group[name], n, path)
        header = self._header(self.first, self.paths[0])
        low, high = (
            np.asarray(header.get(name, [])).reshape(-1) for name in ("NumPart_Total", "NumPart_Total_HighWord")
        )
        for kind in range(min(len(low), len(NAMES))):
            expected = int(low[kind]) + (int(high[kind]) << 32 if kind < len(high) else 0)
            if expected != total[kind] and not self._partial:
                raise CatalogError(
                    f"{self.paths[0]}: {int(total[kind])} particles of type {kind} in {len(self.paths)} files of "
                    f"{expected} that the header announces; files are missing (a cut-out of a snapshot: partial=True)"
                )


#: Where codes say that the box is not periodic: attribute, and its value if it has a choice.
_PERIODIC: dict[str, tuple[str, int | None]] = {
    "RuntimePars": ("PeriodicBoundariesOn", 0),
    "Config": ("GRAVITY_NOT_PERIODIC", None),
}


def _rows(file: h5py.File, kind: int) -> int:
    group = file.get(f"PartType{kind}")
    for name in ("Coordinates", "ParticleIDs", "Masses"):
        if group is not None and name in group:
            return int(group[name].shape[0])
    return 0


def _member(group: h5py.Group, name: str, path: Path) -> h5py.Dataset:
    if name not in group:
        raise CatalogError(f"{path}: {group.name} has no {name}; the file is incomplete: copy it again")
    return group[name]


def _check_dataset(dataset: h5py.Dataset, n: int, path: Path) -> None:
    width = 3 if dataset.name.endswith(("Coordinates", "Velocities")) else 1
    if len(dataset) != n or int(np.prod(dataset.shape[1:])) != width:
        raise CatalogError(
            f"{path}: {dataset.name} has shape {dataset.shape} where ({n}, {width}) is due; the file is damaged: "
            "copy it again"
        )
    # HDF5 reads fill values, not an error, where a virtual dataset's file is absent
    if dataset.is_virtual:
        lost = {s.file_name for s in dataset.virtual_sources() if not (path.parent / s.file_name).exists()}
        if lost - {"."}:
            raise CatalogError(
                f"{path}: {dataset.name} refers to {min(lost)}, which is missing; copy it beside this file"
            )


def _read(dataset: h5py.Dataset, rows: slice, path: Path, width: int = 1) -> Array:
    try:
        values = np.asarray(dataset[rows])
    except (OSError, RuntimeError) as error:  # damaged chunks, filters that are not installed
        raise CatalogError(
            f"{path}: {dataset.name} cannot be read ({str(error).splitlines()[0]}); copy the file again"
        ) from error
    values = values.reshape(-1, width) if width > 1 else values.reshape(-1)
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        row = int(np.argmax(~np.isfinite(values.reshape(len(values), -1)).all(-1)))
        raise CatalogError(
            f"{path}: {dataset.name} has NaN or infinite values, the first in row {rows.start + row} (counting from "
            "0); the file is damaged: copy it again"
        )
    return values


def _only_snapshot(folder: Path) -> Path:
    """Return the first file of the one snapshot in a folder."""
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in _SUFFIXES)
    bases: dict[str, Path] = {}
    for file in files:
        part = _PART.fullmatch(file.name)
        bases.setdefault(part[1] if part else file.stem, file)
    if len(bases) != 1:
        raise CatalogError(
            f"{folder}: {len(bases) or 'no'} snapshots in this folder{': ' if bases else ''}"
            f"{', '.join(list(bases)[:5])}; give one file"
        )
    return next(iter(bases.values()))
