"""Files as archives, spreadsheets and other programs write them: missing words, several tables, digits of identifiers,
what bayespot's own CSV is to other readers.
"""

from __future__ import annotations

import gzip
import io

import h5py
import numpy as np
import pandas as pd
import pytest
from astropy.io import fits
from astropy.table import MaskedColumn, Table
from contracts.catalog import META, assert_same, cartesian_table, observed_table, phase_space

from bayespot.catalog import Catalog, CatalogError
from bayespot.catalog.columns import CARTESIAN

#: Beyond 2^53: a floating-point number would lose the last digits.
IDS = np.arange(50) * 7 + 4295806720123456789
W = phase_space()


def csv_text(separator: str = ",", **changed: list[str]) -> str:
    columns = {name: [repr(float(v)) for v in W[:, i]] for i, name in enumerate(CARTESIAN)} | changed
    rows = zip(*columns.values(), strict=True)
    return "\n".join([separator.join(columns), *(separator.join(row) for row in rows)]) + "\n"


# --- identifiers


@pytest.mark.parametrize("suffix", ["csv", "ecsv", "fits", "parquet", "vot", "hdf5", "npz", "fits.gz", "csv.gz"])
@pytest.mark.parametrize("gap", [False, True])
def test_identifiers_keep_their_digits(tmp_path, suffix, gap):
    """19 digits arrive from every format, also where one identifier is missing, which gives the empty name."""
    if suffix == "npz" and gap:
        pytest.skip("npz has no missing integers")
    table = cartesian_table()
    table["source_id"] = MaskedColumn(IDS, mask=np.arange(50) == 3) if gap else IDS
    path, plain = tmp_path / f"a.{suffix}", tmp_path / f"a.{suffix.removesuffix('.gz')}"
    if suffix == "npz":
        np.savez(path, **{name: np.asarray(table[name]) for name in table.colnames})
    elif suffix == "hdf5":
        table.write(path, path="stars", serialize_meta=True)
    else:
        table.write(plain, format={"csv": "ascii.csv", "vot": "votable"}.get(suffix.split(".")[0]))
        if plain != path:
            path.write_bytes(gzip.compress(plain.read_bytes()))
    stars = Catalog.read(path)
    assert stars.names == tuple("" if gap and i == 3 else str(n) for i, n in enumerate(IDS))
    assert np.array_equal(stars.w.numpy(), W)


def test_nullable_integers(tmp_path):
    """A DataFrame and a Parquet file with one missing source_id keep the digits of the others; floats are named."""
    frame = cartesian_table().to_pandas()
    frame["source_id"] = pd.array([None, *IDS[1:]], dtype="Int64")
    frame.to_parquet(tmp_path / "a.parquet")
    for stars in (Catalog.from_dataframe(frame), Catalog.read(tmp_path / "a.parquet")):
        assert stars.names == ("", *map(str, IDS[1:]))
        assert "notes" not in stars.meta
    frame["source_id"] = frame["source_id"].astype(float)
    (note,) = Catalog.from_dataframe(frame).meta["notes"]
    assert "column source_id holds floating-point numbers" in note
    frame["source_id"] = np.arange(50.0)
    assert Catalog.from_dataframe(frame).names[7] == "7"


# --- FITS


@pytest.mark.parametrize("scale", [None, 0.1])
def test_scaled_integers_with_null(tmp_path, scale):
    """TNULL is of the stored integers, whether they are scaled or not: -9999 is no velocity of -999.9 km/s."""
    raw = np.zeros(50, dtype=[(name, ">i4") for name in CARTESIAN])
    for i, name in enumerate(CARTESIAN):
        raw[name] = np.round(W[:, i] * 10)
    raw["vz"][[4, 30]] = -9999
    hdu = fits.BinTableHDU(raw)
    hdu.header["TNULL6"] = -9999
    for i in range(6):
        if scale:
            hdu.header[f"TSCAL{i + 1}"] = scale
    hdu.writeto(tmp_path / "a.fits")
    with pytest.raises(
        CatalogError, match=r"column vz: 2 of 50 values are NaN, infinite or masked, the first in row 4"
    ):
        Catalog.read(tmp_path / "a.fits")
    stars = Catalog.read(tmp_path / "a.fits", drop_invalid=True)
    keep = np.delete(np.arange(50), [4, 30])
    expected = np.stack([raw[name][keep] for name in CARTESIAN], -1) * (scale or 1.0)
    np.testing.assert_allclose(stars.w.numpy(), expected, rtol=1e-12)


