"""Stars of flattened galaxies: their orbits, the equilibrium that they are in, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import kstest

from bayespot.actions import SphericalActions, StaeckelFudge
from bayespot.df import ActionMixture
from bayespot.mock import (
    DoublePowerLawOrbits,
    QuasiIsothermalOrbits,
    equilibrium,
    galaxy_mock,
    mixing,
    orbit_mock,
    truth_potential,
)
from bayespot.mock.circular import CircularOrbits
from bayespot.mock.flattened import orbit_sample
from bayespot.mock.mixing import phase_mixed
from bayespot.potential import NFW, AxisymmetricNetwork, DirectNetwork, Hernquist, MassSlopeNetwork, MiyamotoNagai
from bayespot.pyro_modules import freeze

GALAXY = Hernquist(5e9, 0.4) + MiyamotoNagai(6.8e10, 3.0, 0.28) + NFW(4.4e11, 16.0)
HALO = DoublePowerLawOrbits(1500.0, 1.2, 5.0)


@pytest.fixture(scope="module")
def halo():
    return orbit_mock(GALAXY, HALO, n_stars=1500, seed=1, n_periods=4.0)


def test_stars_are_on_the_orbits_drawn(halo):
    """All three actions are distributed as f(J), the fudge's before phase mixing and after; the truth is in meta."""
    finder = StaeckelFudge()
    before = orbit_sample(GALAXY, HALO, len(halo), seed=1)
    drawn = HALO.sample(20_000, seed=9)
    for stars in (before, halo.w):
        J = finder.actions(GALAXY, stars)
        for i in range(3):
            assert kstest(J[:, i].detach().numpy(), drawn[:, i].numpy()).pvalue > 0.001
    truth = halo.meta["truth"]
    assert truth["orbits"] == HALO.describe()
    torch.testing.assert_close(truth_potential(halo).phi(halo.x), GALAXY.phi(halo.x))
    with pytest.raises(ValueError, match="orbits"):
        equilibrium(halo)


def test_stars_are_in_equilibrium(halo):
    """Angles uniform; the virial ratio is one, and the score of the true mass and flattening zero, within 4 sigma.

    The score is that of a mixture fitted to the actions; by the score identity its error does not matter.
    """
    theta = StaeckelFudge().actions_angles(GALAXY, halo.w).theta
    assert all(kstest(theta[:, i].detach().numpy() / (2 * math.pi), "uniform").pvalue > 0.001 for i in range(3))
    with torch.no_grad():
        kinetic, virial = (halo.v**2).sum(-1), -(halo.x * GALAXY.acceleration(halo.x)).sum(-1)
    excess = kinetic - virial
    assert abs(float(excess.mean())) < 4 * float(excess.std()) / len(halo) ** 0.5
    scale = torch.ones(2, dtype=torch.float64, requires_grad=True)
    disc = MiyamotoNagai(6.8e10 * scale[0], 3.0, 0.28 * scale[1])
    potential = Hernquist(5e9, 0.4) + disc + NFW(4.4e11, 16.0)
    J = StaeckelFudge().actions(potential, halo.w)
    mixture = ActionMixture().resolved(2, J.detach())
    density = freeze(mixture, mixture.fit_actions(J.detach(), seed=0))
    scores = [torch.autograd.grad(one, scale, retain_graph=True)[0] for one in density.log_prob(J[:400])]
    score = torch.stack(scores)
    assert bool((score.mean(0).abs() < 4 * score.std(0) / len(score) ** 0.5).all())


def test_disc_stars():
    """A warm disc rotates, is thin, and has the velocity dispersions of its f(J) at the Sun's radius, 20 %."""
    disc = QuasiIsothermalOrbits(GALAXY, sigma_r=40.0, sigma_z=25.0)
    stars = orbit_mock(GALAXY, disc, n_stars=1500, seed=2, n_periods=2.0)
    x, v = stars.x, stars.v
    R = torch.linalg.vector_norm(x[:, :2], dim=-1)
    assert float(x[:, 2].abs().median()) < 0.4
    assert float(((x[:, 0] * v[:, 1] - x[:, 1] * v[:, 0]) > 0).double().mean()) > 0.97
    near = (R > 5) & (R < 11)
    v_R = (x[near, :2] * v[near, :2]).sum(-1) / R[near]
    growth = torch.exp((8.0 - R[near]) / 8.0)
    assert float((v_R / growth).std()) == pytest.approx(40.0, rel=0.2)
    assert float((v[near, 2] / growth).std()) == pytest.approx(25.0, rel=0.2)


