"""Free-form potentials: the mass-slope network (spherical) and the direct form Phi = NN(x)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.nn import PyroSample
from torch import Tensor

from bayespot.numerics import attach_derivative, cubic_coefficients, cumulative_integral, gather_rows, horner
from bayespot.potential.base import Potential, Symmetry, radius
from bayespot.potential.profile import RadialProfile
from bayespot.pyro_modules import freeze
from bayespot.units import G, takes, takes_tensors

Prior = Literal["none", "last_layer", "all"]
_PRIORS = ("none", "last_layer", "all")


class MassSlopeNetwork(Potential):
    r"""Spherical potential whose network is the logarithmic slope of the enclosed mass.

    .. math::
        \gamma(s) = \frac{d\ln M}{d\ln r} = 3\,\mathrm{sigmoid}[w_0 - \mathrm{softplus}(s - s_o)
        + \sum_k w_k \tanh((s - c_k)/h)], \qquad
        \ln M(s) = \ln M(s_0) + \int_{s_0}^s \gamma\,ds

    with s = ln r. The density :math:`M\gamma/4\pi r^3` is positive by construction, the mass is pinned at
    the median radius ``s_0``, where the data are, and beyond the data :math:`\gamma \propto 1/r`: the
    potential becomes Keplerian and vanishes at infinity. Networks are evaluated on a grid in s
    (`RadialProfile`), never per star.

    Sites: ``ln_mass`` = ln M(s_0)/Msun, ``slope_weights`` (``n_features + 1``, the last is w_0) and, with
    ``prior="all"``, ``centres`` (c_k) and ``ln_width`` (ln h).

    Parameters
    ----------
    s_0
        ln of the pivot radius in kpc.
    s_inner, s_outer
        Range of ln r over which the features are spread.
    ln_mass
        Prior mean of ln M(s_0); its prior standard deviation is ``mass_sd``.
    n_features
        Number of tanh features.
    prior
        ``"last_layer"`` (Bayesian weights over fixed features), ``"all"`` (features too) or ``"none"``
        (flat: the posterior is the normalised likelihood).
    weight_sd, mass_sd
        Prior standard deviations of the weights and of ln M(s_0).
    """

    symmetry: Symmetry = "spherical"
    #: The tables of an `evaluated` copy.
    _computed: tuple[RadialProfile, Tensor] | None = None

    @takes(s_0="number", s_inner="number", s_outer="number", ln_mass="number", weight_sd="number", mass_sd="number")
    def __init__(
        self,
        s_0: float,
        s_inner: float,
        s_outer: float,
        ln_mass: float,
        n_features: int = 10,
        prior: Prior = "last_layer",
        weight_sd: float = 1.0,
        mass_sd: float = 1.5,
    ) -> None:
        super().__init__()
        if not s_inner < s_0 < s_outer:
            raise ValueError(f"need s_inner < s_0 < s_outer, got {s_inner}, {s_0} and {s_outer} (ln kpc)")
        if n_features < 2:
            raise ValueError(f"n_features must be at least 2, got {n_features}")
        _check_prior(prior)
        self.s_0, self.s_inner, self.s_outer, self.n_features = s_0, s_inner, s_outer, n_features
        self.ds = 0.05
        self._n_in = math.ceil((s_0 - s_inner + 6) / self.ds)
        n = self._n_in + math.ceil((s_outer + 12 - s_0) / self.ds)
        # one ghost node on either side for the fourth-order integral
        self.register_buffer("_s", s_0 + self.ds * torch.arange(-self._n_in - 1, n - self._n_in + 1).double())
        self._out_start = (s_inner + s_outer) / 2
        spacing = (s_outer - s_inner) / (n_features - 1)
        centres = s_inner + spacing * torch.arange(n_features, dtype=torch.float64)
        ln_width = torch.tensor(math.log(1.2 * spacing), dtype=torch.float64)
        weight_sds = torch.full((n_features + 1,), weight_sd, dtype=torch.float64)
        flat = prior == "none"
        self._start = {
            "ln_mass": torch.tensor(ln_mass, dtype=torch.float64),
            "slope_weights": torch.zeros_like(weight_sds),
        }
        self.ln_mass: Any = normal_site(torch.tensor(ln_mass, dtype=torch.float64), torch.tensor(mass_sd), flat)
        self.slope_weights: Any = normal_site(torch.zeros_like(weight_sds), weight_sds, flat)
        if prior == "all":
            self._start |= {"centres": centres, "ln_width": ln_width}
            self.centres: Any = normal_site(centres, torch.full_like(centres, 0.3 * spacing), False)
            self.ln_width: Any = normal_site(ln_width, torch.tensor(0.2), False)
        else:
            self.register_buffer("centres", centres)
            self.register_buffer("ln_width", ln_width)

    @classmethod
    @takes_tensors(w="phase_space")
    def for_stars(cls, w: Tensor, n_features: int = 10, prior: Prior = "last_layer") -> MassSlopeNetwork:
        """Place pivot, features and the prior of the mass by the stars' radii and speeds.

        Parameters
        ----------
        w : Float[Tensor, "n 6"]
            Phase-space positions in kpc and km/s.
        """
        s = radius(w[:, :3]).log()
        q = torch.quantile(s[torch.randperm(len(s), generator=_generator(0))[:1_000_000]], _QUANTILES.to(s))
        # the virial theorem says <v^2> = <G M(r)/r>; medians ignore the few stars that dominate the means
        v2 = (w[:, 3:] ** 2).sum(-1).median()
        s_0 = float(q[1])
        ln_mass = float(torch.log(v2 / G)) + s_0
        inner, outer = min(float(q[0]), s_0 - 1), max(float(q[2]), s_0 + 1)
        return cls(s_0, inner, outer, ln_mass, n_features, prior)

    def initial_values(self) -> dict[str, Tensor]:
        """Start at the prior's centre, also when the prior is flat."""
        return {name: value.clone() for name, value in self._start.items()}

    @takes(fraction="number")
    def shift_features(self, fraction: float) -> None:
        """Move fixed features by a fraction of their spacing; with a prior of their own they stay."""
        if "centres" in self._buffers:
            spacing = (self.s_outer - self.s_inner) / (self.n_features - 1)
            self.centres = self.centres + fraction * spacing

    @takes_tensors(s="number")
    def mass_slope(self, s: Tensor) -> Tensor:
        """Return gamma = d ln M / d ln r at s = ln(r/kpc)."""
        return _slope(s, self._out_start, self.slope_weights, self.centres, self.ln_width)

    def evaluated(self) -> Potential:
        fixed = freeze(self, {})
        fixed.__dict__["_computed"] = self._tables()
        return fixed

    def profile(self) -> RadialProfile:
        """Tabulate the potential with the current weights."""
        return self._tables()[0]

    def _tables(self) -> tuple[RadialProfile, Tensor]:
        """Return the profile and the cubics of ln M on the same grid."""
        if self._computed is not None:
            return self._computed
        phi, vc2, ln_m_cubics = self._nodes(self.mass_slope(self._s), self.ln_mass)
        return RadialProfile(self.first_node, self.ds, phi, vc2), ln_m_cubics

    def _nodes(self, gamma: Tensor, ln_mass: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return Phi and v_c^2 at the nodes and the cubics of ln M from gamma ``(*batch, n)``, ghost nodes included."""
        ln_m = cumulative_integral(gamma, self.ds)
        gamma, s = gamma[..., 1:-1], self._s[1:-1]
        ln_m = ln_m - ln_m[..., self._n_in, None] + ln_mass[..., None]
        vc2 = G * (ln_m - s).exp()
        slope = vc2 * (gamma - 1)
        step = self.ds / 2 * (vc2[..., :-1] + vc2[..., 1:]) + self.ds**2 / 12 * (slope[..., :-1] - slope[..., 1:])
        rise = torch.cat([torch.zeros_like(step[..., :1]), step.cumsum(-1)], -1)
        phi = rise - rise[..., -1:] - vc2[..., -1:] / (1 - gamma[..., -1:])
        return phi, vc2, cubic_coefficients(ln_m, gamma * self.ds)

    @property
    def first_node(self) -> float:
        """ln(r/kpc) of the profile's first node."""
        return float(self._s[1])

    @takes_tensors(ln_mass="number", slope_weights="number")
    def draws_at_nodes(self, ln_mass: Tensor, slope_weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        r"""Return :math:`\Phi`, :math:`v_c^2` and :math:`4\pi G\rho r^2` at the profile's nodes for many draws.

        Parameters
        ----------
        ln_mass, slope_weights : Float[Tensor, "n_draws"], Float[Tensor, "n_draws n_features+1"]
            Values of the sites.

        Returns
        -------
        tuple of Float[Tensor, "n_draws n"]
            In (km/s)^2.
        """
        gamma = _slopes(self._s, self._out_start, slope_weights, self.centres, self.ln_width)
        phi, vc2, _ = self._nodes(gamma, ln_mass)
        return phi, vc2, vc2 * gamma[:, 1:-1]

    def radial_draws(self, values: Mapping[str, Tensor], r: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        first = float(self._s[1])
        s = r.detach().log()
        cell = ((s - first) / self.ds).floor().long()
        inside = bool(((cell >= 0) & (cell < len(self._s) - 3)).all())  # beyond the nodes are the profile's power laws
        if not inside or not {"ln_mass", "slope_weights"} <= set(values):
            return None
        ln_mass, weights = values["ln_mass"].detach(), values["slope_weights"].detach()
        features = [values.get(name, getattr(self, name)).detach() for name in ("centres", "ln_width")]
        with torch.no_grad():
            gamma, here = (_slopes(x, self._out_start, weights, *features) for x in (self._s, s))
            phi, vc2, ln_m_cubics = self._nodes(gamma, ln_mass)
            u = (s - first) / self.ds - cell
            phi = horner(cubic_coefficients(phi, vc2 * self.ds)[:, cell], u)
            mass = horner(ln_m_cubics[:, cell], u).exp()
        return phi, G * mass / r**2, mass * here / r

    @staticmethod
    def _ln_mass(profile: RadialProfile, ln_m_cubics: Tensor, s: Tensor, gamma: Tensor) -> Tensor:
        """Return ln M(<r) at s = ln r, constants as gamma at s is."""
        inside = s.clamp(profile.s_first, profile.s_last)
        index = ((inside - profile.s_first) / profile.ds).long().clamp(0, len(ln_m_cubics) - 1)
        u = (inside - profile.s_first) / profile.ds - index
        # beyond the grid the slope has converged, inside to a constant and outside to zero
        return horner(gather_rows(ln_m_cubics, index), u) + (s - inside) * gamma

    def phi(self, x: Tensor) -> Tensor:
        s = radius(x).clamp(min=1e-300).log()
        profile, ln_m_cubics = self._tables()
        fixed, gamma = s.detach(), self.mass_slope(s)
        ln_m = self._ln_mass(profile, ln_m_cubics, fixed, gamma.detach())
        # derivatives come from the integrands, so that the density is exactly M gamma / 4 pi r^3
        ln_m = attach_derivative(ln_m, s, gamma)
        return attach_derivative(profile.phi(fixed), s, G * (ln_m - s).exp())

    def phi_and_vc2(self, r: Tensor) -> tuple[Tensor, Tensor]:
        return self.radial()(r)

    def radial(self) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        profile, ln_m_cubics = self._tables()

        def at(r: Tensor) -> tuple[Tensor, Tensor]:
            s = r.detach().clamp(min=1e-300).log()
            return profile.phi(s), G * (self._ln_mass(profile, ln_m_cubics, s, self.mass_slope(s).detach()) - s).exp()

        return at


class DirectNetwork(Potential):
    r"""Potential given directly by a network, with a symmetry and the monopole's decay at infinity.

    .. math:: \Phi(x) = -\frac{G M}{\sqrt{r^2 + a^2}} \exp[(1 - |\xi|^2)\, \mathrm{NN}(u)],
              \qquad \xi = x / \sqrt{r^2 + a^2}

    with inputs u = |xi|^2 (spherical), (xi_R^2, xi_z^2) (axisymmetric) or (xi_x^2, xi_y^2, xi_z^2)
    (triaxial). The factor 1 - |xi|^2 vanishes at infinity, where :math:`\Phi \to -GM/r`. The density is not
    positive by construction: `register_factors` adds the named factor ``positive_density`` to the prior.

    Sites (unless ``prior="none"``, when they are trained parameters): ``ln_mass``, ``output`` and, with
    ``prior="all"``, ``hidden`` and ``hidden_bias``.

    Parameters
    ----------
    r_s
        Scale a in kpc, for instance the stars' median radius.
    ln_mass
        Prior mean of ln of the total mass in Msun.
    symmetry
        ``"spherical"``, ``"axisymmetric"`` about z, or ``"triaxial"`` (even in x, y and z).
    width, seed
        Hidden units and the seed of their initial weights.
    density_strength
        Strength of the positive-density factor; zero switches it off.
    """

    @takes(r_s="length", ln_mass="number", density_strength="number")
    def __init__(
        self,
        r_s: float,
        ln_mass: float,
        symmetry: Symmetry = "axisymmetric",
        width: int = 32,
        prior: Prior = "last_layer",
        seed: int = 0,
        density_strength: float = 100.0,
    ) -> None:
        super().__init__()
        if not r_s > 0:
            raise ValueError(f"r_s must be positive (kpc), got {r_s}")
        n_inputs = {"spherical": 1, "axisymmetric": 2, "triaxial": 3}.get(symmetry)
        if n_inputs is None:
            raise ValueError(f"symmetry must be spherical, axisymmetric or triaxial, got {symmetry!r}")
        _check_prior(prior)
        self.symmetry, self.r_s, self.density_strength = symmetry, r_s, density_strength
        generator = _generator(seed)
        hidden = 3 * torch.randn(n_inputs, width, dtype=torch.float64, generator=generator)
        bias = -hidden.sum(0) * torch.rand(width, dtype=torch.float64, generator=generator)
        output = torch.zeros(width, dtype=torch.float64)
        sd = torch.full_like(output, width**-0.5)
        self._add("ln_mass", torch.tensor(ln_mass, dtype=torch.float64), torch.tensor(1.5), prior != "none", prior)
        self._add("output", output, sd, prior != "none", prior)
        self._add("hidden", hidden, torch.full_like(hidden, 0.5), prior == "all", prior)
        self._add("hidden_bias", bias, torch.full_like(bias, 0.5), prior == "all", prior)
        # where the density is watched: a fixed spread of directions at radii around the scale
        directions = torch.randn(256, 3, dtype=torch.float64, generator=generator)
        directions = directions / radius(directions)[:, None]
        r = r_s * torch.logspace(-1.5, 1.5, 256, dtype=torch.float64)[:, None]
        self.register_buffer("_watched", directions * r)

    def _add(self, name: str, mean: Tensor, sd: Tensor, bayesian: bool, prior: Prior) -> None:
        if bayesian:
            setattr(self, name, normal_site(mean, sd, False))
        elif prior == "none":
            setattr(self, name, torch.nn.Parameter(mean))
        else:
            self.register_buffer(name, mean)

    def phi(self, x: Tensor) -> Tensor:
        soft = (x**2).sum(-1) + self.r_s**2
        xi2 = x**2 / soft[..., None]
        total = xi2.sum(-1)
        if self.symmetry == "spherical":
            inputs = total[..., None]
        elif self.symmetry == "axisymmetric":
            inputs = torch.stack([xi2[..., 0] + xi2[..., 1], xi2[..., 2]], -1)
        else:
            inputs = xi2
        net = torch.tanh(inputs @ self.hidden + self.hidden_bias) @ self.output
        return -G * self.ln_mass.exp() / soft.sqrt() * torch.exp((1 - total) * net)

    def register_factors(self) -> None:
        """Add ``positive_density``: minus strength times the mean negative part of rho over its scale."""
        if self.density_strength > 0:
            with torch.enable_grad():
                density = self.density(self._watched)
            r = radius(self._watched)
            scale = self.ln_mass.exp() * self.r_s / (4 * math.pi * r**2 * (r**2 + self.r_s**2))
            pyro.factor("positive_density", -self.density_strength * torch.relu(-density / scale).mean())


_QUANTILES = torch.tensor([0.001, 0.5, 0.999], dtype=torch.float64)


def _slope(s: Tensor, out_start: float, weights: Tensor, centres: Tensor, ln_width: Tensor) -> Tensor:
    features = torch.tanh((s[..., None] - centres) * torch.exp(-ln_width))
    logit = features @ weights[:-1] + weights[-1] - torch.nn.functional.softplus(s - out_start)
    return 3 * torch.sigmoid(logit)


def _slopes(s: Tensor, out_start: float, weights: Tensor, centres: Tensor, ln_width: Tensor) -> Tensor:
    """`_slope` at s ``(n,)`` for many weights ``(n_draws, k + 1)``, features the same for all or one set for each."""
    features = torch.tanh((s[:, None] - centres[..., None, :]) * torch.exp(-ln_width)[..., None, None])
    logit = (features @ weights[:, :-1, None])[..., 0] + weights[:, -1:]
    return 3 * torch.sigmoid(logit - torch.nn.functional.softplus(s - out_start))


def normal_site(mean: Tensor, sd: Tensor, flat: bool) -> PyroSample:
    """Return a sample site with independent normal priors, or flat ones."""
    sd = sd.to(mean).expand_as(mean)
    if flat:
        return PyroSample(dist.ImproperUniform(constraints.real, (), mean.shape))
    return PyroSample(dist.Normal(mean, sd).to_event(mean.dim()))


def _check_prior(prior: str) -> None:
    if prior not in _PRIORS:
        raise ValueError(f"prior must be one of {', '.join(_PRIORS)}, got {prior!r}")


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


__all__ = ["DirectNetwork", "MassSlopeNetwork"]