def test_ascii_table(tmp_path):
    """An ASCII table's TNULL and blanks are missing, not zero."""
    columns = [fits.Column(name=n, format="F12.5", array=W[:, i], null="NULL") for i, n in enumerate(CARTESIAN)]
    hdu = fits.TableHDU.from_columns(columns)
    file = io.BytesIO()
    hdu.writeto(file)
    text = file.getvalue()
    for row, word in ((0, b"NULL"), (1, b"")):
        number = b"%12.5f" % W[row, 5]
        assert text.count(number) == 1
        text = text.replace(number, word.rjust(12))
    (tmp_path / "a.fits").write_bytes(text)
    with pytest.raises(CatalogError, match="column vz: 2 of 50 values are NaN"):
        Catalog.read(tmp_path / "a.fits")
    np.testing.assert_allclose(Catalog.read(tmp_path / "a.fits", drop_invalid=True).w.numpy(), W[2:], atol=1e-5)


def test_several_tables(tmp_path):
    """GAS before STARS: the note says which was read and what else there is; hdu chooses by number or name."""
    gas, stars, log = cartesian_table(seed=1), cartesian_table(), Table({"step": [1, 2]})
    tables = [fits.table_to_hdu(t) for t in (log, gas, stars)]
    for hdu, name in zip(tables, ("LOG", "GAS", "STARS"), strict=True):
        hdu.name = name
    fits.HDUList([fits.PrimaryHDU(), *tables]).writeto(tmp_path / "a.fits")
    first = Catalog.read(tmp_path / "a.fits")
    assert np.array_equal(first.w.numpy(), phase_space(seed=1))
    assert first.meta["notes"] == [
        "table 2 'GAS' of 3 in the file was read; 3 'STARS' has coordinates too: choose with hdu=; 1 'LOG' has none"
    ]
    for hdu in (3, "3", "STARS", "stars"):
        chosen = Catalog.read(tmp_path / "a.fits", hdu=hdu)
        assert np.array_equal(chosen.w.numpy(), W)
        assert "notes" not in chosen.meta
    with pytest.raises(CatalogError, match=r"no table 'DUST'.*1 'LOG', 2 'GAS', 3 'STARS'"):
        Catalog.read(tmp_path / "a.fits", hdu="DUST")
    with pytest.raises(CatalogError, match="missing columns x, y, z"):
        Catalog.read(tmp_path / "a.fits", hdu="LOG")
    cartesian_table().write(tmp_path / "a.csv")
    with pytest.raises(CatalogError, match="hdu=2 chooses among several tables"):
        Catalog.read(tmp_path / "a.csv", hdu=2)


def test_hdf5(tmp_path):
    """A group of columns with units, by path among others; a snapshot and pandas' store are named."""
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for i, name in enumerate(CARTESIAN):
            file[f"run/stars/{name}"] = W[:, i] * (1000 if i < 3 else 1)
            file[f"run/stars/{name}"].attrs["unit"] = "pc" if i < 3 else "km/s"
        file["run/log/step"] = [1, 2]
        file["run/stars/name"] = [f"s{i}" for i in range(50)]
    stars = Catalog.read(tmp_path / "a.h5")
    np.testing.assert_allclose(stars.w.numpy(), W, rtol=1e-14)
    assert stars.names[3] == "s3"
    assert "'run/stars' of 2" in stars.meta["notes"][0]
    assert len(Catalog.read(tmp_path / "a.h5", hdu="/run/stars")) == 50
    with h5py.File(tmp_path / "snap.hdf5", "w") as file:
        file["PartType1/Coordinates"] = W[:, :3]
    with pytest.raises(CatalogError, match=r"N-body snapshot \(PartType1\).*read_snapshot.*bayespot snapshot"):
        Catalog.read(tmp_path / "snap.hdf5")


