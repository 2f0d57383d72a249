"""Phase mixing: stars followed along their orbits until their phases are those of an equilibrium."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bayespot.actions.meridional import TabulatedForces
from bayespot.actions.orbit import advance, integrate_transformed
from bayespot.mock.circular import CircularOrbits
from bayespot.potential.base import Potential
from bayespot.units import takes, takes_tensors

#: Steps of the integrator in the shortest period of the circular orbit with a star's energy.
_STEPS_PER_PERIOD = 120
#: Steps between two looks at the stars' clocks.
_CHUNK = 50
#: e-foldings of radius tabulated inside the least circular radius, and beyond the largest: an apocentre is at most
#: twice as far in the plane, and an orbit goes a little farther off it.
_INNER, _OUTER = 8.0, 1.5
#: Distance from the centre, over the circular radius, within which steps no longer shrink.
_SOFTENING = 0.02
#: How much finer the steps of orbits are made that do not keep their energies to so much of the circular one's kinetic
#: energy.
_FINER, _ENERGY = (1, 4, 16), 0.01


@takes(n_periods="number")
@takes_tensors(w="phase_space")
@torch.no_grad()
def phase_mixed(
    potential: Potential,
    w: Tensor,
    seed: int,
    n_periods: float = 6.0,
    tick: Callable[[float], None] | None = None,
) -> Tensor:
    r"""Return stars after a random time, of ``n_periods / 2`` to ``n_periods`` periods of their own, on their orbits.

    What the stars were drawn from need only be near an equilibrium: averaged over times t to 2t, what is not stationary
    falls at least as 1/t, and energies and L_z are those of the stars given. The period is that of the circular orbit
    of the star's energy. Steps are proportional to the distance from the centre, so that plunging orbits are followed
    as well as round ones; forces are interpolated in a table of Phi (relative error below 1e-6 in the median).

    Parameters
    ----------
    potential
        Spherical or axisymmetric, its parameters numbers.
    w : Float[Tensor, "n 6"]
        Bound stars in kpc and km/s.
    seed
        Of the times.
    n_periods
        Periods at most.
    tick
        Called with the fraction done.

    Raises
    ------
    ValueError
        If the potential is triaxial or most of its circular orbits are unstable, a star has more energy than a circular
        orbit of 10^6 kpc, an orbit does not keep its energy, or ``n_periods`` is not positive.
    """
    if not 0 < n_periods < math.inf:
        raise ValueError(f"n_periods must be positive, got {n_periods}")
    orbits = CircularOrbits(potential, unstable_inside=True)
    energy = (w[:, 3:] ** 2).sum(-1) / 2 + potential.phi(w[:, :3])
    free = ~(energy < float(orbits.largest_energy))
    if bool(free.any()):
        raise ValueError(
            f"{int(free.sum())} of {len(w)} stars are not bound (the first at row {int(free.int().argmax())}): they "
            "have no orbit to spread over; drop them"
        )
    near = orbits.at(orbits.radius_of_energy(energy.numpy()))
    scale, omega = torch.as_tensor(near.R), torch.as_tensor(near.omega)
    fastest = torch.maximum(omega, torch.maximum(torch.as_tensor(near.kappa), torch.as_tensor(near.nu)))
    forces: Any = TabulatedForces(potential, float(scale.min().log()) - _INNER, float(scale.max().log()) + _OUTER, w)
    generator = torch.Generator().manual_seed(seed)
    wanted = math.pi * n_periods * (1 + torch.rand(len(w), generator=generator, dtype=w.dtype)) / omega
    # the unit of energy errors: that of the circular orbit
    kinetic = torch.as_tensor(near.L / near.R) ** 2 / 2
    step = 2 * math.pi / (_STEPS_PER_PERIOD * fastest)
    result, todo = w.clone(), torch.arange(len(w))
    for finer in _FINER:
        left = len(todo) / len(w)
        share = (lambda f, left=left: tick(1 - (1 - f) * left)) if tick is not None else None
        end = _followed(forces, w[todo], wanted[todo], scale[todo], step[todo] / finer, _SOFTENING / finer, share)
        change = (end[:, 3:] ** 2).sum(-1) / 2 + potential.phi(end[:, :3]) - energy[todo]
        # a plunging orbit may pass a centre far denser than the galaxy about it
        kept = change.abs() < _ENERGY * kinetic[todo]
        result[todo[kept]] = end[kept]
        todo = todo[~kept]
        if not len(todo):
            break
    else:
        raise ValueError(
            f"the orbits of {len(todo)} of {len(w)} stars (the first at row {int(todo[0])}) do not keep their "
            "energies: the centre is too dense for them"
        )
    return result


def _followed(
    forces: Any,
    w: Tensor,
    wanted: Tensor,
    scale: Tensor,
    step: Tensor,
    softening: float,
    tick: Callable[[float], None] | None,
) -> Tensor:
    """Return stars after times ``wanted (n,)``, followed with steps of so much at the distance ``scale``."""
    left, result, todo = wanted.clone(), w.clone(), torch.arange(len(w))
    while len(todo):
        at, clock, length = result[todo], left[todo], step[todo]
        orbit = integrate_transformed(
            forces, at, scale[todo], softening * scale[todo], length, _CHUNK, method="yoshida4"
        )
        # the last output before a star's time is up; from there it is less than a step
        passed = (orbit.times <= clock).sum(0) - 1
        index = torch.arange(len(todo))
        result[todo], left[todo] = orbit.w[passed, index], clock - orbit.times[passed, index]
        done = passed < _CHUNK
        stop = todo[done]
        result[stop] = advance(forces, result[stop], left[stop], n_steps=2)
        todo = todo[~done]
        if tick is not None:
            tick(1 - len(todo) / len(w))
    return result
