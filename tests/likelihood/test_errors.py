"""Measurement errors: samples, weights, deconvolved likelihood, latent coordinates.

Isochrone M = 1e11 Msun, b = 3 kpc, with closed-form actions; f(J) of one component fitted to a mock. Convolution
integrals are compared with quadrature over the true observables, whose Jacobian |dw/do| is that of
`bayespot.catalog.frame.galactocentric` (checked against astropy in tests/catalog/test_frame.py). Seeds fixed.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pyro
import pytest
import torch
from astropy.table import Table
from contracts.catalog import observed_table
from numpy.polynomial.hermite_e import hermegauss
from pyro import poutine
from pyro.distributions import LogNormal, Normal

from bayespot import Catalog, FitConfig, Isochrone, SnapshotModel, SphericalMixture, fit
from bayespot.actions import IsochroneActions
from bayespot.catalog import CatalogError, Observed
from bayespot.catalog.frame import galactocentric, galactocentric_w, heliocentric, proper_motion_factor
from bayespot.likelihood import Chain, Custom, HeliocentricDistance, MeasurementErrors
from bayespot.likelihood.errors import ErrorScatter, roots
from bayespot.likelihood.phase_mixed import ObservedStars, PhaseMixed, effective_samples
from bayespot.mock import mock, observe
from bayespot.potential import Plummer
from bayespot.pyro_modules import freeze

POTENTIAL = Isochrone(m_tot=1e11, r_s=3.0)
TRUE = mock("isochrone", tracers=Plummer(1.0, 4.0), n_stars=2000, seed=3)


def population(potential: Isochrone, w: torch.Tensor) -> SphericalMixture:
    """f(J) of one component, its sites fixed at the best fit to stars in a potential."""
    J = IsochroneActions().actions(potential, w)
    df = SphericalMixture().resolved(1, J)
    return freeze(df, df.fit_actions(J, seed=0))


DF = population(POTENTIAL, TRUE.w)
DENSITY = PhaseMixed(POTENTIAL, IsochroneActions(), DF)
#: |dw/do| = CONSTANT d^4 for angles in deg, distance in kpc and proper motions in mas/yr.
CONSTANT = (proper_motion_factor() * math.pi / 180) ** 2
#: A few stars 3 to 9 kpc from the centre.
FEW = TRUE[[i for i, r in enumerate(TRUE.x.norm(dim=-1)) if 3 < r < 9][:4]]


def catalogue(stars: Catalog, missing: tuple[str, ...] = (), far: str = "distance", **columns: float) -> Catalog:
    """Stars as a table of heliocentric columns with errors (those of distances relative), read as users do.

    Every second star has no value in the ``missing`` columns.
    """
    table = Table(heliocentric(stars.w.numpy()))
    if far == "parallax":
        table["parallax"] = 1 / table["distance"]
        del table["distance"]
    for name, value in columns.items():
        relative = name in ("distance_error", "parallax_error")
        table[name] = value * table[name.removesuffix("_error")] if relative else np.full(len(stars), value)
    for name in missing:
        table[name][::2] = np.nan
    return Catalog.from_table(table, check_offset=False, allow_missing=bool(missing))


def log_mean(errors: MeasurementErrors, catalog: Catalog, seed: int = 1) -> torch.Tensor:
    """The deconvolved log-likelihood of each star."""
    with torch.no_grad():
        return ObservedStars(DENSITY).log_prob(errors.samples(catalog, seed))


def integral(values: dict[str, float], axes: dict[str, tuple[np.ndarray, np.ndarray]], root=None) -> float:
    """Sum of weight times f |dw/do| over the product of nodes of the named observables, the rest as in values.

    An axis is (nodes, weights); with ``root`` the axes pmra and pmdec are standard normal and correlated by it.
    """
    names = list(axes)
    grid = np.array(list(itertools.product(*(axes[n][0] for n in names)))).T
    weight = np.prod(list(itertools.product(*(axes[n][1] for n in names))), axis=1)
    o = {n: np.full(grid.shape[1], v) for n, v in values.items()} | dict(zip(names, grid, strict=True))
    if root is not None:
        shift = root @ np.stack([o["pmra"], o["pmdec"]])
        o["pmra"], o["pmdec"] = values["pmra"] + shift[0], values["pmdec"] + shift[1]
    w, jacobian = galactocentric(o)
    p = DENSITY.log_prob(torch.as_tensor(w)).exp().detach().numpy()
    return float((weight * p * np.exp(np.linalg.slogdet(jacobian)[1])).sum())


def hermite(n: int, mean: float = 0.0, sd: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights of the average over a Gaussian."""
    x, weight = hermegauss(n)
    return mean + sd * x, weight / weight.sum()


