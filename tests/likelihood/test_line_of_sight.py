"""Line-of-sight velocities given positions on the sky: their density against closed forms, and a fit.

In an isochrone sphere (M = 1e11 Msun, b = 3 kpc) f = (-E)^m has the density of v_los at R
p ~ int dz (Psi - v^2/2)^(m + 1), Psi = -Phi; f = L (-E)^m is integrated over the velocities across by brute force.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from astropy import units
from astropy.coordinates import SkyCoord, SkyOffsetFrame
from astropy.table import QTable
from bayespot.models import dwarf_spheroidal
from scipy.integrate import quad

from bayespot import Catalog, FitConfig, LogisticGaussianProcess, MassSlopeNetwork, Posterior, SnapshotModel, fit
from bayespot.actions import IsochroneActions
from bayespot.catalog import CatalogError, ProjectedCatalog
from bayespot.df import SphericalMixture
from bayespot.inference.checkpoint import Checkpoints
from bayespot.inference.latent import LatentSpace
from bayespot.inference.marginal import MarginalPosterior
from bayespot.inference.optimise import count_unbound
from bayespot.likelihood import LineOfSight, MeasurementErrors
from bayespot.likelihood.line_of_sight import BackgroundAlongLine, LineOfSightVelocities
from bayespot.likelihood.phase_mixed import ObservedStars, PhaseMixed
from bayespot.likelihood.sky_lattice import SkyLattice
from bayespot.mock import MOCKS, mock
from bayespot.potential import Isochrone, MiyamotoNagai, truth_field
from bayespot.storage import describe
from bayespot.units import G

M, B, INDEX = 1e11, 3.0, 2.5
POTENTIAL = Isochrone(m_tot=M, r_s=B)
F64 = torch.float64


def known(velocity: float = 0.0, ln_distance: float = 0.0, **more: object) -> SimpleNamespace:
    """A `LineOfSight` with fixed sites."""
    own = {"velocity": torch.tensor(velocity, dtype=F64), "ln_distance": torch.tensor(ln_distance, dtype=F64)}
    return SimpleNamespace(**(own | {"distance_error": abs(ln_distance), "binaries": False} | more))


KNOWN = known()


def energy(J: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """E and L of actions in the isochrone (Binney & Tremaine 2008, equation 3.226)."""
    L = J[..., 1].abs() + J[..., 2]
    reach = J[..., 0] + (L + (L**2 + 4 * G * M * B).sqrt()) / 2
    return -((G * M) ** 2) / (2 * reach**2), L


def population(tangential: bool) -> PhaseMixed:
    def log_f(J: torch.Tensor) -> torch.Tensor:
        E, L = energy(J)
        return INDEX * (-E).log() + (L.log() if tangential else 0.0)

    return PhaseMixed(POTENTIAL, IsochroneActions(), SimpleNamespace(log_prob=log_f, symmetry="spherical"))


def psi(r):
    return G * M / (B + np.sqrt(B**2 + r**2))


def isotropic(R: float, v: np.ndarray) -> np.ndarray:
    """p(v_los | R) of f = (-E)^m, by quadrature along the line of sight."""

    def along(t: float, speed: float) -> float:
        return max(psi(R * math.cosh(t)) - speed**2 / 2, 0.0) ** (INDEX + 1) * R * math.cosh(t)

    def value(speed: float) -> float:
        return quad(along, 0, 12, args=(speed,), limit=200)[0]

    top = math.sqrt(2 * psi(R))
    norm = 2 * quad(value, 0, top, limit=100, epsrel=1e-6)[0]
    return np.array([value(speed) for speed in v]) / norm


def tangential(R: float, v: np.ndarray) -> np.ndarray:
    """p(v_los | R) of f = L (-E)^m, by sums over z and the velocities across."""
    t = np.linspace(-8, 8, 241)
    z, step = R * np.sinh(t), R * np.cosh(t) * (t[1] - t[0])
    s, a = np.meshgrid((np.arange(40) + 0.5) / 40, (np.arange(24) + 0.5) / 24 * 2 * np.pi, indexing="ij")

    def value(speed: float) -> float:
        P = np.clip(psi(np.hypot(R, z)) - speed**2 / 2, 0, None)[:, None, None]
        across = np.sqrt(2 * P) * s
        vx, vy, depth = across * np.cos(a), across * np.sin(a), z[:, None, None]
        L = np.sqrt((depth * vy) ** 2 + (depth * vx - R * speed) ** 2 + (R * vy) ** 2)
        # of s ds, in units of the largest speed across
        return float((((P * (1 - s**2)) ** INDEX * L * 2 * P * s).sum((1, 2)) * step).sum())

    grid, weights = np.polynomial.legendre.leggauss(24)
    top = math.sqrt(2 * psi(R))
    norm = top * sum(w * value(top * (x + 1) / 2) for x, w in zip(grid, weights, strict=True))
    return np.array([value(speed) for speed in v]) / norm


def sky(R: np.ndarray, v: np.ndarray, error: float = 0.0) -> torch.Tensor:
    zero = np.zeros_like(v)
    R = np.broadcast_to(R, v.shape)
    return torch.as_tensor(np.stack([0.6 * R, -0.8 * R, v, zero + error, zero, zero + 1], 1))


def lattice() -> SkyLattice:
    rng = np.random.default_rng(1)
    return SkyLattice.covering(sky(np.geomspace(0.2, 15, 400), 100 * rng.standard_normal(400)))


@pytest.mark.parametrize("R", [0.3, 2.0, 10.0])
@pytest.mark.parametrize("exact", [isotropic, tangential])
def test_density_of_velocities(exact, R):
    """Within 0.3 % of the peak, at speeds up to 0.9 of the escape speed, where it has fallen a hundredfold."""
    v = np.linspace(0, 0.9, 7) * math.sqrt(2 * psi(R))
    expected = exact(R, v)
    density = LineOfSightVelocities(population(exact is tangential), KNOWN, lattice())
    found = density.log_prob(sky(R, v)).exp().numpy()
    assert abs(found - expected).max() < 3e-3 * expected.max()
    assert torch.allclose(density.log_prob(sky(R, v)), density.log_prob(sky(R, -v)), atol=1e-12)


def test_errors_and_systemic_velocity():
    """An error of 30 km/s is a convolution, to 0.1 % of the peak; the systemic velocity is a shift, the distance a
    factor of R; the density integrates to one."""
    R = 2.0
    density = LineOfSightVelocities(population(False), KNOWN, lattice())
    v = np.linspace(-600, 600, 1201)
    sharp = density.log_prob(sky(R, v)).exp().numpy()
    assert sharp.sum() == pytest.approx(1.0, abs=1e-4)
    kernel = np.exp(-0.5 * (v / 30) ** 2) / (30 * math.sqrt(2 * math.pi))
    blurred = density.log_prob(sky(R, v, 30.0)).exp().numpy()
    assert abs(np.convolve(sharp, kernel, "same") - blurred).max() < 1e-3 * blurred.max()
    moved = known(12.0, 0.1)
    other = LineOfSightVelocities(population(False), moved, lattice())
    expected = density.log_prob(sky(R * math.exp(0.1), v - 12.0))
    assert torch.allclose(other.log_prob(sky(R, v)), expected, atol=1e-10)


def surface_density(R: float) -> float:
    """Sigma(R) of f = (-E)^m up to a constant: the density in space is Psi^(m + 3/2)."""
    return quad(lambda t: psi(R * math.cosh(t)) ** (INDEX + 1.5) * R * math.cosh(t), 0, 14, limit=200)[0]


def test_places_of_a_photometric_sample():
    """Where places count, their density is Sigma(R) over its integral to the outermost such star, to 0.1 %, and that of
    a star with a velocity the product; without a velocity nothing else counts."""
    at = sky(np.geomspace(0.2, 12, 40), 100 * np.linspace(-1, 1, 40))
    at[:, 4] = 1
    at[30:, 4] = 0
    R_out = float(at[29, :2].norm())
    total = quad(lambda R: 2 * math.pi * R * surface_density(R), 0, R_out, limit=100)[0]
    density = LineOfSightVelocities(population(False), KNOWN, SkyLattice.covering(at))
    both = density.log_prob(at)
    unplaced = at.clone()
    unplaced[:, 4] = 0
    place = both - density.log_prob(unplaced)
    expected = [math.log(surface_density(float(R)) / total) for R in at[:30, :2].norm(dim=-1)]
    assert torch.allclose(place[:30], torch.as_tensor(expected, dtype=F64), atol=1e-3)
    assert (place[30:] == 0).all()
    blind = at.clone()
    blind[:, 3] = math.inf
    assert torch.allclose(density.log_prob(blind), place, atol=1e-12)
    # at another distance all scales, and so does the unit of area
    far = known(ln_distance=0.05)
    moved = at.clone()
    moved[:, :2] *= math.exp(0.05)
    there = LineOfSightVelocities(population(False), KNOWN, SkyLattice.covering(moved)).log_prob(moved)
    here = LineOfSightVelocities(population(False), far, SkyLattice.covering(at, 1.3)).log_prob(at)
    assert torch.allclose(here, there + 0.1 * at[:, 4], atol=2e-3)


def test_wings_of_binaries():
    """A share of the stars has velocities convolved with a Gaussian as well: the mixture of two such densities."""
    v = np.linspace(-400, 400, 21)
    moving = known(binaries=True, binary_share=0.3, binary_speed=40.0)
    found = LineOfSightVelocities(population(False), moving, lattice()).log_prob(sky(2.0, v, 30.0)).exp()
    single, double = (
        LineOfSightVelocities(population(False), KNOWN, lattice()).log_prob(sky(2.0, v, error)).exp()
        for error in (30.0, 50.0)
    )
    assert torch.allclose(found, 0.7 * single + 0.3 * double, atol=1e-9)
    assert {"sky.binary_share", "sky.binary_speed"} <= set(
        SnapshotModel(POTENTIAL, SphericalMixture(), likelihood=LineOfSight(binaries=True)).sites()
    )


def test_membership_is_a_prior():
    """Of a star that is a member with probability p without its velocity, p (1 - epsilon) are the prior odds."""
    at = sky(2.0, np.array([10.0, 300.0]))
    at[:, 5] = 0.4
    density = LineOfSightVelocities(population(False), KNOWN, lattice())
    background = BackgroundAlongLine(0.0, 400.0)
    fraction = torch.tensor(0.1, dtype=F64)
    member, other = density.log_prob(at).exp(), background.log_prob(at).exp()
    seen = ObservedStars(density, None, background, fraction)
    assert torch.allclose(seen.log_prob(at).exp(), 0.36 * member + 0.64 * other, rtol=1e-10)
    assert torch.allclose(seen.outlier_probability(at), 0.64 * other / (0.36 * member + 0.64 * other), rtol=1e-10)


def test_far_velocities_have_a_floor():
    """Beyond the series' period, where it would repeat, a velocity has a small density, not that of its image."""
    density = LineOfSightVelocities(population(False), KNOWN, lattice())
    V = density.lattice.V
    log_p = density.log_prob(sky(2.0, np.array([0.0, 1.01 * V, 2 * V])))
    assert torch.isfinite(log_p).all()
    assert (log_p[1:] < log_p[0] - 10).all()


