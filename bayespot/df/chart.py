"""A chart of action space on the unit cube, on which every f(J) finite at the edges is a bounded density."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bayespot.optimisers import LBFGS
from bayespot.units import takes, takes_tensors

#: Coordinates keep this distance from 1 where a logarithm or a quotient would overflow.
_EDGE = 1e-15
#: Range of the tail index of the reference density.
_TAILS = (0.3, 12.0)
#: Most rotation of the reference density, which stays positive for both senses.
_MOST_SPIN = 1 - 1e-6
#: Expected width in J_phi / L of the change between the senses.
_TURN = 0.05


@takes(
    scale_r="action", scale_L="action", size="number", tail="number", stretch_z="number", spin="number", turn="number"
)
@dataclass(frozen=True)
class ActionChart:
    r"""Smooth coordinates y = (v, t, c) of an orbit, and coordinates (u, T, c) uniform under a reference density.

    .. math::
        S = \frac{1}{h}\left(\frac{J_r}{s_r} + \frac{L}{s_L}\right), \quad v = \frac{S}{1 + S}, \quad
        t = \frac{L}{h s_L S}, \quad c = \frac{1 + \cos i}{2}, \quad
        u = (1 + S^{-b})^{-3/b}, \quad T = t^2

    with L = J_z + |J_phi| and cos i = J_phi / L. u is a Dagum distribution function. A density q(u, T, c) on the unit
    cube is in action space

    .. math::
        f(J) = q\, f_0(J), \quad f_0 = \frac{3}{h^3 s_r s_L^2} \left(1 + S^b\right)^{-1-3/b},

    since dJ_phi dJ_z = 2 L dL dc. f_0 is finite and positive where J_r = 0, L = 0 or both and falls as a power law, so
    f is finite at the edges if and only if q is: densities on the cube have the right boundary. v and t are smooth
    functions of J up to the edges, the coordinates for networks and tables.

    In a flattened potential J_z has a scale of its own and the stars may all rotate one way: then L = |J_phi| +
    z J_z and

    .. math::
        C = \frac{1}{2} + \frac{1}{2}\left[x + \chi\left(\sqrt{x^2 + \omega^2} - \sqrt{1 + \omega^2}\right)\right],
        \quad f_0 \to z \left[1 + \frac{\chi x}{\sqrt{x^2 + \omega^2}}\right] f_0, \quad x = \frac{J_\phi}{L},

    takes the place of c in both sets of coordinates. As in a sphere f_0 depends on J_phi through its size, but for the
    change of the sense of rotation over the width omega: it has a kink at J_phi = 0, as the Hamiltonian has, and no
    hole.

    Parameters
    ----------
    scale_r, scale_L : float
        s_r and s_L in kpc km/s.
    size : float
        h, the dimensionless scale of S.
    tail : float
        b, the index of the power law: the fraction of orbits beyond S falls as S^-b.
    rotation : bool
        Whether densities depend on cos i; otherwise the cube is a square times a uniform c.
    stretch_z : float
        z, the weight of J_z in L.
    spin, turn : float
        chi, between -1 and 1, and omega > 0.

    Examples
    --------
    >>> chart = ActionChart(100.0, 200.0, 1.0, 3.0)
    >>> J = torch.tensor([[50.0, 30.0, 80.0]], dtype=torch.float64)
    >>> torch.allclose(chart.actions(chart.smooth(J)), J)
    True
    """

    scale_r: float
    scale_L: float
    size: float
    tail: float
    rotation: bool = False
    stretch_z: float = 1.0
    spin: float = 0.0
    turn: float = 1.0

    @classmethod
    @takes_tensors(J="action")
    def for_actions(cls, J: Tensor, rotation: bool = False, flattened: bool = False) -> ActionChart:
        """Return the chart whose reference density fits actions ``J (n, 3)``: mean T = 1/2, h and b by likelihood.

        ``flattened``: also z, so that the mean of |J_phi| / L is 1/2, and chi and omega by likelihood.

        Raises
        ------
        ValueError
            If more than half of the stars have the same vanishing action.
        """
        size_phi = J[:, 1].abs()
        z, spin, turn = _flattening(size_phi, J) if flattened else (1.0, 0.0, 1.0)
        L = z * J[:, 2] + size_phi
        s_r, s_L = float(J[:, 0].median()), float(L.median())
        if not (s_r > 0 and s_L > 0):
            raise ValueError(f"the median J_r and L must be positive to scale a chart, got {s_r} and {s_L} kpc km/s")
        s_r *= _balance(J[:, 0] / s_r, L / s_L, 2)
        ln_S = (J[:, 0] / s_r + L / s_L).clamp(min=1e-12).log()
        x = torch.stack([ln_S.median(), torch.tensor(0.7, dtype=torch.float64)]).requires_grad_()
        optimiser = LBFGS([x], max_iter=60, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimiser.zero_grad()
            b = x[1].exp()
            z = b * (ln_S - x[0])
            value = (3 * x[0] + (1 + 3 / b) * torch.nn.functional.softplus(z)).mean() + 0.01 * (x[1] - 1) ** 2
            value.backward()
            return value

        optimiser.step(loss)  # type: ignore[no-untyped-call]
        size, tail = x.detach().exp().tolist()
        tail = min(max(tail, _TAILS[0]), _TAILS[1])
        return cls(s_r, s_L, size, tail, rotation or flattened, z, spin, turn)

    @property
    def dim(self) -> int:
        """Number of coordinates on which densities depend: 2, or 3 with rotation."""
        return 3 if self.rotation else 2

    @takes_tensors(J="action")
    def smooth(self, J: Tensor) -> Tensor:
        """Return y = (v, t, c) ``(*batch, 3)`` of actions J in kpc km/s, differentiable up to the edges."""
        S, t, c = self._parts(J)
        return torch.stack([S / (1 + S), t, c], -1)

    @takes_tensors(y="number")
    def actions(self, y: Tensor) -> Tensor:
        """Return J ``(*batch, 3)`` of smooth coordinates; the inverse of `smooth`."""
        v, t = y[..., 0].clamp(0, 1 - _EDGE), y[..., 1]
        S = self.size * v / (1 - v)
        L, cos_i = self.scale_L * S * t, self._cosine(y[..., 2])
        return torch.stack([self.scale_r * S * (1 - t), L * cos_i, L * (1 - cos_i.abs()) / self.stretch_z], -1)

    @takes_tensors(y="number")
    def uniform(self, y: Tensor) -> Tensor:
        """Return (u, T, c) ``(*batch, 3)`` of smooth coordinates."""
        v = y[..., 0].clamp(1e-30, 1 - _EDGE)
        z = self.tail * (v / (1 - v)).log()
        u = (-(3 / self.tail) * torch.nn.functional.softplus(-z)).exp()
        return torch.stack([u, y[..., 1] ** 2, y[..., 2]], -1)

    @takes_tensors(x="number")
    def smooth_of_uniform(self, x: Tensor) -> Tensor:
        """Return y of (u, T, c); the inverse of `uniform`."""
        u = x[..., 0].clamp(1e-90, 1 - _EDGE)
        ln_S = -torch.expm1(-(self.tail / 3) * u.log()).log() / self.tail
        return torch.stack([torch.sigmoid(ln_S), x[..., 1].clamp(min=0).sqrt(), x[..., 2]], -1)

    def _cosine(self, c: Tensor) -> Tensor:
        """J_phi / L of the third coordinate."""
        if not self.spin:
            return 2 * c - 1
        # with the spin positive; the root of x^2 (1 - chi^2) - 2 y x + y^2 - chi^2 omega^2 that loses no digits
        chi, sign = abs(self.spin), math.copysign(1.0, self.spin)
        rest, omega2 = (1 - chi) * (1 + chi), self.turn**2
        y = sign * (2 * c - 1) + chi * math.sqrt(1 + omega2)
        root = chi * (y**2 + rest * omega2).sqrt()
        x = torch.where(y > 0, (y**2 - chi**2 * omega2) / (y.clamp(min=0) + root), (y - root) / rest)
        return sign * x.clamp(-1, 1)

    @takes_tensors(y="number")
    def log_reference(self, y: Tensor) -> Tensor:
        """Return ln f_0 in (kpc km/s)^-3 at smooth coordinates, so that ln f = ln q + ln f_0."""
        v = y[..., 0].clamp(1e-30, 1 - _EDGE)
        z = self.tail * (v / (1 - v)).log()
        constant = math.log(3) - 3 * math.log(self.size) - math.log(self.scale_r) - 2 * math.log(self.scale_L)
        value = constant - (1 + 3 / self.tail) * torch.nn.functional.softplus(z) + math.log(self.stretch_z)
        if not self.spin:
            return value
        x = self._cosine(y[..., 2])
        return value + torch.log1p(self.spin * x / (x**2 + self.turn**2).sqrt())

    @takes_tensors(y="number")
    def log_volume(self, y: Tensor) -> Tensor:
        """Return the logarithm of the reference density in (v, t, c): d(u, T, c) = exp(log_volume) d(v, t, c)."""
        v = y[..., 0].clamp(1e-30, 1 - _EDGE)
        odds = v / (1 - v)
        z = self.tail * odds.log()
        slope = math.log(3) + 2 * odds.log() - (1 + 3 / self.tail) * torch.nn.functional.softplus(z)
        return slope - 2 * torch.log1p(-v) + (2 * y[..., 1]).log()

    def _parts(self, J: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        L = self.stretch_z * J[..., 2] + J[..., 1].abs()
        y = L / self.scale_L
        total = (J[..., 0].clamp(min=0) / self.scale_r + y).clamp(min=1e-30)
        x = (J[..., 1] / L.clamp(min=1e-30)).clamp(-1, 1)
        if self.spin:
            x = x + self.spin * ((x**2 + self.turn**2).sqrt() - math.sqrt(1 + self.turn**2))
        return total / self.size, y / total, ((1 + x) / 2).clamp(0, 1)


def _balance(x: Tensor, y: Tensor, power: int) -> float:
    """Return the factor k for which the mean of (y / (x/k + y))^power is 1/2, by bisection in its logarithm."""
    low, high = -12.0, 12.0
    for _ in range(50):
        middle = (low + high) / 2
        T = (y / (x / math.exp(middle) + y).clamp(min=1e-30)) ** power
        low, high = (middle, high) if float(T.mean()) < 0.5 else (low, middle)
    return math.exp((low + high) / 2)


def _flattening(size_phi: Tensor, J: Tensor) -> tuple[float, float, float]:
    """Return z, chi and omega of actions, the latter two with weak priors: no rotation, a width of a twentieth."""
    s_phi, s_z = float(size_phi.median()), float(J[:, 2].median())
    if not (s_phi > 0 and s_z > 0):
        raise ValueError(f"the median |J_phi| and J_z must be positive to scale a chart, got {s_phi}, {s_z} kpc km/s")
    z = s_phi / (s_z * _balance(J[:, 2] / s_z, size_phi / s_phi, 1))
    x = J[:, 1] / (z * J[:, 2] + size_phi).clamp(min=1e-30)
    found = torch.tensor([0.0, math.log(_TURN)], dtype=torch.float64).requires_grad_()
    optimiser = LBFGS([found], max_iter=60, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        odd = x / (x**2 + (2 * found[1]).exp()).sqrt()
        prior = (found[0] / 2) ** 2 + (found[1] - math.log(_TURN)) ** 2
        value = -torch.log1p(_MOST_SPIN * found[0].tanh() * odd).mean() + prior / (2 * len(x))
        value.backward()
        return value

    optimiser.step(loss)  # type: ignore[no-untyped-call]
    return z, _MOST_SPIN * float(found[0].detach().tanh()), float(found[1].detach().exp())
