"""The finder's own bias, from scores averaged along orbits: none where actions are exact, found where they are wrong.

Protocol: 300 stars on all orbits (`contracts.actions.bound_stars`) in Staeckel's form, where the fudge is exact with
the right focal distance; mass and the ratio of its axes free, f(J) at its start.
"""

from __future__ import annotations

import math

import pytest
import torch
from contracts.actions import bound_stars
from contracts.axisymmetric import KuzminKutuzov
from pyro.distributions import Normal
from pyro.nn import PyroSample

from bayespot import SnapshotModel
from bayespot.actions import StaeckelFudge
from bayespot.df import ActionMixture
from bayespot.inference.finder_bias import finder_bias
from bayespot.inference.latent import LatentSpace
from bayespot.inference.verdict import verdict
from bayespot.potential.base import Potential
from bayespot.report.text import describe

TRUTH = {"ln_m": math.log(1e11), "ln_c": 0.0}


class Free(Potential):
    """`KuzminKutuzov` with free mass and height."""

    symmetry = "axisymmetric"

    def __init__(self):
        super().__init__()
        self.ln_m = PyroSample(Normal(torch.tensor(25.3, dtype=torch.float64), 1.0))
        self.ln_c = PyroSample(Normal(torch.tensor(0.0, dtype=torch.float64), 1.0))

    def phi(self, x):
        return KuzminKutuzov(torch.exp(self.ln_m), 3.0, torch.exp(self.ln_c)).phi(x)


def measured(delta):
    """The bias with a given focal distance, with draws about the truth of the widths of 10 000 stars."""
    w = bound_stars(KuzminKutuzov(1e11, 3.0, 1.0), 300, 7)
    model = SnapshotModel(Free(), ActionMixture(), StaeckelFudge(delta))
    values = {f"potential.{name}": torch.tensor(value, dtype=torch.float64) for name, value in TRUTH.items()}
    J = model.finder.capped_actions(model.at(values).potential, w).J.detach()
    model.df = model.df.resolved(2, J)
    values |= {f"df.{name}": value for name, value in model.df.fit_actions(J, 1).items()}
    space = LatentSpace(model)
    u = space.vector(values).repeat(200, 1)
    generator = torch.Generator().manual_seed(1)
    u[:, :2] += torch.tensor([0.01, 0.03]) * torch.randn(200, 2, generator=generator, dtype=torch.float64)
    return finder_bias(space, u, w, 10_000, 1)


def worst(found):
    return max(abs(row["bias"]) for row in found.fields)


def test_exact_and_wrong_coordinates():
    """With the right focal distance J is constant and no field moves; with none, spherical coordinates in a flat galaxy
    J varies by percents and fields move by far more."""
    exact, spherical = measured(math.sqrt(8.0)), measured(0.0)
    assert exact.n_stars >= 290
    assert exact.scatter[1] < 1e-4
    assert len(exact.fields) == 6
    for row in exact.fields:
        assert abs(row["bias"]) < 3 * row["error"] + 0.05, row
    assert spherical.scatter[0] > 1e-2
    assert worst(spherical) > 10 * worst(exact)
    assert worst(spherical) > 1


@pytest.mark.parametrize(("bias", "error", "level"), [(2.0, 0.3, 2), (0.7, 0.1, 1), (0.3, 0.01, 0), (2.0, 1.0, 0)])
def test_verdict_names_field_and_bias(bias, error, level):
    d = {
        "gradient_norm": 0.0, "n_unbound": 0, "k_hat": 0.1, "elbo": [],
        "finder_bias": {
            "fields": [{"name": "v_c(8 kpc)", "bias": bias, "error": error}], "scatter": [0.01, 0.05], "n_stars": 400,
        },
    }  # fmt: skip
    judged = verdict(d)
    assert judged.level == ("trusted", "to be taken with care", "not to be trusted")[level]
    if level:
        assert f"moves v_c(8 kpc) by +{bias:.1f} +- {error:.1f} posterior sd" in judged.reasons[0]


def test_the_report_says_so():
    """The line has the scatter of J and the field that is moved most."""
    d = {
        "n_components": 3, "gradient_norm": 0.0, "map_iterations": 5, "n_unbound": 0, "k_hat": 0.2, "seconds": {},
        "elbo": [],
        "finder_bias": {
            "fields": [
                {"name": "v_c(8 kpc)", "bias": 0.1, "error": 0.05},
                {"name": "K_z(8, 1 kpc)", "bias": -0.3, "error": 0.1},
            ],
            "scatter": [0.002, 0.042], "n_stars": 400,
        },
    }  # fmt: skip
    (line,) = [line for line in describe(d) if line.startswith("action finder")]
    assert "0.2 %" in line
    assert "4.2 %" in line
    assert "moves K_z(8, 1 kpc) by -0.30 +- 0.10 posterior sd" in line
    assert not [line for line in describe(d | {"finder_bias": {}}) if line.startswith("action finder")]