def test_gradient_of_the_likelihood():
    """Exact to 1e-5 in every latent, through the table that all stars share, and the same block by block."""
    catalog = partly_photometric(300, 200)
    model = SnapshotModel(
        MassSlopeNetwork.for_stars(catalog.w, n_features=4),
        LogisticGaussianProcess(degree=3, cusps=True).resolved(1, 50 * torch.rand(200, 3, dtype=F64) + 1),
        likelihood=LineOfSight(5.0, 0.05, binaries=True),
    )
    space, data = LatentSpace(model), model.prepare(catalog)
    assert {"sky.velocity", "sky.ln_distance", "sky.binary_share"} <= set(space.slices)
    assert space.n_potential == space.size - 12
    u = 0.1 * torch.randn(space.size, generator=torch.Generator().manual_seed(1), dtype=F64)
    u[0] = model.initial_values()["potential.ln_mass"]
    value, slope = space.likelihood_gradient(u, data)
    assert float(value) == pytest.approx(float(space.log_likelihood(u, data).sum()), abs=1e-8)
    for k in range(space.size):
        step = torch.zeros_like(u)
        step[k] = 1e-4
        ahead, behind = (space.log_likelihoods(u + by, data).sum() for by in (step, -step))
        assert float(slope[k]) == pytest.approx(float((ahead - behind) / 2e-4), rel=1e-3, abs=2e-3)


