"""Likelihood, model, guides and fits on small mocks; tolerances are statistical where they say so.

Truth never enters a fit. Parametric isochrone, N = 2000, seed 5 (fixture), unless stated.
"""

from __future__ import annotations

import dataclasses
import importlib
import math

import pyro
import pytest
import torch
from bayespot.models import isochrone, spherical
from contracts.latent import check_gradient
from pyro import poutine
from pyro.infer import Trace_ELBO

from bayespot import FitConfig, FitError, Isochrone, MassSlopeNetwork, Posterior, SnapshotModel, SphericalMixture, fit
from bayespot.actions import IsochroneActions
from bayespot.catalog import Catalog
from bayespot.df import SphericalActionDistribution
from bayespot.diagnostics import psis_k_hat
from bayespot.inference.guides import WhitenedGuide
from bayespot.inference.latent import LatentSpace, whitening
from bayespot.inference.optimise import count_unbound
from bayespot.inference.svi import FullBatch, Minibatches
from bayespot.likelihood.phase_mixed import PhaseMixed
from bayespot.mock import mock

QUICK = FitConfig(seed=1, n_components=1, svi_steps=40, n_draws=200, k_hat_draws=30)


def resolved(catalog: Catalog, n_components: int = 1) -> SnapshotModel:
    """The parametric model with f(J) scaled to the actions in the true potential."""
    model = isochrone.build(catalog)
    J = IsochroneActions().actions(Isochrone(1e11, 3.0), catalog.w)
    model.df = model.df.resolved(n_components, J)
    return model


@pytest.fixture(scope="module")
def fitted(isochrone_stars):
    return fit(isochrone.build(isochrone_stars), isochrone_stars, QUICK)


def test_density_integrates_to_one():
    """int p(w) d^6w over phase space = 1: importance sampling from a wide distribution, 3 standard errors.

    p(w) = f(J)/(2 pi)^3 has no Jacobian and no normalisation that depends on the potential.
    """
    potential = Isochrone(1e11, 3.0)
    t = lambda x: torch.tensor([x], dtype=torch.float64)  # noqa: E731
    df = SphericalActionDistribution(t(0.0), t(200.0), t(300.0), t(1.2), t(2.2), t(4.0))
    generator = torch.Generator().manual_seed(0)
    n = 200_000
    u, k = torch.rand(2, n, generator=generator, dtype=torch.float64)
    s = 2.0 + 1.3 * torch.log(u / (1 - u))  # logistic in ln r
    r = s.exp()
    q_s = u * (1 - u) / 1.3
    escape = (-2 * potential.phi_r(r)).sqrt()
    directions = torch.nn.functional.normalize(torch.randn(2, n, 3, generator=generator, dtype=torch.float64), dim=-1)
    speed = escape * k ** (1 / 3)  # uniform in the ball of bound velocities
    w = torch.cat([r[:, None] * directions[0], speed[:, None] * directions[1]], -1)
    q = q_s / (4 * math.pi * r**3) / (4 * math.pi / 3 * escape**3)

    class Fixed(SphericalMixture):
        def distribution(self):
            return df

    p = PhaseMixed(potential, IsochroneActions(), Fixed(1)).log_prob(w).exp()
    weight = torch.where(torch.isfinite(p), p, 0.0) / q
    error = float(weight.std()) / n**0.5
    assert error < 0.01
    assert abs(float(weight.mean()) - 1) < 3 * error


def test_unbound_stars_are_penalised_continuously(isochrone_stars):
    """ln p falls steeply and continuously with speed through escape, and stays finite far beyond."""
    model = resolved(isochrone_stars)
    space = LatentSpace(model)
    values = space.values(torch.zeros(space.size, dtype=torch.float64))
    values["potential.m_tot"], values["potential.r_s"] = torch.tensor(1e11).double(), torch.tensor(3.0).double()
    fixed = model.at(values)
    w = torch.zeros(5, 6, dtype=torch.float64)
    w[:, 0] = 5.0
    escape = (-2 * Isochrone(1e11, 3.0).phi_r(w[0, 0])).sqrt().item()
    # escape is counted from 1e-4 of the squared speed below, hence the third and fourth
    w[:, 4] = escape * torch.tensor([0.9, 0.99994, 0.99996, 1.01, 3.0], dtype=torch.float64)
    w[:, 3] = 1.0
    log_p = fixed.log_prob(w).detach()
    assert torch.isfinite(log_p).all()
    assert bool((log_p.diff()[2:] < -3).all())
    assert abs(float(log_p[2] - log_p[1])) < 1.0


