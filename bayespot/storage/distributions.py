"""Priors as data: the class of a torch distribution and its numbers, nested where it is made of others."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from torch.distributions import Distribution, Transform, constraints, transforms

from bayespot.storage.errors import StorageError

#: Distributions that their constructor's arguments, which are attributes as well, describe.
PLAIN: dict[str, tuple[str, ...]] = {
    "Beta": ("concentration1", "concentration0"),
    "Cauchy": ("loc", "scale"),
    "Delta": ("v", "log_density", "event_dim"),
    "Dirichlet": ("concentration",),
    "Exponential": ("rate",),
    "Gamma": ("concentration", "rate"),
    "Gumbel": ("loc", "scale"),
    "HalfCauchy": ("scale",),
    "HalfNormal": ("scale",),
    "InverseGamma": ("concentration", "rate"),
    "Kumaraswamy": ("concentration1", "concentration0"),
    "Laplace": ("loc", "scale"),
    "LogNormal": ("loc", "scale"),
    "LowRankMultivariateNormal": ("loc", "cov_factor", "cov_diag"),
    "Normal": ("loc", "scale"),
    "Pareto": ("scale", "alpha"),
    "StudentT": ("df", "loc", "scale"),
    "Uniform": ("low", "high"),
    "VonMises": ("loc", "concentration"),
    "Weibull": ("scale", "concentration"),
}
#: Those that are described by other names than their attributes, or contain others.
OTHER: dict[str, Callable[[Any], dict[str, Any]]] = {
    "Categorical": lambda d: {"logits": d.logits},
    "Independent": lambda d: {
        "base_distribution": d.base_dist,
        "reinterpreted_batch_ndims": d.reinterpreted_batch_ndims,
    },
    "ImproperUniform": lambda d: {
        "support": d._support,
        "batch_shape": tuple(d.batch_shape),
        "event_shape": tuple(d.event_shape),
    },
    "MixtureSameFamily": lambda d: {
        "mixture_distribution": d.mixture_distribution,
        "component_distribution": d.component_distribution,
    },
    "MultivariateNormal": lambda d: {"loc": d.loc, "scale_tril": d.scale_tril},
    "TransformedDistribution": lambda d: {"base_distribution": d.base_dist, "transforms": list(d.transforms)},
}
#: Transforms and constraints by their constructor's arguments.
TRANSFORMS: dict[str, tuple[str, ...]] = {
    "AffineTransform": ("loc", "scale", "event_dim"),
    "ExpTransform": (),
    "PowerTransform": ("exponent",),
    "SigmoidTransform": (),
    "SoftplusTransform": (),
    "StickBreakingTransform": (),
    "TanhTransform": (),
}
CONSTRAINTS: dict[str, tuple[str, ...]] = {
    "greater_than": ("lower_bound",),
    "greater_than_eq": ("lower_bound",),
    "half_open_interval": ("lower_bound", "upper_bound"),
    "independent": ("base_constraint", "reinterpreted_batch_ndims"),
    "interval": ("lower_bound", "upper_bound"),
    "less_than": ("upper_bound",),
}
_SINGLE = ("nonnegative", "positive", "positive_definite", "real", "real_vector", "simplex", "unit_interval")


def parts_of(thing: Any) -> tuple[str, str, dict[str, Any]] | None:
    """Return kind, class name and arguments of a distribution, transform or constraint of the lists, else None."""
    name = type(thing).__name__
    if isinstance(thing, Distribution) and type(thing) is getattr(dist, name, None):
        if name in PLAIN:
            return "distribution", name, _attributes(thing, PLAIN[name])
        return ("distribution", name, OTHER[name](thing)) if name in OTHER else None
    if isinstance(thing, Distribution) and type(thing) is getattr(torch.distributions, name, None):
        # one of torch's own: Pyro's of the same name gives the same numbers
        if name in PLAIN:
            return "distribution", name, _attributes(thing, PLAIN[name])
        return ("distribution", name, OTHER[name](thing)) if name in OTHER else None
    if isinstance(thing, Transform) and name in TRANSFORMS and type(thing) is getattr(transforms, name, None):
        return "transform", name, _attributes(thing, TRANSFORMS[name])
    if isinstance(thing, constraints.Constraint):
        single = next((one for one in _SINGLE if getattr(constraints, one) is thing), None)
        if single is not None:
            return "constraint", single, {}
        own = next((one for one in CONSTRAINTS if getattr(constraints, one) is type(thing)), None)
        return None if own is None else ("constraint", own, _attributes(thing, CONSTRAINTS[own]))
    return None


def made(kind: str, name: str, arguments: dict[str, Any]) -> Any:
    """Return the distribution, transform or constraint of a description.

    Raises
    ------
    StorageError
        If it is not on the lists, or its arguments do not fit.
    """
    if kind == "constraint" and name in _SINGLE:
        return getattr(constraints, name)
    tables: dict[str, tuple[Any, Any]] = {
        "distribution": (PLAIN | OTHER, dist),
        "transform": (TRANSFORMS, transforms),
        "constraint": (CONSTRAINTS, constraints),
    }
    table, module = tables.get(kind, ({}, None))
    if name not in table:
        raise StorageError(f"the {kind} {name!r} is not one that a stored model may name: it was changed, or is newer")
    try:
        return _without_checks(getattr(module, name), arguments)
    except (TypeError, ValueError) as error:
        raise StorageError(f"the stored {kind} {name} is damaged ({error})") from error


def _without_checks(cls: Any, arguments: dict[str, Any]) -> Any:
    """Construct, without checking arguments again: they were checked, or not, when the prior was made."""
    if "validate_args" in inspect.signature(cls.__init__).parameters:
        return cls(**arguments, validate_args=False)
    return cls(**arguments)


def _attributes(thing: Any, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: getattr(thing, name) for name in names}
