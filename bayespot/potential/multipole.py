"""Potentials of axisymmetric densities, even in z, by multipoles on a logarithmic radial grid."""

from __future__ import annotations

import abc
import functools
import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from bayespot.numerics import gather_rows, gauss_legendre, horner, horner_slope
from bayespot.potential.base import Potential, Symmetry
from bayespot.units import G, takes

#: A density in Msun/kpc^3 of R and z in kpc, tensors of one shape.
Density = Callable[[Tensor, Tensor], Tensor]
#: Nodes beyond either end of the grid that only enter the quadrature's quintic.
_GHOSTS = 2
#: Nodes of the quadrature within a cell: the integrand is a quintic times an exponential.
_IN_CELL = 16
#: The centre counts as this radius in kpc, as in `Potential.density`.
CENTRE = 1e-60
#: By how much a density must fall more steeply than r^-2 at the outer end.
_LEAST_FALL = 0.01


class Edge(NamedTuple):
    r"""How a potential goes on beyond one end of its grid: density a power law, :math:`r^2 \rho_l \propto r^{p}`.

    ``source`` is :math:`r^2 \rho_l` at the last node, ``near`` the integral over the grid's own side of the node and
    ``far`` that over the other, ``(n_l,)`` each; ``power`` is p.
    """

    source: Tensor
    power: Tensor
    near: Tensor
    far: Tensor


