"""Where a stellar system is and how it moves as a whole: the shrinking sphere, with its standard error."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from bayespot.units import takes

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

#: Each sphere holds this part of the last one's particles, down to this part of all and at least so many.
_SHRINK, _INNER, _FEWEST = 0.95, 0.2, 50
_MAX_STEPS = 200


class Centre(NamedTuple):
    """A centre and its motion, each with the standard error per axis; ``radius`` and ``n`` of the innermost sphere."""

    x: Array
    v: Array
    x_error: float
    v_error: float
    radius: float
    n: int


@takes(x="length", v="speed", mass="mass", box="length", at="length")
def shrinking_sphere(
    x: Array, v: Array, mass: Array, box: Array | None = None, at: tuple[float, float, float] | None = None
) -> Centre:
    r"""Find the centre of mass within spheres that shrink about it (Power et al. 2003, MNRAS 338, 14, section 2.5).

    Each sphere is centred on the last one's centre of mass and holds 95 % of its particles; the innermost one holds a
    fifth of all, is moved until it is centred on its own centre of mass, and gives the mean velocity. Satellites
    outside of it have no part in either. With sd the spread per axis inside, n the particles and
    :math:`\gamma = d \ln N / d \ln r` at its edge, the standard error of the place is
    :math:`sd / \sqrt{n} / (1 - \gamma/3)`: particles that enter where the sphere moves to pull it on.

    Parameters
    ----------
    x, v : (n, 3)
        Positions and velocities.
    mass : (n,)
        Weights.
    box : (3,), optional
        Lengths of a periodic box.
    at
        A known centre: then only its motion is looked for, in the sphere of the nearest fifth.
    """
    n_inner = min(len(x), max(_FEWEST, int(_INNER * len(x))))
    centre = _periodic_mean(x, mass, box) if at is None else np.asarray(at, float)
    d = wrapped(x - centre, box)
    if at is None:
        n = len(d)
        while n > n_inner:
            n = max(n_inner, int(_SHRINK * n))
            inside = _nearest(d, n)
            # a few more than are inside: the next centre is not quite this one
            keep = _nearest(d, min(len(d), 2 * n))
            shift = np.average(d[inside], axis=0, weights=mass[inside])
            d, v, mass = d[keep] - shift, v[keep], mass[keep]
            centre = centre + shift
        for _ in range(_MAX_STEPS):
            inside = _nearest(d, n_inner)
            shift = np.average(d[inside], axis=0, weights=mass[inside])
            d, centre = d - shift, centre + shift
            if (shift**2).sum() < 1e-6 * (d[inside] ** 2).sum() / n_inner**2:
                break
    inside = _nearest(d, n_inner)
    r = np.sqrt((d[inside] ** 2).sum(-1))
    radius = float(r.max())
    root = np.sqrt(mass[inside].sum() ** 2 / (mass[inside] ** 2).sum())
    gamma = min(np.log(len(r) / max(1, (r < 0.8 * radius).sum())) / np.log(1 / 0.8), 2.9)
    motion = np.average(v[inside], axis=0, weights=mass[inside])
    x_error = float(d[inside].std(0).mean() / root / (1 - gamma / 3)) if at is None else 0.0
    return Centre(centre, motion, x_error, float(v[inside].std(0).mean() / root), radius, n_inner)


def wrapped(d: Array, box: Array | None) -> Array:
    """Return separations ``(..., 3)`` as those of the nearest images in a periodic box."""
    return d if box is None else d - box * np.round(d / box)


def _periodic_mean(x: Array, mass: Array, box: Array | None) -> Array:
    """Return the centre of mass; in a periodic box from the mean direction on the circle that each axis is."""
    if box is None:
        return np.asarray(np.average(x, axis=0, weights=mass))
    angle = 2 * np.pi * x / box
    sine, cosine = (np.average(f(angle), axis=0, weights=mass) for f in (np.sin, np.cos))
    return np.asarray(np.arctan2(sine, cosine) / (2 * np.pi) * box % box)


def _nearest(d: Array, n: int) -> Array:
    """Return the indices of the n nearest."""
    r2 = (d**2).sum(-1)
    return np.argpartition(r2, n - 1)[:n]
