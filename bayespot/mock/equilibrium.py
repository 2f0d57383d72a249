"""Exact equilibria of tracers in a spherical potential: inversion for f(E, L), and sampling from it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bayespot.potential.analytic import AnalyticSphere, SumPotential
from bayespot.potential.base import Potential
from bayespot.potential.profile import require_spherical
from bayespot.units import takes, takes_tensors

Array = NDArray[np.float64]

_STEP = 0.05  # grid spacing in ln r
_TAIL = 1e-11  # fraction of the tracers left outside either end of the grid of radii
_N_GAUSS = 12


class Equilibrium:
    r"""Tracers in equilibrium in a spherical potential: the distribution function and samples from it.

    The family of Cuddeford, with Osipkov-Merritt and constant-anisotropy systems as special cases:

    .. math::
        f(E, L) = L^{-2\beta} f_Q(Q), \quad Q = \Psi - \frac{v^2}{2} - \frac{L^2}{2 r_a^2}, \quad
        1 - \frac{\sigma_t^2}{\sigma_r^2} = \frac{r^2 + \beta r_a^2}{r^2 + r_a^2}

    With the augmented density :math:`h = r^{2\beta} (1 + r^2/r_a^2)^{1-\beta} \nu` and
    :math:`\lambda = 1/2 - \beta`, for -1/2 < beta <= 1/2

    .. math::
        f_Q(Q) = \frac{2^\beta}{(2\pi)^{3/2} \Gamma(1-\lambda) \Gamma(1-\beta)}
        \int_{-\infty}^Q \frac{d^2 h}{d\Psi^2} \frac{d\Psi}{(Q - \Psi)^\lambda},

    which for beta = 0 is Eddington's formula. The integral runs over s = ln r outside the radius where
    Psi = Q: Gauss-Jacobi quadrature in the cell with the singularity, Gauss-Legendre in the others, with
    derivatives by automatic differentiation and potential differences that do not cancel. Densities are
    normalised to one star.

    Parameters
    ----------
    potential
        Any spherical potential, of finite depth or not.
    tracers
        Analytic sphere (or sum of them) of finite mass whose density the stars follow; by default the potential.
    anisotropy_radius
        r_a in kpc; None or infinity for none.
    beta
        Anisotropy at the centre.

    Raises
    ------
    ValueError
        If a potential is not spherical, the tracers' mass is infinite, or no f >= 0 exists; then the message
        gives the smallest anisotropy radius that works.

    References
    ----------
    Eddington (1916), MNRAS 76, 572; Merritt (1985), AJ 90, 1027; Cuddeford (1991), MNRAS 253, 414;
    Binney & Tremaine (2008), section 4.3.
    """

    @takes(anisotropy_radius="length", beta="number")
    def __init__(
        self,
        potential: Potential,
        tracers: Potential | None = None,
        anisotropy_radius: float | None = None,
        beta: float = 0.0,
    ) -> None:
        self.potential = potential
        self.tracers = potential if tracers is None else tracers
        require_spherical(potential)
        require_spherical(self.tracers)
        r_a = math.inf if anisotropy_radius is None else float(anisotropy_radius)
        if not r_a > 0:
            raise ValueError(f"anisotropy_radius must be positive (kpc), got {anisotropy_radius}")
        if not -0.5 < beta <= 0.5:
            raise ValueError(f"beta must be in (-0.5, 0.5], got {beta}")
        self.anisotropy_radius, self.beta = r_a, float(beta)
        with torch.no_grad():
            self._total = float(_total_mass(self.tracers))
            if not math.isfinite(self._total):
                raise ValueError(
                    f"tracers of infinite mass ({type(self.tracers).__name__}) cannot be sampled; "
                    "pass tracers of finite mass, for instance Isochrone, Plummer, Hernquist or Jaffe"
                )
        self._lay_grid()
        self._tabulate_potential()
        self._f = self._invert_positive()
        from scipy.interpolate import CubicSpline

        n = len(self._f)
        self._ln_f = CubicSpline(self._s[:n], np.log(self._f))
        self._ln_weight = CubicSpline(self._s[:n], np.log(self._f * self._vc2(self._s[:n])))
        self._row_keys: tuple[Array, Array] | None = None

    # ---------------------------------------------------------------- grids

    def _lay_grid(self) -> None:
        """Place nodes from where a fraction `_TAIL` of the tracers is inside to far beyond the same outside."""
        from scipy.interpolate import CubicHermiteSpline

        s = np.linspace(math.log(1e-20), math.log(1e20), 3001)
        inside, outside = self._fractions(s)
        low, high = s[np.flatnonzero(inside > _TAIL)[0]], s[np.flatnonzero(outside > _TAIL)[-1]]
        n = math.ceil((high - low) / _STEP) + 1
        # beyond the outermost stars: orbits they reach, then the tail of the integral
        self._s = low + _STEP * np.arange(n + round(8 / _STEP))
        self._n_energies = n + round(6 / _STEP)
        fine = np.linspace(low, high, 8 * n)
        inside, outside = self._fractions(fine)
        slope = 4 * np.pi * np.exp(3 * fine) * self._nu(fine) / (inside * outside)
        self._s_of_logit = CubicHermiteSpline(np.log(inside / outside), fine, 1 / slope)

    def _fractions(self, s: Array) -> tuple[Array, Array]:
        """Return the fractions of the tracers inside and outside exp(s)."""
        with torch.no_grad():
            inside = (_mass(self.tracers, torch.as_tensor(np.exp(s))) / self._total).numpy()
        return inside, np.clip(1 - inside, 1e-17, None)

    def _nu(self, s: Array) -> Array:
        with torch.no_grad():
            return (_density(self.tracers, torch.as_tensor(np.exp(s))) / self._total).numpy()

    def _vc2(self, s: Array) -> Array:
        with torch.no_grad():
            r = torch.as_tensor(np.exp(s))
            return (-r * self.potential.radial_acceleration(r)).numpy()

    def _tabulate_potential(self) -> None:
        """Cumulate d Phi = v_c^2 ds from both ends, so that small differences keep their digits."""
        from scipy.interpolate import CubicHermiteSpline

        fine = np.linspace(self._s[0], self._s[-1], 16 * (len(self._s) - 1) + 1)
        t, weight = np.polynomial.legendre.leggauss(5)
        half = (fine[1] - fine[0]) / 2
        steps = half * self._vc2(fine[:-1, None] + half * (1 + t)) @ weight
        rise = np.concatenate([[0.0], np.cumsum(steps)])
        fall = np.concatenate([np.cumsum(steps[::-1])[::-1], [0.0]])
        vc2 = self._vc2(fine)
        self._rise = CubicHermiteSpline(fine, rise, vc2)
        self._fall = CubicHermiteSpline(fine, fall, -vc2)

    def _gap(self, inner: Any, outer: Any) -> Array:
        """Return Phi(outer) - Phi(inner) for pairs (rise, fall) of table values, at least a tiny number."""
        use_rise = outer[0] < inner[1]
        return np.clip(np.where(use_rise, outer[0] - inner[0], inner[1] - outer[1]), 1e-300, None)

    def _levels(self, s: Array) -> tuple[Array, Array]:
        return self._rise(s), self._fall(s)

    # ---------------------------------------------------------------- inversion

    def _augmented(self, s: Array, r_a: float) -> tuple[Array, Array]:
        """Return p = dh/dPsi and dp/ds at s; with r_a = 0 those of the part of h that goes with 1/r_a^2."""
        at = torch.as_tensor(np.ascontiguousarray(s)).requires_grad_()
        with torch.enable_grad():
            r = at.exp()
            h = r ** (2 * self.beta) * _density(self.tracers, r) / self._total
            h = h * (1 + (r / r_a) ** 2) ** (1 - self.beta) if r_a > 0 else h * r**2
            (slope,) = torch.autograd.grad(h.sum(), at, create_graph=True)
            p = slope / (r * self.potential.radial_acceleration(r))
            (dp,) = torch.autograd.grad(p.sum(), at)
        return p.detach().numpy(), dp.numpy()

    def _invert(self, r_a: float) -> tuple[Array, Array]:
        """Return f_Q at the nodes, and the same with every contribution taken as positive."""
        from scipy.special import gamma, roots_jacobi

        beta, lam, s = self.beta, 0.5 - self.beta, self._s
        n = self._n_energies
        t, weight = np.polynomial.legendre.leggauss(_N_GAUSS)
        inner = self._levels(s[:n, None])
        # the cell that starts at each energy's own radius
        x, jacobi = roots_jacobi(_N_GAUSS, 0.0, -lam)
        u = (1 + x) / 2
        first = s[:n, None] + _STEP * u
        _, g = self._augmented(first, r_a)
        part = -g * (u / self._gap(inner, self._levels(first))) ** lam * jacobi * 2 ** (lam - 1) * _STEP
        total, size = part.sum(1), np.abs(part).sum(1)
        # the cells further out
        nodes = (s[:-1, None] + _STEP * (1 + t) / 2).ravel()
        _, g = self._augmented(nodes, r_a)
        g = -g * np.tile(weight * _STEP / 2, len(s) - 1)
        cell = np.repeat(np.arange(len(s) - 1), _N_GAUSS)
        levels = self._levels(nodes)
        for block in np.array_split(np.arange(n), max(1, n * len(nodes) // 2_000_000)):
            kernel = self._gap(tuple(level[block] for level in inner), levels) ** -lam
            part = np.where(cell > block[:, None], kernel * g, 0.0)
            total[block] += part.sum(1)
            size[block] += np.abs(part).sum(1)
        # all that lies beyond the grid, at the potential of its end
        p, _ = self._augmented(s[-1:], r_a)
        tail = p[0] * self._gap(inner, self._levels(s[-1:]))[:, 0] ** -lam
        norm = 2**beta / ((2 * np.pi) ** 1.5 * gamma(1 - lam) * gamma(1 - beta))
        return norm * (total + tail), norm * (size + np.abs(tail))

    def _invert_positive(self) -> Array:
        f, size = self._invert(self.anisotropy_radius)
        if (f > 1e-9 * size).all():
            return f
        worst = float(np.exp(self._s[int((f / size).argmin())]))
        name = f"{type(self.tracers).__name__} tracers in {type(self.potential).__name__}"
        message = (
            f"{name} have no equilibrium with anisotropy_radius={self.anisotropy_radius:g} kpc, "
            f"beta={self.beta:g}: f < 0 for orbits that reach {worst:.3g} kpc; "
        )
        least = self.smallest_anisotropy_radius() if self.beta == 0 else math.inf
        if math.isfinite(least):
            raise ValueError(message + f"the anisotropy radius must be at least {least:.4g} kpc")
        raise ValueError(message + "lower beta, or choose more concentrated tracers or a less concentrated potential")

    def smallest_anisotropy_radius(self) -> float:
        """Return the smallest Osipkov-Merritt radius with f >= 0 (kpc), infinite if there is none.

        For beta = 0, f is linear in 1/r_a^2.
        """
        isotropic, size = self._invert(math.inf)
        if not (isotropic > 1e-9 * size).all():
            return math.inf
        added, _ = self._invert(0.0)
        return math.sqrt(max(0.0, float((-added / isotropic).max())))

    # ---------------------------------------------------------------- what it is for

    @takes_tensors(w="phase_space")
    def log_f(self, w: Tensor) -> Tensor:
        """Return ln f of stars in (kpc km/s)^-3, normalised to one star; minus infinity where unbound.

        Parameters
        ----------
        w : Float[Tensor, "*batch 6"]
            Position in kpc and velocity in km/s.
        """
        with torch.no_grad():
            q, L2 = self._q(w)
            ln_f = torch.as_tensor(self.log_f_of_q(q.numpy()))
            return ln_f - self.beta * L2.log() if self.beta else ln_f

    @takes_tensors(w="phase_space")
    def energy_slope(self, w: Tensor) -> Tensor:
        r"""Return :math:`(\partial \ln f/\partial E)_L` of stars ``(*batch, 6)`` in (km/s)^-2; zero where unbound.

        Times the radial frequency it is the slope of ln f in J_r at fixed L.
        """
        with torch.no_grad():
            q, _ = self._q(w)
            s, escaped = self._ln_radius_of_q(q.numpy())
            inside = np.clip(s, self._s[0], self._s[len(self._f) - 1])
            return torch.as_tensor(np.where(escaped, 0.0, self._ln_f(inside, 1) / self._vc2(inside)))

    @takes(q="potential")
    def log_f_of_q(self, q: Array) -> Array:
        """Return ln f_Q; ``q`` is Phi + v^2/2 + L^2 / (2 r_a^2) in (km/s)^2, in the potential's gauge."""
        s, escaped = self._ln_radius_of_q(q)
        return np.where(escaped, -np.inf, self._ln_f(np.clip(s, self._s[0], self._s[len(self._f) - 1])))

    def _q(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Return Q = Phi + v^2/2 + L^2 / (2 r_a^2) and L^2."""
        x, v = w[..., :3], w[..., 3:]
        L2 = (torch.linalg.cross(x, v) ** 2).sum(-1)
        return self.potential.phi(x) + (v**2).sum(-1) / 2 + L2 / (2 * self.anisotropy_radius**2), L2

    def _ln_radius_of_q(self, q: Array) -> tuple[Array, Array]:
        """Return ln of the radius where Phi = q, and where q lies above the potential at the last node."""
        n = len(self._f)
        s = self._s[:n]
        with torch.no_grad():
            phi = self.potential.phi_r(torch.as_tensor(np.exp(s))).numpy()
            rises = np.concatenate([[True], np.diff(phi) > 1e-13 * np.abs(phi[1:])])
            s_known, phi = s[rises], phi[rises]
            index = np.clip(np.searchsorted(phi, q) - 1, 0, len(phi) - 2)
            low, high = s_known[index], s_known[index + 1]
            at = low + (q - phi[index]) / (phi[index + 1] - phi[index]) * (high - low)
            for _ in range(5):
                at = np.clip(at, low, high)
                here = self.potential.phi_r(torch.as_tensor(np.exp(at))).numpy()
                at = at - (here - q) / self._vc2(at)
        return at, q > phi[-1]

    def sample(self, n: int, seed: int) -> Tensor:
        """Return ``w (n, 6)`` in kpc and km/s, independent draws of the exact distribution function."""
        rng = np.random.default_rng(seed)
        rank = rng.random(n)
        logit = np.log(np.clip(rank, 1e-300, None)) - np.log1p(-rank)
        s = self._s_of_logit(np.clip(logit, self._s_of_logit.x[0], self._s_of_logit.x[-1]))
        u = self._sample_speed(s, rng)
        # v_r = u cos(eta), v_t (1 + r^2/r_a^2)^(1/2) = u sin(eta), p(eta) ~ sin(eta)^(1 - 2 beta)
        cos = 2 * rng.beta(1 - self.beta, 1 - self.beta, n) - 1
        r = np.exp(s)
        v_r, v_t = u * cos, u * np.sqrt((1 - cos**2) / (1 + (r / self.anisotropy_radius) ** 2))
        radial = rng.normal(size=(n, 3))
        radial /= np.linalg.norm(radial, axis=1, keepdims=True)
        other = rng.normal(size=(n, 3))
        tangent = np.cross(radial, other)
        tangent /= np.linalg.norm(tangent, axis=1, keepdims=True)
        w = np.concatenate([r[:, None] * radial, v_r[:, None] * radial + v_t[:, None] * tangent], 1)
        return torch.as_tensor(w)

    def _sample_speed(self, s: Array, rng: np.random.Generator) -> Array:
        r"""Draw u with p(u) ~ f_Q(Phi + u^2/2) u^(2 - 2 beta) by drawing s' = ln of the radius where Phi is Q.

        p(s') ~ f_Q v_c^2 (Phi(s') - Phi(s))^(1/2 - beta). Proposals are uniform in a cell of s' chosen by an
        upper bound of p, which makes the rejection exact for any cell width.
        """
        power, origin = 0.5 - self.beta, self._s[0]
        keys, bounds = self._speed_table()
        n_cells = len(bounds)
        row = np.clip(((s - origin) / _STEP).astype(int), 0, n_cells - 1)
        row_levels = self._levels(self._s)
        levels = self._levels(s)
        gap, todo = np.empty(len(s)), np.arange(len(s))
        while len(todo):
            i = row[todo]
            cell = np.searchsorted(keys, i + rng.random(len(todo)), side="right") - i * n_cells
            cell = np.clip(cell, i, n_cells - 1)
            trial = origin + _STEP * (cell + rng.random(len(todo)))
            here = self._gap(tuple(level[todo] for level in levels), self._levels(trial))
            bound = (
                bounds[cell]
                * self._gap(tuple(level[i] for level in row_levels), tuple(level[cell + 1] for level in row_levels))
                ** power
            )
            height = np.where(trial > s[todo], np.exp(self._ln_weight(trial)) * here**power, 0.0)
            accepted = rng.random(len(todo)) * bound < height
            gap[todo[accepted]] = here[accepted]
            todo = todo[~accepted]
        return np.sqrt(2 * gap)

    def _speed_table(self) -> tuple[Array, Array]:
        """Return the flattened cumulative bounds (row number plus probability), and the bound per cell."""
        if self._row_keys is None:
            n = len(self._f) - 1
            inside = self._s[:n, None] + _STEP * np.linspace(0, 1, 9)
            bounds = 1.001 * np.exp(self._ln_weight(inside)).max(1)
            levels = self._levels(self._s)
            gap = self._gap(
                tuple(level[:n, None] for level in levels), tuple(level[None, 1 : n + 1] for level in levels)
            )
            table = np.triu(bounds * gap ** (0.5 - self.beta))
            cumulative = np.cumsum(table, 1)
            cumulative /= cumulative[:, -1:]
            self._row_keys = ((np.arange(n)[:, None] + cumulative).ravel(), bounds)
        return self._row_keys


def _density(tracers: Potential, r: Tensor) -> Tensor:
    if isinstance(tracers, SumPotential):
        return torch.stack([_density(member, r) for member in tracers.members]).sum(0)
    return _sphere(tracers).density_r(r)


def _mass(tracers: Potential, r: Tensor) -> Tensor:
    if isinstance(tracers, SumPotential):
        return torch.stack([_mass(member, r) for member in tracers.members]).sum(0)
    return _sphere(tracers).mass_r(r)


def _total_mass(tracers: Potential) -> Tensor:
    if isinstance(tracers, SumPotential):
        return torch.stack([_total_mass(member) for member in tracers.members]).sum(0)
    return _sphere(tracers).total_mass()


def _sphere(tracers: Potential) -> AnalyticSphere:
    if not isinstance(tracers, AnalyticSphere):
        raise ValueError(
            f"tracers must be analytic spheres of finite mass, got {type(tracers).__name__}; "
            "use for instance Isochrone, Plummer, Hernquist or Jaffe"
        )
    return tracers
