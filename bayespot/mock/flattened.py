"""Mock snapshots of flattened galaxies: orbits of known densities, phase-mixed in an axisymmetric potential."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bayespot.actions.meridional import Equatorial
from bayespot.actions.spherical import SphericalActions
from bayespot.actions.staeckel import StaeckelFudge
from bayespot.callers_state import keeps_callers_state
from bayespot.catalog.catalog import Catalog
from bayespot.mock.circular import CircularOrbits
from bayespot.mock.mixing import phase_mixed
from bayespot.mock.orbits import DoublePowerLawOrbits, MixedOrbits, OrbitPopulation, QuasiIsothermalOrbits
from bayespot.potential.analytic import describe, is_described
from bayespot.potential.base import Potential
from bayespot.potential.galaxies import MWPotential2014
from bayespot.units import takes

#: Stars drawn and followed at a time.
_AT_ONCE = 20_000


def _halo(potential: Potential) -> OrbitPopulation:
    """Halo stars without rotation, mildly radial, most of them within some ten kpc."""
    return DoublePowerLawOrbits(J_0=1500.0, inner=1.2, outer=5.0, inner_weights=(1.2, 0.9), outer_weights=(0.8, 1.1))


def _disc(potential: Potential) -> OrbitPopulation:
    """A warm disc."""
    return QuasiIsothermalOrbits(potential, r_d=2.6, r_sigma=8.0, sigma_r=40.0, sigma_z=25.0)


def _both(potential: Potential) -> OrbitPopulation:
    return MixedOrbits([_disc(potential), _halo(potential)], [0.5, 0.5])


#: Populations by name, in the Milky Way of `MWPotential2014`.
GALAXY_STARS: dict[str, Callable[[Potential], OrbitPopulation]] = {"halo": _halo, "disc": _disc, "disc+halo": _both}


@takes(n_periods="number")
def galaxy_mock(
    name: str, *, n_stars: int, seed: int, n_periods: float = 6.0, tick: Callable[[float], None] | None = None
) -> Catalog:
    """Return `orbit_mock` of one of `GALAXY_STARS` in `MWPotential2014`.

    Raises
    ------
    ValueError
        If the name is unknown or a number out of range.
    """
    if name not in GALAXY_STARS:
        raise ValueError(f"unknown stars {name!r}; choose one of {', '.join(GALAXY_STARS)}")
    potential = MWPotential2014()
    population = GALAXY_STARS[name](potential)
    return orbit_mock(potential, population, n_stars=n_stars, seed=seed, n_periods=n_periods, tick=tick)


@takes(n_periods="number")
@keeps_callers_state
def orbit_mock(
    potential: Potential,
    population: OrbitPopulation,
    *,
    n_stars: int,
    seed: int,
    n_periods: float = 6.0,
    tick: Callable[[float], None] | None = None,
) -> Catalog:
    """Return a snapshot of stars in equilibrium in a spherical or axisymmetric potential.

    Stars are independent draws of f(J(w)) with the actions of the Staeckel fudge (`orbit_sample`; exact ones in a
    sphere), which misses an equilibrium by the per cent or so by which they vary along orbits. Followed for
    `phase_mixed`'s times the stars are then an equilibrium of the potential itself, with the energies and L_z that they
    were drawn with.

    Parameters
    ----------
    potential
        Its parameters numbers.
    population
        Density of orbits.
    n_stars, seed
        Number of stars and seed; the same seed gives the same stars.
    n_periods
        Longest time that orbits are followed, in their own periods.
    tick
        Called with the fraction done.

    Returns
    -------
    Catalog
        With ``meta["truth"]``: descriptions of the potential, where it is an analytic one, and of the orbits, and the
        seed.

    Raises
    ------
    ValueError
        If the potential is triaxial, a number is out of range, or hardly any orbit has a place in the potential.
    """
    if n_stars < 1:
        raise ValueError(f"n_stars must be at least 1, got {n_stars}")
    if seed < 0:
        raise ValueError(f"seed must not be negative, got {seed}; choose 0 or more")
    drawn = orbit_sample(potential, population, n_stars, seed)
    found: list[Tensor] = []
    for block in drawn.split(_AT_ONCE):
        done, size = sum(map(len, found)), len(block)
        share = (lambda f, done=done, size=size: tick((done + f * size) / n_stars)) if tick else None
        found.append(phase_mixed(potential, block, seed + done + 1, n_periods, share))
    truth: dict[str, Any] = {"orbits": population.describe(), "seed": seed}
    if is_described(potential):
        truth["potential"] = describe(potential)
    return Catalog(torch.cat(found), meta={"truth": truth})


@keeps_callers_state
def orbit_sample(potential: Potential, population: OrbitPopulation, n: int, seed: int) -> Tensor:
    r"""Return n independent stars ``w (n, 6)`` with the phase-space density :math:`f(J(w)) / (2\pi)^3`, by rejection.

    J are the actions of `StaeckelFudge`, or exact ones in a sphere. Proposed are stars of the same f in the sphere
    whose potential is that of the plane z = 0, half of them with z and v_z changed by the canonical map that makes
    vertical oscillations about a circular orbit those of the potential itself. The bound of the ratio is the largest
    found: where a larger one turns up, stars that were kept before are thinned.

    Parameters
    ----------
    potential
        Spherical or axisymmetric, its parameters numbers.
    population
        Density of orbits.
    n, seed
        Number of stars and seed.

    Raises
    ------
    ValueError
        If the potential is triaxial, or less than one proposal in a thousand is kept.
    """
    proposals = _Proposals(potential, population)
    generator = torch.Generator().manual_seed(seed)
    kept = torch.empty(0, 6, dtype=torch.float64)
    bound, tried, share = 0.0, 0, 0.3
    with torch.no_grad():
        while len(kept) < n:
            if tried > 10_000 and len(kept) < tried / 1000:
                raise ValueError(
                    f"of {tried} orbits of {type(population).__name__} only {len(kept)} have a place in this "
                    "potential: lower its actions, or take a deeper potential"
                )
            ask = min(max(int(1.1 * (n - len(kept)) / share), 1000), _AT_ONCE)
            w, ratio = proposals.draw(ask, generator)
            larger = max(ratio.tolist(), default=0.0)
            if larger > bound:
                stay = torch.rand(len(kept), generator=generator, dtype=torch.float64) * larger < bound
                kept, bound = kept[stay], larger
            chosen = torch.rand(len(w), generator=generator, dtype=torch.float64) * bound < ratio
            kept = torch.cat([kept, w[chosen]])
            tried += ask
            share = max(len(kept) / tried, 1e-3)
    return kept[:n]


class _Proposals:
    """Stars near those of a population, with the ratio of the wanted density to theirs."""

    def __init__(self, potential: Potential, population: OrbitPopulation) -> None:
        self.potential, self.population = potential, population
        self.circular = CircularOrbits(potential, unstable_inside=True)
        self.sphere = Equatorial(potential, torch.zeros(1, dtype=torch.float64))
        self.exact = potential.symmetry == "spherical"

    def draw(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return about n stars and f(J) over the density that they were drawn from."""
        first = int(torch.randint(2**31, (1,), generator=generator))
        finder = SphericalActions()
        J = self.population.sample(n, first)
        J = J[finder.reaches(self.sphere, J)]
        if not len(J):
            return torch.empty(0, 6, dtype=J.dtype), torch.empty(0, dtype=J.dtype)
        theta = 2 * math.pi * torch.rand(J.shape, generator=generator, dtype=J.dtype)
        w = finder.phase_space(self.sphere, J, theta)
        if self.exact:
            return w, torch.ones_like(w[:, 0])
        turned = torch.rand(len(w), generator=generator, dtype=w.dtype) < 0.5
        w = torch.where(turned[:, None], self._stretched(w, 1.0), w)
        before = [finder.actions(self.sphere, one) for one in (w, self._stretched(w, -1.0))]
        # a star may be bound in the one potential and not in the other
        drawn_from = torch.logaddexp(*(self._log_f(J) for J in before)) - math.log(2)
        ln_ratio = self._log_f(StaeckelFudge().actions(self.potential, w)) - drawn_from
        return w, ln_ratio.exp().nan_to_num(0.0, 0.0)

    def _log_f(self, J: Tensor) -> Tensor:
        bound = torch.isfinite(J).all(-1)
        return torch.where(bound, self.population.log_prob(torch.where(bound[:, None], J, 1.0)), -torch.inf)

    def _stretched(self, w: Tensor, power: float) -> Tensor:
        """Return stars with z smaller and v_z larger by (nu / Omega)^(power / 2) of the circular orbit of their L_z."""
        Lz = (w[:, 0] * w[:, 4] - w[:, 1] * w[:, 3]).abs()
        at = self.circular.at(self.circular.radius(Lz.numpy()))
        factor = torch.as_tensor(at.nu / at.omega) ** (power / 2)
        return torch.stack([w[:, 0], w[:, 1], w[:, 2] / factor, w[:, 3], w[:, 4], w[:, 5] * factor], -1)
