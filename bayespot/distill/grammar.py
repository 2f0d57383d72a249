"""What a search may build formulas from, and the settings of a distillation."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from bayespot.distill.target import GAUGES, Gauge
from bayespot.units import takes

#: Powers of length and time of everything that carries units.
UNITS: dict[str, tuple[int, int]] = {
    "r": (1, 0), "y": (2, -2), "GM": (3, -2), "V2": (2, -2), "E0": (2, -2), "b": (1, 0), "c": (1, 0), "1": (0, 0),
}  # fmt: skip
#: Where the search starts a constant, in normalised units; two lengths must start apart to become different.
START: dict[str, float] = {"GM": 1.0, "V2": 1.0, "E0": 0.1, "b": 1.0, "c": 0.5}
#: Operators that a family may use, as physo calls them.
OPERATORS = ("add", "sub", "mul", "div", "inv", "n2", "n3", "sqrt", "log", "exp")
_ALGEBRA = ("add", "sub", "mul", "div", "n2", "sqrt")


@dataclass(frozen=True)
class Family:
    """A part of the space of formulas that is searched on its own.

    Parameters
    ----------
    name
        How it is asked for.
    operators
        Of `OPERATORS`.
    constants
        Of `START`.
    prefix
        Head of every formula in prefix notation: ``("div", "GM")`` is GM over a length.
    gauge
        Gauge of the family, whatever the configuration says; None: the configuration's.
    vanishes
        Whether its formulas can tend to zero at infinity, so that this may be asked of them.

    Raises
    ------
    ValueError
        If an operator or constant is unknown.
    """

    name: str
    operators: tuple[str, ...] = _ALGEBRA
    constants: tuple[str, ...] = ("GM", "b", "c")
    prefix: tuple[str, ...] = ()
    gauge: Gauge | None = None
    vanishes: bool = True

    def __post_init__(self) -> None:
        for kind, given, known in (
            ("operator", self.operators, OPERATORS),
            ("constant", self.constants, tuple(START)),
            ("token of the prefix", self.prefix, (*self.operators, *self.constants, "r")),
        ):
            if unknown := [name for name in given if name not in known]:
                raise ValueError(f"unknown {kind} {unknown[0]!r} in family {self.name}; choose {', '.join(known)}")


#: Families by name. The prefix makes an isochrone likely; a logarithmic potential needs its own gauge.
FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family("kepler", prefix=("div", "GM")),
        Family("kepler_log", (*_ALGEBRA, "log"), prefix=("mul", "GM")),
        Family("algebraic"),
        Family("logarithm", (*_ALGEBRA, "log")),
        Family("exponential", (*_ALGEBRA, "exp")),
        Family("flat", (*_ALGEBRA, "log"), ("V2", "b", "c"), ("mul", "V2"), "offset", False),
        Family("offset", constants=("E0", "GM", "b", "c"), prefix=("add", "E0", "div", "GM"), vanishes=False),
    )
}
DEFAULT_FAMILIES = ("kepler", "logarithm", "flat", "algebraic")


@takes(budget_minutes="minutes")
@dataclass(frozen=True)
class DistillConfig:
    """Every number of a distillation; saved beside its result.

    Parameters
    ----------
    seed
        Seed of everything random.
    families
        Names of `FAMILIES`, or families of your own.
    mode
        ``"mean"``: search on the posterior mean, constants then refitted to every draw; ``"class"``: Class SR, one
        form for `class_draws` draws with constants of their own.
    budget_minutes
        Wall-clock time of all searches together.
    budget_epochs
        Epochs per search instead: the result is then the same on every run.
    searches
        Searches per family; None: as many as give each about 25 s of the budget, or 4 with ``budget_epochs``.
    batch_size, max_length
        Formulas per epoch and their greatest length in tokens.
    gauge
        ``"absolute"``: Phi; ``"offset"``: Phi - Phi(r_0); ``"force"``: v_c^2.
    n_radii, class_draws
        Radii of the target, and draws of Class SR.
    units, asymptote, density, centre, complexity
        Physics in the search: dimensions must agree; Phi tends to 0 (offset, force: to a constant); no negative
        density; no point mass at the centre; short formulas are likelier. Each may be switched off.
    max_candidates
        Most distinct formulas that are fitted and listed.
    max_ranked, max_stars
        Most formulas whose likelihood is computed from the stars, and most stars used for it.

    Raises
    ------
    ValueError
        If a setting is unknown, or a budget, number or length is not positive.
    """

    seed: int = 0
    families: tuple[str | Family, ...] = DEFAULT_FAMILIES
    mode: Literal["mean", "class"] = "mean"
    budget_minutes: float | None = 5.0
    budget_epochs: int | None = None
    searches: int | None = None
    batch_size: int = 1000
    max_length: int = 12
    gauge: Gauge = "absolute"
    n_radii: int = 40
    class_draws: int = 16
    units: bool = True
    asymptote: bool = True
    density: bool = True
    centre: bool = True
    complexity: bool = True
    max_candidates: int = 40
    max_ranked: int = 8
    max_stars: int = 20_000

    def __post_init__(self) -> None:
        if self.mode not in ("mean", "class"):
            raise ValueError(f"mode must be mean or class, got {self.mode!r}")
        if self.gauge not in GAUGES:
            raise ValueError(f"gauge must be one of {', '.join(GAUGES)}, got {self.gauge!r}")
        if not self.families:
            raise ValueError(f"families is empty: choose of {', '.join(FAMILIES)}")
        self.resolved()
        if self.budget_epochs is None and self.budget_minutes is None:
            raise ValueError("give a budget: budget_minutes or budget_epochs")
        for name in (
            "budget_minutes", "budget_epochs", "searches", "batch_size", "class_draws", "max_candidates", "max_ranked",
            "max_stars",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value:g}")
        if self.max_length < 5 or self.n_radii < 10:
            raise ValueError(f"max_length={self.max_length} must be at least 5 and n_radii={self.n_radii} at least 10")

    def resolved(self) -> tuple[Family, ...]:
        """Return the families themselves."""
        found = []
        for family in self.families:
            if isinstance(family, str) and family not in FAMILIES:
                raise ValueError(f"unknown family {family!r}; choose of {', '.join(FAMILIES)}")
            found.append(FAMILIES[family] if isinstance(family, str) else family)
        return tuple(found)

    def gauge_of(self, family: Family) -> Gauge:
        """Return the gauge in which a family is searched."""
        return family.gauge or self.gauge

    def forbidden(self, faults: Iterable[str], gauge: Gauge) -> list[str]:
        """Return those of a formula's faults that the settings forbid.

        Phi tending to zero at infinity is asked in the absolute gauge only.
        """
        return [f for f in faults if getattr(self, f) and not (f == "asymptote" and gauge != "absolute")]

    def summary(self) -> dict[str, Any]:
        """Return the settings as plain data."""
        from dataclasses import asdict

        plain = asdict(self)
        return plain | {"families": [f if isinstance(f, str) else asdict(f) for f in self.families]}