def test_pyro_model_is_the_same_posterior(isochrone_stars):
    """Pyro's log joint, constrained, equals prior plus likelihood of `LatentSpace` (1e-9), also in minibatches."""
    model = resolved(isochrone_stars)
    space = LatentSpace(model)
    u = space.vector(model.initial_values() | model_df_start(model, isochrone_stars))
    values = space.values(u)
    trace = poutine.trace(poutine.condition(model, values)).get_trace(isochrone_stars.w)
    expected = model.log_prior(values) + space.log_likelihood(u, isochrone_stars.w).sum()
    assert trace.log_prob_sum().item() == pytest.approx(expected.item(), rel=1e-9)
    index = torch.arange(0, 2000, 4)
    batch = poutine.trace(poutine.condition(model, values)).get_trace(isochrone_stars.w, index)
    scaled = model.log_prior(values) + 4 * model.at(values).log_prob(isochrone_stars.w[index]).sum()
    # the table's range is that of the stars it is given, hence not to rounding
    assert batch.log_prob_sum().item() == pytest.approx(scaled.item(), rel=1e-6)
    names = {n for n, s in trace.nodes.items() if s["type"] == "sample"}
    assert {"potential.m_tot", "potential.r_s", "df.logits", "df.ln_tail", "w"} <= names


def model_df_start(model: SnapshotModel, catalog: Catalog) -> dict[str, torch.Tensor]:
    J = IsochroneActions().actions(Isochrone(1e11, 3.0), catalog.w)
    return {f"df.{k}": v for k, v in model.df.initial_values(J).items()}


def test_gradient_against_differences(isochrone_stars):
    """The posterior's gradient in every latent against central differences, 1e-5 of the largest."""
    model = SnapshotModel(MassSlopeNetwork.for_stars(isochrone_stars.w, n_features=4), SphericalMixture())
    model.df = model.df.resolved(1, IsochroneActions().actions(Isochrone(1e11, 3.0), isochrone_stars.w))
    space = LatentSpace(model)
    u = space.vector(model.initial_values() | model_df_start(model, isochrone_stars))
    assert count_unbound(space, u, isochrone_stars.w) < 100
    w = isochrone_stars.w[:300]
    bound = model.at(space.values(u)).finder.capped_actions(model.at(space.values(u)).potential, w).excess == 0
    w = w[bound]
    check_gradient(space, u, w)


def test_parametric_fit_finds_the_truth(fitted):
    """M and b within 4 posterior sd of the truth, sd within 35 % of the Cramer-Rao floor at N = 2000.

    (Floor: 0.92/sqrt N and 1.38/sqrt N; one seed, 200 draws.)
    """
    for name, true, floor in (("m_tot", 1e11, 0.92), ("r_s", 3.0, 1.38)):
        draws = fitted.draws[f"potential.{name}"].log()
        assert abs(float(draws.mean()) - math.log(true)) < 4 * float(draws.std())
        assert float(draws.std()) == pytest.approx(floor / 2000**0.5, rel=0.35)
    both = torch.stack([fitted.draws["potential.m_tot"].log(), fitted.draws["potential.r_s"].log()])
    assert float(torch.corrcoef(both)[0, 1]) == pytest.approx(0.76, abs=0.15)
    assert fitted.diagnostics.n_unbound == 0
    assert fitted.diagnostics.gradient_norm < 0.2
    assert len(fitted.diagnostics.elbo) == 40