# --- text


@pytest.mark.parametrize("word", ["null", "NULL", "NA", "N/A", "--", "None", "nan", "NaN", ""])
@pytest.mark.parametrize("suffix", ["csv", "csv.gz", "ecsv", "ecsv.gz"])
def test_words_for_missing(tmp_path, word, suffix):
    """What archives write for a missing number is a missing number; the columns' numbers stay to the last digit."""
    values = [repr(float(v)) for v in W[:, 5]]
    values[7] = word
    names = [f"s{i}" for i in range(49)] + ["NA"]
    text = csv_text(vz=values, name=names)
    if suffix.startswith("ecsv"):
        datatypes = "".join(
            f"# - {{name: {n}, datatype: {'string' if n == 'name' else 'float64'}}}\n" for n in (*CARTESIAN, "name")
        )
        text = f"# %ECSV 1.0\n# ---\n# delimiter: ','\n# datatype:\n{datatypes}{text}"
    raw = text.encode()
    (tmp_path / f"a.{suffix}").write_bytes(gzip.compress(raw) if suffix.endswith("gz") else raw)
    with pytest.raises(CatalogError, match="column vz: 1 of 50 values are NaN, infinite or masked, the first in row 7"):
        Catalog.read(tmp_path / f"a.{suffix}")
    stars = Catalog.read(tmp_path / f"a.{suffix}", drop_invalid=True)
    assert np.array_equal(stars.w.numpy(), np.delete(W, 7, 0))
    assert stars.names[-1] == "NA"  # a name is no number


@pytest.mark.parametrize("coding", ["utf-8-sig", "utf-16"])
def test_byte_order_marks(tmp_path, coding):
    """Spreadsheets put a mark before the first name."""
    (tmp_path / "a.csv").write_bytes(csv_text().encode(coding))
    assert np.array_equal(Catalog.read(tmp_path / "a.csv").w.numpy(), W)


@pytest.mark.parametrize(
    ("delimiter", "header"), [(" ", "x y z vx vy vz"), (",", "x,y,z,vx,vy,vz"), (",", "x y z vx vy vz")]
)
@pytest.mark.parametrize("suffix", ["csv", "txt", "dat"])
def test_savetxt(tmp_path, delimiter, header, suffix):
    """numpy.savetxt puts the names into a comment."""
    path = tmp_path / f"a.{suffix}"
    np.savetxt(path, W, delimiter=delimiter, header=header, fmt="%.17g")
    assert np.array_equal(Catalog.read(path).w.numpy(), W)
    np.savetxt(path, W, delimiter=delimiter)
    with pytest.raises(CatalogError, match=r"no line names the columns: line 1 begins the numbers.*put a line x,y,z"):
        Catalog.read(path)


def test_semicolons_and_decimal_commas(tmp_path):
    """Semicolons are read and noted, tabs too; a decimal comma is named with its column and row."""
    (tmp_path / "a.csv").write_text(csv_text(";"))
    stars = Catalog.read(tmp_path / "a.csv")
    assert np.array_equal(stars.w.numpy(), W)
    assert "separated by semicolons" in stars.meta["notes"][0]
    (tmp_path / "a.tsv").write_text(csv_text("\t"))
    assert np.array_equal(Catalog.read(tmp_path / "a.tsv").w.numpy(), W)
    (tmp_path / "b.csv").write_text(csv_text(";").replace(".", ","))
    with pytest.raises(CatalogError, match=r"column x: row 0 .*'0,6.*decimal comma must be a point"):
        Catalog.read(tmp_path / "b.csv")
    (tmp_path / "c.csv").write_text(csv_text().replace(".", ","))
    with pytest.raises(CatalogError, match=r"line 2 has 12 values for 6 columns.*decimals written with commas"):
        Catalog.read(tmp_path / "c.csv")


