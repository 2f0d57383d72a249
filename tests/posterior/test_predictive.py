"""Posterior predictive checks and the phase-mixing test.

Isochrone M = 1e11 Msun, b = 3 kpc, actions in closed form, unless a test says otherwise; seeds fixed. A dynamical time
is the radial period of the median star, 0.26 kpc/(km/s).
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil

import arviz
import numpy as np
import pytest
import torch
from bayespot.models import isochrone
from contracts.commands import bayespot
from matplotlib.figure import Figure
from scipy.stats import chi2, kstest

from bayespot import (
    Catalog,
    FitConfig,
    Isochrone,
    MassSlopeNetwork,
    Posterior,
    SnapshotModel,
    fit,
    load_run,
    save_run,
)
from bayespot.actions import IsochroneActions, SphericalActions
from bayespot.cli import check as check_command
from bayespot.df import SphericalMixture
from bayespot.inference import ALARM, AngleTest, FitResult, angle_statistic
from bayespot.inference.phase_mixing import MODES, phase_mixing_warning
from bayespot.inference.symmetry import symmetry_test
from bayespot.likelihood import Custom, MeasurementErrors, SphericalShell
from bayespot.mock import mock
from bayespot.posterior import Predictive, posterior_predictive
from bayespot.posterior.predictive import Replica, Replicator, chi_square_p_value, orientations, profiles
from bayespot.report import RunError, plots
from bayespot.report.runs import save_predictive

POTENTIAL = Isochrone(m_tot=1e11, r_s=3.0)
FINDER = IsochroneActions()
TRUTH = SnapshotModel(POTENTIAL, SphericalMixture(), finder=FINDER)
DYNAMICAL_TIME = 0.26
STATISTICS = {"counts", "sigma_r", "sigma_t", "beta", "directions", "planes", "angles"}


def fitted(catalog: Catalog, n_components: int = 3, free_form: bool = False) -> FitResult:
    """A fast fit: Laplace, 100 draws."""
    if free_form:
        model = SnapshotModel(MassSlopeNetwork.for_stars(catalog.w, n_features=6), SphericalMixture())
    else:
        model = SnapshotModel(isochrone.build(catalog).potential, SphericalMixture(), finder=FINDER)
    config = FitConfig(seed=1, n_components=n_components, guide="laplace", n_draws=100, k_hat_draws=25)
    return fit(model, catalog, config)


def p_value(result: FitResult) -> float:
    p = result.diagnostics.angle_p_value
    assert p is not None
    return p


def alarms(result: FitResult) -> list[str]:
    return [warning for warning in result.diagnostics.warnings if "phase-mixed" in warning]


@pytest.fixture(scope="module")
def calm() -> tuple[Catalog, FitResult]:
    """An equilibrium mock, N = 1000, seed 21, and its fit by the right model."""
    catalog = mock("isochrone", n_stars=1000, seed=21)
    return catalog, fitted(catalog)


@pytest.fixture(scope="module")
def check(calm) -> Predictive:
    return posterior_predictive(Posterior.from_result(calm[1]), calm[0], n_draws=100, seed=3)


# -- the statistics --------------------------------------------------------------------------------------------


def test_profiles_of_known_stars():
    """Two bins by hand, to rounding: counts, v_r^2 and half of v_t^2 averaged, beta = 1 - sigma_t^2 / sigma_r^2."""
    w = np.array(
        [
            [2.0, 0.0, 0.0, 30.0, 0.0, 40.0],
            [0.0, -1.0, 0.0, 0.0, -10.0, 20.0],
            [0.0, 0.0, 7.0, 60.0, 80.0, 5.0],
            [0.0, 9.0, 0.0, 0.0, -5.0, 0.0],
            [3.0, 4.0, 0.0, 3.0, 4.0, 0.0],  # on the edge: belongs to the outer bin, v_r = 5, v_t = 0
        ]
    )
    found = profiles(w, np.array([0.0, 5.0, np.inf]))
    assert found["counts"].tolist() == [2, 3]
    np.testing.assert_allclose(found["sigma_r"] ** 2, [(900 + 100) / 2, 25])
    np.testing.assert_allclose(found["sigma_t"] ** 2, [(1600 + 400) / 4, (60**2 + 80**2) / 6])
    np.testing.assert_allclose(found["beta"], 1 - (found["sigma_t"] / found["sigma_r"]) ** 2)
    lonely = profiles(w[:1], np.array([0.0, 5.0, np.inf]))
    assert np.isnan(lonely["beta"]).all()


def test_isotropic_stars_have_no_anisotropy():
    """Isotropic isochrone, N = 2e4: beta of every bin within 5 standard errors, sqrt(3/n), of zero; with an Osipkov-
    Merritt radius of 6 kpc the r^2 / (r^2 + r_a^2) of the theory."""
    for r_a, seed in ((None, 1), (6.0, 2)):
        w = mock("isochrone", n_stars=20_000, seed=seed, anisotropy_radius=r_a).w.numpy()
        r = np.linalg.norm(w[:, :3], axis=1)
        edges = np.quantile(r, np.linspace(0, 1, 21))
        middle = np.sqrt(edges[2:-2] * edges[3:-1])
        theory = 0 * middle if r_a is None else middle**2 / (middle**2 + r_a**2)
        found = profiles(w, edges)["beta"][2:-1]
        assert (np.abs(found - theory) < 5 * np.sqrt(3 / 1000) * (1 - theory) + 0.02).all(), (r_a, found, theory)


def test_p_value_of_known_replicas():
    """A scalar: the fraction of replicas that reach the observed value, draw by draw; half a count of continuity."""
    assert chi_square_p_value(np.array([2.0, 2.0, 5.0]), np.array([1.0, 3.0, 6.0])) == pytest.approx(2.5 / 4)
    far = chi_square_p_value(np.full((99, 3), 50.0), np.random.default_rng(0).standard_normal((99, 3)))
    assert far == pytest.approx(0.005)


def test_p_value_is_calibrated_without_double_use():
    """Data drawn like the replicas (8 correlated bins, 100 replicas, 300 data sets): p is uniform (KS p > 0.001)."""
    rng = np.random.default_rng(1)
    root = rng.standard_normal((8, 8))
    p = []
    for _ in range(300):
        x = rng.standard_normal((101, 8)) @ root + 10
        p.append(chi_square_p_value(np.repeat(x[:1], 100, 0), x[1:]))
    assert kstest(p, "uniform").pvalue > 0.001


# -- angles given the actions ----------------------------------------------------------------------------------


def test_angles_of_equilibrium_mocks_are_uniform():
    """50 mocks of 1000 stars in the true potential, half of them anisotropic: p is uniform (KS p > 0.001), and the
    mean chi-square is its degrees of freedom within 4 standard errors."""
    tests = []
    for name in ("isochrone", "isochrone-radial"):
        for w in mock(name, n_stars=25_000, seed=7).w.split(1000):
            tests.append(angle_statistic(TRUTH, w))
    dof = tests[0].dof
    assert dof == 2 * 6 * len(MODES)
    assert kstest([test.p_value for test in tests], "uniform").pvalue > 0.001
    assert abs(np.mean([test.statistic for test in tests]) - dof) < 4 * (2 * dof / 50) ** 0.5
    assert tests[0].p_value == pytest.approx(chi2.sf(tests[0].statistic, dof))


def test_statistic_of_known_angles():
    """One angle for all: every mode has modulus one, T = 2 n n_modes. A theta_r that winds once round as the actions
    grow: seen with six bins, averaged out with one."""
    J = FINDER.actions(POTENTIAL, mock("isochrone", n_stars=1200, seed=3).w)
    with torch.no_grad():
        w = FINDER.phase_space(POTENTIAL, J, torch.full_like(J, 1.3))
        assert angle_statistic(TRUTH, w).statistic == pytest.approx(2 * 1200 * len(MODES), rel=1e-6)
        theta = 2 * math.pi * torch.rand(J.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
        theta[:, 0] = 2 * math.pi * (J[:, 0] + J[:, 2] + J[:, 1].abs()).argsort().argsort() / len(J)
        w = FINDER.phase_space(POTENTIAL, J, theta)
    assert angle_statistic(TRUTH, w).p_value < 1e-100
    assert angle_statistic(TRUTH, w, n_bins=1).p_value > 0.001


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_is_heard(mode):
    """k theta = 0 for one mode k, angles uniform otherwise, N = 1200: T is 2 n for it and for each of its multiples,
    and for the others its degrees of freedom within 5 standard deviations."""
    J = FINDER.actions(POTENTIAL, mock("isochrone", n_stars=1200, seed=3).w)
    generator = torch.Generator().manual_seed(5)
    theta = 2 * math.pi * torch.rand(J.shape, generator=generator, dtype=torch.float64)
    axis = next(i for i, k in enumerate(mode) if k)
    turns = torch.randint(mode[axis], (len(J),), generator=generator)
    theta[:, axis] = 2 * math.pi * turns / mode[axis]
    with torch.no_grad():
        test = angle_statistic(TRUTH, FINDER.phase_space(POTENTIAL, J, theta))
    loud = sum(k[axis] > 0 and k[axis] % mode[axis] == 0 for k in MODES)
    quiet = 12 * (len(MODES) - loud)
    assert abs(test.statistic - 2 * 1200 * loud - quiet) < 5 * (2 * quiet) ** 0.5 + 1e-6


def test_the_modes_cover_every_angle():
    """First harmonics of all three angles, second ones of the radial and the vertical."""
    assert {(1, 0, 0), (0, 1, 0), (0, 0, 1), (2, 0, 0), (0, 0, 2)} <= set(MODES)


def test_a_wrong_potential_is_noticed():
    """Equilibrium stars, N = 4000, seed 5: in a potential of 70 % of the mass, still binding nearly all, p < ALARM."""
    w = mock("isochrone", n_stars=4000, seed=5).w
    lighter = SnapshotModel(Isochrone(m_tot=7e10, r_s=3.0), SphericalMixture(), finder=FINDER)
    assert angle_statistic(TRUTH, w).p_value > 0.01
    assert angle_statistic(lighter, w).p_value < ALARM


def test_stars_without_angles_are_left_out():
    """Unbound stars and a star at rest in the centre change nothing; without any bound star there is no test and no
    warning."""
    w = mock("isochrone", n_stars=500, seed=6).w
    escaping = torch.cat([w[:40, :3], 3000 + w[:40, 3:]], -1)
    assert angle_statistic(TRUTH, torch.cat([w, escaping])).statistic == angle_statistic(TRUTH, w).statistic
    nothing = angle_statistic(TRUTH, escaping)
    assert math.isnan(nothing.p_value)
    assert phase_mixing_warning(nothing) is None


def test_warning_says_what_is_wrong():
    """Only below ALARM, with the numbers."""
    assert phase_mixing_warning(AngleTest(90.0, 72, 1.01 * ALARM)) is None
    said = phase_mixing_warning(AngleTest(190.4, 72, 0.5 * ALARM))
    assert "chi-square 190 for 72" in str(said)
    assert "not phase-mixed" in str(said)


def shaken(n: int, seed: int) -> torch.Tensor:
    """An equilibrium mock whose stars at z > 0 were slowed to 0.6 of their velocity."""
    w = mock("isochrone", n_stars=n, seed=seed).w
    w[w[:, 2] > 0, 3:] *= 0.6
    return w


@torch.no_grad()
def followed(w: torch.Tensor, dynamical_times: float) -> Catalog:
    """The stars later on, along their tori: theta + Omega t."""
    J, theta, Omega = FINDER.actions_angles(POTENTIAL, w)
    return Catalog(FINDER.phase_space(POTENTIAL, J, theta + dynamical_times * DYNAMICAL_TIME * Omega))


@pytest.mark.parametrize("free_form", [False, True])
def test_fit_warns_before_phase_mixing(free_form):
    """N = 2000, seed 31, one dynamical time after the perturbation: the fit warns, though it may bend the potential."""
    result = fitted(followed(shaken(2000, 31), 1.0), free_form=free_form)
    assert p_value(result) < ALARM
    assert len(alarms(result)) == 1


def test_fit_is_quiet_after_phase_mixing():
    """The same stars after 60 dynamical times in the fixed potential: p > 0.01 and no alarm."""
    result = fitted(followed(shaken(2000, 31), 60.0))
    assert p_value(result) > 0.01
    assert not alarms(result)


@pytest.mark.parametrize(("name", "free_form"), [("isochrone-radial", False), ("hernquist", True)])
def test_fit_of_an_equilibrium_is_quiet(name, free_form):
    """N = 1000, seed 33: p > 0.01 and no alarm; benchmarks/phase_mixing.py measures the rate."""
    result = fitted(mock(name, n_stars=1000, seed=33), free_form=free_form)
    assert p_value(result) > 0.01
    assert not alarms(result)


# -- replicas ------------------------------------------------------------------------------------------------


def at_map(result: FitResult, catalog: Catalog, seed: int, **parts) -> torch.Tensor:
    """A replica at the MAP, with other parts of the model."""
    model = SnapshotModel(result.model.potential, result.model.df, finder=FINDER, **parts)
    with torch.no_grad():
        return Replicator(model, catalog).draw(result.map, seed).w


def test_replicas_are_the_population(calm):
    """30 replicas at the MAP: as many stars as the catalogue; angles uniform in its potential (KS p > 0.001); actions
    have the medians of independent draws from f(J) within 5 standard errors; the seed decides."""
    catalog, result = calm
    replicas = [at_map(result, catalog, seed) for seed in range(30)]
    assert all(w.shape == catalog.w.shape for w in replicas)
    fixed = result.model.at(result.map)
    assert kstest([angle_statistic(fixed, w).p_value for w in replicas], "uniform").pvalue > 0.001
    with torch.no_grad():
        J = FINDER.actions(fixed.potential, torch.cat(replicas))
        expected = fixed.df.sample(200_000, 99)
    for k in range(3):
        below = float((J[:, k] < expected[:, k].median()).double().mean())
        assert abs(below - 0.5) < 5 * 0.5 / len(J) ** 0.5, (k, below)
    assert torch.equal(replicas[4], at_map(result, catalog, 4))
    assert not torch.equal(replicas[4], replicas[5])


def test_replicas_know_their_angles(calm):
    """J and theta as drawn are those of the stars that a selection keeps, 1e-4; with errors they are not given."""
    catalog, result = calm
    shell = SphericalShell(2.0, 30.0)
    model = SnapshotModel(result.model.potential, result.model.df, finder=SphericalActions(), selection=shell)
    fixed = model.at(result.map)
    with torch.no_grad():
        replica = Replicator(model, catalog).draw(result.map, 3)
        J, theta, _ = SphericalActions().actions_angles(fixed.potential, replica.w)
    r = torch.linalg.vector_norm(replica.w[:, :3], dim=-1)
    assert len(replica.w) == len(catalog)
    assert 2 <= float(r.min()) < float(r.max()) <= 30
    torch.testing.assert_close(replica.J, J, rtol=1e-4, atol=1e-3)
    turn = torch.remainder(replica.theta - theta + torch.pi, 2 * torch.pi) - torch.pi
    assert float(turn.abs().max()) < 1e-4
    assert replica.angle_test(fixed).statistic == pytest.approx(angle_statistic(fixed, replica.w).statistic, rel=1e-4)
    assert Replica(replica.w).angle_test(fixed).statistic == angle_statistic(fixed, replica.w).statistic


def test_orbits_beyond_the_map_are_left_out(calm):
    """A map that reaches radial actions up to 200 kpc km/s only is not asked for others; the number of stars stays."""
    catalog, result = calm

    class Short(IsochroneActions):
        def reaches(self, potential, J):
            return J[..., 0] < 200

    model = SnapshotModel(result.model.potential, result.model.df, finder=Short())
    with torch.no_grad():
        w = Replicator(model, catalog).draw(result.map, 1).w
        J = FINDER.actions(result.model.at(result.map).potential, w)
    assert len(w) == len(catalog)
    assert float(J[:, 0].max()) < 200.01


def test_replicas_obey_a_hard_selection(calm):
    """2 <= r < 8 kpc keeps a third: every replicated star is inside, their number is the catalogue's, and the inner
    profile is that of the population (median radius within 5 standard errors)."""
    catalog, result = calm
    w = at_map(result, catalog, 1, selection=SphericalShell(2.0, 8.0))
    r = torch.linalg.vector_norm(w[:, :3], dim=-1)
    assert len(w) == len(catalog)
    assert float(r.min()) >= 2
    assert float(r.max()) < 8
    whole = torch.cat([at_map(result, catalog, seed) for seed in range(10, 30)])[:, :3].norm(dim=-1)
    median = whole[(whole >= 2) & (whole < 8)].median()
    assert abs(float((r < median).double().mean()) - 0.5) < 5 * 0.5 / len(r) ** 0.5


def fade(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.exp(-torch.linalg.vector_norm(x, dim=-1) / 5)


def test_replicas_are_kept_with_probability_s(calm):
    """S = exp(-r / 5 kpc), 5000 stars: E[g S] / E[S] of g = r / (r + 3 kpc) over the population, 5 standard errors."""
    catalog, result = calm
    whole = torch.cat([at_map(result, catalog, seed) for seed in range(10, 40)])
    kept = torch.cat([at_map(result, catalog, seed, selection=Custom(fade)) for seed in range(5)])
    r, r_kept = (torch.linalg.vector_norm(w[:, :3], dim=-1) for w in (whole, kept))
    s = fade(whole[:, :3], whole[:, 3:])
    g = r_kept / (r_kept + 3)
    expected = float((s * r / (r + 3)).sum() / s.sum())
    assert abs(float(g.mean()) - expected) < 5 * float(g.std()) * (1 / 5000 + 2 / len(whole)) ** 0.5


def with_errors(catalog: Catalog, sd: float) -> Catalog:
    variance = torch.tensor([1e-8] * 3 + [sd**2] * 3, dtype=torch.float64)
    return Catalog(catalog.w, torch.diag(variance).expand(len(catalog), 6, 6))


def test_replicas_have_the_errors_of_the_catalogue(calm):
    """80 km/s per velocity component: the variance of observed replicas exceeds that of true ones by 80^2, 5 standard
    errors of 10 replicas each."""
    catalog, result = calm
    sd = 80.0
    noisy = with_errors(catalog, sd)
    seen, true = (
        torch.cat([at_map(result, noisy, seed, **parts) for seed in range(10)])[:, 3:].flatten()
        for parts in ({"errors": MeasurementErrors()}, {})
    )
    added = float(seen.var() - true.var())
    error = math.hypot(*(float((v**2).std()) / len(v) ** 0.5 for v in (seen, true)))
    assert abs(added - sd**2) < 5 * error, (added**0.5, error)
    assert error < 0.1 * sd**2


@pytest.mark.parametrize("sees", ["observed", "true"])
def test_selection_sees_observed_or_true_coordinates(calm, sees):
    """Errors of 1 kpc, r < 5 kpc: no observed star is beyond the edge if S acts on what was observed, and some are
    (true ones scattered outwards) if it acts on the truth."""
    catalog, result = calm
    variance = torch.tensor([1.0] * 3 + [1.0] * 3, dtype=torch.float64)
    blurred = Catalog(catalog.w, torch.diag(variance).expand(len(catalog), 6, 6))
    parts = {"errors": MeasurementErrors(), "selection": SphericalShell(0.0, 5.0), "selection_sees": sees}
    r = torch.linalg.vector_norm(at_map(result, blurred, 1, **parts)[:, :3], dim=-1)
    beyond = float((r >= 5).double().mean())
    assert beyond == 0 if sees == "observed" else 0.02 < beyond < 0.4


def test_a_selection_that_keeps_nothing_is_named(calm):
    """ValueError names the selection."""
    catalog, result = calm
    with pytest.raises(ValueError, match=r"SphericalShell\(.*keeps 0 of .* nothing to replicate"):
        at_map(result, catalog, 1, selection=SphericalShell(1e10, 2e10))


# -- the check -----------------------------------------------------------------------------------------------


def test_an_equilibrium_fit_passes(calm, check):
    """Shapes, observed profiles and radii as documented; every p > 0.01, no warnings; the seed decides."""
    catalog, result = calm
    assert set(check.p_values) == set(check.observed) == set(check.replicated) == STATISTICS
    for name in STATISTICS:
        shape = {"angles": (100,), "directions": (100, 5), "planes": (100, 5)}.get(name, (100, 8))
        assert check.observed[name].shape == check.replicated[name].shape == shape
    assert check.r_edges.shape == (9,)
    assert (np.diff(check.r) > 0).all()
    assert ((check.r > check.r_edges[:-1]) & (check.r < check.r_edges[1:])).all()
    np.testing.assert_array_equal(check.observed["counts"], np.full((100, 8), 125))
    assert np.ptp(check.observed["beta"], axis=0).max() == 0
    assert (check.replicated["counts"].sum(1) == 1000).all()
    assert np.ptp(check.observed["angles"]) > 0
    first = {k: v[0] for k, v in result.draws.items()}
    assert check.observed["angles"][0] == angle_statistic(result.model.at(first), catalog.w).statistic
    assert min(check.p_values.values()) > 0.01
    assert check.warnings == []


def away_from_the_plane(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (x[..., 2].abs() > 0.3 * torch.linalg.vector_norm(x, dim=-1)).double()


def test_symmetry_is_tested_through_a_selection(calm):
    """|z| > 0.3 r, 1000 of them: without replicas the directions of a sphere's stars exclude a sphere, with replicas
    they do not in two of three catalogues at least (p is uniform, and the planes of the first have 0.005), and those
    of a system 0.7 times as high do."""
    catalog, result = calm
    selection = Custom(away_from_the_plane)
    model = SnapshotModel(result.model.potential, result.model.df, finder=FINDER, selection=selection)
    posterior = Posterior.from_result(dataclasses.replace(result, model=model))
    least = []
    for seed in (1, 2, 3):
        round_ = Catalog(at_map(result, catalog, seed, selection=selection))
        assert symmetry_test(result.model, round_.w).directions.p_value < ALARM
        p_values = posterior_predictive(posterior, round_, 50, 1).p_values
        least.append(min(p_values["directions"], p_values["planes"]))
    assert sorted(least)[1] > 0.01
    flat = torch.cat([at_map(result, catalog, seed) for seed in range(2, 5)]) * torch.tensor([1, 1, 0.7] * 2)
    flat = flat[away_from_the_plane(flat[:, :3], flat[:, 3:]) > 0][:1000]
    check = posterior_predictive(posterior, Catalog(flat), 50, 1)
    assert check.p_values["directions"] < 0.01
    assert any("symmetry of the potential" in warning for warning in check.warnings)


def test_orientations_of_known_stars():
    """One star on the x axis, moving along y: x x^T - (1 - n n^T)/2 and n n^T - 1/3 by hand."""
    found = orientations(torch.tensor([[2.0, 0, 0, 0, 30, 0]], dtype=torch.float64))
    np.testing.assert_allclose(found["directions"], [0, 0, 0, 0.5**0.5, 0], atol=1e-12)
    np.testing.assert_allclose(found["planes"], [0, 0, 0, 0, 2 / 6**0.5], atol=1e-12)


def test_the_seed_decides_and_ticks_count(calm):
    """Equal seeds give equal replicas, other seeds others; one tick per draw; a large catalogue is represented by a
    subset."""
    catalog, result = calm
    few, ticks = Posterior.from_result(result), []
    one, two, other = (
        posterior_predictive(few, catalog, 50, seed, max_stars=300, tick=lambda: ticks.append(1)) for seed in (1, 1, 2)
    )
    assert len(ticks) == 150
    np.testing.assert_array_equal(one.replicated["sigma_r"], two.replicated["sigma_r"])
    assert (one.replicated["sigma_r"] != other.replicated["sigma_r"]).all()
    assert (one.replicated["counts"].sum(1) == 300).all()


def test_wrong_orbits_are_named():
    """Stars of an Osipkov-Merritt sphere with r_a = 3 kpc (N = 1000, seed 21), f(J) of a single component, which
    cannot turn from isotropic to radial: the check names the anisotropy, but not the angles, uniform for any f(J)."""
    catalog = mock("isochrone", n_stars=1000, seed=21, anisotropy_radius=3.0)
    found = posterior_predictive(Posterior.from_result(fitted(catalog, n_components=1)), catalog, 100, 1)
    assert found.p_values["beta"] < 0.01
    assert any(said.startswith("the velocity anisotropy is not reproduced (posterior predictive p = 0.005 from 100")
               for said in found.warnings)  # fmt: skip
    assert found.p_values["angles"] > 0.01
    assert not any("phase mixing" in said for said in found.warnings)


def test_a_wrong_potential_fails_the_realised_angles(calm):
    """The posterior displaced to 1.5 times the mass at the same f(J): stars move too slowly for it, the dispersions of
    the replicas are too high, and the angles, in each draw's potential, are not uniform."""
    catalog, result = calm
    draws = result.draws | {"potential.m_tot": 1.5 * result.draws["potential.m_tot"]}
    found = posterior_predictive(Posterior(result.model, draws, result.catalog), catalog, 50, 1)
    assert found.p_values["angles"] < 0.01
    assert found.p_values["sigma_t"] < 0.01
    assert (found.replicated["sigma_t"].mean(0) > found.observed["sigma_t"][0])[1:].all()
    assert any("phase mixing" in said for said in found.warnings)


