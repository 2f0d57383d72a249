"""What Pyro modules of this package share."""

from __future__ import annotations

import abc
import copy
from collections.abc import Mapping
from typing import TypeVar

import torch
from pyro.nn import PyroModule, PyroParam, PyroSample
from pyro.nn.module import _PyroModuleMeta
from torch import Tensor

from bayespot.units import plain

M = TypeVar("M", bound=torch.nn.Module)


class _AbstractPyroMeta(abc.ABCMeta, _PyroModuleMeta):
    """PyroModule has a metaclass of its own; this one lets `abc.abstractmethod` work as well."""


class AbstractPyroModule(PyroModule, metaclass=_AbstractPyroMeta):
    """A PyroModule with abstract methods, whose parameters may be numbers or prior distributions."""

    def _set_parameter(
        self, name: str, value: float | Tensor | torch.distributions.Distribution | PyroSample | PyroParam
    ) -> None:
        """Store ``value`` as a buffer (number), a trained parameter or a Pyro sample site (distribution).

        A number with a unit is converted by it to the internal system; `bayespot.units.takes` checks its kind as well.
        """
        value = plain(value, "any", name)
        if isinstance(value, torch.distributions.Distribution):
            setattr(self, name, PyroSample(value))  # type: ignore[arg-type]
        elif isinstance(value, torch.nn.Parameter | PyroSample | PyroParam):
            setattr(self, name, value)
        else:
            self.register_buffer(name, torch.as_tensor(value, dtype=torch.float64))


def freeze(module: M, values: Mapping[str, Tensor]) -> M:
    """Return a copy of a module whose sample sites are replaced by plain tensors.

    Parameters
    ----------
    module
        Any module with PyroSample attributes, possibly nested.
    values
        Tensors by site name relative to the module, for instance ``"ln_mass"`` or ``"part_0.m_tot"``; their
        graphs are kept.

    Raises
    ------
    ValueError
        If a name is not an attribute of the module.
    """
    fixed = copy.copy(module)
    for shared in ("_modules", "_parameters", "_buffers", "_pyro_samples", "_pyro_params"):
        if shared in fixed.__dict__:
            fixed.__dict__[shared] = copy.copy(fixed.__dict__[shared])
    if values:
        fixed.__dict__.pop("_computed", None)  # with the old values, see `Potential.evaluated`
    nested: dict[str, dict[str, Tensor]] = {}
    for name, value in values.items():
        head, _, rest = name.partition(".")
        if rest:
            nested.setdefault(head, {})[rest] = value
            continue
        value = plain(value, "internal", name)
        for store in ("_pyro_samples", "_parameters", "_buffers"):
            if name in fixed.__dict__.get(store, {}):
                del fixed.__dict__[store][name]
                break
        else:
            if name not in fixed.__dict__:
                raise ValueError(f"{type(module).__name__} has no site {name!r}")
        # past torch's and Pyro's __setattr__, which would look for the name in their own stores
        fixed.__dict__[name] = value
    for head, inner in nested.items():
        if head not in fixed.__dict__["_modules"]:
            raise ValueError(f"{type(module).__name__} has no part {head!r}")
        fixed.__dict__["_modules"][head] = freeze(fixed.__dict__["_modules"][head], inner)
    return fixed
