"""A density on the chart of action space, tabulated: what a network learns, at the cost of an interpolation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Size, Tensor
from torch.distributions import constraints

from bayespot.df.chart import ActionChart
from bayespot.df.distributions import OrbitDistribution, OrbitSample, action_space, uniform_points
from bayespot.numerics import bicubic_coefficients, gather_rows, gauss_legendre, legendre
from bayespot.units import takes_tensors

#: Cells of the table along v and t by number of coordinates, and Legendre polynomials in cos i.
CELLS = {2: (160, 80), 3: (96, 48)}
N_POLYNOMIALS = 10
#: ln q is at least this far below its maximum: a network's guess about empty corners stays finite.
_DEPTH = 60.0
#: Cells per axis of the grids from which orbits are drawn.
_DRAW_CELLS = {2: (512, 256), 3: (128, 64, 32)}


class TabulatedDistribution(OrbitDistribution):
    r"""Density of orbits :math:`\ln f = \ln f_0 + \sum_m a_m(v, t) P_m(\cos i)` with bicubic tables a_m.

    Values are exact at the nodes, first derivatives are continuous, and the normalisation is that of the interpolant
    itself (Gauss-Legendre quadrature in every cell). Without rotation P_0 is the only polynomial.

    Parameters
    ----------
    chart
        Its smooth coordinates (v, t, c) are those of the table.
    log_q
        ln q at points ``(n, 3)`` of the chart, normalised or not.
    cells
        Number of cells along v and t; None: `CELLS`, fewer with rotation.
    """

    support = action_space
    has_rsample = False
    arg_constraints: dict[str, constraints.Constraint] = {}

    def __init__(
        self, chart: ActionChart, log_q: Callable[[Tensor], Tensor], cells: tuple[int, int] | None = None
    ) -> None:
        cells = cells or CELLS[chart.dim]
        self.chart, self.cells = chart, cells
        nodes = [torch.linspace(0, 1, k + 1, dtype=torch.float64) for k in cells]
        n_c = N_POLYNOMIALS if chart.rotation else 1
        mu, weight = gauss_legendre(n_c)
        y = torch.stack(torch.meshgrid(*nodes, (1 + mu) / 2, indexing="ij"), -1)
        with torch.no_grad():
            values = log_q(y.reshape(-1, 3)).double().reshape(y.shape[:-1])
            values = values.clamp(min=float(values.max()) - _DEPTH)
            degree = torch.arange(n_c, dtype=torch.float64)
            projection = (degree + 0.5)[:, None] * legendre(mu, n_c).T * weight
            a = torch.einsum("mk,ijk->mij", projection, values)
            self.coefficients = torch.cat([bicubic_coefficients(part) for part in a], -1)
            self.log_norm = torch.zeros((), dtype=torch.float64)
            super().__init__(Size(), Size([3]), validate_args=False)
            self.log_norm = self._log_integral()
        self._drawn: dict[str, Tensor] = {}

    @takes_tensors(y="number")
    def log_q(self, y: Tensor) -> Tensor:
        """Return ln q, the density over the reference density, at smooth coordinates ``(*batch, 3)``."""
        a = self._expansion(y[..., 0], y[..., 1])
        value = (a * legendre(2 * y[..., 2] - 1, N_POLYNOMIALS)).sum(-1) if self.chart.rotation else a[..., 0]
        return value - self.log_norm

    def _expansion(self, v: Tensor, t: Tensor) -> Tensor:
        """Return a_m ``(*batch, M)``, bicubic in (v, t)."""
        n, m = self.cells
        u, t = v * n, t * m
        i, j = u.detach().long().clamp(0, n - 1), t.detach().long().clamp(0, m - 1)
        table = gather_rows(self.coefficients, i * m + j)
        u, t = (u - i)[..., None, None], (t - j)[..., None]
        c = table.reshape(*table.shape[:-1], -1, 4, 4)
        c = ((c[..., 3, :] * u + c[..., 2, :]) * u + c[..., 1, :]) * u + c[..., 0, :]
        return ((c[..., 3] * t + c[..., 2]) * t + c[..., 1]) * t + c[..., 0]

    def _on_grid(self, v: Tensor, t: Tensor, cos_i: Tensor) -> Tensor:
        """Return ln q on the grid of three axes; the expansion is evaluated once for all cos i."""
        a = self._expansion(*torch.meshgrid(v, t, indexing="ij"))
        return a @ legendre(cos_i, a.shape[-1]).T - self.log_norm

    def log_prob(self, value: Tensor) -> Tensor:
        """Return ln f(J) in (kpc km/s)^-3 for J ``(*batch, 3)`` in kpc km/s."""
        y = self.chart.smooth(value)
        return self.log_q(y) + self.chart.log_reference(y)

    @torch.no_grad()
    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw orbits J ``(*sample_shape, 3)`` by rejection from a density constant within fine cells."""
        shape = Size(sample_shape)
        n = shape.numel()
        found = [torch.empty(0, 3, dtype=torch.float64)]
        while sum(len(part) for part in found) < n:
            x, y, log_cell = self._place(torch.rand(2 * n + 16, 3, dtype=torch.float64))
            # a fifth above the cell's value: steeper slopes than that within a cell would need a finer table
            kept = torch.rand(len(x), dtype=torch.float64).log() < self.log_q(y) - log_cell - 0.2
            found.append(self.chart.actions(y[kept]))
        return torch.cat(found)[:n].reshape(*shape, 3)

    @torch.no_grad()
    def stratified(self, n: int, seed: int, n_spare: int = 0) -> OrbitSample:
        """Return n orbits at scrambled Sobol points, weighted by f over the density they are placed with."""
        u = uniform_points(n, 3 + n_spare, seed * 1009)
        _, y, log_cell = self._place(u[:, :3])
        weight = (self.log_q(y) - log_cell).exp()
        return OrbitSample(self.chart.actions(y), weight / weight.sum(), u[:, 3:])

    def _place(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map uniforms (n, 3) to points whose q is constant within fine cells of (u, T, c): x, y and ln q there."""
        if not self._drawn:
            self._lay_cells()
        log_cell = self._drawn["log_cell"]
        row = torch.zeros(len(u), dtype=torch.long)
        x = u.clone()
        # one axis after the other by its conditional distribution function; rows of them lie end to end
        for axis, k in enumerate(log_cell.shape):
            ends = self._drawn[f"cdf_{axis}"]
            at = torch.searchsorted(ends, row + u[:, axis], right=True).clamp(row * k, row * k + k - 1)
            low = torch.where(at == row * k, row.double(), ends[(at - 1).clamp(min=0)])
            x[:, axis] = (at - row * k + ((row + u[:, axis] - low) / (ends[at] - low)).clamp(0, 1)) / k
            row = at
        return x, self.chart.smooth_of_uniform(x), log_cell.reshape(-1)[row]

    def _lay_cells(self) -> None:
        cells = _DRAW_CELLS[self.chart.dim]
        u, T, *rest = ((torch.arange(k, dtype=torch.float64) + 0.5) / k for k in cells)
        c = rest[0] if rest else torch.full((1,), 0.5, dtype=torch.float64)
        along_u, along_T = (torch.stack([z, z, z], -1) for z in (u, T))
        v, t = self.chart.smooth_of_uniform(along_u)[:, 0], self.chart.smooth_of_uniform(along_T)[:, 1]
        log_q = self._on_grid(v, t, 2 * c - 1).reshape(cells)
        # a floor keeps every cell within reach
        p = (log_q - log_q.max()).exp() + 1e-12
        self._drawn["log_cell"] = p.log() - p.mean().log()
        for axis in range(len(cells)):
            marginal = p.sum(tuple(range(axis + 1, len(cells)))) if axis + 1 < len(cells) else p
            cdf = (marginal.cumsum(-1) / marginal.sum(-1, keepdim=True)).reshape(-1, cells[axis])
            self._drawn[f"cdf_{axis}"] = (cdf + torch.arange(len(cdf))[:, None]).reshape(-1)

    def _log_integral(self) -> Tensor:
        """ln of the integral of exp(ln q) over the cube of the reference density."""
        node, weight = gauss_legendre(3)
        v, t = ((torch.arange(k)[:, None] + (1 + node) / 2).reshape(-1) / k for k in self.cells)
        w_v, w_t = (weight.repeat(k) / (2 * k) for k in self.cells)
        mu, w_c = gauss_legendre(3 * N_POLYNOMIALS if self.chart.rotation else 1)
        found = []
        for part, w in zip(v.split(48), w_v.split(48), strict=True):
            y = torch.stack(torch.meshgrid(part, t, indexing="ij"), -1)
            log_p = self._on_grid(part, t, mu) + self.chart.log_volume(y)[..., None]
            found.append((log_p + (w[:, None, None] * w_t[:, None] * w_c / 2).log()).reshape(-1).logsumexp(0))
        return torch.stack(found).logsumexp(0)
