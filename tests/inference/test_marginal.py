"""f(J) integrated out in each potential, against what is known."""

from __future__ import annotations

import math

import pytest
import torch

from bayespot import FitConfig, LogisticGaussianProcess, MassSlopeNetwork, Posterior, SnapshotModel, fit
from bayespot.df import SphericalMixture
from bayespot.inference import marginal as marginals
from bayespot.inference.latent import LatentSpace
from bayespot.inference.marginal import MarginalPosterior, integrable, marginal
from bayespot.inference.proposals import Proposal, effective
from bayespot.mock import MOCKS, mock
from bayespot.potential import MiyamotoNagai, truth_field

F64 = torch.float64


def silent(note: str) -> None:
    """Tell nobody."""


def fitted(likelihood: str, seed: int):
    stars = mock("isochrone", n_stars=400, seed=seed)
    network = MassSlopeNetwork.for_stars(stars.w, n_features=3)
    model = SnapshotModel(network, LogisticGaussianProcess(degree=3), likelihood=likelihood)
    config = FitConfig(seed=1, guide="laplace", outliers=False, n_draws=100, k_hat_draws=0)
    found = fit(model, stars, config, progress=False)
    space = LatentSpace(found.model)
    return stars, space, space.vector(found.map)


def test_orbits_given_the_potential():
    """In a potential beside the maximum: f(J) is where the exact gradient vanishes, the covariance is the inverse of
    the exact second derivatives, and both values of ln p are those of the exact posterior and its Gaussian integral."""
    stars, space, u = fitted("conditional", 1)
    target = MarginalPosterior(space, stars.w, u)
    generator = torch.Generator().manual_seed(1)
    rest = u[target.rest] + 0.05 * torch.randn(len(target.rest), generator=generator, dtype=F64)
    found, given = target.orbits(rest)
    at = target.whole(rest, found.mode)
    value, slope = space.gradient(at, stars.w)
    assert found.log_p == pytest.approx(float(value), abs=1e-6)
    assert float(given.log_p(found.mode)) == pytest.approx(float(value), abs=1e-6)
    own = slope[target.own]
    assert float((found.root.T @ own).norm()) < 0.1
    columns = []
    for k in target.own:
        step = torch.zeros_like(u)
        step[k] = 1e-4
        columns.append((space.gradient(at - step, stars.w)[1] - space.gradient(at + step, stars.w)[1]) / 2e-4)
    information = torch.stack(columns)[:, target.own]
    product = information @ found.root @ found.root.T
    assert torch.allclose(product, torch.eye(len(product), dtype=F64), atol=1e-3)
    volume = 0.5 * len(own) * math.log(2 * math.pi) - 0.5 * float(torch.logdet(information))
    assert found.log_marginal == pytest.approx(float(value) + volume, abs=1e-3)


def test_amplitude_of_the_density_of_orbits():
    """The evidence of a potential at ln A + z is that of the same model with this amplitude, times the prior of z; the
    start is where it is highest."""
    stars, space, u = fitted("conditional", 1)
    df = space.model.df
    df.adaptive = True
    target = MarginalPosterior(space, stars.w, u)
    for z in (-1.0, 0.0, 1.5):
        rest = torch.cat([u[target.rest], torch.tensor([z], dtype=F64)])
        found, given = target.orbits(rest)
        assert given.prior_sd is not None
        df.adaptive, df.amplitude = False, math.exp(z)
        other, _ = MarginalPosterior(space, stars.w, u).orbits(u[target.rest])
        df.adaptive, df.amplitude = True, 1.0
        prior = -0.5 * z**2 - 0.5 * math.log(2 * math.pi)
        assert found.log_marginal == pytest.approx(other.log_marginal + prior, abs=0.02)
    start = target.start(silent)
    values = []
    for z in torch.linspace(-3, 3, 7, dtype=F64):
        values.append(target.orbits(torch.cat([u[target.rest], z[None]]))[0].log_marginal)
    assert float(start[-1]) == float(torch.tensor(values).argmax()) - 3
    draws = marginal(target, space.fisher(u, stars.w, 400, 0), 30.0, 1, silent)
    assert draws.u.shape[1] == space.size
    assert bool(torch.isfinite(draws.log_weights).any())