def trapezoid(low: float, high: float, n: int) -> tuple[np.ndarray, np.ndarray]:
    x = np.linspace(low, high, n)
    weight = np.full(n, x[1] - x[0])
    weight[[0, -1]] /= 2
    return x, weight


def gaussian(x: np.ndarray, sd: float) -> np.ndarray:
    return np.exp(-((x / sd) ** 2) / 2) / (sd * math.sqrt(2 * math.pi))


# --- the convolution integral


def test_likelihood_with_galactocentric_covariances():
    """ln mean_s f(w_is) of 8192 samples against 2e5 independent draws of N(w_i, C_i), within 0.04 (4 errors);
    C is correlated, with errors of about 0.3 kpc and 12 km/s per axis."""
    rng = np.random.default_rng(0)
    A = rng.normal(size=(len(FEW), 6, 6))
    scale = np.array([0.3, 0.3, 0.3, 12.0, 12.0, 12.0])
    C = scale[:, None] * (A @ A.transpose(0, 2, 1)) / 6 * scale
    found = log_mean(MeasurementErrors(n_samples=8192), Catalog(FEW.w, torch.as_tensor(C)))
    noise = np.einsum("nij,nsj->nsi", np.linalg.cholesky(C), rng.standard_normal((len(FEW), 200_000, 6)))
    expected = DENSITY.log_prob(FEW.w[:, None] + torch.as_tensor(noise)).exp().mean(1).log()
    assert torch.allclose(found, expected.detach(), atol=0.04, rtol=0), (found, expected)
    assert not torch.allclose(found, DENSITY.log_prob(FEW.w).detach(), atol=0.08, rtol=0)


@pytest.mark.parametrize("far", ["distance", "parallax"])
def test_likelihood_with_heliocentric_errors(far):
    """ln mean_s f(w_is) |dw/do|_is of 4096 samples against quadrature over the true distance (in d itself, with the
    density of the observed ln d or parallax), correlated proper motions and radial velocity, within 0.02."""
    s, sd, c, sd_v = 0.15, 0.4, -0.7, 10.0
    catalog = catalogue(
        FEW,
        far=far,
        **{f"{far}_error": s},
        pmra_error=sd,
        pmdec_error=sd,
        pmra_pmdec_corr=c,
        radial_velocity_error=sd_v,
    )
    found = log_mean(MeasurementErrors(n_samples=4096), catalog)
    root = sd * np.linalg.cholesky([[1, c], [c, 1]])
    observed = heliocentric(FEW.w.numpy())
    for i in range(len(FEW)):
        values = {name: float(column[i]) for name, column in observed.items()}
        d_seen = values["distance"]
        d, step = trapezoid(d_seen * math.exp(-5 * s), d_seen * math.exp(8 * s), 201)
        seen = gaussian(np.log(d_seen / d), s) if far == "distance" else gaussian(1 / d - 1 / d_seen, s / d_seen)
        axes = {"distance": (d, step * seen), "pmra": hermite(7), "pmdec": hermite(7)}
        axes["radial_velocity"] = hermite(3, values["radial_velocity"], sd_v)
        expected = math.log(integral(values, axes, root) / CONSTANT)
        assert abs(float(found[i]) - expected) < 0.02, (i, float(found[i]), expected)


def test_missing_radial_velocity_is_integrated_over():
    """ln mean over 8192 samples against the average over the range by quadrature, within 0.03, with proper motions
    correlated by 0.9 (their noise must not follow the radial velocity's); stars that have one keep it."""
    c, sd = 0.9, 0.5
    catalog = catalogue(
        FEW,
        ("radial_velocity",),
        pmra_error=sd,
        pmdec_error=sd,
        pmra_pmdec_corr=c,
        radial_velocity_error=1.0,
        pmra_radial_velocity_corr=0.3,
    )
    errors = MeasurementErrors(n_samples=8192, v_r_range=(-500.0, 550.0))
    found = log_mean(errors, catalog)
    root = sd * np.linalg.cholesky([[1, c], [c, 1]])
    observed = heliocentric(FEW.w.numpy())
    samples = errors.samples(catalog, 1)
    v_r = heliocentric(samples[..., :6].numpy())["radial_velocity"]
    for i in (0, 2):
        assert v_r[i].min() < -499
        assert v_r[i].max() > 549
        assert abs(np.ptp(v_r[i + 1])) < 12
        values = {name: float(column[i]) for name, column in observed.items()}
        axes = {"radial_velocity": trapezoid(-500, 550, 401), "pmra": hermite(9), "pmdec": hermite(9)}
        # per ln d, in which errors of distances are Gaussian
        expected = math.log(values["distance"] * integral(values, axes, root) / CONSTANT / 1050)
        assert abs(float(found[i]) - expected) < 0.03, (i, float(found[i]), expected)


