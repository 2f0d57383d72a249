"""From actions and angles to stars: the separated motion solved for its integrals and phases, and Newton's method.

The fudge separates the motion at the star's own place, which is what is sought. So the place is guessed (that of the
sphere with the same potential in the plane), the separated system solved there, which is an easy problem, and the place
it gives taken for the next guess. This converges by the factor by which the potential is not of Staeckel's form; the
last digits, and the derivatives, are those of Newton's method on the forward map.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bayespot.actions.fudge import Surroundings
from bayespot.actions.separated import Separated
from bayespot.actions.separated_actions import EPS
from bayespot.actions.separated_angles import Torus
from bayespot.actions.spheroidal import from_spheroidal
from bayespot.actions.turning import Guide, torus_points
from bayespot.numerics import bracketed_newton

_MOST_PLACES, _MOST_STEPS, _MOST_PHASES = 15, 12, 40
#: Largest last change of the place over |w|, of the actions over their sum, and of the phases in radians.
_PLACE, _ACTION, _PHASE = 1e-5, 1e-8, 1e-8
#: Largest step of a phase, in radians.
_LONGEST = 0.7
#: Rounds of one phase after the other, and how far a phase may be from its angle.
_ROUNDS, _AROUND = 2, 4.5
#: Last step of the turning points in ln x and y.
_TOLERANCE = 1e-10
_SCALE = 0.02


@torch.no_grad()
def place(around: Surroundings, J: Tensor, theta: Tensor, w: Tensor) -> Tensor:
    """Return stars ``w (n, 6)`` with actions ``J`` and angles ``theta (n, 3)``, from a first guess of them."""
    field = around.field
    J_r, Lz, J_z = J.unbind(-1)
    index, result = torch.arange(len(w), device=w.device), w.clone()
    for _ in range(_MOST_PLACES):
        # the guess is a star, so its integrals are possible ones
        star, separated, guide, _ = around.motion(w)
        energy, A = separated.energy, separated.A
        phi = energy - separated.kinetic
        fixed = (star.D, star.x, star.y, star.t, _SCALE * guide.s_c.exp())

        def motion(energy: Tensor, A: Tensor, phi: Tensor = phi, fixed: tuple[Tensor, ...] = fixed) -> Separated:
            return Separated(field, energy, energy - phi, A, A - Lz**2, Lz.abs(), *fixed)  # noqa: B023

        torus = _integrals(motion, around, energy, A, J_r, J_z, Lz)
        new = _star(torus, theta, Lz)
        size = torch.cat([part.norm(dim=-1, keepdim=True).expand(-1, 3) for part in new.split(3, -1)], -1)
        left = ((new - w).abs() / size).amax(-1) > _PLACE
        w = new
        result[index] = w
        if not bool(left.any()):
            break
        index, w, J_r, J_z, Lz, theta = (part[left] for part in (index, w, J_r, J_z, Lz, theta))
    return result


def _integrals(
    motion: Callable[[Tensor, Tensor], Separated],
    around: Surroundings,
    energy: Tensor,
    A: Tensor,
    J_r: Tensor,
    J_z: Tensor,
    Lz: Tensor,
) -> Torus:
    """Return the torus of given actions in one separated system, by Newton's method."""
    size = J_r + J_z + Lz.abs()
    escape = around.profile.escape_energy

    def torus_of(energy: Tensor, A: Tensor) -> tuple[Torus, Tensor]:
        separated = motion(energy, A)
        points = torus_points(separated, Guide.of(around.profile, energy), _TOLERANCE)
        torus = Torus.of(separated, points, Lz)
        miss = torch.maximum((J_r - torus.J_r).abs(), (J_z - torus.J_z).abs()) / size
        return torus, miss.nan_to_num(torch.inf, torch.inf)

    torus, miss = torus_of(energy, A)
    step = torch.ones_like(energy)
    for _ in range(_MOST_STEPS):
        by_r, _, by_z = torus.integrals()
        d_r, d_z = J_r - torus.J_r, J_z - torus.J_z
        dE = by_r.by_E * d_r + by_z.by_E * d_z
        dI = by_r.by_I * d_r + by_z.by_I * d_z
        dA = 2 * dI + 2 * torus.motion.D * torus.motion.t0 * dE
        new_E = torch.minimum(energy + step * dE, (energy + escape) / 2)
        new_A = A + step * dA
        found, found_miss = torus_of(new_E, new_A)
        better = (found_miss < miss) | (found_miss < _ACTION)
        energy, A = torch.where(better, new_E, energy), torch.where(better, new_A, A)
        miss = torch.where(better, found_miss, miss)
        step = torch.where(better, torch.ones_like(step), step / 3)
        torus = found if bool(better.all()) else torus_of(energy, A)[0]
        if bool(((miss < _ACTION) | (step < 1e-3)).all()):
            break
    return torus