@dataclass(frozen=True)
class MultipoleTable:
    r"""The solution of :math:`\nabla^2\phi = \rho` by even multipoles, on a uniform grid in s = ln r.

    .. math::
        \phi = \sum_l \phi_l(s) P_l(\mu), \qquad \phi_l = -\frac{I_l + O_l}{2 l + 1}, \qquad
        I_l = \int_{-\infty}^{s} r'^2 \rho_l\, e^{-(l+1)(s - s')} ds', \quad
        O_l = \int_{s}^{\infty} r'^2 \rho_l\, e^{-l (s' - s)} ds'

    Both integrals are sums with decaying weights, stable at any l: quintic rules against the exact exponential. Between
    nodes quintic Hermite interpolation of value, slope and second derivative, all known from the integrals and
    Poisson's equation: phi is twice continuously differentiable. Beyond the grid the density goes on as the power law
    that its monopole has at the edge, and phi is exact for it: r^l within, Kepler's law outside.

    Parameters
    ----------
    s_first, ds
        First node and spacing.
    degrees
        The degrees l, even and one after the other.
    cells : Float[Tensor, "n - 1, 6 n_l"]
        Coefficients of :math:`\phi_l` in each cell's coordinate, those of one l side by side.
    inner, outer
        What lies beyond the ends.
    """

    s_first: float
    ds: float
    degrees: tuple[int, ...]
    cells: Tensor
    inner: Edge
    outer: Edge

    @classmethod
    def of(
        cls, source: Tensor, degrees: tuple[int, ...], s_first: float, ds: float, monopole: Tensor | None = None
    ) -> MultipoleTable:
        r"""Solve for ``source`` ``(n_l, n + 4)``: :math:`r^2 \rho_l` on the nodes and on two more beyond either end.

        The power laws at the ends are those of ``monopole`` ``(n + 4,)``, by default the first row. Many densities are
        solved for at once as rows of repeated ``degrees``, with a row of ``monopole`` for each.
        """
        l = torch.tensor(degrees, dtype=source.dtype, device=source.device)[:, None]
        weights_in, weights_out = (w.to(source) for w in _cell_weights(degrees, ds))
        pieces = source.unfold(-1, 2 * _GHOSTS + 2, 1)
        q = source[:, _GHOSTS:-_GHOSTS]
        mean = q[0] if monopole is None else monopole[..., _GHOSTS:-_GHOSTS]
        p_in, p_out = _power(mean[..., 0], mean[..., 1], ds), _power(mean[..., -2], mean[..., -1], ds)
        start = _integral_of_power(q[:, :1], p_in[..., None] + l + 1)
        end = _integral_of_power(q[:, -1:], l - p_out[..., None])
        inward = _decaying_sums(
            torch.cat([start, (pieces * weights_in[:, None]).sum(-1)], -1), torch.exp(-(l + 1) * ds)
        )
        rest = torch.cat([(pieces * weights_out[:, None]).sum(-1), end], -1)
        outward = _decaying_sums(rest.flip(-1), torch.exp(-l * ds)).flip(-1)
        value = -(inward + outward) / (2 * l + 1)
        slope = ((l + 1) * inward - l * outward) / (2 * l + 1)
        bend = q + l * (l + 1) * value - slope
        cells = _quintic_coefficients(value, slope * ds, bend * ds**2)
        inner = Edge(q[:, 0], p_in, outward[:, 0], inward[:, 0])
        outer = Edge(q[:, -1], p_out, inward[:, -1], outward[:, -1])
        return cls(s_first, ds, degrees, cells.permute(1, 0, 2).flatten(1), inner, outer)

    @classmethod
    def of_density(cls, density: Density, s: Tensor, angles: tuple[Tensor, Tensor], l_max: int) -> MultipoleTable:
        r"""Solve for a density, with :math:`\rho_l = (2 l + 1) \int_0^1 \rho P_l d\mu` by the rule ``angles``.

        ``s`` are the nodes ``(n + 4,)``, two ghosts at either end included; ``angles`` are nodes and weights on (0, 1).
        """
        mu, weight = (part.to(s) for part in angles)
        degrees = tuple(range(0, l_max + 1, 2))
        projection = even_legendre(mu, l_max) * (weight[:, None] * (2 * mu.new_tensor(degrees) + 1))
        r = s.exp()[:, None]
        rho = density(r * ((1 - mu) * (1 + mu)).sqrt(), r * mu)
        source = (r**2 * rho) @ projection
        ds = float(s[-1] - s[0]) / (len(s) - 1)
        return cls.of(source.T, degrees, float(s[0]) + _GHOSTS * ds, ds)

    @property
    def s_last(self) -> float:
        """Last node."""
        return self.s_first + self.ds * len(self.cells)

    def detached(self) -> MultipoleTable:
        """Return the table without its graph."""
        inner, outer = (Edge(*(part.detach() for part in edge)) for edge in (self.inner, self.outer))
        return MultipoleTable(self.s_first, self.ds, self.degrees, self.cells.detach(), inner, outer)

    def phi_on_grid(self, s: Tensor, mu: Tensor) -> Tensor:
        r"""Return :math:`\phi` ``(n, m)`` at all pairs of s ``(n,)`` and mu ``(m,)``: a product of matrices."""
        return self.each_degree(s) @ self._angular(mu).T

    def draws_on_grid(self, s: Tensor, mu: Tensor) -> Tensor:
        r"""Return :math:`\phi` ``(n_draws, n, m)`` where the rows are those of several densities in turn."""
        angular = self._angular(mu)
        return self.each_degree(s).unflatten(-1, (-1, angular.shape[1])).transpose(0, 1) @ angular.T

    def each_degree(self, s: Tensor) -> Tensor:
        r"""Return :math:`\phi_l` ``(n, n_l)`` at s ``(n,)``."""
        rows, u = self._cells_at(s)
        degrees = horner(rows, u[:, None])
        for beyond, edge in ((s < self.s_first, self._below), (s > self.s_last, self._above)):
            if bool(beyond.any()):
                d = (s - self.s_first).clamp(max=0) if edge == self._below else (s - self.s_last).clamp(min=0)
                degrees = torch.where(beyond[:, None], edge(d), degrees)
        return degrees

    def _angular(self, mu: Tensor) -> Tensor:
        return even_legendre(mu, self.degrees[-1])[..., self.degrees[0] // 2 :]

    def _cells_at(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """Return the coefficients ``(*batch, n_l, 6)`` of the cells of s, and the places within."""
        # the branch that is not taken must not overflow: its derivative would be NaN
        position = (s.clamp(self.s_first, self.s_last) - self.s_first) / self.ds
        index = position.detach().long().clamp(0, len(self.cells) - 1)
        return gather_rows(self.cells, index).unflatten(-1, (len(self.degrees), 6)), position - index

    def phi(self, s: Tensor, mu: Tensor) -> Tensor:
        r"""Return :math:`\phi` at s = ln r and mu, the cosine of the polar angle; both of any one shape."""
        angular = self._angular(mu)
        first, last = self.s_first, self.s_last
        fixed = s.detach()
        rows, u = self._cells_at(s)
        found = horner((rows * angular[..., None]).sum(-2), u)
        if bool((fixed < first).any()):
            found = torch.where(fixed < first, (self._below((s - first).clamp(max=0)) * angular).sum(-1), found)
        if bool((fixed > last).any()):
            found = torch.where(fixed > last, (self._above((s - last).clamp(min=0)) * angular).sum(-1), found)
        return found

    def in_plane(self, s: Tensor) -> tuple[Tensor, Tensor]:
        r"""Return :math:`\phi` and :math:`d\phi/ds` at s = ln r in the plane mu = 0."""
        rows, u = self._cells_at(s)
        angular = self._angular(torch.zeros_like(s[:1]))[0]
        quintic = (rows * angular[:, None]).sum(-2)
        phi, slope = horner(quintic, u), horner_slope(quintic, u) / self.ds
        below, above = s < self.s_first, s > self.s_last
        for beyond, d, law in (
            (below, (s - self.s_first).clamp(max=0), (self._below, self._slope_below)),
            (above, (s - self.s_last).clamp(min=0), (self._above, self._slope_above)),
        ):
            if bool(beyond.any()):
                outside, rise = (part(d) @ angular for part in law)
                phi, slope = torch.where(beyond, outside, phi), torch.where(beyond, rise, slope)
        return phi, slope

    def _slope_below(self, d: Tensor) -> Tensor:
        """d phi_l / ds at s_first + d, d <= 0."""
        l, edge, d = d.new_tensor(self.degrees), self.inner, d[..., None]
        power = torch.exp(edge.power * d)
        outside = l * edge.near * torch.exp(l * d) - edge.source * (power - l * _between(-d, l, edge.power))
        return -(edge.far * edge.power * power + outside) / (2 * l + 1)

    def _slope_above(self, d: Tensor) -> Tensor:
        """d phi_l / ds at s_last + d, d >= 0."""
        l, edge, d = d.new_tensor(self.degrees) + 1, self.outer, d[..., None]
        power = torch.exp(edge.power * d)
        inside = edge.source * (power - l * _between(d, l, -edge.power)) - l * edge.near * torch.exp(-l * d)
        return -(inside + edge.far * edge.power * power) / (2 * l - 1)

    def _below(self, d: Tensor) -> Tensor:
        """phi_l at s_first + d, d <= 0."""
        l, edge, d = d.new_tensor(self.degrees), self.inner, d[..., None]
        outside = edge.near * torch.exp(l * d) + edge.source * _between(-d, l, edge.power)
        return -(edge.far * torch.exp(edge.power * d) + outside) / (2 * l + 1)

    def _above(self, d: Tensor) -> Tensor:
        """phi_l at s_last + d, d >= 0."""
        l, edge, d = d.new_tensor(self.degrees), self.outer, d[..., None]
        inside = edge.near * torch.exp(-(l + 1) * d) + edge.source * _between(d, l + 1, -edge.power)
        return -(inside + edge.far * torch.exp(edge.power * d)) / (2 * l + 1)


class ExpandedPotential(Potential, abc.ABC):
    """A potential whose Phi is, in part or whole, a table of multipoles.

    A table that depends on numbers alone is made once; one that depends on trained parameters or sites with every call.
    """

    symmetry: Symmetry = "axisymmetric"

    def _kept_table(
        self, parameters: tuple[Tensor, ...], build: Callable[[], MultipoleTable], *options: str
    ) -> MultipoleTable:
        """Return ``build()``, or what it returned when the parameters were the same tensors (one at least).

        Copies that `bayespot.pyro_modules.freeze` makes share their numbers, and thereby their tables. Of one first
        parameter the last table is kept, for as long as that tensor lives.
        """
        first, *others = parameters
        signature = (type(self), self.l_max, *options, *(p._version for p in parameters))
        kept = _TABLES.get(first)
        if kept is not None and kept[0] == signature and all(a() is b for a, b in zip(kept[1], others, strict=True)):
            return kept[2]
        with torch.enable_grad():
            table = build()
        if not table.cells.requires_grad:
            _TABLES[first] = (signature, [weakref.ref(p) for p in others], table)
            return table
        return table if torch.is_grad_enabled() else table.detached()


#: The last table by its first parameter. Tables are no part of a potential: they are neither copied nor stored.
_TABLES: Any = WeakTensorKeyDictionary()


class MultipoleExpansion(ExpandedPotential):
    r"""Potential of any axisymmetric density that is even in z, by multipoles of even degree up to ``l_max``.

    .. math:: \nabla^2\Phi = 4\pi G \sum_{l \le l_{max}} \rho_l(r) P_l(\cos\theta), \qquad
              \rho_l = (2 l + 1) \int_0^1 \rho\, P_l\, d\mu

    Beyond ``r_min`` and ``r_max`` the density is continued as the power law that it has there. ``density`` returns the
    given density itself, the Laplacian of Phi that of the multipoles. For thin discs use
    `bayespot.potential.ExponentialDisc`, for which the expansion converges far sooner.

    Parameters
    ----------
    rho
        Function of R and z (tensors in kpc, of one shape) that returns the density in Msun/kpc^3. For a density with
        free parameters a ``torch.nn.Module`` with that ``forward``: its parameters and sample sites are the
        potential's, under ``rho.``.
    r_min, r_max
        Radii in kpc between which Phi is tabulated.
    l_max
        Largest degree, even; 0 is the spherical average.
    n_angles
        Nodes of the angular quadrature in one hemisphere, by default ``2 l_max + 16``.

    Raises
    ------
    ValueError
        If the numbers make no grid, or the density, at its present parameters, is not finite on it, falls no more
        steeply than r^-2 at r_max or rises as steeply as r^-3 towards r_min.

    References
    ----------
    Binney & Tremaine (2008), Galactic Dynamics, equations 2.95.

    Examples
    --------
    >>> plummer = MultipoleExpansion(lambda R, z: 1e9 * (1 + R**2 + z**2 / 0.49) ** -2.5, 1e-3, 1e3)
    >>> x = torch.tensor([8.0, 0.0, 1.0], dtype=torch.float64)
    >>> round(plummer.phi(x).item(), 3)  # (km/s)^2
    -1564.153
    """

    @takes(r_min="length", r_max="length")
    def __init__(self, rho: Density, r_min: float, r_max: float, l_max: int = 16, n_angles: int | None = None) -> None:
        super().__init__()
        if not callable(rho):
            raise ValueError(f"rho must be a function of R and z, got {rho!r}")
        if not (r_min > 0 and 2 * r_min < r_max < math.inf):
            raise ValueError(f"need 0 < r_min < r_max / 2 (kpc), got {r_min} and {r_max}")
        self.rho = rho
        self.l_max = checked_degree(l_max)
        self.n_angles = 2 * l_max + 16 if n_angles is None else n_angles
        if self.n_angles <= l_max // 2:
            raise ValueError(f"n_angles must be more than l_max / 2 = {l_max // 2}, got {n_angles}")
        self.register_buffer("_s", grid(math.log(r_min), math.log(r_max), l_max))
        if not has_sites(self):
            with torch.no_grad():
                _check(self._build(), r_min, r_max)

    def _build(self) -> MultipoleTable:
        return MultipoleTable.of_density(self.rho, self._s, half_rule(self.n_angles), self.l_max)

    def _table(self) -> MultipoleTable:
        if has_sites(self):
            return self._build()
        parts = self.rho.modules() if isinstance(self.rho, torch.nn.Module) else ()
        stores = [store for part in parts for store in (part._parameters, part._buffers, vars(part))]
        tensors = (value for store in stores for value in store.values() if isinstance(value, Tensor))
        return self._kept_table((self._s, *tensors), self._build)

    def phi(self, x: Tensor) -> Tensor:
        r, mu = polar(x)
        return 4 * math.pi * G * self._table().phi(r.log(), mu)

    def density(self, x: Tensor) -> Tensor:
        return self.rho(*cylindrical(x))


# ---------------------------------------------------------------------------------------- grids and rules


def polar(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return r and the cosine of the polar angle; at the centre their derivatives are zero to any order, not NaN."""
    r = (x**2).sum(-1).clamp(min=CENTRE**2).sqrt()
    return r, x[..., 2] / r


def cylindrical(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return R, whose derivatives on the axis are zero, not NaN, and z."""
    return (x[..., :2] ** 2).sum(-1).clamp(min=CENTRE**2).sqrt(), x[..., 2]


def grid(s_first: float, s_last: float, l_max: int, ds: float = 0.05) -> Tensor:
    """Return nodes in ln r from s_first to s_last, with two ghosts at either end; finer for large l."""
    step = min(ds, 1.0 / max(l_max, 1))
    n = max(math.ceil((s_last - s_first) / step), 8)
    step = (s_last - s_first) / n
    return s_first + step * torch.arange(-_GHOSTS, n + 1 + _GHOSTS, dtype=torch.float64)


def half_rule(n: int, stretch: int = 1) -> tuple[Tensor, Tensor]:
    """Return nodes and weights on (0, 1) for functions of mu, crowded towards 0 as mu = t^stretch."""
    t, weight = gauss_legendre(n)
    t = (1 + t) / 2
    return t**stretch, weight / 2 * stretch * t ** (stretch - 1)


def even_legendre(mu: Tensor, l_max: int) -> Tensor:
    """Return P_0, P_2 to P_(l_max) of mu on a new last axis, by a recurrence in mu^2 that leaves the odd ones out."""
    mu2 = mu**2
    found = [torch.ones_like(mu), 1.5 * mu2 - 0.5]
    for n in range(2, l_max, 2):
        # mu^2 P_n = a P_(n+2) + b P_n + c P_(n-2)
        a = (n + 1) * (n + 2) / ((2 * n + 1) * (2 * n + 3))
        c = n * (n - 1) / ((2 * n - 1) * (2 * n + 1))
        b = 1 - a - c
        found.append(((mu2 - b) * found[-1] - c * found[-2]) / a)
    return torch.stack(found[: l_max // 2 + 1], -1)


def checked_degree(l_max: int) -> int:
    """Return an even degree; ValueError otherwise."""
    if isinstance(l_max, bool) or not isinstance(l_max, int) or l_max < 0 or l_max % 2:
        raise ValueError(f"l_max must be an even number, 0 or more, got {l_max!r}")
    return l_max


def has_sites(module: torch.nn.Module) -> bool:
    """Whether a module or a part of it has sample sites or Pyro parameters."""
    return any(vars(part).get(store) for part in module.modules() for store in ("_pyro_samples", "_pyro_params"))


def _check(table: MultipoleTable, r_min: float, r_max: float) -> None:
    if not bool(torch.isfinite(torch.stack([table.inner.source, table.outer.source])).all()):
        raise ValueError(f"the density is not finite between {r_min:g} and {r_max:g} kpc")
    if float(table.inner.power) <= -1:
        slope = 2 - float(table.inner.power)
        raise ValueError(f"the density rises as r^-{slope:.2f} towards r_min = {r_min:g} kpc: the mass is infinite")
    if float(table.outer.power) > -_LEAST_FALL and float(table.outer.source[0]) != 0:
        slope = 2 - float(table.outer.power)
        raise ValueError(
            f"the density falls as r^-{slope:.2f} at r_max = {r_max:g} kpc, not more steeply than r^-2: no potential "
            "vanishes at infinity; cut the density off, or take a larger r_max if it steepens beyond"
        )
    if not bool(torch.isfinite(table.cells).all()):
        raise ValueError(f"the density is not finite between {r_min:g} and {r_max:g} kpc")


# ---------------------------------------------------------------------------------------- sums and coefficients


@functools.cache
def _cell_weights(degrees: tuple[int, ...], ds: float) -> tuple[Tensor, Tensor]:
    """Weights (n_l, 6) of the six nodes around a cell in its share of the inner and outer integrals."""
    t, weight = gauss_legendre(_IN_CELL)
    u, weight = (1 + t) / 2, weight / 2 * ds
    nodes = torch.arange(-_GHOSTS, _GHOSTS + 2, dtype=torch.float64)
    basis = []
    for j, node in enumerate(nodes):
        others = torch.cat([nodes[:j], nodes[j + 1 :]])
        basis.append(((u[:, None] - others) / (node - others)).prod(-1))
    l = torch.tensor(degrees, dtype=torch.float64)[:, None]
    lagrange = torch.stack(basis, -1)
    return (torch.exp(-(l + 1) * ds * (1 - u)) * weight) @ lagrange, (torch.exp(-l * ds * u) * weight) @ lagrange


def _decaying_sums(terms: Tensor, factor: Tensor) -> Tensor:
    """Return y with y_i = factor y_(i-1) + terms_i along the last axis, by doubling: log2(n) steps."""
    total, step = terms, 1
    while step < terms.shape[-1]:
        earlier = torch.nn.functional.pad(total[..., :-step], (step, 0))
        total, factor, step = total + factor * earlier, factor**2, 2 * step
    return total


def _power(first: Tensor, second: Tensor, ds: float) -> Tensor:
    """Return d ln q / ds of the monopole between two nodes; zero where it is not one sign or vanishes."""
    sound = (first * second > 0) & torch.isfinite(first) & torch.isfinite(second)
    ratio = torch.where(sound, second, 1.0) / torch.where(sound, first, 1.0)
    return ratio.log() / ds


def _integral_of_power(q: Tensor, rate: Tensor) -> Tensor:
    """Return q / rate, the integral of q exp(-rate t) over t > 0; NaN where it diverges, unless q is zero."""
    nothing = q == 0
    safe = torch.where(nothing | (rate <= 0), 1.0, rate)
    return torch.where(nothing, 0.0, torch.where(rate <= 0, math.nan, q / safe))


def _between(d: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return (exp(-a d) - exp(-b d)) / (b - a) for d >= 0, d exp(-a d) where a = b, without overflow."""
    low, gap = torch.minimum(a, b), (b - a).abs()
    safe = torch.where(gap < 1e-9, torch.full_like(gap, 1e-9), gap)
    return torch.exp(-low * d) * -torch.expm1(-safe * d) / safe


def _quintic_coefficients(value: Tensor, slope: Tensor, bend: Tensor) -> Tensor:
    """Coefficients (*batch, n - 1, 6) in u of the quintic through values, slopes and second derivatives at nodes."""
    f0, f1, d0, d1 = value[..., :-1], value[..., 1:], slope[..., :-1], slope[..., 1:]
    b0, b1 = bend[..., :-1] / 2, bend[..., 1:] / 2
    # what the parabola at the left node lacks at the right one, in value, slope and second derivative
    a, b, c = f1 - f0 - d0 - b0, d1 - d0 - 2 * b0, 2 * (b1 - b0)
    return torch.stack([f0, d0, b0, 10 * a - 4 * b + c / 2, -15 * a + 7 * b - c, 6 * a - 3 * b + c / 2], -1)