def test_cut_in_a_line(tmp_path):
    """A last line without its last values is refused by its number; one without its end is noted; short ones too."""
    text = csv_text()
    whole = text.splitlines()
    (tmp_path / "a.csv").write_text(text[: -len(whole[-1]) + 20])
    with pytest.raises(CatalogError, match=r"line 51, the last, has \d of 6 values and no end: the file is truncated"):
        Catalog.read(tmp_path / "a.csv", drop_invalid=True)
    (tmp_path / "a.csv").write_text(text.rstrip("\n"))
    stars = Catalog.read(tmp_path / "a.csv")
    assert len(stars) == 50
    assert "line 51, the last, has no end of line" in stars.meta["notes"][0]
    whole[5] = "1.0,2.0"
    (tmp_path / "a.csv").write_text("\n".join(whole) + "\n")
    stars = Catalog.read(tmp_path / "a.csv", drop_invalid=True)
    assert len(stars) == 49
    assert "1 lines have fewer values than the 6 columns, the first line 6" in stars.meta["notes"][0]


def test_capitals(tmp_path):
    """X Y Z VX VY VZ and SOURCE_ID are read; beside a complete set in small letters capitals mean something else."""
    table = cartesian_table()
    table["source_id"] = IDS
    for name in table.colnames:
        table.rename_column(name, name.upper())
    table.write(tmp_path / "a.csv")
    stars = Catalog.read(tmp_path / "a.csv")
    assert np.array_equal(stars.w.numpy(), W)
    assert stars.names[3] == str(IDS[3])
    sky = observed_table()
    expected = Catalog.from_table(sky)
    for i, name in enumerate(CARTESIAN):
        sky[name.upper()] = W[:40, i] + 5
    assert_same(Catalog.from_table(sky), expected)


def test_own_csv_is_everyones(tmp_path):
    """pandas and astropy read bayespot's CSV without options: names, numbers to the last bit; and the metadata stay."""
    full = Catalog.from_table(observed_table())
    stars = Catalog(full.w, full.covariance, full.names, META | full.meta, full.observed)
    stars.write(tmp_path / "a.csv")
    frame, table = pd.read_csv(tmp_path / "a.csv"), Table.read(tmp_path / "a.csv")
    for i, name in enumerate(CARTESIAN):
        np.testing.assert_array_equal(np.asarray(table[name]), full.w[:, i].numpy())
        np.testing.assert_allclose(frame[name], full.w[:, i], rtol=1e-14)
    assert len(frame) == len(table) == 40
    assert_same(Catalog.read(tmp_path / "a.csv"), stars)
    frame[frame.x > 0].to_csv(tmp_path / "b.csv", index=False)
    with pytest.raises(CatalogError, match=r"rows of 40 written.*or remove bayespot_meta if you took rows out"):
        Catalog.read(tmp_path / "b.csv")
    frame[frame.x > 0].drop(columns="bayespot_meta").to_csv(tmp_path / "b.csv", index=False)
    assert len(Catalog.read(tmp_path / "b.csv")) == int((frame.x > 0).sum())


def test_csv_of_version_0_1(tmp_path):
    """Files with the metadata in a comment above the names are still read."""
    (tmp_path / "a.csv").write_text('# bayespot_meta: {"n_stars": 50, "meta": {"truth": 3}}\n' + csv_text())
    stars = Catalog.read(tmp_path / "a.csv")
    assert stars.meta == {"truth": 3}
    assert np.array_equal(stars.w.numpy(), W)
