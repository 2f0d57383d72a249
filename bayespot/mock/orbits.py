"""Densities of orbits with a known form, to draw mock populations of any symmetry from."""

from __future__ import annotations

import abc
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bayespot.mock.circular import R_RANGE, CircularOrbit, CircularOrbits
from bayespot.potential.analytic import describe, from_description, is_described
from bayespot.potential.base import Potential
from bayespot.units import Declared, takes, takes_tensors

Array = NDArray[np.float64]

#: Gauss-Legendre points, in h and along both sides of the simplex, of the double power law's normalisation.
_N_SIZE, _N_SIDE = 120, 24


class OrbitPopulation(Declared, abc.ABC):
    r"""A density of orbits f(J), normalised to one star, of which independent orbits can be drawn."""

    @takes_tensors(J="action")
    @abc.abstractmethod
    def log_prob(self, J: Tensor) -> Tensor:
        """Return ln f(J) in (kpc km/s)^-3 for J ``(*batch, 3)`` = (J_r, J_phi, J_z) in kpc km/s."""

    @abc.abstractmethod
    def sample(self, n: int, seed: int) -> Tensor:
        """Return n independent orbits J ``(n, 3)``."""

    @abc.abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return the name and the parameters, for a catalogue's metadata."""


class DoublePowerLawOrbits(OrbitPopulation):
    r"""Halo or bulge whose f(J) is a double power law.

    .. math::
        f(J) \propto \left[1 + \left(\frac{J_0}{h}\right)^\eta\right]^{\Gamma/\eta}
        \left[1 + \left(\frac{g}{J_0}\right)^\eta\right]^{-B/\eta}
        \left[1 + \chi \tanh\frac{J_\phi}{J_{\phi 0}}\right]

    with :math:`h = h_r J_r + h_z J_z + (3 - h_r - h_z) |J_\phi|` at small and g likewise at large actions. In a sphere
    a population with h_z = h_phi is one of (J_r, L).

    Parameters
    ----------
    J_0
        Action of the break in kpc km/s.
    inner, outer
        Gamma < 3 and B > 3.
    steepness
        eta of the transition.
    inner_weights, outer_weights
        (h_r, h_z) and (g_r, g_z), positive with a sum below 3: the larger, the fewer orbits with such actions.
    rotation, J_phi_0
        chi in [-1, 1], and the action in kpc km/s beyond which it is felt.

    Raises
    ------
    ValueError
        If a parameter is out of its range.

    References
    ----------
    Posti, Binney, Nipoti & Ciotti (2015), MNRAS 447, 3060; in the form of Vasiliev (2019), MNRAS 482, 1525, section 4.

    Examples
    --------
    >>> halo = DoublePowerLawOrbits(J_0=1500.0, inner=1.2, outer=5.0, outer_weights=(1.4, 0.8))
    >>> halo.sample(1000, seed=1).shape
    torch.Size([1000, 3])
    """

    @takes(
        J_0="action", inner="number", outer="number", steepness="number", inner_weights="number",
        outer_weights="number", rotation="number", J_phi_0="action",
    )  # fmt: skip
    def __init__(
        self,
        J_0: float,
        inner: float,
        outer: float,
        steepness: float = 1.0,
        inner_weights: Sequence[float] = (1.0, 1.0),
        outer_weights: Sequence[float] = (1.0, 1.0),
        rotation: float = 0.0,
        J_phi_0: float = 1.0,
    ) -> None:
        for name, value in (("J_0", J_0), ("steepness", steepness), ("J_phi_0", J_phi_0)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive, got {value}")
        if not inner < 3 < outer < math.inf:
            raise ValueError(f"the slopes must be inner < 3 < outer for a finite number of stars, got {inner}, {outer}")
        if not abs(rotation) <= 1:
            raise ValueError(f"rotation must be in [-1, 1], got {rotation}")
        self.J_0, self.inner, self.outer, self.steepness = float(J_0), float(inner), float(outer), float(steepness)
        self.rotation, self.J_phi_0 = float(rotation), float(J_phi_0)
        self._h, self._g = (_weights(w, name) for w, name in ((inner_weights, "inner"), (outer_weights, "outer")))

    def describe(self) -> dict[str, Any]:
        names = ("J_0", "inner", "outer", "steepness", "rotation", "J_phi_0")
        weights = {"inner_weights": self._h[:2].tolist(), "outer_weights": self._g[:2].tolist()}
        return {"name": "DoublePowerLawOrbits"} | {name: getattr(self, name) for name in names} | weights

    @functools.cached_property
    def _ln_norm(self) -> float:
        """ln of the integral over action space of f without rotation."""
        from scipy.special import betaincinv, betaln

        # with g = h the size h follows a beta distribution of the second kind and the simplex is uniform; the mean of
        # the ratio to that is what is left
        a, b = (3 - self.inner) / self.steepness, (self.outer - 3) / self.steepness
        t, w = np.polynomial.legendre.leggauss(_N_SIZE)
        share = betaincinv(a, b, (1 + t) / 2)
        size = self.J_0 * (share / (1 - share)) ** (1 / self.steepness)
        s, v = np.polynomial.legendre.leggauss(_N_SIDE)
        s, v = (1 + s) / 2, v / 2
        first = np.broadcast_to(s[:, None], (_N_SIDE, _N_SIDE))
        second = (1 - s[:, None]) * s
        weight = (2 * (1 - s))[:, None] * v[:, None] * v
        simplex = np.stack([first, second, 1 - first - second], -1).reshape(-1, 3) / self._h
        ratio = self._ratio(size[:, None], size[:, None] * (simplex @ self._g))
        mean = (w / 2) @ ratio @ weight.ravel()
        ln_volume = -np.log(self._h).sum() + 3 * math.log(self.J_0) - math.log(self.steepness) + betaln(a, b)
        return float(ln_volume + math.log(mean))

    def _ratio(self, h: Array, g: Array) -> Array:
        """The outer factor of g over that of h."""
        eta = self.steepness
        return ((1 + (h / self.J_0) ** eta) / (1 + (g / self.J_0) ** eta)) ** (self.outer / eta)

    def log_prob(self, J: Tensor) -> Tensor:
        J_phi = J[..., 1]
        J = torch.stack([J[..., 0], J[..., 2], J_phi.abs()], -1)
        h, g = ((J @ torch.as_tensor(weights).to(J)) / self.J_0 for weights in (self._h, self._g))
        eta = self.steepness
        ln_f = (self.inner / eta) * (1 + h**-eta).log() - (self.outer / eta) * (1 + g**eta).log() - self._ln_norm
        return ln_f + torch.log1p(self.rotation * torch.tanh(J_phi / self.J_phi_0)) if self.rotation else ln_f

    def sample(self, n: int, seed: int) -> Tensor:
        rng = np.random.default_rng(seed)
        eta, found, missing = self.steepness, [], n
        bound = max(1.0, float((self._h / self._g).max())) ** self.outer
        while missing > 0:
            m = int(1.2 * missing) + 100
            share = rng.beta((3 - self.inner) / eta, (self.outer - 3) / eta, m)
            size = self.J_0 * (share / (1 - share)) ** (1 / eta)
            J = size[:, None] * rng.dirichlet(np.ones(3), m) / self._h
            kept = J[rng.random(m) * bound < self._ratio(size, J @ self._g)]
            found.append(kept)
            missing -= len(kept)
        J_r, J_z, J_phi = np.concatenate(found)[:n].T
        prograde = rng.random(n) < (1 + self.rotation * np.tanh(J_phi / self.J_phi_0)) / 2
        return torch.as_tensor(np.stack([J_r, np.where(prograde, J_phi, -J_phi), J_z], -1))


class QuasiIsothermalOrbits(OrbitPopulation):
    r"""Disc whose stars at one guiding radius have nearly Gaussian velocities.

    .. math::
        f(J) \propto \frac{\Omega\, \nu\, \Sigma}{\kappa\, \sigma_r^2 \sigma_z^2}\,
        \left[1 + \tanh\frac{J_\phi}{J_{\phi 0}}\right]
        \exp\left(-\frac{\kappa J_r}{\sigma_r^2} - \frac{\nu J_z}{\sigma_z^2}\right)

    with Omega, kappa and nu those of the circular orbit of angular momentum J_phi, of radius R_c;
    :math:`\Sigma = e^{-R_c / R_d}` and :math:`\sigma_{r,z} = \sigma_{r0,z0}\, e^{(R_0 - R_c) / R_\sigma}`.

    Parameters
    ----------
    potential
        Axisymmetric (or spherical), its parameters numbers.
    r_d, r_sigma
        Scale lengths of the surface density and of the velocity dispersions in kpc.
    sigma_r, sigma_z
        Velocity dispersions in km/s at R_0.
    r_0
        R_0 in kpc.
    J_phi_0
        Action in kpc km/s below which orbits of both senses of rotation exist.

    Raises
    ------
    ValueError
        If a parameter is not positive, the potential has no symmetry about z, or its circular orbits are unstable.

    References
    ----------
    Binney (2010), MNRAS 401, 2318; Binney & McMillan (2011), MNRAS 413, 1889.
    """

    @takes(r_d="length", r_sigma="length", sigma_r="speed", sigma_z="speed", r_0="length", J_phi_0="action")
    def __init__(
        self,
        potential: Potential,
        r_d: float = 2.6,
        r_sigma: float = 8.0,
        sigma_r: float = 35.0,
        sigma_z: float = 20.0,
        r_0: float = 8.0,
        J_phi_0: float = 10.0,
    ) -> None:
        values = {"r_d": r_d, "r_sigma": r_sigma, "sigma_r": sigma_r, "sigma_z": sigma_z, "r_0": r_0}
        for name, value in (values | {"J_phi_0": J_phi_0}).items():
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive, got {value}")
        self.circular, self.potential = CircularOrbits(potential), potential
        self.r_d, self.r_sigma, self.r_0 = float(r_d), float(r_sigma), float(r_0)
        self.sigma_r, self.sigma_z, self.J_phi_0 = float(sigma_r), float(sigma_z), float(J_phi_0)

    def describe(self) -> dict[str, Any]:
        names = ("r_d", "r_sigma", "sigma_r", "sigma_z", "r_0", "J_phi_0")
        of = {"potential": describe(self.potential) if is_described(self.potential) else None}
        return {"name": "QuasiIsothermalOrbits"} | {name: getattr(self, name) for name in names} | of

    def _ln_scales(self, at: CircularOrbit) -> tuple[Array, Array]:
        """ln of the mean J_r and J_z of stars about circular orbits."""
        growth = np.clip(2 * (self.r_0 - at.R) / self.r_sigma, -500, None)
        return growth + np.log(self.sigma_r**2 / at.kappa), growth + np.log(self.sigma_z**2 / at.nu)

    def log_prob(self, J: Tensor) -> Tensor:
        J_r, J_z, J_phi = J[..., 0], J[..., 2], J[..., 1].detach().numpy()
        at = self.circular.at(self.circular.radius(np.abs(J_phi)))
        ln_r, ln_z = self._ln_scales(at)
        # dJ_phi = R kappa^2 / (2 Omega) dR makes the guiding radii of both senses Gamma(2) distributed
        ln_f = np.log(2 * at.omega / at.kappa**2) - at.R / self.r_d - 2 * math.log(self.r_d)
        # (1 + tanh x) / 2 = 1 / (1 + exp(-2 x))
        ln_f = ln_f - np.logaddexp(0, -2 * J_phi / self.J_phi_0)
        per_r, per_z = (torch.as_tensor(np.exp(-ln_scale)) for ln_scale in (ln_r, ln_z))
        # differentiable by J_r and J_z, which the potential moves
        return torch.as_tensor(ln_f - ln_r - ln_z) - J_r * per_r - J_z * per_z

    def sample(self, n: int, seed: int) -> Tensor:
        rng = np.random.default_rng(seed)
        R = np.clip(rng.gamma(2.0, self.r_d, n), 2 * R_RANGE[0], R_RANGE[1] / 2)
        at = self.circular.at(R)
        J_phi = at.L
        prograde = rng.random(n) < (1 + np.tanh(J_phi / self.J_phi_0)) / 2
        J_r, J_z = (np.exp(ln_scale) * rng.exponential(size=n) for ln_scale in self._ln_scales(at))
        return torch.as_tensor(np.stack([J_r, np.where(prograde, J_phi, -J_phi), J_z], -1))


class MixedOrbits(OrbitPopulation):
    """Several populations together.

    Parameters
    ----------
    populations, fractions
        And the fractions of the stars in each, which sum to one.

    Raises
    ------
    ValueError
        If there are none, or the fractions do not fit.
    """

    @takes(fractions="number")
    def __init__(self, populations: Sequence[OrbitPopulation], fractions: Sequence[float]) -> None:
        if not populations or len(populations) != len(fractions):
            raise ValueError(f"give a fraction for each population; got {len(populations)} and {len(fractions)}")
        if min(fractions) <= 0 or abs(sum(fractions) - 1) > 1e-9:
            raise ValueError(f"fractions must be positive and sum to one, got {list(fractions)}")
        self.populations, self.fractions = tuple(populations), tuple(float(f) for f in fractions)

    def describe(self) -> dict[str, Any]:
        parts = [population.describe() for population in self.populations]
        return {"name": "MixedOrbits", "populations": parts, "fractions": list(self.fractions)}

    def log_prob(self, J: Tensor) -> Tensor:
        parts = zip(self.populations, self.fractions, strict=True)
        return torch.stack([population.log_prob(J) + math.log(share) for population, share in parts]).logsumexp(0)

    def sample(self, n: int, seed: int) -> Tensor:
        rng = np.random.default_rng(seed)
        counts = rng.multinomial(n, self.fractions)
        drawn = [p.sample(int(m), int(rng.integers(2**31))) for p, m in zip(self.populations, counts, strict=True)]
        return torch.cat(drawn)[torch.as_tensor(rng.permutation(n))]


def orbits_from_description(description: Mapping[str, Any]) -> OrbitPopulation:
    """Return the population that `OrbitPopulation.describe` described.

    Raises
    ------
    ValueError
        If the name is unknown, or the frequencies are those of a potential that has no description.
    """
    values = dict(description)
    name = values.pop("name", None)
    if name == "MixedOrbits":
        return MixedOrbits([orbits_from_description(d) for d in values["populations"]], values["fractions"])
    if name == "QuasiIsothermalOrbits":
        of = values.pop("potential", None)
        if of is None:
            raise ValueError("the potential whose frequencies are in f(J) is not described: simulate the stars anew")
        return QuasiIsothermalOrbits(from_description(of), **values)
    if name == "DoublePowerLawOrbits":
        return DoublePowerLawOrbits(**values)
    raise ValueError(f"unknown population of orbits {name!r}")


def _weights(given: Sequence[float], name: str) -> Array:
    """The weights of J_r, J_z and |J_phi|."""
    if len(given) != 2 or min(given) <= 0 or sum(given) >= 3:
        raise ValueError(f"{name}_weights are those of J_r and J_z, positive and with a sum below 3; got {list(given)}")
    return np.array([*given, 3 - sum(given)], dtype=float)
