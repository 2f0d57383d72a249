"""Selection functions and their normalisation.

Isochrone M = 1e11 Msun, b = 3 kpc; Z is compared with the fraction of 4e5 sampled stars that is kept, gradients
with central differences of a large sample's Z; seeds fixed.
"""

from __future__ import annotations

import functools
import math

import pytest
import torch

from bayespot.actions import IsochroneActions, StaeckelFudge
from bayespot.df import LogisticGaussianProcess, SphericalMixture
from bayespot.inference.optimise import displacement
from bayespot.likelihood import (
    Chain,
    Custom,
    GalacticLatitude,
    HeliocentricDistance,
    MagnitudeLimit,
    SelectionFunction,
    SkyCone,
    SphericalShell,
)
from bayespot.likelihood.chain import rotate
from bayespot.likelihood.errors import ErrorScatter
from bayespot.likelihood.normalisation import FixedPoints, _reversed, pathwise_log_z
from bayespot.likelihood.selection import require_selected
from bayespot.mock import galaxy_mock, mock, observe
from bayespot.potential import Isochrone, Logarithmic, MWPotential2014
from bayespot.pyro_modules import freeze

STARS = mock("isochrone", n_stars=2000, seed=3).w
POTENTIAL = Isochrone(m_tot=1e11, r_s=3.0)
J = IsochroneActions().actions(POTENTIAL, STARS)
OBSERVER = (8.2, 0.0, 0.02)
SELECTIONS = {
    "shell": SphericalShell(2.0, 12.0),
    "distance": HeliocentricDistance(10.0, observer=OBSERVER),
    "magnitude": MagnitudeLimit(15.0, 0.5, 0.4, observer=OBSERVER),
    "sky": GalacticLatitude(20.0),
    "cone": SkyCone(0.0, 0.0, 30.0, inside=False),
    "north": SkyCone(60.0, 45.0, 50.0),
    "product": HeliocentricDistance(15.0) * GalacticLatitude(10.0) * MagnitudeLimit(15.0, 0.5, 0.4),
}


@functools.cache
def fitted_df(rotation: bool) -> tuple[SphericalMixture, dict[str, torch.Tensor]]:
    """Two components of f(J), and their best fit to the stars."""
    df = SphericalMixture(2, rotation).resolved(2, J)
    return df, df.fit_actions(J, seed=0)


def population(u: torch.Tensor, rotation: bool = False) -> Chain:
    """Population at ln m_tot, ln r_s and a common shift of the scales of f(J)."""
    df, fitted = fitted_df(rotation)
    values = fitted | {name: fitted[name] + u[2] for name in ("ln_scale_r", "ln_scale_L")}
    if rotation:
        values["concentration"] = torch.tensor([1.0, -0.5], dtype=torch.float64)
    potential = freeze(POTENTIAL, {"m_tot": u[0].exp(), "r_s": u[1].exp()})
    return Chain(potential, freeze(df, values), IsochroneActions())


REFERENCE = torch.tensor([math.log(1e11), math.log(3.0), 0.0], dtype=torch.float64)