def stars(n: int, seed: int) -> ProjectedCatalog:
    """A mock dwarf: Hernquist tracers in an NFW halo, errors of 2 km/s."""
    whole = mock("dwarf-in-nfw", n_stars=n, seed=seed)
    noise = torch.randn(n, generator=torch.Generator().manual_seed(seed + 1), dtype=F64)
    return ProjectedCatalog.of(whole.x[:, 0], whole.x[:, 1], whole.v[:, 2] + 2 * noise, 2.0)


def partly_photometric(n: int, n_velocities: int) -> ProjectedCatalog:
    """A mock dwarf whose places count from the 101st star on, and whose last stars have no velocity."""
    x, y, v, error = stars(n, 2).sky[:, :4].numpy().T
    v = np.where(np.arange(n) < n_velocities, v, np.nan)
    return ProjectedCatalog.of(x, y, v, error, photometric=np.arange(n) > 100)


def test_background_is_broad():
    """Four times as broad as the stars, and convolved with errors."""
    v = torch.linspace(-30, 30, 101, dtype=F64)
    background = BackgroundAlongLine.of_stars(torch.stack([v] * 6, -1))
    assert background.sd == pytest.approx(4 * 1.4826 * 15, rel=0.02)
    at = sky(1.0, np.linspace(-1500, 1500, 3001), 3.0)
    assert float(background.log_prob(at).exp().sum()) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            lambda: SnapshotModel(MiyamotoNagai(1e9, 1.0, 0.3), SphericalMixture(), likelihood=LineOfSight()),
            "spherical",
        ),
        (lambda: SnapshotModel(POTENTIAL, SphericalMixture(rotation=True), likelihood=LineOfSight()), "of a sphere"),
        (
            lambda: SnapshotModel(POTENTIAL, SphericalMixture(), likelihood=LineOfSight(), errors=MeasurementErrors()),
            "has the errors of its stars",
        ),
        (lambda: LineOfSight(velocity_sd=0.0), "velocity_sd > 0"),
        (lambda: LineOfSight(distance_error=0.7), "distance_error < 0.5"),
    ],
)
def test_what_cannot_be(model, message):
    with pytest.raises(ValueError, match=message):
        model()


