"""Guides, samplers, re-weighting, ensembles and the verdict, on posteriors that are known.

Gaussian posterior: a stand-in for `LatentSpace` whose log posterior is -1/2 (u - m)^T F (u - m), without f(J). Grid
posterior: parametric isochrone, N = 500, seed 7, one component of f(J) fixed at its MAP, 37 x 37 points in ln M and
ln b. Fits: the same stars, closed-form actions. Tolerances are Monte-Carlo errors at the stated number of draws.
"""

from __future__ import annotations

import dataclasses
import importlib
import math

import numpy as np
import pytest
import torch
from bayespot.models import isochrone
from torch import Tensor

from bayespot import EnsemblePosterior, FitConfig, Posterior, SnapshotModel, SphericalMixture, fit
from bayespot.actions import IsochroneActions
from bayespot.diagnostics import chain_statistics, psis, weight_fraction
from bayespot.inference import EnsembleResult, FitResult, fit_ensemble, verdict
from bayespot.inference.diagnose import log_ratios
from bayespot.inference.ensemble import member_config, member_model
from bayespot.inference.guides import WhitenedGuide, mean_field_narrowing
from bayespot.inference.latent import LatentSpace
from bayespot.inference.optimise import count_unbound
from bayespot.inference.resampling import by_weight, systematic
from bayespot.inference.samplers import SVGD_MAX_SIZE, WhitenedPosterior, nuts, stein_direction, svgd
from bayespot.inference.verdict import elbo_trend
from bayespot.mock import mock
from bayespot.posterior import member_spread
from bayespot.report import describe
from bayespot.report.text import reweighted_where_it_matters

QUICK = FitConfig(seed=1, n_components=1, svi_steps=40, n_draws=400, k_hat_draws=200)
MEMBERS = dataclasses.replace(QUICK, svi_steps=10, k_hat_draws=30)
#: Correlation 0.8 and unequal widths.
COVARIANCE = torch.tensor([[4.0, 0.8], [0.8, 0.25]], dtype=torch.float64)
MEAN = torch.tensor([3.0, -1.0], dtype=torch.float64)


class GaussianPosterior:
    """What samplers and guides need of a `LatentSpace`."""

    size = n_potential = 2

    def values(self, u: Tensor) -> dict[str, Tensor]:
        return {"u": u}

    def log_posterior(self, u: Tensor, _data: Tensor) -> Tensor:
        return -0.5 * (u - MEAN) @ torch.linalg.solve(COVARIANCE, u - MEAN)

    def gradient(self, u: Tensor, data: Tensor) -> tuple[Tensor, Tensor]:
        return self.log_posterior(u, data), -torch.linalg.solve(COVARIANCE, u - MEAN)


def target(shift: float = 0.0) -> WhitenedPosterior:
    """Whitened by an information that is right only in its diagonal, about a MAP that is ``shift`` off."""
    information = torch.linalg.inv(COVARIANCE).diagonal().diag()
    return WhitenedPosterior(GaussianPosterior(), torch.zeros(1), MEAN + shift, information, True)  # type: ignore[arg-type]


def tick(_note: str = "") -> None:
    pass


@pytest.fixture(scope="module")
def few_stars():
    return mock("isochrone", n_stars=500, seed=7)


def parametric(catalog) -> SnapshotModel:
    return SnapshotModel(isochrone.build(catalog).potential, SphericalMixture(), IsochroneActions())


class Fits(dict[str, FitResult]):
    """One fit per guide, made when first asked for; f(J) at a point."""

    def __init__(self, catalog) -> None:
        self.catalog = catalog

    def __missing__(self, guide: str) -> FitResult:
        config = dataclasses.replace(QUICK, guide=guide, df_guide="point", svi_steps=150)
        if guide in ("nuts", "svgd"):
            config = dataclasses.replace(config, n_draws=240, nuts_chains=2, nuts_warmup=60, svgd_steps=25)
        self[guide] = fit(parametric(self.catalog), self.catalog, config)
        return self[guide]


@pytest.fixture(scope="module")
def fits(few_stars) -> Fits:
    return Fits(few_stars)


def potential_latents(result: FitResult) -> Tensor:
    return torch.stack([result.draws[f"potential.{name}"].log() for name in ("m_tot", "r_s")], -1)


