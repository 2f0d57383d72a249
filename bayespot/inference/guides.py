"""Variational guides in coordinates whitened by the Fisher information."""

from __future__ import annotations

from typing import Literal

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.transforms import LowerCholeskyAffine
from pyro.nn import PyroModule, PyroParam
from torch import Tensor

from bayespot.inference.latent import LatentSpace, whitening

Family = Literal["full_rank", "low_rank", "mean_field", "point"]
#: How f(J) is guided: by a block of its own, or jointly with the potential in one Gaussian.
OrbitsFamily = Literal["full_rank", "low_rank", "mean_field", "point", "joint"]


class WhitenedGuide(PyroModule):
    r"""Gaussian guide :math:`u = u_0 + C (m + A \epsilon)` over the unconstrained latents.

    u_0 is the MAP and C C^T the inverse Fisher matrix (block-diagonal between potential and f(J), which
    the score identity makes exact to first order), so the Laplace approximation is m = 0, A = 1, and one
    learning rate suits every direction. Each of the two blocks has its own family: ``full_rank`` (A lower
    triangular), ``low_rank`` (:math:`A A^T = D + W W^T`, D diagonal and W of ``rank`` columns: departures from the
    Laplace approximation in a few directions), ``mean_field`` (A diagonal: independent in u, not in the whitened
    coordinates) or ``point`` (a point mass). With ``df="joint"`` both are one block of the potential's family: with a
    selection or measurement errors the identity does not hold, and what f(J) leaves open widens the potential's
    posterior.
    """

    def __init__(
        self,
        space: LatentSpace,
        u_0: Tensor,
        information: Tensor,
        potential: Family,
        df: OrbitsFamily,
        rank: int = 4,
    ) -> None:
        super().__init__()
        self.space = space
        self.blocks: dict[str, tuple[slice, Family]] = {}
        n = space.n_potential
        parts: list[tuple[str, slice, Family]]
        if df == "joint":
            parts = [("all", slice(0, space.size), potential)]
        else:
            parts = [("potential", slice(0, n), potential), ("df", slice(n, space.size), df)]
        for name, part, family in parts:
            if part.start == part.stop:
                continue
            block = information[part, part]
            # independent Gaussians of least divergence have the conditional variances 1 / F_kk
            factor = block.diagonal().rsqrt().diag() if family == "mean_field" else whitening(block)
            size = part.stop - part.start
            self.blocks[name] = (part, family)
            self.register_buffer(f"{name}_centre", u_0[part].clone())
            self.register_buffer(f"{name}_factor", factor)
            setattr(self, f"{name}_shift", PyroParam(torch.zeros(size, dtype=torch.float64)))
            if family != "point":
                setattr(self, f"{name}_ln_scale", PyroParam(torch.zeros(size, dtype=torch.float64)))
            if family == "full_rank":
                setattr(self, f"{name}_lower", PyroParam(torch.zeros(size, size, dtype=torch.float64)))
            if family == "low_rank":
                # at W = 0 the expected gradient of W vanishes: start a little beside it, the same for every seed
                generator = torch.Generator().manual_seed(0)
                W = 0.05 * torch.randn(size, min(rank, size), generator=generator, dtype=torch.float64)
                setattr(self, f"{name}_low", PyroParam(W))

    def block_distribution(self, name: str, detached: bool = False) -> dist.TorchDistribution:
        """Return the distribution of one block of u, on request without the graph of its parameters."""
        _, family = self.blocks[name]

        def own(parameter: str) -> Tensor:
            value = getattr(self, f"{name}_{parameter}")
            return value.detach() if detached else value

        factor = own("factor")
        mean = own("centre") + factor @ own("shift")
        if family == "point":
            return dist.Delta(mean, event_dim=1)
        scale = own("ln_scale").exp()
        if family == "mean_field":
            return dist.Normal(mean, factor.diagonal() * scale).to_event(1)
        if family == "low_rank":
            inner = dist.LowRankMultivariateNormal(own("shift"), own("low"), scale**2)
            return dist.TransformedDistribution(inner, [LowerCholeskyAffine(own("centre"), factor)])
        root = factor @ (own("lower").tril(-1) + scale.diag())
        return dist.MultivariateNormal(mean, scale_tril=root)

    def _sample(self, name: str) -> tuple[Tensor, Tensor]:
        """Sample one block; return it with its log-density, which is differentiable through the sample only.

        The score of q has zero mean and is left out ("sticking the landing", Roeder, Wu & Duvenaud 2017):
        the gradient's noise vanishes as the guide approaches the posterior, so widths come out sharp.
        """
        z = self.block_distribution(name).rsample()
        point = self.blocks[name][1] == "point"
        return z, z.new_zeros(()) if point else self.block_distribution(name, detached=True).log_prob(z)

    def rsample(self) -> tuple[Tensor, Tensor]:
        """Return a sample of u ``(size,)`` and its log-density, with the graphs that the ELBO needs; no Pyro sites."""
        parts, log_q = zip(*(self._sample(name) for name in self.blocks), strict=True)
        return torch.cat(parts), torch.stack(log_q).sum()

    def forward(self, *args: object, **kwargs: object) -> None:
        """Sample every site of the model, whatever the model's arguments."""
        parts = []
        for name in self.blocks:
            z, density = self._sample(name)
            whole = dist.Delta(z, log_density=density, event_dim=1)
            parts.append(pyro.sample(f"_{name}", whole, infer={"is_auxiliary": True}))
        u, space = torch.cat(parts), self.space
        for name, value in space.values(u).items():
            raw = u[space.slices[name]].reshape(space.shapes[name])
            log_jacobian = space.transforms[name].log_abs_det_jacobian(raw, value).sum()
            pyro.sample(name, dist.Delta(value, log_density=-log_jacobian, event_dim=value.dim()))

    @property
    def largest_block(self) -> int:
        """Number of latents of the largest block that is not a point mass (1 if all are)."""
        return max((part.stop - part.start for part, family in self.blocks.values() if family != "point"), default=1)

    def centre(self) -> Tensor:
        """Return u_0 ``(size,)``, the MAP."""
        return torch.cat([getattr(self, f"{name}_centre") for name in self.blocks])

    @torch.no_grad()
    def draw(self, n: int, seed: int) -> tuple[Tensor, Tensor]:
        """Return n draws of u ``(n, size)`` and the log-density of their Gaussian blocks ``(n,)``."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            parts, log_q = [], torch.zeros(n, dtype=torch.float64)
            for name, (_, family) in self.blocks.items():
                distribution = self.block_distribution(name)
                part = distribution.sample(torch.Size([n]))
                parts.append(part)
                if family != "point":
                    log_q = log_q + distribution.log_prob(part)
        return torch.cat(parts, -1), log_q


def mean_field_narrowing(information: Tensor, n: int) -> float:
    r"""Return how much narrower than the posterior independent Gaussians are, in the worst of the first n latents.

    The least of :math:`[F_{kk} (F^{-1})_{kk}]^{-1/2}`, the conditional over the marginal standard deviation: what the
    mean field of least divergence does to a Gaussian posterior with information F (Bishop 2006, section 10.1.2).
    """
    marginal = torch.linalg.pinv(information, hermitian=True).diagonal()
    return float((information.diagonal() * marginal).rsqrt()[:n].min())
