"""Forecasts against the isochrone floor, an independent closed form, a real fit, and what users will do wrong.

The floor (parametric isochrone, isotropic, f(J) free): sd(ln M) = 0.92/sqrt(N), sd(ln b) = 1.38/sqrt(N), correlation
0.76, relative sd of Phi 0.62/sqrt(N) at 2.4 b and 0.9/sqrt(N) at the centre; all to 3 %.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from astropy.table import QTable
from bayespot.models import isochrone, spherical
from contracts.commands import bayespot

from bayespot import Catalog, FitConfig, Isochrone, MassSlopeNetwork, Posterior, SnapshotModel, SphericalMixture, fit
from bayespot.actions import IsochroneActions
from bayespot.likelihood import HeliocentricDistance, MeasurementErrors
from bayespot.mock import mock
from bayespot.posterior import Forecast, forecast
from bayespot.posterior.forecast import FORECAST_FIELDS
from bayespot.potential import DirectNetwork
from bayespot.units import G

M, B = 1e11, 3.0
RADII = np.geomspace(0.5, 150.0, 15)


@pytest.fixture(scope="module")
def stars() -> Catalog:
    return mock("isochrone", n_stars=30_000, seed=11)


@pytest.fixture(scope="module")
def parametric(stars) -> Forecast:
    return forecast(isochrone.build(stars), stars)


@pytest.fixture(scope="module")
def free_form(stars) -> Forecast:
    return forecast(spherical.build(stars), stars)


def test_isochrone_floor(parametric):
    """The latents are the truth's, and the bound is the floor of the design to 3 %, itself known to 1 %."""
    assert parametric.u.tolist() == pytest.approx([math.log(M), math.log(B)], abs=1e-5)
    assert parametric.misfit < 1e-5
    covariance = parametric.covariance(n_stars=10_000)
    sd = 100 * covariance.diagonal().sqrt()
    assert sd.tolist() == pytest.approx([0.92, 1.38], rel=0.03)
    assert 1e4 * float(covariance[0, 1] / sd.prod()) == pytest.approx(0.76, rel=0.03)
    assert 100 * parametric.relative_sd("potential", [1e-3 * B, 2.4 * B], 10_000) == pytest.approx(
        [0.9, 0.62], rel=0.03
    )
    assert parametric.monte_carlo_error("potential", RADII, 10_000) < 0.01


def closed_form_scores(w: torch.Tensor) -> torch.Tensor:
    """d ln f(J)/d(ln M, ln b) of stars at the truth: f(E) of Binney & Tremaine (2008), eq. 4.54, and closed-form
    actions."""
    u = torch.tensor([math.log(M), math.log(B)], dtype=torch.float64)
    h = 1e-4

    def J_r(ln_m: float, ln_b: float) -> torch.Tensor:
        return IsochroneActions().capped_actions(Isochrone(math.exp(ln_m), math.exp(ln_b)), w).J[:, 0]

    d_m = (J_r(u[0] + h, u[1]) - J_r(u[0] - h, u[1])) / (2 * h)
    d_b = (J_r(u[0], u[1] + h) - J_r(u[0], u[1] - h)) / (2 * h)
    energy = Isochrone(M, B).phi(w[:, :3]) + (w[:, 3:] ** 2).sum(-1) / 2
    e = (-energy * B / (G * M)).requires_grad_()
    bracket = (
        27 - 66 * e + 320 * e**2 - 240 * e**3 + 64 * e**4
        + 3 * (16 * e**2 + 28 * e - 9) * e.sqrt().asin() / (e * (1 - e)).sqrt()
    )  # fmt: skip
    ln_f = e.log() / 2 - 4 * (2 * (1 - e)).log() + bracket.log()
    (slope,) = torch.autograd.grad(ln_f.sum(), e)
    omega_r = (-2 * energy) ** 1.5 / (G * M)
    slope_in_J = -slope * B / (G * M) * omega_r
    return slope_in_J[:, None] * torch.stack([d_m, d_b], -1)