@pytest.fixture(scope="module")
def grid(few_stars, fits):
    """Mean, covariance and density of (ln M, ln b) by quadrature, f(J) at the Laplace fit's MAP."""
    result = fits["laplace"]
    space = LatentSpace(result.model)
    u = space.vector(result.map)
    sd = potential_latents(result).std(0)
    axes = [torch.linspace(-5, 5, 37, dtype=torch.float64) * float(s) for s in sd]
    points = torch.cartesian_prod(*axes) + u[:2]
    with torch.no_grad():
        log_p = torch.stack([space.log_posterior(torch.cat([p, u[2:]]), few_stars.w) for p in points])
    weight = log_p.softmax(0)
    # u of a LogNormal is its logarithm
    mean = weight @ points
    covariance = (points - mean).T @ ((points - mean) * weight[:, None])
    return mean, covariance


# --- known Gaussian posterior


def test_nuts_finds_a_gaussian():
    """Two chains of 400 from a wrong whitening, 1 sd off: mean within 4 errors, covariance within 25 %."""
    chains = [nuts(target(1.0), 400, 100, seed, tick) for seed in (1, 2)]
    u = torch.cat([target(1.0).u(chain.z) for chain in chains])
    r_hat, ess = chain_statistics(u.reshape(2, 400, 2))
    assert r_hat < 1.05
    assert sum(chain.n_divergent for chain in chains) == 0
    assert bool(((u.mean(0) - MEAN).abs() < 4 * COVARIANCE.diagonal().sqrt() / ess**0.5).all())
    torch.testing.assert_close(torch.cov(u.T), COVARIANCE, rtol=0.25, atol=0.0)
    torch.testing.assert_close(nuts(target(1.0), 20, 20, 1, tick).z, nuts(target(1.0), 20, 20, 1, tick).z)


def test_svgd_finds_a_gaussian():
    """100 particles, 200 steps, from 1 sd off: mean within 0.1 sd, widths 0.75 to 1.05 of the truth."""
    z, rest = svgd(target(0.3), 100, 200, 0, tick)
    u, sd = target(0.3).u(z), COVARIANCE.diagonal().sqrt()
    assert rest < 0.2
    assert bool(((u.mean(0) - MEAN).abs() < 0.1 * sd).all())
    assert bool((u.std(0) / sd > 0.75).all())
    assert bool((u.std(0) / sd < 1.05).all())
    assert float(torch.corrcoef(u.T)[0, 1]) == pytest.approx(0.8, abs=0.1)


def test_svgd_keeps_most_of_the_width_where_it_is_let():
    """A unit Gaussian with as many dimensions as are allowed, the default particles and steps: 0.86 to 1 of its sd."""

    class Unit:
        size = SVGD_MAX_SIZE

        def log_prob_and_slope(self, z):
            return -(z**2).sum() / 2, -z

    z, _ = svgd(Unit(), FitConfig.svgd_particles, FitConfig.svgd_steps, 0, tick)
    assert 0.86 < float(z.std(0).mean()) < 1


def test_stein_direction_is_its_formula():
    """phi against the double sum of Liu & Wang's equation 8 with the kernel's gradient by autograd, 1e-10."""
    g = torch.Generator().manual_seed(0)
    z, slope = torch.randn(2, 6, 3, generator=g, dtype=torch.float64)
    square = ((z[:, None] - z[None]) ** 2).sum(-1)
    h = square[~torch.eye(6, dtype=torch.bool)].median() / math.log(6)
    for i in range(6):
        total = torch.zeros(3, dtype=torch.float64)
        for j in range(6):
            z_j = z[j].clone().requires_grad_()
            k = (-((z_j - z[i]) ** 2).sum() / h).exp()
            total += k.detach() * slope[j] + torch.autograd.grad(k, z_j)[0]
        torch.testing.assert_close(stein_direction(z, slope)[i], total / 6, rtol=1e-10, atol=1e-12)


