"""A disc of free surface density and thickness: exponential discs of fixed shapes, free masses, one component."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from pyro.nn import PyroSample
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from bayespot.potential.base import Potential, Symmetry
from bayespot.potential.discs import ExponentialDisc
from bayespot.potential.neural import normal_site
from bayespot.pyro_modules import freeze
from bayespot.units import G, takes, takes_tensors

#: Scale lengths and heights over the median radius of the stars. Edge-on galaxies have a height of 0.07 lengths in the
#: mean and up to twice that (Kregel, van der Kruit & de Grijs 2002, MNRAS 334, 646), the same at all radii.
_LENGTHS, _HEIGHTS = (0.15, 0.3, 0.6, 1.2), (0.01, 0.03, 0.1)
#: Prior standard deviations of the logits: what discs of a height share, those of a length, and each alone. That one of
#: the heights hardly has any mass must be likely, at all lengths together.
_OF_HEIGHT, _OF_LENGTH, _ALONE = 2.5, 1.5, 0.7
#: Prior median of the mass of all over r v^2 / G of the stars at their median radius.
_SHARE = 0.3


class ExponentialDiscs(Potential):
    r"""Disc of free surface density, a sum of exponential discs of fixed scale lengths and heights.

    .. math::
        \Sigma(R) = \sum_k \frac{m_k}{2\pi R_k^2} e^{-R/R_k}, \qquad
        \ln m_k = \ln m + \ln \frac{e^{a_k}}{\sum_j e^{a_j}}

    each with a vertical density :math:`\propto \mathrm{sech}^2(z / 2 h_k)`, flat in the plane as that of an
    isothermal layer. Sites are ``ln_mass`` = ln m (Msun), the mass of all, and ``logits`` a ``(k,)``, how it is
    shared. The tables of the single discs (`ExponentialDisc`) are made once; a change of masses costs next to
    nothing. What the stars tell about a disc is mostly its mass at their own radii: the sum has a prior of its own,
    so that a finer division does not widen it, and the shares, which overlapping discs leave open, have proper
    ones.

    Parameters
    ----------
    r_d, h_z
        Scale lengths and heights in kpc, one of each per disc.
    ln_mass, mass_sd
        Prior mean and standard deviation of ln m.
    logits_sd
        Prior standard deviation of the logits, of mean zero, that is each disc's own.
    height_sd, length_sd
        That of what discs of equal height, and of equal length, have in common.

    Raises
    ------
    ValueError
        If lengths, heights or standard deviations are not positive, or there are not as many heights as lengths.

    Examples
    --------
    >>> from bayespot.pyro_modules import freeze
    >>> free = ExponentialDiscs([1.5, 3.0], [0.3, 0.3], ln_mass=24.0)
    >>> disc = freeze(free, free.initial_values())
    >>> round(disc.circular_speed(8.2).item(), 1)  # km/s
    120.7
    """

    symmetry: Symmetry = "axisymmetric"

    @takes(
        r_d="length",
        h_z="length",
        ln_mass="number",
        mass_sd="number",
        logits_sd="number",
        height_sd="number",
        length_sd="number",
    )
    def __init__(
        self,
        r_d: Sequence[float],
        h_z: Sequence[float],
        ln_mass: float,
        mass_sd: float = 1.0,
        logits_sd: float = 1.0,
        height_sd: float = 0.0,
        length_sd: float = 0.0,
    ) -> None:
        super().__init__()
        lengths, heights = (torch.as_tensor(part, dtype=torch.float64).reshape(-1) for part in (r_d, h_z))
        if len(lengths) != len(heights) or not len(lengths):
            raise ValueError(f"need as many heights as scale lengths, got {len(heights)} and {len(lengths)}")
        for name, values in (("r_d", lengths), ("h_z", heights)):
            if not bool(((values > 0) & torch.isfinite(values)).all()):
                raise ValueError(f"{name} must be positive (kpc), got {values.tolist()}")
        if not (mass_sd > 0 and logits_sd > 0 and height_sd >= 0 and length_sd >= 0):
            given = ", ".join(f"{sd:g}" for sd in (mass_sd, logits_sd, height_sd, length_sd))
            raise ValueError(f"standard deviations must be positive (of heights and lengths: or zero), got {given}")
        self.register_buffer("r_d", lengths)
        self.register_buffer("h_z", heights)
        self._ln_mass = float(ln_mass)
        mean = torch.tensor(self._ln_mass, dtype=torch.float64)
        self.ln_mass: Any = normal_site(mean, torch.tensor(mass_sd, dtype=torch.float64), False)
        same_height, same_length = ((part[:, None] == part).double() for part in (heights, lengths))
        own = logits_sd**2 * torch.eye(len(lengths), dtype=torch.float64)
        covariance = own + height_sd**2 * same_height + length_sd**2 * same_length
        self.logits: Any = PyroSample(dist.MultivariateNormal(torch.zeros_like(lengths), covariance))
        self.discs: Any = torch.nn.ModuleList(
            ExponentialDisc(1 / (2 * math.pi * r**2), r, h, vertical="sech2")
            for r, h in zip(lengths.tolist(), heights.tolist(), strict=True)
        )

    @classmethod
    @takes_tensors(w="phase_space")
    def for_stars(cls, w: Tensor) -> ExponentialDiscs:
        """Return twelve discs placed by the stars' radii and speeds.

        Their scale lengths are 0.15 to 1.2 of the median radius r, with heights of 0.01, 0.03 and 0.1 r each: real
        discs are about as thick at all radii (with one height the vertical force near the plane came out confidently
        wrong, with heights in proportion to the lengths so far out). So the prior of the logits lets discs of a height
        have less or more mass together (sd 2.5), as those of a length (1.5), and less each by itself (0.7): with
        independent ones of sd 1.5 a third of the mass was kept in the thinnest, and 5000 stars were fitted with a
        plane too dense. That of ln m is about 0.3 r v^2 / G with the median v^2, sd 1.

        Parameters
        ----------
        w : Float[Tensor, "n 6"]
            Phase-space positions in kpc and km/s.
        """
        r = float(torch.linalg.vector_norm(w[:, :3], dim=-1).median())
        mass = _SHARE * r * float((w[:, 3:] ** 2).sum(-1).median()) / G
        pairs = [(length * r, height * r) for height in _HEIGHTS for length in _LENGTHS]
        lengths, heights = zip(*pairs, strict=True)
        return cls(lengths, heights, math.log(mass), logits_sd=_ALONE, height_sd=_OF_HEIGHT, length_sd=_OF_LENGTH)

    def initial_values(self) -> dict[str, Tensor]:
        """Start at the prior's centre."""
        return {"ln_mass": torch.tensor(self._ln_mass, dtype=torch.float64), "logits": torch.zeros_like(self.r_d)}

    @property
    def masses(self) -> Tensor:
        """Masses of the discs ``(*batch, k)`` in Msun."""
        return torch.exp(self.ln_mass[..., None] + torch.log_softmax(self.logits, -1))

    def phi(self, x: Tensor) -> Tensor:
        return (self.masses * torch.stack([disc.phi(x) for disc in self.discs], -1)).sum(-1)

    def density(self, x: Tensor) -> Tensor:
        return (self.masses * torch.stack([disc.density(x) for disc in self.discs], -1)).sum(-1)

    def phi_draws_on_grid(self, values: Mapping[str, Tensor], s: Tensor, mu: Tensor) -> Tensor:
        masses = freeze(self, values).masses
        return torch.einsum("nmk,dk->dnm", self._units(s.detach(), mu.detach()), masses.to(s))

    def functionals_on_grid(
        self, values: Mapping[str, Tensor], W: Tensor, s: Tensor, mu: Tensor
    ) -> Callable[[Mapping[str, Tensor]], Tensor]:
        units = torch.einsum("nmd,nmk->dk", self._units(s.detach(), mu.detach()), W)
        return lambda draws: freeze(self, draws).masses @ units

    def phi_on_grid(self, s: Tensor, mu: Tensor) -> Tensor:
        return torch.tensordot(self._units(s.detach(), mu.detach()), self.masses.to(s), dims=([2], [0]))

    def phi_and_vc2(self, r: Tensor) -> tuple[Tensor, Tensor]:
        units = self._radial_units(r.detach())
        phi, vc2 = (part @ self.masses.to(part) for part in units)
        return phi, vc2

    @torch.no_grad()
    def _radial_units(self, r: Tensor) -> tuple[Tensor, Tensor]:
        """Return Phi and v_c^2 of single discs of unit mass ``(*batch, k)``; of the last radii they are kept."""
        kept = _RADII.setdefault(self.r_d, [])
        for known, units in kept:
            if known.shape == r.shape and known.device == r.device and torch.equal(known, r):
                return units
        pairs = [disc.phi_and_vc2(r) for disc in self.discs]
        phi, vc2 = (torch.stack(part, -1) for part in zip(*pairs, strict=True))
        kept.append((r.clone(), (phi, vc2)))
        del kept[:-_N_RADII]
        return phi, vc2

    def _units(self, s: Tensor, mu: Tensor) -> Tensor:
        """Return Phi of single discs of unit mass ``(n, m, k)``; rows that were asked for before are kept."""
        kept = _GRIDS.get(self.r_d)
        if kept is None or not torch.equal(kept.mu, mu):
            kept = _GRIDS[self.r_d] = self._grid(s, mu)
        if (rows := kept.rows(s)) is None:
            kept = _GRIDS[self.r_d] = self._grid(kept.joined(s), mu)
            rows = kept.rows(s)
        return kept.units[rows]

    @torch.no_grad()
    def _grid(self, s: Tensor, mu: Tensor) -> _Grid:
        return _Grid(s.clone(), mu.clone(), torch.stack([disc.phi_on_grid(s, mu) for disc in self.discs], -1))


