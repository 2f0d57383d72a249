"""What every density of orbits must satisfy; called by the tests of each of them.

A case is a `DistributionFunction` with its sites fixed (or trained), and the actions of the stars it describes.
Integrals are by quadrature on the compact chart J = s x/(1-x), independent of the densities' own charts.
"""

from __future__ import annotations

import copy
import math
import pickle
from typing import NamedTuple

import torch
from torch import Tensor

from bayespot.df import DistributionFunction
from bayespot.numerics import gauss_legendre
from bayespot.pyro_modules import freeze


class Case(NamedTuple):
    """A density at fixed parameters and the actions ``(n, 3)`` it was fitted to."""

    df: DistributionFunction
    J: Tensor


def polar(J_r: Tensor, L: Tensor, cos_i: Tensor) -> Tensor:
    """Return J of J_r, L = J_z + |J_phi| and cos i = J_phi / L."""
    return torch.stack([J_r, L * cos_i, L * (1 - cos_i.abs())], -1)


def check_normalised(case: Case, tolerance: float = 2e-3, n: int = 160) -> None:
    """int f dJ = 1: trapezoid rule in ln J_r and ln L over 34 e-foldings, Gauss-Legendre in cos i (both signs)."""
    t = torch.linspace(-20, 14, n, dtype=torch.float64)
    step = float(t[1] - t[0])
    J_r, L = float(case.J[:, 0].median()) * t.exp(), float(length(case.J).median()) * t.exp()
    node, weight = gauss_legendre(8)
    c = torch.cat([(node - 1) / 2, (node + 1) / 2])
    w = torch.cat([weight, weight]) / 2
    total = 0.0
    with torch.no_grad():
        for part in J_r.split(40):
            r, long, cos_i = torch.meshgrid(part, L, c, indexing="ij")
            f = case.df.log_prob(polar(r, long, cos_i)).exp()
            # d^3 J = dJ_r L dL dcos i, and dJ = J dlnJ
            total += float((f * r * long**2 * w).sum()) * step**2
    assert abs(total - 1) < tolerance, f"{type(case.df).__name__}: the integral is {total}"


def check_samples(case: Case, n: int = 20_000) -> None:
    """Samples and weighted orbits against log_prob in 60 cells: chi-square below its mean plus 5 sd.

    Cells are quantiles of the stars' (J_r, L) and of cos i; their probabilities are means over a third sample with
    importance weights: stars' actions scattered by 0.6 in ln J_r and ln L, so that nothing is shared with the sampler.
    """
    df = case.df
    J = df.sample(n, 3)
    assert bool(((J[:, 0] >= 0) & (J[:, 2] >= 0) & torch.isfinite(J).all(-1)).all())
    edges = [torch.quantile(z[:20_000], torch.tensor([0.2, 0.5, 0.8]).double()) for z in coordinates(case.J)[:2]]
    edges.append(torch.tensor([-0.5, 0.5]).double())

    def cells(J: Tensor) -> Tensor:
        i, j, k = (torch.searchsorted(e, z.contiguous()) for e, z in zip(edges, coordinates(J), strict=True))
        return (i * 4 + j) * 3 + k

    counts = torch.bincount(cells(J), minlength=48).double()
    points, log_q = proposal(case.J, 60_000)
    with torch.no_grad():
        weight = (df.log_prob(points) - log_q).exp() / len(points)
    share = torch.zeros(48, dtype=torch.float64).index_add(0, cells(points), weight)
    square = torch.zeros(48, dtype=torch.float64).index_add(0, cells(points), weight**2)
    variance = n * share + n**2 * square
    used = n * share > 5
    chi2, dof = float(((counts - n * share)[used] ** 2 / variance[used]).sum()), int(used.sum())
    assert dof > 20
    assert chi2 < dof + 5 * (2 * dof) ** 0.5, f"{type(df).__name__}: chi-square {chi2:.0f} for {dof} cells"
    orbits = df.stratified(8192, seed=2, n_spare=1)
    assert abs(float(orbits.weight.sum()) - 1) < 1e-9
    placed = torch.zeros(48, dtype=torch.float64).index_add(0, cells(orbits.J), orbits.weight.detach())
    error = (square + share / 8192).sqrt()
    worst = float(((placed - share).abs() / error.clamp(min=1e-12))[used].max())
    assert worst < 5, f"{type(df).__name__}: weighted orbits are {worst:.1f} sd off in a cell"


def check_gradient(case: Case) -> None:
    """d ln f / dJ by autograd against central differences (step 1e-5 of |J|): 1e-4 of the larger of slope and 1/J."""
    J = case.J[:200].clone().requires_grad_()
    (slope,) = torch.autograd.grad(case.df.log_prob(J).sum(), J)
    scale = J.detach().abs().sum(-1)
    with torch.no_grad():
        for axis in range(3):
            step = torch.zeros_like(J)
            # towards the inside: never across an edge or through J_phi = 0
            step[:, axis] = 1e-5 * J[:, axis].abs().clamp(min=1e-12)
            difference = (case.df.log_prob(J + step) - case.df.log_prob(J - step)) / (2 * step[:, axis])
            error = (difference - slope[:, axis]).abs()
            bound = 1e-4 * (slope[:, axis].abs() + 1 / J[:, axis].abs().clamp(min=1e-3 * scale)) + 1e-9
            # a kink between two bins or cells may lie within the step of a few stars
            assert float((error > bound).double().mean()) < 0.02, f"{type(case.df).__name__}, axis {axis}"


