"""Actions, angles and frequencies in any axisymmetric potential by the Staeckel fudge, and the inverse map."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from bayespot.actions.base import ActionAngles, ActionFinder, CappedActions, TorusMap, cap_energy
from bayespot.actions.focal import FocalTable
from bayespot.actions.fudge import Surroundings, blockwise_actions
from bayespot.actions.meridional import DirectField, Equatorial, TabulatedField, require_axisymmetric
from bayespot.actions.orbit import integrate_transformed
from bayespot.actions.plane import check_actions, safe_sqrt, split
from bayespot.actions.separated_actions import AT_DISC, radial_action, vertical_action
from bayespot.actions.separated_angles import Torus
from bayespot.actions.spherical import SphericalActions
from bayespot.actions.staeckel_map import place
from bayespot.actions.turning import turning_points
from bayespot.numerics import first_order_only
from bayespot.potential.base import Potential, radius
from bayespot.potential.extent import Extent, log_radius
from bayespot.units import takes, takes_tensors

#: Node spacing in ln R of the circular orbits.
_DS = 0.05
#: e-foldings of radius tabulated inside the least circular radius, and beyond the largest that the energies allow in
#: the plane: off it an orbit may go a little farther.
_INNER, _OUTER = 12.0, 0.7
#: Last step of the turning points in ln x and y where angles are asked for.
_EXACT = 1e-9
#: Nodes for the actions of orbits that have no angles.
_N_THROUGH = 64
#: Points along an orbit from which the scatter of J is told.
_N_SCATTER = 32
#: Largest miss of J over the sum of abs(J), and of theta, before the last step, which squares it.
_MISS = 1e-3
#: Largest condition number of d(J, theta)/dw of stars for which Newton's step is taken.
_WORST = 1e9


class StaeckelFudge(ActionFinder, TorusMap):
    r"""Action finder and torus map of every axisymmetric potential that is symmetric about the plane z = 0.

    The motion is taken to separate in prolate spheroidal coordinates, as it does in a potential of Staeckel's form
    (Binney 2012, equations 8 to 12): with x = a^2 = (Delta sinh u)^2, t = sin^2 v and D = Delta^2

    .. math::
        p_u^2 = 2 (x + D t_0) [E - \Phi(x, y_0)] - A - L_z^2 D / x, \qquad
        J_r = \frac{1}{\pi} \int p_u\, du, \qquad J_z = \frac{2}{\pi} \int p_v\, dv,

    where (x_0, y_0) is the star's place and A = p_v^2 + L_z^2 / t there. Where a potential is elongated along z, D is
    negative and the coordinates oblate (`bayespot.actions.spheroidal`). In such a potential all is exact; elsewhere J
    varies along an orbit, by 0.01 % of the sum of actions for stars of a thin disc and by 1 % for halo stars in the
    median: `scatter` tells for each star. In a sphere it is `SphericalActions`: J_z = L - abs(L_z), the same angles.

    `capped_actions` and `actions` are the fast path: Phi is tabulated in ln r and latitude (so that the cost per star
    does not depend on the potential's), with 16 and 10 nodes of quadrature. `actions_angles` and `phase_space` evaluate
    the potential itself, with 64 nodes. J of the two differs by 1e-8 of the sum of actions in the median; by up to 1e-3
    for orbits through the centre inside a tenth of Delta, for which the fudge itself is no better.

    First derivatives with respect to w, J, theta and the potential's parameters, through Delta as well, are exact;
    differentiating twice raises RuntimeError. J of a star does not depend on its company.

    On an orbit in the plane z = 0 theta_z has no meaning, on a circular one theta_r; a polar orbit (L_z = 0) is the
    limit of L_z > 0. Where loops in the meridional plane become boxes J jumps. In a potential elongated along z orbits
    of small L_z keep to one side of the plane until they go through the disc inside the ring of their coordinates:
    these have actions, but no angles nor frequencies (NaN), and `phase_space` does not find them. `capped_actions`
    slows a star that would escape down to just below the escape speed, L_z included.

    Parameters
    ----------
    delta
        Focal distance in kpc, the same for all stars, or a table of it (`settled`). None: that of shell orbits in the
        potential at hand, as a function of energy (`focal_distance`). Within 25 % is close enough; zero biases
        flattening and disc mass. Negative: minus the radius of the focal ring of oblate coordinates.

    Raises
    ------
    ValueError
        On construction if ``delta`` is not finite; by the methods if the potential is triaxial or not
        symmetric about z = 0, no star has finite coordinates, or no focal distance is found.

    References
    ----------
    Binney (2012), MNRAS 426, 1324; Sanders & Binney (2016), MNRAS 457, 2107, section 3.2; Vasiliev (2019), MNRAS 482,
    1525; de Zeeuw (1985), MNRAS 216, 273 (Staeckel potentials).

    Examples
    --------
    >>> import torch
    >>> from bayespot.potential.analytic import Logarithmic
    >>> potential = Logarithmic(v_0=220.0, r_c=1.0, q=0.8)
    >>> w = torch.tensor([[8.0, 0.0, 1.0, 20.0, 150.0, 30.0]], dtype=torch.float64)
    >>> finder = StaeckelFudge()
    >>> J, theta, Omega = finder.actions_angles(potential, w)
    >>> torch.allclose(finder.phase_space(potential, J, theta), w)
    True
    """

    @takes(delta="length")
    def __init__(self, delta: float | FocalTable | None = None) -> None:
        if not isinstance(delta, FocalTable | None) and not math.isfinite(delta):
            raise ValueError(f"delta must be a finite length in kpc, got {delta}; None lets the potential decide")
        self.delta = delta
        #: Whether angles are those of the potential tabulated, see `rough`.
        self._tabulates = False

    def rough(self) -> StaeckelFudge:
        """Return the finder that takes angles and frequencies from the table of the potential as well.

        A tenth of the cost where the potential is dear to evaluate; J and theta to 1e-5 in the median.
        """
        finder = StaeckelFudge(self.delta)
        finder._tabulates = True
        return finder

    def settled(self, potential: Potential, w: Tensor) -> StaeckelFudge:
        """Return the finder with the focal distances of this potential, for all potentials near it.

        They then are numbers, without derivatives: a fit spares itself to solve for them in every potential that it
        tries. Given focal distances stay.
        """
        if self.delta is not None or potential.symmetry != "axisymmetric":
            return self
        with torch.no_grad():
            around, *_ = self._surroundings(potential, w)
        finder = StaeckelFudge(around.focal.through(lambda part: part.detach().to("cpu", torch.float64)))
        finder._tabulates = self._tabulates
        return finder

    def tabulated(self, potential: Potential, w: Tensor) -> TabulatedFudge:
        """Return the finder with the tables of this potential, for ``w`` and any part of it."""
        surroundings, evaluated, s_first, s_last = self._surroundings(potential, w)
        field = TabulatedField.of(evaluated, s_first, s_last, w)
        return TabulatedFudge(Surroundings(field, surroundings.focal, surroundings.profile), self)

    def capped_actions(self, potential: Potential, w: Tensor) -> CappedActions:
        return self.tabulated(potential, w).capped_actions(potential, w)

    def actions_angles(self, potential: Potential, w: Tensor) -> ActionAngles:
        around, _, s_first, s_last = self._surroundings(potential, w)
        if self._tabulates:
            around = replace(around, field=TabulatedField.of(potential, s_first, s_last, w))
        J, theta, Omega, excess = _exact(around, w.reshape(-1, 6))
        unbound = (excess > 0)[:, None]
        parts = (torch.where(unbound, torch.nan, part) for part in (J, theta, Omega))
        return ActionAngles(*(first_order_only(part).reshape(*w.shape[:-1], 3) for part in parts))

    def phase_space(self, potential: Potential, J: Tensor, theta: Tensor) -> Tensor:
        check_actions(J)
        J, theta = torch.broadcast_tensors(J, theta)
        shape = J.shape[:-1]
        J, theta = J.reshape(-1, 3), theta.reshape(-1, 3)
        with torch.no_grad():
            guess = SphericalActions().phase_space(Equatorial(potential, J), J, theta)
        around, *_ = self._surroundings(potential, guess)
        w = place(around, J.detach(), theta.detach(), guess)
        # Newton's step squares the error that is left, and has the derivatives of the implicit-function theorem
        w, _ = _newton(around, w, J.detach(), theta.detach())
        w, miss = _newton(around, w.detach(), J, theta)
        lost = ~(miss < _MISS)
        if bool(lost.any()):
            worst = int(torch.where(lost)[0][0])
            warnings.warn(
                f"{int(lost.sum())} of {len(w)} tori were not found and are NaN, the first at J = {J[worst].tolist()} "
                "kpc km/s: the fudge has no torus of these actions and angles, or a very distorted one",
                RuntimeWarning,
                stacklevel=3,
            )
            w = torch.where(lost[:, None], torch.nan, w)
        return first_order_only(w).reshape(*shape, 6)

    @takes_tensors(r="length")
    def focal_distance(self, potential: Potential, r: Tensor) -> Tensor:
        r"""Return Delta (kpc) of orbits with the energy of a circular orbit of radius ``r`` in the plane.

        Where a shell orbit meets the same d/da [(a^2 + Delta^2 t) Phi] in the plane as in the mean over four latitudes,
        which in Staeckel's form it does at all; in potentials elongated along z minus the radius of the ring that the
        foci of oblate coordinates are. A fit may take its value at a typical radius of the stars for ``delta``, which
        then no longer varies.

        Parameters
        ----------
        r : Float[Tensor, "*batch"]
            In kpc.

        Raises
        ------
        ValueError
            If the potential is triaxial, or none is found.
        """
        if potential.symmetry == "triaxial":
            raise ValueError(f"{type(potential).__name__} is triaxial: focal distances are those of symmetry about z")
        s = log_radius(r)
        D = self._focal(potential, float(s.detach().min()), float(s.detach().max()), s).at(s)
        return D.sign() * safe_sqrt(D.abs())

    def _focal(self, potential: Potential, s_first: float, s_last: float, like: Tensor) -> FocalTable:
        """Return the focal distances of orbits of these energies (ln of the circular radius)."""
        if isinstance(self.delta, FocalTable):
            return self.delta.through(lambda part: part.to(like))
        if self.delta is not None or potential.symmetry == "spherical":
            return FocalTable.constant(self.delta or 0.0, like)
        return FocalTable.of(potential, s_first, s_last, like)

    @takes_tensors(w="phase_space")
    @takes(n_periods="number")
    def scatter(self, potential: Potential, w: Tensor, n_periods: float = 2.0) -> Tensor:
        """Return by how much J varies along each star's orbit: how far from conserved the fudge's actions are.

        Parameters
        ----------
        w : Float[Tensor, "*batch 6"]
            Position (kpc) and velocity (km/s).
        n_periods
            Length of the piece of the orbit, about, in radial periods.

        Returns
        -------
        Float[Tensor, "*batch 3"]
            Standard deviations of (J_r, J_phi, J_z) in kpc km/s over 32 points; NaN where the star is unbound. Without
            derivatives.

        Raises
        ------
        ValueError
            If ``n_periods`` is not positive.
        """
        if not 0 < n_periods < math.inf:
            raise ValueError(f"n_periods must be positive, a number of radial periods; got {n_periods}")
        with torch.no_grad():
            around, *_ = self._surroundings(potential, w)
            flat = w.reshape(-1, 6)
            J, _, Omega, excess = _exact(around, flat)
            bound = torch.isfinite(J).all(-1) & (excess <= 0)
            flat = torch.where(bound[:, None], flat, 0.0)
            guide = around.motion(torch.where(bound[:, None], flat, w.reshape(-1, 6))).guide
            size = guide.s_c.exp()
            # of orbits without angles that of circular ones, as in a logarithmic potential
            rate = torch.where(torch.isfinite(Omega[:, 0]), Omega[:, 0], math.sqrt(2) * guide.ln_lc.exp() / size**2)
            step = torch.where(bound, n_periods * 2 * math.pi / rate / _N_SCATTER, 0.0)
            orbit = integrate_transformed(potential, flat, size, 0.02 * size, step, _N_SCATTER, "yoshida4", 16).w
            J = self.actions(potential, torch.where(bound[:, None], orbit, w.reshape(-1, 6)))
            return torch.where(bound[:, None], J.std(0), torch.nan).reshape(*w.shape[:-1], 3)

    def reaches(self, potential: Potential, J: Tensor) -> Tensor:
        return SphericalActions().reaches(Equatorial(potential, J), J)

    def _surroundings(self, potential: Potential, w: Tensor) -> tuple[Surroundings, Potential, float, float]:
        """Return circular orbits and focal distances, the potential evaluated, and ln r between which orbits stay."""
        x, v = split(w)
        evaluated = potential.evaluated()
        sphere = Equatorial(evaluated, w)
        with torch.no_grad():
            s = log_radius(radius(x)).reshape(-1)
            phi = evaluated.phi(x).reshape(-1)
            kinetic = (v**2).sum(-1).reshape(-1) / 2
            finite = torch.isfinite(s) & torch.isfinite(kinetic)
            if not bool(finite.any()):
                raise ValueError("no star has finite coordinates: there is nothing to compute actions of")
            s, phi, kinetic = (part[finite].to("cpu", torch.float64) for part in (s, phi, kinetic))
        extent = Extent(sphere, s)
        if not isinstance(self.delta, FocalTable):  # else it was when the table was made
            require_axisymmetric(potential, extent.profile, w)
        with torch.no_grad():
            energy, _ = cap_energy(kinetic + phi, phi, extent.escape_energy)
            s_first, s_last = extent.enclosing(torch.stack([energy.min(), energy.max()]))
            largest = float(extent.profile.s_of_phi(energy.max()))
            if not math.isfinite(s_first + s_last + largest):
                # a trial step of a fit may overflow the potential: there actions are NaN
                s_first, s_last, largest = float(s.min()), float(s.max()), float(s.max())
        profile = extent.tabulate(sphere, s_first - 1, s_last + 2, _DS)
        if profile.vc2.device != w.device or profile.vc2.dtype != w.dtype:
            profile = profile.through(lambda part: part.to(w))
        focal = self._focal(potential, s_first, s_last, w)
        return Surroundings(DirectField(potential), focal, profile), evaluated, s_first - _INNER, largest + _OUTER


class TabulatedFudge(ActionFinder):
    """`StaeckelFudge` in one potential, with its tables: what `StaeckelFudge.tabulated` returns.

    Parameters
    ----------
    tables
        The potential between the orbits of all stars that are asked for.
    exact
        The finder that computes angles and frequencies.
    """

    def __init__(self, tables: Surroundings, exact: StaeckelFudge) -> None:
        self.tables, self.exact = tables, exact

    def capped_actions(self, potential: Potential, w: Tensor) -> CappedActions:
        """Return `StaeckelFudge.capped_actions`; the potential is that of the tables, whatever is given."""
        return blockwise_actions(self.tables, w)

    def actions_angles(self, potential: Potential, w: Tensor) -> ActionAngles:
        return self.exact.actions_angles(potential, w)

    def through(self, change: Callable[[Tensor], Tensor]) -> TabulatedFudge:
        """Return the same with every table passed through ``change``."""
        return TabulatedFudge(self.tables.through(change), self.exact)


def _exact(around: Surroundings, w: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return J, theta, Omega and the excess energy of stars ``w (n, 6)``."""
    star, separated, guide, excess = around.motion(w)
    points = turning_points(separated.detached(), guide, _EXACT)
    torus = Torus.of(separated, points, star.Lz)
    psi, chi = torus.phases(star.x, star.y, star.p_u >= 0, star.p_beta >= 0)
    J = torch.stack([torus.J_r.clamp(min=0), star.Lz, torus.J_z.clamp(min=0)], -1)
    theta, Omega = torus.angles(psi, chi, star.phi), torus.frequencies()
    through = points.inner <= -separated.D * (1 + AT_DISC)
    if bool(through.any()):
        J_r, J_z = (action(separated, points, _N_THROUGH) for action in (radial_action, vertical_action))
        J = torch.where(through[:, None], torch.stack([J_r, star.Lz, J_z], -1), J)
        theta, Omega = (torch.where(through[:, None], torch.nan, part) for part in (theta, Omega))
    return J, theta, Omega, excess


def _newton(around: Surroundings, w: Tensor, J: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
    """Return w after one step towards J and theta, unchanged where an angle does not exist, and by how much w missed.

    The miss is that of J over the sum of abs(J), or of the angles where they exist, before the step.
    """
    with torch.enable_grad():
        at = w.detach().requires_grad_()
        found_J, found_theta, *_ = _exact(around, at)
        columns = [*found_J.unbind(-1), *found_theta.unbind(-1)]
        rows = [torch.autograd.grad(column.sum(), at, retain_graph=True)[0] for column in columns]
    jacobian = torch.stack(rows, -2).detach()
    turn = torch.remainder(theta - found_theta + math.pi, 2 * math.pi) - math.pi
    miss = torch.cat([J - found_J, turn], -1)
    # in units of each star's own size, speed and actions
    size = torch.cat([part.norm(dim=-1, keepdim=True).expand(-1, 3) for part in w.detach().split(3, -1)], -1)
    unit = torch.cat([found_J.detach().abs().sum(-1, keepdim=True).expand(-1, 3), torch.ones_like(turn)], -1)
    scaled = jacobian * size[:, None, :] / unit[:, :, None]
    usable = torch.isfinite(scaled).all(-1).all(-1) & (torch.linalg.cond(scaled.nan_to_num(0.0)) < _WORST)
    scaled = torch.where(usable[:, None, None], scaled, torch.eye(6, dtype=w.dtype, device=w.device))
    step = size * torch.linalg.solve(scaled, miss / unit)
    relative = (miss / unit).detach().abs()
    missed = torch.where(usable, relative.amax(-1), relative[:, :3].amax(-1))
    return torch.where(usable[:, None], w.detach() + step, w.detach()), missed