def _star(torus: Torus, theta: Tensor, Lz: Tensor) -> Tensor:
    """Return the star of a torus at given angles."""
    psi, chi = _phases(torus, theta)
    motion = torus.motion
    x = torus.place(psi[..., None])[..., 0]
    y = EPS * torch.sinh(torus.top * chi.sin())
    t = ((1 - y) * (1 + y)).clamp(min=1e-30)
    p_u = (motion.along_u(x) / x).clamp(min=0).sqrt() * torch.where(psi.cos() < 0, -1.0, 1.0)
    p_beta = (motion.along_v(y, t) / t).clamp(min=0).sqrt() * torch.where(chi.cos() < 0, -1.0, 1.0)
    # the azimuth is what makes theta_phi come out
    turned = torus.angles(*torus.wrapped(psi, chi), torch.zeros_like(x))[:, 1]
    return from_spheroidal(motion.D, x, y, t, p_u, p_beta, Lz, theta[:, 1] - turned)


def _phases(torus: Torus, theta: Tensor) -> tuple[Tensor, Tensor]:
    """Return psi and chi, unwrapped, at which theta_r and theta_z are the given ones."""
    along_u, along_v = torus.series()
    by_r, _, by_z = torus.integrals()
    want = torch.stack([theta[:, 0], theta[:, 2]])

    def angles(eta: Tensor, chi: Tensor) -> tuple[Tensor, Tensor]:
        (u_E, du_E), (u_I, du_I) = along_u(eta)
        (v_E, dv_E), (v_I, dv_I) = along_v(chi)
        E, I = u_E + v_E, u_I + v_I
        value = torch.stack([by_r.by_E * E + by_r.by_I * I, by_z.by_E * E + by_z.by_I * I])
        slope = torch.stack(
            [
                torch.stack([by_r.by_E * du_E + by_r.by_I * du_I, by_r.by_E * dv_E + by_r.by_I * dv_I]),
                torch.stack([by_z.by_E * du_E + by_z.by_I * du_I, by_z.by_E * dv_E + by_z.by_I * dv_I]),
            ]
        )
        return want - value, slope

    eta, chi = want.clone()
    # one angle after the other, each a rising function of its own phase; steep ones would defeat Newton's method
    for _ in range(_ROUNDS):

        def radial(at: Tensor, chi: Tensor = chi) -> tuple[Tensor, Tensor]:
            miss, slope = angles(at, chi)
            return -miss[0], slope[0, 0]

        eta = bracketed_newton(radial, want[0] - _AROUND, want[0] + _AROUND, eta, 30, 1e-3)

        def vertical(at: Tensor, eta: Tensor = eta) -> tuple[Tensor, Tensor]:
            miss, slope = angles(eta, at)
            return -miss[1], slope[1, 1]

        chi = bracketed_newton(vertical, want[1] - _AROUND, want[1] + _AROUND, chi, 30, 1e-3)
    miss, slope = angles(eta, chi)
    size, step = miss.norm(dim=0), torch.ones_like(eta)
    for _ in range(_MOST_PHASES):
        (a, b), (c, d) = slope
        det = a * d - b * c
        move = torch.stack([d * miss[0] - b * miss[1], a * miss[1] - c * miss[0]]) / det
        move = step * move * (_LONGEST / move.abs().amax(0).clamp(min=_LONGEST))
        found, found_slope = angles(eta + move[0], chi + move[1])
        better = found.norm(dim=0) < size
        eta, chi = torch.where(better, eta + move[0], eta), torch.where(better, chi + move[1], chi)
        miss, slope = torch.where(better, found, miss), torch.where(better, found_slope, slope)
        size = miss.norm(dim=0)
        step = torch.where(better, (2 * step).clamp(max=1), step / 3)
        if bool(((size < _PHASE) | (step < 1e-4)).all()):
            break
    return eta - torch.pi / 2, chi
