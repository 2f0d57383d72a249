"""The way to the maximum a posteriori: Adam until every star is bound, then whitened full-batch L-BFGS."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bayespot.inference.blocks import mapped
from bayespot.inference.latent import LatentSpace, whitening
from bayespot.likelihood.normalisation import escape_speed
from bayespot.numerics import wall
from bayespot.optimisers import LBFGS, Adam
from bayespot.potential.base import radius

Report = Callable[[Tensor, str], None]
#: Errors of a line-of-sight velocity by which it must exceed the speed of escape.
_SURELY = 3.0
#: How much worse than the best, in ln p, a trial step counts that leads to where nothing is finite.
_WALL = 1e6
#: Evaluations that L-BFGS may come back to.
_KEPT = 30
#: Longest first step of L-BFGS, in units of the gradient's direction.
_LONGEST = 100.0
#: Pairs of opposite draws over which `displacement` averages.
DISPLACED_PAIRS = 4


def adam_until_bound(
    space: LatentSpace, u: Tensor, w: Tensor, steps: int, learning_rate: float, report: Report
) -> Tensor:
    """Climb from ``u`` with Adam; at least ``steps`` steps, at most ten times as many, until all are bound.

    Parameters
    ----------
    space
        The model's latents.
    u : Float[Tensor, "size"]
        Start.
    w : Float[Tensor, "n 6"]
        Stars (a subset is enough; the most energetic ones should be among them).
    report
        Called with (u, note) after every step.
    """
    u = u.clone()
    optimiser = Adam([u], lr=learning_rate)
    for i in range(10 * steps):
        value, slope = space.gradient(u, w)
        u.grad = -slope / len(w)
        optimiser.step()
        report(u, f"ln p per star {float(value) / len(w):.4f}")
        if i + 1 >= steps and (i + 1) % 10 == 0 and count_unbound(space, u, w) == 0:
            break
    return u.detach()


@torch.no_grad()
def count_unbound(space: LatentSpace, u: Tensor, w: Tensor) -> int:
    """Return how many stars are unbound at ``u``; of the samples of a star with errors, one bound is enough.

    ``w`` is ``(n, 6)`` or, as `SnapshotModel.prepare` returns it, ``(n, S, 7)`` with log-weights last.
    """
    if not len(w):
        # all are foreign
        return 0
    fixed = space.model.at(space.values(u))
    if (sky := fixed.projection) is not None:
        # nowhere along the line of sight is a star held better than where it is nearest to the centre
        R = radius(w[:, :2]) * torch.as_tensor(sky.ln_distance).exp()
        slowest = (w[:, 2] - torch.as_tensor(sky.velocity)).abs() - _SURELY * w[:, 3]
        return int((slowest > escape_speed(fixed.potential, R)).sum())
    fixed = fixed.tabulated(w)

    def unbound(block: Tensor) -> int:
        loose = fixed.finder.capped_actions(fixed.potential, block[..., :6].reshape(-1, 6)).excess > 0
        loose = loose.reshape(block.shape[:-1])
        if block.dim() == 3:
            # a sample of weight zero is nowhere
            loose = (loose | torch.isneginf(block[..., 6])).all(-1)
        return int(loose.sum())

    return sum(mapped(unbound, w))


def lbfgs(
    space: LatentSpace,
    u: Tensor,
    w: Tensor,
    information: Tensor,
    tolerance: float,
    max_iterations: int,
    report: Report,
) -> tuple[Tensor, float, int]:
    """Maximise the log posterior by L-BFGS with a strong-Wolfe line search in whitened coordinates.

    With u = u_0 + C z, C C^T the inverse information, the gradient with respect to z is the distance to
    the maximum in posterior standard deviations, so ``tolerance`` has a meaning: 0.05 leaves the MAP a
    twentieth of a standard deviation off.

    Returns
    -------
    u, gradient_norm, iterations
        The point with the highest posterior reached, the norm of the whitened gradient there, and the
        number of iterations done.
    """
    C, u_0 = whitening(information), u.clone()
    z = torch.zeros_like(u, requires_grad=True)
    latest: dict[str, Any] = {"norm": torch.inf, "value": -torch.inf, "best": u_0, "z": z.detach().clone()}
    # a short history per call, so that progress and checkpoints happen between the calls
    optimiser = LBFGS(
        [z], max_iter=4, history_size=30, line_search_fn="strong_wolfe", tolerance_grad=0, tolerance_change=0
    )

    known: dict[bytes, tuple[Tensor, Tensor]] = {}

    def closure() -> Tensor:
        # every call of the optimiser begins where the last one ended
        key = z.detach().numpy().tobytes()
        if key not in known:
            if len(known) == _KEPT:
                known.pop(next(iter(known)))
            known[key] = evaluated()
        value, z.grad = known[key]
        return value

    def evaluated() -> tuple[Tensor, Tensor]:
        here = u_0 + C @ z.detach()
        sane = space.valid(here)
        if sane:
            value, slope = space.gradient(here, w)
            sane = bool(torch.isfinite(value) and torch.isfinite(slope).all())
        if not sane:
            # far worse than the best, yet finite: the line search interpolates and shortens the step
            rise, slope = wall(z, latest["z"], _WALL)
            return rise - latest["value"], slope
        slope = -(C.T @ slope)
        if float(value) > latest["value"]:
            latest.update(value=float(value), norm=float(slope.norm()), best=here, z=z.detach().clone())
        return -value, slope

    closure()
    # in these coordinates the first step of a Newton iteration is the gradient itself
    (group,) = optimiser.param_groups
    group.update(lr=max(1.0, min(float(z.grad.abs().sum()), _LONGEST)), max_iter=1)  # type: ignore[union-attr]
    done, stalled, previous = 0, 0, -torch.inf
    while done < max_iterations:
        optimiser.step(closure)
        done += group["max_iter"]
        group.update(lr=1.0, max_iter=4)
        report(latest["best"], f"ln p {latest['value']:.3f}, {latest['norm']:.2g} sd from the maximum")
        if latest["norm"] < tolerance:
            break
        # two calls without a gain of 0.001 in ln p: rounding is reached
        stalled = stalled + 1 if latest["value"] < previous + 1e-3 else 0
        previous = latest["value"]
        if stalled >= 2:
            break
    return latest["best"], float(latest["norm"]), done


def displacement(
    space: LatentSpace, finer: LatentSpace, u: Tensor, information: Tensor, n_stars: int, seed: int
) -> float:
    r"""Return how far another normalisation of the selection moves the posterior mean, to first order.

    For a Gaussian posterior of covariance Sigma, :math:`\Delta E[u] = \Sigma\, E[\nabla \Delta \ln p]` (Stein's lemma):
    the mean over ``2 * DISPLACED_PAIRS`` draws about the maximum, not only the slope there, which would miss a wrong
    curvature. ``space`` and ``finer`` have the same model with different points; of the potential's parameters the one
    that moves most counts, in posterior standard deviations; infinity where no draw has a finite slope.
    """
    C = whitening(information)
    generator = torch.Generator().manual_seed(seed)
    changes = []
    for z in torch.randn(DISPLACED_PAIRS, len(u), generator=generator, dtype=torch.float64):
        for sign in (1, -1):
            at = u + sign * (C @ z)
            changes.append(finer.log_fraction_gradient(at) - space.log_fraction_gradient(at))
    finite = [change for change in changes if bool(torch.isfinite(change).all())]
    if not finite:
        return torch.inf
    change = torch.stack(finite).mean(0)
    covariance = C @ C.T
    moved = n_stars * (covariance @ change).abs() / covariance.diagonal().sqrt()
    return float(moved[: space.n_potential].max())
