r"""What the Staeckel fudge's own error does to a fit: the scores that are left when they are averaged along orbits.

With exact actions the score of the potential averages to zero along every orbit (the score identity). With the fudge's
something is left, and where stars are phase-mixed its mean over them moves the fit: by Sigma N <s> to first order, with
Sigma the posterior's covariance, whatever f(J). In a field that is linear in the latents that is cov(field, u) N <s>.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from bayespot.actions.meridional import TabulatedForces
from bayespot.actions.orbit import TransformedOrbit, integrate_transformed
from bayespot.inference.latent import LatentSpace, potential_scores
from bayespot.inference.linearised import Responder
from bayespot.potential.base import Potential
from bayespot.units import takes_tensors

#: Stars whose orbits are followed: so many, of large catalogues a tenth, at most so many; radial periods of them, and
#: places on each.
_STARS, _SHARE, _MOST_STARS, _PERIODS, _PLACES = 400, 0.1, 1500, 10.0, 64
#: Steps of the integrator between two places.
_SUBSTEPS = 24
#: Draws by which a field is correlated with the latents.
_DRAWS = 200
#: Quantiles of the stars' radii at which fields are taken.
_QUANTILES = (0.16, 0.5, 0.84)
#: Room in ln r about the stars for their orbits.
_INNER, _OUTER = 6.0, 2.0


@dataclass(frozen=True)
class FinderBias:
    """How far the finder's error moves fields of the posterior, and how much its J vary along orbits.

    ``fields`` has a row per field: ``name``, ``bias`` and its standard ``error``, both in posterior standard
    deviations; positive where the fit comes out too high. ``scatter`` are the median and the 90 % point, over stars, of
    the standard deviation of J along an orbit over the sum of actions, the larger of J_r's and J_z's.
    """

    fields: list[dict[str, Any]] = field(default_factory=list)
    scatter: tuple[float, float] = (math.nan, math.nan)
    n_stars: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Return it as numbers and names."""
        return {"fields": self.fields, "scatter": list(self.scatter), "n_stars": self.n_stars}


@takes_tensors(u="number", w="phase_space", centre="number")
@torch.no_grad()
def finder_bias(
    space: LatentSpace, u: Tensor, w: Tensor, n_stars: int, seed: int, centre: Tensor | None = None
) -> FinderBias:
    """Measure the bias of a fit with the fudge.

    Parameters
    ----------
    space, u
        A model that `responds`, and draws of its latents ``(n, size)``.
    w : Float[Tensor, "m 6"]
        Members.
    n_stars
        How many stars the fit has.
    seed
        Of the stars that are followed.
    centre : Float[Tensor, "size"], optional
        Latents in whose potential orbits are followed; by default the mean of the draws.
    """
    mean = u.mean(0) if centre is None else centre
    model = space.model.at(space.values(mean))
    n_followed = min(max(_STARS, int(_SHARE * n_stars)), _MOST_STARS)
    order = torch.randperm(len(w), generator=torch.Generator().manual_seed(seed))[:n_followed]
    orbits = _orbits(model, w[order])
    flat = orbits.w.reshape(-1, 6)
    if not len(flat):
        return FinderBias()
    found = Responder(space, mean, flat)(flat)
    # the share of time near each place; edges of the finite time fade in and out
    taper = orbits.rate * torch.sin(torch.pi * orbits.times / orbits.times[-1]) ** 2
    taper = taper / taper.sum(0)
    each = potential_scores(model.df, found).reshape(_PLACES, -1, space.n_potential)
    scores = (taper[:, :, None] * each).sum(0)
    sound = torch.isfinite(scores).all(-1)
    scores = n_stars * scores[sound]
    J = found.J.reshape(_PLACES, -1, 3)
    total = J.abs().sum(-1).mean(0)
    scatter = (J.std(0)[:, ::2].amax(-1) / total.clamp(min=1e-300))[sound]
    quantiles = scatter.quantile(torch.tensor([0.5, 0.9], dtype=w.dtype)).tolist()
    fields = _moved(u[:_DRAWS, : space.n_potential], _fields(space, u[:_DRAWS], w), scores)
    return FinderBias(fields, (quantiles[0], quantiles[1]), len(scores))


def _orbits(model: Any, w: Tensor) -> TransformedOrbit:
    """Return the orbits of the bound stars among ``w``."""
    around = model.finder.tabulated(model.potential, w).tables
    motion = around.motion(w)
    w = w[motion.excess <= 0]
    s = motion.guide.s_c[motion.excess <= 0]
    profile = around.profile
    speed, ahead, behind = (profile.vc2_at(at) for at in (s, s + 0.05, s - 0.05))
    kappa = (speed * (2 + (ahead / behind).log() / 0.1).clamp(min=0.5)).sqrt() / s.exp()
    forces = TabulatedForces(model.potential, float(s.min()) - _INNER, float(s.max()) + _OUTER, w)
    size, step = s.exp(), _PERIODS * 2 * math.pi / kappa / (_PLACES - 1)
    return integrate_transformed(
        cast("Potential", forces), w, size, 0.02 * size, step, _PLACES - 1, "yoshida4", _SUBSTEPS
    )


def _fields(space: LatentSpace, u: Tensor, w: Tensor) -> dict[str, Tensor]:
    """Return fields of the draws by name, with their places."""
    r = torch.linalg.vector_norm(w[:, :3], dim=-1).quantile(torch.tensor(_QUANTILES, dtype=w.dtype))
    z = w[:, 2].abs().median().clamp(min=1e-3 * r[1])
    places = torch.stack([r, torch.zeros_like(r), z.expand_as(r)], -1)
    asked: dict[str, Callable[[Potential], Tensor]] = {
        "v_c({:.3g} kpc)": lambda potential: potential.circular_speed(r),
        f"K_z({{:.3g}}, {float(z):.3g} kpc)": lambda potential: -potential.acceleration(places)[:, 2],
    }
    found: dict[str, Tensor] = {}
    potentials = [space.model.at(space.values(one)).potential for one in u]
    for name, of in asked.items():
        draws = torch.stack([of(potential).detach() for potential in potentials])
        found |= {name.format(float(at)): draws[:, k] for k, at in enumerate(r)}
    return found


def _moved(u: Tensor, fields: dict[str, Tensor], scores: Tensor) -> list[dict[str, Any]]:
    """Return the bias of each field and its error, from its covariance with the latents."""
    rows = []
    centred = u - u.mean(0)
    for name, values in fields.items():
        sd = values.std()
        covariance = (centred * (values - values.mean())[:, None]).sum(0) / (len(u) - 1) / sd
        shifts = scores @ covariance
        rows.append({"name": name, "bias": float(shifts.mean()), "error": float(shifts.std()) / math.sqrt(len(shifts))})
    return rows
