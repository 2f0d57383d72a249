"""The diagnostics of a fit, from its draws: importance weights, chains, unbound stars, errors, selection, angles."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bayespot.diagnostics import chain_statistics, psis, weight_fraction
from bayespot.inference.blocks import blocks
from bayespot.inference.emulator import Emulator
from bayespot.inference.finder_bias import finder_bias
from bayespot.inference.guides import mean_field_narrowing
from bayespot.inference.latent import OUTLIERS, LatentSpace
from bayespot.inference.linearised import responds
from bayespot.inference.optimise import count_unbound
from bayespot.inference.phase_mixing import angle_statistic
from bayespot.inference.proposals import effective
from bayespot.inference.result import Diagnostics, FitConfig
from bayespot.inference.symmetry import symmetry_test
from bayespot.inference.verdict import RESAMPLED, verdict
from bayespot.likelihood.model import SnapshotModel
from bayespot.likelihood.outliers import LIKELY
from bayespot.likelihood.phase_mixed import effective_samples

#: Rows of a larger catalogue from which the importance weights are estimated (noise of about 0.1 in their logarithms).
_RATIO_ROWS = 40_000
#: How many times as many draws of an emulated posterior get importance weights, for these are its draws: of the
#: potential alone, and with f(J), whose latents are the less Gaussian the fewer the stars (500: 5 to 9 % effective).
_OF_POTENTIAL, _WITH_ORBITS = 2, 4
#: Most stars of the tests of phase mixing and symmetry.
ANGLE_STARS = 20_000


class Draws(NamedTuple):
    """Draws of the unconstrained latents ``(n, size)``, chain after chain, and their log-density under the guide.

    ``log_weights`` are importance weights, where those that drew them know these.
    """

    u: Tensor
    log_q: Tensor | None
    n_chains: int = 1
    divergences: float | None = None
    log_weights: Tensor | None = None


def diagnose(
    space: LatentSpace,
    data: Tensor,
    few: Tensor,
    drawn: Draws,
    config: FitConfig,
    state: Mapping[str, Any],
    tick: Callable[[], None],
    outliers: Tensor | None = None,
) -> tuple[Diagnostics, Tensor]:
    """Return the diagnostics and the smoothed log importance weights ``(n,)`` of the draws.

    Parameters
    ----------
    space, data
        Latents, and the stars as `SnapshotModel.prepare` returns them.
    few
        Coordinates of the stars for the tests of phase mixing and symmetry.
    drawn, config
        The posterior's draws and the settings of the fit.
    state
        What the stages recorded (``elbo``, ``gradient_norm``, ``warnings``, ...).
    outliers
        Probability of each star to be an outlier; None: the model has no such component.
    """
    u, model = drawn.u, space.model
    notes = list(state["warnings"])
    log_weights = torch.full((len(u),), torch.nan, dtype=torch.float64)
    k_hat = math.nan
    extra: dict[str, Any] = {}
    if drawn.log_weights is not None:
        # draws without any weight are no part of the weights' upper tail
        some = ~torch.isneginf(drawn.log_weights)
        smoothed, k_hat = psis(drawn.log_weights[some])
        log_weights = drawn.log_weights.clone()
        log_weights[some] = torch.as_tensor(smoothed)
        extra["weight_fraction"] = weight_fraction(log_weights)
        extra["ess"] = effective(log_weights)
    elif drawn.log_q is not None and config.k_hat_draws > 0:
        n = min(n_emulated(model, config) if config.guide == "emulated" else config.k_hat_draws, len(u))
        log_p = space.log_posterior_near(state["u"], data, _RATIO_ROWS, config.seed)
        if config.guide == "emulated":
            log_p = Emulator.restored(space, state["emulator"]).exact(log_p)
        smoothed, k_hat = psis(log_ratios(log_p, u[:n], drawn.log_q[:n], tick).detach())
        log_weights[:n] = torch.as_tensor(smoothed)
        extra["weight_fraction"] = weight_fraction(log_weights[:n])
        if config.guide != "emulated":  # whose density is not normalised
            extra["log_evidence"] = float(log_weights[:n].logsumexp(0)) - math.log(n)
    if drawn.log_q is not None and math.isnan(k_hat):
        notes.append("the guide was not compared with the exact posterior: k-hat takes 25 draws (k_hat_draws, n_draws)")
    if config.guide == "nuts":
        extra |= _chains(space, data, drawn, tick)
    if config.guide == "mean_field":
        # with f(J) in the same guide its correlations with the potential are lost too
        size = space.size if config.df_guide == "joint" else space.n_potential
        extra["narrowing"] = mean_field_narrowing(state["information"][:size, :size], space.n_potential)
    # the mean of latents whose posterior bends is no place of the posterior
    centre = state["u"] if config.guide in RESAMPLED else u.mean(0)
    extra |= _observation(space, data, few, centre, notes)
    if model.points is not None:
        extra["selection_points"] = state["selection_points"]
        extra["selection_error"] = state["selection_error"]
    members = data
    if outliers is not None:
        members = data[outliers < LIKELY]
        extra["n_outliers"] = len(data) - len(members)
        extra["outlier_fraction"] = float(space.values(u)[OUTLIERS].mean())
    if model.is_plain and responds(space) and len(members):
        extra["finder_bias"] = finder_bias(space, u, members, len(members), config.seed, centre).as_dict()
    found = Diagnostics(
        elbo=state["elbo"],
        gradient_norm=state["gradient_norm"],
        n_unbound=count_unbound(space, centre, members),
        k_hat=k_hat,
        n_components=int(model.df.n_components or 0),
        component_table=state["component_table"],
        map_iterations=state["map_iterations"],
        seconds=dict(state["seconds"]),
        warnings=[],
        n_stars=len(data),
        df=type(model.df).__name__,
        guide=config.guide or "",
        conditional=model.conditional,
        projected=model.projection is not None,
        adaptive=bool(getattr(model.df, "adaptive", False)),
        df_rounds=[dataclasses.asdict(one) for one in state["rounds"]],
        notes=notes,
        **extra,
    )
    return dataclasses.replace(found, warnings=verdict(dataclasses.asdict(found)).reasons), log_weights


def n_emulated(model: SnapshotModel, config: FitConfig) -> int:
    """Return of how many draws of an emulated posterior the exact density is asked for."""
    return config.k_hat_draws * (_OF_POTENTIAL if model.is_plain else _WITH_ORBITS)


def log_ratios(log_p: Callable[[Tensor], Tensor], u: Tensor, log_q: Tensor, tick: Callable[[], None]) -> Tensor:
    """Return ln p(u, data) - ln q(u) of draws, p the unnormalised posterior.

    Where the guide of f(J) is a point mass, p is that of the potential at this f(J): what f(J) leaves open is not
    integrated over, and neither k-hat nor re-weighting can tell.
    """
    found = []
    for one, log_density in zip(u, log_q, strict=True):
        found.append(log_p(one) - log_density)
        tick()
    return torch.stack(found)


def _chains(space: LatentSpace, data: Tensor, drawn: Draws, tick: Callable[[], None]) -> dict[str, Any]:
    """r-hat and ESS of the potential's latents and ln p; components of f(J) may change their places."""
    log_p = log_ratios(lambda u: space.log_posterior(u, data), drawn.u, torch.zeros(len(drawn.u)).double(), tick)
    watched = torch.cat([drawn.u[:, : space.n_potential], log_p[:, None]], -1)
    r_hat, ess = chain_statistics(watched.detach().reshape(drawn.n_chains, -1, watched.shape[-1]))
    return {"r_hat": r_hat, "ess": ess, "divergences": drawn.divergences}


