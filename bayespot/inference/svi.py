"""Stochastic variational inference: Adam on the ELBO from the Laplace approximation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from bayespot.inference.blocks import stars_in
from bayespot.inference.guides import WhitenedGuide
from bayespot.inference.latent import LatentSpace
from bayespot.inference.result import FitConfig, FitError
from bayespot.likelihood.model import SnapshotModel
from bayespot.optimisers import Adam
from bayespot.progress import Progress

#: Fewest stars in a batch.
_LEAST_BATCH = 1000
#: Highest default learning rate, and its product with the number of latents where these are many: the noise of the
#: d (d + 1) / 2 numbers of a covariance costs nats in proportion to rate times d^2.
_RATE, _RATE_TIMES_SIZE = 0.03, 0.5


def maximise_elbo(
    model: SnapshotModel,
    guide: WhitenedGuide,
    data: Tensor,
    config: FitConfig,
    state: dict[str, Any],
    save: Callable[[], None],
    bar: Progress,
) -> None:
    """Maximise the ELBO; the second half of the iterates is averaged.

    Of large catalogues a random batch is scored at each step, with a control variate (`Minibatches`).

    Parameters
    ----------
    model, guide, data, config
        What is fitted: the stars are as `SnapshotModel.prepare` returns them.
    state
        The fit's state, continued from: ``guide`` (parameters), ``svi_step``, ``elbo``, ``optimiser`` and
        ``guide_mean``. In the end ``guide`` holds the average.
    save
        Called every ten steps, when ``state`` is consistent.

    Raises
    ------
    FitError
        If the ELBO diverges.
    """
    bar.stage("variational inference", config.svi_steps)
    bar.step(n=state["svi_step"])
    size = max(stars_in(data, config.batch_size), _LEAST_BATCH)
    target: _Target = FullBatch(model, data)
    if len(data) > 2 * size:
        target = Minibatches(model, guide.centre(), data, size, config.seed)
    guide.load_state_dict(state["guide"])
    rate = config.svi_learning_rate or min(_RATE, _RATE_TIMES_SIZE / guide.largest_block)
    optimiser = Adam(list(guide.parameters()), lr=rate, betas=(0.9, 0.99))
    if "optimiser" in state:
        optimiser.load_state_dict(state["optimiser"])
    mean: dict[str, Tensor] = state.get("guide_mean", {})
    half = config.svi_steps // 2
    with torch.random.fork_rng():
        for step in range(state["svi_step"], config.svi_steps):
            torch.manual_seed(step_seed(config.seed, step))
            for group in optimiser.param_groups:
                group["lr"] = rate * min(1.0, 2 * (1 - step / config.svi_steps) + 0.05)
            target.next_batch()
            optimiser.zero_grad()
            elbo = 0.0
            for _ in range(config.svi_particles):
                u, log_q = guide.rsample()
                value, slope = target.gradient(u.detach())
                # the gradient of -ELBO by the guide's parameters, without the graph of the likelihood
                ((log_q - slope @ u) / config.svi_particles).backward()
                elbo += float(value - log_q.detach()) / config.svi_particles
            optimiser.step()
            state["elbo"].append(elbo)
            if step >= half:
                weight = 1 / (step - half + 1)
                for name, now in guide.state_dict().items():
                    mean[name] = now.clone() if name not in mean else mean[name].lerp(now, weight)
            bar.step(f"ELBO {elbo:.1f}")
            if step % 10 == 9:
                state.update(
                    svi_step=step + 1, guide=guide.state_dict(), optimiser=optimiser.state_dict(), guide_mean=mean
                )
                save()
    state["guide"] = mean
    if not all(torch.isfinite(value).all() for value in mean.values()):
        raise FitError("the ELBO diverged: fit with guide='laplace', or a smaller svi_learning_rate")


class FullBatch:
    """The log posterior of all stars and its gradient."""

    def __init__(self, model: SnapshotModel, data: Tensor) -> None:
        self.space, self.data = LatentSpace(model), data

    def next_batch(self) -> None:
        """All stars are one batch."""

    def gradient(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log posterior at u and its gradient."""
        return self.space.gradient(u, self.data)


class Minibatches:
    r"""The log posterior from minibatches, with a control variate, to first order about u_0, against their noise.

    A batch's log-likelihood :math:`\ell_b`, scaled to all n stars, is replaced by

    .. math:: \ell_b(u) - \ell_b(u_0) - \nabla\ell_b(u_0) \cdot (u - u_0) + \ell(u_0) + \nabla\ell(u_0) \cdot (u - u_0)

    which has the same mean. Per step the gradient is off by :math:`\sqrt{d / B}` posterior standard deviations for d
    latents and batches of B stars, instead of :math:`\sqrt{n / B}` (Baker et al. 2019, Statistics and Computing 29,
    599). The catalogue is parted into batches once, so what a batch contributes at u_0 is computed once.

    Parameters
    ----------
    model, data
        What is fitted.
    centre
        u_0.
    size, seed
        Stars in a batch, and the seed of the partition.
    """

    def __init__(self, model: SnapshotModel, centre: Tensor, data: Tensor, size: int, seed: int) -> None:
        self.space, self.data, self.centre = LatentSpace(model), data, centre
        # the normalisation of a selection is the same for every batch
        space = LatentSpace(model.unnormalised())
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
        self.batches = order.tensor_split(round(len(data) / size))
        self.parts = [space.likelihood_gradient(centre, data[batch]) for batch in self.batches]
        self.value, self.slope = (torch.stack(part).sum(0) for part in zip(*self.parts, strict=True))
        self.k = 0

    def next_batch(self) -> None:
        """Take the batch of a random star: batches of unequal size each as often as it is large."""
        sizes = torch.tensor([float(len(batch)) for batch in self.batches])
        self.k = int(torch.multinomial(sizes, 1))

    def gradient(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Return the estimate of the log posterior at u and its gradient."""
        batch = self.batches[self.k]
        scale = len(self.data) / len(batch)
        value, slope = self.space.likelihood_gradient(u, self.data[batch])
        prior, prior_slope = self.space.prior_gradient(u)
        of_batch, of_batch_slope = self.parts[self.k]
        rest, rest_slope = self.value - scale * of_batch, self.slope - scale * of_batch_slope
        value = prior + scale * value + rest + rest_slope @ (u - self.centre)
        return value, prior_slope + scale * slope + rest_slope


_Target: TypeAlias = FullBatch | Minibatches


def step_seed(seed: int, step: int) -> int:
    """Return a seed per step, so that a resumed fit draws what the uninterrupted one would have drawn."""
    return (seed * 1_000_003 + step) % 2**31
