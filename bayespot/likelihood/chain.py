"""The augmentation chain: actions from f(J), angles at random, and back to phase space (steps C to G)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from bayespot.actions.base import ActionFinder, TorusMap
from bayespot.df.base import DistributionFunction
from bayespot.df.distributions import uniform_points
from bayespot.potential.base import Potential, Symmetry
from bayespot.units import takes_tensors


class AugmentedStars(NamedTuple):
    """Stars of a phase-mixed population: ``w (n, 6)``, ``weight (n,)``, ``J (n, 3)`` and ``theta (n, 3)``.

    Weights sum to one, less those of orbits that the map cannot reach (beyond 5e8 kpc), and differ from component to
    component of f(J). All but theta are differentiable in the parameters of f(J), w also in the potential's.
    """

    w: Tensor
    weight: Tensor
    J: Tensor
    theta: Tensor


class Chain:
    r"""One phase-mixed population: potential, canonical map and density of orbits.

    Parameters
    ----------
    potential, df
        Potential and density of orbits, their sites fixed.
    finder
        Action finder that is also a torus map, for instance `SphericalActions`.

    Raises
    ------
    ValueError
        If the finder has no inverse.

    References
    ----------
    Tenachi, Ibata & Diakogiannis (2023), arXiv:2305.16845, figure 1.

    Examples
    --------
    >>> import torch
    >>> from bayespot.actions.isochrone import IsochroneActions
    >>> from bayespot.df import SphericalMixture
    >>> from bayespot.potential.analytic import Isochrone
    >>> from bayespot.pyro_modules import freeze
    >>> J = 1000 * torch.rand(200, 3, dtype=torch.float64)
    >>> df = SphericalMixture().resolved(1, J)
    >>> df = freeze(df, df.fit_actions(J, seed=0))
    >>> chain = Chain(Isochrone(m_tot=1e11, r_s=3.0), df, IsochroneActions())
    >>> stars = chain.augment(1000, seed=1)
    >>> stars.w.shape, round(float(stars.weight.sum()), 6)
    (torch.Size([1000, 6]), 1.0)
    """

    def __init__(self, potential: Potential, df: DistributionFunction, finder: ActionFinder) -> None:
        if not isinstance(finder, TorusMap):
            raise ValueError(
                f"{type(finder).__name__} has no inverse (J, theta) -> (x, v), which the chain needs; use "
                "SphericalActions, IsochroneActions or StaeckelFudge"
            )
        self.potential, self.df, self.finder = potential, df, finder
        self._map: TorusMap = finder

    @property
    def symmetry(self) -> Symmetry:
        """The rotations that leave the population unchanged: those of the potential and of f(J) together."""
        order: tuple[Symmetry, ...] = ("spherical", "axisymmetric", "triaxial")
        return max(self.potential.symmetry, self.df.symmetry, key=order.index)

    def augment(self, n: int, seed: int) -> AugmentedStars:
        """Draw n weighted stars: J from f, as many from each of its components, theta uniform, mapped to (x, v).

        Orbits that the potential does not hold are left out, in an absurd one all of them.

        The random numbers (scrambled Sobol points) depend on ``seed`` only: at two values of the parameters
        the stars differ by the parameters alone, so sums over them are smooth functions.

        Parameters
        ----------
        n
            Number of stars; at least 16 for each component of f.
        seed
            Seed of the point set.
        """
        orbits = self.df.stratified(n, seed, n_spare=3)
        kept = self._map.reaches(self.potential, orbits.J)
        J, weight, theta = orbits.J[kept], orbits.weight[kept], 2 * math.pi * orbits.spare[kept]
        w = self._map.phase_space(self.potential, J, theta) if len(J) else J.new_zeros(0, 6)
        return AugmentedStars(w, weight, J, theta)

    @takes_tensors(w="phase_space")
    def log_density(self, w: Tensor) -> Tensor:
        r"""Return the closed form that the augmented stars follow, :math:`\ln f(J(w)) - 3 \ln 2\pi`.

        Parameters
        ----------
        w : Float[Tensor, "*batch 6"]
            Position (kpc) and velocity (km/s).

        Returns
        -------
        Float[Tensor, "*batch"]
            In (kpc km/s)^-3; minus infinity where the star is unbound.
        """
        J, excess = self.finder.capped_actions(self.potential, w)
        return torch.where(excess > 0, -torch.inf, self.df.log_prob(J) - 3 * math.log(2 * math.pi))


@takes_tensors(w="phase_space")
def rotate(w: Tensor, symmetry: Symmetry, m: int, seed: int) -> Tensor:
    """Return m rotations ``(m, n, 6)`` of each star, from the group that leaves the population unchanged.

    All of SO(3) for a spherical population, rotations about z for an axisymmetric one, evenly spread for every star and
    shifted at random from star to star; a triaxial one has the reflections in its three principal planes (x and v
    together), of which m are drawn at random.
    """
    generator = torch.Generator().manual_seed(seed + 1_000_003)
    n = len(w)
    if symmetry == "triaxial":
        matrices = torch.diag_embed(torch.randint(2, (m, n, 3), generator=generator).double() * 2 - 1)
    else:
        shift = torch.rand(n, 3, generator=generator, dtype=torch.float64)
        u = torch.remainder(uniform_points(m, 3, seed)[:, None] + shift, 1)
        matrices = _about_z(2 * math.pi * u[..., 0]) if symmetry == "axisymmetric" else _rotation(_quaternions(u))
    return torch.einsum("mnij,nkj->mnki", matrices, w.reshape(n, 2, 3)).reshape(m, n, 6)


@takes_tensors(w="phase_space")
def oriented(w: Tensor, seed: int) -> Tensor:
    """Return each star of ``w (n, 6)`` in an orientation of its own, those of any run of stars evenly spread."""
    matrices = _rotation(_quaternions(uniform_points(len(w), 3, seed)))
    return torch.einsum("nij,nkj->nki", matrices, w.reshape(-1, 2, 3)).reshape(-1, 6)


def _about_z(angle: Tensor) -> Tensor:
    zero, one = torch.zeros_like(angle), torch.ones_like(angle)
    rows = [[angle.cos(), -angle.sin(), zero], [angle.sin(), angle.cos(), zero], [zero, zero, one]]
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


def _quaternions(u: Tensor) -> Tensor:
    """Return uniform unit quaternions (*batch, 4) from uniforms (*batch, 3) (Shoemake 1992, Graphics Gems III, 124)."""
    a, b, c = u[..., 0], 2 * math.pi * u[..., 1], 2 * math.pi * u[..., 2]
    return torch.stack([(1 - a).sqrt() * b.sin(), (1 - a).sqrt() * b.cos(), a.sqrt() * c.sin(), a.sqrt() * c.cos()], -1)


def _rotation(q: Tensor) -> Tensor:
    """Rotation matrices of unit quaternions (s, a, b, c)."""
    s, a, b, c = q.unbind(-1)
    rows = [
        [1 - 2 * (b * b + c * c), 2 * (a * b - s * c), 2 * (a * c + s * b)],
        [2 * (a * b + s * c), 1 - 2 * (a * a + c * c), 2 * (b * c - s * a)],
        [2 * (a * c - s * b), 2 * (b * c + s * a), 1 - 2 * (a * a + b * b)],
    ]
    return torch.stack([torch.stack(row, -1) for row in rows], -2)
