"""Fields of posterior draws, run folders and figures, without a fit: draws come from the prior."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from astropy import units as u
from astropy.table import QTable
from matplotlib.figure import Figure

from bayespot import (
    DirectNetwork,
    Isochrone,
    MassSlopeNetwork,
    Posterior,
    SnapshotModel,
    SphericalMixture,
    load_run,
    save_run,
)
from bayespot.inference import Diagnostics, FitConfig, FitResult
from bayespot.potential import RADIAL_FIELDS, Field, PlaneField, truth_field
from bayespot.potential.fields import PLANE_FIELDS, PLANES
from bayespot.report import figures, plots, runs
from bayespot.report.plots.maps import round_levels
from bayespot.report.plots.style import power_of_ten
from bayespot.units import UNITS


@pytest.fixture(scope="module")
def model(isochrone_stars) -> SnapshotModel:
    return SnapshotModel(MassSlopeNetwork.for_stars(isochrone_stars.w), SphericalMixture())


@pytest.fixture(scope="module")
def result(model, isochrone_stars) -> FitResult:
    draws = model.sample_prior(40, seed=0)
    r = torch.linalg.vector_norm(isochrone_stars.x, dim=-1).sort().values
    r_q = [float(r[min(int(p * len(r)), len(r) - 1)]) for p in (0, 0.01, 0.05, 0.16, 0.5, 0.84, 0.95, 0.99, 1)]
    diagnosis = Diagnostics([-3.0, -2.0, -1.0, -1.1], 0.01, 0, 0.3, 1, [], 8, {"map": 1.0}, [])
    info = {"n_stars": len(isochrone_stars), "r_q": r_q, "meta": dict(isochrone_stars.meta)}
    start = {k: v[0] for k, v in draws.items()}
    return FitResult(model, draws, start, FitConfig(), diagnosis, info, {"log_q": torch.zeros(40).double()})


def test_fields_are_those_of_each_potential(result):
    """Every field equals the potential's own method draw by draw; v_c^2 = G M / r = -r a_r."""
    posterior = Posterior.from_result(result)
    r = np.array([1.0, 8.0, 40.0])
    for name in RADIAL_FIELDS:
        field = posterior.field(name, r)
        assert field.draws.shape == (40, 3)
        np.testing.assert_allclose(field.draws[7], truth_field(posterior.potential_at(7), name, r), rtol=1e-12)
    for name, field in posterior.radial_fields(r).items():
        np.testing.assert_allclose(field.draws, posterior.field(name, r).draws, rtol=1e-10, err_msg=name)
        assert (field.name, field.unit) == (name, UNITS[name])
    v_c, a_r = posterior.field("circular_speed", r), posterior.field("radial_acceleration", r)
    np.testing.assert_allclose(v_c.draws**2, -r * a_r.draws, rtol=1e-10)
    x = np.array([[3.0, -4.0, 12.0]])
    vector = posterior.field("acceleration", x).draws
    np.testing.assert_allclose(np.linalg.norm(vector, axis=-1), -posterior.field("radial_acceleration", [13.0]).draws)


def test_quantiles():
    """Mean, sd and quantiles of known draws."""
    field = Field("density", "Msun / kpc3", np.array([1.0]), np.arange(101.0)[:, None])
    assert field.mean == 50
    assert field.quantile(0.16)[0] == pytest.approx(16)
    assert field.sd[0] == pytest.approx(np.arange(101).std(ddof=1))


def test_predict_has_units(result):
    """Columns and units of the table."""
    table = Posterior.from_result(result).thinned(10).predict([1.0, 10.0])
    assert isinstance(table, QTable)
    assert table["r"].unit == u.kpc
    for name in RADIAL_FIELDS:
        for suffix in ("mean", "sd", "q2.5", "q16", "q50", "q84", "q97.5"):
            assert f"{name}_{suffix}" in table.colnames
    assert table["enclosed_mass_mean"].unit == u.Msun
    assert (table["density_q2.5"] <= table["density_q97.5"]).all()
    with pytest.raises(ValueError, match="radii must be positive"):
        Posterior.from_result(result).predict([-1.0])


