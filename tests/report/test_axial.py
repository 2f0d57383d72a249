"""Runs of axisymmetric potentials: figures, report page and tables; draws of a disc in a halo are made by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from astropy.table import QTable
from contracts.commands import bayespot, quick_figures
from matplotlib.figure import Figure
from matplotlib.path import Path as Outline
from pyro.distributions import LogNormal

from bayespot import Catalog, SnapshotModel, load_run, save_run
from bayespot.df import ActionMixture
from bayespot.diagnostics import load_netcdf
from bayespot.inference import Diagnostics, FitConfig, FitResult
from bayespot.posterior import Predictive
from bayespot.potential import MERIDIONAL_FIELDS, NFW, Field, MiyamotoNagai, PlaneField
from bayespot.potential.analytic import describe
from bayespot.report import plots
from bayespot.report.axial_figures import AXIAL_FIGURES, SHARED_FIGURES
from bayespot.report.page import AXIAL_CAPTIONS, CAPTIONS, FIELD_FIGURES
from bayespot.report.runs import save_predictive
from bayespot.units import UNITS

R = np.geomspace(1, 20, 12)
NEW = {*AXIAL_FIGURES, *SHARED_FIGURES, "sd_profiles", "meridional_maps"}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run with the truth of a mock and 300 stars."""

    def prior(value: float) -> LogNormal:
        return LogNormal(torch.tensor(math.log(value)).double(), torch.tensor(0.1).double())

    model = SnapshotModel(MiyamotoNagai(prior(6e10), 3.0, 0.3) + NFW(prior(8e11), 16.0), ActionMixture(1))
    draws = {name: value for name, value in model.sample_prior(5, seed=0).items() if name.startswith("potential.")}
    w = torch.randn(300, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    truth = {"potential": describe(MiyamotoNagai(6e10, 3.0, 0.3) + NFW(8e11, 16.0)), "seed": 0}
    stars = Catalog(w * torch.tensor([5.0, 5, 1, 90, 90, 40]).double(), meta={"truth": truth})
    r = torch.linalg.vector_norm(stars.x, dim=-1).sort().values
    r_q = [float(r[min(int(p * 300), 299)]) for p in (0, 0.01, 0.05, 0.16, 0.5, 0.84, 0.95, 0.99, 1)]
    info = {"n_stars": 300, "r_q": r_q, "radii": r.tolist(), "meta": dict(stars.meta)}
    diagnosis = Diagnostics([-1.0] * 50, 0.01, 0, 0.3, 1, [], 8, {"map": 1.0}, [], n_stars=300)
    start = {name: value[0] for name, value in draws.items()}
    result = FitResult(model, draws, start, FitConfig(), diagnosis, info, {"log_q": torch.zeros(5)})
    folder = tmp_path_factory.mktemp("axial") / "run"
    with quick_figures():
        return save_run(folder, result, stars, model_name="disc_and_halo", command="bayespot fit")


def test_run_and_report(run):
    """The figures of the plane in place of a sphere's; the page shows them and tabulates the fields of the plane; every
    figure has its caption."""
    names = {path.stem for path in (run / "figures").glob("*.png")}
    assert names == NEW | {"parameters", "elbo"}
    assert set(FIELD_FIGURES) <= set(CAPTIONS | AXIAL_CAPTIONS)
    assert set(FIELD_FIGURES) >= NEW
    assert str(QTable.read(run / "fields.ecsv")["vertical_acceleration_q50"].unit) == "km2 / (kpc s2)"
    with quick_figures():
        done = bayespot("report", "run", cwd=run.parent)
    assert done.returncode == 0, done.stderr
    for words in ("R [kpc]", "K_z(1.1)", "q(rho)", "meridional_maps.png"):
        assert words in done.stdout
    page = (run / "report.html").read_text(encoding="utf-8")
    for words in ("in the plane z = 0", "K_z at 1.1 kpc", "q of ρ", AXIAL_CAPTIONS["meridional_maps"][0]):
        assert words in page, words


def test_predict(run):
    """Tables against R and over (R, z) with units; heights want --plane, and are read or refused."""
    done = bayespot("predict", "run", "--radii", "2:8:2", "-o", "fields.ecsv", cwd=run.parent)
    assert done.returncode == 0, done.stderr
    assert "density_flattening_sd" in QTable.read(run.parent / "fields.ecsv").colnames
    done = bayespot(
        "predict", "run", "--plane", "--radii", "2:8:2", "--heights", "0:3:4", "-o", "plane.ecsv", cwd=run.parent
    )
    assert done.returncode == 0, done.stderr
    assert "2 x 4 places (R, z), 5 draws" in done.stdout
    table = QTable.read(run.parent / "plane.ecsv")
    assert table["R"].value.tolist() == pytest.approx([2.0, 8.0] * 4)
    assert table["z"].value.tolist() == pytest.approx(np.repeat([0.0, 1, 2, 3], 2))
    posterior, _, _ = load_run(run)
    field = posterior.meridional_fields([8.0], [3.0])["acceleration_R"]
    assert table["acceleration_R_mean"][-1].value == pytest.approx(field.mean[0])
    for arguments, words in (
        (("--heights", "0:3:4"), "add --plane"),
        (("--plane", "--heights", "3:0:4"), "--heights needs LO <= HI"),
        (("--plane", "--heights", "tall"), "--heights takes LO:HI:N"),
    ):
        done = bayespot("predict", "run", *arguments, "-o", "other.ecsv", cwd=run.parent)
        assert done.returncode == 2
        assert words in done.stderr


def test_stored_check(run):
    """A predictive check keeps the edges of its bins in R and |z|; the page names its statistics."""
    rng = np.random.default_rng(0)
    shapes = dict.fromkeys(("counts", "heights", "mean_v_phi", "sigma_R", "sigma_phi", "sigma_z"), 3)
    shapes |= {"directions": 5, "planes": 5}
    drawn = {name: rng.normal(size=(50, n)) for name, n in shapes.items()} | {"angles": rng.normal(size=50)}
    p_values = dict.fromkeys(drawn, 0.4)
    edges, middle = np.array([0.0, 1, 2, np.inf]), np.array([0.5, 1.5, 3.0])
    with quick_figures():
        save_predictive(run, Predictive(edges, middle, drawn, drawn, p_values, [], edges / 2, middle / 2))
    group = load_netcdf(run / "posterior.nc")["observed_data"]
    np.testing.assert_allclose(group["R_edges"], edges)
    np.testing.assert_allclose(group["z_edges"], edges / 2)
    with quick_figures():
        done = bayespot("report", "run", cwd=run.parent)
    assert done.returncode == 0, done.stderr
    assert "dispersion of v_phi" in (run / "report.html").read_text(encoding="utf-8")


def test_bands_figure():
    """Flattenings on a linear axis that begins at zero, with both bands and the truth; frequencies with their error in
    a panel below. Axes have names and units."""
    scatter = 1 + 0.05 * np.random.default_rng(0).normal(size=(200, 1))
    fields = [Field(name, UNITS[name], R, q * scatter * np.ones_like(R)) for name, q in
              (("density_flattening", 0.4), ("potential_flattening", 0.8))]  # fmt: skip
    truths = {"density_flattening": 0.4 + 0 * R, "potential_flattening": 0.8 + 0 * R}
    (ax,) = plots.bands_figure(fields, truths, R).axes
    assert ax.get_ylim()[0] == 0
    assert len(ax.collections) == 5
    assert "z/R" in ax.get_ylabel()
    assert ax.get_xlabel() == "$R$ [kpc]"
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [r"$q$ of $\rho$", r"$q$ of $\Phi$", "truth"]
    fields = [Field(name, UNITS[name], R, w * scatter / R) for name, w in
              (("epicycle_frequency", 300.0), ("vertical_frequency", 500.0))]  # fmt: skip
    upper, lower = plots.bands_figure(fields).axes
    assert upper.get_yscale() == "log"
    assert "km" in upper.get_ylabel()
    assert lower.get_ylabel() == "band [%]"
    np.testing.assert_allclose(lower.lines[0].get_ydata(), 0, atol=1e-9)


def test_meridional_maps():
    """Means above, relative sd below, each with a colour bar that names its unit; the stars' region is outlined, and
    holds about the share of the stars that it says."""
    cells = np.arange(10) + 0.5
    rising = np.outer(cells[:5], cells)
    maps = [
        PlaneField(name, UNITS[name], "Rz", cells, cells[:5], -1 - rising, 0.1 + rising) for name in MERIDIONAL_FIELDS
    ]
    x = 2 * np.random.default_rng(0).normal(size=(20_000, 3)) * [1, 1, 0.5]
    with plots.style():
        figure = plots.meridional_maps(maps, x)
        figure.canvas.draw()
    assert len(figure.axes) == 8
    for k, name in enumerate(MERIDIONAL_FIELDS):
        above, below = figure.axes[k], figure.axes[4 + k]
        sign = 1 if name == "potential" else -1
        np.testing.assert_allclose(np.asarray(above.collections[0].get_array()), sign * maps[k].mean)
        np.testing.assert_allclose(np.asarray(below.collections[0].get_array()), 100 * maps[k].relative_sd)
        assert "km$^2$" in above.child_axes[0].get_xlabel() or "kpc$^{-3}$" in above.child_axes[0].get_xlabel()
        assert "[%]" in below.child_axes[0].get_xlabel()
        assert below.get_xlabel() == "$R$ [kpc]"
    ax = plots.star_region(Figure().subplots(), maps[0], x)
    (path,) = ax.collections[-1].get_paths()
    # the outline ends at the middles of the first cells: closed along axis and plane
    outline = path.vertices[np.argsort(np.arctan2(path.vertices[:, 1], path.vertices[:, 0]))]
    closed = np.concatenate([[[0, 0], [outline[0, 0], 0]], outline, [[0, outline[-1, 1]]]])
    places = np.stack([np.hypot(x[:, 0], x[:, 1]), np.abs(x[:, 2])], -1)
    assert Outline(closed).contains_points(places).mean() == pytest.approx(0.68, abs=0.03)