def test_low_rank_covariance(few_stars):
    """Draws of a low-rank guide have covariance C (D + W W^T) C^T, to 5 % of its largest entry, and the density of that
    Gaussian, 1e-6."""
    model = parametric(few_stars)
    model.df = model.df.resolved(1, torch.rand(500, 3).double() * 100)
    space = LatentSpace(model)
    g = torch.Generator().manual_seed(1)
    root = torch.randn(space.size, space.size, generator=g, dtype=torch.float64)
    information = root @ root.T + torch.eye(space.size, dtype=torch.float64)
    guide = WhitenedGuide(space, torch.zeros(space.size).double(), information, "low_rank", "joint", rank=2)
    with torch.no_grad():
        guide.all_low.copy_(torch.randn(space.size, 2, generator=g, dtype=torch.float64))
    low, C = guide.all_low.detach(), guide.all_factor
    expected = C @ (torch.eye(space.size, dtype=torch.float64) + low @ low.T) @ C.T
    u, log_q = guide.draw(40_000, 0)
    torch.testing.assert_close(torch.cov(u.T), expected, rtol=0.0, atol=0.05 * float(expected.abs().max()))
    exact = torch.distributions.MultivariateNormal(torch.zeros(space.size).double(), expected).log_prob(u)
    torch.testing.assert_close(log_q, exact, rtol=1e-6, atol=1e-6)


def test_mean_field_narrowing():
    """Two latents of correlation rho are narrowed by (1 - rho^2)^(1/2), whatever their widths; none if independent."""
    information = torch.linalg.inv(COVARIANCE)
    assert mean_field_narrowing(information, 2) == pytest.approx((1 - 0.8**2) ** 0.5)
    assert mean_field_narrowing(torch.diag(torch.tensor([1.0, 9.0]).double()), 2) == pytest.approx(1.0)


# --- fits against the grid


@pytest.mark.parametrize("guide", ["full_rank", "low_rank", "laplace", "nuts", "svgd"])
def test_guides_agree_with_the_grid(fits, grid, guide):
    """ln M and ln b: means within 0.3 sd of the grid's, sd within 15 % (SVGD, 50 particles: 25 %)."""
    mean, covariance = grid
    x, sd = potential_latents(fits[guide]), covariance.diagonal().sqrt()
    # SVI moves f(J) by up to a few tenths of its own sd from the MAP, which moves the potential hardly
    assert bool(((x.mean(0) - mean).abs() < 0.3 * sd).all()), (x.mean(0) - mean) / sd
    ratio = x.std(0) / sd
    assert bool(((ratio - 1).abs() < (0.25 if guide == "svgd" else 0.15)).all()), ratio


def test_mean_field_is_as_narrow_as_its_formula(fits, grid):
    """sd of the mean-field fit over the grid's: (1 - rho^2)^(1/2), 15 %; the diagnostics and the verdict say so."""
    _, covariance = grid
    rho2 = float(covariance[0, 1] ** 2 / (covariance[0, 0] * covariance[1, 1]))
    ratio = potential_latents(fits["mean_field"]).std(0) / covariance.diagonal().sqrt()
    assert bool((ratio / (1 - rho2) ** 0.5 - 1).abs().max() < 0.15), ratio
    found = fits["mean_field"].diagnostics
    assert found.narrowing == pytest.approx((1 - rho2) ** 0.5, rel=0.15)
    assert any("too narrow by construction" in text for text in found.warnings)


def test_diagnostics_of_each(fits):
    """NUTS: r-hat, ESS, no divergence, chains kept; SVGD: no k-hat; Gaussian guides: weights, nearly equal except of
    the mean field, whose narrowness they show; the verdict is not alarmed by the shape of their tail."""
    found = fits["nuts"].diagnostics
    assert found.r_hat < 1.05
    assert found.ess > 50
    assert found.divergences < 0.01
    assert fits["nuts"].n_chains == 2
    assert len(fits["nuts"].draws["potential.m_tot"]) == 240
    assert math.isnan(fits["svgd"].diagnostics.k_hat)
    assert len(fits["svgd"].draws["potential.m_tot"]) == QUICK.svgd_particles
    for guide in ("full_rank", "low_rank", "laplace"):
        # k-hat itself is 0.7 to 1.3 with 1000 draws and 0 to 1 with 200: a cubic term, however small, is its tail
        assert fits[guide].diagnostics.weight_fraction > 0.94
        assert not any("k-hat" in text for text in fits[guide].diagnostics.warnings)
        weights = fits[guide].sample_stats["log_weights"]
        assert int(torch.isfinite(weights).sum()) == QUICK.k_hat_draws
    assert fits["mean_field"].diagnostics.weight_fraction < 0.7
    # evidence at the same f(J): the Laplace identity of a nearly Gaussian posterior
    a, b = fits["low_rank"].diagnostics.log_evidence, fits["full_rank"].diagnostics.log_evidence
    assert a == pytest.approx(b, abs=1.0)
    assert "r-hat" in describe(dataclasses.asdict(found))[0]


