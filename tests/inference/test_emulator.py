"""The emulator of the likelihood of a flattened potential against the exact posterior.

Protocol: the stars of `problem`, at the maximum of their posterior. Gradient and second derivatives are exact
to what their steps and the stars' weak directions leave; at draws from the posterior the emulator is off by a part of
what the draws' ln p scatters.
"""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
from contracts.actions import bound_stars

from bayespot import Catalog, FitConfig, SnapshotModel
from bayespot.df import ActionMixture
from bayespot.inference.emulator import _MEASURED, Emulator
from bayespot.inference.hmc import _Sampler, hmc, r_hat, starts
from bayespot.inference.latent import LatentSpace, whitening
from bayespot.inference.linearised import gauss_newton, phi_of_draws
from bayespot.inference.map import _OTHER_POINTS, Climb
from bayespot.likelihood.normalisation import FixedPoints
from bayespot.potential import NFW, AxisymmetricNetwork, ExponentialDiscs, MassSlopeNetwork, MiyamotoNagai


@pytest.fixture(scope="module")
def top(problem):
    """The maximum, and the emulator there."""
    space, u, w = problem
    u, _, _ = gauss_newton(space, u, w, 0.05, 20, lambda u, note: None, 1000)
    return u, Emulator.of(space, u, w, 1)


def around(emulator, u, n, width, seed):
    """Draws of the emulator's latents about u, of ``width`` times the emulator's covariance."""
    d = emulator.d
    C = torch.linalg.cholesky(torch.linalg.inv(emulator.information))
    noise = torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.cat([u[:d] + width * noise @ C.T, u[d:].expand(n, -1)], 1)


def test_gradient(problem, top):
    """Exact where it was expanded, and after a correction elsewhere too."""
    space, _, w = problem
    u, emulator = top
    d = emulator.d
    assert float(emulator.c(u[None]).abs().max()) < 1e-9
    scale = space.gradient(u, w)[1][:d].abs().max() + emulator.information.diagonal().sqrt()
    for at, one in ((u, emulator), (u + 0.02, emulator.corrected(u + 0.02, space.likelihood_gradient(u + 0.02, w)[1]))):
        _, slope = one.gradients(at[None])
        exact = space.gradient(at, w)[1]
        assert float(((slope[0, :d] - exact[:d]) / scale).abs().max()) < 0.02
    value, slope = emulator.gradient(u + 0.02, w)
    assert float(value) == pytest.approx(float(emulator.log_posterior(u[None] + 0.02)[0]))
    assert not slope[d:].any()


def test_potential_and_f_together(problem, top):
    """A step of the potential changes the slope by f(J)'s latents as the exact one: they stand in for each other."""
    space, _, w = problem
    u, emulator = top
    n = space.n_potential
    if emulator.d == n:
        pytest.skip("f(J) is not drawn")
    C = whitening(emulator.information[:n, :n])
    root = whitening(emulator.information[n:, n:])
    _, sigma, Bt = torch.linalg.svd(emulator.derivatives(u)[: emulator.n_asked, :n] @ C, full_matrices=False)
    told = (C @ Bt.T)[:, sigma**2 > _MEASURED]
    assert told.shape[1] > 0
    for v in told.T:
        step = torch.cat([0.5 * v, u.new_zeros(space.size - n)])
        exact = space.gradient(u + step, w)[1] - space.gradient(u - step, w)[1]
        found = emulator.gradients((u + step)[None])[1][0] - emulator.gradients((u - step)[None])[1][0]
        miss, size = (float((root.T @ change[n:]).norm()) for change in (found - exact, exact))
        assert miss < 0.3 * size, (miss, size)
        assert size > 0.1


def test_information(problem, top):
    """Minus the second derivatives of the exact posterior."""
    space, _, w = problem
    u, emulator = top
    d = emulator.d
    C = torch.linalg.cholesky(torch.linalg.inv(emulator.information))
    for k in range(d):
        step = torch.cat([0.3 * C[:, k], u.new_zeros(space.size - d)])
        slopes = [space.gradient(at, w)[1][:d] for at in (u - step, u + step)]
        assert float(C[:, k] @ (slopes[0] - slopes[1]) / 0.6) == pytest.approx(1, abs=0.25)