def test_the_whole_of_an_unmixed_system_fails_the_check():
    """N = 1000, seed 31, a quarter of a dynamical time after the perturbation: replicas have smaller angle statistics
    than the catalogue in every draw."""
    catalog = followed(shaken(1000, 31), 0.25)
    found = posterior_predictive(Posterior.from_result(fitted(catalog)), catalog, 50, 1)
    assert found.p_values["angles"] < 0.01
    assert (found.observed["angles"] > found.replicated["angles"]).all()


def test_too_few_draws_are_refused(calm):
    """With 20 draws no p-value is below 0.02, so nothing could ever be found wrong: ValueError."""
    catalog, result = calm
    with pytest.raises(ValueError, match=r"20 draws cannot give a p-value below 0\.01"):
        posterior_predictive(Posterior.from_result(result), catalog, 20)


def test_figure_shows_every_statistic(check):
    """Seven panels with labels, units and p-values; the catalogue's points are the observed profile."""
    with plots.style():
        figure = plots.predictive_figure(check)
    panels = [ax for ax in figure.axes if ax.axison]
    assert len(panels) == 7
    names = ("counts", "sigma_r", "sigma_t", "beta", "directions", "planes", "angles")
    for ax, name in zip(panels, names, strict=True):
        assert f"p = {check.p_values[name]:.2g}" in ax.get_title()
    assert "km" in panels[1].get_ylabel()
    for name in ("sigma_t", "directions"):
        points = plots.predictive_check(Figure().subplots(), check, name).lines[-1]
        np.testing.assert_array_equal(points.get_ydata(), check.observed[name][0])