@pytest.mark.usefixtures("no_figures")
def test_a_run_keeps_chains_and_weights(fits, few_stars, tmp_path):
    """posterior.nc of NUTS has its two chains; a run read back is re-weighted as the fit itself."""
    from bayespot.diagnostics import load_netcdf
    from bayespot.report import load_run, save_run

    data = load_netcdf(save_run(tmp_path / "nuts", fits["nuts"], few_stars) / "posterior.nc")
    assert data["posterior"].sizes["chain"] == 2
    assert data["posterior"].sizes["draw"] == 120
    save_run(tmp_path / "laplace", fits["laplace"], few_stars)
    read = load_run(tmp_path / "laplace")[0].reweighted(100).field("circular_speed", [5.0])
    assert read.mean == pytest.approx(
        Posterior.from_result(fits["laplace"]).reweighted(100).field(read.name, [5.0]).mean
    )


def test_interrupted_nuts_keeps_its_chains(few_stars, tmp_path, monkeypatch):
    """Stopped in the second chain and resumed: the first is not run again, and draws equal the uninterrupted ones."""
    inference = importlib.import_module("bayespot.inference.fit")

    config = dataclasses.replace(QUICK, guide="nuts", df_guide="point", n_draws=20, nuts_warmup=10, nuts_chains=2)
    whole = fit(parametric(few_stars), few_stars, config)
    calls, real = [], inference.nuts

    def counted(*arguments):
        calls.append(arguments[3])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(inference, "nuts", counted)
    place = tmp_path / "checkpoint.pt"
    with pytest.raises(KeyboardInterrupt):
        fit(parametric(few_stars), few_stars, config, checkpoint=place)
    again = fit(parametric(few_stars), few_stars, config, checkpoint=place, resume=True)
    assert len(calls) == 3
    assert torch.equal(again.draws["potential.m_tot"], whole.draws["potential.m_tot"])


def test_refusals(few_stars):
    """SVGD over too many latents, at once and once f(J) is resolved; guides of f(J) that samplers do not have."""
    from bayespot import MassSlopeNetwork

    wide = SnapshotModel(MassSlopeNetwork.for_stars(few_stars.w, n_features=14), SphericalMixture())
    with pytest.raises(ValueError, match=r"SVGD moves 16 latents.*full_rank"):
        fit(wide, few_stars, dataclasses.replace(QUICK, guide="svgd"))
    three = dataclasses.replace(QUICK, guide="svgd", df_guide="joint", n_components=3)
    with pytest.raises(ValueError, match=r"SVGD moves \d+ latents"):
        fit(parametric(few_stars), few_stars, three)
    with pytest.raises(ValueError, match="nuts takes df_guide 'joint' or 'point', got 'full_rank'"):
        FitConfig(guide="nuts", df_guide="full_rank")
    with pytest.raises(ValueError, match="at least 2 members, got 1"):
        fit_ensemble(parametric(few_stars), few_stars, QUICK, 1)
    for config in (FitConfig(guide="nuts"), FitConfig(k_hat_draws=0)):
        with pytest.raises(ValueError, match="have no evidence; weight them equally"):
            fit_ensemble(parametric(few_stars), few_stars, config, 2, weighting="evidence")


# --- re-weighting


@pytest.mark.parametrize(("rate", "k"), [(1.5, 1 / 3), (2.0, 0.5), (3.0, 2 / 3)])
def test_k_hat_is_the_shape_of_the_tail(rate, k):
    """Draws of an exponential of another rate: P(weight > t) = t^(-1/k) with k = 1 - 1/rate. Mean of k-hat over 20 sets
    of 1000 within 0.07."""
    exponential = torch.distributions.Exponential(rate)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        draws = exponential.sample(torch.Size([20, 1000])).double()
    found = [psis((rate - 1) * one)[1] for one in draws]
    assert float(np.mean(found)) == pytest.approx(k, abs=0.07)


