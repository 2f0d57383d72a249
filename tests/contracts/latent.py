"""What the log posterior of every model must satisfy."""

from __future__ import annotations

import torch
from torch import Tensor

from bayespot.inference.latent import LatentSpace


def check_gradient(space: LatentSpace, u: Tensor, w: Tensor) -> None:
    """Central differences of ln p (step 1e-4) agree with its gradient to 1e-5 of the largest component."""
    _, slope = space.gradient(u, w)
    for k in range(space.size):
        step = torch.zeros_like(u)
        step[k] = 1e-4
        difference = (space.log_posterior(u + step, w) - space.log_posterior(u - step, w)) / 2e-4
        assert abs(float(difference - slope[k])) < 1e-5 * float(slope.abs().max()), k


def check_scores(space: LatentSpace, u: Tensor, w: Tensor) -> None:
    """Scores of single stars add up to the gradient of ln p, to 1e-5 of its largest component."""
    _, slope = space.likelihood_gradient(u, w)
    torch.testing.assert_close(space.scores(u, w).sum(0), slope, rtol=0, atol=1e-5 * float(slope.abs().max()))