def test_same_seed_same_numbers(isochrone_stars):
    """A second fit with the same seed and data gives identical draws; another seed does not. N = 300, 10 steps."""
    few, short = isochrone_stars[:300], dataclasses.replace(QUICK, svi_steps=10)
    one, again, other = (
        fit(isochrone.build(few), few, dataclasses.replace(short, seed=seed)).draws["potential.m_tot"]
        for seed in (1, 1, 2)
    )
    assert torch.equal(again, one)
    assert not torch.equal(other, one)


def test_interrupted_fit_resumes(isochrone_stars, fitted, tmp_path, monkeypatch):
    """Interrupted in SVI and resumed, a fit ends with the numbers of an uninterrupted one."""
    from bayespot.inference import svi as variational

    # the room's name for it is the function
    inference = importlib.import_module("bayespot.inference.fit")

    checkpoint = tmp_path / "run.partial" / "checkpoint.safetensors"
    monkeypatch.setattr(inference, "_CHECKPOINT_SECONDS", 0.0)
    calls = {"n": 0}
    mix = variational.step_seed

    def interrupt(seed, step):
        calls["n"] += 1
        if calls["n"] == 25:
            raise KeyboardInterrupt
        return mix(seed, step)

    with monkeypatch.context() as patch:
        patch.setattr(variational, "step_seed", interrupt)
        with pytest.raises(KeyboardInterrupt):
            fit(isochrone.build(isochrone_stars), isochrone_stars, QUICK, checkpoint=checkpoint)
    assert checkpoint.exists()
    result = fit(isochrone.build(isochrone_stars), isochrone_stars, QUICK, checkpoint=checkpoint, resume=True)
    assert len(result.diagnostics.elbo) == 40
    torch.testing.assert_close(result.draws["potential.m_tot"], fitted.draws["potential.m_tot"], rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match="another fit"):
        fit(isochrone.build(isochrone_stars[:500]), isochrone_stars[:500], QUICK, checkpoint=checkpoint, resume=True)
    with pytest.raises(ValueError, match="nothing to resume"):
        fit(isochrone.build(isochrone_stars), isochrone_stars, QUICK, checkpoint=tmp_path / "none", resume=True)


