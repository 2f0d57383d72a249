"""Closed-form potentials: isochrone, Plummer, Hernquist, Jaffe, NFW, power laws, logarithmic, and sums."""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from bayespot.potential.base import Potential, SumPotential, Symmetry, radius
from bayespot.potential.parameters import Value, is_number_one, set_checked
from bayespot.units import G, takes, takes_tensors


class AnalyticPotential(Potential, abc.ABC):
    """A potential in closed form with a few named parameters, positive unless its docstring says otherwise.

    A parameter is a number, an astropy Quantity, a ``torch.nn.Parameter`` or a distribution of numbers in the internal
    units (then a Pyro sample site).

    Raises
    ------
    ValueError
        On construction, if a number is outside the parameter's range.
    """

    names: ClassVar[tuple[str, ...]]
    elementwise = True

    def _set(self, name: str, value: Value, low: float = 0.0, high: float = math.inf, closed: str = "") -> None:
        """Check ``low < value < high`` (``closed`` names the ends that count as inside) and store it."""
        set_checked(self, name, value, low, high, closed)


class AnalyticSphere(AnalyticPotential, abc.ABC):
    """A spherical potential whose density and enclosed mass are known in closed form as well.

    `density_r` and `mass_r` are what the inherited ``density`` and ``enclosed_mass`` (automatic
    differentiation) must reproduce; they keep full relative accuracy at every radius.
    """

    symmetry: Symmetry = "spherical"

    @takes_tensors(r="length")
    @abc.abstractmethod
    def density_r(self, r: Tensor) -> Tensor:
        """Return the density at radius ``r > 0`` (kpc) in Msun/kpc^3."""

    @takes_tensors(r="length")
    @abc.abstractmethod
    def mass_r(self, r: Tensor) -> Tensor:
        """Return the mass inside radius ``r > 0`` (kpc) in Msun."""

    @abc.abstractmethod
    def total_mass(self) -> Tensor:
        """Return the total mass in Msun; infinite where the mass diverges."""


class _FiniteSphere(AnalyticSphere, abc.ABC):
    """A sphere of total mass ``m_tot`` (Msun) and scale radius ``r_s`` (kpc)."""

    names = ("m_tot", "r_s")

    @takes(m_tot="mass", r_s="length")
    def __init__(self, m_tot: Value, r_s: Value) -> None:
        super().__init__()
        self._set("m_tot", m_tot)
        self._set("r_s", r_s)

    def total_mass(self) -> Tensor:
        return self.m_tot


class Isochrone(_FiniteSphere):
    r"""Isochrone sphere of Henon, :math:`\Phi = -G m_{tot} / (b + \sqrt{b^2 + r^2})`, b = r_s.

    Parameters
    ----------
    m_tot, r_s
        Total mass in Msun and scale radius b in kpc.

    References
    ----------
    Binney & Tremaine (2008), Galactic Dynamics, equations 2.47 to 2.49.

    Examples
    --------
    >>> import torch
    >>> potential = Isochrone(m_tot=1e11, r_s=3.0)
    >>> round(potential.circular_speed(torch.tensor(8.0, dtype=torch.float64)).item(), 3)  # km/s
    155.483
    """

    def phi(self, x: Tensor) -> Tensor:
        b = self.r_s
        return -G * self.m_tot / (b + (b**2 + _r2(x)).sqrt())

    def density_r(self, r: Tensor) -> Tensor:
        m, b = self.m_tot, self.r_s
        a = (b**2 + r**2).sqrt()
        # the textbook's numerator 3 (b + a) a^2 - r^2 (b + 3 a), without its cancellation
        return m * b * (3 * b * (b + a) + 2 * r**2) / (4 * math.pi * ((b + a) * a) ** 3)

    def mass_r(self, r: Tensor) -> Tensor:
        m, b = self.m_tot, self.r_s
        a = (b**2 + r**2).sqrt()
        return m * r**3 / ((b + a) ** 2 * a)


class Plummer(_FiniteSphere):
    r"""Plummer sphere, :math:`\Phi = -G m_{tot} / \sqrt{r_s^2 + r^2}`.

    Parameters
    ----------
    m_tot, r_s
        Total mass in Msun and scale radius in kpc.

    References
    ----------
    Plummer (1911), MNRAS 71, 460; Binney & Tremaine (2008), equations 2.44.
    """

    def phi(self, x: Tensor) -> Tensor:
        return -G * self.m_tot * (self.r_s**2 + _r2(x)).rsqrt()

    def density_r(self, r: Tensor) -> Tensor:
        m, b = self.m_tot, self.r_s
        return 3 * m / (4 * math.pi * b**3) * (1 + (r / b) ** 2) ** -2.5

    def mass_r(self, r: Tensor) -> Tensor:
        return self.m_tot * (1 + (self.r_s / r) ** 2) ** -1.5


