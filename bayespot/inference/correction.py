r"""What an approximation of a density lacks, as a smooth function learned from noisy ratios.

Laplace's method gives the evidence of a potential without noise, and with a small error that changes slowly from one
potential to the next. An average of a few importance weights has no error in its mean, and noise: as the value of a
density it has one potential count several times what it should. So the former is sampled, and the latter tells what the
draws' weights must be multiplied by:

.. math:: R_i = \frac{\hat p(x_i)}{p_{Laplace}(x_i)}, \qquad E[R_i | x_i] \approx \exp(a + b \cdot x_i).

a and b solve the estimating equations of a generalised linear model with a logarithmic link and noise in proportion to
the mean (McCullagh & Nelder 1989, Generalized Linear Models, section 8.3), which need no more of the noise than that it
has none in the mean.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bayespot.inference.proposals import effective

#: Prior standard deviation of the slopes, per standard deviation of x.
_SLOPE = 0.5
#: Newton steps, and where they end.
_STEPS, _TOLERANCE = 50, 1e-8
#: Largest change of the coefficients in a step.
_LONGEST = 1.0


def log_ratio(x: Tensor, ratio: Tensor, log_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return a ``()`` and b ``(d,)`` of the mean of the ratios at draws, exp(a + b . x).

    Parameters
    ----------
    x : Float[Tensor, "n d"]
        Draws.
    ratio : Float[Tensor, "n"]
        Of the density over its approximation, with noise of any size about its mean; none is negative, some are not
        zero.
    log_weights : Float[Tensor, "n"]
        Of the draws.

    Raises
    ------
    ValueError
        If no ratio of a draw with weight is positive.
    """
    weight = torch.softmax(log_weights, 0)
    mean_ratio = weight @ ratio
    if not float(mean_ratio) > 0:
        raise ValueError("no draw of f(J) in any potential has a finite log posterior")
    mean = weight @ x
    sd = (weight @ (x - mean) ** 2).sqrt().clamp(min=1e-12)
    design = torch.cat([torch.ones_like(x[:, :1]), (x - mean) / sd], -1)
    scaled = ratio / mean_ratio
    # as many observations as draws are effective, each with the scatter that there is
    noise = (weight @ (scaled - 1) ** 2).clamp(min=1e-6)
    precision = effective(log_weights) * weight / noise
    prior = torch.full_like(design[0], _SLOPE**-2)
    prior[0] = 0
    found = torch.zeros_like(design[0])
    for _ in range(_STEPS):
        over = scaled * (-design @ found).exp()
        slope = design.T @ (precision * (over - 1)) - prior * found
        curvature = (precision * over * design.T) @ design + prior.diag()
        step = torch.linalg.solve(curvature, slope)
        found = found + step * (_LONGEST / step.abs().max().clamp(min=_LONGEST))
        if float(step.abs().max()) < _TOLERANCE:
            break
    b = found[1:] / sd
    return mean_ratio.log() + found[0] - b @ mean, b