def test_stars_and_likelihood_must_belong_together():
    """Stars on the sky in another likelihood, and coordinates in this one, are refused by name."""
    seen = stars(50, 1)
    with pytest.raises(ValueError, match="take the model dwarf_spheroidal"):
        SnapshotModel(POTENTIAL, SphericalMixture()).prepare(seen)
    with pytest.raises(ValueError, match=r"ProjectedCatalog\.read"):
        SnapshotModel(POTENTIAL, SphericalMixture(), likelihood=LineOfSight()).prepare(Catalog(seen.w))


@pytest.mark.slow
def test_fit_of_a_dwarf():
    """The default guide of the model file; the mass within the half-light radius is within 3.5 sd, of its logarithm:
    without places nothing but velocities says how the tracers' density falls, and M is known to a factor of 2."""
    catalog = stars(300, 5)
    built = dwarf_spheroidal.build(catalog)
    small = SnapshotModel(
        MassSlopeNetwork.for_stars(catalog.w, n_features=4),
        LogisticGaussianProcess(degree=4, cusps=True),
        likelihood=built.projection,
    )
    result = fit(small, catalog, FitConfig(seed=1, n_draws=40), progress=False)
    assert result.config.guide == "marginal"
    assert result.diagnostics.n_unbound == 0
    r = np.quantile(np.hypot(*catalog.sky[:, :2].T.numpy()), [0.5])
    masses = Posterior.from_result(result).field("enclosed_mass", r)
    true = truth_field(MOCKS["dwarf-in-nfw"].potential, "enclosed_mass", r)
    ln_mass = np.log(masses.draws / true)
    assert (abs(ln_mass.mean(0)) < 3.5 * ln_mass.std(0)).all()
    # 0.80 in a sample of 206 effective draws, 0.78 and 0.87 in two of about 100
    assert (ln_mass.std(0) < 1.1).all()
    assert abs(float(result.draws["sky.velocity"].mean())) < 3.0


