"""What the stars say about formulas: likelihood with f(J) refitted, evidence, leave-one-out weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pyro.distributions import LogNormal
from torch import Tensor

from bayespot import diagnostics
from bayespot.catalog.catalog import Catalog
from bayespot.distill.formulas import PRIOR_SD, Formula
from bayespot.distill.target import Target
from bayespot.inference.fit import fit
from bayespot.inference.latent import LatentSpace
from bayespot.inference.result import FitConfig, FitError
from bayespot.likelihood.model import SnapshotModel
from bayespot.posterior.posterior import EnsemblePosterior, Posterior, PotentialDraws
from bayespot.potential.symbolic import SymbolicPotential
from bayespot.units import G

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Draws of the leave-one-out estimate.
LOO_DRAWS = 100


@dataclass(frozen=True)
class StarFit:
    """A potential's fit to the stars with f(J) fitted beside it.

    Parameters
    ----------
    ln_likelihood
        At the maximum a posteriori, summed over the stars.
    ln_evidence
        Laplace approximation over the potential's constants; f(J) stays at its maximum, as it does for every row.
    constants
        Posterior draws of a formula's constants by name, directly from the stars.
    pointwise : (n_draws, n_stars)
        ln p of every star in draws of the potential.
    """

    ln_likelihood: float
    ln_evidence: float
    constants: dict[str, NDArray[Any]]
    pointwise: NDArray[Any]


def stars_of(posterior: PotentialDraws, catalog: Catalog | None, most: int, seed: int) -> Catalog | None:
    """Return the stars that formulas are ranked with: of the catalogue, or those that a run keeps; at most so many.

    Raises
    ------
    ValueError
        If the catalogue is not the one that was fitted.
    """
    if catalog is None:
        kept = posterior.meta.get("w")
        # errors and selections need more than coordinates
        model, _ = posterior.source(0)
        if kept is None or not model.is_plain or len(model.streams):
            return None
        catalog = Catalog(torch.as_tensor(np.asarray(kept), dtype=torch.float64))
    elif len(catalog) != posterior.meta.get("n_stars", len(catalog)):
        raise ValueError(f"the catalogue has {len(catalog)} stars, the fit had {posterior.meta['n_stars']}")
    if len(catalog) > most:
        order = torch.randperm(len(catalog), generator=torch.Generator().manual_seed(seed))
        catalog = catalog[order[:most].sort().values]
    return catalog


def reference(posterior: PotentialDraws) -> Posterior:
    """Return the posterior itself, or the ensemble's member of the largest weight: formulas are compared with it."""
    if isinstance(posterior, EnsemblePosterior):
        return posterior.members[int(posterior.weights.argmax())]
    if not isinstance(posterior, Posterior):
        raise ValueError(
            f"formulas are ranked beside a Posterior or an ensemble of them, got {type(posterior).__name__}"
        )
    return posterior


def constant_prior(unit: str, target: Target) -> LogNormal:
    """Return the prior of a constant: a factor e^1.5 about the scale that the stars give its unit."""
    # without a unit a constant is in normalised ones
    scale = {"Msun": target.v_0**2 * target.r_0 / G, "kpc": target.r_0, "": 1.0}.get(unit, target.v_0**2)
    return LogNormal(torch.tensor(math.log(scale)).double(), torch.tensor(PRIOR_SD).double())


def formula_potential(formula: Formula, target: Target) -> SymbolicPotential:
    """Return a formula as a potential whose constants have priors: what a fit needs.

    An additive constant, of which no star knows, is set to zero.
    """
    import sympy

    from bayespot.potential.symbolic import parse

    expression = parse(formula.text).subs(sympy.Symbol("E0", positive=True), 0)
    used = {str(s) for s in expression.free_symbols}
    pairs = [(n, u) for n, u in zip(formula.constants, formula.units, strict=True) if n in used]
    start = {n: float(v) for n, v in zip(formula.constants, formula.best, strict=True) if n in used}
    return SymbolicPotential(str(expression), {n: constant_prior(u, target) for n, u in pairs}, start)


def with_potential(model: SnapshotModel, formula: Formula, target: Target) -> SnapshotModel:
    """Return the fitted model with a formula in place of its potential; f(J) keeps its family and size."""
    model = copy.copy(model)
    model._modules = dict(model._modules) | {"potential": formula_potential(formula, target)}
    return model