def test_information_is_that_of_the_scores(parametric, stars):
    """Scores in closed form, star by star, have zero mean in every quarter of the angular momenta (4 standard errors),
    and the forecast's information as their mean square (4 standard errors, each below 10 %)."""
    scores = closed_form_scores(stars.w)
    square = scores[:, :, None] * scores[:, None, :]
    error = square.std(0) / len(scores) ** 0.5
    assert bool((error < 0.1 * parametric.information.abs()).all())
    assert bool(((square.mean(0) - parametric.information).abs() < 4 * error).all())
    L = torch.linalg.vector_norm(torch.linalg.cross(stars.x, stars.v), dim=-1)
    for part in L.argsort().tensor_split(4):
        error = scores[part].std(0) / len(part) ** 0.5
        assert bool((scores[part].mean(0).abs() < 4 * error).all())


def test_number_of_stars(parametric, free_form):
    """The bound falls as 1/sqrt(N); with the prior slower, but to the bound for large N; stars_needed inverts both."""
    assert free_form.relative_sd("enclosed_mass", RADII, 4e4) == pytest.approx(
        free_form.relative_sd("enclosed_mass", RADII, 1e4) / 2, rel=1e-6
    )
    ratio = free_form.relative_sd("potential", RADII, 1e3, True) / free_form.relative_sd("potential", RADII, 1e5, True)
    assert (ratio < 10).all()
    many = free_form.relative_sd("potential", [5.0], 1e9, True) / free_form.relative_sd("potential", [5.0], 1e9)
    assert many[0] == pytest.approx(1, abs=0.02)
    for found in (parametric, free_form):
        for prior in (False, True):
            n = found.stars_needed("circular_speed", 8.0, 0.01, prior)
            assert found.relative_sd("circular_speed", 8.0, n, prior)[0] == pytest.approx(0.01, rel=1e-3)
    assert parametric.stars_needed("potential", 7.2, 0.001) == pytest.approx(3.8e5, rel=0.05)
    assert parametric.stars_needed("potential", 7.2, 100.0, prior=True) == 1


def test_fields_agree(parametric):
    """v_c^2 = G M / r: half the relative sd; -r a_r the same as M."""
    mass = parametric.relative_sd("enclosed_mass", RADII, 100)
    assert parametric.relative_sd("circular_speed", RADII, 100) == pytest.approx(mass / 2, rel=1e-5)
    assert parametric.relative_sd("radial_acceleration", RADII, 100) == pytest.approx(mass, rel=1e-5)


def test_free_form_costs(parametric, free_form):
    """Not knowing the family costs: the bound is nowhere below the parametric one (1 % for the simulation), the prior
    never hurts, and the network that is closest to the isochrone is within 1 % of its M(<r)."""
    assert free_form.misfit < 0.01
    for name in (*FORECAST_FIELDS, "density"):
        bound = free_form.relative_sd(name, RADII, 1e4)
        assert (bound > 0.99 * parametric.relative_sd(name, RADII, 1e4)).all(), name
        assert (free_form.relative_sd(name, RADII, 1e4, True) <= bound * (1 + 1e-9)).all(), name


@pytest.mark.parametrize("build", [isochrone.build, spherical.build], ids=["parametric", "free form"])
def test_posterior_of_a_fit(build, isochrone_stars, parametric, free_form):
    """The posterior sd of a fit to 2 000 other stars is the forecast's with the prior: 15 % for the isochrone, 30 % for
    the network's mass and circular speed. Three components describe f(J) as well as the forecast knows it."""
    config = FitConfig(seed=1, guide="laplace", n_components=3, k_hat_draws=0)
    result = fit(build(isochrone_stars), isochrone_stars, config)
    posterior, r = Posterior.from_result(result), np.geomspace(1.5, 60, 8)
    exact = build is isochrone.build
    for name in FORECAST_FIELDS if exact else FORECAST_FIELDS[1:]:
        field = posterior.field(name, r)
        expected = (parametric if exact else free_form).relative_sd(name, r, 2000, prior=True)
        assert field.sd / np.abs(field.mean) == pytest.approx(expected, rel=0.15 if exact else 0.3), name