def test_control_variate_of_minibatches(isochrone_stars, fitted):
    """ln p of batches of 200 of 2000 stars, 1 sd from the MAP: right in the mean, a fifth of the noise that is left
    where the batch's own ln p at the MAP is subtracted."""
    space = LatentSpace(fitted.model)
    u_0 = space.vector(fitted.map)
    information = space.fisher(u_0, isochrone_stars.w, 2000, 0)
    batches = Minibatches(fitted.model, u_0, isochrone_stars.w, 200, 1)
    away = torch.randn(space.n_potential, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    u = u_0.clone()
    u[: space.n_potential] += whitening(information[: space.n_potential, : space.n_potential]) @ away
    (exact, slope), at_map = space.gradient(u, isochrone_stars.w), space.gradient(u_0, isochrone_stars.w)[0]
    prior, prior_at_map = space.prior_gradient(u)[0], space.prior_gradient(u_0)[0]
    assert [len(batch) for batch in batches.batches] == [200] * 10
    plain, controlled, slopes = [], [], []
    for k, batch in enumerate(batches.batches):
        batches.k = k
        there, here = (space.likelihood_gradient(v, isochrone_stars.w[batch])[0] for v in (u, u_0))
        plain.append(float(10 * (there - here) + prior - prior_at_map - (exact - at_map)))
        found, found_slope = batches.gradient(u)
        controlled.append(float(found - exact))
        slopes.append(found_slope)
    noise = torch.tensor(controlled).double()
    assert float(noise.std()) < torch.tensor(plain).double().std() / 5
    # every batch as often as any other: no bias at all
    assert abs(float(noise.mean())) < 1e-6
    torch.testing.assert_close(torch.stack(slopes).mean(0), slope, rtol=1e-9, atol=1e-7)
    # of one batch the slope is that of its value: over all batches a wrong correction would cancel
    h = 1e-5 * torch.linspace(-1, 1, len(u), dtype=torch.float64)
    rise = float(batches.gradient(u + h)[0] - batches.gradient(u - h)[0])
    assert rise == pytest.approx(2 * float(slopes[-1] @ h), rel=1e-4)


def test_minibatches_of_unequal_size_are_taken_in_proportion(isochrone_stars, fitted):
    """2000 stars in batches of about 600: 667, 667 and 666, whose weighted mean is the whole; random ones, all seen."""
    space = LatentSpace(fitted.model)
    u_0 = space.vector(fitted.map)
    batches = Minibatches(fitted.model, u_0, isochrone_stars.w, 600, 1)
    sizes = torch.tensor([len(batch) for batch in batches.batches])
    assert sorted(sizes.tolist()) == [666, 667, 667]
    assert torch.cat(list(batches.batches)).sort().values.equal(torch.arange(2000))
    values = []
    for k in range(3):
        batches.k = k
        values.append(batches.gradient(u_0 + 1e-3)[0])
    mean = (torch.stack(values) * sizes).sum() / 2000
    torch.testing.assert_close(mean, space.gradient(u_0 + 1e-3, isochrone_stars.w)[0], rtol=1e-12, atol=0)
    seen = set()
    for _ in range(30):
        batches.next_batch()
        seen.add(batches.k)
    assert seen == {0, 1, 2}


def test_the_elbo_is_that_of_pyro(isochrone_stars, fitted):
    """Value and gradient of one sample, by our target and by `Trace_ELBO` of the same model, guide and seed."""
    space = LatentSpace(fitted.model)
    u_0 = space.vector(fitted.map)
    guide = WhitenedGuide(space, u_0, space.fisher(u_0, isochrone_stars.w, 2000, 0), "full_rank", "mean_field")
    torch.manual_seed(5)
    guide(isochrone_stars.w)
    torch.manual_seed(7)
    loss = Trace_ELBO()(fitted.model, guide)(isochrone_stars.w, None)
    names = dict(guide.named_parameters())
    expected = torch.autograd.grad(loss, list(names.values()))
    torch.manual_seed(7)
    u, log_q = guide.rsample()
    value, slope = FullBatch(fitted.model, isochrone_stars.w).gradient(u.detach())
    torch.testing.assert_close(log_q - value, loss, rtol=1e-10, atol=1e-8)
    for name, found, wanted in zip(
        names, torch.autograd.grad(log_q - slope @ u, list(names.values())), expected, strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-7, msg=name)


def test_free_form_fit():
    """N = 3000, minibatches of 500: the truth of v_c within 4 sd where the stars are.

    Truths at 2, 6 and 20 kpc; every density draw positive.
    """
    config = FitConfig(seed=3, svi_steps=60, batch_size=500, n_draws=100, k_hat_draws=0)
    stars = mock("isochrone", n_stars=3000, seed=5)
    posterior = Posterior.from_result(fit(spherical.build(stars), stars, config))
    r = [2.0, 6.0, 20.0]
    field = posterior.field("circular_speed", r)
    truth = Isochrone(1e11, 3.0).circular_speed(torch.tensor(r).double()).detach().numpy()
    assert (abs(field.mean - truth) < 4 * field.sd).all()
    assert (field.sd / truth < 0.1).all()
    assert (posterior.field("density", [0.01, 1.0, 1e4]).draws > 0).all()


@pytest.mark.parametrize(("guide", "df_guide"), [("mean_field", "mean_field"), ("laplace", "full_rank")])
def test_guides(isochrone_stars, guide, df_guide):
    """Other guides run; mean field is narrower than the floor allows for correlated M and b, as documented."""
    config = dataclasses.replace(QUICK, guide=guide, df_guide=df_guide)
    draws = fit(isochrone.build(isochrone_stars), isochrone_stars, config).draws
    assert float(draws["df.ln_tail"].std()) > 0
    sd = float(draws["potential.m_tot"].log().std()) * 2000**0.5 / 0.92
    # conditional over marginal sd is (1 - 0.76^2)^(1/2) = 0.65
    assert sd == pytest.approx(0.65 if guide == "mean_field" else 1.0, rel=0.3)


def test_guide_covers_a_gaussian_posterior(isochrone_stars):
    """The untrained guide is the Laplace approximation: covariance of its draws = inverse information, 10 %."""
    model = resolved(isochrone_stars)
    space = LatentSpace(model)
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(space.size, space.size, generator=generator, dtype=torch.float64)
    information = root @ root.T + torch.eye(space.size, dtype=torch.float64)
    guide = WhitenedGuide(space, torch.zeros(space.size, dtype=torch.float64), information, "full_rank", "point")
    u, log_q = guide.draw(20_000, seed=0)
    n = space.n_potential
    expected = torch.linalg.inv(information[:n, :n])
    torch.testing.assert_close(torch.cov(u[:, :n].T), expected, rtol=0.1, atol=0.03 * float(expected.abs().max()))
    assert float(u[:, n:].std(0).max()) == 0
    assert torch.isfinite(log_q).all()
    torch.testing.assert_close(whitening(information) @ whitening(information).T, torch.linalg.inv(information))


def test_k_hat():
    """Exact weights give k below 0.3, weights of a guide half as wide as the target give k above 0.7."""
    z = torch.randn(2000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    normal = torch.distributions.Normal
    good = normal(0.0, 1.0).log_prob(z) - normal(0.0, 1.05).log_prob(z)
    narrow = normal(0.0, 1.0).log_prob(0.5 * z) - normal(0.0, 0.5).log_prob(0.5 * z)
    assert psis_k_hat(good) < 0.3
    assert psis_k_hat(narrow) > 0.6
    assert math.isnan(psis_k_hat(good[:5]))


def test_refusals(isochrone_stars):
    """Too few stars, a star at the centre, unbound systems and bad settings are refused with the remedy."""
    with pytest.raises(ValueError, match="n_draws must be at least 1; got 0"):
        FitConfig(n_draws=0)
    with pytest.raises(ValueError, match="k_hat_draws must be positive, or 0 for none; got -1"):
        FitConfig(k_hat_draws=-1)
    with pytest.raises(ValueError, match="guide must be one of"):
        FitConfig(guide="wide")
    few = isochrone_stars[:12]
    with pytest.raises(ValueError, match="12 stars for a model with 1"):
        fit(spherical.build(isochrone_stars), few, QUICK)
    w = isochrone_stars.w.clone()
    w[3, :3] = 0
    with pytest.raises(ValueError, match="star 3 is exactly at the centre"):
        fit(spherical.build(isochrone_stars), Catalog(w), QUICK)
    light = SnapshotModel(Isochrone(1e6, 3.0), SphericalMixture())
    with pytest.raises(FitError, match=r"stay unbound.*units"):
        fit(light, isochrone_stars, dataclasses.replace(QUICK, adam_steps=2))
    pyro.clear_param_store()


def test_fit_without_weights(isochrone_stars):
    """With k_hat_draws=0 no draw is weighted: k-hat is NaN, the verdict says so, and re-weighting what it lacks."""
    config = dataclasses.replace(QUICK, guide="laplace", k_hat_draws=0)
    result = fit(isochrone.build(isochrone_stars), isochrone_stars, config)
    assert math.isnan(result.diagnostics.k_hat)
    assert result.diagnostics.log_evidence is None
    assert any("not compared with the exact posterior" in reason for reason in result.diagnostics.warnings)
    with pytest.raises(ValueError, match="no draw has an importance weight"):
        Posterior.from_result(result).reweighted()


@pytest.mark.parametrize("prior", ["none", "all"])
def test_other_priors_of_the_network(isochrone_stars, prior):
    """A flat prior and priors over all layers are fitted; v_c(6 kpc) holds the truth within 4 sd. N = 1000."""
    stars = isochrone_stars[:1000]
    potential = MassSlopeNetwork.for_stars(stars.w, n_features=4, prior=prior)
    config = FitConfig(seed=1, n_components=1, guide="laplace", n_draws=100, k_hat_draws=0)
    result = fit(SnapshotModel(potential, SphericalMixture()), stars, config)
    field = Posterior.from_result(result).field("circular_speed", [6.0])
    truth = Isochrone(1e11, 3.0).circular_speed(torch.tensor([6.0]).double()).item()
    assert abs(field.mean[0] - truth) < 4 * field.sd[0]
    assert ("potential.centres" in result.draws) == (prior == "all")