@pytest.mark.parametrize(
    ("name", "points", "message"),
    [
        ("mass", [1.0], "unknown field 'mass'"),
        ("acceleration", [1.0], "needs positions"),
        ("circular_speed", [[1.0, 2.0, 3.0]], "function of radius"),
        ("density", [[1.0, 2.0]], "points must be"),
    ],
)
def test_bad_points(result, name, points, message):
    """Unknown fields and points that do not fit are refused."""
    with pytest.raises(ValueError, match=message):
        Posterior.from_result(result).field(name, points)


@pytest.mark.parametrize("name", PLANE_FIELDS)
@pytest.mark.parametrize("plane", PLANES)
def test_plane(result, name, plane, monkeypatch):
    """Shapes, units and cells; mean and sd are those of the field at the same points, however the points are divided;
    a sphere's map is symmetric and a function of radius."""
    posterior = Posterior.from_result(result)
    found = posterior.plane(name, plane, extent=12.0, n=10)
    n_first = 5 if plane == "Rz" else 10
    assert found.mean.shape == found.sd.shape == (10, n_first)
    assert found.unit == UNITS[name]
    assert found.edges[1][[0, -1]].tolist() == pytest.approx([-12, 12])
    assert found.edges[0][[0, -1]].tolist() == pytest.approx([0 if plane == "Rz" else -12, 12])
    draws = posterior.field(name, found.points.reshape(-1, 3)).draws
    draws = np.linalg.norm(draws, axis=-1) if name == "acceleration" else draws
    np.testing.assert_allclose(found.mean.ravel(), draws.mean(0), rtol=1e-9)
    np.testing.assert_allclose(found.sd.ravel(), draws.std(0, ddof=1), rtol=1e-9)
    np.testing.assert_allclose(found.relative_sd, found.sd / np.abs(found.mean))
    assert (found.sd == found.sd[::-1]).all()
    if plane == "xy":
        assert (found.sd == found.sd.T).all()
    monkeypatch.setattr("bayespot.posterior.posterior._PLANE_BLOCK", 200)
    np.testing.assert_allclose(posterior.plane(name, plane, 12.0, 10).sd, found.sd, rtol=1e-12)


def test_plane_of_a_flattened_potential():
    """An axisymmetric potential: symmetric about z = 0, not a function of radius, x and y alike."""
    model = SnapshotModel(DirectNetwork(5.0, 25.0, width=8), SphericalMixture())
    posterior = Posterior.prior(model, 12, seed=3)
    rz, xy = (posterior.plane("potential", plane, 10.0, 8) for plane in PLANES)
    np.testing.assert_allclose(rz.sd, rz.sd[::-1], rtol=1e-9)
    np.testing.assert_allclose(xy.sd, xy.sd.T, rtol=1e-9)
    r = np.linalg.norm(rz.points, axis=-1)
    assert r[7, 2] == pytest.approx(r[6, 3])
    assert abs(rz.sd[7, 2] / rz.sd[6, 3] - 1) > 1e-6
    draws = posterior.field("potential", rz.points.reshape(-1, 3)).draws
    np.testing.assert_allclose(rz.sd.ravel(), draws.std(0, ddof=1), rtol=1e-9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("enclosed_mass",), "unknown field 'enclosed_mass' of a plane"),
        (("density", "yz"), "plane must be one of Rz, xy; got 'yz'"),
        (("density", "Rz", -1.0), "extent must be positive"),
        (("density", "Rz", 5.0, 7), "n must be even"),
    ],
)
def test_bad_planes(result, arguments, message):
    """Each refusal names the value; without stars the extent has no default."""
    with pytest.raises(ValueError, match=message):
        Posterior.from_result(result).plane(*arguments)
    with pytest.raises(ValueError, match="give the extent"):
        Posterior(result.model, result.draws).plane("density")


def test_prior_predictive(model):
    """Prior draws bracket a decade of mass and can be plotted."""
    prior = Posterior.prior(model, 60, seed=1)
    v_c = prior.field("circular_speed", np.geomspace(0.5, 100, 30))
    assert np.isfinite(v_c.draws).all()
    assert v_c.quantile(0.95)[15] / v_c.quantile(0.05)[15] > 3
    ax = plots.draws(Figure().subplots(), v_c)
    assert len(ax.lines) == 30


