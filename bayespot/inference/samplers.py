"""Posterior draws without a Gaussian: NUTS, Stein particles (SVGD), and Hamiltonian Monte Carlo with an emulator."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from pyro.infer import MCMC, NUTS
from torch import Tensor

from bayespot.inference.emulator import Emulator
from bayespot.inference.hmc import N_CHAINS, Chains, hmc, n_trajectories, r_hat, starts
from bayespot.inference.latent import LatentSpace, whitening
from bayespot.optimisers import Adam

#: 50 particles have 0.98, 0.94 and 0.89 of a Gaussian's sd in 1, 2 and 3 dimensions; 0.84, 0.64, 0.52 in 4, 8, 12.
SVGD_MAX_SIZE = 3
#: Draws at which an emulator is made to agree with the exact posterior.
_REFINING = 32
#: A trajectory of NUTS has at most 2^this steps.
MAX_TREE_DEPTH = 7


class WhitenedPosterior:
    r"""The exact posterior density as a function of z, :math:`u = u_0 + C z` with C C^T the inverse information.

    Parameters
    ----------
    space, data
        Latents, and the stars as `SnapshotModel.prepare` returns them.
    u_0 : Float[Tensor, "size"]
        The MAP.
    information : Float[Tensor, "size size"]
        Fisher information there.
    joint
        Whether z moves f(J) too; otherwise it stays at u_0 and the posterior is conditional on it.
    """

    def __init__(self, space: LatentSpace, data: Tensor, u_0: Tensor, information: Tensor, joint: bool) -> None:
        self.space, self.data, self.u_0 = space, data, u_0
        self.size = space.size if joint else space.n_potential
        self.C = whitening(information[: self.size, : self.size])

    def u(self, z: Tensor) -> Tensor:
        """Return the unconstrained latents at z ``(*batch, size)``."""
        rest = self.u_0[self.size :].expand(*z.shape[:-1], -1)
        return torch.cat([self.u_0[: self.size] + z @ self.C.T, rest], -1)

    def log_prob_and_slope(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return ln p and its gradient in z ``(size,)``; minus infinity and zero where a latent overflows."""
        u = self.u(z.detach())
        if all(bool(torch.isfinite(value).all()) for value in self.space.values(u).values()):
            value, slope = self.space.gradient(u, self.data)
            if torch.isfinite(value) and torch.isfinite(slope).all():
                return value, slope[: self.size] @ self.C
        return torch.full((), -torch.inf, dtype=torch.float64), torch.zeros_like(z)


class _Potential(torch.autograd.Function):
    """-ln p(z) with the gradient that is computed block by block, for Pyro's samplers."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, target: WhitenedPosterior) -> Tensor:
        value, slope = target.log_prob_and_slope(z)
        ctx.save_for_backward(slope)
        return -value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (slope,) = ctx.saved_tensors
        return -grads[0] * slope, None


class Chain(NamedTuple):
    """One chain: z ``(n, size)`` and the number of divergent transitions after warm-up."""

    z: Tensor
    n_divergent: int


def nuts(target: WhitenedPosterior, n: int, warmup: int, seed: int, tick: Callable[[str], None]) -> Chain:
    """Draw one chain with Pyro's NUTS, from a draw of the Laplace approximation.

    Hoffman & Gelman (2014), JMLR 15, 1593. A trajectory costs some ten gradients: for small catalogues.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        start = torch.randn(target.size, dtype=torch.float64)
        kernel = NUTS(
            potential_fn=lambda latents: _Potential.apply(latents["z"], target),
            target_accept_prob=0.8,
            max_tree_depth=MAX_TREE_DEPTH,
        )
        sampler = MCMC(
            kernel,
            num_samples=n,
            warmup_steps=warmup,
            initial_params={"z": start},
            disable_progbar=True,
            hook_fn=lambda _kernel, _samples, stage, _i: tick(stage.lower()),
        )
        sampler.run()
    found = sampler.diagnostics()
    return Chain(sampler.get_samples()["z"].detach(), len(found["divergences"]["chain 0"]))


def check_svgd_size(size: int) -> None:
    """Refuse SVGD where its particles would collapse.

    Raises
    ------
    ValueError
        Above `SVGD_MAX_SIZE` latents.
    """
    if size > SVGD_MAX_SIZE:
        raise ValueError(
            f"SVGD moves {size} latents, and its particles are too narrow above {SVGD_MAX_SIZE}: "
            "take guide='full_rank', or 'nuts' for few stars"
        )