def test_spheres_have_exact_orbits():
    """In a sphere J is that drawn, star by star, whatever time has passed; the same seed gives the same stars."""
    sphere = NFW(8e11, 16.0)
    one, again = (orbit_mock(sphere, HALO, n_stars=100, seed=3, n_periods=2.0) for _ in range(2))
    assert torch.equal(one.w, again.w)
    J = SphericalActions().actions(sphere, one.w)
    assert kstest(J[:, 0].detach().numpy(), HALO.sample(20_000, seed=9)[:, 0].numpy()).pvalue > 0.001


def test_refusals():
    """Unknown stars, triaxial potentials, no stars."""
    with pytest.raises(ValueError, match=r"choose one of halo, disc, disc\+halo"):
        galaxy_mock("bulge", n_stars=10, seed=0)
    with pytest.raises(ValueError, match="deeper potential"):
        orbit_sample(Hernquist(1e-6, 1.0), HALO, 5, seed=0)
    with pytest.raises(ValueError, match="n_stars"):
        orbit_mock(GALAXY, HALO, n_stars=0, seed=0)
    with pytest.raises(ValueError, match="triaxial"):
        orbit_mock(DirectNetwork(3.0, 25.0, "triaxial", prior="none"), HALO, n_stars=5, seed=0)


def test_in_a_draw_of_a_free_form_prior():
    """Stars in a potential without an analytic form, whose centre has unstable circular orbits: they keep energy and
    L_z, and the catalogue says what is known of the truth."""
    monopole = MassSlopeNetwork(s_0=math.log(5.0), s_inner=math.log(0.3), s_outer=math.log(60.0), ln_mass=24.6)
    free = AxisymmetricNetwork(monopole)
    values = free.initial_values()
    # elongated along z inside some kpc
    values["shape_weights"][:2, 0] = 2.0
    potential = freeze(free, values)
    with pytest.raises(ValueError, match=r"circular orbits of this potential are unstable: no nu at R = 0\.0001 kpc"):
        CircularOrbits(potential)
    innermost = CircularOrbits(potential, unstable_inside=True).at([1e-4]).R[0]
    assert 1e-3 < innermost < 1.0
    stars = orbit_mock(potential, HALO, n_stars=300, seed=2)
    before = orbit_sample(potential, HALO, 300, seed=2)
    with torch.no_grad():
        energy, drawn = ((w[:, 3:] ** 2).sum(-1) / 2 + potential.phi(w[:, :3]) for w in (stars.w, before))
    assert float(((energy - drawn) / drawn).abs().max()) < 0.01
    Lz, drawn = (w[:, 0] * w[:, 4] - w[:, 1] * w[:, 3] for w in (stars.w, before))
    torch.testing.assert_close(Lz, drawn)
    assert set(stars.meta["truth"]) == {"orbits", "seed"}
    assert truth_potential(stars) is None


def test_dense_centre(monkeypatch):
    """Plunging orbits about a centre far denser than the galaxy keep their energies: steps are made finer for them, and
    if that is not enough the first star is named."""
    potential = Hernquist(1e9, 0.1) + NFW(4.4e11, 16.0)
    J = torch.tensor([[4000.0, 5.0, 5.0], [8000.0, -3.0, 0.5]], dtype=torch.float64)
    theta = torch.tensor([[0.3, 1.0, 2.0], [2.0, 3.0, 1.0]], dtype=torch.float64)
    w = SphericalActions().phase_space(potential, J, theta)
    mixed = phase_mixed(potential, w, 1)
    with torch.no_grad():
        before, after = ((at[:, 3:] ** 2).sum(-1) / 2 + potential.phi(at[:, :3]) for at in (w, mixed))
    assert float(((after - before) / before).abs().max()) < 0.01
    assert bool(((mixed - w).abs().amax(-1) > 0.1).all())
    monkeypatch.setattr(mixing, "_FINER", (1,))
    with pytest.raises(
        ValueError, match=r"the orbits of 2 of 2 stars \(the first at row 0\) do not keep their energies"
    ):
        phase_mixed(potential, w, 1)
