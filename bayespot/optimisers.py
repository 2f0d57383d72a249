"""torch's optimisers without its compiler, whose import costs a process 2.4 s (torch 2.13).

Methods of `torch.optim.Optimizer` import ``torch._dynamo`` at their first call, to tell the compiler to leave them
alone. Nothing here is compiled: the same methods serve as they were before they were decorated (``__wrapped__``).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer


class _Plain(Optimizer):
    """The undecorated methods; an optimiser's own ``step`` is its subclass's matter."""

    add_param_group = inspect.unwrap(Optimizer.add_param_group)
    zero_grad = inspect.unwrap(Optimizer.zero_grad)
    state_dict = inspect.unwrap(Optimizer.state_dict)
    load_state_dict = inspect.unwrap(Optimizer.load_state_dict)


class LBFGS(_Plain, torch.optim.LBFGS):
    """`torch.optim.LBFGS`."""


class Adam(_Plain, torch.optim.Adam):
    """`torch.optim.Adam`."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one step; see `torch.optim.Adam.step`."""
        return inspect.unwrap(torch.optim.Adam.step)(self, closure)