def test_weight_fraction():
    """Equal weights: 1; one draw that has all: 1 / n; N(0, 1) for draws of N(d, 1): exp(-d^2), 2 %."""
    assert weight_fraction(torch.full((50,), 3.0)) == pytest.approx(1.0)
    assert weight_fraction(torch.tensor([0.0, -1e3, -1e3, -1e3])) == pytest.approx(0.25)
    z = 0.4 + torch.randn(100_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert weight_fraction(-0.5 * z**2 + 0.5 * (z - 0.4) ** 2) == pytest.approx(math.exp(-0.16), rel=0.02)


def test_reweighting_corrects_a_shifted_guide():
    """Draws of N(0.5, 1) weighted to N(0, 1.2^2): mean and sd by resampling within 0.1; those of the draws stay off."""
    z = 0.5 + torch.randn(4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    normal = torch.distributions.Normal
    smoothed, k = psis(normal(0.0, 1.2).log_prob(z) - normal(0.5, 1.0).log_prob(z) + 7.0)
    log_weights = torch.as_tensor(smoothed)
    assert k < 0.7
    # the weights' mean is the ratio of the normalising constants
    assert float(log_weights.logsumexp(0)) - math.log(4000) == pytest.approx(7.0, abs=0.1)
    posterior = Posterior(None, {"z": z}, {}, log_weights)  # type: ignore[arg-type]
    exact = posterior.reweighted(20_000).draws["z"]
    assert float(exact.mean()) == pytest.approx(0.0, abs=0.1)
    assert float(exact.std()) == pytest.approx(1.2, abs=0.1)
    assert float(posterior.evaluated().draws["z"].mean()) == pytest.approx(0.5, abs=0.06)


def test_reweighting_a_narrow_fit(fits, grid, few_stars):
    """Draws shifted by half an sd in ln M, evaluated against the exact posterior: re-weighted, the mean is the grid's
    within 0.15 sd; the report would show it, and shows nothing for the fit itself."""
    result = fits["laplace"]
    mean, covariance = grid
    space = LatentSpace(result.model)
    generator = torch.Generator().manual_seed(3)
    guide = torch.distributions.MultivariateNormal(
        mean + torch.tensor([0.5, 0.5]).double() * covariance.diagonal().sqrt(), covariance
    )
    with torch.random.fork_rng():
        torch.manual_seed(int(torch.randint(100, (), generator=generator)))
        x = guide.sample(torch.Size([800]))
    u = torch.cat([x, space.vector(result.map)[2:].expand(800, -1)], -1)
    smoothed, k = psis(log_ratios(lambda at: space.log_posterior(at, few_stars.w), u, guide.log_prob(x), lambda: None))
    assert k < 0.7
    shifted = Posterior(result.model, space.values(u), result.catalog, torch.as_tensor(smoothed))
    exact = shifted.reweighted(2000).draws["potential.m_tot"].log()
    sd = float(covariance[0, 0].sqrt())
    assert abs(float(exact.mean() - mean[0])) < 0.15 * sd
    assert abs(float(x[:, 0].mean() - mean[0])) > 0.35 * sd
    r = np.array([3.0, 10.0, 30.0])
    assert reweighted_where_it_matters(shifted, {"k_hat": k}, r) is not None
    assert reweighted_where_it_matters(shifted, {"k_hat": 0.71}, r) is None
    assert reweighted_where_it_matters(Posterior(result.model, result.draws), {"k_hat": 0.1}, r) is None
    with pytest.raises(ValueError, match="no draw has an importance weight"):
        Posterior.from_result(fits["nuts"]).reweighted()


def test_systematic_resampling():
    """Each index as often as n times its weight, to within one."""
    weights = torch.tensor([0.5, 0.0, 0.3, 0.2])
    counts = systematic(weights, 101, 3).bincount(minlength=4)
    assert bool(((counts - 101 * weights).abs() < 1).all())
    assert int(counts[1]) == 0


# --- ensembles


@pytest.fixture(scope="module")
def ensemble(few_stars, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ensemble")
    return fit_ensemble(parametric(few_stars), few_stars, MEMBERS, 2, jobs=2, checkpoint=folder), folder


def test_parallel_members_are_the_fits_alone(few_stars, ensemble):
    """Two processes give the draws of the two fits run here, bit by bit; member 0 is the plain fit."""
    found, _ = ensemble
    for k, member in enumerate(found.members):
        alone = fit(member_model(parametric(few_stars), k, 2), few_stars, member_config(MEMBERS, k))
        assert torch.equal(member.draws["potential.m_tot"], alone.draws["potential.m_tot"]), k
    assert member_config(MEMBERS, 0) == MEMBERS


def test_ensembles_resume_member_by_member(few_stars, ensemble, monkeypatch):
    """Finished members are read, a lost one is fitted again, other settings are refused."""
    from bayespot.inference import ensemble as module

    found, folder = ensemble
    (folder / "member-1.safetensors").unlink()
    seeds, real = [], module.fit
    monkeypatch.setattr(module, "fit", lambda *a, **k: seeds.append(a[2].seed) or real(*a, **k))
    again = fit_ensemble(parametric(few_stars), few_stars, MEMBERS, 2, jobs=1, checkpoint=folder, resume=True)
    assert seeds == [member_config(MEMBERS, 1).seed]
    for one, other in zip(found.members, again.members, strict=True):
        assert torch.equal(one.draws["potential.r_s"], other.draws["potential.r_s"])
    other = dataclasses.replace(MEMBERS, seed=9)
    with pytest.raises(ValueError, match="another fit"):
        fit_ensemble(parametric(few_stars), few_stars, other, 2, jobs=1, checkpoint=folder, resume=True)


def test_members_of_a_network_differ(few_stars):
    """Features are shifted by 0, 1/4, -1/2 and -1/4 of their spacing; the model given is not changed."""
    from bayespot import MassSlopeNetwork

    model = SnapshotModel(MassSlopeNetwork.for_stars(few_stars.w, n_features=6), SphericalMixture())
    before = model.potential.centres.clone()
    spacing = float(before[1] - before[0])
    shifts = [float(member_model(model, k, 4).potential.centres[0] - before[0]) / spacing for k in range(4)]
    assert shifts == pytest.approx([0.0, 0.25, -0.5, -0.25])
    assert torch.equal(model.potential.centres, before)


def test_ensemble_posterior_is_the_mixture(ensemble):
    """Weights 3:1 of members displaced by 10 %: mean field and variance are those of the mixture; spread likewise."""
    found, _ = ensemble
    one = Posterior.from_result(found.members[0])
    moved = one.draws | {"potential.m_tot": 1.1 * one.draws["potential.m_tot"]}
    other = Posterior(one.model, moved, one.meta)
    mixture = EnsemblePosterior([one, other], [3.0, 1.0])
    assert mixture.n_draws == 400
    r = [5.0, 20.0]
    a, b, both = (p.field("circular_speed", r) for p in (one, other, mixture))
    mean = 0.75 * a.mean + 0.25 * b.mean
    variance = 0.75 * a.sd**2 + 0.25 * b.sd**2 + 0.75 * 0.25 * (a.mean - b.mean) ** 2
    assert both.mean == pytest.approx(mean, rel=2e-3)
    assert both.sd == pytest.approx(variance**0.5, rel=0.05)
    between = (0.75 * 0.25) ** 0.5 * abs(a.mean - b.mean) / (0.75 * a.sd**2 + 0.25 * b.sd**2) ** 0.5
    assert member_spread(mixture, r) == pytest.approx(float((between**2).mean() ** 0.5), rel=0.1)
    assert mixture.thinned(40).n_draws == 40
    plane = mixture.plane("potential", extent=10.0, n=4)
    cell = mixture.field("potential", plane.points[0])
    assert plane.mean[0] == pytest.approx(cell.mean)
    assert plane.sd[0] == pytest.approx(cell.sd)
    table = mixture.summary()
    assert len(table) == 2 * len(one.summary())
    assert set(table["weight"]) == {0.75, 0.25}
    with pytest.raises(ValueError, match="a weight per member"):
        EnsemblePosterior([one, other], [1.0])


def test_weights_by_evidence(fits):
    """Weights are proportional to the evidence and add up to one; NUTS has none."""
    members = [fits["full_rank"], fits["low_rank"]]
    gap = members[0].diagnostics.log_evidence - members[1].diagnostics.log_evidence
    weights = EnsembleResult(members, "evidence").weights
    assert sum(weights) == pytest.approx(1.0)
    assert math.log(weights[0] / weights[1]) == pytest.approx(gap)
    assert EnsembleResult(members).weights == [0.5, 0.5]
    with pytest.raises(ValueError, match="have no evidence"):
        _ = EnsembleResult([fits["nuts"], fits["laplace"]], "evidence").weights


# --- the verdict

GOOD = {"gradient_norm": 0.01, "n_unbound": 0, "n_stars": 1000, "k_hat": 0.3, "elbo": [], "notes": []}
RISING = [float(x) for x in 0.05 * np.arange(200) + np.sin(7 * np.arange(200))]


@pytest.mark.parametrize(
    ("change", "level", "words"),
    [
        ({}, "trusted", "can be trusted"),
        ({"gradient_norm": 0.5}, "to be taken with care", "sd from the maximum"),
        ({"gradient_norm": math.nan}, "not to be trusted", "sd from the maximum"),
        ({"n_unbound": 1}, "to be taken with care", "1 stars are unbound"),
        ({"n_unbound": 50}, "not to be trusted", "50 stars are unbound"),
        ({"k_hat": 0.8}, "to be taken with care", "k-hat is 0.80"),
        ({"k_hat": 1.3}, "not to be trusted", "k-hat is 1.30"),
        ({"k_hat": 0.8, "weight_fraction": 0.95}, "trusted", "can be trusted"),
        ({"k_hat": 0.8, "weight_fraction": 0.6}, "to be taken with care", "k-hat is 0.80"),
        ({"k_hat": 1.3, "weight_fraction": 0.95}, "to be taken with care", "k-hat is 1.30"),
        ({"k_hat": math.inf}, "not to be trusted", "infinite"),
        ({"k_hat": math.nan}, "trusted", "can be trusted"),
        ({"narrowing": 0.65}, "to be taken with care", "too narrow by construction"),
        ({"elbo": RISING}, "to be taken with care", "still rose by 2.3"),
        ({"elbo": [-x for x in RISING]}, "not to be trusted", "the ELBO fell by 2.3"),
        ({"r_hat": 1.1, "ess": 300.0}, "to be taken with care", "r-hat 1.10"),
        ({"r_hat": 1.5, "ess": 300.0}, "not to be trusted", "r-hat 1.50"),
        ({"r_hat": 1.0, "ess": 60.0}, "to be taken with care", "60 independent draws"),
        ({"r_hat": 1.0, "ess": 300.0, "divergences": 0.05}, "to be taken with care", "5 % of NUTS's"),
        ({"angle_p_value": 1e-4, "angle_statistic": 140.0, "angle_dof": 72}, "not to be trusted", "not phase-mixed"),
        ({"error_samples": [1.0, 2.0, 30.0]}, "to be taken with care", "raise n_samples"),
        ({"error_samples": [1.0, 2.0, 3.0]}, "not to be trusted", "raise n_samples"),
        ({"error_samples": [1.0, 9.0, 30.0], "n_poorly_sampled": 3}, "trusted", "can be trusted"),
        ({"error_samples": [1.0, 9.0, 30.0], "n_poorly_sampled": 20}, "to be taken with care", "20 stars have fewer"),
        ({"error_samples": [1.0, 2.0, 30.0], "n_poorly_sampled": 20}, "to be taken with care", "20 of them fewer"),
        ({"selection_error": 0.3, "selection_points": 4096}, "to be taken with care", "move the result by 0.30"),
        ({"k_hat": 1.3, "df": "SphericalMixture", "selection_points": 9}, "not to be trusted", "df logistic_gp"),
        ({"k_hat": 1.3, "df": "SphericalMixture"}, "not to be trusted", "another guide"),
        ({"k_hat": 1.3, "df": "LogisticGaussianProcess", "selection_points": 9}, "not to be trusted", "another guide"),
        ({"conditional": True, "guide": "laplace"}, "not to be trusted", "take guide marginal with df logistic_gp"),
        ({"conditional": True, "guide": "marginal"}, "not to be trusted", "LogisticGaussianProcess.of_velocities()"),
        (
            {"conditional": True, "guide": "marginal", "adaptive": True},
            "not to be trusted",
            "state the selection and fit with it",
        ),
        ({"conditional": True, "projected": True}, "not to be trusted", "do not quote bands without this"),
        ({"notes": ["something odd"]}, "to be taken with care", "something odd"),
        ({"predictive": {"warnings": ["beta is off"]}}, "to be taken with care", "beta is off"),
    ],
)
def test_verdict(change, level, words):
    """Every diagnostic that fails has its level and its words; a sound fit is trusted without a reason."""
    found = verdict(GOOD | change)
    assert found.level == level
    assert words in str(found)
    assert len(found.reasons) == (level != "trusted")


def test_stars_without_samples_are_counted(fits):
    """The report counts the stars with fewer than 2 effective samples, however few, with the remedy."""
    found = dataclasses.asdict(fits["laplace"].diagnostics) | {"error_samples": [1.2, 9.0, 30.0]}
    assert not any("fewer than 2" in line for line in describe(found))
    said = "\n".join(describe(found | {"n_poorly_sampled": 3}))
    assert "fewer than 2 for 3" in said
    assert "n_samples" in said


def test_verdict_of_an_ensemble():
    """The worst member decides; members that differ by more than their sd cost trust."""
    assert verdict({"members": [GOOD, GOOD], "spread": 0.2}).level == "trusted"
    found = verdict({"members": [GOOD, GOOD | {"k_hat": 2.0}], "spread": 0.2})
    assert found.level == "not to be trusted"
    assert found.reasons[0].startswith("member 1: PSIS")
    assert "members differ by 1.4" in str(verdict({"members": [GOOD, GOOD], "spread": 1.4}))


def test_elbo_trend():
    """White noise has converged, a slow wave has not, a single bad step is ignored; noise is recovered to 25 %."""
    g = np.random.default_rng(0)
    white = g.normal(-100, 2, 800)
    found = elbo_trend(list(white))
    assert found.converged
    assert found.noise == pytest.approx(2.0, rel=0.25)
    white[-20] -= 1e6
    assert elbo_trend(list(white)).converged
    wave = 20 * np.sin(np.arange(800) / 10) + g.normal(0, 1, 800)
    assert not elbo_trend(list(wave)).converged


def test_unbound_stars_with_errors(fits, few_stars):
    """A star counts as unbound only when no sample with a weight is bound."""
    result = fits["laplace"]
    space = LatentSpace(result.model)
    u = space.vector(result.map)
    fast = few_stars.w[:3].clone()
    fast[:, 3:] *= 100
    data = torch.cat([torch.stack([few_stars.w[:3], fast], 1), torch.zeros(3, 2, 1).double()], -1)
    assert count_unbound(space, u, fast) == 3
    assert count_unbound(space, u, data) == 0
    # where all stars are foreign
    assert count_unbound(space, u, data[:0]) == 0
    data[0, 0, 6] = -torch.inf
    assert count_unbound(space, u, data) == 1
    data[1, 0, 3:6] *= 100
    assert count_unbound(space, u, data) == 2


def test_draws_by_weight():
    """Ten times the weight, ten times as often; weight zero, never."""
    chosen = by_weight(torch.tensor([0.0, math.log(10.0), -math.inf, 0.0], dtype=torch.float64), 1200, 1)
    assert chosen.bincount(minlength=4).tolist() == [100, 1000, 0, 100]


def test_verdict_of_an_emulated_posterior():
    """Its weights judge it, not how far its start was from the maximum; and it names another way out."""
    emulated = GOOD | {"guide": "emulated"}
    assert verdict(emulated | {"gradient_norm": 0.5}).level == "trusted"
    judged = verdict(emulated | {"k_hat": 0.9})
    assert judged.level == "to be taken with care"
    assert "nuts for few stars" in judged.reasons[0]


def test_emulated_is_for_flattened_potentials():
    with pytest.raises(ValueError, match=r"emulated takes df_guide 'point', got 'joint'"):
        FitConfig(guide="emulated", df_guide="joint")
    stars = mock("isochrone", n_stars=50, seed=1)
    with pytest.raises(ValueError, match=r"guide 'emulated' is for an axisymmetric potential"):
        fit(isochrone.build(stars), stars, FitConfig(guide="emulated"))
