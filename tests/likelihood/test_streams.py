"""Streams: the likelihood against closed forms, and mock streams in a known potential.

Isochrone M = 1e11 Msun, b = 3 kpc, unless stated. Mock streams are stripped from a progenitor: stars whose actions
scatter by 1 % drift apart in angle for up to 4 Gyr. Truth never enters a fit. Seeds fixed; tolerances are statistical
where they say so.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from bayespot.models import isochrone
from contracts.latent import check_gradient
from pyro import poutine
from scipy.stats import norm, truncnorm

from bayespot import FitConfig, Isochrone, SnapshotModel, SphericalMixture, fit
from bayespot.actions import IsochroneActions
from bayespot.catalog import Catalog
from bayespot.inference import FitResult
from bayespot.inference.latent import LatentSpace
from bayespot.likelihood import MeasurementErrors, Stream, UniformOrbits, stacked
from bayespot.likelihood.model import SphericalActions
from bayespot.likelihood.streams import Streams
from bayespot.mock import observe
from bayespot.pyro_modules import freeze
from bayespot.report import load_run, save_run
from bayespot.units import G

TRUE = Isochrone(1e11, 3.0)
FINDER = IsochroneActions()
#: (J_r, J_phi, J_z) of three progenitors in kpc km/s.
ORBITS = {"one": (300.0, 900.0, 700.0), "two": (150.0, -1200.0, 400.0), "three": (500.0, 600.0, 1500.0)}
QUICK = FitConfig(seed=1, n_components=1, svi_steps=30, n_draws=300, k_hat_draws=30)


def mock_stream(orbit: tuple[float, float, float], n: int, seed: int) -> Catalog:
    """Stars near one orbit that left their progenitor at times uniform over the last 4 Gyr."""
    g = torch.Generator().manual_seed(seed)
    J_p = torch.tensor(orbit, dtype=torch.float64).expand(n, 3)
    J = J_p * (1 + 0.01 * torch.randn(n, 3, generator=g, dtype=torch.float64))
    theta_p = (2 * math.pi * torch.rand(3, generator=g, dtype=torch.float64)).expand(n, 3)
    Omega, Omega_p = (FINDER.actions_angles(TRUE, FINDER.phase_space(TRUE, j, theta_p)).Omega for j in (J, J_p))
    t = 3.9 * torch.rand(n, 1, generator=g, dtype=torch.float64)  # kpc/(km/s) = 0.978 Gyr
    theta = theta_p + (Omega - Omega_p) * t + 0.01 * torch.randn(n, 3, generator=g, dtype=torch.float64)
    return Catalog(FINDER.phase_space(TRUE, J, torch.remainder(theta, 2 * math.pi)))


def mock_streams(n: int = 60, seed: int = 11) -> dict[str, Catalog]:
    return {name: mock_stream(orbit, n, seed + i) for i, (name, orbit) in enumerate(ORBITS.items())}


def alone(streams: list[Stream], finder=FINDER) -> SnapshotModel:
    """The parametric isochrone with streams only."""
    return SnapshotModel(isochrone.build(stacked(streams)).potential, UniformOrbits(), finder, streams=streams)


def check_truth(result: FitResult, sds: float = 4.0) -> dict[str, float]:
    """Assert that ln M and ln b are within so many sd of the truth; return the sds."""
    widths = {}
    for name, true in (("m_tot", 1e11), ("r_s", 3.0)):
        draws = result.draws[f"potential.{name}"].log()
        widths[name] = float(draws.std())
        assert abs(float(draws.mean()) - math.log(true)) < sds * widths[name], name
    return widths


@pytest.fixture(scope="module")
def fitted() -> FitResult:
    streams = [Stream(name, catalog) for name, catalog in mock_streams().items()]
    return fit(alone(streams), stacked(streams), QUICK)


VALUES = {
    "orbit": torch.tensor([-2.0, 0.5, -0.7], dtype=torch.float64),
    "ln_spread": torch.tensor([-2.0, -1.0, -1.5], dtype=torch.float64),
    "slope": torch.tensor([0.02, -0.03, 0.05], dtype=torch.float64),
}


def test_log_likelihood_by_hand():
    """Sum over stars of scipy's (truncated) normals of the isochrone's textbook actions, - 3 ln 2 pi each: 1e-9.

    J_r = k/sqrt(-2E) - (L + sqrt(L^2 + 4 k b))/2, J_phi = L_z, J_z = L - |L_z| (Binney & Tremaine 2008, 3.225).
    """
    catalog = mock_stream(ORBITS["one"], 41, 3)
    stream = Stream("s", catalog)
    x, v = catalog.x.numpy(), catalog.v.numpy()
    k, b, r = G * 1e11, 3.0, np.linalg.norm(x, axis=1)
    energy = (v**2).sum(1) / 2 - k / (b + np.sqrt(b**2 + r**2))
    L = np.cross(x, v)
    size = np.linalg.norm(L, axis=1)
    J = np.stack([k / np.sqrt(-2 * energy) - (size + np.sqrt(size**2 + 4 * k * b)) / 2, L[:, 2], size - abs(L[:, 2])])
    normal = L.mean(0) / np.linalg.norm(L.mean(0))
    first = (x / r[:, None]).mean(0)
    azimuth = np.arctan2(np.cross(first, x) @ normal, x @ (first - (first @ normal) * normal))
    s = (azimuth - azimuth.mean()) / azimuth.std(ddof=1)
    scale = np.median(r * np.linalg.norm(v, axis=1))
    orbit, spread, slope = (VALUES[name].numpy() for name in ("orbit", "ln_spread", "slope"))
    mean = scale * (np.array([np.exp(orbit[0]), orbit[1], np.exp(orbit[2])])[:, None] + slope[:, None] * s)
    sd = scale * np.exp(spread)
    cut = [truncnorm.logpdf(J[i], -mean[i] / sd[i], np.inf, mean[i], sd[i]) for i in (0, 2)]
    expected = (cut[0] + cut[1] + norm.logpdf(J[1], mean[1], sd[1]) - 3 * math.log(2 * math.pi)).sum()
    assert float(freeze(stream, VALUES).log_likelihood(TRUE, FINDER)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("slope", [False, True])
def test_density_integrates_to_one(slope):
    """int p(w) d^6w = 1 by importance sampling in (J, theta), whose volume is that of w; 2e5 points.

    Without slopes the cut removes up to a third of the Gaussian; with them dispersions are 2 % of the angular
    momentum and slopes half as large. 3 standard errors (below 0.01), and with slopes 1 % more: azimuth depends on
    the actions a little at given angles.
    """
    orbit = torch.tensor(ORBITS["one"], dtype=torch.float64).expand(41, 3)
    turn = torch.linspace(-2.9, 2.9, 41, dtype=torch.float64)[:, None].expand(41, 3)
    stream = Stream("s", Catalog(FINDER.phase_space(TRUE, orbit, turn % (2 * math.pi))), slope=slope)
    values = {name: VALUES[name] for name in stream._pyro_samples}
    spread = [0.02, 0.02, 0.02] if slope else [0.3, 0.1, 0.2]
    values["ln_spread"] = torch.tensor(spread, dtype=torch.float64).log()
    if slope:
        values["slope"] = 0.5 * values["ln_spread"].exp() * torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    n = 200_000
    centre, sd = freeze(stream, values).J, stream.scale * values["ln_spread"].exp()
    wide = torch.distributions.Normal(centre, 2.5 * sd)
    J = centre + 2.5 * sd * torch.randn(n, 3, generator=generator, dtype=torch.float64)
    J[:, [0, 2]] = J[:, [0, 2]].abs()  # folded
    q = wide.log_prob(J).exp() + wide.log_prob(-J).exp() * torch.tensor([1.0, 0.0, 1.0])
    w = FINDER.phase_space(TRUE, J, 2 * math.pi * torch.rand(n, 3, generator=generator, dtype=torch.float64))
    stream.register_buffer("data", w)
    excess = torch.zeros(n, dtype=torch.float64)
    p = freeze(stream, values)._log_prob(J, excess).exp() / q.prod(-1) * (2 * math.pi) ** 3
    error = float(p.std()) / n**0.5
    assert error < 0.01
    assert abs(float(p.mean()) - 1) < 3 * error + (0.01 if slope else 0.0)


def test_gradient_against_differences():
    """Log posterior in the potential's parameters and every site of the streams, 1e-5 of the largest component."""
    streams = [Stream(name, catalog) for name, catalog in mock_streams(20).items()]
    model = alone(streams, SphericalActions())
    space = LatentSpace(model)
    values = model.initial_values()
    values["potential.m_tot"], values["potential.r_s"] = torch.tensor(1.2e11).double(), torch.tensor(2.5).double()
    u, w = space.vector(values), stacked(streams).w
    assert space.n_potential == space.size == 2 + 3 * 9
    check_gradient(space, u, w)