def test_unbound_stars():
    """Stars that exceed the speed of escape at their place on the sky by more than three errors, the systemic velocity
    taken off, are counted; a star is held best where it is nearest to the centre."""
    model = SnapshotModel(POTENTIAL, SphericalMixture(), likelihood=LineOfSight(5.0))
    space = LatentSpace(model)
    escape = math.sqrt(2 * psi(2.0))
    data = sky(2.0, np.array([0.99, 1.01, -1.01, 1.03, -1.03]) * escape, 0.005 * escape)
    for shift, unbound in ((0.0, 2), (0.03 * escape, 2), (-0.03 * escape, 3)):
        u = space.vector({name: torch.full((), shift, dtype=F64) for name in space.slices if name == "sky.velocity"})
        assert count_unbound(space, u, data[[0, 1, 3, 4]] if shift == 0 else data) == unbound


def test_model_of_a_known_distance_is_stored(tmp_path):
    """Without a pickle, and as it was: a distance that is known is no site."""
    model = dwarf_spheroidal.build(stars(40, 1))
    assert list(model.projection._pyro_samples) == ["velocity"]
    written = describe(model)
    assert not written.pickles


def test_checkpoints_know_the_errors(tmp_path):
    """Stars with other errors are other stars: their checkpoint is not gone on with."""
    seen = stars(40, 1)
    model, config = SnapshotModel(POTENTIAL, SphericalMixture(), likelihood=LineOfSight()), FitConfig()
    same, other = (Checkpoints(tmp_path / "c", model, one, config).fingerprint for one in (seen, seen.without_errors()))
    assert same == Checkpoints(tmp_path / "c", model, seen[list(range(40))], config).fingerprint
    assert same["stars"] != other["stars"]


def test_refused_stars():
    """What is wrong with the stars, by name: lengths, numbers, errors, centre, zero of velocity, the field."""
    rng = np.random.default_rng(2)
    x, y, v = rng.standard_normal((3, 200))
    for change, message in (
        ({"v": 10 * v[:5]}, "v has shape"),
        ({"v": np.where(np.arange(200) == 7, np.nan, v)}, "v of star 7"),
        ({"v_error": np.where(np.arange(200) == 3, -1.0, 1.0)}, "v_error of star 3"),
        ({"x": x + 30}, "the centre is wrong"),
        ({"v": 10 * v + 223}, "not relative to the system's"),
        ({"v": np.where(np.arange(200) < 60, 1000 * v, v)}, "all stars of the field instead of members"),
        ({"x": 0 * x, "y": 0 * y}, "all stars are at the centre"),
        ({"v": np.where(np.arange(200) < 195, np.nan, v), "photometric": True}, "5 of 200 stars have a line-of-sight"),
        ({"membership": np.where(np.arange(200) == 4, 0.0, 1.0)}, "membership of star 4"),
    ):
        with pytest.raises(CatalogError, match=message):
            ProjectedCatalog.of(**({"x": x, "y": y, "v": 10 * v, "v_error": 1.0} | change))


