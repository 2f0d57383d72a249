"""Catalogues: files and metadata, columns and units, the packaged examples, and the container."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from astropy import units as u
from astropy.table import QTable, Table
from contracts.catalog import META, SUFFIXES, assert_refused, assert_same, cartesian_table, observed_table, phase_space

from bayespot.catalog import Catalog, CatalogError
from bayespot.catalog import io as catalog_io
from bayespot.catalog.columns import CARTESIAN
from bayespot.mock import mock

# --- files


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("errors", [False, True])
def test_round_trip(tmp_path, suffix, errors):
    """Write, read, write, read: every number, name and nested metadata entry comes back bit for bit."""
    w = phase_space()
    root = np.random.default_rng(1).normal(size=(50, 6, 6))
    covariance = root @ root.transpose(0, 2, 1)
    covariance = (covariance + covariance.transpose(0, 2, 1)) / 2
    names = tuple(["007", "1e5", "ω Cen", "NGC 104, 'Tuc'", "#5", "nan"] + [f"s{i}" for i in range(44)])
    first = Catalog(w, covariance if errors else None, names if errors else None, META)
    for k in range(2):
        path = tmp_path / f"stars{k}.{suffix}"
        first.write(path)
        second = Catalog.read(str(path))
        assert_same(first, second)
        first = second
    assert sorted(p.stem for p in tmp_path.iterdir()) == ["stars0", "stars1"]


@pytest.mark.parametrize("suffix", ["fits", "csv", "npz"])
def test_mock_truth_survives(tmp_path, suffix):
    """The truth of a mock is in the file: the metadata read back equal those of the mock."""
    stars = mock("isochrone", n_stars=20, seed=3)
    stars.write(tmp_path / f"m.{suffix}")
    assert_same(stars, Catalog.read(tmp_path / f"m.{suffix}"))


def test_json_across_card_boundaries(tmp_path):
    """FITS cuts long strings into CONTINUE cards; quotes, ampersands and blanks at any cut survive."""
    rng = np.random.default_rng(0)
    for k in range(40):
        text = "".join(rng.choice(list("'& \"a/=\\"), 400))
        stars = Catalog(phase_space(5), meta={"text": text})
        stars.write(tmp_path / "a.fits", overwrite=True)
        assert Catalog.read(tmp_path / "a.fits").meta == {"text": text}, (k, text)


def test_no_silent_overwrite(tmp_path):
    """An existing file is kept unless overwrite=True; a folder or a missing parent is refused."""
    path = tmp_path / "a.npz"
    Catalog(phase_space(5)).write(path)
    with pytest.raises(CatalogError, match=r"a\.npz exists.*overwrite=True"):
        Catalog(phase_space(6)).write(path)
    assert len(Catalog.read(path)) == 5
    Catalog(phase_space(6)).write(path, overwrite=True)
    assert len(Catalog.read(path)) == 6
    (tmp_path / "b.npz").mkdir()
    with pytest.raises(CatalogError, match="is a folder"):
        Catalog(phase_space(5)).write(tmp_path / "b.npz", overwrite=True)
    with pytest.raises(CatalogError, match="does not exist; create it"):
        Catalog(phase_space(5)).write(tmp_path / "none" / "a.npz")
    with pytest.raises(CatalogError, match=r"unknown suffix '\.txt'.*\.fits, .*\.npz"):
        Catalog(phase_space(5)).write(tmp_path / "a.txt")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_writing_is_atomic(tmp_path, suffix, monkeypatch):
    """A writer that fails half way leaves the old file as it was and nothing beside it."""
    path = tmp_path / f"a.{suffix}"
    Catalog(phase_space(5)).write(path)
    before = path.read_bytes()

    def fail(table, text, temporary, kind):
        temporary.write_bytes(b"half a fi")
        raise OSError("disk full")

    monkeypatch.setattr(catalog_io, "_write", fail)
    with pytest.raises(OSError, match="disk full"):
        Catalog(phase_space(9)).write(path, overwrite=True)
    with pytest.raises(OSError, match="disk full"):
        Catalog(phase_space(9)).write(tmp_path / f"new.{suffix}")
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == before


def test_file_mode_is_the_users(tmp_path):
    """The file is as readable as any other file that the user creates, not private to the user."""
    Catalog(phase_space(5)).write(tmp_path / "a.csv")
    (tmp_path / "b.csv").write_text("")
    assert (tmp_path / "a.csv").stat().st_mode == (tmp_path / "b.csv").stat().st_mode


def test_meta_must_be_storable(tmp_path):
    """numpy numbers in meta are stored as numbers; what JSON cannot hold is refused by key, before any file exists."""
    Catalog(phase_space(5), meta={"a": np.float64(2), "b": np.arange(3)}).write(tmp_path / "a.csv")
    assert Catalog.read(tmp_path / "a.csv").meta == {"a": 2.0, "b": [0, 1, 2]}
    with pytest.raises(CatalogError, match=r"meta\['bad'\]"):
        Catalog(phase_space(5), meta={"bad": object()}).write(tmp_path / "b.csv")
    assert not (tmp_path / "b.csv").exists()


# --- columns and units


@pytest.mark.parametrize("suffix", ["fits", "ecsv", "parquet"])
def test_units_are_converted(tmp_path, suffix):
    """pc and m/s in a file written by astropy become kpc and km/s, to rounding; without units the defaults hold."""
    w = phase_space()
    table = Table(dict(zip(CARTESIAN, (w * 1e3).T, strict=True)))
    for name in CARTESIAN:
        table[name].unit = u.pc if len(name) == 1 else u.m / u.s
    table.write(tmp_path / f"a.{suffix}")
    assert np.allclose(Catalog.read(tmp_path / f"a.{suffix}").w.numpy(), w, rtol=1e-14, atol=0)
    quantities = QTable(table)
    assert np.allclose(Catalog.from_table(quantities).w.numpy(), w, rtol=1e-14, atol=0)
    assert np.array_equal(Catalog.from_table(cartesian_table()).w.numpy(), w)


def test_files_of_other_programs(tmp_path):
    """Single precision, integers, numbers as text, missing names and extra columns are read; FITS is big-endian."""
    w = np.round(phase_space())
    frame = pd.DataFrame(dict(zip(CARTESIAN, w.T, strict=True)))
    frame["x"] = frame["x"].astype("float32")
    frame["y"] = frame["y"].astype("int64")
    frame["name"] = ["a", None] * 25
    frame["colour"] = pd.array([1, None] * 25, dtype="Int64")
    frame.to_parquet(tmp_path / "a.parquet")
    frame.to_csv(tmp_path / "a.csv", index=False)
    np.savez(tmp_path / "a.npz", **{k: frame[k].to_numpy() for k in CARTESIAN})
    Table({k: frame[k].to_numpy() for k in CARTESIAN}).write(tmp_path / "a.fits")
    for suffix in ("parquet", "csv", "npz", "fits"):
        stars = Catalog.read(tmp_path / f"a.{suffix}")
        assert np.array_equal(stars.w.numpy(), w), suffix
        assert stars.names == (("a", "") * 25 if suffix in ("parquet", "csv") else None)
    table = cartesian_table()
    table["x"] = [str(value) for value in table["x"]]
    assert np.array_equal(Catalog.from_table(table).w.numpy(), phase_space())


def test_dataframe_and_table():
    """from_dataframe and from_table(to_table()) give the same stars; to_table carries units and metadata."""
    w = phase_space()
    stars = Catalog.from_dataframe(pd.DataFrame(dict(zip(CARTESIAN, w.T, strict=True))))
    assert np.array_equal(stars.w.numpy(), w)
    full = Catalog.from_table(observed_table())
    table = full.to_table()
    assert isinstance(table, QTable)
    assert [str(table[c].unit) for c in ("x", "vz", "cov_x_y", "cov_x_vx", "cov_vx_vx")] == [
        "kpc",
        "km / s",
        "kpc2",
        "km kpc / s",
        "km2 / s2",
    ]
    assert_same(full, Catalog.from_table(table))


def test_stored_covariance_units():
    """cov_* columns in other units are converted: pc^2 is 1e-6 kpc^2; a wrong one is refused."""
    table = Catalog.from_table(observed_table()).to_table()
    expected = Catalog.from_table(table).covariance
    table["cov_x_x"] = table["cov_x_x"].to(u.pc**2)
    table["cov_x_vy"] = table["cov_x_vy"].to(u.pc * u.m / u.s)
    assert torch.allclose(Catalog.from_table(table).covariance, expected, rtol=1e-12, atol=0)
    table["cov_x_x"] = table["cov_x_x"].value * u.kpc
    assert_refused(table, "column cov_x_x has unit kpc, which cannot be turned into kpc2")


def test_cartesian_errors():
    """x_error ... give a diagonal covariance, x_vx_corr an off-diagonal entry; units are converted."""
    table = cartesian_table(30)
    for i, name in enumerate(CARTESIAN):
        table[f"{name}_error"] = np.full(30, i + 1.0)
    table["y_error"].unit = u.pc
    table["x_vx_corr"] = np.full(30, 0.5)
    covariance = Catalog.from_table(table).covariance.numpy()
    sd = np.array([1, 2e-3, 3, 4, 5, 6])
    expected = np.diag(sd**2)
    expected[0, 3] = expected[3, 0] = 0.5 * sd[0] * sd[3]
    assert np.allclose(covariance, expected, rtol=1e-14)


# --- packaged examples


@pytest.mark.parametrize(("name", "n", "r_median"), [("globular_clusters", 161, 5.2), ("satellites", 50, 79)])
def test_examples(name, n, r_median):
    """The packaged catalogues read without a complaint; median radii as published (to 2 %)."""
    stars = Catalog.example(name)
    assert len(stars) == len(stars.names) == n
    assert stars.covariance is not None
    assert float(torch.linalg.vector_norm(stars.x, dim=-1).median()) == pytest.approx(r_median, rel=0.02)
    assert "galpy" in stars.meta["source"]
    assert any("distance_error" in note for note in stars.meta["notes"])
    with pytest.raises(CatalogError, match=r"'stars'.*globular_clusters, satellites"):
        Catalog.example("stars")


def test_omega_centauri():
    """omega Cen (NGC 5139) lies 6.4 to 6.6 kpc from the centre, on a retrograde orbit (Lz > 0 in this frame)."""
    stars = Catalog.example("globular_clusters")
    star = stars[stars.names.index("NGC5139")]
    assert 6.3 < float(torch.linalg.vector_norm(star.x)) < 6.7
    assert float(torch.linalg.cross(star.x, star.v)[0, 2]) > 100


# --- the container


def test_slicing():
    """Slices, masks and index lists keep errors and names with their stars; an integer gives one star."""
    stars = Catalog.from_table(observed_table())
    mask = np.arange(40) % 3 == 0
    for rows in (
        slice(5, 20, 2),
        mask,
        mask.tolist(),
        torch.as_tensor(mask),
        [3, 1, 3],
        np.array([-1, 0]),
        torch.tensor([7]),
    ):
        part = stars[rows]
        index = np.arange(40)[np.asarray(rows) if isinstance(rows, torch.Tensor | list) else rows]
        assert torch.equal(part.w, stars.w[index])
        assert torch.equal(part.covariance, stars.covariance[index])
        assert part.names == tuple(stars.names[i] for i in index)
        assert part.meta == stars.meta
    assert torch.equal(stars[5].w, stars.w[5:6])
    assert len(stars[[]]) == 0
    assert "0 stars" in stars[[]].summary()
    assert len(list(stars)) == 40
    with pytest.raises(IndexError):
        stars[40]


def test_subsample():
    """subsample draws without replacement, reproducibly by seed."""
    stars = Catalog.from_table(observed_table())
    some = stars.subsample(15, seed=3)
    assert len(set(some.names)) == 15
    assert_same(some, stars.subsample(15, seed=3))
    assert some.names != stars.subsample(15, seed=4).names
    with pytest.raises(CatalogError, match="cannot draw 41 of 40"):
        stars.subsample(41, seed=0)


def test_frozen():
    """Attributes cannot be set, and the caller's later changes to arrays or metadata do not reach the catalogue."""
    w, meta = phase_space(), {"truth": {"seed": 1}}
    stars = Catalog(w, meta=meta)
    with pytest.raises(AttributeError):
        stars.w = torch.zeros(1, 6)
    w[:] = 0
    meta["truth"]["seed"] = 2
    stars.to_table()["x"][:] = 0 * u.kpc
    part = stars[:10]
    part.w[:] = 0
    part.meta["truth"]["seed"] = 3
    assert np.array_equal(stars.w.numpy(), phase_space())
    assert stars.meta == {"truth": {"seed": 1}}
    assert stars.w.dtype == torch.float64


def test_summary():
    """The summary states the count, radii, speed, rotation and errors: a circle of radius 2 kpc at 150 km/s."""
    phi = np.linspace(0, 2 * np.pi, 100, endpoint=False)
    zero = np.zeros(100)
    w = np.stack([2 * np.cos(phi), 2 * np.sin(phi), zero, -150 * np.sin(phi), 150 * np.cos(phi), zero], -1)
    text = Catalog(w).summary()
    for part in ("100 stars, without measurement errors", "median 2,", "rms speed 150 km/s", "(sum Lz / sum L) 1.000"):
        assert part in text
    assert repr(Catalog(w)) == "Catalog(100 stars, no measurement errors)"


def test_errors_are_value_errors():
    """CatalogError is a ValueError, so callers that know nothing of catalogues can catch it."""
    assert issubclass(CatalogError, ValueError)