def test_at_draws(problem, top):
    """Emulated ln p of draws is the exact one to a fraction of a nat, a small part of its scatter."""
    space, _, w = problem
    u, emulator = top
    draws = around(emulator, u, 40, 0.5, 2)
    exact = torch.stack([space.log_posterior(one, w) for one in draws])
    emulated = emulator.log_posterior(draws)
    # 0.13 in the 22 dimensions of potential and f(J), whose mean ln p of such draws scatters by 1
    assert float((exact - emulated).std()) < (0.1 if emulator.d == space.n_potential else 0.2)
    # nor do they agree because nothing happens
    assert float(exact.std()) > 4 * float((exact - emulated).std())


def test_refined(problem, top):
    """Made to agree with exact gradients at draws, it is nearer to the exact posterior at others."""
    space, _, w = problem
    u, emulator = top
    # over the whole width the logistic process of 150 stars is no Gaussian
    draws = around(emulator, u, 60, 1.0 if emulator.d == space.n_potential else 0.5, 4)
    exact = torch.stack([space.log_posterior(one, w) for one in draws])
    of_phi = torch.arange(len(emulator.g)) < len(emulator.g) - (emulator.d - space.n_potential)
    wrong = dataclasses.replace(emulator, H=2 * emulator.H, g=emulator.g + 1.0 * of_phi)
    before, after = (
        float((exact - one.log_posterior(draws))[30:].std()) for one in (wrong, wrong.refined(draws[:30], w))
    )
    assert after < 0.3 * before
    # changes of H are kept small, and twice H is far: left free, they end at 1.1 times
    limit = 1.5 if emulator.d == space.n_potential else 2
    assert after < limit * float((exact - emulator.log_posterior(draws))[30:].std())


def test_refined_without_cliffs(problem, top):
    """A draw in which stars come loose, where ln L falls off a cliff, does not move the emulator."""
    space, _, w = problem
    u, emulator = top
    if emulator.d == space.n_potential:
        pytest.skip("so distant a draw of three latents is no cliff")
    draws = around(emulator, u, 12, 0.5, 5)
    lost = draws[-1:].clone()
    lost[:, : space.n_potential] -= 2.0
    expected = emulator.refined(draws, w)
    found = emulator.refined(torch.cat([draws, lost]), w)
    # what a cliff would change, against what the draws do: all entries, in the units of each
    scale = emulator.H.diagonal().abs().sqrt() + 1e-3
    moved, meant = (((one.H - emulator.H) / scale / scale[:, None]).norm() for one in (found, expected))
    assert float(((found.H - expected.H) / scale / scale[:, None]).norm()) < 0.3 * float(meant) + 1e-6, (moved, meant)
    torch.testing.assert_close(found.g, expected.g, rtol=0.1, atol=0.1 * float((expected.g - emulator.g).norm()))


def test_more_points(problem, top):
    """Gradient, density and exact density change by what more points of a selection tell."""
    space, _, w = problem
    u, emulator = top
    slope = torch.zeros_like(u)
    slope[:2] = torch.tensor([0.3, -0.2], dtype=torch.float64)
    moved = emulator.with_more_points(u, slope)
    (before,), (after,) = (one.gradients(u[None])[1] for one in (emulator, moved))
    d, scale = emulator.d, emulator.information.diagonal().sqrt()
    torch.testing.assert_close((after - before)[:d] / scale, slope[:d] / scale, rtol=0.05, atol=0.01)
    # a latent of f(J) that the stars tell well moves as much
    k = int(emulator.information.diagonal().argmax())
    one = torch.zeros_like(u)
    one[k] = 0.3 * float(scale[k])
    (after,) = emulator.with_more_points(u, one).gradients(u[None])[1]
    assert float((after - before)[k]) == pytest.approx(float(one[k]), rel=0.1)
    near = u + 0.02 * torch.sign(slope)
    exact, corrected = (one.exact(lambda v: space.log_posterior(v, w))(near) for one in (emulator, moved))
    assert float(corrected - exact) == pytest.approx(float(slope @ (near - u)), rel=0.1)


