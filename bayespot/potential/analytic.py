"""Analytic potentials in closed form, and sums of potentials."""

from __future__ import annotations

import abc
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from bayespot.numerics import powered
from bayespot.potential.base import Potential, Symmetry, radius
from bayespot.units import G

Parameter = float | Tensor | torch.distributions.Distribution


def _number(value: float | Tensor) -> float:
    return float(torch.as_tensor(value).detach())


class AnalyticPotential(Potential, abc.ABC):
    """A potential with named parameters, each a number, a trained tensor or a prior distribution."""

    symmetry: Symmetry = "spherical"

    def _store(self, positive: Mapping[str, Parameter], real: Mapping[str, Parameter] | None = None) -> None:
        for name, value in positive.items():
            if not isinstance(value, torch.distributions.Distribution) and not _number(value) > 0:
                raise ValueError(f"{type(self).__name__}: {name} must be positive, got {_number(value)}")
            self._set_parameter(name, value)
        for name, value in (real or {}).items():
            self._set_parameter(name, value)

    @classmethod
    def parameter_names(cls) -> list[str]:
        """Return the names of the parameters in the order of the constructor."""
        return [name for name in inspect.signature(cls.__init__).parameters if name != "self"]


class Isochrone(AnalyticPotential):
    r"""Isochrone sphere, :math:`\Phi = -G M / (b + \sqrt{b^2 + r^2})` (Binney & Tremaine 2008, eq. 2.47).

    Parameters
    ----------
    m_tot
        Total mass M in Msun.
    r_s
        Scale radius b in kpc.
    """

    def __init__(self, m_tot: Parameter, r_s: Parameter) -> None:
        super().__init__()
        self._store({"m_tot": m_tot, "r_s": r_s})

    def phi(self, x: Tensor) -> Tensor:
        b = self.r_s
        return -G * self.m_tot / (b + torch.sqrt(b**2 + (x**2).sum(-1)))


class Plummer(AnalyticPotential):
    r"""Plummer sphere, :math:`\Phi = -G M / \sqrt{r^2 + b^2}` (Binney & Tremaine 2008, eq. 2.44a).

    Parameters
    ----------
    m_tot, r_s
        Total mass in Msun and scale radius in kpc.
    """

    def __init__(self, m_tot: Parameter, r_s: Parameter) -> None:
        super().__init__()
        self._store({"m_tot": m_tot, "r_s": r_s})

    def phi(self, x: Tensor) -> Tensor:
        return -G * self.m_tot / torch.sqrt(self.r_s**2 + (x**2).sum(-1))


class Hernquist(AnalyticPotential):
    r"""Hernquist sphere, :math:`\Phi = -G M / (r + a)` (Hernquist 1990, eq. 5).

    Parameters
    ----------
    m_tot, r_s
        Total mass in Msun and scale radius in kpc.
    """

    def __init__(self, m_tot: Parameter, r_s: Parameter) -> None:
        super().__init__()
        self._store({"m_tot": m_tot, "r_s": r_s})

    def phi(self, x: Tensor) -> Tensor:
        return -G * self.m_tot / (radius(x) + self.r_s)


class Jaffe(AnalyticPotential):
    r"""Jaffe sphere, :math:`\Phi = -(G M / a) \ln(1 + a/r)` (Jaffe 1983; Binney & Tremaine 2008, eq. 2.68).

    Parameters
    ----------
    m_tot, r_s
        Total mass in Msun and scale radius in kpc.
    """

    def __init__(self, m_tot: Parameter, r_s: Parameter) -> None:
        super().__init__()
        self._store({"m_tot": m_tot, "r_s": r_s})

    def phi(self, x: Tensor) -> Tensor:
        a = self.r_s
        return -G * self.m_tot / a * torch.log1p(a / radius(x))


class NFW(AnalyticPotential):
    r"""NFW sphere, :math:`\Phi = -G m_s \ln(1 + r/r_s) / r` (Navarro, Frenk & White 1997).

    Parameters
    ----------
    m_s
        Scale mass in Msun, :math:`4\pi\rho_s r_s^3`; the total mass diverges.
    r_s
        Scale radius in kpc.
    """

    def __init__(self, m_s: Parameter, r_s: Parameter) -> None:
        super().__init__()
        self._store({"m_s": m_s, "r_s": r_s})

    def phi(self, x: Tensor) -> Tensor:
        u = radius(x) / self.r_s
        # at the very centre ln(1+u)/u would be 0/0; the series keeps value and slopes finite
        small = u < 1e-4
        safe = torch.where(small, 1.0, u)
        shape = torch.where(small, 1 - u / 2 + u**2 / 3 - u**3 / 4, torch.log1p(safe) / safe)
        return -G * self.m_s / self.r_s * shape


class PowerLaw(AnalyticPotential):
    r"""Power-law sphere, :math:`\rho \propto r^{-\gamma}`, :math:`M(r) = m_0 (r/r_0)^{3-\gamma}`.

    :math:`\Phi = \frac{G m_0}{r_0} \frac{(r/r_0)^{2-\gamma} - 1}{2-\gamma}`, so that
    :math:`\Phi(r_0) = 0` for every slope and gamma = 2 is the singular isothermal sphere.

    Parameters
    ----------
    m_0, r_0
        Mass (Msun) inside the radius r_0 (kpc).
    gamma
        Density slope, 0 <= gamma < 3.
    """

    def __init__(self, m_0: Parameter, r_0: Parameter, gamma: Parameter) -> None:
        super().__init__()
        if not isinstance(gamma, torch.distributions.Distribution) and not 0 <= _number(gamma) < 3:
            raise ValueError(f"PowerLaw: gamma must lie in [0, 3), got {_number(gamma)}")
        self._store({"m_0": m_0, "r_0": r_0}, {"gamma": gamma})

    def phi(self, x: Tensor) -> Tensor:
        return G * self.m_0 / self.r_0 * powered((radius(x) / self.r_0).log(), 2 - self.gamma)