class Hernquist(_FiniteSphere):
    r"""Hernquist sphere, :math:`\Phi = -G m_{tot} / (r + r_s)`.

    The density is :math:`\propto r^{-1} (r + r_s)^{-3}`.

    Parameters
    ----------
    m_tot, r_s
        Total mass in Msun and scale radius in kpc.

    References
    ----------
    Hernquist (1990), ApJ 356, 359, equations 2, 3 and 5.
    """

    def phi(self, x: Tensor) -> Tensor:
        return -G * self.m_tot / (radius(x) + self.r_s)

    def density_r(self, r: Tensor) -> Tensor:
        m, a = self.m_tot, self.r_s
        return m * a / (2 * math.pi * r * (r + a) ** 3)

    def mass_r(self, r: Tensor) -> Tensor:
        return self.m_tot * (r / (r + self.r_s)) ** 2


class Jaffe(_FiniteSphere):
    r"""Jaffe sphere, :math:`\Phi = -(G m_{tot} / r_s) \ln(1 + r_s/r)`, infinitely deep at the centre.

    The density is :math:`\propto r^{-2} (r + r_s)^{-2}`.

    Parameters
    ----------
    m_tot, r_s
        Total mass in Msun and scale radius in kpc.

    References
    ----------
    Jaffe (1983), MNRAS 202, 995; Binney & Tremaine (2008), equations 2.64 to 2.67.
    """

    def phi(self, x: Tensor) -> Tensor:
        m, a = self.m_tot, self.r_s
        return -G * m / a * torch.log1p(a / radius(x))

    def density_r(self, r: Tensor) -> Tensor:
        m, a = self.m_tot, self.r_s
        return m * a / (4 * math.pi * (r * (r + a)) ** 2)

    def mass_r(self, r: Tensor) -> Tensor:
        return self.m_tot * r / (r + self.r_s)


class NFW(AnalyticSphere):
    r"""Navarro-Frenk-White halo, :math:`\Phi = -G m_s \ln(1 + r/r_s) / r`.

    The density is :math:`m_s / [4\pi r (r + r_s)^2]`, the mass diverges as ln r.

    Parameters
    ----------
    m_s, r_s
        Scale mass in Msun and scale radius in kpc: :math:`M(<r) = m_s [\ln(1 + x) - x/(1 + x)]`, x = r/r_s.

    References
    ----------
    Navarro, Frenk & White (1996), ApJ 462, 563; Binney & Tremaine (2008), equations 2.64 to 2.67.
    """

    names = ("m_s", "r_s")

    @takes(m_s="mass", r_s="length")
    def __init__(self, m_s: Value, r_s: Value) -> None:
        super().__init__()
        self._set("m_s", m_s)
        self._set("r_s", r_s)

    def phi(self, x: Tensor) -> Tensor:
        m, a = self.m_s, self.r_s
        return -G * m / a * _log1p_over(radius(x) / a)

    def density_r(self, r: Tensor) -> Tensor:
        m, a = self.m_s, self.r_s
        return m / (4 * math.pi * r * (r + a) ** 2)

    def mass_r(self, r: Tensor) -> Tensor:
        u = r / self.r_s
        y = (u / (2 + u)).clamp(max=1 / 3)
        # ln(1 + u) - u/(1 + u) = 2 (artanh y - y) + u^2 / ((1 + u) (2 + u)), y = u / (2 + u): all positive
        small = 2 * y**3 * _odd_series(y**2, 1) + u**2 / ((1 + u) * (2 + u))
        large = u.clamp(min=1)
        return self.m_s * torch.where(u < 1, small, torch.log1p(large) - large / (1 + large))

    def total_mass(self) -> Tensor:
        return torch.full_like(torch.as_tensor(self.m_s), math.inf)


