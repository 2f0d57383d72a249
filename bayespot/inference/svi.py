"""Stochastic variational inference: Adam on the ELBO from the Laplace approximation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor

from bayespot.inference.guides import WhitenedGuide
from bayespot.inference.latent import LatentSpace, stars_in
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

    Of large catalogues a random batch is scored at each step, with a `ControlVariate`.

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
    n = len(data)
    size = max(stars_in(data, config.batch_size), _LEAST_BATCH)
    # the control variate scores a batch twice
    control = ControlVariate(model, guide, data) if n > 2 * size else None
    scored: Any = model if control is None else control.scored
    loss = Trace_ELBO(num_particles=config.svi_particles)(scored, guide)
    guide(data[:1])
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
            batch = None
            if control is not None:
                batch = torch.randint(n, (size,))
                control.move(batch)
            optimiser.zero_grad()
            value = loss(data, batch)
            value.backward()
            optimiser.step()
            state["elbo"].append(-float(value.detach()))
            if step >= half:
                weight = 1 / (step - half + 1)
                for name, now in guide.state_dict().items():
                    mean[name] = now.clone() if name not in mean else mean[name].lerp(now, weight)
            bar.step(f"ELBO {-float(value.detach()):.1f}")
            if step % 10 == 9:
                state.update(
                    svi_step=step + 1, guide=guide.state_dict(), optimiser=optimiser.state_dict(), guide_mean=mean
                )
                save()
    state["guide"] = mean
    if not all(torch.isfinite(value).all() for value in mean.values()):
        raise FitError("the ELBO diverged: fit with guide='laplace', or a smaller svi_learning_rate")


class ControlVariate:
    r"""Takes the noise of the choice of a minibatch out of the log-likelihood, to first order about the MAP.

    A batch's log-likelihood :math:`\ell_b`, scaled to all n stars, is replaced by

    .. math:: \ell_b(u) - \ell_b(u_0) - \nabla\ell_b(u_0) \cdot (u - u_0) + \ell(u_0) + \nabla\ell(u_0) \cdot (u - u_0)

    which has the same mean. Per step the gradient is off by :math:`\sqrt{d / B}` posterior standard deviations for d
    latents and batches of B stars, instead of :math:`\sqrt{n / B}` (Baker et al. 2019, Statistics and Computing 29,
    599).

    Parameters
    ----------
    model, guide, data
        What is fitted; u_0 is the guide's centre.
    """

    def __init__(self, model: SnapshotModel, guide: WhitenedGuide, data: Tensor) -> None:
        self.model, self.guide, self.data = model, guide, data
        # the normalisation of a selection is the same for every batch
        self.space = LatentSpace(model.unnormalised())
        self.centre = guide.centre()
        self.value, self.slope = self.space.likelihood_gradient(self.centre, data)
        self.left = (torch.zeros_like(self.value), torch.zeros_like(self.slope))

    def move(self, batch: Tensor) -> None:
        """Take another batch, indices of stars."""
        value, slope = self.space.likelihood_gradient(self.centre, self.data[batch])
        scale = len(self.data) / len(batch)
        self.left = self.value - scale * value, self.slope - scale * slope

    def scored(self, data: Tensor, batch: Tensor) -> None:
        """Score the batch: the model with the control variate as a factor."""
        self.model(data, batch)
        value, slope = self.left
        pyro.factor("control_variate", value + slope @ (self.guide.latest - self.centre))


def step_seed(seed: int, step: int) -> int:
    """Return a seed per step, so that a resumed fit draws what the uninterrupted one would have drawn."""
    return (seed * 1_000_003 + step) % 2**31
