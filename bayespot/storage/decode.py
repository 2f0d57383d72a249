"""From data to objects: classes by the list, their attributes as stored; code of others only where it is trusted."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pyro.nn import PyroModule, PyroSample
from torch import Tensor

from bayespot.storage.classes import FUNCTIONS, listed
from bayespot.storage.distributions import made
from bayespot.storage.encode import FORMAT, Written
from bayespot.storage.errors import StorageError


class NotTrusted(StorageError):
    """A file that needs code, or pickles, of its author to be read."""


@dataclass
class Reader:
    """How to find code of others than this package.

    Parameters
    ----------
    module
        Returns the trusted module of a name; None: there is none.
    unpickle
        Whether pickles may be loaded.
    known
        The same objects as described in this process, from which pickled ones are taken instead.
    """

    module: Callable[[str], Any] | None = None
    unpickle: bool = False
    known: Written = field(default_factory=Written)


def header(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return description, with ``code`` and ``pickles``, and tensors of a file.

    Raises
    ------
    StorageError
        If the file is damaged or none of this package's.
    """
    import safetensors

    try:
        with safetensors.safe_open(str(path), framework="pt") as handle:
            metadata = handle.metadata() or {}
            tensors = {name: handle.get_tensor(name).clone() for name in handle.keys()}  # noqa: SIM118
        found = json.loads(metadata["description"])
    except FileNotFoundError:
        raise
    except (safetensors.SafetensorError, OSError, KeyError, ValueError) as error:
        raise StorageError(f"not a readable file of stored objects ({error})") from error
    if metadata.get("bayespot") != FORMAT or not isinstance(found, dict) or "content" not in found:
        raise StorageError("stored objects of another version")
    return found, tensors