def test_missing_distance_is_integrated_over():
    """The prior is flat in d over its range: int f |dw/do| dd by quadrature, up to the constant ln(high/low) of
    sampling in ln d, within 0.04 for 16384 samples."""
    columns = {"distance_error": 0.1, "pmra_error": 0.4, "radial_velocity_error": 8.0}
    # a correlation with what is missing must not tie the proper motion to the distance that is drawn
    catalog = catalogue(FEW, ("distance",), **columns, distance_pmra_corr=0.9)
    low, high = 2.0, 40.0
    found = log_mean(MeasurementErrors(n_samples=16_384, distance_range=(low, high)), catalog)
    observed = heliocentric(FEW.w.numpy())
    for i in (0, 2):
        values = {name: float(column[i]) for name, column in observed.items()}
        axes = {
            "distance": trapezoid(low, high, 2001),
            "pmra": hermite(9, values["pmra"], 0.4),
            "radial_velocity": hermite(5, values["radial_velocity"], 8.0),
        }
        expected = math.log(integral(values, axes) / CONSTANT / math.log(high / low))
        assert abs(float(found[i]) - expected) < 0.04, (i, float(found[i]), expected)


def test_deconvolved_density_integrates_to_one():
    """int p(o) do over observed data = 1: 6000 data from a wider population in a deeper potential, whose density in o
    is its f times |dw/do|; 16 samples of each. Error below 0.03, agreement within 3 of them."""
    wide = Isochrone(m_tot=3e11, r_s=4.0)
    chain = Chain(wide, population(wide, TRUE.w * torch.tensor([1.3] * 3 + [1.6] * 3)), IsochroneActions())
    with torch.no_grad():
        stars = chain.augment(6000, seed=5)
        o = heliocentric(stars.w.numpy())
        d = torch.as_tensor(o["distance"])
        sd = torch.tensor([0.0, 0.0, 0.15, 0.1, 0.1, 5.0]).double().expand(len(d), 6).clone()
        sd[:, 2] *= d
        observed = Observed(tuple(o), torch.as_tensor(np.stack(list(o.values()), -1)), torch.diag_embed(sd**2))
        p = log_mean(MeasurementErrors(n_samples=16), Catalog(stars.w, observed=observed))
        # both densities per ln d, CONSTANT in common
        ratio = len(d) * stars.weight * (p - chain.log_density(stars.w) - 5 * d.log()).exp()
    error = float(ratio.std()) / len(d) ** 0.5
    assert error < 0.03
    assert abs(float(ratio.mean()) - 1) < 3 * error, (float(ratio.mean()), error)


# --- samples and weights


@pytest.mark.parametrize("far", ["distance", "parallax"])
def test_weight_is_the_jacobian(far):
    """The log-weight of a placed star is ln |dw/do| by autograd, o = (ra cos dec, dec, ln d or parallax, ...), less one
    constant for all stars and samples; to 1e-9."""
    errors = {f"{far}_error": 0.2, "pmra_error": 0.3, "pmdec_error": 0.3, "radial_velocity_error": 5.0}
    catalog = catalogue(FEW, far=far, **errors)
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(len(FEW), 5, 6, generator=generator, dtype=torch.float64).clamp(-2, 2)
    placed = MeasurementErrors().place(catalog, z).reshape(-1, 7)
    o = {name: torch.as_tensor(value) for name, value in heliocentric(placed[:, :6].numpy()).items()}
    columns = list(o.values())
    columns[2] = 1 / o["distance"] if far == "parallax" else o["distance"].log()

    def w_of(one: torch.Tensor) -> torch.Tensor:
        names = list(o)
        parts = dict(zip(names, one.unbind(-1), strict=True))
        parts["distance"] = 1 / one[2] if far == "parallax" else one[2].exp()
        return galactocentric_w(parts)

    jacobian = torch.stack([torch.autograd.functional.jacobian(w_of, one) for one in torch.stack(columns, -1)])
    expected = torch.linalg.slogdet(jacobian).logabsdet - torch.deg2rad(o["dec"]).cos().log() + math.log(1 / CONSTANT)
    assert torch.allclose(placed[:, 6], expected, atol=1e-9)
    assert float(placed[:, 6].max() - placed[:, 6].min()) > 1