def check_batches(case: Case) -> None:
    """A minibatch, single stars and other shapes give the numbers of the full batch to rounding."""
    J = case.J[:120]
    with torch.no_grad():
        full = case.df.log_prob(J)
        assert full.shape == (120,)
        torch.testing.assert_close(case.df.log_prob(J[30:50]), full[30:50], rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(case.df.log_prob(J[7]), full[7], rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(case.df.log_prob(J.reshape(8, 15, 3)), full.reshape(8, 15), rtol=1e-11, atol=1e-11)


def check_saving(case: Case, tmp_path) -> None:
    """torch.save, pickle and deepcopy keep every digit of log_prob and of the samples."""
    J = case.J[:50]
    torch.save(case.df, tmp_path / "df.pt")
    loaded = torch.load(tmp_path / "df.pt", weights_only=False)
    with torch.no_grad():
        for other in (loaded, pickle.loads(pickle.dumps(case.df)), copy.deepcopy(case.df)):
            assert torch.equal(other.log_prob(J), case.df.log_prob(J))
            assert torch.equal(other.sample(20, 5), case.df.sample(20, 5))


#: ln f(at 1e-3 of the median action) - ln f(at 1e-5) next to the edges J_r = 0 and L = 0, by kind of boundary.
DROPS = {"finite": (-0.1, 0.1), "power": (-0.1, 5.0), "vanishing": (5.0, 1e3)}


def check_corners(case: Case, edge: str) -> None:
    """Finite ln f and slopes from 0 and 1e-8 to 1e6 of the median action in every corner; f at the edges as stated.

    Towards an edge f tends to a finite value (``"finite"``), falls as a power of order 1 (``"power"``) or faster
    than that (``"vanishing"``): see `DROPS`. It diverges for none.
    """
    r, long = float(case.J[:, 0].median()), float(length(case.J).median())
    far = torch.tensor([0.0, 1e-8, 1e-3, 1.0, 1e3, 1e6], dtype=torch.float64)
    corners = torch.cartesian_prod(r * far, long * far, torch.tensor([-1.0, -0.3, 0.0, 1.0], dtype=torch.float64))
    J = polar(*corners.unbind(-1)).requires_grad_()
    log_f = case.df.log_prob(J)
    assert torch.isfinite(log_f).all(), f"{type(case.df).__name__}: ln f at {J[~torch.isfinite(log_f)][0].tolist()}"
    (slope,) = torch.autograd.grad(log_f.sum(), J)
    assert torch.isfinite(slope).all()
    near = [[1e-3 * r, long, 0.4], [1e-5 * r, long, 0.4], [r, 1e-3 * long, 0.4], [r, 1e-5 * long, 0.4]]
    with torch.no_grad():
        values = case.df.log_prob(polar(*torch.tensor(near, dtype=torch.float64).T))
    drop = [float(values[0] - values[1]), float(values[2] - values[3])]
    low, high = DROPS[edge]
    assert low < min(drop), f"{type(case.df).__name__}: ln f towards J_r = 0 and L = 0 falls by {drop}"
    assert max(drop) < high, f"{type(case.df).__name__}: ln f towards J_r = 0 and L = 0 falls by {drop}"


def check_fixed(case: Case) -> None:
    """A copy with the same sites is the same density; nothing of it is a Pyro parameter."""
    with torch.no_grad():
        assert torch.equal(freeze(case.df, {}).log_prob(case.J[:20]), case.df.log_prob(case.J[:20]))
    assert not list(case.df.parameters())


def proposal(J: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Points scattered about stars in ln J_r and ln L with uniform cos i, and their log-density in J."""
    generator = torch.Generator().manual_seed(11)
    chosen = J[torch.randperm(len(J), generator=generator)[:300]]
    centres = torch.stack([chosen[:, 0], length(chosen)], -1).log()
    width = 0.6
    x = centres[torch.randint(len(centres), (n,), generator=generator)]
    x = x + width * torch.randn(n, 2, generator=generator, dtype=torch.float64)
    c = 2 * torch.rand(n, generator=generator, dtype=torch.float64) - 1
    distance = torch.cdist(x, centres) ** 2
    log_q = torch.logsumexp(-distance / (2 * width**2), -1) - math.log(2 * math.pi * width**2 * len(centres))
    # d^3 J = J_r L^2 dlnJ_r dlnL dcos i, and cos i has density 1/2
    return polar(x[:, 0].exp(), x[:, 1].exp(), c), log_q - x[:, 0] - 2 * x[:, 1] - math.log(2)


def coordinates(J: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return J_r, L and cos i."""
    return J[:, 0], length(J), J[:, 1] / length(J).clamp(min=1e-300)


def length(J: Tensor) -> Tensor:
    """Return L = J_z + |J_phi|."""
    return J[..., 2] + J[..., 1].abs()
