"""Forecasts of flattened galaxies: against the exact information of a sphere, and wrong input."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from astropy.table import QTable
from contracts.commands import bayespot
from pyro.distributions import LogNormal

from bayespot import Catalog, SnapshotModel
from bayespot.actions import SphericalActions, StaeckelFudge
from bayespot.df import ActionMixture
from bayespot.mock import galaxy_mock, mock, orbit_mock
from bayespot.mock.flattened import GALAXY_STARS
from bayespot.mock.orbits import DoublePowerLawOrbits, orbits_from_description
from bayespot.posterior import Forecast, forecast
from bayespot.potential import NFW, MiyamotoNagai, MWPotential2014, Plummer, PowerLawCutoff


def near(value: float) -> LogNormal:
    """A prior about a value."""
    return LogNormal(torch.tensor(math.log(value), dtype=torch.float64), 1.0)


def of_galaxy() -> SnapshotModel:
    """`MWPotential2014` with the masses of disc and halo and the halo's scale radius free."""
    bulge, disc, halo = MWPotential2014().members
    free = PowerLawCutoff(float(bulge.m_tot), float(bulge.r_c), float(bulge.gamma))
    free = free + MiyamotoNagai(near(float(disc.m_tot)), 3.0, 0.28) + NFW(near(float(halo.m_s)), near(float(halo.r_s)))
    return SnapshotModel(free, ActionMixture(2), finder=StaeckelFudge())


@pytest.fixture(scope="module")
def disc() -> Catalog:
    return galaxy_mock("disc", n_stars=1000, seed=1)


@pytest.fixture(scope="module")
def of_disc(disc) -> Forecast:
    return forecast(of_galaxy(), disc)


def test_information_is_that_of_exact_scores():
    """Halo stars in a sphere, the model a Miyamoto & Nagai disc of no scale length: as exact scores have it, to 4
    standard errors of these (each below 10 %)."""
    truth = MiyamotoNagai(5e10, 1e-9, 2.0)
    stars = orbit_mock(truth, DoublePowerLawOrbits(J_0=300.0, inner=1.2, outer=9.0), n_stars=4000, seed=5)
    model = SnapshotModel(MiyamotoNagai(near(5e10), 1e-9, near(2.0)), ActionMixture(2), finder=StaeckelFudge())
    found = forecast(model, stars)
    assert found.misfit < 1e-5
    population, h, finder = DoublePowerLawOrbits(J_0=300.0, inner=1.2, outer=9.0), 1e-4, SphericalActions()

    def J(ln_m: float, ln_b: float) -> torch.Tensor:
        return finder.actions(Plummer(5e10 * math.exp(ln_m), 2.0 * math.exp(ln_b)), stars.w)

    # the least bound are free in the lighter of these potentials
    bound = torch.stack([J(-0.02, 0.0), J(0.0, 0.02)]).isfinite().all(-1).all(0)
    assert int((~bound).sum()) < 0.01 * len(stars)
    stars = Catalog(stars.w[bound])
    at = J(0.0, 0.0).requires_grad_()
    (slopes,) = torch.autograd.grad(population.log_prob(at).sum(), at)
    changes = torch.stack([J(h, 0.0) - J(-h, 0.0), J(0.0, h) - J(0.0, -h)], -1)[:, 0] / (2 * h)
    scores = slopes[:, :1] * changes
    square = scores[:, :, None] * scores[:, None, :]
    error = square.std(0) / len(scores) ** 0.5
    assert bool((error < 0.1 * found.information.abs()).all())
    assert bool(((square.mean(0) - found.information).abs() < 4 * error).all())


def test_fields(of_disc):
    """v_c and K_z are known to some per cent; more stars help as their root, the prior a little; places (R, z) as
    well as radii in the plane."""
    R = np.array([4.0, 8.0])
    assert of_disc.misfit < 1e-3
    sd = of_disc.relative_sd("circular_speed", R, 2000)
    assert (sd > 0.001).all()
    assert (sd < 0.02).all()
    assert of_disc.relative_sd("circular_speed", R, 8000) == pytest.approx(sd / 2, rel=1e-6)
    assert (of_disc.relative_sd("circular_speed", R, 2000, prior=True) < sd).all()
    above = np.stack([R, np.full(2, 1.1)], -1)
    K_z = of_disc.relative_sd("vertical_acceleration", R, 2000)
    assert of_disc.relative_sd("acceleration_z", above, 2000) == pytest.approx(K_z, rel=1e-4)
    assert 0 < of_disc.monte_carlo_error("circular_speed", R, 2000) < 0.3
    table = of_disc.table(R, 2000)
    assert table["vertical_acceleration_bound"] == pytest.approx(K_z)
    assert str(table["vertical_acceleration"].unit) == "km2 / (kpc s2)"
    assert "enclosed_mass" not in table.colnames


@pytest.mark.parametrize("population", ["disc", "halo", "disc+halo"])
def test_orbits_from_their_description(population):
    """The same ln f(J), differentiable by J_r and J_z."""
    potential = MWPotential2014()
    orbits = GALAXY_STARS[population](potential)
    again = orbits_from_description(json.loads(json.dumps(orbits.describe())))
    J = orbits.sample(20, 1).requires_grad_()
    assert torch.equal(again.log_prob(J), orbits.log_prob(J))
    (slopes,) = torch.autograd.grad(orbits.log_prob(J).sum(), J)
    for axis in (0, 2):
        step = torch.zeros(3, dtype=torch.float64)
        step[axis] = 1e-4
        difference = (orbits.log_prob(J.detach() + step) - orbits.log_prob(J.detach() - step)) / 2e-4
        assert slopes[:, axis].tolist() == pytest.approx(difference.tolist(), rel=1e-4, abs=1e-9)


def test_bad_input(disc, of_disc):
    """What is not known, or not a place, is named."""
    with pytest.raises(ValueError, match="unknown population of orbits 'rings'"):
        orbits_from_description({"name": "rings"})
    with pytest.raises(ValueError, match="the potential whose frequencies are in f"):
        orbits_from_description({"name": "QuasiIsothermalOrbits", "r_d": 2.6})
    with pytest.raises(ValueError, match="for stars drawn by their orbits"):
        forecast(of_galaxy(), mock("isochrone", n_stars=200, seed=0))
    with pytest.raises(ValueError, match="the catalogue is no mock"):
        forecast(of_galaxy(), Catalog(disc.w))
    sphere = SnapshotModel(NFW(near(8e11), 16.0), ActionMixture(2))
    with pytest.raises(ValueError, match="the stars were drawn by their orbits"):
        forecast(sphere, disc)
    for places, message in (
        ([[0.0, 1.0]], "with R > 0"),
        ([[1.0, 2.0, 3.0]], r"or in a flattened galaxy \(R, z\)"),
        ([-1.0], "radii must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            of_disc.relative_sd("density", places, 1000)


@pytest.mark.usefixtures("drawn_figures")
def test_command(tmp_path):
    """A free form's table has K_z instead of masses, and says what is closest."""
    arguments = ("forecast", "axisymmetric", "--system", "halo", "--n-simulated", "400", "--n-stars", "2000")
    done = bayespot(*arguments, "--radii", "4:16:3", "-o", "sd.ecsv", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "acceleration at nineteen of twenty stars" in done.stdout
    table = QTable.read(tmp_path / "sd.ecsv")
    assert (table["circular_speed_with_prior"] < table["circular_speed_bound"]).all()
    assert (table["vertical_acceleration_with_prior"] < 0.5).all()
    assert (tmp_path / "sd.png").stat().st_size > 10_000