def test_draws(free_form):
    """Draws with many stars have the forecast's sd (2 000 draws: 6 %); with few stars the outer potential, which is
    not linear in the latents, is wider."""
    r = np.geomspace(1.5, 60, 6)
    field = free_form.posterior(1e5, 2000, seed=0).field("enclosed_mass", r)
    assert field.sd / field.mean == pytest.approx(free_form.relative_sd("enclosed_mass", r, 1e5, True), rel=0.06)
    few = free_form.posterior(1000, 1000, seed=0).field("potential", [100.0])
    assert few.sd[0] / abs(few.mean[0]) > 1.1 * free_form.relative_sd("potential", [100.0], 1000, True)[0]


@pytest.mark.parametrize("system", ["jaffe", "hernquist-in-logarithmic", "isochrone-radial", "plummer-in-core"])
def test_other_systems(system):
    """Infinite depth, infinite mass, anisotropy, a core: finite, and within a factor 4 of the isochrone's floor at the
    median radius."""
    catalog = mock(system, n_stars=3000, seed=2)
    found = forecast(spherical.build(catalog), catalog)
    assert found.misfit < 0.2
    sd = 100 * found.relative_sd("circular_speed", np.median(found.stars_r), 1e4, prior=True)[0]
    assert 0.2 < sd < 2.5


def test_prior_of_the_model(stars):
    """A flat prior adds nothing. The stars say nothing about a potential's value where it is a latent of its own: the
    bound is infinite, with the prior it is the prior's."""
    flat = forecast(SnapshotModel(MassSlopeNetwork.for_stars(stars.w, 5, prior="none"), SphericalMixture()), stars)
    assert flat.relative_sd("density", RADII, 100, True) == pytest.approx(flat.relative_sd("density", RADII, 100))

    class Lifted(Isochrone):
        """Isochrone whose zero point is free."""

        def __init__(self) -> None:
            super().__init__(m_tot=torch.distributions.LogNormal(*torch.tensor([25.3, 1.0]).double()), r_s=B)
            self._set_parameter("zero", torch.distributions.Normal(*torch.tensor([0.0, 100.0]).double()))

        def phi(self, x: torch.Tensor) -> torch.Tensor:
            return super().phi(x) + self.zero

    lifted = forecast(SnapshotModel(Lifted(), SphericalMixture()), stars)
    assert np.isinf(lifted.relative_sd("potential", RADII, 1e6)).all()
    assert np.isfinite(lifted.relative_sd("circular_speed", RADII, 1e6)).all()
    assert math.isinf(lifted.stars_needed("potential", 8.0, 1e-6, prior=True))
    sd = lifted.relative_sd("potential", [3.0], 1e12, prior=True)[0] * abs(
        float(Isochrone(M, B).phi_r(torch.tensor(3.0)))
    )
    assert sd == pytest.approx(100, rel=0.02)


def test_table(parametric):
    """Values with units, both kinds of sd, and what it was made for."""
    table = parametric.table(RADII, 5000)
    assert str(table["enclosed_mass"].unit) == "solMass"
    assert table.meta["n_stars"] == 5000
    assert table["potential_bound"] == pytest.approx(parametric.relative_sd("potential", RADII, 5000))
    assert (table["circular_speed_with_prior"] <= table["circular_speed_bound"]).all()
    assert set(parametric.parameters(100)) == {"potential.m_tot", "potential.r_s"}