def read(path: Path, reader: Reader | None = None, only: str | None = None) -> Any:
    """Return the objects of a file that `write` made; with ``only``, this entry of a dictionary.

    Raises
    ------
    NotTrusted
        If reading needs code or pickles that the reader does not trust.
    StorageError
        If the file is damaged, or names a class that is not on the list.
    """
    found, tensors = header(path)
    decoder = _Decoder(tensors, Reader() if reader is None else reader, found.get("pickles", {}))
    try:
        return decoder.value(found["content"] if only is None else found["content"]["dict"][only])
    except (KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        raise StorageError(f"the description of the stored objects is damaged ({error})") from error


class _Decoder:
    """Builds objects; what is described once is made once."""

    def __init__(self, tensors: dict[str, Tensor], reader: Reader, pickles: dict[str, str]) -> None:
        self.tensors, self.reader, self.pickles = tensors, reader, pickles
        self._made: dict[int, Any] = {}
        self._parameters: dict[str, torch.nn.Parameter] = {}

    def value(self, x: Any) -> Any:
        """Return what a description stands for."""
        if not isinstance(x, dict):
            return [self.value(one) for one in x] if isinstance(x, list) else x
        if "same" in x:
            return self._made[x["same"]]
        kind = next(iter(x))
        plain = self._plain(kind, x)
        if plain is not _NOTHING:
            return plain
        found = self._object(kind, x)
        self._made[x["number"]] = found
        return found

    def _plain(self, kind: str, x: dict[str, Any]) -> Any:
        content = x[kind]
        if kind == "tensor":
            return self._tensor(content, x)
        if kind in ("tuple", "size", "set"):
            return {"tuple": tuple, "size": torch.Size, "set": set}[kind](self.value(one) for one in content)
        makers: dict[str, Callable[[], Any]] = {
            "dict": lambda: {key: self.value(one) for key, one in content.items()},
            "items": lambda: {self.value(key): self.value(one) for key, one in content},
            "float": lambda: {"inf": float("inf"), "-inf": float("-inf"), "nan": float("nan")}[content],
            "array": lambda: self.tensors[content].numpy(),
            "dtype": lambda: _dtype(content),
            "path": lambda: Path(content),
            "function": lambda: listed(content, FUNCTIONS),
            "user_function": lambda: self._users(content),
        }
        if kind == "number" and len(x) == 1:
            return self.tensors[content].numpy()[()]
        return makers[kind]() if kind in makers else _NOTHING

    def _tensor(self, name: str, x: dict[str, Any]) -> Tensor:
        if "parameter" in x:
            if name not in self._parameters:
                self._parameters[name] = torch.nn.Parameter(self.tensors[name], bool(x["parameter"]))
            return self._parameters[name]
        return self.tensors[name].requires_grad_() if x.get("requires_grad") else self.tensors[name]

    def _object(self, kind: str, x: dict[str, Any]) -> Any:
        if kind in ("distribution", "transform", "constraint"):
            return made(kind, x[kind], {k: self.value(v) for k, v in x["arguments"].items()})
        if kind == "sample":
            return PyroSample(self.value(x["sample"]))
        if kind == "pickle":
            return self._unpickled(x["pickle"])
        if kind not in ("class", "user_class"):
            raise StorageError(f"the description of the stored objects has an unknown entry {kind!r}")
        cls = listed(x[kind]) if kind == "class" else self._users(x[kind])
        if "weights" in x:
            return self._constructed(cls, x)
        if "module" in x:
            return self._module(cls, x["module"])
        if "fields" in x:
            return cls(*(self.value(one) for one in x["fields"]))
        found = object.__new__(cls)
        vars(found).update({k: self.value(v) for k, v in x["state"].items()})
        return found

    def _constructed(self, cls: Any, x: dict[str, Any]) -> torch.nn.Module:
        if not hasattr(cls, "stored_arguments"):
            raise StorageError(f"{cls.__name__} is not described by arguments: the description was changed")
        with torch.random.fork_rng():
            found: torch.nn.Module = cls(**{k: self.value(v) for k, v in x["arguments"].items()})
        weights = self.value(x["weights"])
        # load_state_dict would cast single and double precision into each other
        found.to(next((w.dtype for w in weights.values() if w.is_floating_point()), torch.float32))
        found.load_state_dict(weights)
        return found.requires_grad_(bool(x["requires_grad"])).train(bool(x["training"]))

    def _module(self, cls: Any, parts: dict[str, Any]) -> torch.nn.Module:
        values = {
            kind: {name: self.value(one) for name, one in parts.get(kind, {}).items()}
            for kind in ("parameters", "buffers", "modules", "samples", "constrained", "attributes")
        }
        found = object.__new__(cls)
        if issubclass(cls, PyroModule):
            PyroModule.__init__(found)
            found._pyro_samples.update(values["samples"])
            found._pyro_params.update(values["constrained"])
        else:
            torch.nn.Module.__init__(found)
        found._parameters.update(values["parameters"])
        found._buffers.update(values["buffers"])
        found._non_persistent_buffers_set.update(parts.get("transient", []))
        for name, part in values["modules"].items():
            # this, and not the dictionary, tells Pyro's modules what they are called
            if isinstance(part, torch.nn.Module):
                found.add_module(name, part)
            else:
                found._modules[name] = None
        found.training = bool(parts.get("training", True))
        vars(found).update(values["attributes"])
        return found

    def _users(self, name: str) -> Any:
        """A class or function of code that is not this package's."""
        module, _, path = name.partition(":")
        if self.reader.module is None:
            raise NotTrusted(f"{path} of {module}")
        found = self.reader.module(module)
        for part in path.split("."):
            if not hasattr(found, part):
                raise StorageError(f"{module} has no {path}: it was changed since")
            found = getattr(found, part)
        return found

    def _unpickled(self, key: str) -> Any:
        name, known = self.pickles[key], self.reader.known
        same = [k for k, other in known.pickles.items() if other == name]
        equal = [k for k in same if torch.equal(known.tensors[k], self.tensors[key])]
        if equal or len(same) == 1:
            return known.objects[(equal or same)[0]]
        if not self.reader.unpickle:
            raise NotTrusted(f"a pickled {name}")
        return pickle.loads(self.tensors[key].numpy().tobytes())


_NOTHING = object()


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise StorageError(f"{name!r} is no type of numbers")
    return found
