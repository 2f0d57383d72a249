"""N-body snapshots: one isochrone written in the units and conventions of each code comes back the same to rounding.

M = 1e11 Msun, b = 3 kpc, 2000 stars within 300 kpc unless said otherwise; comoving runs at a = 0.5 with
h = 0.7, where a wrong power of either changes lengths by 30 % or velocities by 40 %.
"""

from __future__ import annotations

import re
import tracemalloc

import h5py
import numpy as np
import pytest
from contracts.snapshot import HUBBLE, KM, KPC, LAYOUTS, SCALE, write_snapshot
from typer.testing import CliRunner

from bayespot import Catalog
from bayespot.catalog import CatalogError, snapshot_files
from bayespot.catalog.centre import shrinking_sphere
from bayespot.catalog.snapshot import _Sample, read_snapshot
from bayespot.cli import app
from bayespot.mock import mock

_ALL = mock("isochrone", n_stars=2200, seed=3).w.numpy()
W = _ALL[(_ALL[:, :3] ** 2).sum(-1) < 300**2][:2000]
CENTRE = np.array([412.0, 690.0, 505.5])
MOVED = W + np.concatenate([CENTRE, [120.0, -40.0, 310.0]])
#: GADGET-2's files tell no units.
STATED = {"gadget2": {"unit_length": "kpc", "unit_velocity": "km/s"}}


def read(path, layout="arepo", particles="stars", **options):
    return Catalog.read_snapshot(path, particles, **STATED.get(layout, {}), **options)


def same_motion(catalog: Catalog, w: np.ndarray, tolerance: float = 1e-9) -> None:
    """Positions as they are, velocities up to the bulk velocity that was found."""
    bulk = np.array(catalog.meta["snapshot"]["bulk_velocity_km_s"])
    assert np.abs(catalog.x.numpy() - (w[:, :3] - CENTRE)).max() < tolerance
    assert np.abs(catalog.v.numpy() + bulk - w[:, 3:]).max() < tolerance * 10


