"""Posteriors of a potential made without a fit, for the tests of distillation: truth plus a smooth random error."""

from __future__ import annotations

from concurrent.futures import Executor, Future

import numpy as np
import torch

from bayespot.distill.target import Target
from bayespot.potential import Potential


def made_target(
    potential: Potential, sd: float = 0.01, seed: int = 0, n_radii: int = 30, n_draws: int = 300, r_0: float = 9.0
) -> Target:
    """Return draws of Phi = truth (1 + smooth error); the posterior mean is itself one such error away from the truth.

    The error is a sum of nine tanh steps in ln r with independent normal heights, ``sd`` in all.
    """
    rng = np.random.default_rng(seed)
    x = np.geomspace(0.12, 40.0, n_radii)
    points = np.append(x, 1.0) * r_0
    r = torch.as_tensor(points)
    v2 = float((potential.circular_speed(torch.tensor(r_0).double()) ** 2).detach())
    truth = -potential.phi_r(r).detach().numpy() / v2
    truth_slope = potential.radial_acceleration(r).detach().numpy() * points / v2
    s, centres, width = np.log(points / r_0), np.linspace(-2.2, 3.8, 9), 0.9
    steps = np.tanh((s[:, None] - centres) / width)
    step_slopes = (1 - steps**2) / width
    heights = sd / 3 * (rng.standard_normal(9) + rng.standard_normal((n_draws, 9)))
    error, slope = heights @ steps.T, heights @ step_slopes.T
    y, dy = truth * (1 + error), truth_slope * (1 + error) + truth * slope
    stars_r = r_0 * np.exp(rng.standard_normal(500))
    return Target(x, y[:, :-1], dy[:, :-1], y[:, -1], r_0, v2**0.5, stars_r)


class Here(Executor):
    """Runs a call at once, in this process; counts them."""

    def __init__(self) -> None:
        self.n_calls = 0

    def submit(self, fn, /, *args, **kwargs):
        """Return a finished future."""
        self.n_calls += 1
        future: Future = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future
