"""From objects to data: a JSON description and the tensors that it names, in one safetensors file."""

from __future__ import annotations

import hashlib
import json
import math
import pickle
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pyro.nn import PyroModule, PyroSample
from torch import Tensor

from bayespot.files import file_digest
from bayespot.storage.classes import is_listed, is_listed_function, name_of
from bayespot.storage.distributions import parts_of
from bayespot.storage.errors import StorageError

FORMAT = "2"
#: Attributes that torch and Pyro keep for themselves: made anew when a module is read.
_FRAMEWORK = set(vars(PyroModule(""))) | set(vars(torch.nn.Module()))


@dataclass
class Written:
    """Objects as data.

    ``code`` are the files of code by others than this package that reading needs, by module name, and ``pickles`` the
    classes of objects that are kept as pickles: either needs trust to be read.
    """

    description: Any = None
    tensors: dict[str, Tensor] = field(default_factory=dict)
    code: dict[str, str] = field(default_factory=dict)
    pickles: dict[str, str] = field(default_factory=dict)
    #: The objects of ``pickles`` themselves.
    objects: dict[str, Any] = field(default_factory=dict)

    def digest(self) -> str:
        """Return a SHA-256 of description and tensors."""
        total = hashlib.sha256(self._json().encode())
        for tensor in self.tensors.values():
            total.update(_bytes(tensor))
        return total.hexdigest()

    def _json(self) -> str:
        return json.dumps({"content": self.description, "code": self.code, "pickles": self.pickles}, allow_nan=False)

    def to_bytes(self) -> bytes:
        """Return the safetensors file."""
        import safetensors.torch

        metadata = {"bayespot": FORMAT, "description": self._json()}
        return safetensors.torch.save({k: v.detach().cpu().contiguous() for k, v in self.tensors.items()}, metadata)


def describe(content: Any, root: str = "model") -> Written:
    """Return objects as data; ``root`` is what messages call them.

    Raises
    ------
    StorageError
        Names the part that cannot be stored, and what to do.
    """
    encoder = _Encoder()
    encoder.written.description = encoder.value(content, root)
    return encoder.written


def write(content: Any, path: Path, root: str = "model") -> Written:
    """Write objects to a safetensors file; see `describe`."""
    written = describe(content, root)
    path.write_bytes(written.to_bytes())
    return written


