"""Formulas as potentials: the contract of potentials, actions, a fit of their constants, exports, bad input."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from contracts.potential import check_parameter_gradients, check_potential, points_at

from bayespot.actions import SphericalActions
from bayespot.df import SphericalMixture
from bayespot.inference import FitConfig, fit
from bayespot.likelihood import SnapshotModel
from bayespot.posterior import Posterior
from bayespot.potential import NFW, Hernquist, Isochrone, Jaffe, Logarithmic, Plummer, SymbolicPotential

RADII = torch.logspace(-2, 2.5, 19, dtype=torch.float64)
ISOCHRONE = "-G*M/(b + sqrt(b**2 + r**2))"
#: Formula, constants, and the same potential in closed form.
CASES = {
    "isochrone": (ISOCHRONE, {"M": 1e11, "b": 3.0}, Isochrone(1e11, 3.0)),
    "plummer": ("-G*M/sqrt(b**2 + r**2)", {"M": 1e10, "b": 2.0}, Plummer(1e10, 2.0)),
    "hernquist": ("-G*M/(b + r)", {"M": 5e10, "b": 3.0}, Hernquist(5e10, 3.0)),
    "nfw": ("-G*M/r*log(1 + r/b)", {"M": 7e11, "b": 20.0}, NFW(7e11, 20.0)),
    "jaffe": ("-G*M/b*log(1 + b/r)", {"M": 1e11, "b": 4.0}, Jaffe(1e11, 4.0)),
}


@pytest.mark.parametrize("name", CASES)
def test_contract(name):
    """Every check of `contracts.check_potential` over 4.5 decades in radius; Phi equals the closed form to 1e-14."""
    text, constants, truth = CASES[name]
    potential = SymbolicPotential(text, constants)
    check_potential(potential, RADII, lambda x: truth.density_r(x.norm(dim=-1)))
    torch.testing.assert_close(potential.phi_r(RADII), truth.phi_r(RADII), rtol=1e-14, atol=0)


def test_contract_logarithmic():
    """The same for a potential that does not vanish at infinity."""
    truth = Logarithmic(220.0, 1.5)
    potential = SymbolicPotential("v0**2/2*log(1 + r**2/c**2)", {"v0": 220.0, "c": 1.5})
    check_potential(potential, RADII, truth.density, rtol_density=1e-8)
    torch.testing.assert_close(potential.phi_r(RADII), truth.phi_r(RADII), rtol=1e-14, atol=0)


def test_parameter_gradients():
    """Gradients with respect to every constant against finite differences: 1e-7."""

    def build(**constants):
        return SymbolicPotential(ISOCHRONE, constants)

    check_parameter_gradients(build, {"M": 1e11, "b": 3.0}, points_at(torch.logspace(-1, 2, 7, dtype=torch.float64)))


def test_actions():
    """Actions, and the way back, are those of the closed form: 1e-12 of the median and 1e-7."""
    w = torch.cat([points_at(torch.linspace(1.0, 30.0, 20).double()), points_at(torch.full((20,), 60.0), 1)], -1)
    truth, finder = Isochrone(1e11, 3.0), SphericalActions()
    potential = SymbolicPotential(ISOCHRONE, {"M": 1e11, "b": 3.0})
    with torch.no_grad():
        found, expected = finder.actions_angles(potential, w), finder.actions_angles(truth, w)
        back = finder.phase_space(potential, found.J, found.theta)
    assert float((found.J - expected.J).abs().max() / expected.J.median()) < 1e-12
    torch.testing.assert_close(back, w, rtol=0, atol=1e-7 * 60)


def test_constants_are_sites_of_a_fit(isochrone_stars, tmp_path):
    """SVI of (ln M, ln b) from 2 000 stars agrees with the parametric isochrone's: 0.1 sd, and is saved and read."""

    def prior(value):
        return dist.LogNormal(torch.tensor(math.log(value)).double(), torch.tensor(1.5).double())

    config = FitConfig(seed=1, n_components=1, svi_steps=60, n_draws=400, k_hat_draws=0)
    formula = SymbolicPotential(ISOCHRONE, {"M": prior(2e11), "b": prior(5.0)}, start={"M": 1.2e11, "b": 2.5})
    found, expected = (
        fit(SnapshotModel(potential, SphericalMixture()), isochrone_stars, config).draws
        for potential in (formula, Isochrone(prior(2e11), prior(5.0)))
    )
    for name, twin in (("potential.M", "potential.m_tot"), ("potential.b", "potential.r_s")):
        x, y = found[name].log(), expected[twin].log()
        assert float((x.mean() - y.mean()).abs() / y.std()) < 0.1, name
        assert float(x.std() / y.std()) == pytest.approx(1, abs=0.1), name
    model = SnapshotModel(formula, SphericalMixture())
    torch.save(model, tmp_path / "model.pt")
    posterior = Posterior(torch.load(tmp_path / "model.pt", weights_only=False), found)
    v_c = posterior.field("circular_speed", [3.0]).mean
    assert v_c == pytest.approx(Isochrone(1e11, 3.0).circular_speed(torch.tensor(3.0).double()).item(), rel=0.05)