class _Grid(NamedTuple):
    """Phi ``units (n, m, k)`` of discs of unit mass at all pairs of s and mu."""

    s: Tensor
    mu: Tensor
    units: Tensor

    def rows(self, s: Tensor) -> slice | None:
        """Return the rows that are those of s; None if some are missing."""
        first = int(torch.searchsorted(self.s, s[0] - _SAME))
        own = self.s[first : first + len(s)]
        return slice(first, first + len(s)) if own.shape == s.shape and torch.allclose(own, s, 0, _SAME) else None

    def joined(self, s: Tensor) -> Tensor:
        """Return nodes that hold the grid's own as well, if both are parts of one uniform grid; else s."""
        step = s[1] - s[0] if len(s) > 1 else s.new_tensor(math.nan)
        before, after = (s[0] - self.s[0]) / step, (self.s[-1] - s[-1]) / step
        if not bool((before - before.round()).abs() < 1e-6) or not bool((after - after.round()).abs() < 1e-6):
            return s
        n = len(s) + max(int(before.round()), 0) + max(int(after.round()), 0)
        return torch.minimum(s[0], self.s[0]) + step * torch.arange(n, dtype=s.dtype, device=s.device)


#: Nodes in ln r as near as this are the same.
_SAME = 1e-9
#: The largest grid of every set of discs, and what it has at its last radii in the plane, by its lengths: no part of a
#: potential, neither copied nor stored.
_GRIDS: Any = WeakTensorKeyDictionary()
_RADII: Any = WeakTensorKeyDictionary()
#: How many sets of radii are kept: those of tables whose ends move by a node or two from one potential to the next.
_N_RADII = 12
