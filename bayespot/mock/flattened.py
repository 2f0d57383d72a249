"""Mock snapshots of flattened galaxies: orbits of known densities, phase-mixed in an axisymmetric potential."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from bayespot.actions.base import TorusMap
from bayespot.actions.spherical import SphericalActions
from bayespot.actions.staeckel import StaeckelFudge
from bayespot.callers_state import keeps_callers_state
from bayespot.catalog.catalog import Catalog
from bayespot.mock.mixing import phase_mixed
from bayespot.mock.orbits import DoublePowerLawOrbits, MixedOrbits, OrbitPopulation, QuasiIsothermalOrbits
from bayespot.potential.analytic import describe
from bayespot.potential.base import Potential
from bayespot.potential.galaxies import MWPotential2014

#: Stars mapped and followed at a time.
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


def galaxy_mock(
    name: str, *, n_stars: int, seed: int, n_periods: float = 10.0, tick: Callable[[float], None] | None = None
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


@keeps_callers_state
def orbit_mock(
    potential: Potential,
    population: OrbitPopulation,
    *,
    n_stars: int,
    seed: int,
    n_periods: float = 10.0,
    tick: Callable[[float], None] | None = None,
) -> Catalog:
    """Return a snapshot of stars in equilibrium in a spherical or axisymmetric potential.

    Independent orbits are drawn from f(J) and placed at random angles, by the exact map in a sphere and by the inverse of
    the Staeckel fudge elsewhere, which misses an equilibrium by the few per cent by which its actions vary along
    orbits. Followed for `phase_mixed`'s times the stars are then an equilibrium of the potential itself, with the
    energies and L_z that they were drawn with; their f differs from the given one by as little.

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
        With ``meta["truth"]``: descriptions of the potential and of the orbits, and the seed.

    Raises
    ------
    ValueError
        If the potential is triaxial, or a number is out of range.
    """
    if n_stars < 1:
        raise ValueError(f"n_stars must be at least 1, got {n_stars}")
    if seed < 0:
        raise ValueError(f"seed must not be negative, got {seed}; choose 0 or more")
    finder: TorusMap = SphericalActions() if potential.symmetry == "spherical" else StaeckelFudge()
    generator = torch.Generator().manual_seed(seed)
    found: list[Tensor] = []
    done = 0
    with torch.no_grad():
        while done < n_stars:
            n = min(_AT_ONCE, n_stars - done)
            first, second = torch.randint(2**31, (2,), generator=generator).tolist()
            J = population.sample(n, first)
            J = J[finder.reaches(potential, J)]
            theta = 2 * math.pi * torch.rand(J.shape, generator=generator, dtype=J.dtype)
            w = finder.phase_space(potential, J, theta)
            share = (lambda f, before=done, n=n: tick((before + f * n) / n_stars)) if tick else None
            found.append(phase_mixed(potential, w, second, n_periods, share))
            done += len(w)
    truth = {"potential": describe(potential), "orbits": population.describe(), "seed": seed}
    return Catalog(torch.cat(found)[:n_stars], meta={"truth": truth})