def test_marginal_draws_have_exact_weights():
    """The mean weight is the evidence: of the same posterior by a Gaussian over all latents, within the errors of
    both; the draws' potentials have that posterior's mean and width."""
    stars, space, u = fitted("jeans", 2)
    data = stars.w
    information = space.fisher(u, data, len(data), 0)
    target = MarginalPosterior(space, data, u)
    draws = marginal(target, information, 100.0, 1, silent)
    log_weights = draws.log_weights
    n = effective(log_weights)
    assert n >= 100
    evidence = float(log_weights.logsumexp(0)) - math.log(len(log_weights))
    generator = torch.Generator().manual_seed(2)
    proposal = Proposal.of(u, 1.2 * torch.linalg.inv(information))
    z = proposal.sample(1500, generator)
    other = torch.stack([space.log_posterior(one, data) for one in z]) - proposal.log_prob(z)
    m = effective(other)
    assert m > 60
    assert evidence == pytest.approx(float(other.logsumexp(0)) - math.log(1500), abs=4 * (1 / n + 1 / m) ** 0.5)
    moments = []
    for x, log_w in ((draws.u, log_weights), (z, other)):
        weight, potential = torch.softmax(log_w, 0), x[:, : space.n_potential]
        mean = weight @ potential
        moments.append((mean, (weight @ (potential - mean) ** 2).sqrt()))
    (mean, sd), (other_mean, other_sd) = moments
    assert ((mean - other_mean).abs() / other_sd < 4 * (1 / n + 1 / m) ** 0.5).all()
    assert ((sd / other_sd).log().abs() < 4 * (0.5 / n + 0.5 / m) ** 0.5 + 0.05).all()


def test_what_laplaces_method_lacks():
    """Weights by Laplace's method of potentials where it is off by exp(0.5 + 0.3 x), known with noise, become
    those of the exact evidence, up to the prior of the slope; f(J) is drawn in each potential that counts, and one of
    negligible weight has none after that."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(500, 1, generator=generator, dtype=F64)
    log_weights = -0.1 * x[:, 0] ** 2
    log_weights[7] = -20.0
    kept = [marginals._Kept(marginals.Orbits(one, one, 0.0, float(3 * one)), one) for one in x[:, 0]]
    drawn = []

    class Target:
        u = torch.zeros(2, dtype=F64)

        def given(self, rest: torch.Tensor) -> torch.Tensor:
            return rest

        def with_orbits(self, rest, orbits, given, generator):
            assert torch.equal(rest, given)
            drawn.append(float(rest))
            noise = float(torch.randn(1, generator=generator, dtype=F64))
            return torch.cat([rest, rest + 1]), orbits.log_marginal + 0.5 + 0.3 * float(rest) + noise - 0.5

    found = marginals._corrected(Target(), x, kept, log_weights, generator, silent)
    assert drawn == [float(one) for i, one in enumerate(x) if i != 7]
    assert torch.isneginf(found.log_weights).nonzero().tolist() == [[7]]
    assert torch.equal(found.u[[6, 8]], torch.stack([torch.cat([one, one + 1]) for one in x[[6, 8]]]))
    change = (found.log_weights - log_weights)[torch.isfinite(found.log_weights)]
    others = x[[i for i in range(500) if i != 7], 0]
    slope = (change[-1] - change[0]) / (others[-1] - others[0])
    # 500 ratios that scatter by 1.3 of their mean
    assert float(slope) == pytest.approx(0.3, abs=4 * 1.3 / 500**0.5)
    assert float((change - slope * others).mean()) == pytest.approx(0.5, abs=4 * 1.3 / 500**0.5)


def test_marginal_fit():
    """The default of velocities given positions: resampled draws with f(J) in each, k-hat and the effective number of
    draws reported; the true mass is within 3.5 sd."""
    stars = mock("isochrone", n_stars=600, seed=3)
    network = MassSlopeNetwork.for_stars(stars.w, n_features=3)
    model = SnapshotModel(network, LogisticGaussianProcess(degree=3), likelihood="conditional")
    result = fit(model, stars, FitConfig(seed=1, n_draws=80), progress=False)
    found = result.diagnostics
    assert result.config.guide == found.guide == "marginal"
    assert found.k_hat < 0.7
    assert found.ess >= 80
    assert result.draws["df.weights"].shape == (80, 9)
    assert float(result.draws["df.weights"].std(0).min()) > 0.1
    r = stars.x.norm(dim=-1).quantile(torch.tensor([0.2, 0.5, 0.8], dtype=F64))
    masses = Posterior.from_result(result).field("enclosed_mass", r.numpy())
    true = truth_field(MOCKS["isochrone"].potential, "enclosed_mass", r.numpy())
    assert (abs(masses.mean - true) < 3.5 * masses.sd).all()


def test_marginal_is_for_log_linear_densities():
    """A mixture is refused by name, and the default is then a Gaussian."""
    stars = mock("isochrone", n_stars=200, seed=1)
    network = MassSlopeNetwork.for_stars(stars.w, n_features=3)
    model = SnapshotModel(network, SphericalMixture(), likelihood="conditional")
    assert not integrable(model)
    with pytest.raises(
        ValueError, match=r"'marginal' integrates over a logistic_gp f\(J\) of a sphere, got SphericalM"
    ):
        fit(model, stars, FitConfig(guide="marginal"))
    flat = SnapshotModel(MiyamotoNagai(1e11, 3.0, 0.3), LogisticGaussianProcess(flattened=True))
    with pytest.raises(ValueError, match=r"of a sphere, got LogisticGaussianProcess \(axisymmetric"):
        fit(flat, stars, FitConfig(guide="marginal"))
    with pytest.raises(ValueError, match=r"marginal takes df_guide 'joint', got 'point'"):
        FitConfig(guide="marginal", df_guide="point")