def test_samples_have_the_catalogues_covariance():
    """Weighted covariance of the observables of 16384 samples, in units of the standard errors, to 0.02;
    correlations between ra and dec and between the proper motions up to 0.8."""
    table = observed_table(4, seed=2)
    catalog = Catalog.from_table(table, check_offset=False)
    observed = catalog.observed
    sd = observed.covariance.diagonal(dim1=1, dim2=2).sqrt()
    samples = MeasurementErrors(n_samples=16_384).samples(catalog, seed=4)
    o = heliocentric(samples[..., :6].numpy())
    ln_d = torch.as_tensor(o["distance"]).log()
    weight = torch.softmax(samples[..., 6] - 5 * ln_d, -1)
    x = torch.as_tensor(np.stack(list(o.values()), -1)) - observed.values[:, None]
    x[..., 0] *= torch.deg2rad(observed.values[:, 1]).cos()[:, None]
    x[..., 2] = (ln_d - observed.values[:, 2, None].log()) * observed.values[:, 2, None]
    x = x / sd[:, None]
    assert torch.allclose(torch.einsum("ns,nsi->ni", weight, x), torch.zeros(6).double(), atol=0.03)
    found = torch.einsum("ns,nsi,nsj->nij", weight, x, x)
    expected = observed.covariance / (sd[:, :, None] * sd[:, None, :])
    assert torch.allclose(found, expected, atol=0.02), float((found - expected).abs().max())


def test_roots_are_triangular():
    """R R^T = C to rounding, also for variances of zero and correlations of one; no error moves an earlier observable,
    and what has no variance neither moves nor is moved."""
    C = Catalog.from_table(observed_table(20), check_offset=False).observed.covariance.clone()
    C[3] = 0.0
    C[4, 2], C[4, :, 2] = 0.0, 0.0
    C[5, 3, 4] = C[5, 4, 3] = (C[5, 3, 3] * C[5, 4, 4]).sqrt()
    R = roots(C)
    scale = C.diagonal(dim1=1, dim2=2).sqrt().clamp(min=1e-12)
    assert float(((R @ R.mT - C) / (scale[:, :, None] * scale[:, None, :])).abs().max()) < 1e-7
    assert float(R.triu(1).abs().max()) == 0
    assert float(R.diagonal(dim1=1, dim2=2).min()) >= 0
    assert float(R[4, 2].abs().max()) == float(R[4, :, 2].abs().max()) == 0


def test_no_errors_give_the_star():
    """Without variance every sample is w, to 1e-9 of its size, with weight one (Galactocentric) or d^5."""
    samples = MeasurementErrors(n_samples=8).samples(Catalog(FEW.w, torch.zeros(len(FEW), 6, 6)), 0)
    assert torch.equal(samples[..., :6], FEW.w[:, None].expand(-1, 8, -1))
    assert float(samples[..., 6].abs().max()) < 1e-12
    samples = MeasurementErrors(n_samples=8).samples(catalogue(FEW, radial_velocity_error=0.0), 0)
    assert torch.allclose(samples[..., :6], FEW.w[:, None], rtol=1e-9, atol=1e-9)
    d = torch.as_tensor(heliocentric(FEW.w.numpy())["distance"])
    assert torch.allclose(samples[..., 6], 5 * d.log()[:, None], atol=1e-9)


