"""Free-form spherical potential: the mass-slope network, with the number of f(J) components from the data."""

from bayespot import Catalog, MassSlopeNetwork, SnapshotModel, SphericalMixture


def build(catalog: Catalog) -> SnapshotModel:
    """Return the model; features and the prior of the mass are placed by the stars' radii and speeds."""
    return SnapshotModel(MassSlopeNetwork.for_stars(catalog.w), SphericalMixture())
