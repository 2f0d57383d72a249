"""Potentials given by a formula: a sympy expression of r with named constants."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from bayespot.potential.analytic import Value
from bayespot.potential.base import Potential, Symmetry, radius
from bayespot.units import G, plain, unit

if TYPE_CHECKING:
    import sympy

#: Functions that a formula may contain, by their sympy name.
FUNCTIONS = ("sqrt", "log", "exp", "sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "tanh", "asinh", "Abs")
#: Symbols that are not constants of a formula: radius in kpc and the gravitational constant in internal units.
RESERVED = ("r", "G")


class SymbolicPotential(Potential):
    r"""Spherical potential :math:`\Phi(r)` given by a formula with named constants.

    Parameters
    ----------
    expression
        :math:`\Phi` in (km/s)^2 as sympy syntax or expression: of ``r`` in kpc, the constants, and ``G``, the
        gravitational constant in kpc (km/s)^2/Msun.
    constants
        A number, astropy Quantity, ``torch.nn.Parameter`` or distribution (then a Pyro sample site) by name; numbers
        are in the system kpc, km/s, Msun and rad. Where every constant has a unit that of the formula is checked.
    start
        Where a fit starts, for constants with a prior; the prior's centre by default.

    Raises
    ------
    ValueError
        If the expression cannot be read, has a symbol without a value, a constant does not appear in it, or the
        constants' units do not make it a potential.

    Examples
    --------
    >>> potential = SymbolicPotential("-G*M/(b + sqrt(b**2 + r**2))", {"M": 1e11, "b": 3.0})
    >>> round(potential.circular_speed(torch.tensor(8.0, dtype=torch.float64)).item(), 3)  # km/s
    155.483
    """

    symmetry: Symmetry = "spherical"

    def __init__(
        self,
        expression: str | sympy.Expr,
        constants: Mapping[str, Value],
        start: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        formula = parse(expression)
        self.names = tuple(constants)
        _check_names(formula, self.names, type(self))
        # kept as text: compiled functions cannot be saved
        self.formula_text = str(formula)
        _check_units(formula, constants)
        for name, value in constants.items():
            self._set_parameter(name, value)
        self._start = {
            name: torch.as_tensor(plain(value, "any", f"start of {name}"), dtype=torch.float64)
            for name, value in (start or {}).items()
        }

    @property
    def expression(self) -> sympy.Expr:
        r""":math:`\Phi` as a sympy expression of positive symbols."""
        return parse(self.formula_text)

    def phi(self, x: Tensor) -> Tensor:
        return self.phi_r(radius(x))

    def phi_r(self, r: Tensor) -> Tensor:
        value = compiled(self.formula_text, self.names)(r, *(getattr(self, name) for name in self.names))
        return value if value.shape == r.shape else value + torch.zeros_like(r)

    def initial_values(self) -> dict[str, Tensor]:
        """Return the given starting values of constants with a prior."""
        return {name: value.clone() for name, value in self._start.items() if name in self._pyro_samples}

    def values(self) -> dict[str, float]:
        """Return the constants as numbers.

        Raises
        ------
        ValueError
            If a constant has a prior instead of a value.
        """
        free = [name for name in self.names if name in self._pyro_samples]
        if free:
            raise ValueError(f"{', '.join(free)} have a prior, not a value: fix them first (Posterior.potential_at)")
        return {name: float(torch.as_tensor(getattr(self, name)).detach()) for name in self.names}

    # -- export ------------------------------------------------------------------------------------------

    def latex(self) -> str:
        r"""Return the formula as LaTeX, :math:`\Phi(r) = \dots`, without numbers for the constants."""
        import sympy

        return rf"\Phi(r) = {sympy.latex(self.expression)}"

    def python(self, name: str = "phi") -> str:
        r"""Return the source of a function of ``r`` (kpc; numpy or number) for :math:`\Phi` in (km/s)^2."""
        from sympy.printing.numpy import NumPyPrinter

        printer = NumPyPrinter({"fully_qualified_modules": True})
        body = printer.doprint(_with_log1p(self.expression)).replace("numpy.", "np.")
        given = {"G": G, **self.values()}
        used = [n for n in given if any(str(s) == n for s in self.expression.free_symbols)]
        arguments = ", ".join(["r", *(f"{n}={given[n]!r}" for n in used)])
        doc = '"""Phi in (km/s)^2 at r in kpc."""'
        return f"import numpy as np\n\n\ndef {name}({arguments}):\n    {doc}\n    return {body}\n"


@functools.lru_cache(maxsize=4096)
def raw(text: str) -> sympy.Expr:
    """Return a formula of symbols of any sign; see `parse`."""
    import sympy
    from sympy.parsing.sympy_parser import parse_expr, standard_transformations

    # the parser evaluates Python: nothing but arithmetic, names and calls may reach it
    if "__" in text or not re.fullmatch(r"[\w\s+\-*/().,]*", text) or re.search(r"[A-Za-z_]\w*\.", text):
        raise ValueError(f"not a formula: {text!r}; use + - * / ** ( ), numbers, names and {', '.join(FUNCTIONS)}")
    names: dict[str, Any] = {name: getattr(sympy, name) for name in FUNCTIONS} | {"pi": sympy.pi}
    known = names | {name: getattr(sympy, name) for name in ("Integer", "Float", "Rational", "Symbol", "Function")}
    try:
        found = parse_expr(text, names, standard_transformations, {**known, "__builtins__": {}})
    except Exception as error:  # the parser raises whatever Python's own does
        raise ValueError(f"not a formula in sympy's syntax: {text!r} ({error})") from error
    if not isinstance(found, sympy.Expr):
        raise ValueError(f"a formula is one expression of r and constants, got {text!r}")
    return found


def parse(expression: str | sympy.Expr) -> sympy.Expr:
    """Return a formula whose symbols are all positive, with sympy's immediate simplifications.

    Raises
    ------
    ValueError
        If the text is not a formula, is not real, or calls a function that is not among `FUNCTIONS`.
    """
    import sympy

    found = _positive(raw(expression) if isinstance(expression, str) else expression)
    if found.has(sympy.I, sympy.zoo, sympy.nan, sympy.oo):
        raise ValueError(f"not a real, finite formula for positive r and constants: {expression}")
    unknown = {str(f.func) for f in found.atoms(sympy.core.function.AppliedUndef)}
    if unknown:
        raise ValueError(f"unknown function {', '.join(sorted(unknown))} in {expression}; use {', '.join(FUNCTIONS)}")
    return found


def _positive(expression: sympy.Expr) -> sympy.Expr:
    import sympy

    return expression.subs({s: sympy.Symbol(str(s), positive=True) for s in expression.free_symbols})


@functools.lru_cache(maxsize=1024)
def compiled(text: str, names: tuple[str, ...]) -> Callable[..., Tensor]:
    """Return a torch function of (r, *constants) for a formula; tensors broadcast."""
    import sympy

    expression = parse(text).subs(sympy.Symbol("G", positive=True), sympy.Float(G, 17))
    expression = _with_log1p(expression)
    arguments = [sympy.Symbol(name, positive=True) for name in ("r", *names)]
    functions = {
        "sqrt": torch.sqrt, "log": torch.log, "log1p": torch.log1p, "exp": torch.exp, "sin": torch.sin,
        "cos": torch.cos, "tan": torch.tan, "asin": torch.asin, "acos": torch.acos, "atan": torch.atan,
        "sinh": torch.sinh, "cosh": torch.cosh, "tanh": torch.tanh, "asinh": torch.asinh, "Abs": torch.abs,
    }  # fmt: skip
    call = sympy.lambdify(arguments, expression, modules=[{n: _lifted(f) for n, f in functions.items()}, "math"])

    def evaluate(r: Tensor, *constants: Tensor) -> Tensor:
        return torch.as_tensor(call(r, *constants), dtype=r.dtype)

    return evaluate


def _lifted(function: Callable[[Tensor], Tensor]) -> Callable[[Any], Tensor]:
    """Let a torch function take numbers as well: a formula may contain sqrt(2)."""
    return lambda value: function(torch.as_tensor(value, dtype=torch.float64))


def _with_log1p(expression: sympy.Expr) -> sympy.Expr:
    """Write log(1 + x) as log1p(x), which keeps its digits where x is small."""
    import sympy
    from sympy.codegen.cfunctions import log1p

    return expression.replace(
        lambda e: isinstance(e, sympy.log) and e.args[0].is_Add and e.args[0].has(1) and 1 in e.args[0].args,
        lambda e: log1p(e.args[0] - 1),
    )


def _check_units(formula: sympy.Expr, constants: Mapping[str, Value]) -> None:
    """Raise ValueError if every constant has a unit and the formula with these is not in (km/s)^2."""
    if not constants or not all(hasattr(value, "unit") for value in constants.values()):
        return
    import sympy
    from astropy import constants as physical
    from astropy import units as u

    given = {"r": 1.0 * u.kpc, "G": physical.G, **constants}
    call = sympy.lambdify(list(formula.free_symbols), formula, "numpy")
    try:
        with np.errstate(all="ignore"):
            u.Quantity(call(*(given[str(symbol)] for symbol in formula.free_symbols))).to(unit("potential"))
    except (u.UnitsError, TypeError) as error:
        units = ", ".join(f"{name} in {given[name].unit}" for name in constants)
        raise ValueError(
            f"{formula} is not a potential with r in kpc and {units}: {error}; correct the units or give numbers alone"
        ) from error


def _check_names(formula: sympy.Expr, names: tuple[str, ...], cls: type) -> None:
    symbols = {str(s) for s in formula.free_symbols}
    for name in names:
        if name in RESERVED or hasattr(cls, name) or not name.isidentifier():
            raise ValueError(f"a constant cannot be called {name!r}; choose another name")
    missing = sorted(symbols - set(names) - set(RESERVED))
    if missing:
        raise ValueError(f"{', '.join(missing)} in {formula} have no value: give each constant a number or a prior")
    if unused := sorted(set(names) - symbols):
        raise ValueError(f"the constants {', '.join(unused)} do not appear in {formula}")
    if "r" not in symbols:
        raise ValueError(f"{formula} does not depend on r: no force follows from it")