@pytest.mark.parametrize("comoving", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_code_gives_the_same_physical_stars(tmp_path, layout, comoving):
    """Known centre, comoving or not: positions to 1e-9 kpc, velocities to 1e-8 km/s, identifiers, scale factor."""
    path = tmp_path / "snap.hdf5"
    write_snapshot(path, layout, {4: MOVED, 1: MOVED[:10]}, comoving, CENTRE)
    catalog = read(path, layout, centre=tuple(CENTRE))
    same_motion(catalog, MOVED)
    assert catalog.names[:2] == ("5000000", "5000001")
    told = catalog.meta["snapshot"]
    assert told["scale_factor"] == (SCALE if comoving else 1.0)
    assert told["hubble_flow_km_s_kpc"] == pytest.approx(HUBBLE if comoving else 0.0, rel=1e-12)
    assert np.allclose(told["box_kpc"], 1000.0)


def test_the_hubble_flow_is_optional(tmp_path):
    """Without it velocities are peculiar: lower by H r."""
    write_snapshot(tmp_path / "snap.hdf5", "arepo", {4: MOVED}, True, CENTRE)
    both = [read(tmp_path / "snap.hdf5", centre=tuple(CENTRE), hubble_flow=flow) for flow in (True, False)]
    assert np.allclose(both[0].v - both[1].v, HUBBLE * both[0].x, atol=1e-9)
    assert "without the Hubble flow" in both[1].summary()


def test_several_files_are_one_snapshot(tmp_path):
    """Any of three files, their folder or their name without the ending; a lost one is named."""
    paths = write_snapshot(tmp_path / "snap.hdf5", "gadget4", {4: MOVED}, n_files=3)
    for given in (paths[0], paths[2], tmp_path, tmp_path / "snap"):
        catalog = read(given, centre=tuple(CENTRE))
        same_motion(catalog, MOVED)
        assert catalog.names == tuple(str(5_000_000 + i) for i in range(2000))
    paths[1].unlink()
    with pytest.raises(CatalogError, match=r"1 of the snapshot's 3 files are missing, the first snap\.1\.hdf5"):
        read(paths[0])


def test_a_galaxy_across_the_edge_of_a_periodic_box(tmp_path):
    """Wrapped positions come back whole, the centre within 4 standard errors; periodic=False leaves them in pieces."""
    corner = W + np.concatenate([[3.0, 999.0, 500.0], [0.0, 0.0, 0.0]])
    corner[:, :3] %= 1000.0
    write_snapshot(tmp_path / "snap.hdf5", "swift", {4: corner})
    catalog = read(tmp_path / "snap.hdf5")
    off = np.array(catalog.meta["snapshot"]["centre_kpc"]) - [3.0, 999.0, 500.0]
    assert np.abs(off).max() < 4 * catalog.meta["snapshot"]["centre_error_kpc"]
    # stars further than half a box have another image
    d = (catalog.x.numpy() + off - W[:, :3] + 500) % 1000 - 500
    assert np.abs(d).max() < 1e-9
    with pytest.raises(CatalogError, match="do not look Galactocentric"):
        read(tmp_path / "snap.hdf5", periodic=False, centre=(500.0, 500.0, 500.0))
    with h5py.File(tmp_path / "snap.hdf5", "a") as file:
        file.create_group("RuntimePars").attrs["PeriodicBoundariesOn"] = [0]
    assert Catalog.read_snapshot(tmp_path / "snap.hdf5").meta["snapshot"]["box_kpc"] is None


def test_positions_beyond_the_box_are_not_wrapped(tmp_path):
    """An isolated run with BoxSize in its header and stars outside of it."""
    write_snapshot(tmp_path / "snap.hdf5", "gizmo", {4: MOVED}, box=600.0)
    same_motion(read(tmp_path / "snap.hdf5", centre=tuple(CENTRE)), MOVED)


def test_centre_with_satellite_and_bulk_velocity(tmp_path):
    """Offset, moving, a satellite of 5 % at 20 kpc: place and motion within 4 of their errors, not at the mean."""
    rng = np.random.default_rng(5)
    satellite = rng.normal(size=(100, 6)) * [0.5, 0.5, 0.5, 10, 10, 10] + [20.0, 5.0, 0.0, 0.0, 250.0, 0.0]
    both = np.concatenate([MOVED, satellite + np.concatenate([CENTRE, [120.0, -40.0, 310.0]])])
    write_snapshot(tmp_path / "snap.hdf5", "arepo", {4: both})
    told = read(tmp_path / "snap.hdf5").meta["snapshot"]
    assert np.abs(np.array(told["centre_kpc"]) - CENTRE).max() < 4 * told["centre_error_kpc"]
    assert np.abs(np.array(told["bulk_velocity_km_s"]) - [120, -40, 310]).max() < 4 * told["bulk_velocity_error_km_s"]
    assert told["centre_error_kpc"] < 0.5 < np.abs(both[:, :3].mean(0) - CENTRE).max()


def test_errors_of_the_centre_are_honest():
    """40 isochrones of 1000 stars: the rms of (found - true) / error is 1 within 20 %, for place and motion."""
    stars = mock("isochrone", n_stars=40_000, seed=9).w.numpy()
    z = []
    for part in np.split(stars, 40):
        found = shrinking_sphere(part[:, :3], part[:, 3:], np.ones(1000))
        z.append([found.x / found.x_error, found.v / found.v_error])
    rms = (np.array(z) ** 2).mean((0, 2)) ** 0.5
    assert (np.abs(rms - 1) < 0.2).all(), rms


def test_heavy_particles_count_by_their_mass():
    """A light cloud of many particles beside a heavy one of few: the centre is the heavy one's."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(3000, 3)) + np.where(np.arange(3000) < 1000, 0.0, 1.0)[:, None] * [3.0, 0.0, 0.0]
    mass = np.where(np.arange(3000) < 1000, 1000.0, 1.0)
    assert np.abs(shrinking_sphere(x, x, mass).x).max() < 0.5


def test_centre_on_another_type(tmp_path):
    """Ten stars about a halo of 2000 particles: the halo gives the centre; all types weigh in with "all"."""
    stars = MOVED[:10] + np.array([5.0, 0, 0, 0, 0, 0])
    write_snapshot(tmp_path / "snap.hdf5", "swift", {4: stars, 1: MOVED})
    told = [
        Catalog.read_snapshot(tmp_path / "snap.hdf5", centre_on=on).meta["snapshot"]["centre_kpc"]
        for on in ("dm", "all", None)
    ]
    halo = Catalog.read_snapshot(tmp_path / "snap.hdf5", "dm").meta["snapshot"]["centre_kpc"]
    assert told[0] == halo
    assert 0 < np.abs(np.array(told[1]) - halo).max() < 0.5
    assert np.abs(np.array(told[2]) - halo).max() > 0.5


def test_subsample_is_uniform_and_reproducible(tmp_path, monkeypatch):
    """300 of 2000 whatever the size of the blocks: the same for a seed, each of 20 parts of the file as often."""
    write_snapshot(tmp_path / "snap.hdf5", "tng", {4: MOVED})
    first = read(tmp_path / "snap.hdf5", max_stars=300, seed=1)
    assert len(first) == len(set(first.names)) == 300
    index = np.array(first.names, int) - 5_000_000
    assert (np.diff(index) > 0).all()
    told = first.meta["snapshot"]
    assert np.allclose(first.w, MOVED[index] - np.concatenate([told["centre_kpc"], told["bulk_velocity_km_s"]]))
    monkeypatch.setattr(snapshot_files, "BLOCK", 301)
    assert read(tmp_path / "snap.hdf5", max_stars=300, seed=1).names == first.names
    assert read(tmp_path / "snap.hdf5", max_stars=300, seed=2).names != first.names
    monkeypatch.undo()
    counts = np.zeros(20)
    for seed in range(200):
        sample = _Sample(300, seed)
        for part in np.split(np.arange(2000.0)[:, None], 8):
            sample.add(part, None)
        counts += np.histogram(sample.take()[0], 20, (0, 2000))[0]
    # 3000 each, binomial
    assert (np.abs(counts - 3000) < 4 * 3000**0.5).all(), counts
    assert len(read(tmp_path / "snap.hdf5", max_stars=10**6)) == 2000


def test_radius_is_a_selection(tmp_path):
    """Stars within 5 kpc, with the note on the model's selection."""
    write_snapshot(tmp_path / "snap.hdf5", "tng", {4: MOVED})
    catalog = read(tmp_path / "snap.hdf5", centre=tuple(CENTRE), radius=5.0)
    r = np.sqrt((W[:, :3] ** 2).sum(-1))
    assert len(catalog) == (r < 5).sum()
    assert f"{(r >= 5).sum()} of 2000 particles beyond 5 kpc" in catalog.summary()
    assert "SphericalShell(0, 5)" in catalog.summary()


def test_wind_cells_are_no_stars(tmp_path):
    """AREPO keeps wind among the stars, with a formation time that is not positive."""
    write_snapshot(tmp_path / "snap.hdf5", "tng", {4: MOVED})
    formed = np.where(np.arange(2000) % 10 == 0, -0.3, 0.4)
    with h5py.File(tmp_path / "snap.hdf5", "a") as file:
        file["PartType4/GFM_StellarFormationTime"] = formed
    catalog = read(tmp_path / "snap.hdf5")
    assert catalog.names == tuple(str(5_000_000 + i) for i in range(2000) if i % 10)
    assert "200 wind cells" in catalog.summary()


def test_types_by_name_and_mass_table(tmp_path):
    """Disc and bulge of an isolated GADGET galaxy, masses in the header's table, no identifiers."""
    write_snapshot(tmp_path / "snap.hdf5", "arepo", {1: MOVED[:50], 2: MOVED[:1200], 3: MOVED[1200:]})
    with h5py.File(tmp_path / "snap.hdf5", "a") as file:
        for kind in (2, 3):
            del file[f"PartType{kind}/Masses"], file[f"PartType{kind}/ParticleIDs"]
        file["Header"].attrs["MassTable"] = [0, 0, 1e-6, 2e-6, 0, 0]
    catalog = read(tmp_path / "snap.hdf5", particles="disk, bulge", centre=tuple(CENTRE))
    same_motion(catalog, MOVED)
    assert catalog.names is None
    with pytest.raises(CatalogError, match=r"no particles of type 4 \(stars\); there are 50 of type 1 \(dm\), 1200 of"):
        read(tmp_path / "snap.hdf5")
    with pytest.raises(CatalogError, match="no particle type 'planets': choose stars"):
        read(tmp_path / "snap.hdf5", particles="planets")


def test_few_digits_in_a_large_box_are_noted(tmp_path):
    """Single precision at 90 Mpc keeps 8 pc, beside a median radius of 5."""
    far = W * [1e-3, 1e-3, 1e-3, 1, 1, 1] + [9e4, 9e4, 9e4, 0, 0, 0]
    write_snapshot(tmp_path / "snap.hdf5", "tng", {4: far}, dtype="f4", box=1e5)
    assert "multiples of 0.0078 kpc" in read(tmp_path / "snap.hdf5").summary()


def _edit(path, **attributes):
    """Change attributes of the header; None deletes."""
    with h5py.File(path, "a") as file:
        for name, value in attributes.items():
            if value is None:
                del file["Header"].attrs[name]
            else:
                file["Header"].attrs[name] = value


@pytest.mark.parametrize(
    ("layout", "comoving", "edits", "message", "options"),
    [
        ("gadget2", True, {}, "does not tell the unit of length .* unit_length='kpc'", {}),
        ("gadget2", True, {}, "does not tell the unit of velocity .* unit_velocity='km/s'", {"unit_length": "kpc"}),
        ("gadget2", True, {}, "no unit of length", {"unit_length": "km/s"}),
        ("tng", True, {"Redshift": None}, "does not tell whether .* comoving=True or comoving=False", {}),
        ("tng", True, {"Redshift": 3.0}, "expanding universe .*comoving=True or comoving=False", {}),
        ("tng", True, {"Redshift": 3.0}, r"not 1 / \(1 \+ Redshift\)", {"comoving": True}),
        ("tng", True, {"HubbleParam": None}, "Omega0|hubble_param=0.7", {}),
        ("tng", True, {"HubbleParam": 70.0}, "hubble_param=0.7", {"hubble_flow": False}),
        ("tng", True, {"Omega0": None}, "hubble_flow=False", {}),
        ("tng", False, {"HubbleParam": 0.7}, "hubble_param=1 if they are not, hubble_param=0.7 if they are", {}),
        ("tng", False, {"HubbleParam": 0.7, "Time": 1.0}, "isolated run; state comoving=True or comoving=False", {}),
        ("arepo", False, {"UnitLength_in_cm": KPC * 1e3}, "by its own attributes and .* unit_length='kpc'", {}),
        (
            "tng",
            True,
            {"NumPart_ThisFile": [0, 0, 0, 0, 2100, 0]},
            "2000 particles of type 4 of 2100 .*partial=True",
            {},
        ),
        ("tng", True, {"NumPart_Total": [0, 0, 0, 0, 2100, 0]}, "2000 particles of type 4 in 1 files of 2100", {}),
        ("tng", True, {"NumPart_Total_HighWord": [0, 0, 0, 0, 1, 0]}, "of 4294969296", {}),
        ("tng", True, {"NumFilesPerSnapshot": 4}, r"one of 4 files .*\.0\.hdf5", {}),
        ("tng", True, {"Redshift": "high"}, "Header/Redshift = 'high' is no number", {}),
        ("tng", True, {"BoxSize": None}, "no BoxSize", {"periodic": True}),
        ("tng", True, {}, "max_stars must be at least 1, got 0", {"max_stars": 0}),
        ("tng", True, {}, "radius must be positive and finite", {"radius": float("nan")}),
        ("tng", True, {}, "seed must not be negative", {"seed": -1}),
        ("tng", True, {}, "three numbers", {"centre": (1.0, 2.0)}),
        ("tng", True, {}, "none of 2000 particles is within 1 kpc", {"radius": 1.0, "centre": (1.0, 1.0, 1.0)}),
    ],
)
def test_what_the_file_does_not_tell_is_refused(tmp_path, layout, comoving, edits, message, options):
    """One sentence with the file's name and the option that states it."""
    path = tmp_path / "snap.hdf5"
    write_snapshot(path, layout, {4: MOVED}, comoving, CENTRE)
    _edit(path, **edits)
    with pytest.raises(CatalogError, match=message) as caught:
        Catalog.read_snapshot(path, **options)
    assert "\n" not in str(caught.value)


def test_statements_settle_it(tmp_path):
    """h in isolated runs both ways, comoving stated, a cut-out, units by hand: the stars come back."""
    path = tmp_path / "snap.hdf5"
    write_snapshot(path, "tng", {4: MOVED})
    _edit(path, HubbleParam=0.7)
    same_motion(read(path, centre=tuple(CENTRE), hubble_param=1.0), MOVED)
    scaled = read(path, centre=tuple(CENTRE / 0.7), hubble_param=0.7)
    assert np.allclose(scaled.x, (MOVED[:, :3] - CENTRE) / 0.7)
    _edit(path, NumPart_Total=[0, 0, 0, 0, 9999, 0], NumFilesPerSnapshot=12)
    same_motion(read(path, centre=tuple(CENTRE), hubble_param=1.0, partial=True), MOVED)
    write_snapshot(path, "gadget2", {4: MOVED}, True, CENTRE)
    _edit(path, Redshift=None)
    same_motion(read(path, "gadget2", centre=tuple(CENTRE), comoving=True), MOVED)


def test_damaged_files_are_refused(tmp_path):
    """Truncated, not HDF5, no header, NaN, wrong shape, an absent part of a virtual dataset: file and remedy named."""
    path = tmp_path / "snap.hdf5"
    write_snapshot(path, "swift", {4: MOVED})
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"\x00\x01\x00\x00" + bytes(256), b""):
        path.write_bytes(content)
        with pytest.raises(CatalogError, match=r"snap\.hdf5: not a readable HDF5 file"):
            read(path)
    for damage, message in (
        (lambda f: f.__delitem__("Header"), "no Header group"),
        (lambda f: f["PartType4/Velocities"].__setitem__((7, 1), np.nan), r"Velocities has NaN .* row 7"),
        (lambda f: f["PartType4"].move("Velocities", "V"), "no Coordinates and Velocities"),
        (_narrow, r"Coordinates has shape \(2000, 2\) where \(2000, 3\)"),
        (_virtual, r"refers to lost\.hdf5, which is missing"),
    ):
        path.write_bytes(whole)
        with h5py.File(path, "a") as file:
            damage(file)
        with pytest.raises(CatalogError, match=message):
            read(path)
    with pytest.raises(CatalogError, match="no such file"):
        read(tmp_path / "other")
    (tmp_path / "more.hdf5").write_bytes(whole)
    with pytest.raises(CatalogError, match="2 snapshots in this folder: more, snap; give one file"):
        read(tmp_path)


