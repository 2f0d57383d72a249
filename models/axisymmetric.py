"""Free-form axisymmetric potential, for stars of a halo: no thin disc is resolved (disc_and_halo: with discs).

The axis of symmetry is z. Actions by the Staeckel fudge; f(J) of all three actions, so that the stars may rotate, with
the number of components from the data. Measurement errors are taken into account where the catalogue has them; f(J) is
then a logistic Gaussian process.
"""

from bayespot import Catalog, LogisticGaussianProcess, SnapshotModel
from bayespot.actions import StaeckelFudge
from bayespot.df import AxisymmetricMixture
from bayespot.likelihood import MeasurementErrors
from bayespot.potential import AxisymmetricNetwork


def build(catalog: Catalog) -> SnapshotModel:
    """Return the model; features and the prior of the mass are placed by the stars' radii and speeds."""
    errors = MeasurementErrors.where_needed(catalog)
    df = AxisymmetricMixture() if errors is None else LogisticGaussianProcess(flattened=True)
    return SnapshotModel(AxisymmetricNetwork.for_stars(catalog.w), df, finder=StaeckelFudge(), errors=errors)
