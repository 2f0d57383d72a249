"""Parametric isochrone sphere: two free parameters, priors centred on the data's scales, actions in closed form.

Measurement errors are taken into account where the catalogue has them; f(J) is then a logistic Gaussian process.
"""

import math

import torch
from pyro.distributions import LogNormal

from bayespot import Catalog, Isochrone, LogisticGaussianProcess, SnapshotModel, SphericalMixture
from bayespot.actions import IsochroneActions
from bayespot.likelihood import MeasurementErrors
from bayespot.units import G


def build(catalog: Catalog) -> SnapshotModel:
    """Return the model; the priors of m_tot and r_s are a factor e^1.5 wide."""
    r = float(torch.linalg.vector_norm(catalog.x, dim=-1).median())
    v2 = float((catalog.v**2).sum(-1).median())
    wide = torch.tensor(1.5, dtype=torch.float64)
    mass = LogNormal(torch.tensor(math.log(2 * r * v2 / G), dtype=torch.float64), wide)
    scale = LogNormal(torch.tensor(math.log(r / 2), dtype=torch.float64), wide)
    errors = MeasurementErrors.where_needed(catalog)
    df = SphericalMixture() if errors is None else LogisticGaussianProcess()
    return SnapshotModel(Isochrone(mass, scale), df, finder=IsochroneActions(), errors=errors)
