"""One search for formulas with physo; the only module that imports it."""

from __future__ import annotations

import contextlib
import copy
import io
import math
import multiprocessing
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayespot.distill.grammar import START, UNITS, DistillConfig, Family
from bayespot.distill.least_squares import levenberg_marquardt
from bayespot.distill.search import Found, Search
from bayespot.distill.target import Metric, Target, shape_of

#: Formulas that a search keeps.
KEPT = 60
#: A search ends after so many epochs without a better formula once one lies within the posterior.
PATIENCE = 8
#: Before that it starts afresh after so many: on draws of an isochrone 8 of 8 searches then needed 5 epochs on average,
#: where 2 of 8 single starts of 14 epochs did.
STUCK = 4


def search(target: Target, family: Family, config: DistillConfig, seed: int, seconds: float | None = None) -> Search:
    """Search one family with physo from one seed.

    Parameters
    ----------
    target
        Posterior of the potential.
    family, config
        What may be used, and how.
    seed
        Of numpy's and torch's global generators, which are restored.
    seconds
        Wall-clock limit; None: ``config.budget_epochs`` alone.
    """
    physo = _physo()
    run = _Run(physo, target, family, config, seconds)
    with _seeded(seed), _quiet(), contextlib.suppress(_Finished):
        while True:
            with contextlib.suppress(_Stuck):
                run.start()
    return Search(family.name, seed, run.epochs, time.perf_counter() - run.begun, run.best())


class _Finished(Exception):
    """Raised out of physo's loop when the budget is spent."""


class _Stuck(Exception):
    """Raised out of physo's loop when nothing better comes: a fresh start finds more than patience does."""


