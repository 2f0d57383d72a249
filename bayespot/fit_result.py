"""What goes into a fit and what comes out: settings, diagnostics and the result, all frozen."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from bayespot.guides import OrbitsFamily
from bayespot.model import SnapshotModel


class FitError(RuntimeError):
    """A fit that cannot go on; the message says why and what to do."""


@dataclass(frozen=True)
class FitConfig:
    """Every number of a fit; saved beside its result.

    Parameters
    ----------
    seed
        Seed of everything random. The same seed, data and machine give the same numbers.
    n_components
        Components of f(J); None takes the model's number or, when it has none, the data's choice
        (`bayespot.df.choose_n_components`).
    guide
        Guide over the potential: ``"full_rank"``, ``"mean_field"`` or ``"laplace"`` (no SVI).
    df_guide
        Guide over f(J): ``"point"`` (by the score identity it costs no width to first order), ``"mean_field"``,
        ``"full_rank"``, or ``"joint"``: one guide over the potential and f(J) together. None: ``"joint"`` with a
        selection or measurement errors, for which that identity does not hold, else ``"point"``.
    n_draws
        Posterior draws kept.
    adam_steps, adam_learning_rate
        Least number of Adam steps before L-BFGS and their learning rate.
    map_tolerance, map_iterations
        L-BFGS stops this many posterior standard deviations from the maximum, or after so many iterations.
    subset_size
        Catalogues larger than this are first fitted on a random subset of that size.
    fisher_stars
        Most stars used for the Fisher matrix (scaled up).
    svi_steps, svi_learning_rate, svi_particles
        Steps of Adam on the ELBO, its initial learning rate in whitened coordinates, draws per step.
    batch_size
        Larger catalogues are scored in random minibatches of this size in SVI.
    k_hat_draws
        Draws used for the PSIS diagnostic.
    selection_points, selection_max_points, selection_tolerance
        Points that normalise a selection near the maximum. They are doubled until twice as many, and others, would
        move no parameter of the potential by more than the tolerance, in posterior standard deviations, or until
        the maximum.
    """

    seed: int = 0
    n_components: int | None = None
    guide: Literal["full_rank", "mean_field", "laplace"] = "full_rank"
    df_guide: OrbitsFamily | None = None
    n_draws: int = 1000
    adam_steps: int = 30
    adam_learning_rate: float = 0.05
    map_tolerance: float = 0.05
    map_iterations: int = 200
    subset_size: int = 100_000
    fisher_stars: int = 100_000
    svi_steps: int = 300
    svi_learning_rate: float = 0.03
    svi_particles: int = 1
    batch_size: int = 100_000
    k_hat_draws: int = 100
    selection_points: int = 131_072
    selection_max_points: int = 524_288
    selection_tolerance: float = 0.1

    def __post_init__(self) -> None:
        for name, choices in (
            ("guide", ("full_rank", "mean_field", "laplace")),
            ("df_guide", (None, "point", "mean_field", "full_rank", "joint")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}; got {getattr(self, name)!r}")
        for name in ("n_draws", "adam_steps", "map_iterations", "subset_size", "fisher_stars", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.svi_steps < 0 or self.svi_particles < 1:
            raise ValueError(f"svi_steps={self.svi_steps} and svi_particles={self.svi_particles} must be positive")


@dataclass(frozen=True)
class Diagnostics:
    """What a fit says about itself.

    ``gradient_norm`` is the distance of the MAP from the maximum in posterior standard deviations;
    ``k_hat`` the Pareto shape of the guide's importance weights (below 0.7 is good). With measurement errors
    ``error_samples`` is the effective number of samples per star (least, 5 % quantile, median); with a selection
    ``selected_fraction`` is the fraction of the population it keeps, normalised with ``selection_points`` points;
    twice as many would move the result by ``selection_error`` posterior standard deviations.
    ``angle_p_value`` is that of the phase-mixing test in the posterior mean potential (`angle_statistic`), for
    catalogues without errors or selection.
    """

    elbo: list[float]
    gradient_norm: float
    n_unbound: int
    k_hat: float
    n_components: int
    component_table: list[dict[str, float]]
    map_iterations: int
    seconds: dict[str, float]
    warnings: list[str]
    error_samples: list[float] | None = None
    selected_fraction: float | None = None
    selection_points: int = 0
    selection_error: float = 0.0
    angle_p_value: float | None = None


@dataclass(frozen=True)
class FitResult:
    """A finished fit: the model with its components resolved, posterior draws, MAP and diagnostics.

    ``draws`` maps site names to tensors with a leading axis of draws; ``sample_stats`` holds the
    log-density of the guide (``log_q``) per draw.
    """

    model: SnapshotModel
    draws: dict[str, Tensor]
    map: dict[str, Tensor]
    config: FitConfig
    diagnostics: Diagnostics
    catalog: dict[str, Any]
    sample_stats: dict[str, Tensor] = field(default_factory=dict)
