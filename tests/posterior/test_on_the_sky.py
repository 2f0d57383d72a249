"""What a fit of stars on the sky says, against closed forms and against mocks of known truth."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad

from bayespot import FitConfig, LogisticGaussianProcess, Posterior, SnapshotModel, fit
from bayespot.catalog import ProjectedCatalog
from bayespot.df import SphericalMixture
from bayespot.likelihood import LineOfSight
from bayespot.mock import MOCKS, Equilibrium, mock
from bayespot.posterior import astrophysical_factors, line_of_sight_fields, posterior_predictive, velocity_check
from bayespot.potential import NFW, Isochrone, Plummer, truth_field

F64 = torch.float64


def on_the_sky(system: str, n: int, seed: int, photometric: bool = False) -> ProjectedCatalog:
    whole = mock(system, n_stars=n, seed=seed)
    noise = np.random.default_rng(seed).standard_normal(n)
    x, y, v = whole.w[:, [0, 1, 5]].numpy().T
    return ProjectedCatalog.of(x, y, v + 2 * noise, 2.0, photometric=photometric, meta={"distance_kpc": 80.0})


def draws_of(potential, n: int = 3) -> Posterior:
    """A posterior of one potential: draws of a site that nothing depends on."""
    model = SnapshotModel(potential, SphericalMixture(), likelihood=LineOfSight())
    return Posterior(model, {"sky.velocity": torch.zeros(n, dtype=F64)}, {"meta": {"distance_kpc": 80.0}})


def test_factors_of_known_halos():
    """J of a Plummer sphere and D of an NFW halo within an angle, against integrals along the line of sight."""
    angles = np.array([0.1, 0.5])
    plummer, m, a = Plummer(m_tot=1e8, r_s=0.5), 1e8, 0.5
    found = astrophysical_factors(draws_of(plummer), angles)
    for k, angle in enumerate(angles):
        R_max = 80 * math.tan(math.radians(angle))
        # int rho^2 dz of a Plummer sphere: rho_0^2 a^10 (a^2 + R^2)^(-9/2) times int (1 + t^2)^-5 dt
        column = (3 * m / (4 * math.pi * a**3)) ** 2 * 35 * math.pi / 128
        J = column * quad(lambda R: 2 * math.pi * R * a**10 * (a**2 + R**2) ** -4.5, 0, R_max)[0] / 80**2
        assert found.J[0, k] == pytest.approx(J * 4.4464e6, rel=2e-3)
        # the mass of a Plummer sphere within R on the sky
        assert found.D[0, k] == pytest.approx(m * R_max**2 / (a**2 + R_max**2) / 80**2 * 1.17151e14, rel=2e-3)
    nfw = astrophysical_factors(draws_of(NFW(m_s=1e9, r_s=2.0)), [0.5]).to_table()
    x = 80 * math.tan(math.radians(0.5)) / 2
    # Bartelmann 1996, A&A 313, 697: the projected mass of an NFW halo
    projected = 1e9 * (math.log(x / 2) + math.acosh(1 / x) / math.sqrt(1 - x**2))
    assert nfw["D_q50"][0].to_value("GeV / cm2") == pytest.approx(projected / 80**2 * 1.17151e14, rel=2e-3)
    assert str(nfw["J_q50"].unit) == "GeV2 / cm5"


def test_factors_follow_the_distance():
    """Draws of the distance scale the field's radius; without a distance the factors are refused."""
    model = SnapshotModel(Plummer(m_tot=1e8, r_s=0.5), SphericalMixture(), likelihood=LineOfSight(5.0, 0.1))
    draws = {"sky.velocity": torch.zeros(2, dtype=F64), "sky.ln_distance": torch.tensor([0.0, 0.1], dtype=F64)}
    found = astrophysical_factors(Posterior(model, draws), [0.5], 80.0)
    farther = astrophysical_factors(draws_of(Plummer(m_tot=1e8, r_s=0.5)), [0.5], 80 * math.exp(0.1))
    assert found.J[1, 0] == pytest.approx(farther.J[0, 0], rel=1e-3)
    with pytest.raises(ValueError, match="give distance"):
        astrophysical_factors(Posterior(model, draws), [0.5])
    with pytest.raises(ValueError, match="between 0 and 90"):
        astrophysical_factors(Posterior(model, draws), [-1.0], 80.0)


def test_slope_of_the_density():
    """-1 to -3 for an NFW halo, to 1e-3."""
    r = np.array([0.1, 2.0, 20.0])
    found = draws_of(NFW(m_s=1e9, r_s=2.0)).field("density_slope", r)
    assert np.allclose(found.draws[0], -1 - 2 * r / (2 + r), atol=1e-3)
    assert np.allclose(truth_field(NFW(m_s=1e9, r_s=2.0), "density_slope", r), -1 - 2 * r / (2 + r), atol=1e-3)


