"""Neural potentials: the shared contract of potentials, positivity, asymptotes, priors."""

from __future__ import annotations

import math

import pytest
import torch
from pyro import poutine

from bayespot.potential import DirectNetwork, MassSlopeNetwork
from bayespot.potential.fields import radial_fields, radial_fields_of_draws
from bayespot.pyro_modules import freeze
from bayespot.units import G


def network(seed: int, prior: str = "last_layer", scale: float = 1.0) -> MassSlopeNetwork:
    """A draw of the mass-slope network with weights of the given size."""
    generator = torch.Generator().manual_seed(seed)
    base = MassSlopeNetwork(1.0, -2.0, 5.0, 25.0, prior=prior)
    weights = scale * torch.randn(base.n_features + 1, generator=generator, dtype=torch.float64)
    return freeze(base, {"ln_mass": torch.tensor(25.0, dtype=torch.float64), "slope_weights": weights})


@pytest.mark.parametrize("seed", range(5))
def test_density_is_exact_and_positive(seed):
    """density = M gamma / 4 pi r^3 and positive from 1e-4 to 1e5 kpc, weights three prior sd large.

    1e-12 / gamma relative: where gamma is tiny the derivative of M cancels to rounding.
    """
    potential = network(seed, scale=3.0)
    r = torch.logspace(-4, 5, 200, dtype=torch.float64)
    with torch.no_grad():
        density = potential.density(torch.stack([r, 0 * r, 0 * r], -1))
        expected = potential.enclosed_mass(r) * potential.mass_slope(r.log()) / (4 * math.pi * r**3)
        gamma = potential.mass_slope(r.log())
    assert bool((density > 0).all())
    assert bool(((density / expected - 1).abs() < 1e-12 / gamma + 1e-12).all())


@pytest.mark.parametrize("seed", range(3))
def test_laplacian_by_differences(seed):
    """rho from central differences of Phi in ln r within 1e-4 of the density (table error included)."""
    potential = network(seed)
    s = torch.linspace(-1.5, 5, 40, dtype=torch.float64)
    h = 0.05
    with torch.no_grad():
        phi = torch.stack([potential.phi_r((s + k * h).exp()) for k in (-2, -1, 0, 1, 2)])
        first = (phi[0] - 8 * phi[1] + 8 * phi[3] - phi[4]) / (12 * h)
        second = (-phi[0] + 16 * phi[1] - 30 * phi[2] + 16 * phi[3] - phi[4]) / (12 * h**2)
        r = s.exp()
        density = potential.density(torch.stack([r, 0 * r, 0 * r], -1))
    laplacian = (second + first) / r**2 / (4 * math.pi * G)
    mean_density = first / (G * r**2) * 3 / (4 * math.pi)
    assert float(((laplacian - density) / mean_density).abs().max()) < 1e-4


def test_pivot_and_infinity():
    """M(s_0) is the parameter; Phi tends to -G M / r far out."""
    potential = network(1)
    with torch.no_grad():
        assert float(potential.enclosed_mass(torch.tensor([math.e], dtype=torch.float64)).log()) == pytest.approx(
            25.0, abs=1e-9
        )
        r = torch.tensor([1e8], dtype=torch.float64)
        kepler = -G * potential.enclosed_mass(r) / r
        assert float(potential.phi_r(r) / kepler) == pytest.approx(1, abs=1e-3)


def test_parameter_gradient():
    """d Phi / d(weights) by autograd against central differences, 1e-6."""
    base = MassSlopeNetwork(1.0, -2.0, 5.0, 25.0)
    weights = torch.linspace(-1, 1, base.n_features + 1, dtype=torch.float64)
    r = torch.tensor([0.3, 3.0, 30.0], dtype=torch.float64)

    def phi(w):
        return freeze(base, {"ln_mass": torch.tensor(25.0, dtype=torch.float64), "slope_weights": w}).phi_r(r).sum()

    leaf = weights.clone().requires_grad_()
    (grad,) = torch.autograd.grad(phi(leaf), leaf)
    for k in range(len(weights)):
        step = torch.zeros_like(weights)
        step[k] = 1e-5
        assert float((phi(weights + step) - phi(weights - step)) / 2e-5) == pytest.approx(float(grad[k]), rel=1e-6)


