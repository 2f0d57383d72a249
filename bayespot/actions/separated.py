r"""Motion in u and v of one star, as if its potential separated: Binney's fudge.

In the notation of `spheroidal`, with x = a^2, the fudge takes for the potential along u that at the star's own y_0,
and for the potential along v that at the star's own x_0:

.. math::
    p_u^2 = 2 (x + D t_0) [E - \Phi(x, y_0)] - A - L_z^2 D / x, \qquad
    p_v^2 = 2 (x_0 + D t) [E - \Phi(x_0, y)] - B - L_z^2 / t,

with D = Delta^2, A = p_v^2 + L_z^2 / t and B = p_u^2 + L_z^2 D / x at the star (Binney 2012, MNRAS 426, 1324:
equations 8 to 12, in another gauge). In a sphere A = L^2. Both are exact in a potential of Staeckel's form.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from bayespot.actions.plane import safe_sqrt
from bayespot.actions.spheroidal import Spheroidal


class Field(Protocol):
    """An axisymmetric potential in the meridional plane."""

    def phi(self, R: Tensor, z: Tensor) -> Tensor:
        """Return Phi in (km/s)^2."""

    def slopes(self, R: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return Phi, R dPhi/dR and z dPhi/dz, without gradients."""

    def taken(self, index: Tensor) -> Field:
        """Return the field for some of the stars that ask; it matters to fields that remember who did."""


class Separated(NamedTuple):
    """One star's separated motion; every field but the first has the shape of the stars.

    ``energy`` E and ``kinetic`` = E - Phi at the place (x0, y0), (km/s)^2; ``A`` and ``lift`` = A - L_z^2, in
    (kpc km/s)^2; ``lz`` = abs(L_z); ``D``; ``scale``, a radius (kpc) far inside which no star spends time.
    """

    field: Field
    energy: Tensor
    kinetic: Tensor
    A: Tensor
    lift: Tensor
    lz: Tensor
    D: Tensor
    x0: Tensor
    y0: Tensor
    t0: Tensor
    scale: Tensor

    @classmethod
    def of(cls, field: Field, star: Spheroidal, energy: Tensor, kinetic: Tensor, scale: Tensor) -> Separated:
        """Return the motion of stars of given energy and kinetic energy at their places."""
        A = star.p_beta**2 + star.x * star.v_phi**2
        lift = star.p_beta**2 + star.x * (star.v_phi * star.y) ** 2
        place = (star.D, star.x, star.y, star.t)
        return cls(field, energy, kinetic, A, lift, star.Lz.abs(), *place, scale.detach())

    def spread(self) -> Separated:
        """Return the same with a trailing axis for nodes."""
        return Separated(self.field, *(part[..., None] for part in self[1:]))

    def taken(self, index: Tensor) -> Separated:
        """Return some of the stars."""
        return Separated(self.field.taken(index), *(part[index] for part in self[1:]))

    def detached(self) -> Separated:
        """Return the same without gradients."""
        return Separated(self.field, *(part.detach() for part in self[1:]))

    def phi_along_u(self, x: Tensor) -> Tensor:
        """Return Phi at x = a^2 and the star's y."""
        return self.field.phi(safe_sqrt(x * self.t0), _root(x + self.D) * self.y0)

    def phi_along_v(self, y: Tensor, t: Tensor) -> Tensor:
        """Return Phi at y and the star's x."""
        return self.field.phi(safe_sqrt(self.x0 * t), _root(self.x0 + self.D) * y)

    def along_u(self, x: Tensor) -> Tensor:
        """Return x p_u^2."""
        return self.of_u(x, 2 * (self.energy - self.phi_along_u(x)), self.D)

    def of_u(self, x: Tensor, K: Tensor, D: Tensor) -> Tensor:
        """Return x p_u^2 where K = 2 (E - Phi)."""
        return x * ((x + D * self.t0) * K - self.A) - self.lz**2 * D

    def along_v(self, y: Tensor, t: Tensor) -> Tensor:
        """Return t p_v^2."""
        return self.of_v(y, t, self.phi_along_v(y, t))

    def of_v(self, y: Tensor, t: Tensor, phi: Tensor) -> Tensor:
        """Return t p_v^2 where the potential is ``phi``; in a sphere the third term vanishes."""
        D = self.D
        rise = 2 * ((self.x0 + D * t) * (self.energy - phi) - (self.x0 + D * self.t0) * self.kinetic)
        return self.lift - self.A * y**2 + rise * t


def _root(c2: Tensor) -> Tensor:
    """Return c, which rounding must not make imaginary in the disc that oblate coordinates end with."""
    return c2.clamp(min=1e-300).sqrt()