def test_wide_velocity_errors_are_sampled_where_stars_are_bound():
    """Errors of 300 km/s on every axis, four times the dispersion: the mean importance weight is one within 0.03 and
    none exceeds four; effective samples are more than five times those of the errors alone, in the median."""
    C = torch.diag_embed(torch.tensor([0.1, 0.1, 0.1, 3e2, 3e2, 3e2]).double() ** 2).expand(50, 6, 6)
    noise = torch.randn(50, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    catalog = Catalog(TRUE.w[:50] + noise * C.diagonal(dim1=1, dim2=2).sqrt(), C)
    # that the stars' true spread is known, as from stars with better velocities
    whole = Catalog(torch.cat([catalog.w, TRUE.w[50:150]]), torch.cat([C, torch.zeros(100, 6, 6)]))
    errors = MeasurementErrors(n_samples=4000)
    samples = errors.samples(whole, 0)[:50]
    weight = samples[..., 6].exp()
    assert float((weight.mean(1) - 1).abs().max()) < 0.03
    assert float(weight.max()) < 4.0001
    z = torch.randn(50, 4000, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    with torch.no_grad():
        drawn, plain = (effective_samples(DENSITY, s).median() for s in (samples, errors.place(catalog, z)))
    assert float(drawn) > 5 * float(plain), (drawn, plain)


def test_effective_samples():
    """Between 1 and S = 64; above 0.99 S for errors of 1e-4, below S / 4 for errors as large as the coordinates."""
    S = 64
    for size, low, high in ((1e-4, 0.99 * S, S), (1.0, 1.0, S / 4)):
        C = torch.diag_embed((size * torch.tensor([8.0, 8.0, 8.0, 200.0, 200.0, 200.0]).double()) ** 2)
        catalog = Catalog(FEW.w, C.expand(len(FEW), 6, 6))
        with torch.no_grad():
            n_eff = effective_samples(DENSITY, MeasurementErrors(n_samples=S).samples(catalog, 0))
        assert float(n_eff.min()) >= 1
        assert float(n_eff.max()) <= S * (1 + 1e-12)
        assert low <= float(n_eff.median()) <= high, (size, n_eff)


def test_same_seed_same_samples():
    """Samples are drawn once: the seed decides, and chunks of the catalogue do not matter for what star is where."""
    errors, catalog = MeasurementErrors(n_samples=4), catalogue(FEW, distance_error=0.1)
    assert torch.equal(errors.samples(catalog, 3), errors.samples(catalog, 3))
    assert not torch.equal(errors.samples(catalog, 3), errors.samples(catalog, 4))


# --- scatter


def test_scatter_has_the_catalogues_errors():
    """What `ErrorScatter` adds to 4000 stars: standard deviations within 5 %, correlation -0.6 of the proper motions
    within 0.05, relative errors in ln d; errors that grow with distance follow the star's own distance."""
    stars = mock("isochrone", tracers=Plummer(1.0, 4.0), n_stars=4000, seed=8)
    columns = {"distance_error": 0.1, "pmra_error": 0.3, "pmdec_error": 0.2, "radial_velocity_error": 5.0}
    catalog = catalogue(TRUE, **columns, pmra_pmdec_corr=-0.6)
    true, seen = (heliocentric(w.numpy()) for w in (stars.w, ErrorScatter(catalog)(stars.w, seed=1)))
    noise = {name: seen[name] - true[name] for name in true}
    ln_d = np.log(seen["distance"] / true["distance"])
    for value, sd in ((ln_d, 0.1), (noise["pmra"], 0.3), (noise["pmdec"], 0.2), (noise["radial_velocity"], 5.0)):
        assert abs(value.std() / sd - 1) < 0.05
        assert abs(value.mean()) < 4 * sd / 4000**0.5
    assert abs(np.corrcoef(noise["pmra"], noise["pmdec"])[0, 1] + 0.6) < 0.05
    assert abs(noise["ra"]).max() < 1e-9
    table = Table(heliocentric(TRUE.w.numpy()))
    table["pmra_error"] = 0.02 * table["distance"]
    seen = heliocentric(ErrorScatter(Catalog.from_table(table, check_offset=False))(stars.w, seed=1).numpy())
    ratio = (seen["pmra"] - true["pmra"]) / (0.02 * true["distance"])
    far = true["distance"] > np.median(true["distance"])
    assert abs(ratio[far].std() - 1) < 0.06
    assert abs(ratio[~far].std() - 1) < 0.06


def test_scatter_in_parallax():
    """Relative noise of 10 % in the parallax: standard deviation within 8 %, mean zero within 4 errors."""
    seen = heliocentric(ErrorScatter(catalogue(TRUE, far="parallax", parallax_error=0.1))(TRUE.w, seed=1).numpy())
    ratio = heliocentric(TRUE.w.numpy())["distance"] / seen["distance"] - 1
    assert abs(ratio.std() / 0.1 - 1) < 0.08
    assert abs(ratio.mean()) < 4 * 0.1 / 2000**0.5


def test_scatter_with_galactocentric_covariances():
    """Covariance of what is added, in units of its standard deviations, within 0.06 of the catalogue's."""
    A = np.random.default_rng(1).normal(size=(6, 6))
    C = torch.as_tensor(A @ A.T)
    added = ErrorScatter(Catalog(TRUE.w, C.expand(len(TRUE), 6, 6)))(TRUE.w, seed=2) - TRUE.w
    sd = C.diagonal().sqrt()
    assert torch.allclose(added.T.cov() / sd / sd[:, None], C / sd / sd[:, None], atol=0.06)


def test_mock_observations_scatter_as_they_say():
    """Noise over the standard error of 2000 observed stars: mean zero and standard deviation one within 4 errors for
    ln d, proper motions and radial velocity; the angles are exact."""
    noisy = observe(TRUE, 9, distance_error=0.15, pm_error=0.2, v_error=7.0)
    true, seen = (
        heliocentric(TRUE.w.numpy()),
        dict(zip(noisy.observed.names, noisy.observed.values.numpy().T, strict=True)),
    )
    sd = dict(zip(seen, noisy.observed.covariance.diagonal(dim1=1, dim2=2).sqrt().numpy().T, strict=True))
    for name in ("distance", "pmra", "pmdec", "radial_velocity"):
        if name == "distance":
            ratio = np.log(seen[name] / true[name]) * seen[name] / sd[name]
        else:
            ratio = (seen[name] - true[name]) / sd[name]
        assert abs(ratio.mean()) < 4 / 2000**0.5, name
        assert abs(ratio.std() - 1) < 4 / 4000**0.5, name
    assert sd["ra"].max() == sd["dec"].max() == 0
    assert abs(seen["ra"] - true["ra"]).max() < 1e-9


# --- fits


def parametric(catalog: Catalog, errors: MeasurementErrors | None, **options) -> SnapshotModel:
    """Isochrone with free mass and scale, closed-form actions."""
    wide = torch.tensor(1.0, dtype=torch.float64)
    mass, scale = (LogNormal(torch.tensor(math.log(x), dtype=torch.float64), wide) for x in (2e11, 2.0))
    return SnapshotModel(
        Isochrone(mass, scale), SphericalMixture(), finder=IsochroneActions(), errors=errors, **options
    )


LAPLACE = FitConfig(seed=1, n_components=1, guide="laplace", n_draws=400, k_hat_draws=20)


def test_fit_deconvolves():
    """N = 1500 Plummer tracers with 20 % in distance, 0.1 mas/yr and 5 km/s: ln M and ln b within 4 sd when errors are
    modelled (64 samples), ln M off by more than 8 sd when they are ignored."""
    true = mock("isochrone", tracers=Plummer(1.0, 4.0), n_stars=1500, seed=21)
    catalog = observe(true, 22, distance_error=0.2, pm_error=0.1, v_error=5.0)
    z = {}
    for name, errors in (("modelled", MeasurementErrors(n_samples=64)), ("ignored", None)):
        result = fit(parametric(catalog, errors), catalog, LAPLACE)
        for site, truth in (("m_tot", 1e11), ("r_s", 3.0)):
            x = result.draws[f"potential.{site}"].log()
            z[name, site] = float((x.mean() - math.log(truth)) / x.std())
        if errors:
            least, low, median = result.diagnostics.error_samples
            assert 1 <= least <= low <= median <= 64
            assert median > 16
    assert abs(z["modelled", "m_tot"]) < 4, z
    assert abs(z["modelled", "r_s"]) < 4, z
    assert abs(z["ignored", "m_tot"]) > 8, z


def test_few_effective_samples_are_reported():
    """Six samples within errors of 40 % in distance: the warning counts the stars and names the remedy."""
    true = mock("isochrone", tracers=Plummer(1.0, 4.0), n_stars=200, seed=31)
    catalog = observe(true, 32, distance_error=0.4, pm_error=0.3, v_error=5.0)
    found = fit(parametric(catalog, MeasurementErrors(n_samples=6)), catalog, LAPLACE).diagnostics
    assert found.error_samples[2] < 5
    assert any("effective samples of 6" in text and "raise n_samples" in text for text in found.warnings)


# --- latent true coordinates


def latent(catalog: Catalog) -> SnapshotModel:
    """The mass alone is free; sd of its prior in ln M is 0.3."""
    prior = LogNormal(torch.tensor(math.log(1.1e11), dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64))
    errors = MeasurementErrors(method="latent")
    return SnapshotModel(Isochrone(prior, 3.0), DF, finder=IsochroneActions(), errors=errors)


def test_latent_log_joint():
    """The trace's log joint of mass and true observables, against prior + N(z) + ln f(w(o)) + 5 ln d by hand, to
    1e-9 of its size; uncorrelated errors, so that z is the noise in standard deviations."""
    catalog = observe(TRUE[:20], 5, distance_error=0.1, pm_error=0.1, v_error=5.0)
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(20, 6, generator=generator, dtype=torch.float64)
    m = torch.tensor(0.9e11, dtype=torch.float64)
    model = latent(catalog)
    conditioned = poutine.condition(model.latent_model(catalog), {"potential.m_tot": m, "stars.truth": z})
    trace = poutine.trace(conditioned).get_trace()
    assert set(trace.stochastic_nodes) <= {"stars.plate"}
    assert set(trace.observation_nodes) == {"potential.m_tot", "stars.truth", "stars.density"}
    o = dict(zip(catalog.observed.names, catalog.observed.values.numpy().T.copy(), strict=True))
    o["distance"] = o["distance"] * np.exp(0.1 * z[:, 2].numpy())
    for j, (name, sd) in enumerate((("pmra", 0.1), ("pmdec", 0.1), ("radial_velocity", 5.0)), 3):
        o[name] = o[name] + sd * z[:, j].numpy()
    w, _ = galactocentric(o)
    fixed = model.at({"potential.m_tot": m})
    expected = model.sites()["potential.m_tot"].log_prob(m) + Normal(0.0, 1.0).log_prob(z).sum()
    expected = (
        expected + (fixed.true_density().log_prob(torch.as_tensor(w)) + 5 * torch.as_tensor(o["distance"]).log()).sum()
    )
    assert math.isclose(float(trace.log_prob_sum()), float(expected), rel_tol=1e-9)


@pytest.mark.slow
def test_latent_posterior_is_the_marginal_one():
    """NUTS over ln M and the true observables of 20 stars, 600 draws, against the marginal likelihood (4096 samples) on
    a grid of ln M: means within 0.25 sd, sd within 20 % (Monte-Carlo errors about 0.06 sd and 5 %)."""
    catalog = observe(TRUE[:20], 5, distance_error=0.2, pm_error=0.2, v_error=5.0)
    model = latent(catalog)
    data = MeasurementErrors(n_samples=4096).samples(catalog, 0)
    grid = torch.linspace(math.log(1e11) - 1.5, math.log(1e11) + 1.5, 151, dtype=torch.float64)
    prior = model.sites()["potential.m_tot"]
    with torch.no_grad():
        log_p = torch.stack(
            [model.at({"potential.m_tot": x.exp()}).log_prob(data).sum() + prior.log_prob(x.exp()) + x for x in grid]
        )
    weight = torch.softmax(log_p, 0)
    mean = float((weight * grid).sum())
    sd = float((weight * (grid - mean) ** 2).sum().sqrt())
    pyro.set_rng_seed(1)
    kernel = pyro.infer.NUTS(model.latent_model(catalog), max_tree_depth=6)
    mcmc = pyro.infer.MCMC(kernel, num_samples=600, warmup_steps=200, disable_progbar=True)
    mcmc.run()
    ln_m = mcmc.get_samples()["potential.m_tot"].log()
    assert abs(float(ln_m.mean()) - mean) < 0.25 * sd, (float(ln_m.mean()), mean, sd)
    assert abs(float(ln_m.std()) / sd - 1) < 0.2, (float(ln_m.std()), sd)


# --- refusals


def test_a_covariance_that_is_not_positive_definite_is_refused(tmp_path):
    """From an array, Galactocentric columns and correlation columns of a file: the row and the remedy are named."""
    C = torch.eye(6, dtype=torch.float64).repeat(len(TRUE), 1, 1)
    C[7, 0, 1] = C[7, 1, 0] = 1.5
    with pytest.raises(CatalogError, match=r"not positive definite, the first in row 7 .* drop the star"):
        Catalog(TRUE.w, C)
    table = Catalog(TRUE.w, torch.eye(6).expand(len(TRUE), 6, 6)).to_table()
    table["cov_x_y"][7] *= 0
    table["cov_x_y"][7] += 1.5 * table["cov_x_y"].unit
    table.write(tmp_path / "broken.fits")
    with pytest.raises(CatalogError, match=r"broken.fits: .*not positive definite, the first in row 7 .* drop"):
        Catalog.read(tmp_path / "broken.fits")
    table = observed_table(30)
    for name in ("distance_pmra_corr", "distance_pmdec_corr", "pmra_pmdec_corr"):
        table[name] = 0.0
        table[name][4] = -0.9
    table.write(tmp_path / "corr.fits")
    with pytest.raises(CatalogError, match=r"\*_corr: row 4 .*correct the \*_corr columns or remove them"):
        Catalog.read(tmp_path / "corr.fits", check_offset=False)


def test_a_covariance_of_observables_is_checked():
    """Negative definite errors of the observables given in Python are refused, too."""
    catalog = catalogue(FEW, distance_error=0.1)
    C = catalog.observed.covariance.clone()
    C[2, 5, 5] = -1.0
    with pytest.raises(CatalogError, match=r"covariance of the observables: .* row 2"):
        Catalog(catalog.w, catalog.covariance, observed=Observed(catalog.observed.names, catalog.observed.values, C))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"n_samples": 1}, "at least 2, got 1"),
        ({"method": "mean"}, "'marginal' or 'latent', got 'mean'"),
        ({"v_r_range": (5.0, 5.0)}, r"v_r_range must increase, got \(5.0, 5.0\)"),
        ({"distance_range": (0.0, 5.0)}, "distance_range must be positive"),
        ({"distance_range": (6.0, 5.0)}, "distance_range must be positive and increase"),
    ],
)
def test_wrong_settings_are_refused(options, words):
    """The message has the value received."""
    with pytest.raises(ValueError, match=words):
        MeasurementErrors(**options)