def fit_formula(formula: Formula, posterior: Posterior, target: Target, catalog: Catalog, seed: int = 0) -> StarFit:
    """Fit a formula's constants and f(J) to the stars (MAP and Laplace approximation).

    Raises
    ------
    FitError
        If the formula binds no stars or its likelihood is not finite.
    """
    model = with_potential(posterior.model, formula, target)
    config = FitConfig(
        seed=seed, guide="laplace", n_components=posterior.model.df.n_components, n_draws=2 * LOO_DRAWS, svi_steps=0,
        k_hat_draws=1,
    )  # fmt: skip
    result = fit(model, catalog, config, progress=False)
    constants = {
        name.removeprefix("potential."): value.numpy()
        for name, value in result.draws.items()
        if name.startswith("potential.")
    }
    return _star_fit(result.model, result.map, result.draws, catalog, constants, seed)


def fit_free_form(posterior: Posterior, catalog: Catalog, seed: int = 0) -> StarFit:
    """Return the same of the free-form model itself, from its posterior draws."""
    centre = {name: value.double().mean(0) for name, value in posterior.draws.items()}
    return _star_fit(posterior.model, centre, posterior.draws, catalog, {}, seed)


def _star_fit(
    model: SnapshotModel,
    centre: dict[str, Tensor],
    draws: dict[str, Tensor],
    catalog: Catalog,
    constants: dict[str, NDArray[Any]],
    seed: int,
) -> StarFit:
    model = model.select_at(centre, catalog, 16_384, seed)
    space = LatentSpace(model)
    data = model.prepare(catalog, seed)
    n = len(next(iter(draws.values())))
    vectors = torch.stack([space.vector({k: v[i] for k, v in draws.items()}) for i in range(n)])
    u, p = space.vector(centre), space.n_potential
    covariance = torch.cov(vectors[:, :p].T).reshape(p, p)
    posterior = float(space.log_posterior(u, data))
    ln_evidence = posterior + 0.5 * p * math.log(2 * math.pi) + 0.5 * float(torch.logdet(covariance))
    with torch.no_grad():
        rows = []
        for i in np.linspace(0, n - 1, min(LOO_DRAWS, n)).round().astype(int):
            # f(J) stays where it fits best, for formulas and the free form alike
            moved = torch.cat([vectors[i, :p], u[p:]])
            rows.append(space.log_likelihoods(moved, data))
        best = float(space.log_likelihoods(u, data).sum())
    return StarFit(best, ln_evidence, constants, torch.stack(rows).numpy())


@dataclass(frozen=True)
class Ranking:
    """Formulas' fits to the stars, in the order of the formulas; None where one was not fitted.

    ``weights`` are posterior probabilities of the formulas among those fitted, equal beforehand; ``loo`` maps the row
    (index of the formula, or ``"free form"``) to the leave-one-out results of `arviz.compare`.
    """

    fits: list[StarFit | None]
    free_form: StarFit
    weights: NDArray[Any]
    loo: dict[int | str, dict[str, float]]
    n_stars: int
    failures: list[str]

    def ordered(self, order: NDArray[Any]) -> Ranking:
        """Return the same with the formulas in another order."""
        places: dict[int | str, int | str] = {int(old): new for new, old in enumerate(order)}
        return Ranking(
            [self.fits[int(i)] for i in order],
            self.free_form,
            self.weights[order],
            {places.get(key, key): row for key, row in self.loo.items()},
            self.n_stars,
            self.failures,
        )


def rank(
    formulas: Sequence[Formula],
    posterior: Posterior,
    target: Target,
    catalog: Catalog,
    seed: int = 0,
    tick: Callable[[str], None] | None = None,
) -> Ranking:
    """Fit every formula to the stars and compare them with each other and with the free form."""
    free_form = fit_free_form(posterior, catalog, seed)
    fits: list[StarFit | None] = []
    failures = []
    for formula in formulas:
        if tick:
            tick(formula.text)
        try:
            fits.append(fit_formula(formula, posterior, target, catalog, seed))
        except (FitError, ValueError) as error:
            fits.append(None)
            failures.append(f"{formula.text}: not fitted to the stars ({error})")
    ln_evidence = np.array([one.ln_evidence if one else -np.inf for one in fits])
    weights = softmax(ln_evidence)
    rows: dict[int | str, NDArray[Any]] = {i: one.pointwise for i, one in enumerate(fits) if one}
    rows["free form"] = free_form.pointwise
    return Ranking(fits, free_form, weights, diagnostics.compare_loo(rows), len(catalog), failures)


def softmax(ln_evidence: NDArray[Any]) -> NDArray[Any]:
    """Return normalised weights of logarithms; zeros where all are minus infinity."""
    if not len(ln_evidence) or not np.isfinite(ln_evidence).any():
        return np.zeros(len(ln_evidence))
    weight = np.exp(ln_evidence - ln_evidence.max())
    return weight / weight.sum()