def test_slope_by_more_points(problem, top):
    """The emulator's slope is that of the likelihood with all sets of points together, as nearly as it can be."""
    space, _, w = problem
    u, emulator = top
    if space.model.points is None:
        pytest.skip("a complete sample has no points")
    config = FitConfig(seed=3, selection_points=8000, selection_max_points=8000, guide="emulated")
    climb = Climb(space.model, Catalog(w[:, 0, :6]), w, w[:50], config, lambda u, note: None)
    climb.emulator = emulator
    _, information, n, error = climb._corrected_finely(u, lambda note: None)
    assert n == 8000
    sets = [climb._with_points(u, 2000, 3 + _OTHER_POINTS + k) for k in range(4)]
    whole = copy.copy(sets[0])
    parts = [(one.points.w, one.points.log_weight - math.log(4), one.points.accepted) for one in sets]
    whole.points = FixedPoints(*(torch.cat(part) for part in zip(*parts, strict=True)))
    expected = LatentSpace(whole).likelihood_gradient(u, w)[1]
    few = space.likelihood_gradient(u, w)[1]
    found = climb.emulator.gradients(u[None])[1][0] - space.prior_gradient(u)[1]
    C = whitening(information)
    before, after = (float((C.T @ (slope - expected)).norm()) for slope in (few, found))
    assert after < 0.2 * before, (before, after)
    # stars out of equilibrium have points in the centre that decide, and the error says so
    assert 0.1 < error < before


def test_proposal(problem, top):
    """The best of all f(J) in each potential, as the Gaussian integral has it; the likelihood counts less."""
    space, _, _ = problem
    u, emulator = top
    n = space.n_potential
    proposal = emulator.proposal()
    at = u[None].repeat(3, 1)
    at[:, :n] += torch.tensor([[0.05], [-0.05], [0.0]], dtype=torch.float64)
    found = proposal.log_posterior(at)
    prior = space.log_prior(at)
    likelihood = [emulator.log_posterior(at) - prior]
    if emulator.d > n:
        # by its own maximum over the latents of f(J), whose prior is Gaussian
        best = at.clone()
        best[:, n:] = emulator._orbits_given(at)
        likelihood[0] = emulator.log_posterior(best) - prior
    expected = likelihood[0] / 1.2 + prior
    torch.testing.assert_close(found - found[2], expected - expected[2], rtol=0.02, atol=1e-3)


def test_f_drawn_in_each_potential(problem, top):
    """Draws of f(J) have the density that `log_proposal` states, and that is the emulator's at a given potential."""
    space, _, _ = problem
    u, emulator = top
    n = space.n_potential
    draws = u[None].repeat(200, 1)
    draws[:, :n] += 0.02
    found = emulator.with_orbits(draws, torch.Generator().manual_seed(1))
    assert torch.equal(found[:, :n], draws[:, :n])
    if emulator.d == n:
        assert torch.equal(found, draws)
        return
    assert bool((found[:, n:].std(0) > 0).all())
    density, stated = emulator.log_posterior(found), emulator.log_proposal(found)
    assert float((density - stated).std()) < 1e-3 * float(stated.std())
    scaled = (found[:, n:] - emulator._orbits_given(draws)) @ torch.linalg.inv(emulator._orbits.root).T
    assert float(scaled.std()) == pytest.approx(1, abs=0.05)


def test_stored(problem, top):
    """A fit that is resumed goes on with the same emulator."""
    space, _, _ = problem
    u, emulator = top
    again = Emulator.restored(space, emulator.state())
    torch.testing.assert_close(again.log_posterior(u[None] + 0.1), emulator.log_posterior(u[None] + 0.1))