def _narrow(file):
    x = file["PartType4/Coordinates"][:, :2]
    del file["PartType4/Coordinates"]
    file["PartType4/Coordinates"] = x


def _virtual(file):
    del file["PartType4/Coordinates"]
    layout = h5py.VirtualLayout((2000, 3), "f8")
    layout[:] = h5py.VirtualSource("lost.hdf5", "PartType4/Coordinates", (2000, 3))
    file.create_virtual_dataset("PartType4/Coordinates", layout)


def test_memory_is_bounded_by_the_block(tmp_path, monkeypatch):
    """300 000 stars in blocks of 4096, 1000 kept, the centre from 10 000: peak below 8 MB where the columns take 19."""
    monkeypatch.setattr(snapshot_files, "BLOCK", 4096)
    monkeypatch.setattr("bayespot.catalog.snapshot.CENTRE_SAMPLE", 10_000)
    monkeypatch.setattr("bayespot.catalog.snapshot.SLACK", 10_000)
    w = np.tile(MOVED, (150, 1))
    write_snapshot(tmp_path / "snap.hdf5", "tng", {4: w})
    del w
    tracemalloc.start()
    assert len(read_snapshot(tmp_path / "snap.hdf5", max_stars=1000).w) == 1000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8e6, peak


def test_command(tmp_path):
    """`bayespot snapshot` writes what Catalog.read takes; its messages name its own options."""
    path, out = tmp_path / "snap.hdf5", tmp_path / "stars.ecsv"
    write_snapshot(path, "gadget2", {4: MOVED}, True, CENTRE)

    def run(*options):
        return CliRunner().invoke(app, ["snapshot", str(path), "-o", str(out), *options])

    done = run()
    assert "--unit-length kpc" in str(done.exception)
    assert "unit_length" not in str(done.exception)
    units = ("--unit-length", "kpc", "--unit-velocity", "km/s")
    done = run(*units, "--max-stars", "500", "--seed", "1", "--centre", ",".join(map(str, CENTRE)))
    assert done.exit_code == 0, done.output
    assert "500 stars" in done.output
    assert "comoving run at scale factor 0.5" in re.sub(r"\s+", " ", done.output)
    catalog = Catalog.read(out)
    assert len(catalog) == 500
    rows = np.array(catalog.names, int) - 5_000_000
    same_motion(catalog, MOVED[rows])
    assert "--overwrite" in str(run(*units).exception)
    assert "X,Y,Z" in str(run(*units, "--overwrite", "--centre", "1,2").exception)


def test_unit_constants():
    """The writers' constants are astropy's."""
    from astropy import units as u

    assert u.kpc.to(u.cm) == pytest.approx(KPC, rel=1e-12)
    assert (u.km / u.s).to(u.cm / u.s) == KM
