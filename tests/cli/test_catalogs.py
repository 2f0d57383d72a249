"""The catalogue of a run, read again: in the run's own frame, refused where it holds other stars."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from astropy.table import QTable

from bayespot.catalog import Catalog
from bayespot.catalog.frame import Frame, heliocentric
from bayespot.cli.catalogs import read_fitted
from bayespot.mock import mock
from bayespot.report.manifest import RunError

OPTIONS = {
    "drop_invalid": False,
    "drop_duplicates": False,
    "allow_missing": False,
    "hdu": None,
    "r_sun": None,
    "z_sun": None,
    "v_sun": None,
}


def config(catalog: Catalog) -> dict:
    """What a run keeps of its catalogue."""
    r = torch.linalg.vector_norm(catalog.x, dim=-1)
    return {"catalog": {"n_stars": len(catalog), "r_q": [float(r.min()), float(r.max())], "meta": catalog.meta}}


@pytest.fixture(scope="module")
def observed(tmp_path_factory):
    """30 stars of the isochrone as seen from the Sun, positions and velocities alone."""
    path = tmp_path_factory.mktemp("stars") / "stars.ecsv"
    QTable(heliocentric(mock("isochrone", n_stars=30, seed=3).w.numpy(), Frame(r_sun=8.3))).write(path)
    return path


def test_in_the_frame_of_the_run(observed, tmp_path):
    """A run fitted with r_sun = 8.3 kpc: its catalogue comes out the same without the option, to rounding."""
    fitted = Catalog.read(observed, frame=Frame(r_sun=8.3), check_offset=False)
    found = read_fitted(tmp_path / "run", config(fitted), observed, **OPTIONS)
    assert torch.equal(found.w, fitted.w)
    assert found.frame.r_sun == 8.3
    with pytest.raises(RunError, match=r"reaches .* kpc, the stars that .*run was fitted to"):
        read_fitted(tmp_path / "run", config(fitted), observed, **OPTIONS | {"r_sun": 8.0})


def test_other_stars_are_refused(observed, tmp_path):
    fitted = Catalog.read(observed, frame=Frame(r_sun=8.3), check_offset=False)
    fewer = fitted[np.arange(20)]
    with pytest.raises(RunError, match=r"stars\.ecsv has 30 stars, .*run was fitted to 20"):
        read_fitted(tmp_path / "run", config(fewer), observed, **OPTIONS)
