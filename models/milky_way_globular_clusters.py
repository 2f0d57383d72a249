"""The Milky Way's potential from its globular clusters, as a sphere.

With 161 tracers the prior matters: six features, and two components of f(J) (an inner and an outer population)
with rotation. The disc's flattening is averaged over: v_c is that of the spherical mass distribution, which
near the Sun lies some 5 % below a disc galaxy's of the same enclosed mass. Errors of the observables are not
yet deconvolved (2 % in distance for most clusters).
"""

from bayespot import Catalog, MassSlopeNetwork, SnapshotModel, SphericalMixture


def build(catalog: Catalog) -> SnapshotModel:
    """Return the model."""
    potential = MassSlopeNetwork.for_stars(catalog.w, n_features=6)
    return SnapshotModel(potential, SphericalMixture(n_components=2, rotation=True))
