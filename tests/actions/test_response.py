"""The response of the fudge's actions to the potential, against differences of the actions themselves.

Protocol: 200 bound stars of a galaxy of disc and halo (`contracts.actions.bound_stars`), given focal distance, each
parameter in turn. Expected: 1e-5 of the largest response in the median, 1e-3 in 99 % of stars; cubic interpolation of
the change of Phi is what is left.
"""

from __future__ import annotations

import pytest
import torch
from contracts.actions import bound_stars

from bayespot.actions import StaeckelFudge
from bayespot.actions.response import response, score_matrix
from bayespot.potential import NFW, ExponentialDisc, Logarithmic, MiyamotoNagai, SumPotential

STEP = 1e-5


def galaxy(disc=5e10, height=0.3, halo=5e11):
    return SumPotential([MiyamotoNagai(disc, 3.0, height), NFW(halo, 20.0)])


CHANGED = {
    "disc": lambda e: galaxy(disc=5e10 * (1 + e)),
    "height": lambda e: galaxy(height=0.3 * (1 + e)),
    "halo": lambda e: galaxy(halo=5e11 * (1 + e)),
}


@pytest.fixture(scope="module")
def stars():
    return bound_stars(galaxy(), 200, 3)


def found(finder, make, w):
    """The response of the finder in the family ``make``, and differences of its actions."""
    with torch.no_grad():
        tables = finder.tabulated(make(0.0), w).tables
        nodes = tables.field.nodes()
        change = (make(STEP).phi_on_grid(*nodes) - make(-STEP).phi_on_grid(*nodes)) / (2 * STEP)
        one = response(tables, w, change.reshape(-1, 1))
        J = [finder.tabulated(make(sign * STEP), w).capped_actions(make(sign * STEP), w) for sign in (1, -1)]
    return one, (J[0].J - J[1].J) / (2 * STEP), (J[0].excess - J[1].excess) / (2 * STEP)


@pytest.mark.parametrize("name", CHANGED)
def test_against_differences(stars, name):
    one, slope, _ = found(StaeckelFudge(2.5), CHANGED[name], stars)
    for k, action in enumerate((0, 2)):
        miss = (one.of_J[:, k, 0] - slope[:, action]).abs() / slope[:, action].abs().max()
        assert float(miss.median()) < 1e-5, (name, action)
        assert float(miss.quantile(0.99)) < 1e-3, (name, action)
    assert float(one.excess.max()) == 0
    torch.testing.assert_close(one.J, StaeckelFudge(2.5).actions(CHANGED[name](0.0), stars), rtol=1e-12, atol=1e-9)


def test_stars_above_escape(stars):
    """Their excess energy responds at their own place, as its differences say at fixed speed of escape."""
    fast = stars * torch.tensor([1.0, 1, 1, 3, 3, 3], dtype=torch.float64)
    one, _, of_excess = found(StaeckelFudge(2.5), CHANGED["disc"], fast)
    unbound = one.excess > 0
    assert int(unbound.sum()) > 10
    torch.testing.assert_close(one.of_excess[unbound, 0], of_excess[unbound], rtol=2e-3, atol=1e-6)
    assert float(one.of_excess[~unbound].abs().max()) == 0


def test_off_the_plane():
    """Orbits that keep to one side of the plane of a prolate potential have a response too."""
    w = torch.tensor([[10.0, 0.0, 4.0, 0.0, 60.0, 5.0], [8.0, 0.0, 1.0, 20.0, 150.0, 30.0]], dtype=torch.float64)
    one, slope, _ = found(StaeckelFudge(0.0), lambda e: Logarithmic(220.0, 1.0, 1.3 * (1 + e)), w)
    torch.testing.assert_close(one.of_J[:, :, 0], slope[:, ::2], rtol=1e-3, atol=1e-3)


def test_many_parameters_at_once(stars):
    """One table of several changes gives what each alone gives."""
    finder = StaeckelFudge(2.5)
    with torch.no_grad():
        tables = finder.tabulated(galaxy(), stars).tables
        nodes = tables.field.nodes()
        parts = [ExponentialDisc(1e9, 2.6, 0.3).phi_on_grid(*nodes), NFW(1e10, 15.0).phi_on_grid(*nodes)]
        together = response(tables, stars, torch.stack([part.reshape(-1) for part in parts], 1))
        for k, part in enumerate(parts):
            alone = response(tables, stars, part.reshape(-1, 1))
            torch.testing.assert_close(together.of_J[..., k], alone.of_J[..., 0])


def test_through_the_focal_distance(stars):
    """Focal distances of a settled finder are read at the energy, which responds too; itself the table does not."""
    with torch.no_grad():
        finder = StaeckelFudge().settled(galaxy(), stars)
    for name, make in CHANGED.items():
        one, slope, _ = found(finder, make, stars)
        for k, action in enumerate((0, 2)):
            miss = (one.of_J[:, k, 0] - slope[:, action]).abs() / slope[:, action].abs().max()
            assert float(miss.median()) < 1e-5, (name, action)
            assert float(miss.quantile(0.98)) < 2e-3, (name, action)


def test_score_matrix(stars):
    """The change of a function of J by its slopes is that of J, with focal distances read at the energy too."""
    potential = galaxy()
    for finder in (StaeckelFudge(2.5), StaeckelFudge().settled(potential, stars)):
        tables = finder.tabulated(potential, stars).tables
        nodes = tables.field.nodes()
        changes = torch.stack([part.phi_on_grid(*nodes).reshape(-1) for part in potential.members], 1)
        slopes = torch.randn(len(stars), 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        matrix = score_matrix(tables, stars, slopes)
        expected = (slopes[:, :, None] * response(tables, stars, changes).of_J).sum(1)
        found = torch.as_tensor(matrix @ changes.numpy())
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))
