"""Sums over blocks of stars: the same numbers as all at once, what blocks share differentiated once.

Free form and mixture of 2, N = 700 stars of an isochrone.
"""

from __future__ import annotations

import copy

import pytest
import torch
from bayespot.models import spherical

from bayespot.actions.table import ActionTable
from bayespot.inference import latent
from bayespot.inference.blocks import Cut, blocks, stars_in
from bayespot.inference.diagnose import log_ratios
from bayespot.inference.latent import LatentSpace
from bayespot.likelihood import HeliocentricDistance
from bayespot.mock import mock

CUT = HeliocentricDistance(12.0, observer=(8.2, 0.0, 0.02))


def space_and_start(stars, selection=None) -> tuple[LatentSpace, torch.Tensor]:
    model = spherical.build(stars).with_outliers(stars.w)
    values = model.initial_values()
    with torch.no_grad():
        fixed = model.at(values)
        J = fixed.finder.capped_actions(fixed.potential, stars.w).J
    model.df = model.df.resolved(2, J)
    values |= {f"df.{name}": value for name, value in model.df.initial_values(J).items()}
    values["outliers.fraction"] = torch.tensor(0.01, dtype=torch.float64)
    if selection is not None:
        model.selection, model.outliers = selection, None
        del values["outliers.fraction"]
        model = model.select_at(values, stars, 1000, 0)
    space = LatentSpace(model)
    return space, space.vector(values)


@pytest.fixture(scope="module")
def stars():
    return mock("isochrone", n_stars=700, seed=4)


@pytest.mark.parametrize("selection", [None, CUT])
def test_blocks_add_up(stars, selection, monkeypatch):
    """Value, gradient, scores and Fisher matrix of blocks of 100 are those of one block and of plain autograd."""
    if selection is not None:
        stars = stars[selection(stars.w) > 0]
    space, u = space_and_start(stars, selection)
    whole = space.likelihood_gradient(u, stars.w)
    leaf = u.clone().requires_grad_()
    plain = space.log_likelihood(leaf, stars.w).sum()
    torch.testing.assert_close(whole[0], plain.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(whole[1], torch.autograd.grad(plain, leaf)[0], rtol=1e-9, atol=1e-8)
    scores, fisher, posterior = (
        space.scores(u, stars.w),
        space.fisher(u, stars.w, 10_000, 0),
        space.log_posterior(u, stars.w),
    )
    tables = []
    original = ActionTable.of.__func__
    monkeypatch.setattr(ActionTable, "of", classmethod(lambda cls, *a: tables.append(1) or original(cls, *a)))
    original_mapped = latent.mapped
    monkeypatch.setattr(latent, "mapped", lambda function, w, size=None: original_mapped(function, w, 100))
    parts = space.likelihood_gradient(u, stars.w)
    assert len(tables) == 1
    torch.testing.assert_close(parts[0], whole[0], rtol=1e-13, atol=0)
    torch.testing.assert_close(parts[1], whole[1], rtol=1e-10, atol=1e-9)
    torch.testing.assert_close(space.scores(u, stars.w), scores, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(space.fisher(u, stars.w, 10_000, 0), fisher, rtol=1e-7, atol=1e-4)
    torch.testing.assert_close(space.log_posterior(u, stars.w), posterior, rtol=1e-13, atol=0)
    torch.testing.assert_close(space.log_likelihoods(u, stars.w).sum(), whole[0], rtol=1e-13, atol=0)


def test_same_numbers_whatever_the_number_of_threads(stars):
    """Value to 1e-13 and gradient to 1e-10 with one thread and with two, several blocks: sums in another order."""
    space, u = space_and_start(stars)
    many = stars.w.repeat(200, 1)
    n = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(space.likelihood_gradient(u, many))
    finally:
        torch.set_num_threads(n)
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-13, atol=0)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-10, atol=1e-6)


def test_a_tabulated_finder_serves_its_stars_and_no_other_potential_is_asked(stars):
    """Actions of a part are those of the whole, and a tabulated model has the tables of its potential only."""
    space, u = space_and_start(stars)
    fixed = space.model.at(space.values(u))
    ready = fixed.tabulated(stars.w)
    whole = fixed.finder.capped_actions(fixed.potential, stars.w).J
    torch.testing.assert_close(ready.finder.capped_actions(ready.potential, stars.w[200:300]).J, whole[200:300])
    assert type(fixed.finder) is not type(ready.finder)
    torch.testing.assert_close(ready.log_prob(stars.w[:50]), fixed.log_prob(stars.w)[:50], rtol=1e-12, atol=1e-10)


def test_cut_passes_gradients_on_once():
    """f = sum over blocks of (a x)^2 y with a = exp(u), y = sin(u): the gradient is that of the whole."""
    u = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)
    x = torch.arange(1.0, 7.0, dtype=torch.float64)
    cut = Cut()
    a, y = cut(u.exp()), cut(u.sin())
    cut(u**3)
    assert cut(x) is x
    for block in x.split(2):
        cut.add(torch.autograd.grad(((a * block) ** 2 * y).sum(), cut.leaves, allow_unused=True))
    (expected,) = torch.autograd.grad(((u.exp() * x) ** 2 * u.sin()).sum(), u)
    torch.testing.assert_close(cut.gradient(u), expected)
    assert float(Cut().gradient(u)) == 0


def test_rows_per_block():
    """Blocks hold so many rows, of stars with samples so many stars fewer, at least one."""
    assert [len(block) for block in blocks(torch.zeros(10, 6), 4)] == [4, 4, 2]
    assert [len(block) for block in blocks(torch.zeros(10, 3, 7), 9)] == [3, 3, 3, 1]
    assert stars_in(torch.zeros(2, 50, 7), 9) == 1


def test_importance_weights_from_a_part(stars):
    """ln p at 40 draws of the Laplace approximation of 7000 stars, from 2000 of them: off by less than
    2 d / sqrt(B) = 0.54 (found 0.37, and 0.44 in the mean), its own spread being larger; the same for equal u. A small
    catalogue and a selection are not estimated at all."""
    many = mock("isochrone", n_stars=7000, seed=5)
    space, u = space_and_start(many)
    for _ in range(3):
        information = space.fisher(u, many.w, 7000, 0)
        u = u + torch.linalg.solve(information, space.gradient(u, many.w)[1])
    n = space.n_potential
    covariance = torch.linalg.inv(information[:n, :n])
    z = torch.randn(40, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    draws = u.repeat(40, 1)
    draws[:, :n] += z @ torch.linalg.cholesky(covariance).T
    estimate = space.log_posterior_near(u, many.w, 2000, 1)
    zero = torch.zeros(40, dtype=torch.float64)
    exact = log_ratios(lambda v: space.log_posterior(v, many.w), draws, zero, lambda: None)
    found = log_ratios(estimate, draws, zero, lambda: None)
    error = found - exact
    assert float(exact.std()) > 1.5
    assert float(error.std()) < 2 * n / 2000**0.5
    assert abs(float(error.mean())) < 2 * n / 2000**0.5
    assert float(estimate(u) - space.log_posterior(u, many.w)) == pytest.approx(0, abs=1e-6)
    assert torch.equal(estimate(draws[0]), estimate(draws[0]))
    whole = space.log_posterior_near(u, many.w, 3500, 1)
    assert torch.equal(whole(draws[0]), space.log_posterior(draws[0], many.w))
    literal = LatentSpace(copy.copy(space.model))
    literal.model.points = object()
    assert literal.log_posterior_near(u, many.w, 10, 1).__qualname__.endswith("<lambda>")