@functools.cache
def sample(u: tuple[float, ...], rotation: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """2^17 stars of a point set of its own, turned four ways ``(4, n, 6)``, and their weights."""
    chain = population(torch.tensor(u, dtype=torch.float64), rotation)
    with torch.no_grad():
        stars = chain.augment(2**17, seed=99)
        return rotate(stars.w, chain.symmetry, 4, seed=98), stars.weight


def truth(selection: SelectionFunction, u: torch.Tensor, rotation: bool = False) -> tuple[float, float]:
    """Kept fraction of the `sample`, and a bound on its error."""
    turned, weight = sample(tuple(u.tolist()), rotation)
    s = selection(turned).mean(0)
    z = float((weight * s).sum())
    return z, float(s.std()) / len(s) ** 0.5


@pytest.mark.parametrize("name", SELECTIONS)
def test_fixed_points_give_the_kept_fraction(name):
    """Z at the reference and away from it (M + 3 %, b - 5 %, scales + 4 %): by eight sets of 2048 stars within 4 errors
    of both estimates, as by 16384 points near other selected stars, by a lattice of 65536 points within 4 errors of
    the other and 0.1 %."""
    selection = SELECTIONS[name]
    with torch.no_grad():
        sets = [FixedPoints.of_stars(population(REFERENCE), selection, 2**11, 7 + i) for i in range(8)]
        lattice = FixedPoints.lattice(population(REFERENCE), selection, 2**16, 7, (1.0, 20.0))
        chance = torch.rand(len(STARS), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        near = FixedPoints.near_stars(population(REFERENCE), selection, STARS[selection(STARS) > chance], 2**14, 7)
        for u in (REFERENCE, REFERENCE + torch.tensor([0.03, -0.05, 0.04])):
            chain = population(u)
            estimates = torch.stack([points.log_z(chain.log_density(points.w)).exp() for points in sets])
            z, error = float(estimates.mean()), float(estimates.std()) / 8**0.5
            expected, other = truth(selection, u)
            assert error < 0.01 * z
            assert abs(z - expected) < 4 * (error + other), (z, error, expected, other)
            z = float(lattice.log_z(chain.log_density(lattice.w)).exp())
            assert abs(z - expected) < 4 * other + 0.001 * z, (z, expected, other)
            if name == "north":
                continue  # stars of one hemisphere do not tell where those of the other are, which count here too
            # a mean over as many points, those where nothing is selected too, of which one decides nothing
            each = 2**14 * (near.log_weight + chain.log_density(near.w) + near.accepted.log()).exp()
            z = float(near.log_z(chain.log_density(near.w)).exp())
            error = float((each**2).sum() / 2**14 - z**2) ** 0.5 / 2**7
            assert error < 0.015 * z
            assert abs(z - expected) < 4 * (error + other), (z, error, expected, other)


@pytest.mark.parametrize("name", ["distance", "cone", "product"])
def test_differences_of_ln_z_are_hardly_left_to_chance(name):
    """ln Z away from the reference minus at it, lattices of 16384 points with four seeds: sd below 5e-5 for a selection
    of position alone; the same selection as any function of (x, v) has ten times that."""
    selection = SELECTIONS[name]
    here, there = population(REFERENCE), population(REFERENCE + torch.tensor([0.03, -0.05, 0.04]))
    spread = []
    for s in (selection, Custom(lambda x, v: selection(torch.cat([x, v], -1)))):
        differences = []
        for seed in range(4):
            with torch.no_grad():
                points = FixedPoints.lattice(here, s, 2**14, seed, (1.0, 20.0))
                ends = [points.log_z(chain.log_density(points.w)) for chain in (here, there)]
            differences.append(float(ends[1] - ends[0]))
        spread.append(float(torch.tensor(differences).std()))
    assert spread[0] < 5e-5, spread
    assert spread[1] > 4 * spread[0], spread


@pytest.mark.parametrize("name", ["shell", "distance", "magnitude"])
def test_gradient_of_ln_z(name):
    """d ln Z in potential and f(J) by fixed points of both kinds, for hard edges too, against differences of the kept
    fraction of 2^17 stars with common random numbers (step 0.05), within 0.02; the smooth one also pathwise, the same
    and, being a smooth function, against its own differences to 1e-6."""
    selection = SELECTIONS[name]
    u = REFERENCE.clone().requires_grad_()
    slopes = []
    for points in (
        FixedPoints.of_stars(population(REFERENCE), selection, 2**15, 7),
        FixedPoints.lattice(population(REFERENCE), selection, 2**15, 7, (1.0, 20.0)),
    ):
        slopes += torch.autograd.grad(points.log_z(population(u).log_density(points.w)), u)
    expected = []
    with torch.no_grad():
        for k in range(3):
            step = torch.zeros(3, dtype=torch.float64)
            step[k] = 0.05
            ahead, behind = (truth(selection, REFERENCE + sign * step)[0] for sign in (1, -1))
            expected.append(math.log(ahead / behind) / 0.1)
    for slope in slopes:
        assert torch.allclose(slope, torch.tensor(expected, dtype=torch.float64), atol=0.02), (slope, expected)
    if selection.smooth:

        def log_z(at: torch.Tensor) -> torch.Tensor:
            return pathwise_log_z(population(at), selection, 2**14, 5, n_rotations=8)

        (path,) = torch.autograd.grad(log_z(u), u)
        assert torch.allclose(path, torch.tensor(expected, dtype=torch.float64), atol=0.02), (path, expected)
        for k in range(3):
            step = torch.zeros(3, dtype=torch.float64)
            step[k] = 1e-5
            own = float((log_z(REFERENCE + step) - log_z(REFERENCE - step)).detach()) / 2e-5
            assert abs(float(path[k]) - own) < 1e-6


def test_rotating_population_is_turned_about_z_only():
    """Z of prograde stars for a rotating f(J), whose density has no more than axial symmetry, within 0.01."""
    selection = Custom(_prograde, smooth=False)
    with torch.no_grad():
        chain = population(REFERENCE, rotation=True)
        expected, error = truth(selection, REFERENCE, rotation=True)
        assert abs(expected - 0.5) > 20 * error
        for points in (
            FixedPoints.of_stars(chain, selection, 2**14, 7),
            FixedPoints.lattice(chain, selection, 2**16, 7, (1.0, 20.0)),
        ):
            assert abs(float(points.log_z(chain.log_density(points.w)).exp()) - expected) < 0.01


def test_a_lattice_covers_motion_in_and_out():
    """Half of the stars move outwards; Z of a shell of 1 % in radius is that of a million stars in 9 % about it."""
    with torch.no_grad():
        chain = population(REFERENCE)
        points = FixedPoints.lattice(chain, Custom(_outward), 2**14, 7, (1.0, 20.0))
        assert abs(float(points.log_z(chain.log_density(points.w)).exp()) - 0.5) < 1e-3
        shell = SphericalShell(5.0, 5.05)
        stars = chain.augment(2**20, 3)
        r = torch.linalg.vector_norm(stars.w[:, :3], dim=-1)
        expected = float(stars.weight[(r > 4.8) & (r < 5.25)].sum()) / 9
        points = FixedPoints.lattice(chain, shell, 2**16, 7, (1.0, 20.0))
        assert abs(float(points.log_z(chain.log_density(points.w)).exp()) / expected - 1) < 0.03


def test_a_lattice_for_what_was_observed():
    """Stars whose distance as observed, with errors of 20 %, is below 6 kpc: Z of a selection known to be of position
    alone, of any function, and of 2^17 scattered stars of the population, within 4 of its errors plus 0.2 %."""
    selection = HeliocentricDistance(6.0)
    catalog = observe(mock("isochrone", n_stars=2000, seed=3), 4, distance_error=0.2, pm_error=0.05, v_error=2.0)
    scatter = ErrorScatter(catalog)
    with torch.no_grad():
        chain = population(REFERENCE)
        stars = chain.augment(2**17, seed=99)
        s = selection(scatter(rotate(stars.w, "spherical", 1, 5)[0], 6))
        expected, error = float((stars.weight * s).sum()), float(s.std()) / len(s) ** 0.5
        for one in (selection, Custom(lambda x, v: selection(torch.cat([x, v], -1)))):
            points = FixedPoints.lattice(chain, one, 2**14, 7, (1.0, 20.0), 16, scatter)
            z = float(points.log_z(chain.log_density(points.w)).exp())
            assert abs(z - expected) < 4 * error + 0.002 * expected, (one, z, expected, error)
        true = float((stars.weight * selection(rotate(stars.w, "spherical", 1, 5)[0])).sum())
        assert abs(true - expected) > 20 * error  # the errors matter here


def test_a_lattice_needs_a_sphere():
    """The message names the potential's symmetry."""
    chain = population(REFERENCE)
    chain.potential = Logarithmic(v_0=200.0, r_c=1.0, q=0.8)
    with pytest.raises(ValueError, match="axisymmetric"):
        FixedPoints.lattice(chain, SELECTIONS["shell"], 1000, 7, (1.0, 20.0))


def _outward(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return ((x * v).sum(-1) > 0).double()


def _prograde(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (x[..., 0] * v[..., 1] - x[..., 1] * v[..., 0] > 0).double()


def test_pathwise_refuses_hard_edges():
    """The path derivative through a hard edge would be zero: refused with the remedy."""
    with pytest.raises(ValueError, match="hard edges"):
        pathwise_log_z(population(REFERENCE), SELECTIONS["shell"], 100, 0)


def test_ready_selections_on_known_stars():
    """Distances, latitudes and directions of hand-placed stars; products multiply."""
    w = torch.zeros(4, 6, dtype=torch.float64)
    w[:, :3] = torch.tensor([[0, 0, 0.0], [8.0, 0, 0], [8.2, 0, 5.0], [0, 0, 9.0]])
    assert HeliocentricDistance(5.1, observer=OBSERVER)(w).tolist() == [0, 1, 1, 0]
    assert SphericalShell(1.0, 9.0)(w).tolist() == [0, 1, 0, 0]
    assert GalacticLatitude(45.0, observer=(8.2, 0.0, 0.0))(w).tolist() == [0, 0, 1, 1]
    assert SkyCone(180.0, 0.0, 10.0, observer=(8.2, 0.0, 0.0))(w).tolist() == [1, 1, 0, 0]
    m = MagnitudeLimit(14.5, 0.0, 0.3, observer=(0.0, 0.0, 0.0))
    assert abs(float(m(w[1:2])) - 1 / (1 + math.exp((5 * math.log10(800) - 14.5) / 0.3))) < 1e-12
    product = SphericalShell(1.0, 9.0) * m
    assert torch.allclose(product(w), SphericalShell(1.0, 9.0)(w) * m(w))
    assert not product.smooth
    assert m.smooth


@pytest.mark.parametrize("value", [1.2, -0.1, math.nan])
def test_a_probability_outside_its_range_is_refused(value):
    """The message has the value, the place and the remedy."""
    with pytest.raises(ValueError, match="between 0 and 1"):
        Custom(lambda x, v: torch.full(x.shape[:-1], value))(STARS)


def test_wrong_shape_and_wrong_limits_are_refused():
    """One number per star; limits in order; a positive width."""
    with pytest.raises(ValueError, match="one number per star"):
        Custom(lambda x, v: x)(STARS)
    for build in (lambda: SphericalShell(3.0, 2.0), lambda: HeliocentricDistance(-1.0), lambda: SkyCone(0, 0, 0.0)):
        with pytest.raises(ValueError, match=r"0 <=|between 0 and 180"):
            build()
    with pytest.raises(ValueError, match="width"):
        MagnitudeLimit(15.0, 0.0, 0.0)


def test_a_selection_that_rejects_stars_of_the_catalogue_is_refused():
    """The message counts them and names the first row."""
    with pytest.raises(ValueError, match=r"rejects \d+ of 2000 stars .* row \d+"):
        require_selected(SphericalShell(0.0, 5.0), STARS)


def test_points_near_stars_need_stars():
    """Ten of them that differ in every coordinate."""
    selection = SphericalShell(2.0, 12.0)
    for w in (STARS[:5], STARS[:1].repeat(50, 1)):
        with pytest.raises(ValueError, match="do not tell where stars are selected"):
            FixedPoints.near_stars(population(REFERENCE), selection, w, 1000, 1)


def test_points_near_stars_of_a_flattened_potential():
    """All stars are one population; stars that move outwards are half of it at every point, an orbit's ways equal."""
    stars = galaxy_mock("halo", n_stars=300, seed=5).w
    potential, finder = MWPotential2014(), StaeckelFudge()
    df = LogisticGaussianProcess(flattened=True, degree=3)
    with torch.no_grad():
        J = finder.capped_actions(potential, stars).J
        df = df.resolved(1, J)
        chain = Chain(potential, freeze(df, df.fit_actions(J, seed=0)), finder)
        everything = Custom(lambda x, v: torch.ones_like(x[..., 0]))
        points = FixedPoints.near_stars(chain, everything, stars, 4000, 1, n_rotations=4)
        assert float(points.log_z(chain.log_density(points.w)).exp()) == pytest.approx(1, abs=0.1)
        outwards = Custom(lambda x, v: ((x[..., :2] * v[..., :2]).sum(-1) > 0).double())
        half = FixedPoints.near_stars(chain, outwards, stars, 1000, 1, n_rotations=4)
        torch.testing.assert_close(half.accepted, torch.full_like(half.accepted, 0.5))
        back = _reversed(stars, potential)
        torch.testing.assert_close(finder.capped_actions(potential, back).J, J, rtol=1e-6, atol=1e-6)
        assert bool(((back - stars)[:, 3:].norm(dim=-1) > 1).all())
        # a star that no potential binds does not widen the cloud
        fast = stars[:1].clone()
        fast[:, 3:] *= 1e3
        same = FixedPoints.near_stars(chain, everything, torch.cat([stars, fast]), 1000, 1, n_rotations=4)
    assert float(same.w[:, 3:].norm(dim=-1).max()) < 3000


def test_a_selection_that_keeps_nothing_is_refused():
    """No point is kept: the limits or the observer are wrong."""
    with pytest.raises(ValueError, match="keeps 0 of"):
        FixedPoints.lattice(population(REFERENCE), SphericalShell(5e7, 6e7), 2000, 1, (1.0, 20.0))


class Slopes:
    """Stands for a latent space whose ln Z has a given gradient."""

    n_potential = 1

    def __init__(self, gradient):
        self.log_fraction_gradient = gradient


def test_displacement_of_the_posterior_mean():
    """Posterior N(u, diag(4, 1)), 10 stars. Slopes that differ by b + A (v - u): 10 Sigma b / sd exactly, as opposite
    draws cancel A. By c (v - u)^2, with no slope at the maximum: 10 sd c Sigma, within the noise of four
    pairs. Never finite: infinite."""
    u, information = torch.tensor([3.0, -1.0], dtype=torch.float64), torch.diag(torch.tensor([0.25, 1.0]).double())
    nothing = Slopes(torch.zeros_like)
    slope = torch.tensor([0.01, 5.0], dtype=torch.float64)
    found = displacement(nothing, Slopes(lambda v: slope + 0.3 * (v - u).flip(0)), u, information, 10, 0)
    assert found == pytest.approx(10 * 0.01 * 2)
    bent = [displacement(nothing, Slopes(lambda v: 0.01 * (v - u) ** 2), u, information, 10, s) for s in range(200)]
    assert sum(bent) / 200 == pytest.approx(10 * 2 * 0.01 * 4, rel=0.15)
    assert displacement(nothing, Slopes(lambda v: v * torch.nan), u, information, 10, 0) == math.inf
