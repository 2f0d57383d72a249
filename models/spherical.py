"""Free-form spherical potential: the mass-slope network, with a logistic Gaussian process for f(J)."""

from bayespot import Catalog, LogisticGaussianProcess, MassSlopeNetwork, SnapshotModel


def build(catalog: Catalog) -> SnapshotModel:
    """Return the model; features and the prior of the mass are placed by the stars' radii and speeds."""
    return SnapshotModel(MassSlopeNetwork.for_stars(catalog.w), LogisticGaussianProcess())