def test_streams_count_once(isochrone_stars):
    """Pyro's log joint = priors + streams + snapshot (1e-9); the streams' part is what each gives on its own."""
    streams = [Stream(name, catalog) for name, catalog in mock_streams(20).items()]
    model = SnapshotModel(isochrone.build(isochrone_stars).potential, UniformOrbits(), FINDER, streams=streams)
    space = LatentSpace(model)
    u = space.vector(model.initial_values())
    values = space.values(u)
    trace = poutine.trace(poutine.condition(model, values)).get_trace(isochrone_stars.w)
    joint = float(trace.log_prob_sum())
    factors = {name: float(site["log_prob_sum"]) for name, site in trace.nodes.items() if name.endswith(".stars")}
    assert set(factors) == {f"streams.{name}.stars" for name in ORBITS}
    fixed = model.at(values)
    for stream in fixed.streams:
        one = float(stream.log_likelihood(fixed.potential, FINDER))
        assert factors[f"streams.{stream.stream_name}.stars"] == pytest.approx(one, rel=1e-9)
    priors = sum(float(prior.log_prob(values[name]).sum()) for name, prior in model.sites().items())
    snapshot = float(fixed.log_prob(isochrone_stars.w).sum())
    assert joint == pytest.approx(priors + sum(factors.values()) + snapshot, rel=1e-9)
    assert joint == pytest.approx(float(model.log_prior(values)) + snapshot, rel=1e-9)
    # minibatches scale the snapshot, not the streams
    index = torch.arange(0, 2000, 4)
    batch = poutine.trace(poutine.condition(model, values)).get_trace(isochrone_stars.w, index)
    part = float(fixed.log_prob(isochrone_stars.w[index]).sum())
    assert float(batch.log_prob_sum()) == pytest.approx(priors + sum(factors.values()) + 4 * part, rel=1e-9)


