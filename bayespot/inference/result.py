"""What goes into a fit and what comes out: settings, diagnostics and the result, all frozen."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from bayespot.df import DENSITIES, DensityName
from bayespot.df.components import Criterion
from bayespot.inference.guides import OrbitsFamily
from bayespot.likelihood.model import SnapshotModel

GuideName = Literal["full_rank", "low_rank", "mean_field", "laplace", "emulated", "marginal", "svgd", "nuts"]
_COUNTS = ("n_draws", "adam_steps", "map_iterations", "guide_rank", "nuts_chains", "nuts_warmup", "svgd_particles")
NO_EVIDENCE = (
    "members fitted by NUTS, SVGD or an emulator, or with k_hat_draws=0, have no evidence; weight them equally"
)
#: How the members of an ensemble are weighted.
Weighting = Literal["equal", "evidence"]


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
    component_choice
        How the data choose the number of components: ``"held_out"`` likelihood or ``"evidence"`` (complete samples
        without errors only).
    df
        Density of orbits in place of the model's own: ``"mixture"``, ``"gaussian"``, ``"gaussian_lnJ"``, ``"flow"``,
        ``"diffusion"``, ``"energy"`` or ``"logistic_gp"`` (`bayespot.df.DENSITIES`), with rotation if the model's has
        it.
    df_rounds
        Most rounds of training f(J) and maximising over the potential (`bayespot.inference.alternating`), for
        densities that are trained.
    guide
        How the posterior of the potential is found: a Gaussian guide, ``"full_rank"``, ``"low_rank"``,
        ``"mean_field"`` (too narrow by construction) or ``"laplace"`` (full rank, no SVI); ``"emulated"``, Hamiltonian
        Monte Carlo with an emulator of the likelihood (`bayespot.inference.emulator`), re-weighted by the exact
        posterior, for flattened potentials with complete samples; ``"marginal"``, f(J) integrated out by Laplace's
        method in each potential and these drawn by adaptive importance sampling (`bayespot.inference.marginal`), for
        spheres with ``df="logistic_gp"``; ``"svgd"``, particles, for up to three latents; ``"nuts"``, Hamiltonian Monte
        Carlo over all latents, the reference for small N. None: ``"emulated"`` where it can be, ``"marginal"`` where
        it can be and velocities given positions are fitted, else ``"full_rank"``.
    df_guide
        Guide over f(J): ``"point"`` (by the score identity it costs no width to first order), ``"mean_field"``,
        ``"low_rank"``, ``"full_rank"``, or ``"joint"``: one guide over the potential and f(J) together. None:
        ``"joint"`` with a selection or measurement errors, for which that identity does not hold, and for NUTS, else
        ``"point"``. NUTS and SVGD have ``"joint"`` or ``"point"`` (f(J) stays at its MAP).
    n_draws
        Posterior draws kept.
    adam_steps, adam_learning_rate
        Least number of Adam steps before L-BFGS and their learning rate.
    map_tolerance, map_iterations
        L-BFGS stops this many posterior standard deviations from the maximum, or after so many iterations.
    subset_size
        Of larger catalogues a random subset of that size decides on f(J), and the climb to the maximum goes through
        random subsets of a tenth of it and of it before it takes all stars.
    fisher_stars
        Most stars used for the Fisher matrix (scaled up).
    svi_steps, svi_learning_rate, svi_particles
        Steps of Adam on the ELBO, its initial learning rate in whitened coordinates (None: 0.03, or 0.5 / d where the
        guide's largest block has more than 16 latents, d), draws per step.
    batch_size
        Catalogues more than twice as large are scored in random minibatches of this size in SVI, with a control variate
        (`bayespot.inference.svi.Minibatches`); with measurement errors a star counts as many as it has samples.
    k_hat_draws
        Draws used for the PSIS diagnostic, the evidence and re-weighting, twice as many of an emulated posterior, four
        times as many where it has f(J) too; 0: without them. Of catalogues of more than
        80 000 stars a random 40 000 give the weights, corrected to first order (`LatentSpace.log_posterior_near`).
    selection_points, selection_max_points, selection_tolerance
        Points that normalise a selection near the maximum. They are doubled until others (in spheres twice as many)
        would move the mean of no parameter of the potential by more than the tolerance, in posterior standard
        deviations, or until the maximum.
    guide_rank
        Columns of W in a low-rank guide.
    nuts_chains, nuts_warmup
        Chains of NUTS, run one after the other with n_draws / nuts_chains draws each, and their adaptation steps.
    svgd_particles, svgd_steps
        Particles of SVGD, which are its draws, and steps of Adam.
    outliers
        Whether the likelihood has an outlier component (`bayespot.likelihood.outliers`); None: the model's own, or the
        default one where it costs nothing (not with a selection, a literal likelihood or a trained f(J)).
    start_scatter
        Standard deviation of a random displacement of the potential's starting values, in unconstrained
        coordinates: members of an ensemble start apart.
    """

    seed: int = 0
    n_components: int | None = None
    component_choice: Criterion = "held_out"
    df: DensityName | None = None
    df_rounds: int = 5
    guide: GuideName | None = None
    df_guide: OrbitsFamily | None = None
    n_draws: int = 1000
    adam_steps: int = 30
    adam_learning_rate: float = 0.05
    map_tolerance: float = 0.05
    map_iterations: int = 200
    subset_size: int = 100_000
    fisher_stars: int = 100_000
    svi_steps: int = 300
    svi_learning_rate: float | None = None
    svi_particles: int = 1
    batch_size: int = 20_000
    k_hat_draws: int = 200
    selection_points: int = 65_536
    selection_max_points: int = 524_288
    selection_tolerance: float = 0.05
    guide_rank: int = 4
    nuts_chains: int = 4
    nuts_warmup: int = 200
    svgd_particles: int = 50
    svgd_steps: int = 100
    outliers: bool | None = None
    start_scatter: float = 0.0

    def __post_init__(self) -> None:
        for name, choices in (
            ("guide", (None, *get_args(GuideName))),
            ("df_guide", (None, *get_args(OrbitsFamily))),
            ("df", (None, *DENSITIES)),
            ("component_choice", get_args(Criterion)),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}; got {getattr(self, name)!r}")
        if self.guide in ("nuts", "svgd") and self.df_guide not in (None, "point", "joint"):
            raise ValueError(f"{self.guide} takes df_guide 'joint' or 'point', got {self.df_guide!r}")
        if self.guide == "emulated" and self.df_guide not in (None, "point"):
            raise ValueError(f"emulated takes df_guide 'point', got {self.df_guide!r}: f(J) stays at its maximum")
        if self.guide == "marginal" and self.df_guide not in (None, "joint"):
            raise ValueError(f"marginal takes df_guide 'joint', got {self.df_guide!r}: f(J) is drawn in each potential")
        for name in (*_COUNTS, "subset_size", "fisher_stars", "batch_size", "df_rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.k_hat_draws < 0:
            raise ValueError(f"k_hat_draws must be positive, or 0 for none; got {self.k_hat_draws}")
        if self.svi_learning_rate is not None and not self.svi_learning_rate > 0:
            raise ValueError(f"svi_learning_rate must be positive; got {self.svi_learning_rate}")
        if self.svi_steps < 0 or self.svi_particles < 1:
            raise ValueError(f"svi_steps={self.svi_steps} and svi_particles={self.svi_particles} must be positive")


@dataclass(frozen=True)
class Diagnostics:
    """What a fit says about itself.

    ``gradient_norm`` is the distance of the MAP from the maximum in posterior standard deviations;
    ``k_hat`` the Pareto shape of the guide's importance weights (below 0.7 is good) and ``weight_fraction`` the
    effective fraction of the weighted draws. With measurement errors ``error_samples`` is the effective number, of
    ``n_error_samples``, per star (least, 5 % quantile, median), below 2 for ``n_poorly_sampled`` stars; with a
    selection ``selected_fraction`` is the fraction of the population it keeps, normalised with ``selection_points``
    points; others (in spheres twice as many) would move the result by ``selection_error`` posterior standard
    deviations. ``conditional`` says whether the likelihood was that of velocities given positions,
    ``projected`` whether these were on the sky and along the line of sight, and ``adaptive`` whether the amplitude of
    f(J)'s prior was inferred.
    ``angle_p_value`` is that of the phase-mixing test in the posterior mean potential
    (`bayespot.inference.phase_mixing`), of chi-square ``angle_statistic`` with ``angle_dof`` degrees,
    for catalogues without errors or selection. For these ``symmetry`` holds, by test (`bayespot.inference.symmetry`),
    ``directions`` and ``planes``, its ``statistic``, ``dof`` and ``p_value``, and ``potential_symmetry`` and
    ``df_symmetry`` what the model demands.
    ``log_evidence`` is the importance-sampling estimate of ln p(data) by the guide's draws, with f(J) at its point
    where its guide is one. For NUTS ``r_hat`` (largest) and ``ess`` (least, bulk) are of the potential's latents and of
    ln p, ``divergences`` the fraction of divergent transitions. ``narrowing`` is what the mean field does to the worst
    latent's standard deviation (`mean_field_narrowing`). ``df`` is the kind of f(J), ``df_rounds`` the rounds of
    training it (`bayespot.inference.alternating.Round`). ``outlier_fraction`` is the inferred fraction of stars
    that are no members (None: the model has no such component), ``n_outliers`` how many are so with a probability
    above 1/2, and ``outliers`` names the most likely (``row`` counted from 0, ``name``, ``probability``); unbound stars
    are counted among members only. ``finder_bias`` says what the Staeckel fudge's own error does to the result
    (`bayespot.inference.finder_bias.FinderBias`), where it was used; empty where actions are exact. ``guide`` is that
    of the fit. ``notes`` are what the stages had to say, ``warnings`` all that speaks against the result, in words
    (`bayespot.inference.verdict`).
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
    n_error_samples: int = 0
    n_poorly_sampled: int = 0
    selected_fraction: float | None = None
    selection_points: int = 0
    selection_error: float = 0.0
    conditional: bool = False
    projected: bool = False
    adaptive: bool = False
    angle_p_value: float | None = None
    angle_statistic: float | None = None
    angle_dof: int = 0
    symmetry: dict[str, dict[str, float]] = field(default_factory=dict)
    potential_symmetry: str = ""
    df_symmetry: str = ""
    n_stars: int = 0
    log_evidence: float | None = None
    weight_fraction: float | None = None
    r_hat: float | None = None
    ess: float | None = None
    divergences: float | None = None
    narrowing: float | None = None
    df: str = ""
    df_rounds: list[dict[str, float]] = field(default_factory=list)
    outlier_fraction: float | None = None
    n_outliers: int = 0
    outliers: list[dict[str, Any]] = field(default_factory=list)
    finder_bias: dict[str, Any] = field(default_factory=dict)
    guide: str = ""
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class FitResult:
    """A finished fit: the model with its components resolved, posterior draws, MAP and diagnostics.

    ``draws`` maps site names to tensors with a leading axis of draws, chain after chain where there are ``n_chains``.
    ``sample_stats`` holds per draw the log-density of the guide (``log_q``) and ``log_weights``, the Pareto-smoothed
    ln p - ln q of the draws for which it was computed, NaN for the others. ``outliers`` ``(n,)`` is the probability of
    each star to be an outlier, None if the model has no such component.
    """

    model: SnapshotModel
    draws: dict[str, Tensor]
    map: dict[str, Tensor]
    config: FitConfig
    diagnostics: Diagnostics
    catalog: dict[str, Any]
    sample_stats: dict[str, Tensor] = field(default_factory=dict)
    n_chains: int = 1
    outliers: Tensor | None = None


@dataclass(frozen=True)
class EnsembleResult:
    """The members of an ensemble.

    ``weighting`` says how much each counts: ``"equal"``, or ``"evidence"``, in proportion to the importance-sampling
    estimate of their evidence, exp(``log_evidence``). The latter is exact only for members with the same number of
    components of f(J) and a joint guide, as a point mass has no volume, and with evidences that differ by several nats
    it leaves one member.
    """

    members: list[FitResult]
    weighting: Weighting = "equal"

    @property
    def weights(self) -> list[float]:
        """Weights of the members; they add up to one."""
        if self.weighting == "equal":
            return [1 / len(self.members)] * len(self.members)
        evidence = [member.diagnostics.log_evidence for member in self.members]
        if any(value is None for value in evidence):
            raise ValueError(NO_EVIDENCE)
        return torch.tensor(evidence, dtype=torch.float64).softmax(0).tolist()