def test_exports():
    """The Python source gives the same Phi (1e-14); a copy by pickle too; LaTeX names the constants."""
    text, constants, _ = CASES["nfw"]
    potential = SymbolicPotential(text, constants)
    space: dict = {}
    exec(potential.python("formula"), space)
    r = np.geomspace(0.1, 100, 9)
    np.testing.assert_allclose(space["formula"](r), potential.phi_r(torch.as_tensor(r)).numpy(), rtol=1e-14)
    assert r"\log" in potential.latex()
    copy = pickle.loads(pickle.dumps(potential))
    assert torch.equal(copy.phi_r(RADII), potential.phi_r(RADII))
    assert potential.values() == constants


@pytest.mark.filterwarnings("ignore")
def test_galpy():
    """galpy's own functions of the exported potential: potential, forces, density, v_c to 1e-10."""
    pytest.importorskip("galpy")
    text, constants, truth = CASES["hernquist"]
    exported = SymbolicPotential(text, constants).to_galpy(ro=8.0, vo=200.0)
    x = torch.tensor([6.0, 0.0, 2.5], dtype=torch.float64)
    here = (x[0].item() / 8, x[2].item() / 8)
    assert exported(*here, use_physical=False) * 200**2 == pytest.approx(float(truth.phi(x)), rel=1e-10)
    force = exported.Rforce(*here, use_physical=False) * 200**2 / 8
    assert force == pytest.approx(float(truth.acceleration(x)[0]), rel=1e-10)
    assert exported.vcirc(1.0, use_physical=False) * 200 == pytest.approx(
        float(truth.circular_speed(torch.tensor(8.0).double())), rel=1e-10
    )
    density = exported.dens(*here) * 1e9  # galpy's physical unit is Msun/pc^3
    assert density == pytest.approx(float(truth.density(x)), rel=1e-4)  # galpy's G has five digits


@pytest.mark.filterwarnings("ignore")
def test_gala():
    """gala's functions of the exported potential: Phi, acceleration and density to 1e-6."""
    pytest.importorskip("gala")
    text, constants, truth = CASES["hernquist"]
    exported = SymbolicPotential(text, constants).to_gala()
    import astropy.units as u

    x = torch.tensor([6.0, 0.0, 2.5], dtype=torch.float64)
    energy = exported.energy(x.numpy() * u.kpc).to_value(u.km**2 / u.s**2)
    assert float(energy[0]) == pytest.approx(float(truth.phi(x)), rel=1e-6)
    gradient = exported.gradient(x.numpy() * u.kpc).to_value(u.km**2 / u.s**2 / u.kpc)[:, 0]
    np.testing.assert_allclose(-gradient, truth.acceleration(x).detach().numpy(), rtol=1e-6, atol=1e-12)
    density = exported.density(x.numpy() * u.kpc).to_value(u.Msun / u.kpc**3)
    assert float(density[0]) == pytest.approx(float(truth.density(x)), rel=1e-6)


@pytest.mark.parametrize(
    ("text", "constants", "words"),
    [
        ("-G*M/(b +", {"M": 1.0, "b": 1.0}, "sympy"),
        ("foo(r)", {}, "unknown function foo"),
        ("__import__('os').getcwd()", {}, "not a formula"),
        ("-G*M/r", {}, "M in"),
        ("-G*M/r", {"M": 1.0, "b": 1.0}, "b do not appear"),
        ("G*M", {"M": 1.0}, "does not depend on r"),
        ("phi*r", {"phi": 1.0}, "cannot be called 'phi'"),
    ],
)
def test_bad_formulas(text, constants, words):
    """A ValueError with what was wrong; nothing in the text is executed."""
    with pytest.raises(ValueError, match=words):
        SymbolicPotential(text, constants)


def test_values_of_a_prior_are_refused():
    """A constant with a prior has no number to export."""
    potential = SymbolicPotential("-G*M/r", {"M": dist.LogNormal(torch.tensor(25.0), torch.tensor(1.0))})
    with pytest.raises(ValueError, match="M have a prior"):
        potential.python()
