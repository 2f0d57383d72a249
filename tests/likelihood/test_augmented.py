"""The literal likelihood (steps G and H): normalised, differentiable, and in the limit the closed form.

Isochrone M = 1e11 Msun, b = 3 kpc; f(J) a mixture fitted to 2000 of its stars, so that augmented stars follow the
closed form f(J)/(2 pi)^3 exactly; seeds fixed.
"""

from __future__ import annotations

import math

import pytest
import torch

from bayespot import FitConfig, MassSlopeNetwork, Posterior, SnapshotModel, SphericalMixture, fit
from bayespot.actions import IsochroneActions, SphericalActions
from bayespot.likelihood import AugmentedDensity, Chain, Smoothing
from bayespot.mock import mock
from bayespot.potential import Isochrone, Potential
from bayespot.pyro_modules import freeze

STARS = mock("isochrone", n_stars=2000, seed=3).w
POTENTIAL = Isochrone(m_tot=1e11, r_s=3.0)
J = IsochroneActions().actions(POTENTIAL, STARS)
#: Fisher matrix per star of (ln M, ln b) with f(J) free, from the Cramer-Rao floors 0.92 and 1.38, correlation 0.76.
FISHER = torch.linalg.inv(
    torch.tensor([[0.92**2, 0.76 * 0.92 * 1.38], [0.76 * 0.92 * 1.38, 1.38**2]], dtype=torch.float64)
)


def setup(rotation: bool = False):
    """The population as a function of (ln M, ln b, sites of f(J)), and its reference."""
    df = SphericalMixture(2, rotation).resolved(2, J)
    values = df.fit_actions(J, seed=0)
    if rotation:
        values["concentration"] = torch.tensor([1.5, -0.6], dtype=torch.float64)
    start = torch.cat([torch.tensor([math.log(1e11), math.log(3.0)], dtype=torch.float64), *values.values()])

    def chain(u: torch.Tensor) -> Chain:
        potential = freeze(POTENTIAL, {"m_tot": u[0].exp(), "r_s": u[1].exp()})
        return Chain(potential, freeze(df, dict(zip(values, u[2:].split(2), strict=True))), IsochroneActions())

    return chain, start


@pytest.mark.parametrize(
    ("smoothing", "rotation"),
    [
        (Smoothing("mixture", n_augmented=2048), False),
        (Smoothing("kernel", n_augmented=512), False),
        (Smoothing("kernel", n_augmented=512, n_components=0), False),
        (Smoothing("kernel", n_augmented=512), True),
    ],
    ids=["mixture", "kernel", "plain kernel", "axisymmetric"],
)
def test_integrates_to_one(smoothing, rotation):
    """int p(w) d^6w over bound phase space, by 20000 stars of the chain and 20000 points that are spread more widely
    (balance heuristic; 150000 each for the bumpy axisymmetric kernel): 1 within 4 standard errors, below 0.01, and the
    0.5 % that the kernel's correction, a ratio of densities, may miss."""
    reference, u = setup(rotation)
    chain = reference(u)
    generator = torch.Generator().manual_seed(0)
    n = 150_000 if rotation else 20_000
    a, k = torch.rand(2, n, generator=generator, dtype=torch.float64)
    r = (2.0 + torch.log(a / (1 - a))).exp()
    way = torch.nn.functional.normalize(torch.randn(2, n, 3, generator=generator, dtype=torch.float64), dim=-1)
    # |v| / v_esc = k^(2/3) is denser inside than uniform in the ball, as the stars are
    v = (-2 * POTENTIAL.phi_r(r)).sqrt() * k ** (2 / 3)
    spread = torch.cat([r[:, None] * way[0], v[:, None] * way[1]], -1)
    stars = chain.augment(n, seed=9)
    w = torch.cat([stars.w, spread])
    x, v2 = w[:, :3], (w[:, 3:] ** 2).sum(-1)
    r = torch.linalg.vector_norm(x, dim=-1)
    a = torch.sigmoid(r.log() - 2.0)
    escape = (-2 * POTENTIAL.phi_r(r)).sqrt()
    u_v = v2.sqrt() / escape
    q = a * (1 - a) / (4 * math.pi * r**3) * 1.5 * u_v**0.5 / (4 * math.pi * u_v**2 * escape**3)
    with torch.no_grad():
        value = smoothing.density(chain).log_prob(w).exp() / (chain.log_density(w).exp() + q)
    parts = n * stars.weight * value[:n], value[n:]
    error = math.sqrt(sum(float(part.var()) for part in parts) / n)
    assert error < 0.01
    assert abs(float(sum(part.mean() for part in parts)) - 1) < 4 * error + 0.005


