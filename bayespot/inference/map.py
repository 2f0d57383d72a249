"""The climb to the maximum a posteriori: information and a selection's points laid anew where it comes to a halt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from bayespot.catalog.catalog import Catalog
from bayespot.inference.blocks import stars_in
from bayespot.inference.emulator import Emulator
from bayespot.inference.latent import LatentSpace, whitening
from bayespot.inference.linearised import (
    AtFixedActions,
    Responder,
    fraction_slope,
    gauss_newton,
    responds,
    uphill,
)
from bayespot.inference.membership import outlier_probability
from bayespot.inference.optimise import Report, displacement, lbfgs
from bayespot.inference.result import FitConfig
from bayespot.likelihood.model import SnapshotModel

#: Points that normalise a selection on the way to the maximum; of a model that `responds`, whose slope is corrected in
#: the end, so many per star, and at least.
_FEW_POINTS, _POINTS_PER_STAR, _LEAST_POINTS = 16_384, 16, 2048
#: How often a climb starts afresh.
_ROUNDS = 4
#: Iterations of L-BFGS after which information is measured anew.
_REFRESHED = 17
#: Sets of points that tell each other's error.
_SETS = 4
#: Of the seeds of the finer points with which points are compared, beyond the fit's.
_OTHER_POINTS = 7_001
#: Stars that give the information on the way, and most linearisations of the actions.
_MOST_STARS, _LINEARISATIONS = 25_000, 12
#: Distance from the maximum, in posterior standard deviations, from which an emulator leads on, and most of its rounds.
_NEAR, _EMULATED = 1.0, 8


class Climb:
    """Climbs the log posterior of one model and catalogue by L-BFGS.

    A selection is normalised by points that cover the population they were laid for, and L-BFGS is preconditioned by
    the information at its start: both are laid anew as the climb goes on. ``model`` has the latest points,
    ``iterations`` counts those of L-BFGS.

    Parameters
    ----------
    model, catalog, config
        What is fitted.
    data
        The stars as `SnapshotModel.prepare` returns them.
    few
        A small sample of them, with the most energetic ones.
    report
        Called with (u, note) after every few iterations.
    """

    def __init__(
        self, model: SnapshotModel, catalog: Catalog, data: Tensor, few: Tensor, config: FitConfig, report: Report
    ) -> None:
        self.model, self.catalog, self.data, self.few = model, catalog, data, few
        self.config, self.report = config, report
        self.iterations = 0
        #: What the last maximum was reached with, where the model `responds`.
        self.emulator: Emulator | None = None

    def space(self, u: Tensor, n: int = _FEW_POINTS) -> LatentSpace:
        """Lay n points that normalise the selection at u, if there is one; return the model's latents.

        Of a model that `responds` as many as its stars need on the way: `_corrected_finely` takes more.
        """
        if responds(LatentSpace(self.model)):
            n = min(_FEW_POINTS, max(_LEAST_POINTS, _POINTS_PER_STAR * len(self.data)))
        self.model = self._with_points(u, n, self.config.seed)
        return LatentSpace(self.model)

    def _with_points(self, u: Tensor, n: int, seed: int) -> SnapshotModel:
        with torch.no_grad():
            return self.model.select_at(LatentSpace(self.model).values(u), self.catalog, n, seed)

    def information(self, u: Tensor, data: Tensor, n_rows: int, tick: Callable[[], None] | None = None) -> Tensor:
        """Return the Fisher information at u from at most about n_rows rows of the data.

        That of the literal likelihood is that of its limit, which costs a hundred times less.
        """
        closed = LatentSpace(self.model.closed_form())
        responder = Responder(closed, u, data) if responds(closed) else None
        n_stars = max(stars_in(data, n_rows), min(len(data), 4000))
        return closed.fisher(u, data, n_stars, self.config.seed, tick, responder)

    def selected(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Move to where the selection is allowed for, a few stars at a time."""
        for _ in range(_ROUNDS):
            u = LatentSpace(self.model).vector(values)
            space = self.space(u)
            if responds(space):
                return space.values(gauss_newton(space, u, self.few, 0.5, _LINEARISATIONS, self.report, 3000)[0])
            u, norm, _ = lbfgs(space, u, self.few, self.information(u, self.few, 3000), 0.5, 16, self.report)
            values = space.values(u)
            if norm < 0.5:
                break
        return values

    def towards(self, u: Tensor, data: Tensor, tolerance: float | None = None) -> Tensor:
        """Climb to about one posterior standard deviation from the maximum of ``data``, then to it.

        ``tolerance`` in place of `FitConfig.map_tolerance`.
        """
        if responds(LatentSpace(self.model)):
            return self.to_maximum(u, data, _FEW_POINTS, tolerance)
        rounds = _ROUNDS if self.model.selection is not None or self.model.conditional else 1
        for _ in range(rounds):
            space = self.space(u)
            information = self.information(u, self.few, 5000)
            u, norm, done = lbfgs(space, u, data, information, 1.0, self.config.map_iterations // rounds, self.report)
            self.iterations += done
            if norm < 1.0:
                break
        return self.to_maximum(u, data, _FEW_POINTS, tolerance)

    def onwards(self, u: Tensor, data: Tensor, tolerance: float | None = None) -> Tensor:
        """Climb to the maximum of ``data`` from near it: that of a part of them.

        With a selection, whose points are laid anew on the way, as from afar.
        """
        if self.model.selection is not None:
            return self.towards(u, data, tolerance)
        return self.to_maximum(u, data, _FEW_POINTS, tolerance)

    def to_maximum(self, u: Tensor, data: Tensor, n_points: int, tolerance: float | None = None) -> Tensor:
        """Climb to the maximum, with points and information laid anew where L-BFGS came to a halt.

        Ridges of the posterior bend: with the information of a distant place, tens of posterior standard deviations
        away, the climb comes to a halt before the top, or takes twice as long.
        """
        tolerance = self.config.map_tolerance if tolerance is None else tolerance
        if responds(LatentSpace(self.model)):
            return self._to_emulated_maximum(self.space(u, n_points), u, data, tolerance)
        left = self.config.map_iterations
        while left > 0:
            space = self.space(u, n_points)
            information = self.information(u, data, _MOST_STARS)
            u, norm, done = lbfgs(space, u, data, information, tolerance, min(left, _REFRESHED), self.report)
            self.iterations += done
            left -= done
            if norm <= tolerance:
                break
        return u

    def _to_emulated_maximum(self, space: LatentSpace, u: Tensor, data: Tensor, tolerance: float) -> Tensor:
        """Climb with linear actions as far as that leads, from there by turns with an emulator, and f(J)."""
        u, _, done = gauss_newton(space, u, data, _NEAR, _LINEARISATIONS, self.report, _MOST_STARS)
        self.iterations += done
        u = self._uphill(space, u, Emulator.of(space, u, data, self.config.seed, measured=False).maximum(u), data)
        u = self._with_orbits(space, u, data)
        return self._by_emulator(space, Emulator.of(space, u, data, self.config.seed), u, data, tolerance)

    def _by_emulator(self, space: LatentSpace, emulator: Emulator, u: Tensor, data: Tensor, tolerance: float) -> Tensor:
        """Climb by turns with an emulator, whose slope is made the exact one where it leads, and f(J)."""
        for k in range(_EMULATED):
            value, slope = space.likelihood_gradient(u, data)
            emulator = emulator.corrected(u, slope)
            prior, prior_slope = space.prior_gradient(u)
            information = self.with_orbits(emulator, u, data)
            norm = float((whitening(information).T @ (slope + prior_slope)).norm())
            self.report(u, f"ln p {float(value + prior):.3f}, {norm:.2g} sd from the maximum")
            self.iterations += 1
            if norm <= tolerance:
                break
            u = self._uphill(space, u, emulator.maximum(u), data)
            u = self._with_orbits(space, u, data)
            if k == _EMULATED // 2 and norm > _NEAR:
                emulator = Emulator.of(space, u, data, self.config.seed)
        self.emulator = emulator
        return u

    def _uphill(self, space: LatentSpace, u: Tensor, u_1: Tensor, data: Tensor) -> Tensor:
        """Return the place on the way from u to u_1 that is higher than u."""
        return u + uphill(space, u, u_1 - u, data, float(space.log_posterior(u, data))) * (u_1 - u)

    def _with_orbits(self, space: LatentSpace, u: Tensor, data: Tensor) -> Tensor:
        """Return u with the best f(J) in its potential."""
        if space.size == space.n_potential:
            return u
        information = self._of_orbits(space, u, data)
        u, *_ = lbfgs(AtFixedActions(space, u, data), u, data, information, 0.02, 60, lambda *_: None)  # type: ignore[arg-type]
        return u

    def _of_orbits(self, space: LatentSpace, u: Tensor, data: Tensor) -> Tensor:
        """Return the outer-product information without its part between potential and f(J)."""
        own = slice(0, space.n_potential)
        information = self.information(u, data, _MOST_STARS)
        information[own, space.n_potential :] = 0
        information[space.n_potential :, own] = 0
        return information

    def with_orbits(self, emulator: Emulator, u: Tensor, data: Tensor) -> Tensor:
        """Return the information of all latents: the emulator's, and the outer product's of what it does not draw.

        The score identity parts these from the potential's.
        """
        if emulator.d == len(u):
            return emulator.information
        information = self._of_orbits(LatentSpace(self.model), u, data)
        own = slice(0, len(emulator.information))
        information[own, own] = emulator.information
        return information

    def normalised_finely(self, u: Tensor, stage: Callable[[str], None]) -> tuple[Tensor, Tensor, int, float]:
        """Climb with ever more points, twice as many each time, until that moves the posterior little.

        Returns
        -------
        u, information, n_points, error
            The maximum and the information there; the number of points, and by how many posterior standard deviations
            twice as many, and others, would move the mean of the parameter of the potential that moves most.
        """
        config, n = self.config, self.config.selection_points
        if self.emulator is not None:
            return self._corrected_finely(u, stage)
        while True:
            stage(f"normalising the selection with {n} points")
            u = self.to_maximum(u, self.data, n)
            information = self.information(u, self.data, config.fisher_stars)
            finer = LatentSpace(self._with_points(u, 2 * n, config.seed + _OTHER_POINTS))
            error = displacement(LatentSpace(self.model), finer, u, information, len(self.data), config.seed)
            self.report(u, f"twice as many move the result by {error:.2g} posterior sd")
            if error <= config.selection_tolerance or 2 * n > config.selection_max_points:
                return u, information, n, error
            n *= 2

    def _corrected_finely(self, u: Tensor, stage: Callable[[str], None]) -> tuple[Tensor, Tensor, int, float]:
        """Correct the emulator's slope by that of ln Z with ever more points, and go to where its maximum is then.

        The likelihood keeps the few it has, unless another guide asks for it. The error is the standard error of the
        means of sets of points.
        """
        config, emulator = self.config, self.emulator
        assert emulator is not None  # the caller looked
        space = LatentSpace(self.model)
        d, n = space.n_potential, max(1, config.selection_points // _SETS)
        information = self.with_orbits(emulator, u, self.data)
        n_members = float(len(self.data))
        if self.model.outliers is not None:
            n_members -= float(outlier_probability([space.model.at(space.values(u))], self.data).sum())
        covariance = torch.linalg.inv(information)
        _, few = fraction_slope(space, u, self.data)
        log_z: list[Tensor] = []
        slopes: list[Tensor] = []
        wanted = _SETS
        while True:
            stage(f"normalising the selection with {wanted * n} points")
            for k in range(len(slopes), wanted):
                model = self._with_points(u, n, config.seed + _OTHER_POINTS + k)
                value, slope = fraction_slope(LatentSpace(model), u, self.data)
                log_z.append(value)
                slopes.append(slope)
                self.report(u, f"{(k + 1) * n} points")
            share = torch.softmax(torch.stack(log_z), 0)
            mean = share @ torch.stack(slopes)
            moved = n_members * (torch.stack(slopes) - mean) @ covariance / covariance.diagonal().sqrt()
            error = float(((share[:, None] * moved) ** 2).sum(0).mul(wanted / (wanted - 1)).sqrt()[:d].max())
            if error <= config.selection_tolerance or 2 * wanted * n > config.selection_max_points:
                break
            wanted *= 2
        self.emulator = emulator.with_more_points(u, n_members * (few - mean))
        u = self.emulator.maximum(u)
        if config.guide != "emulated":
            # other guides ask for the likelihood, not for what an emulator knows of it
            self.model = self._with_points(u, wanted * n, config.seed + _OTHER_POINTS - 1)
            space = LatentSpace(self.model)
            own = replace(emulator, space=space)
            u = self._by_emulator(space, own, u, self.data, config.map_tolerance)
            information = self.with_orbits(self.emulator, u, self.data)
        return u, information, wanted * n, error