class Known(torch.nn.Module):
    """The true f(J) of an isotropic isochrone, as a density of orbits."""

    symmetry, n_components, proper = "spherical", 1, True

    def __init__(self) -> None:
        super().__init__()
        self.population = Equilibrium(Isochrone(m_tot=1e10, r_s=1.0))

    def log_prob(self, J: torch.Tensor) -> torch.Tensor:
        from bayespot.units import G

        L = J[..., 1].abs() + J[..., 2]
        gm = G * 1e10
        E = -(gm**2) / (2 * (J[..., 0] + (L + (L**2 + 4 * gm).sqrt()) / 2) ** 2)
        return torch.as_tensor(self.population.log_f_of_q(E.numpy())) + 3 * math.log(2 * math.pi)


@pytest.fixture(scope="module")
def isotropic() -> tuple[Posterior, ProjectedCatalog]:
    """The truth as a posterior, and 3000 stars of it with errors of 5 km/s."""
    potential = Isochrone(m_tot=1e10, r_s=1.0)
    whole = mock(potential, n_stars=3000, seed=8)
    noise = np.random.default_rng(8).standard_normal(3000)
    x, y, v = whole.w[:, [0, 1, 5]].numpy().T
    stars = ProjectedCatalog.of(x, y, v + 5 * noise, 5.0, photometric=True)
    model = SnapshotModel(potential, SphericalMixture(), likelihood=LineOfSight())
    model._modules["df"] = Known()
    return Posterior(model, {"sky.velocity": torch.zeros(60, dtype=F64)}, {"n_stars": 3000}), stars


def test_velocities_of_an_isotropic_sphere(isotropic):
    """beta vanishes to 0.01, and sigma_los follows from the isotropic Jeans equation to 0.5 %."""
    posterior, stars = isotropic
    R = np.array([0.2, 1.0, 4.0])
    found = line_of_sight_fields(posterior.thinned(1), stars, R)
    assert abs(found["beta"].draws).max() < 0.01
    potential = Isochrone(m_tot=1e10, r_s=1.0)

    def rho(r):
        return truth_field(potential, "density", np.atleast_1d(r))

    s = np.linspace(math.log(0.05), math.log(300), 2000)
    r = np.exp(s)
    force = -truth_field(potential, "radial_acceleration", r)
    step = rho(r) * force * r * (s[1] - s[0])
    pressure = step[::-1].cumsum()[::-1] - step / 2
    for k, at in enumerate(R):
        t = np.linspace(0, math.log(300 / at), 1500)
        along = at * np.cosh(t)
        inside = along < 290
        weight = along[inside]
        squares = np.interp(np.log(weight), s, pressure) * weight
        assert found["sigma_los"].draws[0, k] == pytest.approx(
            math.sqrt(squares.sum() / (rho(weight) * weight).sum()), rel=5e-3
        )


def test_check_of_the_truth(isotropic):
    """Of the true population velocities, dispersions and places are reproduced; of one moved by 8 km/s velocities are
    not, and with half the errors neither."""
    posterior, stars = isotropic
    found = velocity_check(posterior, stars, 60, seed=1)
    assert set(found.p_values) == {"velocities", "sigma_los", "counts"}
    assert min(found.p_values.values()) > 0.02
    assert not found.warnings
    assert found.observed["velocities"].shape == (60, 4, 9)
    assert found.observed["velocities"][0].sum() == 3000
    assert found.replicated["counts"].sum(1).tolist() == [3000] * 60
    moved = Posterior(posterior.model, {"sky.velocity": torch.full((60,), 8.0, dtype=F64)}, posterior.meta)
    wrong = velocity_check(moved, stars, 60)
    assert wrong.p_values["velocities"] < 0.01
    assert "distribution of line-of-sight velocities" in wrong.warnings[0]
    x, y, v = stars.sky[:, :3].T.numpy()
    noisy = ProjectedCatalog.of(x, y, 1.3 * v, 5.0)
    assert velocity_check(posterior, noisy, 60).p_values["sigma_los"] < 0.01


def test_what_is_refused(isotropic):
    """Few draws, stars that are not on the sky, and the check of coordinates."""
    posterior, stars = isotropic
    with pytest.raises(ValueError, match="at least 50"):
        velocity_check(posterior, stars, 10)
    whole = mock("isochrone", n_stars=50, seed=1)
    with pytest.raises(ValueError, match="not stars on the sky"):
        line_of_sight_fields(posterior, whole, [1.0])
    with pytest.raises(ValueError, match="velocity_check"):
        posterior_predictive(posterior, stars, 60)


@pytest.mark.slow
def test_check_of_a_fit():
    """A fit reproduces the stars it was made to."""
    stars = on_the_sky("dwarf-cusp", 300, 3, photometric=True)
    from bayespot import MassSlopeNetwork

    model = SnapshotModel(
        MassSlopeNetwork.for_stars(stars.w, n_features=4),
        LogisticGaussianProcess(degree=4, cusps=True),
        likelihood=LineOfSight.for_stars(stars),
    )
    posterior = Posterior.from_result(fit(model, stars, FitConfig(seed=1, n_draws=60), progress=False))
    found = velocity_check(posterior, stars, 60)
    assert min(found.p_values.values()) > 0.02
    r = np.array([0.1])
    true = truth_field(MOCKS["dwarf-cusp"].potential, "enclosed_mass", r)
    mass = posterior.field("enclosed_mass", r)
    assert abs(mass.mean - true)[0] < 3.5 * mass.sd[0]
