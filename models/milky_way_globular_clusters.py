"""The Milky Way's potential from its globular clusters, as a sphere.

With 161 tracers the prior matters: six features, and an f(J) with rotation. Measurement errors (2 % in distance for
most clusters) are taken into account where the catalogue has them; f(J) is then a logistic Gaussian process, else a
mixture of two components, an inner and an outer population. The disc's flattening is averaged over: v_c is that of the
spherical mass distribution, which near the Sun lies some 5 % below a disc galaxy's of the same enclosed mass.
"""

from bayespot import Catalog, LogisticGaussianProcess, MassSlopeNetwork, SnapshotModel, SphericalMixture
from bayespot.likelihood import MeasurementErrors


def build(catalog: Catalog) -> SnapshotModel:
    """Return the model; features and the prior of the mass are placed by the clusters' radii and speeds."""
    errors = MeasurementErrors.where_needed(catalog)
    mixture = SphericalMixture(n_components=2, rotation=True)
    df = mixture if errors is None else LogisticGaussianProcess(rotation=True)
    return SnapshotModel(MassSlopeNetwork.for_stars(catalog.w, n_features=6), df, errors=errors)