class PowerLaw(AnalyticSphere):
    r"""Scale-free sphere: density :math:`\propto r^{-\gamma}`, :math:`M(<r) = m_0 (r/r_0)^{3-\gamma}`.

    .. math:: \Phi = \frac{G m_0}{r_0} \frac{(r/r_0)^{2-\gamma}}{2 - \gamma}, \qquad
              \Phi = \frac{G m_0}{r_0} \ln(r/r_0) \text{ for } \gamma = 2.

    Gauge: :math:`\Phi(\infty) = 0` for gamma > 2, :math:`\Phi(0) = 0` for gamma < 2, and
    :math:`\Phi(r_0) = 0` for gamma = 2 (to within 1e-6).

    Parameters
    ----------
    m_0, r_0
        Mass in Msun inside the reference radius in kpc.
    gamma
        Negative logarithmic slope of the density, 0 <= gamma < 3.
    """

    names = ("m_0", "r_0", "gamma")

    @takes(m_0="mass", r_0="length", gamma="number")
    def __init__(self, m_0: Value, r_0: Value, gamma: Value) -> None:
        super().__init__()
        self._set("m_0", m_0)
        self._set("r_0", r_0)
        self._set("gamma", gamma, 0.0, 3.0, closed="[")

    def phi(self, x: Tensor) -> Tensor:
        r_0 = self.r_0
        # ln and exp, since torch's pow loses second derivatives at the exponents 0 and 1
        log, q = (radius(x) / r_0).clamp(min=1e-300).log(), 2 - self.gamma
        isothermal = q.abs() < 1e-6
        safe = torch.where(isothermal, torch.ones_like(q), q)
        # two terms of the series in q, so that the force's derivative with respect to gamma is right at 2
        shape = torch.where(isothermal, log + q / 2 * log**2, torch.exp(safe * log) / safe)
        return G * self.m_0 / r_0 * shape

    def density_r(self, r: Tensor) -> Tensor:
        m, r_0, gamma = self.m_0, self.r_0, self.gamma
        return m * (3 - gamma) / (4 * math.pi * r_0**3) * (r / r_0) ** -gamma

    def mass_r(self, r: Tensor) -> Tensor:
        return self.m_0 * (r / self.r_0) ** (3 - self.gamma)

    def total_mass(self) -> Tensor:
        return torch.full_like(torch.as_tensor(self.m_0), math.inf)


class CoredPowerLaw(AnalyticSphere):
    r"""Sphere with a core and a power-law envelope: :math:`M(<r) = m_0 x^3 (1+x^2)^{-\gamma/2}`, x = r/r_c.

    .. math::
        \Phi = \frac{G m_0}{r_c} \frac{(1 + x^2)^{(2-\gamma)/2}}{2 - \gamma} + \mathrm{const}, \qquad
        \rho = \frac{m_0}{4\pi r_c^3} \frac{3 + (3 - \gamma) x^2}{(1 + x^2)^{1 + \gamma/2}}

    The spherical case of Evans' power-law models. The density is constant inside the core and falls as
    :math:`r^{-\gamma}` outside, where the mass tends to that of ``PowerLaw(m_0, r_c, gamma)``; gamma = 3 is
    the Plummer sphere (density :math:`\propto r^{-5}`), gamma = 2 the logarithmic potential, gamma = 0 a
    homogeneous sphere.
    Gauge: :math:`\Phi(\infty) = 0` for gamma > 2, otherwise :math:`\Phi(0) = 0`.

    Parameters
    ----------
    m_0, r_c
        Mass scale in Msun and core radius in kpc.
    gamma
        Negative logarithmic slope of the outer density, 0 <= gamma <= 3.

    References
    ----------
    Evans (1994), MNRAS 267, 333.
    """

    names = ("m_0", "r_c", "gamma")

    @takes(m_0="mass", r_c="length", gamma="number")
    def __init__(self, m_0: Value, r_c: Value, gamma: Value) -> None:
        super().__init__()
        self._set("m_0", m_0)
        self._set("r_c", r_c)
        self._set("gamma", gamma, 0.0, 3.0, closed="[]")

    def phi(self, x: Tensor) -> Tensor:
        r_c, q = self.r_c, 2 - self.gamma
        log = torch.log1p(_r2(x) / r_c**2) / 2
        bound = q < -1e-6
        falling = torch.where(bound, q, -torch.ones_like(q))
        shape = torch.where(bound, torch.exp(falling * log) / falling, _powered(log, torch.where(bound, 0.0, q)))
        return G * self.m_0 / r_c * shape

    def density_r(self, r: Tensor) -> Tensor:
        m, r_c, gamma = self.m_0, self.r_c, self.gamma
        x2 = (r / r_c) ** 2
        return m / (4 * math.pi * r_c**3) * (3 + (3 - gamma) * x2) * (1 + x2) ** (-1 - gamma / 2)

    def mass_r(self, r: Tensor) -> Tensor:
        u, gamma = r / self.r_c, self.gamma
        return self.m_0 * u ** (3 - gamma) * (1 + u**-2) ** (-gamma / 2)

    def total_mass(self) -> Tensor:
        m_0 = torch.as_tensor(self.m_0)
        return torch.where(torch.as_tensor(self.gamma) >= 3, m_0, torch.full_like(m_0, math.inf))