def test_wrong_uses_are_refused():
    """No errors in the catalogue; latent coordinates in a fit, and the reverse; a negative error of a mock."""
    with pytest.raises(ValueError, match="the catalogue has none; add"):
        fit(parametric(TRUE, MeasurementErrors()), TRUE, LAPLACE)
    with pytest.raises(ValueError, match="no measurement errors to scatter"):
        ErrorScatter(TRUE)
    noisy = observe(TRUE, 1)
    with pytest.raises(ValueError, match=r"latent_model\(catalog\)"):
        fit(parametric(noisy, MeasurementErrors(method="latent")), noisy, LAPLACE)
    with pytest.raises(ValueError, match="method='latent'"):
        parametric(noisy, MeasurementErrors()).latent_model(noisy)
    with pytest.raises(ValueError, match="v_error must not be negative, got -1"):
        observe(TRUE, 1, v_error=-1.0)


def test_place_holders_are_no_data():
    """A model without errors refuses stars that lack a radial velocity: their place holders are not measurements."""
    catalog = catalogue(FEW, ("radial_velocity",), radial_velocity_error=1.0)
    with pytest.raises(ValueError, match=r"2 of 4 stars have no .*radial velocity.*MeasurementErrors"):
        parametric(catalog, None).prepare(catalog)