def test_run_folder_round_trip(result, isochrone_stars, tmp_path):
    """A run read back gives the same fields; all files are there; no temporary folder is left."""
    folder = save_run(tmp_path / "run", result, isochrone_stars, model_name="spherical")
    names = {p.name for p in folder.iterdir()}
    assert names == {
        "config.json", "diagnostics.json", "model.safetensors", "posterior.nc", "stars.npz", "summary.ecsv",
        "fields.ecsv", "figures",
    }  # fmt: skip
    assert {p.name for p in (folder / "figures").iterdir()} >= {
        f"{name}.png" for name in (*figures.FIGURES, "sd_profiles", "uncertainty_maps")
    }
    posterior, config, diagnosis = load_run(folder)
    assert posterior.meta["positions"] == pytest.approx(isochrone_stars.x.numpy(), rel=1e-6)
    before = Posterior.from_result(result).field("density", [1.0, 5.0])
    np.testing.assert_allclose(posterior.field("density", [1.0, 5.0]).draws, before.draws)
    assert config["versions"]["torch"]
    assert diagnosis["k_hat"] == 0.3
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    with pytest.raises(ValueError, match="--overwrite"):
        save_run(folder, result, isochrone_stars)
    save_run(folder, result, isochrone_stars, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


@pytest.mark.usefixtures("no_figures")
def test_failed_write_keeps_the_old_run(result, isochrone_stars, tmp_path, monkeypatch):
    """A disk that fills up while a run is replaced leaves the old one readable."""
    folder = save_run(tmp_path / "run", result, isochrone_stars)

    def fail(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(runs, "draw_figures", fail)
    with pytest.raises(OSError, match="no space"):
        save_run(folder, result, isochrone_stars, overwrite=True)
    load_run(folder)
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


@pytest.mark.usefixtures("no_figures")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_broken_runs(result, isochrone_stars, tmp_path):
    """Missing, damaged and foreign files are named with the remedy."""
    with pytest.raises(ValueError, match="not a run folder"):
        load_run(tmp_path / "none")
    whole = save_run(tmp_path / "whole", result, isochrone_stars)
    for name, content, message in (
        ("config.json", '{"bayespot_run": 99, "versions": {"bayespot": "9.9"}}', "run format 99.*bayespot 9.9"),
        ("config.json", "{", "not valid JSON"),
        ("diagnostics.json", "{", "diagnostics.json is damaged"),
        ("model.safetensors", "junk", "model.safetensors is damaged"),
        ("posterior.nc", "junk", "posterior.nc is damaged"),
        ("stars.npz", "junk", "stars.npz is damaged"),
    ):
        folder = shutil.copytree(whole, tmp_path / "run")
        (folder / name).write_text(content)
        with pytest.raises(ValueError, match=message):
            load_run(folder)
        shutil.rmtree(folder)
    folder = shutil.copytree(whole, tmp_path / "run")
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config.json is missing"):
        load_run(folder)


def test_figures(result, isochrone_stars):
    """Two panels with labels and units, the truth's line, bands in both panels; residuals vanish for the truth."""
    posterior = Posterior.from_result(result)
    r = np.geomspace(1, 100, 40)
    truth = truth_field(Isochrone(1e11, 3.0), "circular_speed", r)
    with plots.style():
        figure = plots.two_panel(posterior.field("circular_speed", r), truth, np.geomspace(1, 50, 200))
        upper, lower = figure.axes
    assert "kpc" in lower.get_xlabel()
    assert "km" in upper.get_ylabel()
    assert len(upper.collections) == 3
    assert len(lower.collections) == 2
    exact = Field("circular_speed", "km / s", r, np.repeat(truth[None], 5, 0) * (1 + 1e-9 * np.arange(5)[:, None]))
    lower = plots.two_panel(exact, truth).axes[1]
    assert abs(lower.lines[0].get_ydata()).max() < 1e-6
    trace = plots.elbo_trace(Figure().subplots(), list(np.linspace(-100, -1, 50)))
    assert "ELBO" in trace.get_ylabel()


@pytest.mark.parametrize("plane", PLANES)
def test_uncertainty_maps(result, isochrone_stars, plane):
    """A map per field and one of the stars, aspect equal, axes and colour bars with units; the drawn sd is the plane's;
    the stars' map holds every star of the plane, scaled to their number."""
    posterior = Posterior.from_result(result)
    fields = [posterior.plane(name, plane, extent=30.0, n=8) for name in PLANE_FIELDS]
    with plots.style():
        figure = plots.uncertainty_maps(fields, isochrone_stars.x.numpy(), 2 * len(isochrone_stars))
        figure.canvas.draw()
    assert len(figure.axes) == 4
    assert all(ax.get_aspect() == 1 for ax in figure.axes)
    assert [ax.get_xlabel() for ax in figure.axes] == [r"$R$ [kpc]" if plane == "Rz" else r"$x$ [kpc]"] * 4
    labels = [ax.child_axes[0].get_xlabel() for ax in figure.axes]
    for label, part in zip(
        labels, ("km$^2$ s$^{-2}$", "%", "%", "kpc$^{-3}$" if plane == "Rz" else "kpc$^{-2}$"), strict=True
    ):
        assert part in label
    drawn = [np.asarray(ax.collections[0].get_array()) for ax in figure.axes]
    np.testing.assert_allclose(drawn[0], fields[0].sd)
    np.testing.assert_allclose(drawn[2], 100 * fields[2].relative_sd)
    x = isochrone_stars.x.numpy()
    edge = np.arange(-30, 31, 15.0)
    if plane == "Rz":
        area = np.pi * np.diff([0.0, 15.0**2, 30.0**2]) * 15
        inside = (np.hypot(x[:, 0], x[:, 1]) < 30) & (np.abs(x[:, 2]) < 30)
    else:
        area = np.diff(edge) * 15
        inside = (np.abs(x[:, :2]) < 30).all(1)
    assert np.nansum(np.ma.filled(figure.axes[3].collections[0].get_array(), 0) * area) == pytest.approx(
        2 * inside.sum()
    )


def test_map_ranges():
    """A map whose sd is the same everywhere, or zero, is drawn; contours are at round values."""
    cells = np.array([-1.5, -0.5, 0.5, 1.5])
    for sd in (0.0, 2.0):
        flat = PlaneField("density", UNITS["density"], "xy", cells, cells, np.full((4, 4), 10.0), np.full((4, 4), sd))
        ax = plots.uncertainty_map(Figure().subplots(), flat)
        ax.figure.canvas.draw()
    assert round_levels(4e4, 2e8, 6, True).tolist() == pytest.approx([1e5, 3e5, 1e6, 3e6, 1e7, 3e7, 1e8])
    assert round_levels(-5e4, -9e3, 4, False).tolist() == pytest.approx([-4e4, -3e4, -2e4, -1e4])
    for value, text in ((500, "500"), (-2e4, r"$-2\times10^{4}$"), (1e5, "$10^{5}$"), (-1e5, "$-10^{5}$")):
        assert power_of_ten(value) == text


def test_sd_profiles(result):
    """A curve per field, the relative sd in per cent; the stars are shaded."""
    posterior, r = Posterior.from_result(result), np.geomspace(1, 50, 20)
    fields = [posterior.field(name, r) for name in figures.SD_FIELDS]
    ax = plots.sd_profiles(fields, np.geomspace(1, 50, 100)).axes[0]
    for line, field in zip(ax.lines, fields, strict=True):
        np.testing.assert_allclose(line.get_ydata(), 100 * field.sd / np.abs(field.mean))
    assert len(ax.collections) == 1
    assert "%" in ax.get_ylabel()


def test_stars_of_older_runs(result, isochrone_stars, tmp_path):
    """A run without positions has its radii placed in random directions; without radii no stars are drawn."""
    posterior = Posterior.from_result(result)
    posterior.meta.pop("radii", None)
    assert figures.star_positions(posterior.meta) is None
    figures.draw_figures(tmp_path / "figures", posterior, [])
    placed = figures.star_positions({"radii": [1.0, 5.0]})
    assert sorted(np.linalg.norm(placed, axis=-1)) == pytest.approx([1.0] * 40 + [5.0] * 40)


def test_figures_that_are_there_are_kept(result, tmp_path):
    """Of a run that has its PNGs a report draws the PDFs, and one deleted PNG anew; all files are returned."""
    posterior, folder = Posterior.from_result(result), tmp_path / "figures"
    drawn = figures.draw_figures(folder, posterior, [1.0, 2.0])
    for path in drawn:
        path.write_bytes(b"as it was")
    (folder / "density.png").unlink()
    found = figures.draw_figures(folder, posterior, [1.0, 2.0], ("png", "pdf"), missing_only=True)
    assert set(found) == {path.with_suffix(suffix) for path in drawn for suffix in (".png", ".pdf")}
    assert {path.name for path in folder.glob("*.png") if path.read_bytes() != b"as it was"} == {"density.png"}
    assert all(path.stat().st_size > 9 for path in folder.glob("*.pdf"))
    figures.draw_figures(folder, posterior, [1.0, 2.0])
    assert not any(path.read_bytes() == b"as it was" for path in folder.glob("*.png"))


@pytest.mark.usefixtures("no_figures")
def test_config_is_json(result, isochrone_stars, tmp_path):
    """config.json holds every number of FitConfig."""
    folder = save_run(tmp_path / "run", result, isochrone_stars, command="bayespot fit")
    config = json.loads((folder / "config.json").read_text())
    assert config["fit"]["n_draws"] == FitConfig().n_draws
    assert config["command"] == "bayespot fit"
    assert config["catalog"]["meta"]["truth"]["potential"]["name"] == "Isochrone"


def test_inference_data(result):
    """ArviZ gets every site, and at radii the fields with a coordinate r and their units; the draws are the same."""
    posterior = Posterior.from_result(result)
    data = posterior.to_inference_data([1.0, 10.0])
    group = data.posterior
    assert set(posterior.draws) | set(RADIAL_FIELDS) == set(group.data_vars)
    assert group["r"].values.tolist() == [1.0, 10.0]
    for name in RADIAL_FIELDS:
        assert group[name].attrs["unit"] == UNITS[name]
        np.testing.assert_allclose(group[name].values[0], posterior.field(name, [1.0, 10.0]).draws, rtol=1e-12)
    name = "potential.ln_mass"
    np.testing.assert_array_equal(posterior.to_inference_data().posterior[name].values[0], posterior.draws[name])


def test_field_tables(result):
    """A field becomes a QTable in its unit, at radii or at positions, with mean, sd and quantiles."""
    posterior = Posterior.from_result(result)
    field = posterior.field("density", [1.0, 10.0])
    table = field.to_table()
    assert isinstance(table, QTable)
    assert table["r"].unit == u.kpc
    np.testing.assert_allclose(table["mean"].to_value(u.Msun / u.pc**3), field.mean / 1e9)
    np.testing.assert_array_equal(table["q50"].value, field.quantile(0.5))
    places = posterior.field("acceleration", [[8.0, 1.0, 0.5]]).to_table()
    assert places["z"][0] == 0.5 * u.kpc
    assert places["mean"].shape == (1, 3)


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_radii_that_are_none(result, bad):
    """Negative, NaN and infinite radii are refused wherever fields are asked for, and shown; so are such positions."""
    posterior = Posterior.from_result(result).thinned(3)
    for call in (
        lambda: posterior.field("circular_speed", [1.0, bad]),
        lambda: posterior.predict([1.0, bad]),
        lambda: posterior.to_inference_data([1.0, bad]),
        lambda: truth_field(Isochrone(1e11, 3.0), "density", [1.0, bad]),
    ):
        with pytest.raises(ValueError, match=rf"radii must be .*got \[{bad}"):
            call()
    if not np.isfinite(bad):
        with pytest.raises(ValueError, match="positions must be finite"):
            posterior.field("potential", [[1.0, bad, 0.0]])


def test_table_begins_with_what_is_read(result):
    """After the radius: median and 68 % interval of the circular speed, then of the mass."""
    names = Posterior.from_result(result).thinned(5).predict([1.0]).colnames
    first = [f"{field}_q{q}" for field in ("circular_speed", "enclosed_mass") for q in (50, 16, 84)]
    assert names[:7] == ["r", *first]