class _Encoder:
    """Walks through objects; those that appear twice are described once."""

    def __init__(self) -> None:
        self.written = Written()
        self._seen: dict[int, int] = {}
        self._named: dict[int, str] = {}
        # ids are of living objects only
        self._alive: list[Any] = []

    def value(self, x: Any, path: str) -> Any:
        """Return the description of anything."""
        if x is None or isinstance(x, bool) or type(x) in (int, str):
            return x
        if type(x) is float:
            return x if math.isfinite(x) else {"float": str(x)}
        if isinstance(x, Tensor):
            return self._tensor(x)
        if isinstance(x, np.ndarray | np.generic):
            return {"array" if isinstance(x, np.ndarray) else "number": self._store(torch.as_tensor(np.array(x)), x)}
        if isinstance(x, torch.dtype):
            return {"dtype": str(x).removeprefix("torch.")}
        if isinstance(x, Path):
            return {"path": str(x)}
        return self._container(x, path)

    def _container(self, x: Any, path: str) -> Any:
        if type(x) is list:
            return [self.value(one, f"{path}[{i}]") for i, one in enumerate(x)]
        if type(x) in (tuple, set, frozenset, torch.Size):
            kind = "size" if type(x) is torch.Size else "tuple" if type(x) is tuple else "set"
            ordered = sorted(x) if kind == "set" else x
            return {kind: [self.value(one, f"{path}[{i}]") for i, one in enumerate(ordered)]}
        if isinstance(x, dict) and type(x).__module__ in ("builtins", "collections"):
            if all(isinstance(key, str) for key in x):
                return {"dict": {key: self.value(one, f"{path}.{key}") for key, one in x.items()}}
            return {"items": [[self.value(k, path), self.value(one, f"{path}[{k!r}]")] for k, one in x.items()]}
        if isinstance(x, types.FunctionType | types.BuiltinFunctionType | type | np.ufunc):
            return self._function(x, path)
        if id(x) in self._seen:
            return {"same": self._seen[id(x)]}
        number = self._seen[id(x)] = len(self._seen)
        self._alive.append(x)
        return {**self._object(x, path), "number": number}

    def _tensor(self, x: Tensor) -> dict[str, Any]:
        found: dict[str, Any] = {"tensor": self._store(x, x)}
        if isinstance(x, torch.nn.Parameter):
            found["parameter"] = x.requires_grad
        elif x.requires_grad and x.is_leaf:
            found["requires_grad"] = True
        return found

    def _store(self, x: Tensor, key: Any) -> str:
        if id(key) not in self._named:
            name = self._named[id(key)] = f"t{len(self.written.tensors)}"
            self._alive.append(key)
            self.written.tensors[name] = x.detach().clone()
        return self._named[id(key)]

    def _function(self, x: Any, path: str) -> dict[str, Any]:
        if is_listed_function(x):
            return {"function": name_of(x)}
        name = getattr(x, "__qualname__", "<lambda>")
        if "<" in name or getattr(x, "__module__", None) is None:
            raise StorageError(
                f"{path} is {'a lambda' if 'lambda' in name else 'a function inside another'}, which no file can "
                "store: define it with def at the top of a .py file, and import it from there"
            )
        self._note_code(x, path)
        return {"user_function": name_of(x)}

    def _object(self, x: Any, path: str) -> dict[str, Any]:
        if (parts := parts_of(x)) is not None:
            kind, name, arguments = parts
            return {kind: name, "arguments": {k: self.value(v, f"{path}.{k}") for k, v in arguments.items()}}
        if isinstance(x, PyroSample):
            return {"sample": self.value(x.prior, path)}
        cls = type(x)
        if not is_listed(cls):
            if cls.__module__ == "__main__":
                raise StorageError(_main_message(path, cls.__qualname__))
            if not self._is_simple(x):
                return self._pickle(x, path)
            self._note_code(cls, path)
        found = {"class" if is_listed(cls) else "user_class": name_of(cls)}
        if hasattr(x, "stored_arguments"):
            arguments = x.stored_arguments()
            return found | {
                "arguments": {k: self.value(v, f"{path}.{k}") for k, v in arguments.items()},
                "weights": self.value(dict(x.state_dict()), path),
                "training": x.training,
                "requires_grad": any(p.requires_grad for p in x.parameters()),
            }
        if isinstance(x, torch.nn.Module):
            return found | {"module": self._module(x, path)}
        if isinstance(x, tuple):
            return found | {"fields": [self.value(one, f"{path}[{i}]") for i, one in enumerate(x)]}
        return found | {"state": {k: self.value(v, f"{path}.{k}") for k, v in vars(x).items()}}

    def _module(self, x: torch.nn.Module, path: str) -> dict[str, Any]:
        parts: dict[str, Any] = {
            "parameters": x._parameters,
            "buffers": x._buffers,
            "transient": sorted(x._non_persistent_buffers_set),
            "modules": x._modules,
            "samples": vars(x).get("_pyro_samples", {}),
            "constrained": vars(x).get("_pyro_params", {}),
            "attributes": {k: v for k, v in vars(x).items() if k not in _FRAMEWORK},
        }
        found = {
            kind: {k: self.value(v, f"{path}.{k}") for k, v in values.items()} if isinstance(values, dict) else values
            for kind, values in parts.items()
            if values
        }
        return found | ({} if x.training else {"training": False})

    def _is_simple(self, x: Any) -> bool:
        """Whether a user's object is its attributes and nothing else."""
        cls = type(x)
        if isinstance(x, torch.nn.Module):
            return _is_users(cls)
        own = any(name in vars(c) for c in cls.__mro__[:-1] for name in ("__reduce__", "__getstate__", "__slots__"))
        named = isinstance(x, tuple) and hasattr(x, "_fields")
        plain = hasattr(x, "__dict__") and not own and not isinstance(x, tuple | dict | list)
        return _is_users(cls) and (named or plain)

    def _pickle(self, x: Any, path: str) -> dict[str, Any]:
        name = name_of(type(x))
        try:
            raw = pickle.dumps(x, protocol=4)
        except Exception as error:  # pickling calls the object's own code, which raises whatever it likes
            raise StorageError(
                f"{path} is a {type(x).__name__} of {type(x).__module__}, which cannot be stored ({error}); a sphere "
                "can as a TabulatedSphere, other parts as classes of a .py file"
            ) from error
        if b"__main__" in raw:
            raise StorageError(_main_message(path, type(x).__qualname__))
        key = f"pickle{len(self.written.pickles)}"
        self.written.tensors[key] = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
        self.written.pickles[key] = name
        self.written.objects[key] = x
        return {"pickle": key}

    def _note_code(self, thing: Any, path: str) -> None:
        import sys

        module = thing.__module__
        if module == "__main__":
            raise StorageError(_main_message(path, thing.__qualname__))
        source = getattr(sys.modules.get(module), "__file__", None)
        self.written.code[module] = "" if source is None or not Path(source).exists() else file_digest(Path(source))


def _is_users(cls: type) -> bool:
    """Whether a class is of a user's own code: neither of this package nor of an installed one."""
    import sys
    import sysconfig

    source = getattr(sys.modules.get(cls.__module__), "__file__", None)
    if source is None or cls.__module__.split(".")[0] == "bayespot":
        return False
    places = (sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), sysconfig.get_path("stdlib"))
    return not any(Path(source).is_relative_to(place) for place in places)


def _main_message(path: str, name: str) -> str:
    return (
        f"{path} is of {name}, which is defined in the script or notebook that runs (__main__): nobody could read it "
        f"back. Move {name} to a file of its own, for instance mymodel.py, and import it from there"
    )


def _bytes(x: Tensor) -> bytes:
    return x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes() if x.numel() else b""