def test_fisher_of_the_snapshot_ignores_sites_of_streams(isochrone_stars):
    """Per-star scores of the snapshot: zero in sites of streams, elsewhere those of the model without them."""
    stream = Stream("one", mock_streams(20)["one"])
    base = isochrone.build(isochrone_stars)
    base.df = base.df.resolved(1, FINDER.actions(TRUE, isochrone_stars.w))
    values = base.at({}).initial_values() | {
        f"df.{k}": v for k, v in base.df.initial_values(FINDER.actions(TRUE, isochrone_stars.w)).items()
    }
    scores = []
    for streams in ((), (stream,)):
        model = SnapshotModel(base.potential, base.df, FINDER, streams=streams)
        space = LatentSpace(model)
        scores.append(space.scores(space.vector(model.initial_values() | values), isochrone_stars.w[:50]))
    part = LatentSpace(model).slices
    own = torch.cat([torch.arange(p.start, p.stop) for name, p in part.items() if not name.startswith("streams.")])
    torch.testing.assert_close(scores[1][:, own], scores[0])
    assert float(scores[1].abs().sum()) == pytest.approx(float(scores[1][:, own].abs().sum()))


def test_streams_alone_find_the_truth(fitted):
    """Three streams of 60 stars: M and b within 4 posterior sd, known to 3 %; J of each within 2 %."""
    widths = check_truth(fitted)
    assert max(widths.values()) < 0.03
    assert not fitted.diagnostics.warnings
    for name, orbit in ORBITS.items():
        stream = next(s for s in fitted.model.streams if s.stream_name == name)
        draws = fitted.draws[f"streams.{name}.orbit"]
        J = freeze(stream, {"orbit": draws.mean(0)}).J
        assert torch.allclose(J, torch.tensor(orbit, dtype=torch.float64), rtol=0.05), (name, J)


def test_streams_sharpen_a_snapshot(isochrone_stars):
    """N = 2000 stars with and without three streams: sd of ln M and ln b at least 1.5 times smaller, truth in 4 sd."""
    base = isochrone.build(isochrone_stars)
    widths = []
    for streams in ([], [Stream(name, catalog) for name, catalog in mock_streams().items()]):
        model = SnapshotModel(base.potential, SphericalMixture(), FINDER, streams=streams)
        widths.append(check_truth(fit(model, isochrone_stars, QUICK)))
    for name in ("m_tot", "r_s"):
        assert widths[1][name] < widths[0][name] / 1.5


def test_measurement_errors_widen_the_posterior():
    """Distances to 0.3 %: truth within 4 sd, and less is known than without errors.

    Three streams of 40 stars alone; 64 samples per star; Laplace guide.
    """
    config = dataclasses.replace(QUICK, guide="laplace")
    truths = mock_streams(40)
    exact, noisy = [], []
    for name, true in truths.items():
        seen = observe(true, 1, distance_error=0.003, pm_error=0.005, v_error=0.3)
        exact.append(Stream(name, true))
        noisy.append(Stream(name, seen, MeasurementErrors(n_samples=64)))
    widths = [check_truth(fit(alone(streams), stacked(streams), config)) for streams in (exact, noisy)]
    assert widths[1]["m_tot"] * widths[1]["r_s"] > widths[0]["m_tot"] * widths[0]["r_s"]


