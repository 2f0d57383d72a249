"""Toy potentials with known actions and angles, fitted to orbits for generating functions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bayespot.potential.analytic import Isochrone
from bayespot.units import G

#: Isochrones tried: ln(b / median radius).
_LN_B = (-6.0, 4.0)


def fitted_isochrone(orbit: Tensor) -> Isochrone:
    r"""Isochrones (n, 1) whose energy varies least along the orbits (n, T, 6).

    For a given b the energy is linear in k = G M, which is solved for; b by a scan and golden-section search.
    """
    r2 = (orbit[..., :3] ** 2).sum(-1)
    kinetic = (orbit[..., 3:] ** 2).sum(-1) / 2
    scale = r2.median(1).values.sqrt().log()

    def at(ln_b: Tensor) -> tuple[Tensor, Tensor]:
        b = ln_b.exp()[:, None]
        g = 1 / (b + (b**2 + r2).sqrt())
        dg, dk = g - g.mean(1, keepdim=True), kinetic - kinetic.mean(1, keepdim=True)
        k = (dg * dk).mean(1) / (dg**2).mean(1).clamp(min=1e-300)
        # the whole orbit must be bound in it
        k = torch.maximum(k, 1.02 * (kinetic / g).amax(1))
        return (dk - k[:, None] * dg).square().mean(1), k

    grid = torch.linspace(*_LN_B, 41, dtype=orbit.dtype)
    tried = torch.stack([at(scale + offset)[0] for offset in grid])
    best = grid[tried.argmin(0)] + scale
    width = float(grid[1] - grid[0])
    low, high = best - width, best + width
    ratio = (math.sqrt(5) - 1) / 2
    for _ in range(40):
        inner, outer = high - ratio * (high - low), low + ratio * (high - low)
        left = at(inner)[0] <= at(outer)[0]
        low, high = torch.where(left, low, inner), torch.where(left, outer, high)
    ln_b = (low + high) / 2
    k = at(ln_b)[1]
    # a circular orbit has no energy variation to fit: any isochrone with its speed will do
    circular = r2.std(1) < 1e-6 * r2.mean(1)
    middle = r2.mean(1)
    turning = (2 * kinetic.mean(1)) * (1 + math.sqrt(2)) ** 2 * math.sqrt(2) * middle.sqrt()
    ln_b = torch.where(circular, middle.log() / 2, ln_b)
    k = torch.where(circular, turning, k)
    return Isochrone(m_tot=k[:, None] / G, r_s=ln_b.exp()[:, None])


def oscillator(orbit: Tensor) -> tuple[Tensor, Tensor]:
    """Actions and angles (n, T, 3) of the harmonic oscillator whose energy varies least along the orbits."""
    x, v = orbit[..., :3], orbit[..., 3:]
    x2, v2 = x**2 / 2, v**2 / 2
    omega = _frequencies(x2, v2)[:, None]
    return (v2 + omega**2 * x2) / omega, torch.atan2(omega * x, v)


def _frequencies(x2: Tensor, v2: Tensor) -> Tensor:
    """Frequencies (n, k) of the oscillator whose energy varies least, from x^2/2 and v^2/2 (n, T, k) of its parts."""
    dx2, dk = x2 - x2.mean(1, keepdim=True), v2.sum(-1) - v2.sum(-1).mean(1, keepdim=True)
    fitted = -torch.linalg.lstsq(dx2, dk[..., None]).solution[..., 0]
    virial = (v2.mean(1) / x2.mean(1).clamp(min=1e-300)).clamp(min=1e-300)
    return torch.where((fitted > 0).all(-1, keepdim=True), fitted, virial).sqrt()


def axial_oscillator(orbit: Tensor) -> tuple[Tensor, Tensor]:
    """Actions and angles (n, T, 3) as of a tube, of the oscillator with one frequency in x and y, fitted likewise.

    x + i y is the sum of two counter-rotating circular motions, with actions J_r + L_z and J_r if L_z >= 0; their
    phases are smooth at L_z = 0.
    """
    x, v = orbit[..., :3], orbit[..., 3:]
    flat = torch.stack([(x[..., :2] ** 2).sum(-1), x[..., 2] ** 2], -1) / 2
    kinetic = torch.stack([(v[..., :2] ** 2).sum(-1), v[..., 2] ** 2], -1) / 2
    omega = _frequencies(flat, kinetic)[:, None]
    horizontal, vertical = omega[..., 0], omega[..., 1]
    L_z = x[..., 0] * v[..., 1] - x[..., 1] * v[..., 0]
    energy = kinetic[..., 0] + horizontal**2 * flat[..., 0]
    J_r = (energy / horizontal - L_z.abs()) / 2
    J_z = (kinetic[..., 1] + vertical**2 * flat[..., 1]) / vertical
    scaled = v / horizontal[..., None]
    ahead = torch.atan2(x[..., 1] - scaled[..., 0], x[..., 0] + scaled[..., 1])
    behind = torch.atan2(x[..., 1] + scaled[..., 0], x[..., 0] - scaled[..., 1])
    retrograde = L_z.mean(1, keepdim=True) < 0
    theta_phi = torch.where(retrograde, behind, ahead)
    theta_z = torch.atan2(vertical * x[..., 2], v[..., 2])
    return torch.stack([J_r, L_z, J_z], -1), torch.stack([ahead - behind + math.pi, theta_phi, theta_z], -1)