class CoredPowerLaw(AnalyticPotential):
    r"""Cored power-law sphere of Evans (1994, MNRAS 267, 333),

    .. math:: \Phi = \frac{v_0^2}{\beta} [1 - (1 + r^2/r_c^2)^{-\beta/2}], \qquad
              \rho = \frac{v_0^2}{4\pi G} \frac{3 r_c^2 + (1-\beta) r^2}{r_c^4 (1 + r^2/r_c^2)^{2+\beta/2}}.

    A core of radius r_c, outside density slope -(2 + beta); beta = 0 is the logarithmic potential, beta = 1
    Plummer's. Here Phi(0) = 0.

    Parameters
    ----------
    v_0
        Velocity scale in km/s.
    r_c
        Core radius in kpc.
    beta
        Slope of the potential, -1 <= beta <= 1 (outside this range the density turns negative).
    """

    def __init__(self, v_0: Parameter, r_c: Parameter, beta: Parameter = 0.5) -> None:
        super().__init__()
        if not isinstance(beta, torch.distributions.Distribution) and not -1 <= _number(beta) <= 1:
            raise ValueError(f"CoredPowerLaw: beta must lie in [-1, 1], got {_number(beta)}")
        self._store({"v_0": v_0, "r_c": r_c}, {"beta": beta})

    def phi(self, x: Tensor) -> Tensor:
        ln_soft = torch.log1p((x**2).sum(-1) / self.r_c**2)
        return self.v_0**2 / 2 * powered(ln_soft, -self.beta / 2)


class Logarithmic(AnalyticPotential):
    r"""Logarithmic potential, :math:`\Phi = \frac{v_0^2}{2} \ln(r_c^2 + R^2 + z^2/q^2)` (lengths in kpc).

    Binney & Tremaine (2008), eq. 2.71a. The circular speed tends to v_0; the mass diverges.

    Parameters
    ----------
    v_0, r_c
        Asymptotic circular speed in km/s and core radius in kpc.
    q
        Axis ratio of the potential; 1 is spherical.
    """

    def __init__(self, v_0: Parameter, r_c: Parameter, q: float = 1.0) -> None:
        super().__init__()
        self._store({"v_0": v_0, "r_c": r_c, "q": q})
        self.symmetry = "spherical" if _number(q) == 1 else "axisymmetric"

    def phi(self, x: Tensor) -> Tensor:
        m2 = (x[..., :2] ** 2).sum(-1) + (x[..., 2] / self.q) ** 2
        return self.v_0**2 / 2 * torch.log(self.r_c**2 + m2)


class SumPotential(Potential):
    """Sum of potentials; its symmetry is that of the least symmetric member.

    Parameters
    ----------
    parts
        Two or more potentials; sums among them are flattened.
    """

    def __init__(self, parts: Iterable[Potential]) -> None:
        super().__init__()
        flat: list[Potential] = []
        for part in parts:
            flat.extend(part.parts if isinstance(part, SumPotential) else [part])
        if not flat:
            raise ValueError("a sum of potentials needs at least one member")
        self._names = [f"part_{i}" for i in range(len(flat))]
        for name, part in zip(self._names, flat, strict=True):
            setattr(self, name, part)
        order: list[Symmetry] = ["spherical", "axisymmetric", "triaxial"]
        self.symmetry = max((part.symmetry for part in flat), key=order.index)

    @property
    def parts(self) -> list[Potential]:
        """The members."""
        return [getattr(self, name) for name in self._names]

    def phi(self, x: Tensor) -> Tensor:
        total = torch.zeros_like(x[..., 0])
        for part in self.parts:
            total = total + part.phi(x)
        return total

    def register_factors(self) -> None:
        """Register the factors of every member."""
        for part in self.parts:
            part.register_factors()


#: Analytic potentials by lower-case name.
ANALYTIC: dict[str, type[AnalyticPotential]] = {
    cls.__name__.lower(): cls
    for cls in (Isochrone, Plummer, Hernquist, Jaffe, NFW, PowerLaw, CoredPowerLaw, Logarithmic)
}


def describe(potential: Potential) -> dict[str, Any]:
    """Return the name and parameters of an analytic potential as plain values (sums nest)."""
    if isinstance(potential, SumPotential):
        return {"name": "Sum", "parts": [describe(part) for part in potential.parts]}
    if not isinstance(potential, AnalyticPotential):
        raise ValueError(f"{type(potential).__name__} is not analytic: it has no short description")
    names = potential.parameter_names()
    return {"name": type(potential).__name__} | {name: _number(getattr(potential, name)) for name in names}


def from_description(description: Mapping[str, Any]) -> Potential:
    """Build the potential that `describe` described.

    Raises
    ------
    ValueError
        If the name is unknown or a parameter is missing.
    """
    values = dict(description)
    name = str(values.pop("name", ""))
    if name == "Sum":
        return SumPotential(from_description(part) for part in values["parts"])
    if name.lower() not in ANALYTIC:
        raise ValueError(f"unknown potential {name!r}; choose one of {', '.join(ANALYTIC)}")
    cls = ANALYTIC[name.lower()]
    try:
        return cls(**values)
    except TypeError as error:
        raise ValueError(f"{name} takes {', '.join(cls.parameter_names())}: {error}") from error