def moving_alike(columns: str) -> tuple[QTable, dict[str, object]]:
    """Stars at rest in a system that moves across the sky: velocities from astropy, not from the formula under test."""
    rng = np.random.default_rng(4)
    ra_0, dec_0, D = 150.0, -33.0, 80 * units.kpc
    ra = ra_0 + rng.normal(0, 1.5, 60)
    dec = dec_0 + rng.normal(0, 1.0, 60)
    motion = {"pm_ra_cosdec": 0.4 * units.mas / units.yr, "pm_dec": -0.7 * units.mas / units.yr}
    centre = SkyCoord(ra_0 * units.deg, dec_0 * units.deg, D, radial_velocity=120 * units.km / units.s, **motion)
    bulk = centre.velocity.d_xyz.to_value("km/s")
    n = SkyCoord(ra * units.deg, dec * units.deg).cartesian.xyz.value
    table = QTable({"radial_velocity": bulk @ n * units.km / units.s, "e_rv": np.full(60, 0.5) * units.km / units.s})
    offset = SkyCoord(ra * units.deg, dec * units.deg).transform_to(SkyOffsetFrame(origin=centre.frame.replicate()))
    if columns == "ra dec":
        table["ra"], table["dec"] = ra * units.deg, dec * units.deg
        return table, {"distance": D, "centre": (ra_0, dec_0)}
    # the tangent plane's coordinates, as angles
    x, y = (offset.cartesian.y / offset.cartesian.x).value, (offset.cartesian.z / offset.cartesian.x).value
    table["x"], table["y"] = (np.degrees(np.arctan(part)) * 60 * units.arcmin for part in (x, y))
    return table, {"distance": D}


def test_a_photometric_sample_is_read(tmp_path):
    """Its places count and it has no velocities; probabilities of membership come along; --complete counts all."""
    rng = np.random.default_rng(3)
    x, y, v = rng.standard_normal((3, 80))
    stars = QTable({"x": x[:50], "y": y[:50], "v_los": 10 * v[:50], "v_los_error": np.full(50, 2.0)})
    stars["p_member"] = np.linspace(0.5, 1.0, 50)
    stars.write(tmp_path / "velocities.ecsv")
    QTable({"x": x[50:], "y": y[50:]}).write(tmp_path / "places.ecsv")
    found = ProjectedCatalog.read(tmp_path / "velocities.ecsv", photometry=tmp_path / "places.ecsv")
    assert len(found) == 80
    assert found.sky[:, 4].tolist() == [0.0] * 50 + [1.0] * 30
    assert torch.isinf(found.sky[50:, 3]).all()
    assert np.allclose(found.sky[:50, 5], np.linspace(0.5, 1.0, 50))
    assert torch.isfinite(found.w).all()
    whole = ProjectedCatalog.read(tmp_path / "velocities.ecsv", complete=True)
    assert (whole.sky[:, 4] == 1).all()


@pytest.mark.parametrize("columns", ["ra dec", "x y"])
def test_the_systems_own_motion(columns):
    """Taken off, stars at rest in their system have no velocities, to 1e-4 km/s, where the motion alone makes 2 km/s;
    places are those of the tangent plane."""
    table, options = moving_alike(columns)
    options_known = {
        "systemic_velocity": 120 * units.km / units.s,
        "systemic_proper_motion": [0.4, -0.7] * units.mas / units.yr,
    }
    table["radial_velocity"] += 5 * np.tile([-1.0, 1.0], 30) * units.km / units.s
    found = ProjectedCatalog.of_table(table, **options, **options_known)
    rest = found.sky[:, 2].numpy() - 5 * np.tile([-1.0, 1.0], 30)
    assert abs(rest).max() < 1e-4
    still = ProjectedCatalog.of_table(table, **options, systemic_velocity=120 * units.km / units.s)
    assert abs(still.sky[:, 2].numpy() - 5 * np.tile([-1.0, 1.0], 30)).max() > 2
    assert float(found.sky[:, 3].max()) == 0.5
    assert found.meta["distance_kpc"] == 80.0
    R = found.sky[:, :2].norm(dim=-1).numpy()
    other, again = moving_alike("x y" if columns == "ra dec" else "ra dec")
    other["radial_velocity"] = table["radial_velocity"]
    elsewhere = ProjectedCatalog.of_table(other, **again, **options_known)
    assert np.allclose(elsewhere.sky[:, :2], found.sky[:, :2], rtol=1e-8)
    assert R.max() > 2


