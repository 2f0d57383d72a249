"""Formulas rewritten: signs, numbers and scales in one form, constants fewer or in other units."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from bayespot.distill.grammar import UNITS
from bayespot.distill.target import FAR, Gauge
from bayespot.potential.symbolic import compiled, parse, raw

if TYPE_CHECKING:
    import sympy


class Candidate(NamedTuple):
    """A formula for y of x and constants in normalised units, before it is fitted."""

    text: str
    constants: dict[str, float]
    gauge: Gauge
    source: str


def canonical(text: str, constants: dict[str, float]) -> tuple[str, dict[str, float]]:
    """Return a formula of positive constants with rational numbers, and the constants' absolute values.

    An only length is called b.

    Raises
    ------
    ValueError
        If it is not real for constants of these signs.

    Examples
    --------
    >>> canonical("(GM/(((c)**(2))+r)**(0.5))", {"GM": 1.0, "c": -2.0})
    ('GM/sqrt(b**2 + r)', {'GM': 1.0, 'b': 2.0})
    """
    import sympy

    # signs first: a square root of a negative constant's product must not be taken apart
    signed = {
        sympy.Symbol(name): (-1 if value < 0 else 1) * sympy.Symbol(name, positive=True)
        for name, value in constants.items()
    }
    expression = parse(sympy.nsimplify(raw(text).subs(signed, simultaneous=True), rational=True))
    used = {str(s) for s in expression.free_symbols}
    found = {name: abs(value) for name, value in constants.items() if name in used}
    if "c" in found and "b" not in found:
        # an only length is b, whichever of the two the search took
        b, c = (sympy.Symbol(name, positive=True) for name in ("b", "c"))
        expression, found = expression.subs(c, b), {"b" if name == "c" else name: v for name, v in found.items()}
    return str(expression), found


def complexity(text: str) -> int:
    """Return the number of nodes of an expression."""
    return _nodes(parse(text))


def tidy(text: str, names: Sequence[str]) -> str:
    """Return the shortest equivalent that sympy's simplifications and a change of scale of constants reach."""
    import sympy

    best = parse(text)
    attempts = (sympy.together, sympy.factor_terms, sympy.simplify, sympy.radsimp)
    for attempt in attempts:
        found = sympy.nsimplify(attempt(best), rational=True)
        if _nodes(found) < _nodes(best):
            best = found
    for _ in range(4):
        trials = [best]
        for name in names:
            symbol = sympy.Symbol(name, positive=True)
            for factor in (2, 3, 4, sympy.sqrt(2), sympy.sqrt(3)):
                for scale in (factor, 1 / sympy.sympify(factor)):
                    scaled = best.subs(symbol, scale * symbol)
                    trials += [scaled, sympy.together(scaled)]
        shortest = min(trials, key=_nodes)
        if _nodes(shortest) >= _nodes(best):
            break
        best = shortest
    return str(best)


def _nodes(expression: sympy.Expr) -> int:
    import sympy

    return sum(1 for _ in sympy.preorder_traversal(expression))


def plausible(candidates: Sequence[Candidate], most: int) -> list[Candidate]:
    """Return at most so many different texts in the given order, with positive constants."""
    found: dict[tuple[str, str], Candidate] = {}
    for candidate in candidates:
        try:
            text, constants = canonical(candidate.text, candidate.constants)
        except (ValueError, TypeError, ZeroDivisionError):
            continue
        if "r" not in {str(s) for s in parse(text).free_symbols} or not all(0 < v < 1e6 for v in constants.values()):
            continue
        key = (text, candidate.gauge)
        if key in found:
            sources = f"{found[key].source} {candidate.source}"
            found[key] = found[key]._replace(source=sources)
        else:
            found[key] = Candidate(text, constants, candidate.gauge, candidate.source)
    return list(found.values())[:most]


def by_mass(one: Candidate, gauge: Gauge) -> Candidate:
    """Return a formula that vanishes at infinity in a gauge, with GM = V2 b in place of V2: one with those of GM.

    Examples
    --------
    >>> by_mass(Candidate("V2*b*log(1 + r/b)/r", {"V2": 2.0, "b": 0.5}, "offset", "flat:1"), "absolute")[:3]
    ('GM*log(1 + r/b)/r', {'b': 0.5, 'GM': 1.0}, 'absolute')
    """
    import sympy

    if not vanishes(one):
        return one
    lengths = [name for name in ("b", "c") if name in one.constants]
    if "V2" not in one.constants or not lengths:
        return one._replace(gauge=gauge)
    V2, GM = (sympy.Symbol(name, positive=True) for name in ("V2", "GM"))
    forms = {
        name: sympy.factor_terms(parse(one.text).subs(V2, GM / sympy.Symbol(name, positive=True))) for name in lengths
    }
    best = min(forms, key=lambda name: _nodes(forms[name]))
    constants = {name: value for name, value in one.constants.items() if name != "V2"}
    mass = one.constants["V2"] * one.constants[best]
    return Candidate(str(forms[best]), constants | {"GM": mass}, gauge, one.source)


