"""The climb to the maximum: what is laid anew where L-BFGS halts, and that a selection's points are refined.

Parametric isochrone, N = 600 of 2000 stars of seed 5.
"""

from __future__ import annotations

import pytest
import torch
from bayespot.models import isochrone

from bayespot import FitConfig
from bayespot.actions import IsochroneActions
from bayespot.inference.latent import LatentSpace, whitening
from bayespot.inference.map import Climb
from bayespot.inference.optimise import lbfgs
from bayespot.likelihood import HeliocentricDistance
from bayespot.potential import Isochrone

CUT = HeliocentricDistance(12.0, observer=(8.2, 0.0, 0.02))


def start(stars, selection=None, **options) -> tuple[Climb, torch.Tensor]:
    """A climb, and a start some twenty posterior standard deviations away."""
    kept = stars[:600] if selection is None else stars[selection(stars.w) > 0][:600]
    model = isochrone.build(kept)
    model.selection, model.finder = selection, IsochroneActions()
    J = IsochroneActions().actions(Isochrone(1e11, 3.0), kept.w)
    model.df = model.df.resolved(1, J)
    values = model.initial_values() | {f"df.{k}": v for k, v in model.df.fit_actions(J, 0).items()}
    config = FitConfig(seed=1, **options)
    climb = Climb(model, kept, kept.w, kept.w[:300], config, lambda _u, _note: None)
    return climb, LatentSpace(model).vector(values)


def distance(climb: Climb, u: torch.Tensor) -> float:
    """Norm of the whitened gradient: posterior standard deviations from the maximum."""
    _, slope = LatentSpace(climb.model).gradient(u, climb.data)
    return float((whitening(climb.information(u, climb.data, 5000)).T @ slope).norm())


def test_a_climb_that_halts_starts_afresh_there(isochrone_stars, monkeypatch):
    """L-BFGS that gives up after four steps each time: information is measured where it halted, four times at most."""
    climb, u = start(isochrone_stars)
    best = climb.to_maximum(u, climb.data, 1000)
    C = whitening(climb.information(best, climb.data, 5000))
    u = best + 4 * C @ torch.linspace(-1, 1, len(best), dtype=torch.float64)
    far = distance(climb, u)
    assert far > 4
    calls, measured = [], []

    def impatient(space, u, w, information, tolerance, _most, report):
        calls.append(u)
        return lbfgs(space, u, w, information, tolerance, 4, report)

    original = Climb.information
    monkeypatch.setattr("bayespot.inference.map.lbfgs", impatient)
    monkeypatch.setattr(Climb, "information", lambda self, u, *rest: measured.append(u) or original(self, u, *rest))
    found = climb.to_maximum(u, climb.data, 1000)
    assert 1 < len(calls) <= 4
    assert all(torch.equal(a, b) for a, b in zip(calls, measured, strict=True))
    assert not torch.equal(calls[0], calls[1])
    monkeypatch.undo()
    assert distance(climb, found) < far / 4
    # one that may go on does not start afresh
    monkeypatch.setattr("bayespot.inference.map.lbfgs", lambda *a: calls.append(a[1]) or lbfgs(*a))
    calls.clear()
    patient = start(isochrone_stars)[0]
    assert distance(patient, patient.to_maximum(u, patient.data, 1000)) < 0.06
    assert len(calls) == 1


def test_points_are_laid_where_the_climb_is(isochrone_stars):
    """Points are those of the population at the latest u, and are doubled up to the tolerance or the most."""
    options = {"selection_points": 2048, "selection_max_points": 8192, "selection_tolerance": 1e-9}
    climb, u = start(isochrone_stars, CUT, **options)
    stages: list[str] = []
    u, information, n, error = climb.normalised_finely(u, stages.append)
    assert [stage.split()[-2] for stage in stages] == ["2048", "4096", "8192"]
    assert n == 8192
    assert 1e-9 < error < 1
    assert distance(climb, u) < 0.06
    assert information.shape == (len(u), len(u))
    again = climb.model.select_at(LatentSpace(climb.model).values(u), climb.catalog, n, 1)
    # the points were laid within a posterior standard deviation of where the climb ended
    torch.testing.assert_close(again.points.w, climb.model.points.w, rtol=0.2, atol=0.2)


@pytest.mark.parametrize("selection", [None, CUT])
def test_towards_ends_at_the_maximum(isochrone_stars, selection):
    """From tens of posterior standard deviations away to 0.05, with what was done counted."""
    climb, u = start(isochrone_stars, selection)
    u = climb.towards(u, climb.data)
    assert distance(climb, u) < 0.06
    assert climb.iterations > 0
