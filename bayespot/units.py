"""Internal units (kpc, km/s, Msun) and the boundary where quantities with units enter.

Inside the package every number is a plain float64 tensor in these units; astropy units are attached or
removed only where data enter or leave (catalogues, arguments of public functions, result tables, plots). What enters
passes `plain`: a plain number, array or tensor counts as given in the internal unit, one with a unit is converted, and
one with a unit of the wrong kind is refused. `takes` and `takes_tensors` declare it of a function's arguments.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from astropy import units as u

F = TypeVar("F", bound=Callable[..., Any])

#: Gravitational constant in kpc (km/s)^2 / Msun: astropy.constants.G (CODATA 2018) over IAU 2015 GM_sun,
#: kept as a number so that importing bayespot does not import astropy; a test compares the two.
G = 4.300917270036279e-06

#: Unit strings (astropy syntax) of every quantity the package writes.
UNITS: dict[str, str] = {
    "r": "kpc",
    "potential": "km2 / s2",
    "acceleration": "km2 / (s2 kpc)",
    "radial_acceleration": "km2 / (s2 kpc)",
    "acceleration_R": "km2 / (s2 kpc)",
    "acceleration_z": "km2 / (s2 kpc)",
    "vertical_acceleration": "km2 / (s2 kpc)",
    "density": "Msun / kpc3",
    "surface_density": "Msun / kpc2",
    "enclosed_mass": "Msun",
    "circular_speed": "km / s",
    "vertical_frequency": "km / (s kpc)",
    "epicycle_frequency": "km / (s kpc)",
    "density_flattening": "",
    "potential_flattening": "",
    "density_slope": "",
    "sigma_los": "km / s",
    "beta": "",
    "J_factor": "GeV2 / cm5",
    "D_factor": "GeV / cm2",
    "action": "kpc km / s",
    "frequency": "km / (s kpc)",
    "time": "kpc s / km",
}

#: Unit strings (astropy syntax) of every quantity the package takes; empty: a number without a unit.
TAKEN: dict[str, str] = {
    "length": "kpc",
    "mass": "Msun",
    "speed": "km / s",
    "time": "kpc s / km",
    "action": "kpc km / s",
    "potential": "km2 / s2",
    "density": "Msun / kpc3",
    "surface_density": "Msun / kpc2",
    "angle": "deg",
    "phase": "rad",
    "proper_motion": "mas / yr",
    "parallax": "mas",
    "magnitude": "mag",
    "minutes": "min",
    "number": "",
}
#: What one unit cannot describe, and what to give instead.
MIXED: dict[str, str] = {
    "phase_space": "holds positions in kpc and velocities in km/s, which no single unit describes: stack "
    "x.to_value('kpc') and v.to_value('km/s') along the last axis, or build a Catalog from a table with units",
    "internal": "holds numbers in the internal units (kpc, km/s, Msun): give them without a unit",
}
#: Base units of the internal system: a quantity of any kind is one number in them.
_BASES = ("kpc", "kpc s / km", "Msun", "rad")


def unit(quantity: str) -> u.UnitBase:
    """Return the astropy unit in which bayespot writes ``quantity``.

    Parameters
    ----------
    quantity
        A key of `UNITS`, for instance ``"density"``.

    Raises
    ------
    ValueError
        If the quantity is unknown.
    """
    from astropy import units as u

    if quantity not in UNITS:
        raise ValueError(f"unknown quantity {quantity!r}; choose one of {', '.join(UNITS)}")
    return u.Unit(UNITS[quantity])


def plain(value: Any, quantity: str, name: str) -> Any:
    """Return a value without units, in the internal unit of its kind.

    Numbers, arrays and tensors without units are returned as they are, and so is what is not numerical (None, a
    distribution). Quantities and columns of tables become numpy numbers or arrays; lists, tuples and arrays of
    objects are converted element by element.

    Parameters
    ----------
    value
        What the caller gave.
    quantity
        A key of `TAKEN` or `MIXED`; ``"any"``: whatever kind the value's own unit is of, in the system kpc, km/s, Msun
        and rad; or a unit in astropy's syntax.
    name
        Name of the argument, for messages.

    Raises
    ------
    ValueError
        If the unit is of another kind, is not astropy's, or a value is masked, complex or a date.

    Examples
    --------
    >>> from astropy import units as u
    >>> plain(8000 * u.pc, "length", "r"), plain(8.0, "length", "r"), plain([1.0, 20 * u.pc], "length", "r")
    (8.0, 8.0, [1.0, 0.02])
    """
    if value is None or isinstance(value, Tensor | float | int):
        return value
    if isinstance(value, str | bytes):
        raise ValueError(f"{name} must be numbers{_wanted(quantity)} or a Quantity, got the text {value!r}")
    if type(value) is np.ndarray:
        return _array(value, quantity, name)
    if isinstance(value, list | tuple):
        found = [plain(item, quantity, name) for item in value]
        if all(new is old for new, old in zip(found, value, strict=True)):
            return value
        return type(value)(*found) if hasattr(value, "_fields") else type(value)(found)
    given = _unit_of(value, quantity, name)
    if given is not None:
        return _to_internal(value, given, quantity, name)
    if hasattr(value, "__array__"):
        return _array(value, quantity, name)
    if type(value).__module__.startswith("astropy"):  # coordinates and times
        raise ValueError(f"{name} must be numbers{_wanted(quantity)} or a Quantity, got a {type(value).__name__}")
    return value


def tensor(value: Any, quantity: str, name: str) -> Tensor:
    """Return a value as a tensor of floating-point numbers in the internal unit of its kind; see `plain`.

    Tensors of floating-point numbers are returned as they are, with their graph; all else becomes float64.

    Raises
    ------
    ValueError
        As `plain`, or if the value is not numerical.

    Examples
    --------
    >>> tensor([1, 2], "length", "r")
    tensor([1., 2.], dtype=torch.float64)
    """
    if isinstance(value, Tensor):
        return value if value.is_floating_point() else value.double()
    found = plain(value, quantity, name)
    if isinstance(found, list | tuple) and any(isinstance(item, Tensor) for item in found):
        return torch.stack([tensor(item, quantity, name) for item in found])
    try:
        return torch.as_tensor(np.array(found, dtype=float))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be numbers{_wanted(quantity)}, got {value!r}") from error


# ---------------------------------------------------------------------------------------- declared of functions


def takes(**kinds: str) -> Callable[[F], F]:
    """Declare the kinds of a function's or class's arguments: each passes `plain` before the call.

    Parameters
    ----------
    **kinds
        A key of `TAKEN` or `MIXED`, or ``"any"``, by the argument's name.

    Examples
    --------
    >>> from astropy import units as u
    >>> @takes(r="length")
    ... def in_kpc(r):
    ...     return r
    >>> in_kpc(8000 * u.pc)
    8.0
    >>> in_kpc(8 * u.s)
    Traceback (most recent call last):
    ...
    ValueError: r is a length and cannot be in s: give it in kpc, or in another unit of this kind
    """
    return functools.partial(_declared, convert=plain, kinds=kinds)


def takes_tensors(**kinds: str) -> Callable[[F], F]:
    """Declare the kinds of arguments that are tensors: each passes `tensor` before the call; see `takes`."""
    return functools.partial(_declared, convert=tensor, kinds=kinds)


class Declared:
    """A class whose subclasses' methods take the kinds of arguments that the methods they override declare."""

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        for name, method in list(vars(cls).items()):
            if not inspect.isfunction(method) or hasattr(method, "__takes__"):
                continue
            overridden: Any = next((vars(base)[name] for base in cls.__mro__[1:] if name in vars(base)), None)
            if hasattr(overridden, "__takes__"):
                # by place, since the subclass may have another name for it
                own, theirs = (list(inspect.signature(f).parameters) for f in (method, overridden))
                places = {theirs.index(old): kind for old, kind in overridden.__takes__.items()}
                kinds = {own[i]: kind for i, kind in places.items() if i < len(own)}
                setattr(cls, name, _declared(method, convert=overridden.__convert__, kinds=kinds))


