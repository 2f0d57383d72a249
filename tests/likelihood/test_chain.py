"""The chain: augmented stars follow the closed form, share their random numbers, and differentiate.

Isochrone M = 1e11 Msun, b = 3 kpc; f(J) a mixture fitted to 2000 of its stars; seeds fixed.
"""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import kstest

from bayespot.actions import ActionFinder, IsochroneActions, SphericalActions
from bayespot.df import ActionMixture, SphericalMixture
from bayespot.df.mixture import ActionMixtureModule
from bayespot.likelihood import Chain
from bayespot.likelihood.chain import rotate
from bayespot.mock import mock
from bayespot.numerics import gamma_quantile
from bayespot.potential import Isochrone
from bayespot.pyro_modules import freeze

POTENTIAL = Isochrone(m_tot=1e11, r_s=3.0)
J_TRUE = IsochroneActions().actions(POTENTIAL, mock("isochrone", n_stars=2000, seed=3).w)


def population(kind: str) -> tuple[ActionMixtureModule, dict[str, torch.Tensor]]:
    df = {"sphere": SphericalMixture(2), "rotating": SphericalMixture(2, rotation=True), "any": ActionMixture(2)}[kind]
    df = df.resolved(2, J_TRUE)
    values = df.fit_actions(J_TRUE, seed=0)
    if kind == "rotating":
        values["concentration"] = torch.tensor([1.5, -0.6], dtype=torch.float64)
    return df, values


@pytest.mark.parametrize("kind", ["sphere", "rotating", "any"])
def test_stratified_orbits_follow_f(kind):
    """Weighted means of bounded functions agree with 4e5 independent draws within 5 standard errors."""
    df, values = population(kind)
    df = freeze(df, values)
    orbits = df.stratified(2**14, seed=1, n_spare=3)
    assert abs(float(orbits.weight.sum()) - 1) < 1e-12
    J = df.sample(400_000, seed=2)
    median = J.median(0).values
    for name, function in {
        "J_r": lambda j: (j[:, 0] < median[0]).double(),
        "J_phi": lambda j: torch.tanh(j[:, 1] / 500),
        "J_z": lambda j: torch.exp(-j[:, 2] / median[2]),
        "product": lambda j: torch.exp(-j[:, 0] / median[0]) * torch.tanh(j[:, 1] / 500),
    }.items():
        ours, theirs = float((orbits.weight * function(orbits.J)).sum()), function(J)
        error = float(theirs.std()) / 400_000**0.5
        assert abs(ours - float(theirs.mean())) < 5 * error + 2e-4, (name, ours, float(theirs.mean()), error)


