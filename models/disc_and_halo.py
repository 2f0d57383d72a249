"""Free-form axisymmetric potential with exponential discs of fixed shape and free mass, for galaxies with discs.

A thin disc is beyond the multipoles of the free form, which fits a disc galaxy confidently wrong without it. The axis
of symmetry is z. Actions by the Staeckel fudge; f(J) of all three actions, so that the stars may rotate, with the
number of components from the data. Measurement errors are taken into account where the catalogue has them; f(J) is then
a logistic Gaussian process.
"""

import math

import torch
from pyro.distributions import LogNormal
from torch import Tensor

from bayespot import Catalog, LogisticGaussianProcess, Potential, SnapshotModel
from bayespot.actions import StaeckelFudge
from bayespot.df import ActionMixture
from bayespot.likelihood import MeasurementErrors
from bayespot.potential import AxisymmetricNetwork, ExponentialDisc
from bayespot.units import G

#: Scale lengths of the discs in median radii of the stars, their thicknesses h_z / r_d, and the prior medians of their
#: masses in r v^2 / G of the stars.
DISCS = ((0.4, 0.1, 0.1), (0.4, 0.3, 0.1))
#: Prior standard deviation of the logarithm of a disc's mass.
LN_MASS_SD = 1.0


def discs(w: Tensor) -> Potential:
    """Return the discs: shapes fixed by the stars' median radius, priors of the masses about a tenth of r v^2 / G."""
    r = float(torch.linalg.vector_norm(w[:, :3], dim=-1).median())
    mass = r * float((w[:, 3:] ** 2).sum(-1).median()) / G
    sd = torch.tensor(LN_MASS_SD, dtype=torch.float64)
    found: list[Potential] = []
    for length, thickness, share in DISCS:
        r_d = length * r
        # a disc's mass is 2 pi sigma_0 r_d^2
        ln_sigma = torch.tensor(math.log(share * mass / (2 * math.pi * r_d**2)), dtype=torch.float64)
        found.append(ExponentialDisc(LogNormal(ln_sigma, sd), r_d, thickness * r_d))
    return sum(found[1:], found[0])


def build(catalog: Catalog) -> SnapshotModel:
    """Return the model; features, discs and the priors of all masses are placed by the stars' radii and speeds."""
    errors = MeasurementErrors.where_needed(catalog)
    df = ActionMixture() if errors is None else LogisticGaussianProcess(rotation=True)
    potential = AxisymmetricNetwork.for_stars(catalog.w) + discs(catalog.w)
    return SnapshotModel(potential, df, finder=StaeckelFudge(), errors=errors)