def svgd(target: WhitenedPosterior, n: int, steps: int, seed: int, tick: Callable[[str], None]) -> tuple[Tensor, float]:
    r"""Move n particles to the posterior by Stein variational gradient descent with Adam.

    .. math::
        \phi(z_i) = \frac1n \sum_j k(z_j, z_i) \nabla \ln p(z_j) + \nabla_{z_j} k(z_j, z_i), \qquad
        k = \exp(-|z_i - z_j|^2/h), \quad h = \mathrm{med}^2 / \ln n

    They start from draws of the Laplace approximation. Finitely many particles are narrower than the posterior, the
    more so the more dimensions (Ba et al. 2021, ICLR). Liu & Wang (2016), NeurIPS, equation 8.

    Returns
    -------
    z : Float[Tensor, "n size"]
        The particles.
    rest : float
        Root mean square of phi at the end, over that at the start.
    """
    check_svgd_size(target.size)
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(n, target.size, generator=generator, dtype=torch.float64)
    optimiser = Adam([z], lr=0.05)
    first = last = 0.0
    for step in range(steps):
        slope = torch.stack([target.log_prob_and_slope(particle)[1] for particle in z])
        phi = stein_direction(z, slope)
        last = float((phi**2).mean() ** 0.5)
        first = first or last
        for group in optimiser.param_groups:
            group["lr"] = 0.05 * min(1.0, 2 * (1 - step / steps) + 0.05)
        z.grad = -phi
        optimiser.step()
        tick(f"direction {last:.2g}")
    return z.detach(), last / first if first else 0.0


def stein_direction(z: Tensor, slope: Tensor) -> Tensor:
    """Return phi of `svgd` at every particle ``(n, size)``, given the gradients of ln p there."""
    n = len(z)
    square = torch.cdist(z, z) ** 2
    h = square[~torch.eye(n, dtype=torch.bool)].median() / math.log(n)
    kernel = (-square / h).exp()
    repulsion = 2 / h * (z * kernel.sum(-1, keepdim=True) - kernel @ z)
    return (kernel @ slope + repulsion) / n


class Emulated(NamedTuple):
    """Draws ``(n, size)`` of an emulated posterior, the emulator, and the largest r-hat of their chains.

    The draws' density is the emulator's `log_proposal`.
    """

    u: Tensor
    emulator: Emulator
    r_hat: float


def emulated(emulator: Emulator, u: Tensor, data: Tensor, n: int, seed: int, tick: Callable[[str], None]) -> Emulated:
    """Draw latents with an emulator of their likelihood; those that it does not draw (of f(J)) are as at u.

    The emulator is refined where its chains are, which need not be where the maximum is (`Emulator.refined`). Chains
    are of the potential's latents; f(J), where it is drawn, is drawn in the potential of each (`Emulator.with_orbits`).

    Parameters
    ----------
    emulator, u
        The emulator near the maximum, and the maximum.
    data : Float[Tensor, "n_stars 6"]
        Stars.
    n, seed
        Number of draws, and their seed.
    tick
        Called with a note after each of `n_emulated_steps`.
    """
    d = emulator.space.n_potential
    generator = torch.Generator().manual_seed(seed)

    def whole(some: Tensor) -> Tensor:
        return torch.cat([some, u[d:].expand(len(some), -1)], 1)

    def chains(of: Emulator, n: int, seed: int, warm: Chains | None = None) -> Chains:
        def gradients(some: Tensor) -> tuple[Tensor, Tensor]:
            value, slope = of.gradients(whole(some))
            return value, slope[:, :d]

        return hmc(gradients, starts(u[:d], of.information, seed), of.information, n, seed, tick, warm)

    first = chains(emulator.proposal(), N_CHAINS, seed)
    places = emulator.with_orbits(whole(first.u[-1][:_REFINING]), generator)
    refined = emulator.refined(places, data, lambda: tick(""))
    found = chains(refined.proposal(), max(n, 2 * N_CHAINS), seed + 1, first)
    order = torch.randperm(found.u[..., 0].numel(), generator=torch.Generator().manual_seed(seed))
    draws = refined.with_orbits(whole(found.u.flatten(0, 1)[order[:n]]), generator)
    return Emulated(draws, refined, float(r_hat(found.u).max()))


def n_emulated_steps(n: int) -> int:
    """Return how often `emulated` reports on the way to n draws."""
    return n_trajectories(N_CHAINS) + _REFINING + n_trajectories(max(n, 2 * N_CHAINS), warm=True)