def test_gamma_quantile_differentiates_in_the_shape():
    """d quantile / d shape against central differences of the quantile itself, 1e-7 relative."""
    shape = torch.tensor([0.8, 1.0, 2.5, 30.0], dtype=torch.float64, requires_grad=True)
    u = torch.tensor([0.01, 0.5, 0.9, 0.3], dtype=torch.float64)
    (slope,) = torch.autograd.grad(gamma_quantile(shape, u).sum(), shape)
    h = 1e-4
    with torch.no_grad():
        expected = (gamma_quantile(shape + h, u) - gamma_quantile(shape - h, u)) / (2 * h)
    assert torch.allclose(slope, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("finder", [IsochroneActions(), SphericalActions()])
def test_augmented_stars_have_their_actions(finder: ActionFinder):
    """Steps D-F undone by the finder: J returns to 1e-6, and the closed form is ln f(J) - 3 ln 2 pi."""
    df, values = population("rotating")
    chain = Chain(POTENTIAL, freeze(df, values), finder)
    with torch.no_grad():
        stars = chain.augment(600, seed=4)
    J, theta, _ = IsochroneActions().actions_angles(POTENTIAL, stars.w)
    size = stars.J.abs().sum(-1, keepdim=True)
    assert float(((J - stars.J) / size).abs().max()) < 1e-6
    turned = torch.remainder(theta - stars.theta + math.pi, 2 * math.pi) - math.pi
    assert float(turned.abs().median()) < 1e-6
    expected = chain.df.log_prob(stars.J) - 3 * math.log(2 * math.pi)
    assert torch.allclose(chain.log_density(stars.w), expected, atol=1e-4)


def test_augmented_density_is_normalised_in_phase_space():
    """E_augmented[q(w) / p(w)] = 1 for a normalised test density q inside the support: the closed form has the right
    constant, Jacobian included (Monte Carlo with 65536 Sobol stars, 2 %)."""
    df, values = population("sphere")
    chain = Chain(POTENTIAL, freeze(df, values), IsochroneActions())
    stars = chain.augment(65536, seed=5)
    centre = torch.tensor([3.0, 0.0, 0.0, 0.0, 60.0, 0.0], dtype=torch.float64)
    sd = torch.tensor([1.5, 1.5, 1.5, 60.0, 60.0, 60.0], dtype=torch.float64)
    log_q = torch.distributions.Normal(centre, sd).log_prob(stars.w).sum(-1)
    ratio = (log_q - chain.log_density(stars.w)).exp()
    bound = torch.distributions.Normal(centre, sd).sample((20000,))
    inside = float(torch.isfinite(chain.log_density(bound)).double().mean())
    assert abs(float((stars.weight * ratio).sum()) / inside - 1) < 0.05


@pytest.mark.parametrize("finder", [IsochroneActions(), SphericalActions()])
def test_augment_differentiates_in_all_parameters(finder: ActionFinder):
    """Gradient of a smooth mean over augmented stars, in potential and f(J), against central differences (1e-4)."""
    df, values = population("rotating")
    names = list(values)
    flat = torch.cat([torch.tensor([11.0 * math.log(10), math.log(3.0)], dtype=torch.float64), *values.values()])

    def mean(u: torch.Tensor) -> torch.Tensor:
        potential = freeze(POTENTIAL, {"m_tot": u[0].exp(), "r_s": u[1].exp()})
        parts = dict(zip(names, u[2:].split(2), strict=True))
        stars = Chain(potential, freeze(df, parts), finder).augment(300, seed=6)
        r = torch.linalg.vector_norm(stars.w[:, :3], dim=-1)
        return (stars.weight * (torch.exp(-r / 5) + torch.tanh(stars.w[:, 4] / 100) * stars.w[:, 0] / (1 + r))).sum()

    u = flat.clone().requires_grad_()
    (slope,) = torch.autograd.grad(mean(u), u)
    h = 1e-5
    for k in range(len(flat)):
        step = torch.zeros_like(flat)
        step[k] = h
        expected = float((mean(flat + step) - mean(flat - step)).detach()) / (2 * h)
        assert abs(float(slope[k]) - expected) < 1e-4 * (abs(expected) + 0.01), (k, float(slope[k]), expected)


def test_common_random_numbers():
    """The same seed gives the same angles at other parameters, of f too; another seed other ones."""
    df, values = population("sphere")
    chain = Chain(POTENTIAL, freeze(df, values), IsochroneActions())
    tilted = values | {"logits": values["logits"] + torch.tensor([0.4, -0.4], dtype=torch.float64)}
    other = Chain(Isochrone(m_tot=1.1e11, r_s=3.0), freeze(df, tilted), IsochroneActions())
    assert torch.equal(chain.augment(500, 1).theta, other.augment(500, 1).theta)
    assert not torch.equal(chain.augment(500, 1).theta, chain.augment(500, 2).theta)
    assert kstest(chain.augment(500, 1).theta[:, 0].numpy() / (2 * math.pi), "uniform").pvalue > 0.001


@pytest.mark.parametrize("symmetry", ["spherical", "axisymmetric", "triaxial"])
def test_rotations_leave_the_invariants(symmetry):
    """Rotations keep |x|, |v| and x.v; those about z also L_z and z; directions are isotropic for a sphere."""
    w = mock("isochrone", n_stars=400, seed=1).w
    turned = rotate(w, symmetry, 8, seed=3)
    for a, b in ((0, 0), (1, 1), (0, 1)):
        parts = turned.reshape(8, 400, 2, 3)
        before = (w.reshape(400, 2, 3)[:, a] * w.reshape(400, 2, 3)[:, b]).sum(-1)
        assert torch.allclose((parts[:, :, a] * parts[:, :, b]).sum(-1), before.expand(8, -1), rtol=1e-9, atol=1e-6)
    if symmetry == "axisymmetric":
        Lz = turned[..., 0] * turned[..., 4] - turned[..., 1] * turned[..., 3]
        assert torch.allclose(Lz, (w[:, 0] * w[:, 4] - w[:, 1] * w[:, 3]).expand(8, -1), atol=1e-6)
        assert torch.allclose(turned[..., 2], w[:, 2].expand(8, -1))
    if symmetry == "spherical":
        cosine = turned[..., 2] / torch.linalg.vector_norm(turned[..., :3], dim=-1)
        assert kstest((cosine.flatten().numpy() + 1) / 2, "uniform").pvalue > 0.001


def test_a_finder_without_inverse_is_refused():
    """ValueError names the finder and the remedy."""

    class OneWay(IsochroneActions.__mro__[1]):  # type: ignore[misc]
        def capped_actions(self, potential, w):
            raise NotImplementedError

        def actions_angles(self, potential, w):
            raise NotImplementedError

    df, values = population("sphere")
    with pytest.raises(ValueError, match="OneWay has no inverse"):
        Chain(POTENTIAL, freeze(df, values), OneWay())
