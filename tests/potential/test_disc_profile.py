"""A disc of free surface density: the sum of its discs, tables that are kept, sites and storage."""

from __future__ import annotations

import gc
import math

import pytest
import torch
from contracts.potential import check_batches, check_circular_orbits, check_draws_on_grid, points_at

from bayespot.potential import ExponentialDisc, ExponentialDiscs, SumPotential
from bayespot.potential import disc_profile as module
from bayespot.pyro_modules import freeze
from bayespot.storage import read, write

LENGTHS, HEIGHTS = [1.5, 3.0, 6.0], [0.3, 0.3, 0.6]
LOGITS = torch.tensor([0.5, -1.0, 0.2], dtype=torch.float64)


def discs(ln_mass=24.0, logits=LOGITS):
    free = ExponentialDiscs(LENGTHS, HEIGHTS, 24.0)
    return freeze(free, {"ln_mass": torch.tensor(ln_mass, dtype=torch.float64), "logits": logits})


def test_sum_of_its_discs():
    """Phi, force and density of single discs with the shares of the mass; the mass of all is m."""
    together = discs()
    masses = math.exp(24.0) * LOGITS.softmax(0)
    torch.testing.assert_close(together.masses, masses)
    parts = [
        ExponentialDisc(float(m) / (2 * math.pi * r**2), r, h, vertical="sech2")
        for m, r, h in zip(masses, LENGTHS, HEIGHTS, strict=True)
    ]
    alone = SumPotential(parts)
    x = points_at(torch.logspace(-1, 2, 12, dtype=torch.float64))
    for field in ("phi", "acceleration", "density"):
        torch.testing.assert_close(getattr(together, field)(x), getattr(alone, field)(x), rtol=1e-10, atol=1e-12)
    check_batches(together, x)


def test_kept_tables(monkeypatch):
    """Grids that overlap share their rows, whatever is asked for first; masses keep their derivatives."""
    together, calls = discs(), []
    make = ExponentialDiscs._grid
    monkeypatch.setattr(ExponentialDiscs, "_grid", lambda *arguments: calls.append(1) or make(*arguments))
    mu = torch.linspace(0, 1, 9, dtype=torch.float64)
    for first, last in ((-40, 40), (-20, 10), (-60, 0), (10, 80), (-60, 80), (-50, 70)):
        s = 0.05 * torch.arange(first, last, dtype=torch.float64)
        r = s.exp()[:, None]
        x = torch.stack(torch.broadcast_tensors(r * (1 - mu**2).sqrt(), 0 * r, r * mu), -1)
        torch.testing.assert_close(together.phi_on_grid(s, mu), together.phi(x), rtol=1e-9, atol=1e-9)
    assert len(calls) == 3  # the first, one farther in, one farther out
    shifted = 0.05 * torch.arange(0, 20, dtype=torch.float64) + 0.013
    r = shifted.exp()[:, None]
    x = torch.stack(torch.broadcast_tensors(r * (1 - mu**2).sqrt(), 0 * r, r * mu), -1)
    torch.testing.assert_close(together.phi_on_grid(shifted, mu), together.phi(x), rtol=1e-9, atol=1e-9)
    ln_mass = torch.tensor(24.0, dtype=torch.float64, requires_grad=True)
    one = freeze(ExponentialDiscs(LENGTHS, HEIGHTS, 24.0), {"ln_mass": ln_mass, "logits": LOGITS})
    (slope,) = torch.autograd.grad(one.phi_on_grid(s, mu).sum(), ln_mass)
    torch.testing.assert_close(slope, one.phi_on_grid(s, mu).sum().detach())


def test_sites_and_storage(tmp_path):
    free = ExponentialDiscs(LENGTHS, HEIGHTS, 24.0, mass_sd=0.5)
    assert set(free._pyro_samples) == set(free.initial_values()) == {"ln_mass", "logits"}
    write(discs(), tmp_path / "discs.safetensors")
    again = read(tmp_path / "discs.safetensors")
    x = points_at(torch.tensor([1.0, 8.0], dtype=torch.float64))
    torch.testing.assert_close(again.phi(x), discs().phi(x))


def test_discs_of_a_height_go_together():
    """Covariance of the logits: each disc's own, and what those of a height, and of a length, share."""
    free = ExponentialDiscs([1.0, 2.0, 1.0], [0.1, 0.1, 0.3], 24.0, logits_sd=0.5, height_sd=2.0, length_sd=1.0)
    found = free._pyro_samples["logits"].covariance_matrix
    expected = torch.tensor([[5.25, 4.0, 1.0], [4.0, 5.25, 0.0], [1.0, 0.0, 5.25]], dtype=torch.float64)
    torch.testing.assert_close(found, expected)
    with pytest.raises(ValueError, match="or zero"):
        ExponentialDiscs([1.0], [0.1], 24.0, height_sd=-1.0)


def test_placed_by_stars():
    """Lengths follow the stars' median radius, the mass their radius and speed."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(500, 6, generator=generator, dtype=torch.float64) * torch.tensor([5.0] * 3 + [100.0] * 3)
    one, twice = (ExponentialDiscs.for_stars(stars) for stars in (w, w * torch.tensor([2.0] * 3 + [1.0] * 3)))
    torch.testing.assert_close(twice.r_d, 2 * one.r_d)
    assert float(twice.initial_values()["ln_mass"] - one.initial_values()["ln_mass"]) == pytest.approx(math.log(2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0], [0.1, 0.2], 24.0), "as many heights"),
        (([], [], 24.0), "as many heights"),
        (([1.0, -2.0], [0.1, 0.1], 24.0), "r_d must be positive"),
        (([1.0], [0.0], 24.0), "h_z must be positive"),
        (([1.0], [0.1], 24.0, 0.0), "standard deviations"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        ExponentialDiscs(*arguments)


def test_nothing_is_kept_of_what_is_gone():
    before = len(module._GRIDS)
    together = discs()
    together.phi_on_grid(torch.tensor([0.0, 0.1], dtype=torch.float64), torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert len(module._GRIDS) == before + 1
    del together
    gc.collect()
    assert len(module._GRIDS) == before


def test_circular_orbits_and_many_draws():
    """In the plane, kept for the last radii; and for many masses at once."""
    together = discs()
    for r in (torch.logspace(-6, 6, 20), torch.logspace(-1, 2, 5), torch.logspace(-6, 6, 20)):
        check_circular_orbits(together, r.double())
    draws = {"ln_mass": torch.tensor([24.0, 23.0, 25.0]).double(), "logits": torch.stack([LOGITS, -LOGITS, 0 * LOGITS])}
    s, mu = torch.linspace(-2, 3, 8, dtype=torch.float64), torch.linspace(0, 1, 5, dtype=torch.float64)
    check_draws_on_grid(ExponentialDiscs(LENGTHS, HEIGHTS, 24.0), draws, s, mu)
