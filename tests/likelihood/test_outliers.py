"""The outlier component: a normalised background, the mixture's density, scores and memberships, and who has it."""

from __future__ import annotations

import math

import pytest
import torch
from bayespot.models import isochrone
from scipy.stats import kstest
from scipy.stats import t as student
from torch.distributions import biject_to

from bayespot import Isochrone, SnapshotModel, SphericalMixture
from bayespot.actions import IsochroneActions
from bayespot.df import density
from bayespot.inference.latent import OUTLIERS, LatentSpace
from bayespot.likelihood import Background, MeasurementErrors, Outliers, SphericalShell, UniformOrbits
from bayespot.likelihood.normalisation import FixedPoints
from bayespot.likelihood.outliers import logit_normal
from bayespot.likelihood.phase_mixed import ObservedStars, StarDensity

BACKGROUND = Background(2.0, 0.8, 150.0)


def grid(low: float, high: float, n: int) -> torch.Tensor:
    return torch.linspace(low, high, n, dtype=torch.float64)


def test_background_integrates_to_one():
    """int g 4 pi r^3 dln r 4 pi v^3 dln v, trapezoids over 120 e-foldings of r either side, 30 of v, to 2e-5."""
    ln_v = grid(-25, 35, 6001)

    def marginal(s: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        zero = torch.zeros_like(s * v)
        w = torch.stack([(s + zero).exp(), zero, zero, zero, v + zero, zero], -1)
        return BACKGROUND.log_prob(w)

    # g is a product: its marginals at one point of the other, over g at both points
    at, speed = torch.tensor(2.3, dtype=torch.float64), torch.tensor(80.0, dtype=torch.float64)
    # 3 ln r cancels against the volume: taken together, since r^3 of e^600 overflows alone
    s = grid(-120, 124, 40_001)
    over_r = torch.trapezoid((marginal(s, speed) + 3 * s).exp(), s) * 4 * math.pi
    v = ln_v.exp()
    over_v = torch.trapezoid((marginal(at, v) + 3 * ln_v).exp(), ln_v) * 4 * math.pi
    total = over_r * over_v / marginal(at, speed).exp()
    assert float(total) == pytest.approx(1, abs=2e-5)


def test_background_draws_have_its_marginals():
    """20 000 draws: ln r and one velocity component are Student's t with three degrees (p > 0.001, fixed seed)."""
    w = BACKGROUND.draw(20_000, torch.Generator().manual_seed(1))
    ln_r = torch.linalg.vector_norm(w[:, :3], dim=-1).log()
    assert kstest(((ln_r - 2.0) / 0.8).numpy(), student(3).cdf).pvalue > 1e-3
    assert kstest((w[:, 4] / 150).numpy(), student(3).cdf).pvalue > 1e-3


def test_background_is_broad_about_the_stars_and_deaf_to_a_few(isochrone_stars):
    w = isochrone_stars.w
    clean, dirty = Background.of_stars(w), w.clone()
    dirty[:20] = torch.tensor([1e10, 0, 0, -999, 0, 1e5], dtype=torch.float64)
    spoilt = Background.of_stars(dirty)
    speed = float(w[:, 3:].square().mean().sqrt())
    assert 2 * speed < clean.v_scale < 4 * speed
    assert spoilt.v_scale == pytest.approx(clean.v_scale, rel=0.05)
    assert spoilt.ln_r_scale == pytest.approx(clean.ln_r_scale, rel=0.05)
    assert torch.isfinite(spoilt.log_prob(dirty)).all()


def test_scales_are_checked():
    with pytest.raises(ValueError, match="v_scale must be positive and finite, got 0"):
        Background(0.0, 1.0, 0)
    with pytest.raises(ValueError, match="median between 0 and 1"):
        Outliers(median=1.5)


def test_prior_of_the_fraction_is_that_of_its_logit():
    """In u the prior is normal, so that the maximum and the Laplace approximation are taken where it is Gaussian."""
    prior = logit_normal(1e-3, 2.0)
    transform = biject_to(prior.support)
    u = grid(-14, 0, 9)
    log_p = prior.log_prob(transform(u)) + transform.log_abs_det_jacobian(u, transform(u))
    z = (u - math.log(1e-3 / 0.999)) / 2
    expected = -(z**2) / 2 - math.log(2 * math.sqrt(2 * math.pi))
    torch.testing.assert_close(log_p, expected, rtol=1e-9, atol=1e-9)


class Constant(StarDensity):
    """ln p = a + b x, as a density for tests."""

    def __init__(self, a: float, b: float) -> None:
        self.a, self.b = a, b
        super().__init__()

    def log_prob(self, value: torch.Tensor) -> torch.Tensor:
        return self.a + self.b * value[..., 0]


def test_mixture_is_averaged_over_errors_and_only_members_are_selected():
    """ln[(1 - e) mean(f q) / Z + e mean(g q)] by hand, for two stars of three samples, and memberships from it."""
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(2, 3, 7, generator=generator, dtype=torch.float64)
    points = FixedPoints(
        value[0, :, :6], torch.tensor([-1.0, 0.3, 0.1]).double(), torch.tensor([0.5, 1.0, 0.2]).double()
    )
    fraction = torch.tensor(0.2, dtype=torch.float64)
    f, g = Constant(-1.0, 0.7), Constant(0.2, -0.4)
    q = value[..., 6].exp()
    members = (f.log_prob(value).exp() * q).mean(-1)
    Z = (points.log_weight.exp() * f.log_prob(points.w).exp() * points.accepted).sum()
    outliers = (g.log_prob(value).exp() * q).mean(-1)
    mixed = ObservedStars(f, points, g, fraction)
    expected = 0.8 * members / Z + 0.2 * outliers
    torch.testing.assert_close(mixed.log_prob(value), expected.log())
    torch.testing.assert_close(mixed.outlier_probability(value), 0.2 * outliers / expected)
    assert float(ObservedStars(f).outlier_probability(value[..., :6]).abs().max()) == 0


def contaminated_space(stars) -> tuple[LatentSpace, torch.Tensor, torch.Tensor]:
    """Latents of the parametric model with outliers, near the truth, and 60 stars, the first ten foreign."""
    w = stars.w[:60].clone()
    w[:10, 3:] *= 1.6
    model = isochrone.build(stars)
    model.finder = IsochroneActions()
    J = model.finder.actions(Isochrone(1e11, 3.0), stars.w)
    model.df = model.df.resolved(1, J)
    model = model.with_outliers(stars.w, True)
    values = model.initial_values() | {f"df.{k}": v for k, v in model.df.fit_actions(J, 0).items()}
    values |= {"potential.m_tot": torch.tensor(1e11).double(), "potential.r_s": torch.tensor(3.0).double()}
    space = LatentSpace(model)
    return space, space.vector(values | {OUTLIERS: torch.tensor(0.03).double()}), w


def test_scores_are_the_gradients(isochrone_stars):
    """Scores (differences, and closed for f(J) and the fraction) add up to the gradient, and some stars are neither."""
    space, u, w = contaminated_space(isochrone_stars)
    probability = space.model.at(space.values(u)).density().outlier_probability(w).detach()
    assert bool(((probability > 0.05) & (probability < 0.95)).any())
    assert list(space.slices)[-1] == OUTLIERS
    _, slope = space.likelihood_gradient(u, w)
    torch.testing.assert_close(space.scores(u, w).sum(0), slope, rtol=1e-5, atol=1e-4)


def test_information_of_the_fraction_is_at_least_its_curvature(isochrone_stars):
    """Without outliers the scores' outer product is N eps^2; the curvature, N eps, is what the posterior has."""
    space, u, _ = contaminated_space(isochrone_stars)
    w = isochrone_stars.w[:300]
    k = space.slices[OUTLIERS].start
    step = torch.zeros_like(u)
    step[k] = 1e-3
    ahead, behind = (space.likelihood_gradient(u + sign * step, w)[1][k] for sign in (1, -1))
    curvature = -(ahead - behind) / 2e-3
    found = space.fisher(u, w, 10_000, 0)[k, k] - space.prior_curvature(u)[k, k]
    assert float(curvature) > 3 * float((space.scores(u, w)[:, k] ** 2).sum())
    assert float(found) == pytest.approx(float(curvature), rel=1e-3)


def test_who_has_the_component(isochrone_stars):
    """By default all but models with a selection; who asks by the model or by an option, which comes first."""
    w = isochrone_stars.w
    model = lambda **options: SnapshotModel(Isochrone(1e11, 3.0), SphericalMixture(), **options)  # noqa: E731
    assert model().with_outliers(w).outliers is not None
    assert model().with_outliers(w, False).outliers is None
    assert model().with_outliers(w, True).with_outliers(w).outliers is not None
    assert model(outliers=Outliers()).with_outliers(w, False).outliers is None
    errors, shell = MeasurementErrors(), SphericalShell(1.0, 20.0)
    for options in ({"errors": errors}, {"selection": shell}):
        assert (model(**options).with_outliers(w).outliers is None) == ("selection" in options)
        assert model(**options).with_outliers(w, True).outliers is not None
        assert model(**options, outliers=Outliers()).with_outliers(w).outliers is not None
    own = Background(1.0, 1.0, 50.0)
    assert model(outliers=Outliers(own)).with_outliers(w).outliers.background.v_scale == 50
    with pytest.raises(ValueError, match="None or Outliers"):
        model(outliers=True)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"likelihood": "augmented"}, "augmented"),
        ({"df": density("flow")}, "trained"),
        ({"df": UniformOrbits()}, "no density"),
    ],
)
def test_where_the_component_cannot_be(isochrone_stars, change, reason):
    options = {"df": SphericalMixture()} | change
    model = SnapshotModel(Isochrone(1e11, 3.0), **options)
    assert model.with_outliers(isochrone_stars.w).outliers is None
    with pytest.raises(ValueError, match=f"{reason}.*--no-outliers"):
        model.with_outliers(isochrone_stars.w, True)


def test_a_background_comes_first(isochrone_stars):
    model = SnapshotModel(Isochrone(1e11, 3.0), SphericalMixture(), outliers=Outliers())
    with pytest.raises(ValueError, match="with_outliers"):
        model.at({OUTLIERS: torch.tensor(0.01).double()}).density()
