"""Free-form axisymmetric potential with a disc of free surface density, for galaxies with discs.

A thin disc is beyond the multipoles of the free form, which fits a disc galaxy confidently wrong without it. The axis
of symmetry is z. Actions by the Staeckel fudge; f(J) of all three actions, so that the stars may rotate, with the
number of components from the data. Measurement errors are taken into account where the catalogue has them; f(J) is then
a logistic Gaussian process.
"""

from bayespot import Catalog, LogisticGaussianProcess, SnapshotModel
from bayespot.actions import StaeckelFudge
from bayespot.df import AxisymmetricMixture
from bayespot.likelihood import MeasurementErrors
from bayespot.potential import AxisymmetricNetwork, ExponentialDiscs


def build(catalog: Catalog) -> SnapshotModel:
    """Return the model; features, discs and the priors of all masses are placed by the stars' radii and speeds."""
    errors = MeasurementErrors.where_needed(catalog)
    df = AxisymmetricMixture() if errors is None else LogisticGaussianProcess(flattened=True)
    potential = AxisymmetricNetwork.for_stars(catalog.w) + ExponentialDiscs.for_stars(catalog.w)
    return SnapshotModel(potential, df, finder=StaeckelFudge(), errors=errors)