# -- in a run ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(calm, tmp_path_factory):
    return save_run(tmp_path_factory.mktemp("finished") / "run", calm[1], calm[0], model_name="isochrone")


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


@pytest.mark.usefixtures("drawn_figures")
def test_a_check_is_saved_in_the_run(run, check):
    """Groups of posterior.nc through ArviZ, p-values in attributes and in diagnostics.json, a figure; a second check
    replaces the first; the run is read back unchanged."""
    before = load_run(run)[0].draws
    path = save_predictive(run, check)
    assert path == run / "figures" / "predictive.png"
    assert path.stat().st_size > 10_000
    data = arviz.from_netcdf(str(run / "posterior.nc"), engine="h5netcdf")
    for name in STATISTICS:
        np.testing.assert_array_equal(data["posterior_predictive"][name].values[0], check.replicated[name])
        assert data["posterior_predictive"].attrs[f"p_value_{name}"] == check.p_values[name]
    np.testing.assert_array_equal(data["observed_data"]["sigma_r"].values, check.observed["sigma_r"][0])
    np.testing.assert_array_equal(data["observed_data"]["angles"].values, check.observed["angles"])
    np.testing.assert_array_equal(data["observed_data"]["r_edges"].values, check.r_edges)
    data.close()
    posterior, _, diagnosis = load_run(run)
    assert diagnosis["predictive"] == {"p_values": check.p_values, "warnings": [], "n_draws": 100}
    assert diagnosis["map_iterations"] > 0
    for name, value in before.items():
        assert torch.equal(posterior.draws[name], value)

    fewer = Predictive(
        check.r_edges[:3],
        check.r[:2],
        {k: v[:60, :2] if v.shape[1:] == (8,) else v[:60] for k, v in check.observed.items()},
        {k: v[:60, :2] if v.shape[1:] == (8,) else v[:60] for k, v in check.replicated.items()},
        check.p_values | {"beta": 0.004},
        ["the velocity anisotropy"],
    )
    save_predictive(run, fewer)
    data = arviz.from_netcdf(str(run / "posterior.nc"), engine="h5netcdf")
    assert data["posterior_predictive"]["beta"].shape == (1, 60, 2)
    assert data["posterior_predictive"].attrs["p_value_beta"] == 0.004
    assert data["observed_data"]["angles"].shape == (60,)
    data.close()
    assert load_run(run)[2]["predictive"]["warnings"] == ["the velocity anisotropy"]
    assert load_run(run)[0].n_draws == 100