def _declared(function: Any, convert: Callable[[Any, str, str], Any], kinds: dict[str, str]) -> Any:
    if inspect.isclass(function):
        function.__init__ = _declared(function.__init__, convert, kinds)  # type: ignore[method-assign]
        return function
    places = list(inspect.signature(function).parameters)
    where = [(places.index(name), name, kind) for name, kind in kinds.items()]
    unknown = set(kinds.values()) - {*TAKEN, *MIXED, "any"}
    if unknown:
        raise ValueError(f"unknown quantity {unknown} of {function.__qualname__}; choose one of {', '.join(TAKEN)}")

    @functools.wraps(function)
    def checked(*args: Any, **keywords: Any) -> Any:
        for i, name, kind in where:
            if i < len(args):
                if not isinstance(args[i], Tensor) or not args[i].is_floating_point():
                    args = (*args[:i], _given(convert, args[i], kind, name), *args[i + 1 :])
            elif name in keywords:
                keywords[name] = _given(convert, keywords[name], kind, name)
        return function(*args, **keywords)

    # of both decorators, where they are stacked
    checked.__takes__ = getattr(function, "__takes__", {}) | kinds  # type: ignore[attr-defined]
    checked.__convert__ = convert  # type: ignore[attr-defined]
    return checked


def _given(convert: Callable[[Any, str, str], Any], value: Any, kind: str, name: str) -> Any:
    return None if value is None else convert(value, kind, name)