def test_bad_input(stars, parametric):
    """Each refusal names the reason and the value."""
    network = MassSlopeNetwork.for_stars(stars.w)

    def model(**extras) -> SnapshotModel:
        return SnapshotModel(network, SphericalMixture(), **extras)

    few = mock("isochrone", n_stars=50, seed=0)
    for made, catalog, message in (
        (model(selection=HeliocentricDistance(10.0)), stars, "the model has a selection"),
        (model(errors=MeasurementErrors()), stars, "measurement errors"),
        (SnapshotModel(DirectNetwork(3.0, 25.0), SphericalMixture()), stars, "axisymmetric"),
        (SnapshotModel(Isochrone(M, B), SphericalMixture()), stars, "no latent parameters"),
        (model(), Catalog(stars.w), "is no mock"),
        (model(), few, "at least 160 simulated stars, got 50"),
    ):
        with pytest.raises(ValueError, match=message):
            forecast(made, catalog)
    for arguments, message in (
        (("mass", [1.0], 100), "unknown field 'mass'"),
        (("potential", [-1.0], 100), "radii must be positive"),
        (("potential", [1.0], 0), "n_stars must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            parametric.relative_sd(*arguments)
    with pytest.raises(ValueError, match="accuracy must be positive"):
        parametric.stars_needed("potential", 1.0, 0.0)


@pytest.mark.usefixtures("drawn_figures")
def test_command(tmp_path):
    """Table on the screen and in a file, a figure beside it, the number of stars; existing files are kept."""
    arguments = (
        "forecast",
        "isochrone",
        "--n-stars",
        "10000",
        "--accuracy",
        "0.1",
        "--field",
        "potential",
        "--radius",
        "7.2",
    )
    done = bayespot(*arguments, "--n-simulated", "4000", "--radii", "0.3:30:4", "-o", "sd.ecsv", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    words = done.stdout.split("potential at 7.2 kpc: ")[1].split()
    assert float(words[0]) == pytest.approx(3.8e5, rel=0.1)
    table = QTable.read(tmp_path / "sd.ecsv")
    assert len(table) == 4
    assert 100 * table["potential_bound"][0] == pytest.approx(0.9, rel=0.06)
    assert (tmp_path / "sd.png").stat().st_size > 10_000
    assert {p.name for p in tmp_path.iterdir()} == {"sd.ecsv", "sd.png"}
    done = bayespot(*arguments, "-o", "sd.ecsv", cwd=tmp_path)
    assert done.returncode == 2
    assert "sd.ecsv exists" in done.stderr


def test_triaxial_models_are_refused():
    """A forecast of a triaxial model says what forecasts are for, and what to do instead."""
    stars = mock("isochrone", n_stars=200, seed=0)
    model = SnapshotModel(DirectNetwork(3.0, 25.0, "triaxial"), SphericalMixture())
    with pytest.raises(ValueError, match="DirectNetwork is triaxial: forecasts are for spherical and axisymmetric"):
        forecast(model, stars)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("spherical", "--system", "disk"), "unknown system 'disk'"),
        (("spherical", "--system", "disc"), "the stars were drawn by their orbits"),
        (("gaia_sphere",), "has a selection"),
        (("spherical", "--accuracy", "0"), "--accuracy must be positive"),
        (("spherical", "--accuracy", "1", "--field", "mass"), "unknown field 'mass'"),
        (("spherical", "--figure", "a.txt"), "a figure is a .png or .pdf file"),
    ],
)
def test_command_errors(arguments, words, tmp_path):
    """One message, status 2, nothing written."""
    done = bayespot("forecast", *arguments, "--n-simulated", "500", cwd=tmp_path)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_wrong_family_is_said(tmp_path):
    """An isochrone in an NFW halo: the note says that no number of stars helps."""
    done = bayespot("forecast", "isochrone", "--system", "hernquist-in-nfw", "--n-simulated", "500", cwd=tmp_path)
    assert done.returncode == 0
    assert "however many the stars" in done.stderr


def test_figure(free_form):
    """Three panels, two curves for each of three numbers of stars, ten times fewer stars three times the bound."""
    from bayespot.report import plots

    with plots.style():
        figure = plots.forecast_figure(free_form, RADII, 10_000)
    assert len(figure.axes) == 3
    for ax in figure.axes:
        assert "kpc" in ax.get_xlabel()
        few, usual = (ax.lines[i].get_ydata() for i in (1, 3))
        assert np.asarray(few) == pytest.approx(math.sqrt(10) * np.asarray(usual), rel=1e-6)