def without_constant(one: Candidate) -> Candidate:
    """Return a formula that tends to a constant at infinity without the constant, of which no star knows.

    V2 r/(b + r) and -V2 b/(b + r) are one potential: their forces are equal.

    Examples
    --------
    >>> without_constant(Candidate("-V2*r/(b + r)", {"V2": 2.0, "b": 0.5}, "offset", "flat:1")).text
    'V2*b/(b + r)'
    >>> without_constant(Candidate("E0 + GM/r", {"E0": 0.1, "GM": 1.0}, "absolute", "offset:1"))[:2]
    ('GM/r', {'GM': 1.0})
    """
    import sympy

    near, far, farther = _at(one, 1.0, *FAR)
    size = abs(near - farther)
    if not (abs(farther - far) < 1e-3 * size and abs(farther) >= 1e-3 * abs(near)):
        # no limit, or none that is not zero
        return one
    expression, r = parse(one.text), sympy.Symbol("r", positive=True)
    try:
        limit = sympy.limit(expression, r, sympy.oo)
    except (NotImplementedError, ValueError, TypeError, RecursionError):
        # it stays as it is; beside a twin it is still found to be one with it
        return one
    value = limit.subs({sympy.Symbol(name, positive=True): v for name, v in one.constants.items()})
    if not value.is_number or not abs(complex(value) - farther) < 1e-2 * size:
        return one
    rest = expression - limit
    forms = [attempt(rest) for attempt in (sympy.factor_terms, sympy.together, sympy.simplify)]
    # sympy also writes V2 log(x) as log(x**V2)
    best = min((form for form in forms if not _has_exponents(form)), key=_nodes, default=rest)
    used = {str(symbol) for symbol in best.free_symbols}
    if "r" not in used:
        return one
    return one._replace(text=str(best), constants={n: v for n, v in one.constants.items() if n in used})


def varying(one: Candidate) -> Candidate:
    """Return the terms of a formula that depend on r, whatever units they leave.

    Examples
    --------
    >>> varying(Candidate("E0 - V2*log(r)", {"E0": 0.1, "V2": 1.0}, "absolute", "offset:1"))[:2]
    ('-V2*log(r)', {'V2': 1.0})
    """
    import sympy

    rest = parse(one.text).as_independent(sympy.Symbol("r", positive=True), as_Add=True)[1]
    used = {str(symbol) for symbol in rest.free_symbols}
    return one._replace(text=str(rest), constants={n: v for n, v in one.constants.items() if n in used})


def _has_exponents(expression: sympy.Expr) -> bool:
    """Say whether a constant with a velocity's unit is in an exponent."""
    import sympy

    symbols = {str(s) for power in expression.atoms(sympy.Pow) for s in power.exp.free_symbols}
    return bool(symbols & {"GM", "V2", "E0"})


def vanishes(one: Candidate) -> bool:
    """Say whether a formula tends to zero at infinity."""
    near, _, farther = _at(one, 1.0, *FAR)
    return abs(farther) < 1e-3 * abs(near)


def _at(one: Candidate, *radii: float) -> list[float]:
    values = [torch.tensor(value, dtype=torch.float64) for value in one.constants.values()]
    r = torch.tensor(radii, dtype=torch.float64)
    return [float(v) for v in compiled(one.text, tuple(one.constants))(r, *values).expand(len(radii))]


def tied(candidates: Sequence[Candidate], most: int) -> list[Candidate]:
    """Return formulas of two lengths with one of them a small multiple of the other: one constant fewer.

    A search finds the isochrone as GM/(b + sqrt(c^2 + r^2)) more readily than with b = c.
    """
    import sympy

    b, c = (sympy.Symbol(name, positive=True) for name in ("b", "c"))
    tied = []
    for one in candidates:
        if not {"b", "c"} <= set(one.constants):
            continue
        ratio = one.constants["c"] / one.constants["b"]
        for factor in (1, 2, sympy.Rational(1, 2)):
            if 0.5 < ratio / float(factor) < 2:
                text = str(parse(one.text).subs(c, factor * b))
                constants = {name: value for name, value in one.constants.items() if name != "c"}
                tied.append(Candidate(text, constants, one.gauge, one.source))
    return plausible(tied, most)


@functools.cache
def homogeneous(text: str, names: tuple[str, ...]) -> bool:
    """Say whether a formula scales as a velocity squared when r and its constants scale by their units."""
    length, time = 1.7, 0.6
    fn = compiled(text, names)
    r = torch.tensor([0.7, 1.3, 2.9], dtype=torch.float64)
    values = [torch.tensor(0.3 + 0.41 * j, dtype=torch.float64) for j in range(len(names))]
    scaled = [v * length ** UNITS[n][0] * time ** UNITS[n][1] for v, n in zip(values, names, strict=True)]
    here, there = fn(r, *values), fn(r * length, *scaled)
    return bool(torch.allclose(there, here * (length / time) ** 2, rtol=1e-9, equal_nan=True))