# ---------------------------------------------------------------------------------------- conversion


def _unit_of(value: Any, quantity: str, name: str) -> Any:
    """Return the unit that a value comes with, astropy's or a string in its syntax; None without."""
    if type(value).__module__.startswith("pandas"):
        return None  # attributes are columns or labels there
    given = getattr(value, "unit", None)
    if given is None:
        given = getattr(value, "units", None)  # xarray's attribute, and what other packages call it
    if given is None or isinstance(given, str) or hasattr(given, "physical_type"):
        return given
    if hasattr(value, "__array__") or hasattr(value, "magnitude"):
        package = type(value).__module__.split(".")[0]
        raise ValueError(
            f"{name} comes in {given} of {package}'s: give an astropy Quantity, or the numbers alone{_wanted(quantity)}"
        )
    return None


def _to_internal(value: Any, given: Any, quantity: str, name: str) -> Any:
    from astropy import units as u

    if quantity in MIXED:
        raise ValueError(f"{name} comes in {given}, but {MIXED[quantity]}")
    numbers = _array(getattr(value, "value", value), quantity, name)
    try:
        old = u.Unit(given)
        if quantity == "any":
            new = old.decompose(bases=[u.Unit(base) for base in _BASES])
            new = new / new.scale
        else:
            new = u.Unit(TAKEN.get(quantity, quantity))
        # no equivalencies, whichever the caller has switched on: a parallax is no length here
        found = old.to(new, numbers, equivalencies=None)
    except (ValueError, TypeError) as error:
        what = _label(quantity)
        if not what:
            raise ValueError(
                f"{name} is a number without a unit and cannot be in {given}: give the number alone"
            ) from error
        raise ValueError(
            f"{name} is {what} and cannot be {f'in {given}' if str(given) else 'dimensionless'}: "
            f"give it{_wanted(quantity)}, or in another unit of this kind"
        ) from error
    return float(found) if np.ndim(found) == 0 else np.asarray(found)


def _array(value: Any, quantity: str, name: str) -> Any:
    """Return an array's numbers as they are, of objects converted one by one; nothing masked, complex or dated."""
    if isinstance(value, np.ma.MaskedArray) or hasattr(value, "unmasked"):
        mask = np.asarray(value.mask)
        if mask.any():
            raise ValueError(f"{name} has {mask.sum()} masked of {mask.size} values: fill or drop them")
        value = value.data if isinstance(value, np.ma.MaskedArray) else value.unmasked
    numbers = value if type(value) is np.ndarray else np.asarray(value)
    if numbers.dtype.kind in "fiub":
        return numbers[()] if isinstance(value, np.generic) else numbers
    if numbers.dtype.kind == "O" and numbers.ndim:
        return np.array([plain(item, quantity, name) for item in numbers.flat], dtype=float).reshape(numbers.shape)
    raise ValueError(f"{name} must be numbers{_wanted(quantity)}, got {numbers.dtype} values")


def _label(quantity: str) -> str:
    """Return a kind in words, with its article; empty for numbers without a unit."""
    if quantity == "any":
        return "a quantity of lengths, speeds, masses and angles"
    if not TAKEN.get(quantity, quantity):
        return ""
    if quantity not in TAKEN:
        return f"a value in {quantity}"
    words = {"phase": "angle", "minutes": "time"}.get(quantity, quantity.replace("_", " "))
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _wanted(quantity: str) -> str:
    found = TAKEN.get(quantity, "" if quantity in (*MIXED, "any") else quantity)
    return f" in {found}" if found else ""