@pytest.mark.parametrize("prior", ["last_layer", "all"])
def test_many_draws_at_once(prior):
    """Fields of 120 prior draws in one go equal those of each, to 1e-11; beyond the nodes one after the other."""
    potential = MassSlopeNetwork(1.0, -2.0, 5.0, 25.0, prior=prior)
    generator = torch.Generator().manual_seed(3)
    values = {}
    for name, one in potential._pyro_samples.items():
        mean, sd = one.mean, one.stddev
        values[name] = mean + sd * torch.randn(120, *mean.shape, generator=generator, dtype=torch.float64)
    inside = torch.logspace(-2, 3, 20, dtype=torch.float64)
    assert potential.radial_draws(values, inside) is not None
    for r in (inside, torch.tensor([0.0, 1e-9, 2.0, 1e12], dtype=torch.float64)):
        found = radial_fields_of_draws(potential, values, r)
        for i in (0, 49, 50, 119):
            fixed = freeze(potential, {name: value[i] for name, value in values.items()})
            for field, wanted in radial_fields(fixed, r).items():
                torch.testing.assert_close(found[field][i], wanted, rtol=1e-11, atol=1e-300, msg=field, equal_nan=True)
    assert potential.radial_draws(values, r) is None
    assert potential.radial_draws({"ln_mass": values["ln_mass"]}, inside) is None


@pytest.mark.parametrize(("prior", "n_sites"), [("none", 2), ("last_layer", 2), ("all", 4)])
def test_priors_are_sites(prior, n_sites):
    """The sample sites are those documented; a flat prior refuses to be drawn from."""
    potential = MassSlopeNetwork(1.0, -2.0, 5.0, 25.0, prior=prior)
    assert len(potential._pyro_samples) == n_sites
    if prior != "none":
        trace = poutine.trace(potential).get_trace(torch.ones(2, 3, dtype=torch.float64))
        names = {name for name, site in trace.nodes.items() if site["type"] == "sample"}
        assert {"ln_mass", "slope_weights"} <= names


@pytest.mark.parametrize("symmetry", ["spherical", "axisymmetric", "triaxial"])
def test_direct_network(symmetry):
    """Symmetry holds to rounding, Phi -> -G M / r, and the Laplacian equals central differences (1e-5)."""
    potential = DirectNetwork(3.0, 25.0, symmetry, prior="none", seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        potential.output.copy_(0.3 * torch.randn(len(potential.output), generator=generator, dtype=torch.float64))
    x = torch.randn(20, 3, generator=generator, dtype=torch.float64) * 3
    turn = {"spherical": x[:, [2, 0, 1]], "axisymmetric": x[:, [1, 0, 2]] * -1, "triaxial": -x}[symmetry]
    with torch.no_grad():
        torch.testing.assert_close(potential.phi(x), potential.phi(turn), rtol=1e-12, atol=0)
        far = torch.tensor([[1e5, 2e5, -3e5]], dtype=torch.float64)
        assert float(potential.phi(far) * far.norm() / (-G * math.exp(25.0))) == pytest.approx(1, abs=1e-4)
        h, laplacian = 1e-3, torch.zeros(20, dtype=torch.float64)
        for i in range(3):
            e = torch.zeros(3, dtype=torch.float64)
            e[i] = h
            laplacian += (potential.phi(x + e) - 2 * potential.phi(x) + potential.phi(x - e)) / h**2
        density = potential.density(x)
    scale = density.abs().max()
    assert float((laplacian / (4 * math.pi * G) - density).abs().max() / scale) < 1e-4


def test_positive_density_factor():
    """The named factor is zero for a positive density and negative where the network digs a hole."""
    good = DirectNetwork(3.0, 25.0, "axisymmetric", prior="none")
    bad = DirectNetwork(3.0, 25.0, "axisymmetric", prior="none", seed=1)
    with torch.no_grad():
        bad.output.copy_(torch.randn(32, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    values = []
    for potential in (good, bad):
        trace = poutine.trace(potential.register_factors).get_trace()
        values.append(trace.log_prob_sum().item())
        assert "positive_density" in trace.nodes
    assert values[0] == 0
    assert values[1] < 0


def test_refusals():
    """Unknown prior or symmetry, reversed ranges and a negative scale are refused."""
    for call in (
        lambda: MassSlopeNetwork(1.0, -2.0, 5.0, 25.0, prior="some"),
        lambda: MassSlopeNetwork(1.0, 2.0, 5.0, 25.0),
        lambda: DirectNetwork(-3.0, 25.0),
        lambda: DirectNetwork(3.0, 25.0, "round"),
    ):
        with pytest.raises(ValueError, match=r"must be|need"):
            call()
