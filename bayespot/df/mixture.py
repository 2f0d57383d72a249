"""Mixtures over action space as Pyro modules with priors."""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

import pyro.distributions as dist
import torch
from pyro.nn import PyroSample
from torch import Tensor
from torch.distributions import biject_to

from bayespot.df.base import DistributionDensity, LogFraction
from bayespot.df.distributions import (
    ActionDistribution,
    SphericalActionDistribution,
)
from bayespot.numerics import wall
from bayespot.optimisers import LBFGS
from bayespot.units import takes_tensors


class SitePrior(NamedTuple):
    """Mean and standard deviation of the Normal prior of one site, the same for every component."""

    mean: float
    sd: float


#: Priors of a mixture's weights.
WeightsPrior = Literal["logistic_normal", "stick_breaking"]
#: Concentration of the stick-breaking weights: the first of many components has a third of the stars on average.
STICK_CONCENTRATION = 2.0


class ActionMixtureModule(DistributionDensity, abc.ABC):
    r"""A mixture whose real-valued sites, one entry per component, have independent Normal priors.

    Scales are log-normal about those of the data, a factor e^2 wide; the shapes' priors are the guard against narrow
    components, which overfit and make the potential's posterior too narrow: they favour the broad ones of smooth
    systems. Weights are, with a site ``logits``, the softmax of Normals of sd 1.5 (all components are used), or with a
    site ``sticks``

    .. math:: w_k = v_k \prod_{j<k} (1 - v_j), \quad v_k \sim \mathrm{Beta}(1, 2), \quad v_K = 1,

    a truncated Dirichlet process: components that the data do not ask for keep little weight.

    Parameters
    ----------
    n_components
        Number of components; None lets the fit choose it from the data.
    weights
        Prior of the weights: ``"logistic_normal"`` or ``"stick_breaking"``.

    References
    ----------
    Ishwaran & James (2001), JASA 96, 161 (stick-breaking priors).
    """

    def __init__(self, n_components: int | None = None, weights: WeightsPrior = "logistic_normal") -> None:
        super().__init__()
        if n_components is not None and n_components < 1:
            raise ValueError(f"n_components must be at least 1, got {n_components}")
        if weights not in get_args(WeightsPrior):
            raise ValueError(f"weights must be one of {', '.join(get_args(WeightsPrior))}; got {weights!r}")
        self.n_components = n_components
        self.weights_prior: WeightsPrior = weights
        self._priors: dict[str, SitePrior] = {}

    @abc.abstractmethod
    def _new(self, n_components: int) -> ActionMixtureModule:
        """A module of the same kind."""

    @abc.abstractmethod
    def _site_priors(self, J: Tensor) -> dict[str, SitePrior]:
        """Priors of the sites, scaled to actions."""

    @abc.abstractmethod
    def _start(self, J: Tensor, n_components: int) -> dict[str, Tensor]:
        """Values of those sites that start away from their prior means."""

    def resolved(self, n_components: int, J: Tensor, near_data: bool = False) -> ActionMixtureModule:
        """Return the density with ``n_components`` components and priors scaled to the actions ``J``.

        With ``near_data`` scales have a standard deviation of a factor e instead of e^2, and f(J) hardly rises with
        J_r: otherwise components may hide beyond the selected stars, flat or rising, in too shallow a potential.
        """
        module = self._new(n_components)
        module.weights_prior = self.weights_prior
        module._priors = module._site_priors(J)
        if near_data:
            narrower = {n: SitePrior(p.mean, p.sd / 2) for n, p in module._priors.items() if n.startswith(_SCALES)}
            flat = {"ln_shape_r": SitePrior(-3.0, 1.0)} if "ln_shape_r" in module._priors else {}
            module._priors |= narrower | flat
        if module.weights_prior == "stick_breaking":
            del module._priors["logits"]
        for name, prior in module.site_distributions().items():
            setattr(module, name, PyroSample(prior))
        return module

    def site_distributions(self) -> dict[str, dist.TorchDistribution]:
        """Return the prior of every site of a resolved mixture, in a fixed order."""
        k = self._resolved_size()
        found: dict[str, dist.TorchDistribution] = {}
        if self.weights_prior == "stick_breaking" and k > 1:
            ones = torch.ones(k - 1, dtype=torch.float64)
            found["sticks"] = dist.Beta(ones, STICK_CONCENTRATION * ones).to_event(1)
        for name, prior in self._priors.items():
            mean = torch.full((k,), prior.mean, dtype=torch.float64)
            found[name] = dist.Normal(mean, torch.full_like(mean, prior.sd)).to_event(1)
        return found

    def log_weights(self) -> Tensor:
        """Return the logarithms of the weights, up to a constant."""
        if self.weights_prior == "logistic_normal":
            return self.logits
        if self.n_components == 1:
            return torch.zeros(1, dtype=torch.float64)
        zero = torch.zeros(1, dtype=torch.float64)
        taken, left = self.sticks.clamp(min=1e-300).log(), torch.log1p(-self.sticks.clamp(max=1 - 1e-15)).cumsum(-1)
        return torch.cat([taken, zero]) + torch.cat([zero, left])

    def _resolved_size(self) -> int:
        if self.n_components is None:
            raise ValueError("the number of components is not set: call resolved(n_components, J) first")
        return self.n_components

    @takes_tensors(J="action")
    def initial_values(self, J: Tensor) -> dict[str, Tensor]:
        """Return a start: components spread over the quantiles of the actions' size, equal weights."""
        k = self._resolved_size()
        values = {n: torch.full((k,), prior.mean, dtype=torch.float64) for n, prior in self._priors.items()}
        if self.weights_prior == "stick_breaking" and k > 1:
            values = {"sticks": 1 / torch.arange(k, 1, -1, dtype=torch.float64)} | values
        return values | self._start(J, k)

    def fit_actions(
        self, J: Tensor, seed: int, max_iterations: int = 100, log_z: LogFraction | None = None
    ) -> dict[str, Tensor]:
        """Maximise the posterior of the sites at fixed actions by full-batch L-BFGS.

        ``seed`` breaks the symmetry between components.
        """
        from bayespot.pyro_modules import freeze

        coordinates = SiteCoordinates(self)
        generator = torch.Generator().manual_seed(seed)
        flat = coordinates.flat(self.initial_values(J))
        flat = flat + 0.05 * torch.randn(flat.shape, generator=generator, dtype=flat.dtype)
        z = coordinates.whitened(flat).requires_grad_()
        optimiser = LBFGS([z], max_iter=max_iterations, history_size=30, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimiser.zero_grad()
            if not bool((z.detach().abs() < _FARTHEST).all()):
                # there sums of log-gammas lose all their digits, and what is left may look like a gain
                rise, z.grad = wall(z, best["z"], _WALL)
                return best["loss"] + rise
            fixed = freeze(self, coordinates.values(z))
            loss = -coordinates.log_prior(z) / len(J) - fixed.log_prob(J).mean()
            if log_z is not None:
                loss = loss + log_z(fixed)
            loss.backward()
            if z.grad is not None and not (torch.isfinite(loss) and torch.isfinite(z.grad).all()):
                # a trial step so long that an exponential overflowed: the line search shortens it
                rise, z.grad = wall(z, best["z"], _WALL)
                return best["loss"] + rise
            if float(loss.detach()) < best["loss"]:
                best.update(loss=float(loss.detach()), z=z.detach().clone())
            return loss

        best: dict[str, Any] = {"loss": 1e10, "z": z.detach().clone()}
        optimiser.step(closure)
        return {name: value.clone() for name, value in coordinates.values(best["z"]).items()}


class SiteCoordinates:
    """The sites of a resolved mixture as one real vector z, in which every Normal prior is standard.

    Sites with other priors enter by the unconstrained coordinates of their supports (`torch.distributions.biject_to`).
    """

    def __init__(self, module: ActionMixtureModule) -> None:
        self.priors = module.site_distributions()
        self.transforms = {name: biject_to(prior.support) for name, prior in self.priors.items()}
        self.sizes = [prior.event_shape.numel() for prior in self.priors.values()]
        self.normal = [name in module._priors for name in self.priors]
        parts = [module._priors.get(name, SitePrior(0.0, 1.0)) for name in self.priors]
        repeats = torch.tensor(self.sizes)
        self.mean = torch.tensor([p.mean for p in parts], dtype=torch.float64).repeat_interleave(repeats)
        self.sd = torch.tensor([p.sd for p in parts], dtype=torch.float64).repeat_interleave(repeats)
        self._is_normal = torch.tensor(self.normal).repeat_interleave(repeats)

    def flat(self, values: Mapping[str, Tensor]) -> Tensor:
        """Return the unconstrained values end to end."""
        return torch.cat([self.transforms[name].inv(values[name]) for name in self.priors])

    def whitened(self, flat: Tensor) -> Tensor:
        """Return z of unconstrained values."""
        return (flat - self.mean) / self.sd

    def values(self, z: Tensor) -> dict[str, Tensor]:
        """Return the sites' values at z."""
        parts = (self.mean + self.sd * z).split(self.sizes)
        return {name: self.transforms[name](part) for name, part in zip(self.priors, parts, strict=True)}

    def log_prior(self, z: Tensor) -> Tensor:
        """Return the log prior density in z."""
        standard = z if all(self.normal) else z[self._is_normal]
        total = -0.5 * (standard.square().sum() + len(standard) * _LN_2PI)
        if all(self.normal):
            return total
        for name, normal, part in zip(self.priors, self.normal, z.split(self.sizes), strict=True):
            if not normal:
                value = self.transforms[name](part)
                total = total + self.priors[name].log_prob(value)
                total = total + self.transforms[name].log_abs_det_jacobian(part, value).sum()
        return total


class SphericalMixtureModule(ActionMixtureModule, abc.ABC):
    """Shared machinery of mixtures in J_r, L and cos i.

    Parameters
    ----------
    n_components
        Number of components; None lets the fit choose it from the data.
    rotation
        Let f(J) depend on cos i: components may prefer one sense of rotation about z.
    weights
        Prior of the weights, see `ActionMixtureModule`.
    """

    def __init__(
        self, n_components: int | None = None, rotation: bool = False, weights: WeightsPrior = "logistic_normal"
    ) -> None:
        super().__init__(n_components, weights)
        self.rotation = rotation
        self.symmetry = "axisymmetric" if rotation else "spherical"

    def _new(self, n_components: int) -> SphericalMixtureModule:
        return type(self)(n_components, self.rotation)


class SphericalMixture(SphericalMixtureModule):
    """f(J) of a spherical system, `SphericalActionDistribution`: (J_r, L) and cos i.

    Sites: ``logits`` (or ``sticks``), ``ln_scale_r``, ``ln_scale_L``, ``ln_shape_r`` = ln(a - 1),
    ``ln_shape_L`` = ln(c - 2), ``ln_tail`` and, with rotation, ``concentration``.

    Parameters are those of `SphericalMixtureModule`.
    """

    def _site_priors(self, J: Tensor) -> dict[str, SitePrior]:
        priors = {
            "logits": SitePrior(0.0, 1.5),
            "ln_scale_r": SitePrior(ln_median(J[:, 0]), 2.0),
            "ln_scale_L": SitePrior(ln_median(_L(J) / 2), 2.0),
            "ln_shape_r": SitePrior(-1.5, 1.0),
            "ln_shape_L": SitePrior(-1.0, 1.0),
            "ln_tail": SitePrior(1.5, 1.0),
        }
        return priors | ({"concentration": SitePrior(0.0, 2.0)} if self.rotation else {})

    def _start(self, J: Tensor, n_components: int) -> dict[str, Tensor]:
        L = _L(J)
        size = (J[:, 0] + L).log()
        quantiles = torch.quantile(size[:100_000], quantile_levels(n_components))
        offset_r = ln_median(J[:, 0]) - float(size.median())
        offset_L = ln_median(L / 2) - float(size.median())
        return {"ln_scale_r": quantiles + offset_r, "ln_scale_L": quantiles + offset_L}

    def distribution(self) -> SphericalActionDistribution:
        return SphericalActionDistribution(
            self.log_weights(),
            self.ln_scale_r.exp(),
            self.ln_scale_L.exp(),
            1 + self.ln_shape_r.exp(),
            2 + self.ln_shape_L.exp(),
            self.ln_tail.exp(),
            self.concentration if self.rotation else None,
        )


class ActionMixture(ActionMixtureModule):
    """f(J) in (J_r, J_phi, J_z), `ActionDistribution`, for systems that need not be spherical.

    Sites: ``logits`` (or ``sticks``), ``ln_scale_r``, ``ln_scale_z``, ``mean_phi`` (in units of the median |J_phi|),
    ``ln_sigma_phi``, ``ln_shape_r`` = ln(a - 1), ``ln_shape_z`` = ln(c - 1), ``ln_tail``.
    """

    _unit_phi = 1.0

    def _new(self, n_components: int) -> ActionMixture:
        return ActionMixture(n_components)

    def _site_priors(self, J: Tensor) -> dict[str, SitePrior]:
        self._unit_phi = float(J[:, 1].abs().median())
        return {
            "logits": SitePrior(0.0, 1.5),
            "ln_scale_r": SitePrior(ln_median(J[:, 0]), 2.0),
            "ln_scale_z": SitePrior(ln_median(J[:, 2]), 2.0),
            "mean_phi": SitePrior(0.0, 2.0),
            "ln_sigma_phi": SitePrior(ln_median(J[:, 1].abs()), 1.5),
            "ln_shape_r": SitePrior(-1.5, 1.0),
            "ln_shape_z": SitePrior(-1.5, 1.0),
            "ln_tail": SitePrior(1.5, 1.0),
        }

    def _start(self, J: Tensor, n_components: int) -> dict[str, Tensor]:
        size = (J[:, 0] + _L(J)).log()[:100_000]
        level = quantile_levels(n_components)
        spread = torch.quantile(size, level) - size.median()
        return {
            "ln_scale_r": ln_median(J[:, 0]) + spread,
            "ln_scale_z": ln_median(J[:, 2]) + spread,
            "ln_sigma_phi": ln_median(J[:, 1].abs()) + spread,
            "mean_phi": torch.quantile(J[:100_000, 1], level) / self._unit_phi,
        }

    def distribution(self) -> ActionDistribution:
        return ActionDistribution(
            self.log_weights(),
            self.ln_scale_r.exp(),
            self.ln_scale_z.exp(),
            self._unit_phi * self.mean_phi,
            self.ln_sigma_phi.exp(),
            1 + self.ln_shape_r.exp(),
            1 + self.ln_shape_z.exp(),
            self.ln_tail.exp(),
        )


_LN_2PI = math.log(2 * math.pi)
#: What a step to where nothing is finite adds to minus the mean ln f.
_WALL = 10.0
#: No site is looked for farther from its prior mean, in prior standard deviations.
_FARTHEST = 30.0
#: Beginnings of the names of sites that are logarithms of scales.
_SCALES = ("ln_scale", "ln_sigma")


def _L(J: Tensor) -> Tensor:
    return J[..., 2] + J[..., 1].abs()


def ln_median(action: Tensor) -> float:
    return float(action.median().clamp(min=1e-300).log())


def quantile_levels(n_components: int) -> Tensor:
    return (torch.arange(n_components, dtype=torch.float64) + 0.5) / n_components
