"""One suite for every density of orbits (`contracts_df`), the chart, and what is particular to trained ones.

Stars: 3000 actions of a two-component f(J) with known parameters, with and without rotation. Networks are trained for
as many steps as tell them from the reference density, not to their best.
"""

from __future__ import annotations

import functools
import math

import pytest
import torch
from contracts import df as contracts
from contracts.df import Case

from bayespot import FitConfig, MassSlopeNetwork, Posterior, SnapshotModel, fit
from bayespot.df import (
    ActionChart,
    ChartGaussians,
    DiffusionDensity,
    DistributionFunction,
    EnergyDensity,
    FlowDensity,
    LogActionGaussians,
    LogisticGaussianProcess,
    SphericalActionDistribution,
    SphericalMixture,
    TabulatedDistribution,
    TrainingConfig,
)
from bayespot.df.flow import box_spline
from bayespot.df.logistic_gp import LegendreBasis, LogPolynomialDistribution
from bayespot.mock import mock, truth_potential
from bayespot.numerics import gauss_legendre
from bayespot.potential import truth_field
from bayespot.pyro_modules import freeze

SHORT = TrainingConfig(steps=60, warm_steps=20, batch_size=512, check_every=20, learning_rate=5e-3)
TRAINED = {"flow": FlowDensity, "diffusion": DiffusionDensity, "energy": EnergyDensity}
SITED = {"mixture": SphericalMixture, "gaussian": ChartGaussians, "gaussian_lnJ": LogActionGaussians}
PROCESS = "logistic_gp"
#: Boundaries of those that are not finite and positive at the edges by construction.
EDGES = {"SphericalMixture": "power", "LogActionGaussians": "vanishing"}
STICKS = "mixture with sticks"
NEAR_DATA = "logistic_gp near data"
NAMES = [STICKS, NEAR_DATA, *(name + turn for turn in ("", ", rotating") for name in (*SITED, *TRAINED, PROCESS))]


def _t(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def truth(rotating: bool) -> SphericalActionDistribution:
    return SphericalActionDistribution(
        _t(0.3, -0.4), _t(150.0, 900.0), _t(300.0, 600.0), _t(1.0, 1.8), _t(2.0, 2.7), _t(2.2, 6.0),
        _t(1.5, -0.7) if rotating else None,
    )  # fmt: skip


@functools.cache
def stars(rotating: bool) -> torch.Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(4)
        return truth(rotating).sample((3000,))


@functools.cache
def case(name: str) -> Case:
    kind, rotating = name.split(",")[0], name.endswith("rotating")
    J = stars(rotating)
    df: DistributionFunction
    if kind in TRAINED:
        df = TRAINED[kind](rotation=rotating, training=SHORT).trained(J, seed=1)
    elif kind in (PROCESS, NEAR_DATA):
        df = LogisticGaussianProcess(rotation=rotating).resolved(1, J, near_data=kind == NEAR_DATA)
        df = freeze(df, df.fit_actions(J, seed=0))
    else:
        sticks = kind == STICKS
        df = SphericalMixture(weights="stick_breaking") if sticks else SITED[kind](rotation=rotating)
        df = df.resolved(2, J)
        df = freeze(df, df.fit_actions(J, seed=0, max_iterations=20))
    return Case(df, J)


@pytest.fixture(params=NAMES)
def density(request) -> Case:
    return case(request.param)


def test_integrates_to_one(density):
    contracts.check_normalised(density)


def test_samples_match_density(density):
    contracts.check_samples(density)


def test_gradient(density):
    contracts.check_gradient(density)


def test_minibatch_equals_full_batch(density):
    contracts.check_batches(density)


def test_save_and_load(density, tmp_path):
    contracts.check_saving(density, tmp_path)


def test_corners(density):
    contracts.check_corners(density, EDGES.get(type(density.df).__name__, "finite"))


def test_no_parameters_of_its_own(density):
    contracts.check_fixed(density)


@pytest.mark.parametrize("rotation", [False, True])
def test_chart(rotation):
    """Round trips to 1e-9, f_0 is the Jacobian of (u, T, c) (autograd, 1e-8), and sits near the stars' density."""
    J = stars(rotation)[:300]
    chart = ActionChart.for_actions(stars(rotation), rotation)
    y = chart.smooth(J)
    torch.testing.assert_close(chart.actions(y), J, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(chart.smooth_of_uniform(chart.uniform(y)), y, rtol=1e-9, atol=1e-9)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda point: chart.uniform(chart.smooth(point))))(J)
    torch.testing.assert_close(chart.log_reference(y), jacobian.det().abs().log(), rtol=1e-8, atol=1e-8)
    volume = torch.func.vmap(torch.func.jacrev(chart.uniform))(y).det().abs().log()
    torch.testing.assert_close(chart.log_volume(y), volume, rtol=1e-8, atol=1e-8)
    x = chart.uniform(chart.smooth(stars(rotation)))
    # a good chart leaves little to learn: no tenth of u or T holds less than 4 % or more than 20 % of the stars
    for k in range(2):
        share = torch.histc(x[:, k], 10, 0, 1) / len(x)
        assert float(share.min()) > 0.04, share
        assert float(share.max()) < 0.2, share


