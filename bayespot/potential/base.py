"""The one interface every gravitational potential implements, and all that follows from it."""

from __future__ import annotations

import abc
import functools
import math
import os
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from pyro.nn import PyroModule
from torch import Tensor

from bayespot.numerics import gauss_legendre
from bayespot.potential.axial import AxialFields
from bayespot.pyro_modules import AbstractPyroModule, freeze
from bayespot.units import Declared, G, takes, takes_tensors

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

Symmetry = Literal["spherical", "axisymmetric", "triaxial"]
#: Nodes of one hemisphere in the mean over a sphere about an axisymmetric potential.
_N_MERIDIAN = 48
#: How a potential is handed to another package, by the package's name; `exchange` enters them.
EXPORTS: dict[str, Callable[..., Any]] = {}


class Potential(AbstractPyroModule, AxialFields, Declared, abc.ABC):
    r"""A gravitational potential :math:`\Phi(x)`; subclasses implement `phi` and set `symmetry`.

    Acceleration, density, enclosed mass and circular speed follow by automatic differentiation and are
    themselves differentiable in positions and parameters (of numbers alone they are plain tensors). A parameter may be
    a number, a ``torch.nn.Parameter`` or a distribution: then it is a Pyro sample site named after the attribute.

    Wherever the methods take a tensor they take numbers, arrays and astropy Quantities as well, which become tensors in
    kpc (`bayespot.units`); this holds for subclasses' own methods of the same names. What they return are tensors.
    """

    symmetry: Symmetry = "triaxial"
    #: Whether `phi` is elementwise: with parameters of shape (n, 1) and positions (n, m, 3) it returns (n, m).
    elementwise: bool = False

    @takes_tensors(x="length")
    @abc.abstractmethod
    def phi(self, x: Tensor) -> Tensor:
        r"""Return :math:`\Phi(x)` in (km/s)^2.

        Parameters
        ----------
        x : Float[Tensor, "*batch 3"]
            Galactocentric position in kpc.

        Returns
        -------
        Float[Tensor, "*batch"]
        """

    @takes_tensors(s="number", mu="number")
    def phi_on_grid(self, s: Tensor, mu: Tensor) -> Tensor:
        r"""Return :math:`\Phi` in (km/s)^2 at all pairs of s = ln(r/kpc) ``(n,)`` and mu = z/r ``(m,)``, at y = 0.

        ``(n, m)``. Potentials that are sums of products of a function of r and one of latitude have a faster way than
        `phi` at every place.
        """
        r = s[:, None].exp()
        x, z = r * ((1 - mu) * (1 + mu)).sqrt(), r * mu
        return self.phi(torch.stack([x, torch.zeros_like(x), z], -1))

    @takes_tensors(s="number", mu="number")
    def phi_draws_on_grid(self, values: Mapping[str, Tensor], s: Tensor, mu: Tensor) -> Tensor:
        r"""Return `phi_on_grid` for many values of the potential's sites at once.

        Parameters
        ----------
        values : Float[Tensor, "n_draws *shape"] each
            Values of sites by name.
        s, mu : Float[Tensor, "n"], Float[Tensor, "m"]
            As for `phi_on_grid`.

        Returns
        -------
        Float[Tensor, "n_draws n m"]
            In (km/s)^2.
        """
        n = len(next(iter(values.values())))
        if self.elementwise and all(value.dim() == 1 for value in values.values()):
            fixed = freeze(self, {name: value[:, None, None] for name, value in values.items()})
            return fixed.phi_on_grid(s, mu).expand(n, -1, -1)
        draws = ({name: value[i] for name, value in values.items()} for i in range(n))
        return torch.stack([freeze(self, draw).phi_on_grid(s, mu) for draw in draws])

    def functionals_on_grid(
        self, values: Mapping[str, Tensor], W: Tensor, s: Tensor, mu: Tensor
    ) -> Callable[[Mapping[str, Tensor]], Tensor]:
        r"""Return what computes linear functionals of Phi on a grid for many values of the potential's sites at once.

        Potentials that are linear in what their sites change need not go by way of the grid.

        Parameters
        ----------
        values : Float[Tensor, "*shape"] each
            Values of the sites near which it will be asked, by name.
        W : Float[Tensor, "n m k"]
            Weights of the nodes in each functional.
        s, mu : Float[Tensor, "n"], Float[Tensor, "m"]
            As for `phi_on_grid`.

        Returns
        -------
        Callable
            Of values as for `phi_draws_on_grid`; the result is ``(n_draws, k)``.
        """
        return lambda draws: torch.tensordot(self.phi_draws_on_grid(draws, s, mu), W, dims=2)

    def register_factors(self) -> None:
        """Add named `pyro.factor` terms to the prior; called once per model evaluation. Default: none."""

    def initial_values(self) -> dict[str, Tensor]:
        """Return where a fit starts for the sites that shall not start at their prior's centre."""
        return {}

    @takes_tensors(x="length")
    def forward(self, x: Tensor) -> Tensor:
        """Evaluate `phi`; called as ``potential(x)`` every sample site is drawn once."""
        return self.phi(x)

    @takes_tensors(r="length")
    def phi_r(self, r: Tensor) -> Tensor:
        r"""Return :math:`\Phi` on the x axis, at ``x = (r, 0, 0)`` (for a sphere: the radial profile)."""
        zero = torch.zeros_like(r)
        return self.phi(torch.stack([r, zero, zero], -1))

    @takes_tensors(r="length")
    def phi_and_vc2(self, r: Tensor) -> tuple[Tensor, Tensor]:
        r"""Return :math:`\Phi` and :math:`v_c^2 = R\, d\Phi/dR` at ``(r, 0, 0)``, both in (km/s)^2.

        Derivatives with respect to the potential's parameters only: the radii count as constants.
        """
        keep = torch.is_grad_enabled()
        with torch.enable_grad():
            r = r.detach().requires_grad_()
            phi = self.phi_r(r)
            (slope,) = torch.autograd.grad(phi.sum(), r, create_graph=keep, retain_graph=True)
        # whatever graph leads to the radii is never followed
        return phi if keep else phi.detach(), slope * r.detach()

    def evaluated(self) -> Potential:
        """Return the potential with what no place changes, such as its tables, computed once with their graph.

        For several evaluations that end in one backward pass; default: the potential itself.
        """
        return self

    def radial(self) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        """Return `phi_and_vc2` as a function to be called several times: what no radius changes is computed once."""
        return self.phi_and_vc2

    @takes_tensors(r="length")
    def radial_draws(self, values: Mapping[str, Tensor], r: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        r"""Return :math:`\Phi`, :math:`d\Phi/dr` and :math:`dM/dr` of a sphere for many values of its sites at once.

        Parameters
        ----------
        values : Float[Tensor, "n_draws *shape"] each
            Values of all sites by name.
        r : Float[Tensor, "n"]
            Radii in kpc.

        Returns
        -------
        tuple of Float[Tensor, "n_draws n"], or None
            In (km/s)^2, (km/s)^2/kpc and Msun/kpc; None if they have to be computed one after the other.
        """
        if not self.elementwise or not values or any(value.dim() != 1 for value in values.values()):
            return None
        fixed = freeze(self, {name: value.detach()[:, None] for name, value in values.items()})
        return radial_derivatives(fixed, r.expand(len(next(iter(values.values()))), -1))

    @takes_tensors(x="length")
    def acceleration(self, x: Tensor) -> Tensor:
        r"""Return :math:`-\nabla\Phi` in (km/s)^2/kpc, shape ``(*batch, 3)``."""
        keep = self._needs_graph(x)
        with torch.enable_grad():
            x = _requiring_grad(x)
            (gradient,) = torch.autograd.grad(self.phi(x).sum(), x, create_graph=keep)
        return -gradient

    @takes_tensors(r="length")
    def radial_acceleration(self, r: Tensor) -> Tensor:
        r"""Return :math:`-d\Phi/dr` at ``(r, 0, 0)`` in (km/s)^2/kpc (negative where gravity attracts)."""
        zero = torch.zeros_like(r)
        keep = self._needs_graph(torch.stack([r, zero, zero], -1))
        with torch.enable_grad():
            r = _requiring_grad(r)
            (slope,) = torch.autograd.grad(self.phi_r(r).sum(), r, create_graph=keep)
        return -slope

    @takes_tensors(x="length")
    def density(self, x: Tensor) -> Tensor:
        r"""Return the mass density :math:`\nabla^2\Phi / 4\pi G` in Msun/kpc^3, shape ``(*batch,)``.

        The density of a sphere at the origin is its value at 1e-60 kpc.
        """
        keep = self._needs_graph(x)
        if self.symmetry == "spherical":
            with torch.enable_grad():
                # d/dr(r^2 dPhi/dr) / r^2 keeps its relative accuracy where the Laplacian's terms cancel
                r = _requiring_grad(radius(x).clamp(min=1e-60))
                mass = self.enclosed_mass(r)
                (slope,) = torch.autograd.grad(mass.sum(), r, create_graph=keep)
            return slope / (4 * math.pi * (r if keep else r.detach()) ** 2)
        with torch.enable_grad():
            x = _requiring_grad(x)
            gradient = self.acceleration(x)
            laplacian = torch.zeros_like(x[..., 0])
            for i in range(3):
                (row,) = torch.autograd.grad(gradient[..., i].sum(), x, create_graph=keep, retain_graph=True)
                laplacian = laplacian - row[..., i]
        return laplacian / (4 * math.pi * G)

    @takes_tensors(r="length")
    def enclosed_mass(self, r: Tensor) -> Tensor:
        r"""Return the mass inside radius ``r`` (Msun) by Gauss's law, averaged over the sphere if need be."""
        if self.symmetry == "spherical":
            return -(r**2) * self.radial_acceleration(r) / G
        rule = _meridian_rule() if self.symmetry == "axisymmetric" else _sphere_rule()
        nodes, weights = (part.to(r) for part in rule)
        # one axis of places, as parameters of shape (n, 1) want it
        places = (torch.atleast_1d(r)[..., None, None] * nodes).flatten(-3, -2)
        acceleration = self.acceleration(places).unflatten(-2, (-1, len(nodes)))
        inward = -(acceleration * nodes).sum(-1)
        return r**2 * (inward * weights).sum(-1).reshape(r.shape) / G

    @takes_tensors(r="length")
    def circular_speed(self, r: Tensor) -> Tensor:
        r"""Return :math:`v_c = (R\, d\Phi/dR)^{1/2}` at ``(R, 0, 0)`` in km/s (NaN if outward)."""
        return (-r * self.radial_acceleration(r)).sqrt()

    def _needs_graph(self, x: Tensor) -> bool:
        """Whether derivatives of what is computed at ``x`` may be asked for, by x or by a parameter of Phi."""
        if not torch.is_grad_enabled():
            return False
        return x.requires_grad or self.phi(x.detach().reshape(-1, 3)[:1]).requires_grad

    # -- other packages ----------------------------------------------------------------------------------

    @takes(ro="length", vo="speed")
    def to_galpy(self, ro: float = 8.0, vo: float = 220.0) -> Any:
        """Return a galpy potential with this one's Phi, forces, second derivatives and density.

        Spheres serve galpy's distribution functions (``eddingtondf``, ``osipkovmerrittdf``) and give masses and
        half-mass radii to infinity. It has no C code: galpy integrates its orbits in Python. For a sphere
        ``galpy.potential.interpSphericalPotential(rforce=exported, rgrid=...)`` tabulates it for galpy's C.

        Parameters
        ----------
        ro, vo
            What galpy's internal units stand for, in kpc and km/s.

        Raises
        ------
        ModuleNotFoundError
            If galpy is not installed.
        ValueError
            If a parameter has a prior instead of a value, or a unit is not positive.
        """
        return EXPORTS["galpy"](self, ro, vo)

    def to_gala(self) -> Any:
        """Return a gala potential (galactic units) with this one's Phi, gradient, Hessian and density.

        It has no compiled force.

        Raises
        ------
        ModuleNotFoundError
            If gala is not installed.
        ValueError
            If a parameter has a prior instead of a value.
        """
        return EXPORTS["gala"](self)

    @takes(radii="length")
    def to_agama(self, path: str | os.PathLike[str], radii: ArrayLike | None = None, overwrite: bool = False) -> None:
        """Write a spherical potential to a file that ``agama.Potential(path)`` reads.

        The numbers are in kpc and km/s: call ``agama.setUnits(length=1, velocity=1, mass=1)`` first.

        Parameters
        ----------
        path
            File, for instance ``potential.ini``.
        radii : (n,)
            Nodes in kpc; None: 161 from 1e-3 to 1e5. AGAMA continues the potential as a power law beyond them.
        overwrite
            Replace an existing file.

        Raises
        ------
        ValueError
            If the file exists, the potential is not spherical or has a prior, or the radii do not increase.
        """
        EXPORTS["agama"](self, path, radii, overwrite)

    def __add__(self, other: Potential) -> Potential:
        return SumPotential([self, other])


def least_symmetric(potentials: Iterable[Potential]) -> Symmetry:
    """Return the symmetry that a sum of these potentials has."""
    order: tuple[Symmetry, ...] = ("spherical", "axisymmetric", "triaxial")
    return max((one.symmetry for one in potentials), key=order.index)


class SumPotential(Potential):
    r"""Sum of potentials, :math:`\Phi = \sum_i \Phi_i`; also written ``potential_1 + potential_2``.

    Nested sums are flattened, the symmetry is that of the least symmetric member, and the sample sites of
    member i are named ``members.i.<parameter>``.

    Parameters
    ----------
    members
        At least one potential.

    Examples
    --------
    >>> from bayespot.potential import NFW, Hernquist
    >>> galaxy = Hernquist(m_tot=5e10, r_s=1.0) + NFW(m_s=7e11, r_s=20.0)
    >>> galaxy.symmetry, len(galaxy.members)
    ('spherical', 2)
    """

    def __init__(self, members: Iterable[Potential]) -> None:
        super().__init__()
        flat: list[Potential] = []
        for member in members:
            if not isinstance(member, Potential):
                raise ValueError(f"SumPotential adds potentials, got {member!r}")
            flat.extend(member.members if isinstance(member, SumPotential) else [member])
        if not flat:
            raise ValueError("SumPotential needs at least one member, got none")
        self.members: Any = PyroModule[torch.nn.ModuleList](flat)  # type: ignore[arg-type]
        self.symmetry = least_symmetric(flat)
        self.elementwise = all(member.elementwise for member in flat)

    def phi(self, x: Tensor) -> Tensor:
        total = self.members[0].phi(x)
        for member in self.members[1:]:
            total = total + member.phi(x)
        return total

    def phi_on_grid(self, s: Tensor, mu: Tensor) -> Tensor:
        total = self.members[0].phi_on_grid(s, mu)
        for member in self.members[1:]:
            total = total + member.phi_on_grid(s, mu)
        return total

    def evaluated(self) -> Potential:
        fixed = freeze(self, {})
        fixed.members = torch.nn.ModuleList(member.evaluated() for member in self.members)
        return fixed

    def phi_and_vc2(self, r: Tensor) -> tuple[Tensor, Tensor]:
        return self.radial()(r)

    def radial(self) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        members = [member.radial() for member in self.members]

        def at(r: Tensor) -> tuple[Tensor, Tensor]:
            phi, vc2 = zip(*(member(r) for member in members), strict=True)
            return sum(phi[1:], phi[0]), sum(vc2[1:], vc2[0])

        return at

    def density(self, x: Tensor) -> Tensor:
        """Return the mass density; members that know theirs better than the Laplacian does are asked for it."""
        if all(type(member).density is Potential.density for member in self.members):
            return super().density(x)
        total = self.members[0].density(x)
        for member in self.members[1:]:
            total = total + member.density(x)
        return total

    def register_factors(self) -> None:
        for member in self.members:
            member.register_factors()

    def initial_values(self) -> dict[str, Tensor]:
        """Return the members' starting values under their names in the sum."""
        return {
            f"members.{i}.{name}": value
            for i, member in enumerate(self.members)
            for name, value in member.initial_values().items()
        }


@takes_tensors(r="length")
def radial_derivatives(potential: Potential, r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""Return :math:`\Phi`, :math:`d\Phi/dr` and :math:`dM/dr` of a sphere at radii of any shape, without graphs.

    In (km/s)^2, (km/s)^2/kpc and Msun/kpc, from one evaluation of Phi.
    """
    with torch.enable_grad():
        r = r.detach().clone().requires_grad_()
        phi = potential.phi_r(r)
        (slope,) = torch.autograd.grad(phi.sum(), r, create_graph=True)
        (mass_slope,) = torch.autograd.grad((r**2 * slope).sum() / G, r)
    return phi.detach(), slope.detach(), mass_slope


@takes_tensors(x="length")
def radius(x: Tensor) -> Tensor:
    """Return |x| over the last axis; its gradient at the origin is zero rather than NaN."""
    return torch.linalg.vector_norm(x, dim=-1)


def _requiring_grad(x: Tensor) -> Tensor:
    return x if x.requires_grad else x.detach().requires_grad_()


@functools.cache
def _meridian_rule() -> tuple[Tensor, Tensor]:
    """Unit vectors (n, 3) from pole to pole, crowded towards the plane where discs are, and weights of sum one."""
    t, weight = gauss_legendre(_N_MERIDIAN)
    t = (1 + t) / 2
    mu, weight = t**3, weight / 4 * 3 * t**2
    mu, weight = torch.cat([-mu.flip(0), mu]), torch.cat([weight.flip(0), weight])
    return torch.stack([((1 - mu) * (1 + mu)).sqrt(), 0 * mu, mu], -1), weight


@functools.cache
def _sphere_rule() -> tuple[Tensor, Tensor]:
    """Lebedev rule of degree 47: unit vectors (n, 3) and weights that sum to one."""
    from scipy.integrate import lebedev_rule

    nodes, weights = lebedev_rule(47)
    return torch.as_tensor(nodes.T.copy()), torch.as_tensor(weights / weights.sum())