class _Run:
    """One run of physo: logger, visualiser, reward and optimiser of constants in one object."""

    def __init__(
        self, physo: Any, target: Target, family: Family, config: DistillConfig, seconds: float | None
    ) -> None:
        self.physo, self.target, self.family, self.config, self.seconds = physo, target, family, config, seconds
        self.gauge = config.gauge_of(family)
        self.metric: Metric = target.metric(self.gauge)
        self.rows = torch.as_tensor(self.metric.rows)
        n_draws = len(self.metric.draws)
        index = np.linspace(0, n_draws - 1, min(config.class_draws, n_draws)).round().astype(int)
        draws = self.metric.draws[index] if config.mode == "class" else self.metric.mean[None]
        #: What each realisation is compared with, (K, k).
        self.wanted = torch.as_tensor(draws)
        #: Size of the target in posterior standard deviations.
        self.scale = float(np.sqrt((self.metric.mean**2).mean()))
        self.asked = [
            name
            for name in ("density", "asymptote", "centre")
            if getattr(config, name) and (name != "asymptote" or family.vanishes)
        ]
        self.kept: dict[str, Found] = {}
        self.epochs, self.begun = 0, time.perf_counter()
        #: Least misfit of all, and of the current start; when it last fell.
        self.least, self.here, self.improved = math.inf, math.inf, 0

    # -- what physo calls --------------------------------------------------------------------------------

    def residual(self, y: Tensor) -> Tensor:
        """Return residuals ``(*batch, K, k)`` in posterior sd of values ``(*batch, K, n_nodes)``."""
        return y @ self.rows.T - self.wanted

    def reward(self, y_target: Tensor, y_pred: Tensor, y_weights: Any = 1.0) -> float:
        """Return a reward in [0, 1]: 1/(1 + misfit in sd over the size of the target), less for every fault."""
        y = self._values(y_pred.detach())
        misfit = float((self.residual(y) ** 2).mean())
        if not math.isfinite(misfit):
            return 0.0
        # within the posterior a better fit is no better formula
        value = 1 / (1 + math.sqrt(1 + misfit) / self.scale)
        if self.asked:
            shape = shape_of(y.mean(0).numpy(), len(self.target.x))
            faults = shape.faults(self.gauge)
            for name in self.asked:
                if faults[name]:
                    # a slope towards fewer negative densities; a wrong limit is simply wrong
                    value *= 0.7 - 0.4 * shape.negative_density if name == "density" else 0.5
        return value

    def loss(self, func: Callable[[Any], Tensor], params: Any, y_target: Tensor, y_weights: Any = 1.0) -> Tensor:
        """Return the formula's values ``(*batch, K, n_nodes)``; `optimise` makes residuals of them."""
        return self._values(func(params))

    def optimise(self, params: list[Tensor], f: Callable[[Any], Tensor], **_: Any) -> np.ndarray[Any, Any]:
        """Fit the constants of one formula in place, each realisation's own in class mode."""
        by_class = self.config.mode == "class"
        kept = params[1].data if by_class else params[0].data
        tensor = params[1] if by_class else params[0]
        start = kept[0].T.clone() if by_class else kept.clone()

        def residual(c: Tensor) -> Tensor:
            if by_class:
                values = []
                for one in c:
                    tensor.data = one.T[None]
                    values.append(f(params))
                return self.residual(torch.stack(values))
            # constants (p, B, 1) broadcast against the radii: one evaluation for the whole batch
            tensor.data = c.movedim(-1, 0)[None]
            y = f(params)
            return self.residual(y if y.dim() == 3 else y.expand(len(c), 1, self.rows.shape[1]))

        try:
            minimum = levenberg_marquardt(residual, start, iterations=12, tolerance=1e-4)
        finally:
            tensor.data = kept
        good = torch.isfinite(minimum.residual).all()
        if good:
            kept.copy_(minimum.parameters.T[None] if by_class else minimum.parameters)
        return np.zeros(1)

    def _values(self, y: Tensor) -> Tensor:
        n = self.rows.shape[1]
        if self.config.mode == "class":
            return y.reshape(-1, n) if y.numel() > 1 else y.expand(len(self.wanted), n)
        if y.dim() == 1:
            return y[None] if len(y) == n else y.expand(1, n)
        if y.dim() == 0:
            return y.expand(1, n)
        return y[:, None, :] if y.shape[-1] == n else y[:, None, :].expand(-1, 1, n)

    def log(self, epoch: int, batch: Any, model: Any, rewards: Any, **_: Any) -> None:
        """Keep the best formulas of an epoch."""
        self.epochs += 1
        misfits = []
        for i in np.argsort(rewards)[::-1][:KEPT]:
            if rewards[i] <= 0:
                break
            program = batch.programs.get_prog(i, detach=True)
            text = program.get_infix_str()
            # what the reward hides: the misfit without penalties
            y = self._values(
                program(batch.dataset.multi_X_flatten, n_samples_per_dataset=batch.dataset.n_samples_per_dataset)
            )
            misfit = float((self.residual(y.detach()) ** 2).mean())
            misfits.append(misfit)
            if text in self.kept and not misfit < self.kept[text].misfit:
                continue
            table = program.free_consts
            values = table.spe_values[0].mean(-1) if self.config.mode == "class" else table.class_values[0]
            names = sorted(self.family.constants)
            constants = {name: float(values[j]) for j, name in enumerate(names) if name in _tokens(program)}
            self.kept[text] = Found(text, constants, misfit, program.size)
        best = min(misfits, default=math.inf)
        if best < 0.99 * self.here:
            self.here, self.improved = best, self.epochs
        self.least = min(self.least, best)

    def visualise(self, run_logger: Any, batch: Any) -> None:
        """End the run when its budget is spent, or when nothing better comes."""
        late = self.seconds is not None and time.perf_counter() - self.begun > self.seconds
        full = self.config.budget_epochs is not None and self.epochs >= self.config.budget_epochs
        idle = self.epochs - self.improved
        if late or full or (self.least < 1 and idle >= PATIENCE):
            raise _Finished
        if self.least >= 1 and idle >= STUCK:
            self.here, self.improved = math.inf, self.epochs
            raise _Stuck

    def best(self) -> list[Found]:
        """Return the formulas kept: the shortest of every misfit first, then by misfit."""
        ranked = sorted(self.kept.values(), key=lambda f: (f.length, f.misfit))
        front, least = [], math.inf
        for one in ranked:
            if one.misfit < least:
                front.append(one)
                least = one.misfit
        rest = sorted((f for f in ranked if f not in front), key=lambda f: f.misfit)
        return (front + rest)[:KEPT]

    # -- set-up ------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Run physo until `_Finished` is raised."""
        free_const = self.physo.physym.free_const
        free_const.OPTIMIZERS["levenberg_marquardt"] = self.optimise
        free_const.LOSSES["values"] = self.loss
        names = sorted(self.family.constants)
        units = [[*UNITS[name], 0] for name in names] if self.config.units else None
        nodes = self.target.nodes[None]
        by_class = self.config.mode == "class"
        n_realisations = len(self.wanted)
        constants = {
            "consts_names": names,
            "consts_units": units or [[0, 0, 0]] * len(names),
            "consts_init_val": [START[name] for name in names],
        }
        kind = "spe_free_" if by_class else "class_free_"
        self.physo.ClassSR(
            [nodes] * n_realisations,
            [np.ones(nodes.shape[1])] * n_realisations,
            [1.0] * n_realisations,
            X_names=["r"],
            X_units=[[*UNITS["r"], 0]] if units else [[0, 0, 0]],
            y_name="y",
            y_units=[*UNITS["y"], 0] if units else [0, 0, 0],
            fixed_consts=[1.0],
            fixed_consts_units=[[0, 0, 0]],
            **{f"{kind}{key}": value for key, value in constants.items()},
            op_names=list(self.family.operators),
            use_protected_ops=False,
            stop_reward=2.0,
            epochs=10**9,
            run_config=self.run_config(),
            get_run_logger=lambda: self,
            get_run_visualiser=lambda: self,
            parallel_mode=False,
        )

    def run_config(self) -> dict[str, Any]:
        """Return physo's configuration: that of config0b with the settings of PhySO's measured recipe."""
        config, family = self.config, self.family
        # the stock configuration is changed by every run
        found = copy.deepcopy(self.physo.config.config0b.config0b)
        found["reward_config"].update(
            reward_function=self.reward, zero_out_unphysical=config.units, zero_out_duplicates=True
        )
        found["learning_config"].update(
            batch_size=config.batch_size, max_time_step=config.max_length, observe_units=config.units
        )
        found["free_const_opti_args"] = {"loss": "values", "method": "levenberg_marquardt", "method_args": {}}
        once = [name for name in ("GM", "V2", "E0") if name in family.constants]
        priors: list[tuple[str, Any]] = [
            ("HardLengthPrior", {"min_length": max(3, len(family.prefix) + 1), "max_length": config.max_length}),
            ("NoUselessInversePrior", None),
            ("OccurrencesPrior", {"targets": once, "max": [1] * len(once)}),
        ]
        if config.complexity:
            # physo's "scale" is a variance; the isochrone's tenth token comes with e^-2.5
            priors.append(("SoftLengthPrior", {"length_loc": 4, "scale": 5}))
        if config.units:
            priors.append(("PhysicalUnitsPrior", {"prob_eps": float(np.finfo(np.float32).eps)}))
        for name in ("log", "exp"):
            if name in family.operators:
                priors.append(("NestedFunctions", {"functions": [name], "max_nesting": 1}))
        if family.prefix:
            priors.append(("SymbolicPrior", {"expression": list(family.prefix)}))
        found["priors_config"] = priors
        return found


def _tokens(program: Any) -> set[str]:
    return {str(token) for token in program.tokens}


def _physo() -> Any:
    """Import physo, and undo what its import does to the process: start method, printing, font sizes."""
    import matplotlib

    method = multiprocessing.get_start_method(allow_none=True)
    with _quiet(), matplotlib.rc_context():
        import physo
        import physo.config.config0b
    multiprocessing.set_start_method(method, force=True)
    return physo


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the global generators, which physo draws from, set the dtype that it takes for granted, and restore all."""
    state, dtype = np.random.get_state(), torch.get_default_dtype()  # noqa: NPY002
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        # its network mixes the default with arrays of this one
        torch.set_default_dtype(torch.float32)
        np.random.seed(seed)  # noqa: NPY002
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)
            np.random.set_state(state)  # noqa: NPY002