def test_functionals_of_a_free_form():
    """What is asked of Phi by way of the sources is what the grid gives, to the power laws at its edges."""
    w = bound_stars(MiyamotoNagai(5e10, 3.0, 0.3) + NFW(5e11, 20.0), 150, 3)
    network = AxisymmetricNetwork(MassSlopeNetwork.for_stars(w, 4), n_shapes=3, n_degrees=2)
    model = SnapshotModel(network + ExponentialDiscs([2.0, 4.0], [0.3, 0.3], 24.0), ActionMixture())
    values = model.initial_values()
    fixed = model.at(values)
    model.finder = model.finder.settled(fixed.potential, w)
    J = model.finder.capped_actions(fixed.potential, w).J.detach()
    model.df = model.df.resolved(2, J)
    space = LatentSpace(model)
    u = space.vector(values | {f"df.{name}": value for name, value in model.df.fit_actions(J, 1).items()})
    emulator = Emulator.of(space, u, w, 1, measured=False)
    noise = torch.randn(5, space.n_potential, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    draws = torch.cat([u[: space.n_potential] + 0.5 * noise, u[space.n_potential :].expand(5, -1)], 1)
    nodes = (emulator.s, emulator.mu)
    change = phi_of_draws(space, draws, nodes) - phi_of_draws(space, u[None], nodes)
    found = emulator.c(draws)
    assert float((found - change @ emulator.W).abs().max() / found.abs().max()) < 1e-6


def test_hmc_on_a_gaussian():
    """Mean and covariance within 5 standard errors, from a metric wrong by factors of 10; no draw beyond a wall."""
    d = 4
    root = torch.tensor([[1.0, 0, 0, 0], [0.9, 0.3, 0, 0], [0, 0, 3.0, 0], [0, 1.0, 0, 0.1]], dtype=torch.float64)
    precision = torch.linalg.inv(root @ root.T)

    def gradients(u):
        return -0.5 * ((u @ precision) * u).sum(-1), -u @ precision

    zero = torch.zeros(d, dtype=torch.float64)
    wrong = precision.diagonal().diag() / 4
    begin = starts(zero, wrong, 1)
    chains = hmc(gradients, begin, wrong, 3000, 1, lambda note: None)
    u = chains.u.flatten(0, 1)
    assert chains.acceptance > 0.6
    assert float(r_hat(chains.u).max()) < 1.05
    n = chains.u.shape[0] * chains.u.shape[1] / 3  # the draws of a chain are not independent
    sd = (root @ root.T).diagonal().sqrt()
    assert bool((u.mean(0).abs() < 5 * sd / n**0.5).all())
    covariance = u.T.cov() / sd / sd[:, None]
    assert float((covariance - root @ root.T / sd / sd[:, None]).abs().max()) < 5 * (2 / n) ** 0.5
    again = hmc(gradients, begin, wrong, 3000, 1, lambda note: None)
    assert torch.equal(again.u, chains.u)
    # a wider density, from where these chains are
    wide = hmc(lambda u: tuple(part / 4 for part in gradients(u)), begin, wrong, 3000, 2, lambda note: None, chains)
    assert float((wide.u.flatten(0, 1).std(0) / u.std(0) - 2).abs().max()) < 0.25

    def half(u):
        value, slope = gradients(u)
        return torch.where(u[:, 0] > 0, value, torch.nan), slope

    inside = hmc(half, starts(zero + 1, precision, 2), precision, 600, 2, lambda note: None).u
    assert bool((inside[..., 0] > 0).all())
    assert float(inside[..., 0].mean()) == pytest.approx((2 / torch.pi) ** 0.5, abs=0.12)


def test_trajectories_are_reversible():
    """Back to the start with the momentum turned round, and the energy's error falls with the square of the step."""

    def gradients(u):
        return -(u**4).sum(-1) / 4, -(u**3)

    generator = torch.Generator().manual_seed(1)
    begin = torch.rand(20, 3, dtype=torch.float64, generator=generator)  # near enough to stay where they are
    p = torch.randn(20, 3, dtype=torch.float64, generator=generator)

    errors = []
    for step in (0.02, 0.01):
        chains = _Sampler(gradients, begin, torch.eye(3, dtype=torch.float64), generator, lambda note: None)
        start = chains.z
        before = chains.value - (p**2).sum(-1) / 2
        z, end, value, slope = chains.trajectory(p, step)
        errors.append(float((value - (end**2).sum(-1) / 2 - before).abs().max()))
        chains.z, chains.value, chains.slope = z, value, slope
        back, turned, *_ = chains.trajectory(-end, step)
        torch.testing.assert_close(back, start, rtol=0, atol=1e-10)
        torch.testing.assert_close(turned, -p, rtol=0, atol=1e-10)
    assert errors[0] < 1e-2
    assert errors[1] < errors[0] / 3


def test_chains_apart_are_told():
    u = torch.randn(6, 30, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert float(r_hat(u).max()) < 1.1
    u[:, :15, 1] += 2
    assert float(r_hat(u)[1]) > 1.2