def test_effective_samples():
    """Tiny errors leave every sample at work; 3 % of distance scatter J beyond the dispersions, and few remain.

    At the true potential, orbit and dispersions (1 %); 64 samples.
    """
    true = mock_stream(ORBITS["one"], 40, 11)
    J = torch.tensor(ORBITS["one"], dtype=torch.float64)
    for error, low, high in ((1e-5, 40.0, 64.1), (0.03, 1.0, 10.0)):
        seen = observe(true, 1, distance_error=error, pm_error=error / 10, v_error=10 * error)
        stream = Stream("s", seen, MeasurementErrors(n_samples=64), slope=False)
        orbit = torch.stack([(J[0] / stream.scale).log(), J[1] / stream.scale, (J[2] / stream.scale).log()])
        fixed = freeze(stream, {"orbit": orbit, "ln_spread": (0.01 * J / stream.scale).log()})
        assert low < float(fixed.effective_samples(TRUE, FINDER).median()) < high
    with pytest.raises(ValueError, match="'s' was made without errors"):
        Stream("s", true).effective_samples(TRUE, FINDER)


def test_place_along_the_stream():
    """`along` has mean 0 and sd 1, and orders stars as their angle theta_z does (rank correlation above 0.99)."""
    catalog = mock_stream(ORBITS["one"], 60, 11)
    s = Stream("s", catalog).along(catalog.w)
    assert abs(float(s.mean())) < 1e-12
    assert float(s.std()) == pytest.approx(1)
    theta = FINDER.actions_angles(TRUE, catalog.w).theta[:, 2]
    middle = torch.atan2(theta.sin().mean(), theta.cos().mean())
    offset = torch.remainder(theta - middle + math.pi, 2 * math.pi) - math.pi
    ranks = torch.stack([part.argsort().argsort().double() for part in (s, offset)])
    assert float(torch.corrcoef(ranks)[0, 1]) > 0.99


def test_a_fit_starts_without_slopes():
    """`plain` has no site for slopes; its streams' likelihood is that of slopes zero (1e-12), not of others."""
    model = alone([Stream("s", mock_stream(ORBITS["one"], 20, 11))])
    plain = model.plain()
    assert set(model.sites()) - set(plain.sites()) == {"streams.s.slope"}
    values = model.initial_values()
    slope = values.pop("streams.s.slope")
    prior = model.sites()["streams.s.slope"]

    def with_slope(value: torch.Tensor) -> float:
        return float(model.log_prior(values | {"streams.s.slope": value}) - prior.log_prob(value))

    zero = float(plain.log_prior(values))
    assert with_slope(slope) == pytest.approx(zero, rel=1e-12)
    assert abs(with_slope(slope + 0.1) - zero) > 1.0


def test_refusals():
    """Bad names, too few stars, equal names, latent errors, and a population of orbits that streams do not tell."""
    catalog = mock_stream(ORBITS["one"], 10, 0)
    with pytest.raises(ValueError, match=r"identifier.*got 'GD-1'"):
        Stream("GD-1", catalog)
    with pytest.raises(ValueError, match="'gd1' has 2 stars; at least 3"):
        Stream("gd1", catalog[:2])
    with pytest.raises(ValueError, match="two streams are called 'gd1'"):
        Streams([Stream("gd1", catalog), Stream("gd1", catalog)])
    with pytest.raises(ValueError, match="two streams are called 'children', or the name is taken"):
        Streams([Stream("children", catalog)])
    with pytest.raises(ValueError, match="method='marginal', got 'latent'"):
        Stream("gd1", catalog, MeasurementErrors(method="latent"))
    for sample in (UniformOrbits().sample, UniformOrbits().stratified):
        with pytest.raises(ValueError, match="no population to draw from"):
            sample(10, 0)


@pytest.mark.usefixtures("no_figures")
def test_a_run_with_streams_is_saved_and_loaded(fitted, tmp_path):
    """Draws of the streams' sites and the circular speed at 8 kpc return from disk."""
    catalog = stacked([Stream(name, stars) for name, stars in mock_streams().items()])
    posterior, _, _ = load_run(save_run(tmp_path / "run", fitted, catalog))
    torch.testing.assert_close(posterior.draws["streams.one.slope"], fitted.draws["streams.one.slope"])
    true = TRUE.circular_speed(torch.tensor([8.0]).double()).item()
    field = posterior.field("circular_speed", [8.0])
    assert abs(field.mean[0] - true) < 4 * field.sd[0]
