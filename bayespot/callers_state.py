"""What a call must leave as it was: the caller's parameter store, random states, default dtype, threads, warnings."""

from __future__ import annotations

import functools
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

import numpy as np
import pyro
import torch

P = ParamSpec("P")
R = TypeVar("R")


@contextmanager
def callers_state() -> Iterator[None]:
    """Give what is within a Pyro parameter store of its own, and restore the rest of the process's state after it.

    Restored, also when the block raises: the states of the random generators of Python, numpy and torch (those of
    accelerators as well), torch's default dtype, number of threads and gradient mode, the filters of warnings, and
    numpy's handling of floating-point errors. Pyro's generator is these three.
    """
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002
    dtype, threads, gradients = torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled()
    try:
        with (
            pyro.get_param_store().scope(),
            torch.random.fork_rng(),
            warnings.catch_warnings(),
            np.errstate(),
        ):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)  # noqa: NPY002
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(gradients)
        # setting it at all, even to the same number, stops other libraries from choosing theirs
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)


def keeps_callers_state(function: Callable[P, R]) -> Callable[P, R]:
    """Run a function within `callers_state`."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        with callers_state():
            return function(*args, **kwargs)

    return wrapped
