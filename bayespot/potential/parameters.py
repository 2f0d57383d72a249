"""Parameters of potentials: numbers, trained parameters or priors, checked where they are numbers."""

from __future__ import annotations

import math

import torch
from pyro.nn import PyroParam, PyroSample
from torch import Tensor
from torch.distributions import Distribution

from bayespot.potential.base import Potential

Value = float | Tensor | Distribution | PyroSample | PyroParam


def set_checked(
    potential: Potential, name: str, value: Value, low: float = 0.0, high: float = math.inf, closed: str = ""
) -> None:
    """Store a potential's parameter; ValueError unless ``low < value < high`` (``closed`` names the ends inside)."""
    if not isinstance(value, Distribution | PyroSample | PyroParam):
        v = torch.as_tensor(value, dtype=torch.float64).detach()
        above = v >= low if "[" in closed else v > low
        below = (v <= high if "]" in closed else v < high) & torch.isfinite(v)
        if not bool((above & below).all()):
            left, right = "[" if "[" in closed else "(", "]" if "]" in closed else ")"
            wanted = f"in {left}{low:g}, {high:g}{right}"
            if high == math.inf:
                wanted = "positive" if low == 0 and not closed else f"{'at least' if closed else 'above'} {low:g}"
            raise ValueError(f"{name} of {type(potential).__name__} must be {wanted} and finite, got {value}")
    potential._set_parameter(name, value)


def is_number_one(value: Value) -> bool:
    """Whether an axis ratio is 1 for good: a number, neither trained nor a site."""
    fixed = isinstance(value, int | float) or (type(value) is Tensor and not value.requires_grad)
    return fixed and bool((torch.as_tensor(value) == 1).all())