@torch.no_grad()
def _observation(space: LatentSpace, data: Tensor, few: Tensor, u: Tensor, notes: list[str]) -> dict[str, Any]:
    """What errors, selection and phase mixing did, at the posterior mean."""
    found: dict[str, Any] = {}
    model = space.model
    fixed = model.at(space.values(u))
    density = fixed.true_density()
    if model.separable and model.df.proper:
        test = angle_statistic(fixed, few)
        found = {"angle_p_value": test.p_value, "angle_statistic": test.statistic, "angle_dof": test.dof}
        found["symmetry"] = symmetry_test(model, few).as_dict()
        found |= {"potential_symmetry": model.potential.symmetry, "df_symmetry": model.df.symmetry}
    if data.dim() == 3:
        n_eff = torch.cat([effective_samples(density, block) for block in blocks(data)])
        found["error_samples"] = [float(x) for x in n_eff.quantile(torch.tensor([0.0, 0.05, 0.5]).double())]
        found["n_error_samples"] = data.shape[1]
        found["n_poorly_sampled"] = int((n_eff < 2).sum())
    for stream in fixed.streams:
        if stream.data.dim() == 3:
            n_eff = stream.effective_samples(fixed.potential, fixed.finder)
            if (poor := int((n_eff < 4).sum())) > 0.05 * len(n_eff):
                notes.append(
                    f"{poor} of {len(n_eff)} stars of stream {stream.stream_name} have fewer than 4 effective "
                    f"samples of {stream.data.shape[1]} within their errors, which biases the result: raise "
                    "n_samples of its errors, or drop stars with large errors"
                )
    if model.points is not None:
        found["selected_fraction"] = float(model.points.log_z(density.log_prob(model.points.w)).exp())
    return found