def test_table_follows_its_function():
    """ln q of a smooth function at random points to 1e-4, its integral over the reference density 1 to 1e-3."""
    for rotation in (False, True):
        chart = ActionChart.for_actions(stars(rotation), rotation)

        def log_q(y, rotation=rotation):
            return torch.sin(5 * y[:, 0]) + y[:, 1] ** 2 + (2 * y[:, 0] * torch.sin(3 * y[:, 2]) if rotation else 0)

        table = TabulatedDistribution(chart, log_q)
        x = torch.quasirandom.SobolEngine(3, scramble=True, seed=1).draw(2**15, dtype=torch.float64)
        y = chart.smooth_of_uniform(x)
        torch.testing.assert_close(table.log_q(y) + table.log_norm, log_q(y), rtol=0, atol=1e-4)
        assert abs(float(table.log_q(y).exp().mean()) - 1) < 1e-3


def test_spline_has_free_slopes_at_its_ends():
    """The interval onto itself, with the end slopes that were asked for (those of a flow's density at an edge)."""
    ends = _t(1.1, -0.8)
    spline = box_spline(_t(0.3, -0.2, 0.1), _t(-0.1, 0.4, 0.0), torch.cat([ends[:1], _t(0.2, -0.3), ends[1:]]))
    y, ladj = spline.call_and_ladj(_t(-1, 0.2, 1))
    torch.testing.assert_close(y[[0, 2]], _t(-1, 1))
    # zuko's soft limit of a slope: within e^7
    torch.testing.assert_close(ladj[[0, 2]], ends / (1 + ends.abs() / 7), rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", TRAINED)
def test_table_of_a_network(name):
    """The table is the network to 0.02 at the stars, and what it learns beats the chart's reference density."""
    df, J = case(name)
    exact = df.exact_log_prob(J[:500])
    torch.testing.assert_close(df.log_prob(J[:500]), exact, rtol=0, atol=0.02)
    assert df.state.histories[0].best > df.state.histories[0].held_out[0] + 0.001


@pytest.mark.parametrize("name", TRAINED)
def test_training_is_repeatable(name):
    """The same seed gives the same density, and a second training starts from the first's weights."""
    df, J = case(name)
    again = type(df)(training=SHORT).trained(J, seed=1)
    assert torch.equal(again.log_prob(J[:50]), df.log_prob(J[:50]))
    warm = df.trained(J, seed=1)
    assert warm.state.histories[0].held_out[0] == pytest.approx(df.state.histories[0].best, abs=1e-4)


@pytest.mark.parametrize("name", ["gaussian", "gaussian_lnJ", "gaussian, rotating"])
def test_weighted_orbits_are_differentiable(name):
    """d E[v]/d sites through the stratified orbits (1024) equals central differences, 1e-5 of the largest."""
    kind, rotating = name.split(",")[0], name.endswith("rotating")
    J = stars(rotating)
    df = SITED[kind](rotation=rotating).resolved(2, J)
    start = df.initial_values(J)
    chart = ActionChart.for_actions(J)

    def mean(flat: torch.Tensor) -> torch.Tensor:
        fixed = freeze(df, dict(zip(start, flat.split(2), strict=True)))
        orbits = fixed.stratified(1024, seed=3)
        return (orbits.weight * chart.smooth(orbits.J)[:, 0]).sum()

    flat = torch.cat(list(start.values())) + 0.1 * torch.arange(2 * len(start)).double().sin()
    flat.requires_grad_()
    (slope,) = torch.autograd.grad(mean(flat), flat)
    assert float(slope.abs().max()) > 1e-3
    with torch.no_grad():
        for k in range(len(flat)):
            step = torch.zeros_like(flat)
            step[k] = 1e-6
            difference = float(mean(flat + step) - mean(flat - step)) / 2e-6
            # the shares of the components in the number of orbits jump with the logits by one orbit
            if k >= 2:
                assert abs(difference - float(slope[k])) < 1e-5 * float(slope.abs().max()), (name, k)


def test_ensemble_is_the_mean_of_its_members():
    """f of two members is the mean of theirs, to the tables' accuracy."""
    J = stars(False)
    both = EnergyDensity(n_members=2, training=SHORT).trained(J, seed=1)
    y = both.state.chart.smooth(J[:100])
    parts = [network.log_q(network.coordinates(y)).exp() for network in both.state.networks]
    assert float((parts[0] - parts[1]).abs().max()) > 1e-3
    expected = (sum(parts) / 2).log() + both.state.chart.log_reference(y)
    torch.testing.assert_close(both.log_prob(J[:100]), expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize("tail", [0.35, 1.0, 8.0])
def test_process_is_normalised_on_any_chart(tail):
    """The quadrature of a rough ln q is the mean over 2^16 points of the cube to 1e-3."""
    for rotation in (False, True):
        chart = ActionChart(300.0, 500.0, 1.3, tail, rotation)
        basis = LegendreBasis(chart, 8)
        generator = torch.Generator().manual_seed(5)
        noise = torch.randn(len(basis), generator=generator, dtype=torch.float64)
        process = LogPolynomialDistribution(chart, basis, 0.5**basis.degrees * noise)
        x = torch.quasirandom.SobolEngine(3, scramble=True, seed=1).draw(2**16, dtype=torch.float64)
        log_q = process.log_q(chart.smooth_of_uniform(x))
        assert float(log_q.std()) > 0.3
        assert abs(float(log_q.exp().mean()) - 1) < 1e-3


def test_process_fits_what_a_mixture_fits():
    """ln f of the truth's other stars within 0.02 of the truth's own; amplitudes move the weighted orbits rightly."""
    J = stars(False)
    df, _ = case(PROCESS)
    with torch.random.fork_rng():
        torch.manual_seed(9)
        others = truth(False).sample((20_000,))
    below = truth(False).log_prob(others) - df.log_prob(others)
    assert float(below.mean()) < 0.02
    process, chart = LogisticGaussianProcess(degree=3).resolved(1, J), ActionChart.for_actions(J)
    weights = torch.linspace(-1, 1, 9, dtype=torch.float64, requires_grad=True)

    def mean(w: torch.Tensor) -> torch.Tensor:
        orbits = freeze(process, {"weights": w}).stratified(4096, seed=3)
        return (orbits.weight * chart.smooth(orbits.J)[:, 0]).sum()

    (slope,) = torch.autograd.grad(mean(weights), weights)
    for k in range(9):
        step = torch.zeros(9, dtype=torch.float64)
        step[k] = 0.05
        with torch.no_grad():
            difference = float(mean(weights + step) - mean(weights - step)) / 0.1
        # the points move with the table from which they are drawn: another sample of the same integral
        assert float(slope[k]) == pytest.approx(difference, abs=0.02 * float(slope.abs().max()))


def test_process_has_one_maximum():
    """At fixed actions ln p falls by what a concave function must on the way from its maximum, in every direction."""
    J = stars(False)[:500]
    process = LogisticGaussianProcess(degree=5).resolved(1, J)
    best = process.fit_actions(J, seed=0)["weights"]

    def log_p(w: torch.Tensor) -> float:
        return float(freeze(process, {"weights": w}).log_prob(J).sum() - (w**2).sum() / 2)

    generator = torch.Generator().manual_seed(2)
    for _ in range(20):
        away = torch.randn(len(best), generator=generator, dtype=torch.float64)
        # the prior alone is concave by this much
        assert log_p(best + away) < log_p(best) - 0.45 * float((away**2).sum())


def test_process_knows_that_its_stars_were_selected():
    """Orbits cut at the 80 % quantile of J_r + L: the reference density of what is left is far too steep. With a
    wider one and the cut in the likelihood f says that 80 % were kept, within 2 %; with theirs it says 85 %."""
    whole = SphericalActionDistribution(_t(0.0), _t(150.0), _t(300.0), _t(1.2), _t(2.2), _t(2.5))
    with torch.random.fork_rng():
        torch.manual_seed(4)
        J, points = whole.sample((6000,)), whole.sample((60_000,))
    limit = (J[:, 0] + J[:, 2] + J[:, 1].abs()).quantile(0.8)
    kept, inside = (x[x[:, 0] + x[:, 2] + x[:, 1].abs() < limit] for x in (J, points))
    log_q = whole.log_prob(inside) + math.log(len(points))

    def log_z(df: DistributionFunction) -> torch.Tensor:
        return torch.logsumexp(df.log_prob(inside) - log_q, 0)

    found = []
    for near_data in (True, False):
        df = LogisticGaussianProcess().resolved(1, kept, near_data)
        found.append(float(log_z(freeze(df, df.fit_actions(kept, 0, log_z=log_z))).exp()))
    assert abs(found[0] - 0.8) < 0.02, found
    assert found[1] > 0.82, found


def test_process_takes_fewer_stars_than_polynomials():
    """40 stars, 44 polynomials with their priors: a fit, with M(<r) at the median star within 3 sd of the truth."""
    stars_ = mock("isochrone", n_stars=40, seed=2)
    model = SnapshotModel(MassSlopeNetwork.for_stars(stars_.w, n_features=4), LogisticGaussianProcess())
    result = fit(model, stars_, FitConfig(seed=1, guide="laplace", n_draws=100, k_hat_draws=30))
    assert result.draws["df.weights"].shape == (100, 44)
    field = Posterior.from_result(result).field("enclosed_mass", [result.catalog["r_q"][4]])
    truth = truth_field(truth_potential(stars_), "enclosed_mass", field.points)
    assert abs(field.mean - truth) < 3 * field.sd
    assert field.sd < truth


def test_refusals():
    """An untrained density, no members and impossible settings are refused with what to do."""
    with pytest.raises(ValueError, match="not trained"):
        FlowDensity().log_prob(stars(False))
    with pytest.raises(ValueError, match="got 0"):
        FlowDensity(n_members=0)
    with pytest.raises(ValueError, match="n_components=3"):
        LogisticGaussianProcess().resolved(3, stars(False))
    with pytest.raises(ValueError, match="got 8"):
        LogisticGaussianProcess(decay=0.0)
    with pytest.raises(ValueError, match="call resolved"):
        LogisticGaussianProcess().log_prob(stars(False))
    with pytest.raises(ValueError, match="got 1"):
        TrainingConfig(held_out=1)
    with pytest.raises(ValueError, match="positive"):
        ActionChart.for_actions(torch.zeros(10, 3, dtype=torch.float64))


def test_logistic_gp_with_cusps():
    """ln f goes as the stated powers towards J = 0 and L = 0, to 1 % of them, and over what it is without the third as
    that of 1 - v; f integrates to one (the powers at the edges cost 0.3 %); at fixed actions it is the same number."""
    torch.manual_seed(3)
    J = 300 * torch.rand(400, 3, dtype=torch.float64) ** 2
    df = LogisticGaussianProcess(degree=3, cusps=True).resolved(1, J)
    weights = 0.1 * torch.randn(12, dtype=torch.float64)
    weights[-3:] = torch.tensor([-1.2, -0.5, 0.6], dtype=torch.float64) / torch.tensor([2.0, 1.0, 2.0])
    fixed = freeze(df, {"weights": weights})
    near = torch.tensor([1e-4, 2e-4], dtype=torch.float64)
    shrinking = torch.stack([near, near / 2, near], -1)
    flattening = torch.stack([torch.full_like(near, 50.0), near / 2, near / 2], -1)
    for path, power in ((shrinking, -1.2), (flattening, -0.5)):
        low, high = fixed.log_prob(path)
        assert float(high - low) / math.log(2) == pytest.approx(power, rel=0.01)
    without = freeze(df, {"weights": weights * (torch.arange(12) < 11)})
    J_far = 1e4 * torch.ones(2, 3, dtype=torch.float64) * torch.tensor([[1.0], [8.0]])
    gained = (fixed.log_prob(J_far) - without.log_prob(J_far)).diff()
    left = 1 - fixed.distribution().chart.smooth(J_far)[:, 0]
    assert float(gained) == pytest.approx(0.6 * float(left.log().diff()), rel=1e-9)
    assert torch.allclose(df.at_actions(J)(weights), fixed.log_prob(J), atol=1e-10)
    several = torch.stack([weights, 0 * weights, -weights])
    found = df.at_actions(J)(several)
    for one, log_f in zip(several, found, strict=True):
        assert torch.allclose(log_f, freeze(df, {"weights": one}).log_prob(J), atol=1e-10)
    x, w = gauss_legendre(400)
    x, w = (x + 1) / 2, w / 2
    v, t = torch.meshgrid(x, x, indexing="ij")
    y = torch.stack([v, t, torch.full_like(v, 0.5)], -1)
    distribution = fixed.distribution()
    log_volume = distribution.chart.log_volume(y.reshape(-1, 3)).reshape(v.shape)
    total = ((distribution.log_q(y) + log_volume).exp() * w[:, None] * w).sum()
    assert float(total) == pytest.approx(1.0, abs=3e-3)