def test_second_derivatives_in_the_orbits():
    """Those that the guide takes by sums over the lattice are those of the log posterior, to 1e-4."""
    catalog = partly_photometric(200, 150)
    model = SnapshotModel(
        MassSlopeNetwork.for_stars(catalog.w, n_features=4),
        LogisticGaussianProcess(degree=3, cusps=True, adaptive=True).resolved(
            1, 50 * torch.rand(200, 3, generator=torch.Generator().manual_seed(2), dtype=F64) + 1
        ),
        likelihood=LineOfSight(5.0, 0.05),
    ).with_outliers(catalog.w)
    space, data = LatentSpace(model), model.prepare(catalog)
    u = 0.1 * torch.randn(space.size, generator=torch.Generator().manual_seed(1), dtype=F64)
    u[0] = model.initial_values()["potential.ln_mass"]
    u[-1] = -4.0
    target = MarginalPosterior(space, data, u)
    given = target.given(torch.cat([u[target.rest], torch.tensor([0.5], dtype=F64)]))
    own = u[target.own]
    found = given._information_on_the_sky(own)
    for k in range(len(own)):
        step = torch.zeros_like(own)
        step[k] = 1e-3
        ahead, behind = (given._gradient(own + by)[1] for by in (step, -step))
        assert torch.allclose(-(ahead - behind) / 2e-3, found[k], rtol=1e-4, atol=1e-3)
    # many densities at once, in more than one lot, are one after the other
    some = own + 0.3 * torch.randn(11, len(own), generator=torch.Generator().manual_seed(3), dtype=F64)
    some[4, 0] = 20.0
    log_p = given.log_p_of_draws(some)
    assert torch.isneginf(log_p).nonzero().tolist() == [[4]]
    for one, value in zip(some, log_p, strict=True):
        assert torch.isneginf(value) or float(value) == pytest.approx(float(given.log_p(one)), abs=1e-8)


def test_densities_that_no_lattice_resolves():
    """Sums that a jump of f between nodes made negative are no blow-up: no velocity has more than the largest density
    that so many terms have. Surface densities as steep as that are told, and have no weight in a fit."""
    grid = lattice()
    generator = torch.Generator().manual_seed(1)
    found = torch.randn(grid.n, grid.speeds.shape[-1], generator=generator, dtype=F64)
    sums = grid.reduced(found)
    assert bool((sums[:, 1:].abs() <= 1).all())
    at = sky(2.0, np.linspace(-300, 300, 50))
    log_p = LineOfSightVelocities(population(False), KNOWN, grid, sums).log_prob(at)
    assert float(log_p.max()) < math.log(40 * 63 / (2 * grid.V))
    placed = sky(np.geomspace(0.2, 12, 40), 100 * np.linspace(-1, 1, 40))
    placed[:, 4] = 1
    field = SkyLattice.covering(placed)
    smooth = field.sums(population(False))
    assert field.resolves(smooth)
    steep = smooth.clone()
    steep[field.n // 2, 0] += 9
    assert not field.resolves(steep)
    assert grid.resolves(steep[: grid.n])


def test_the_default_density_is_stored(tmp_path):
    """With its powers and the amplitude that is inferred."""
    model = dwarf_spheroidal.build(stars(40, 1))
    assert model.df.adaptive
    assert model.df.cusps
    assert not describe(model).pickles