@pytest.mark.parametrize("broken", ["bayespot.diagnostics.save_netcdf", "bayespot.report.plots.predictive_figure"])
def test_a_failed_save_changes_nothing(run, check, monkeypatch, broken):
    """A disk that fills up while the file or the figure is written: every file is as before, none is left over."""
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}

    def fail(*arguments):
        if "netcdf" in broken:
            arguments[1].write_bytes(b"half a file")
        raise OSError("no space left on device")

    monkeypatch.setattr(broken, fail)
    with pytest.raises(OSError, match="no space"):
        save_predictive(run, check)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert not [path for path in run.iterdir() if path.name.startswith(".")]
    load_run(run)


def test_check_and_report(run, calm):
    """`bayespot check` prints the p-values and writes the groups and the figure; `report` repeats them. A catalogue of
    another size: status 2, one message, nothing written."""
    folder = run.parent
    calm[0].write(folder / "stars.ecsv")
    calm[0][:900].write(folder / "fewer.ecsv")
    before = (run / "diagnostics.json").read_bytes()
    done = bayespot("check", "run", "fewer.ecsv", cwd=folder)
    assert done.returncode == 2
    assert "fewer.ecsv has 900 stars, run was fitted to 1000" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert (run / "diagnostics.json").read_bytes() == before
    done = bayespot("check", "run", "stars.ecsv", "--n-draws", "50", "--seed", "3", cwd=folder)
    assert done.returncode == 0, done.stderr
    # not on a terminal: a line per stage with its time
    assert [line.split(" ...")[0] for line in done.stderr.splitlines()] == ["replicating the catalogue"]
    saved = json.loads((run / "diagnostics.json").read_text())["predictive"]
    assert set(saved["p_values"]) == STATISTICS
    assert saved["n_draws"] == 50
    said = "posterior predictive p-values: " + ", ".join(f"{k} {p:.2g}" for k, p in saved["p_values"].items())
    report = bayespot("report", "run", cwd=folder)
    assert report.returncode == 0, report.stderr
    for text in (done.stdout, report.stdout):
        assert said in text
        assert "the replicas look like the catalogue" in text
    assert (run / "figures" / "predictive.png").exists()


def test_check_refuses_other_stars(run):
    """As many stars as were fitted, but others: RunError says how far both reach."""
    mock("isochrone", n_stars=1000, seed=22).write(run.parent / "other.ecsv")
    with pytest.raises(RunError, match=r"other\.ecsv reaches .* kpc, the stars that .* was fitted to"):
        check_command(run, run.parent / "other.ecsv")