class Logarithmic(AnalyticPotential):
    r"""Logarithmic potential, :math:`\Phi = \tfrac12 v_0^2 \ln[1 + (R^2 + z^2/q^2)/r_c^2]`; Phi(0) = 0.

    Spherical if q is the number 1, otherwise axisymmetric about z. The density is positive everywhere only
    for :math:`q^2 \ge 1/2`.

    Parameters
    ----------
    v_0, r_c
        Circular speed at large R in km/s and core radius in kpc.
    q
        Axis ratio of the equipotentials.

    References
    ----------
    Binney & Tremaine (2008), equations 2.71.
    """

    names = ("v_0", "r_c", "q")

    @takes(v_0="speed", r_c="length", q="number")
    def __init__(self, v_0: Value, r_c: Value, q: Value = 1.0) -> None:
        super().__init__()
        self._set("v_0", v_0)
        self._set("r_c", r_c)
        self._set("q", q)
        self.symmetry: Symmetry = "spherical" if is_number_one(q) else "axisymmetric"

    def phi(self, x: Tensor) -> Tensor:
        m2 = _r2(x) if self.symmetry == "spherical" else _r2(x[..., :2]) + (x[..., 2] / self.q) ** 2
        return 0.5 * self.v_0**2 * torch.log1p(m2 / self.r_c**2)


#: Every analytic potential by its lower-case name.
ANALYTIC: dict[str, type[AnalyticPotential]] = {
    cls.__name__.lower(): cls
    for cls in (Isochrone, Plummer, Hernquist, Jaffe, NFW, PowerLaw, CoredPowerLaw, Logarithmic)
}


def describe(potential: Potential) -> dict[str, Any]:
    """Return a plain dictionary from which `from_description` rebuilds an analytic potential or a sum.

    Raises
    ------
    ValueError
        If a member is not analytic, or a parameter is not a single number.

    Examples
    --------
    >>> describe(Plummer(m_tot=1e10, r_s=1.5))
    {'name': 'Plummer', 'm_tot': 10000000000.0, 'r_s': 1.5}
    """
    if isinstance(potential, SumPotential):
        return {"name": "SumPotential", "members": [describe(member) for member in potential.members]}
    if not isinstance(potential, AnalyticPotential):
        raise ValueError(
            f"{type(potential).__name__} has no description in closed form; use one of {', '.join(ANALYTIC)}"
        )
    out: dict[str, Any] = {"name": type(potential).__name__}
    for name in potential.names:
        value = None if name in potential._pyro_samples else torch.as_tensor(getattr(potential, name))
        if value is None or value.numel() != 1:
            raise ValueError(f"{name} of {out['name']} is not a single number, got {value}; fix it first")
        out[name] = float(value.detach())
    return out


def is_described(potential: Potential) -> bool:
    """Whether `describe` has a description of the potential: analytic ones, and sums of them."""
    if isinstance(potential, SumPotential):
        return all(is_described(member) for member in potential.members)
    return isinstance(potential, AnalyticPotential)


def from_description(description: Mapping[str, Any]) -> Potential:
    """Build the potential that `describe` described; names are not case-sensitive.

    Raises
    ------
    ValueError
        If the name or a parameter is unknown, or a parameter is missing or out of range.
    """
    values = dict(description)
    name = str(values.pop("name", ""))
    if name.lower() == "sumpotential":
        return SumPotential([from_description(member) for member in values.get("members", [])])
    cls = ANALYTIC.get(name.lower())
    if cls is None:
        raise ValueError(f"unknown potential {name!r}; choose one of {', '.join(ANALYTIC)}")
    try:
        return cls(**values)
    except TypeError as error:
        raise ValueError(
            f"{cls.__name__} takes the parameters {', '.join(cls.names)}; got {', '.join(values) or 'none'}"
        ) from error


def _r2(x: Tensor) -> Tensor:
    """Return |x|^2, smooth at the origin to every order."""
    return (x**2).sum(-1)


def _odd_series(y2: Tensor, first: int, n_terms: int = 20) -> Tensor:
    """Return sum over k >= first of y2^(k - first) / (2 k + 1), for y2 <= 1/9 to rounding."""
    total = torch.zeros_like(y2)
    for k in range(first + n_terms - 1, first - 1, -1):
        total = total * y2 + 1 / (2 * k + 1)
    return total


def _log1p_over(u: Tensor) -> Tensor:
    """Return ln(1 + u) / u with derivatives that do not cancel at small u.

    Below u = 1 by ln(1 + u) = 2 artanh(y), y = u / (2 + u) <= 1/3.
    """
    small, large = u.clamp(max=1), u.clamp(min=1)
    y2 = (small / (2 + small)) ** 2
    return torch.where(u < 1, 2 / (2 + small) * _odd_series(y2, 0), torch.log1p(large) / large)


def _powered(x: Tensor, q: Tensor) -> Tensor:
    """Return (exp(q x) - 1) / q for q >= 0, which is x where q = 0, to rounding."""
    y = q * x
    near = y.abs() < 1e-3
    safe = torch.where(near, torch.ones_like(y), y)
    series = 1 + y / 2 * (1 + y / 3 * (1 + y / 4 * (1 + y / 5 * (1 + y / 6))))
    return x * torch.where(near, series, torch.expm1(safe) / safe)