def test_axisymmetric_density_is_continuous_across_the_axis():
    """The directions of R and phi turn round at x = y = 0, the density does not: ln p 1e-7 kpc on either side of it
    agrees to 1e-4, for 40 velocities."""
    chain, u = setup(rotation=True)
    generator = torch.Generator().manual_seed(1)
    beside = torch.zeros(40, 6, dtype=torch.float64)
    beside[:, 2] = torch.linspace(-8, 8, 40, dtype=torch.float64)
    beside[:, 3:] = 80 * torch.randn(40, 3, generator=generator, dtype=torch.float64)
    step = torch.tensor([1e-7, 0.0, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    with torch.no_grad():
        density = Smoothing("kernel", n_augmented=512).density(chain(u))
        torch.testing.assert_close(density.log_prob(beside + step), density.log_prob(beside - step), rtol=0, atol=1e-4)


def misfit(smoothing: Smoothing) -> tuple[float, float, float]:
    """Mean and sd of ln p against the closed form at 2000 stars, and the move of (ln M, ln b) that the difference of
    the gradients stands for, in posterior sd at N = 2000 (in the Fisher metric)."""
    chain, start = setup()
    u = start.clone().requires_grad_()
    exact = chain(u).log_density(STARS)
    (slope,) = torch.autograd.grad(exact.sum(), u)
    ours = smoothing.density(chain(u)).log_prob(STARS)
    (found,) = torch.autograd.grad(ours.sum(), u)
    delta = (found - slope)[:2]
    difference = (ours - exact).detach()
    moved = float((delta @ torch.linalg.solve(len(STARS) * FISHER, delta)).sqrt())
    return float(difference.mean()), float(difference.std()), moved


def test_mixture_converges_to_the_closed_form():
    """More augmented stars bring value and gradient to the closed form: at n = 2^16 the mean difference of ln p
    is below 0.005, its sd below 0.12, and the potential moves by less than 0.6 posterior sd at N = 2000; at n = 2^9,
    averaged over three seeds, each is larger by half at least."""
    small = torch.tensor([misfit(Smoothing(n_augmented=512, seed=i)) for i in range(3)]).abs().mean(0)
    large = torch.tensor(misfit(Smoothing(n_augmented=2**16))).abs()
    assert bool((large < torch.tensor([0.005, 0.12, 0.6])).all()), (small, large)
    assert bool((small > 1.5 * large).all()), (small, large)


def test_kernel_correction():
    """With the mixture as its start a kernel density is closer to the closed form in mean, scatter and gradient than
    the plain one of the same width (n = 4096, width 0.5)."""
    corrected = torch.tensor(misfit(Smoothing("kernel", n_augmented=4096, bandwidth=0.5))).abs()
    plain = torch.tensor(misfit(Smoothing("kernel", n_augmented=4096, bandwidth=0.5, n_components=0))).abs()
    assert bool((corrected < 0.7 * plain).all()), (corrected, plain)


@pytest.mark.parametrize(
    "smoothing",
    [Smoothing("mixture", n_augmented=600), Smoothing("kernel", n_augmented=600)],
    ids=["mixture", "kernel"],
)
@pytest.mark.parametrize("rotation", [False, True])
def test_gradient_against_differences(smoothing, rotation):
    """d sum ln p in the potential and f(J), EM steps and bandwidths included, by central differences: 1e-4 of the
    largest component."""
    if rotation and smoothing.kind == "mixture":
        pytest.skip("mixtures are of spherical populations")
    chain, start = setup(rotation)
    w = STARS[:60]

    def value(u: torch.Tensor) -> torch.Tensor:
        return smoothing.density(chain(u)).log_prob(w).sum()

    u = start.clone().requires_grad_()
    (slope,) = torch.autograd.grad(value(u), u)
    h = 1e-6
    with torch.no_grad():
        for k in range(len(start)):
            step = torch.zeros_like(start)
            step[k] = h
            expected = float(value(start + step) - value(start - step)) / (2 * h)
            assert abs(float(slope[k]) - expected) < 1e-4 * float(slope.abs().max()), (k, float(slope[k]), expected)


def test_unbound_stars():
    """ln p is finite beyond escape, continuous there and falls steeply, so that an optimiser comes back."""
    chain, u = setup()
    with torch.no_grad():
        escape = float((-2 * POTENTIAL.phi_r(torch.tensor(5.0).double())).sqrt())
        w = torch.zeros(6, 6, dtype=torch.float64)
        w[:, 0], w[:, 3] = 5.0, 1.0
        w[:, 4] = escape * torch.tensor([0.9, 0.99994, 0.99996, 1.01, 1.1, 3.0], dtype=torch.float64)
        log_p = Smoothing(n_augmented=2048).density(chain(u)).log_prob(w)
    assert bool(torch.isfinite(log_p).all())
    assert abs(float(log_p[2] - log_p[1])) < 1.0
    assert bool((log_p.diff()[2:] < -3).all())


def test_literal_fit_agrees_with_the_closed_form(isochrone_stars):
    """The neural potential trained by SVI with either likelihood (N = 1000, seed 5; 2048 augmented stars, six Gaussians
    after 30 steps of EM, one component of f(J), maximum to 0.3 sd): v_c at 2, 6 and 20 kpc within 4 sd of the truth,
    within 1 sd of each other, and of equal sd to 30 %."""
    stars = isochrone_stars[:1000]
    config = FitConfig(seed=1, n_components=1, map_tolerance=0.3, svi_steps=10, n_draws=200, k_hat_draws=0)
    r = [2.0, 6.0, 20.0]
    fields = {}
    for likelihood in ("jeans", Smoothing(n_augmented=2048, n_components=6, n_steps=30)):
        potential = MassSlopeNetwork.for_stars(stars.w, n_features=4)
        result = fit(SnapshotModel(potential, SphericalMixture(), likelihood=likelihood), stars, config)
        fields[str(likelihood)[:5]] = Posterior.from_result(result).field("circular_speed", r)
    jeans, literal = fields.values()
    truth = POTENTIAL.circular_speed(torch.tensor(r).double()).detach().numpy()
    assert (abs(literal.mean - truth) < 4 * literal.sd).all()
    assert (abs(literal.mean - jeans.mean) < jeans.sd).all(), (literal.mean, jeans.mean, jeans.sd)
    assert (abs(literal.sd / jeans.sd - 1) < 0.3).all(), (literal.sd, jeans.sd)


@pytest.mark.parametrize("kind", ["mixture", "kernel"])
def test_a_potential_that_holds_no_orbit(kind):
    """A trial step of a fit whose mass overflows: no star has a density, the gradient is asked for without an error."""
    finder = SphericalActions()
    df = SphericalMixture(1).resolved(1, J)
    chain = Chain(POTENTIAL, freeze(df, df.fit_actions(J, seed=0)), finder)
    ln_mass = torch.tensor(800.0, dtype=torch.float64, requires_grad=True)
    network = MassSlopeNetwork.for_stars(STARS, n_features=4)
    absurd = freeze(network, {"ln_mass": ln_mass, "slope_weights": network.initial_values()["slope_weights"]})
    assert len(chain.augment(64, 0).w) > 0
    density = Smoothing(n_augmented=64, kind=kind).density(Chain(absurd, chain.df, finder))
    log_p = density.log_prob(STARS[:5])
    assert not torch.isfinite(log_p).any()
    torch.autograd.grad(log_p.sum(), ln_mass)


def test_refusals():
    """Unknown kinds, sizes and symmetries are refused with the value and the remedy."""
    with pytest.raises(ValueError, match="kind must be 'kernel' or 'mixture', got 'histogram'"):
        Smoothing("histogram")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="n_augmented must be at least 64, got 10"):
        Smoothing(n_augmented=10)
    with pytest.raises(ValueError, match="bandwidth must be positive, got 0"):
        Smoothing("kernel", bandwidth=0)
    with pytest.raises(ValueError, match="a mixture needs n_components of at least 1"):
        Smoothing(n_components=0)
    chain, u = setup(rotation=True)
    with pytest.raises(ValueError, match="axisymmetric symmetry"):
        AugmentedDensity(chain(u), Smoothing("mixture", n_augmented=64))
    chain, u = setup()

    class Box(Isochrone):
        symmetry = "triaxial"

    population = chain(u)
    population.potential = Box(m_tot=1e11, r_s=3.0)
    assert isinstance(population.potential, Potential)
    with pytest.raises(ValueError, match="likelihood='jeans'"):
        AugmentedDensity(population, Smoothing("kernel", n_augmented=64))
    with pytest.raises(
        ValueError,
        match="likelihood must be 'jeans', 'conditional', 'augmented', a LineOfSight or a Smoothing, got 'exact'",
    ):
        SnapshotModel(POTENTIAL, SphericalMixture(), likelihood="exact")  # type: ignore[arg-type]