def _too_large(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return 1.0 + 0.1 * (x[..., 0] > 0)


@pytest.mark.parametrize("sees", ["observed", "true"])
def test_wrong_selections_are_refused_by_the_model(sees):
    """S outside [0, 1], and stars of the catalogue that S rejects (wherever they may be if S sees the truth)."""
    noisy = observe(FEW, 1, distance_error=0.01)
    options = {"errors": MeasurementErrors(n_samples=4), "selection_sees": sees}
    with pytest.raises(ValueError, match=r"S = 1.1 .*between 0 and 1"):
        parametric(noisy, selection=Custom(_too_large), **options).prepare(noisy)
    with pytest.raises(ValueError, match=r"HeliocentricDistance.* rejects .*counting from 0.*correct the selection"):
        parametric(noisy, selection=HeliocentricDistance(1.0), **options).prepare(noisy)


@pytest.mark.parametrize("parallax", [-0.15, -0.03, 0.0, 0.06, 2.0])
def test_parallaxes_below_zero(parallax):
    """A parallax of any sign, with an error of 0.05 mas: the average of a density of ln d over the samples is its
    integral over the positive parallaxes, to 2 %; none of the samples is lost."""
    columns = {"ra": 40.0, "dec": 20.0, "parallax": parallax, "pmra": 1.0, "pmdec": -2.0, "radial_velocity": 30.0}
    rows = {name: [value, value] for name, value in columns.items()}
    rows["parallax"], rows["ra"], rows["pmra"] = [parallax, 1.0], [40.0, 80.0], [1.0, 3.0]
    table = Table(rows | {"parallax_error": [0.05, 0.05]})
    catalog = Catalog.from_table(table, allow_missing=True, check_offset=False)
    samples = MeasurementErrors(n_samples=8192).samples(catalog, seed=0)[0]
    assert torch.isfinite(samples[:, 6]).all()
    sun = torch.tensor(catalog.frame.sun, dtype=torch.float64)
    d = torch.linalg.vector_norm(samples[:, :3] - sun, dim=-1)

    def density(d):
        centre = math.log(0.5 if parallax > 1 else 12.0)
        return torch.exp(-0.5 * ((d.log() - centre) / 0.4) ** 2) * d**-6

    found = float((samples[:, 6].exp() * density(d)).mean())
    p = torch.linspace(1e-4, 3, 400_001, dtype=torch.float64)
    normal = torch.exp(-0.5 * ((p - parallax) / 0.05) ** 2) / (0.05 * math.sqrt(2 * math.pi))
    expected = float(torch.trapezoid(normal * p**-6 * density(1 / p), p))
    assert found == pytest.approx(expected, rel=0.02)
