"""Free-form spherical potential: the mass-slope network, with the number of f(J) components from the data.

Measurement errors are taken into account where the catalogue has them; f(J) is then a logistic Gaussian process.
"""

from bayespot import Catalog, LogisticGaussianProcess, MassSlopeNetwork, SnapshotModel, SphericalMixture
from bayespot.likelihood import MeasurementErrors


def build(catalog: Catalog) -> SnapshotModel:
    """Return the model; features and the prior of the mass are placed by the stars' radii and speeds."""
    errors = MeasurementErrors.where_needed(catalog)
    df = SphericalMixture() if errors is None else LogisticGaussianProcess()
    return SnapshotModel(MassSlopeNetwork.for_stars(catalog.w), df, errors=errors)
