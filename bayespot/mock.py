"""Exact equilibrium snapshots of spherical systems with known truth, by Eddington inversion."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bayespot.catalog import Catalog
from bayespot.potential.analytic import (
    NFW,
    CoredPowerLaw,
    Hernquist,
    Isochrone,
    Jaffe,
    Logarithmic,
    Plummer,
    describe,
    from_description,
)
from bayespot.potential.base import Potential
from bayespot.potential.profile import require_spherical

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Named systems: (potential, tracers or None for self-consistent tracers); kpc, km/s, Msun.
MOCKS: dict[str, tuple[Potential, Potential | None]] = {
    "isochrone": (Isochrone(1e11, 3.0), None),
    "plummer": (Plummer(1e10, 1.0), None),
    "hernquist": (Hernquist(1e11, 5.0), None),
    "jaffe": (Jaffe(1e11, 5.0), None),
    "hernquist-in-nfw": (NFW(8e11, 20.0), Hernquist(1e11, 5.0)),
    "plummer-in-core": (CoredPowerLaw(3e8, 1.0, 2.5), Plummer(1e6, 0.5)),
    "plummer-in-logarithmic": (Logarithmic(220.0, 8.0), Plummer(1e10, 5.0)),
}

_N_GRID = 4000
_DECADES_IN, _DECADES_OUT = 6.0, 9.0


@dataclass(frozen=True)
class SphericalSystem:
    r"""Tracers in equilibrium in a spherical potential, with Osipkov-Merritt anisotropy.

    With :math:`Q = -E - L^2 / 2 r_a^2` (relative to the potential at the outermost radius) and
    :math:`\rho_Q = (1 + r^2/r_a^2) \rho`, Eddington's formula (Binney & Tremaine 2008, eq. 4.46 and 4.78)

    .. math:: f(Q) = \frac{1}{\sqrt 8 \pi^2} \int_0^Q \frac{d^2\rho_Q}{d\Psi^2} \frac{d\Psi}{\sqrt{Q - \Psi}}

    gives the only f(Q) of these tracers. Everything is tabulated on 4 000 radii over fifteen decades.

    Parameters
    ----------
    potential
        Spherical potential.
    tracers
        Potential whose density is that of the tracers (finite mass), in any normalisation.
    anisotropy_radius
        r_a in kpc; None is isotropic.
    """

    potential: Potential
    tracers: Potential
    anisotropy_radius: float | None = None

    def __post_init__(self) -> None:
        require_spherical(self.potential)
        require_spherical(self.tracers)
        if self.anisotropy_radius is not None and not self.anisotropy_radius > 0:
            raise ValueError(f"anisotropy_radius must be positive (kpc), got {self.anisotropy_radius}")

    @cached_property
    def _scale(self) -> float:
        for name in ("r_s", "r_c", "r_0"):
            if hasattr(self.tracers, name):
                return float(getattr(self.tracers, name))
        return 1.0

    @cached_property
    def _grid(self) -> tuple[NDArray[Any], ...]:
        """ln r, enclosed tracer fraction, augmented density and relative potential."""
        ln10 = np.log(10)
        s = np.log(self._scale) + np.linspace(-_DECADES_IN * ln10, _DECADES_OUT * ln10, _N_GRID)
        r = torch.as_tensor(np.exp(s))
        with torch.no_grad():
            mass = self.tracers.enclosed_mass(r).numpy()
            x = torch.stack([r, 0 * r, 0 * r], -1)
            density = self.tracers.density(x).numpy()
            phi = self.potential.phi_r(r).numpy()
        slope = np.gradient(np.log(mass), s)[-10:].mean()
        if slope > 1e-4:
            raise ValueError(
                f"the tracers' mass still grows as r^{slope:.2g} at {float(r[-1]):.2g} kpc: tracers need a finite "
                "mass (for instance Isochrone, Plummer, Hernquist or Jaffe)"
            )
        # far out the density is a difference of nearly equal terms: continue it as the power law it has become
        last = int(np.flatnonzero(4 * np.pi * np.exp(3 * s) * density / mass > 1e-6)[-1])
        power = np.gradient(np.log(density[last - 20 : last + 1]), s[last - 20 : last + 1])[10]
        density[last:] = density[last] * np.exp(power * (s[last:] - s[last]))
        r_a = self.anisotropy_radius
        augmented = density * (1 + (r.numpy() / r_a) ** 2) if r_a else density
        return s, mass / mass[-1], augmented / mass[-1], phi[-1] - phi

    @cached_property
    def _table(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """ln Q and ln f(Q) at the grid's potentials."""
        from scipy.interpolate import CubicSpline

        s, _, rho, psi = self._grid
        keep = psi > 0
        keep &= np.abs(np.gradient(np.log(np.where(rho > 0, rho, 1.0)), s)) > 1e-6
        # deep in a core density and potential stop changing: f is constant there
        keep &= np.concatenate([[True], -np.diff(psi) > 1e-10 * psi[1:]])
        s, rho, psi = s[keep], rho[keep], psi[keep]
        # f is an integral over radii outside r(Q): both densities are nearly power laws of the radius
        d_rho = CubicSpline(s, np.log(rho)).derivative()
        slope = self._dpsi_ds(np.exp(s))
        ratio = rho * d_rho(s) / slope  # d rho / d Psi, positive
        if (ratio <= 0).any():
            raise ValueError("the tracers' density must fall with radius")
        spline = CubicSpline(s, np.log(ratio))
        second = ratio * spline.derivative()(s) / slope
        curvature = CubicSpline(s, second)
        psi_of = CubicSpline(s, psi)
        nodes, weights = np.polynomial.legendre.leggauss(16)
        f = np.empty_like(s)
        # substitute s' = s + u^2: the square-root singularity at Psi = Q disappears
        reach = np.sqrt(np.clip(s[-1] - s, 1e-12, None))
        panels = np.linspace(0, 1, 13) ** 1.5
        total = np.zeros_like(s)
        for a, b in itertools.pairwise(panels):
            half, mid = (b - a) / 2, (a + b) / 2
            u = reach[:, None] * (mid + half * nodes)
            at = s[:, None] + u**2
            gap = np.clip(psi[:, None] - psi_of(at), 1e-300, None)
            integrand = curvature(at) * -self._dpsi_ds(np.exp(at)) * 2 * u / np.sqrt(gap)
            total += reach * half * (integrand * weights).sum(-1)
        f = total / (np.sqrt(8) * np.pi**2)
        good = slice(0, int(0.98 * len(s)))
        if (f[good] < 0).any():
            worst = float(np.exp(s[good][f[good] < 0].max()))
            raise ValueError(
                f"these tracers have no equilibrium in this potential with anisotropy_radius="
                f"{self.anisotropy_radius}: f(Q) is negative at energies reached at {worst:.3g} kpc; "
                "raise anisotropy_radius, or choose a potential at least as concentrated as the tracers"
            )
        q, ln_f = psi[good][::-1], np.log(np.clip(f[good][::-1], 1e-300, None))
        return np.log(q), ln_f

    def _dpsi_ds(self, r: NDArray[Any]) -> NDArray[Any]:
        """d Psi / d ln r = r times the radial acceleration, negative."""
        radii = torch.as_tensor(np.ascontiguousarray(r))
        with torch.no_grad():
            return (radii * self.potential.radial_acceleration(radii)).numpy()

    def distribution_function(self, q: NDArray[Any]) -> NDArray[Any]:
        """Return f(Q) in (kpc km/s)^-3 per star; ``q`` in (km/s)^2 is Psi - v^2/2 - L^2/(2 r_a^2)."""
        ln_q, ln_f = self._table
        q = np.asarray(q, dtype=float)
        safe = np.log(np.clip(q, np.exp(ln_q[0]), None))
        # beyond the outermost radius f continues as the power law it has become
        low = ln_f[0] + (ln_f[1] - ln_f[0]) / (ln_q[1] - ln_q[0]) * (np.log(np.clip(q, 1e-300, None)) - ln_q[0])
        value = np.where(q < np.exp(ln_q[0]), low, np.interp(safe, ln_q, ln_f))
        return np.where(q > 0, np.exp(value), 0.0)

    def relative_potential(self, r: NDArray[Any]) -> NDArray[Any]:
        """Return Psi(r) in (km/s)^2, zero at the outermost radius of the table."""
        s, _, _, psi = self._grid
        with torch.no_grad():
            outer = self.potential.phi_r(torch.as_tensor(np.exp(s[-1:]))).item()
            return outer - self.potential.phi_r(torch.as_tensor(np.ascontiguousarray(r))).numpy() + 0 * psi[0]

    def sample(self, n: int, seed: int) -> NDArray[Any]:
        """Return ``w (n, 6)`` in kpc and km/s."""
        from scipy.interpolate import PchipInterpolator

        rng = np.random.default_rng(seed)
        s, fraction, _, _ = self._grid
        # interpolate ln M inside and ln(1 - M) outside: both tails are straight there
        inner = fraction < 0.5
        rank = rng.random(n)
        ln_r = np.empty(n)
        low = rank < fraction[inner][-1]
        rising = np.log(fraction[inner])
        first = np.concatenate([[True], np.diff(rising) > 0])
        ln_r[low] = PchipInterpolator(rising[first], s[inner][first])(np.clip(np.log(rank[low]), rising[0], None))
        outer = ~inner | (np.arange(len(s)) == inner.sum() - 1)
        falling = -np.log(np.clip(1 - fraction[outer], 1e-300, None))
        # the last decades of a tail are lost to the rounding of 1 - M: stop where it no longer falls
        usable = (falling < -np.log(1e-11)) & np.concatenate([[True], np.diff(falling) > 0])
        tail = PchipInterpolator(falling[usable], s[outer][usable])
        ln_r[~low] = tail(np.clip(-np.log1p(-rank[~low]), None, falling[usable][-1]))
        r = np.exp(ln_r)
        speed, cos_chi = self._velocities(r, rng)
        v_r, v_t = speed * cos_chi, speed * np.sqrt(1 - cos_chi**2)
        if self.anisotropy_radius:
            v_t = v_t / np.sqrt(1 + (r / self.anisotropy_radius) ** 2)
        normal = rng.normal(size=(n, 3))
        radial = normal / np.linalg.norm(normal, axis=1, keepdims=True)
        other = rng.normal(size=(n, 3))
        tangent = other - (other * radial).sum(1, keepdims=True) * radial
        tangent /= np.linalg.norm(tangent, axis=1, keepdims=True)
        return np.concatenate([r[:, None] * radial, v_r[:, None] * radial + v_t[:, None] * tangent], 1)

    def _velocities(self, r: NDArray[Any], rng: np.random.Generator) -> tuple[NDArray[Any], NDArray[Any]]:
        """Speeds from p(v) ~ f(Psi - v^2/2) v^2 by rejection, and isotropic directions.

        With anisotropy the speed is that in stretched tangential velocities, v_t (1 + r^2/r_a^2)^(1/2), in
        which f is isotropic.
        """
        psi = self.relative_potential(r)
        grid = np.linspace(0, 1, 129)[1:-1]
        bound = np.empty(len(r))
        for chunk in np.array_split(np.arange(len(r)), max(1, len(r) // 20_000)):
            shape = self.distribution_function(psi[chunk, None] * (1 - grid**2)) * grid**2
            bound[chunk] = 1.1 * shape.max(1)
        x, todo = np.empty(len(r)), np.arange(len(r))
        while len(todo):
            trial = rng.random(len(todo))
            height = self.distribution_function(psi[todo] * (1 - trial**2)) * trial**2
            accepted = rng.random(len(todo)) * bound[todo] < height
            x[todo[accepted]] = trial[accepted]
            todo = todo[~accepted]
        return x * np.sqrt(2 * psi), 2 * rng.random(len(r)) - 1


def mock(
    potential: str | Potential = "isochrone",
    *,
    tracers: Potential | None = None,
    n_stars: int,
    seed: int,
    anisotropy_radius: float | None = None,
) -> Catalog:
    """Return a snapshot of stars in exact equilibrium, with the truth in its metadata.

    Parameters
    ----------
    potential
        A name of `MOCKS` or a spherical analytic potential.
    tracers
        Potential whose density the stars follow; by default the named system's, or the potential's own.
    n_stars, seed
        Number of stars and seed.
    anisotropy_radius
        Osipkov-Merritt radius in kpc: beta = r^2 / (r^2 + r_a^2); None is isotropic.

    Raises
    ------
    ValueError
        If the name is unknown or the combination has no equilibrium.

    Examples
    --------
    >>> catalog = mock("plummer", n_stars=100, seed=0)
    >>> len(catalog), catalog.meta["truth"]["potential"]["name"]
    (100, 'Plummer')
    """
    if n_stars < 1:
        raise ValueError(f"n_stars must be at least 1, got {n_stars}")
    if isinstance(potential, str):
        if potential not in MOCKS:
            raise ValueError(f"unknown system {potential!r}; choose one of {', '.join(MOCKS)}")
        potential, default = MOCKS[potential]
        tracers = tracers or default
    tracers = tracers or potential
    system = SphericalSystem(potential, tracers, anisotropy_radius)
    truth = {
        "potential": describe(potential),
        "tracers": describe(tracers),
        "anisotropy_radius": anisotropy_radius,
        "seed": seed,
    }
    return Catalog(torch.as_tensor(system.sample(n_stars, seed)), meta={"truth": truth})


def truth_potential(meta: dict[str, Any]) -> Potential | None:
    """Return the true potential stored in a catalogue's metadata, or None."""
    truth = meta.get("truth")
    return from_description(truth["potential"]) if truth else None
