"""Free-form sphere from heliocentric columns, with measurement errors and a selection in distance and latitude.

A template for catalogues like Gaia's: stars within 10 kpc of the Sun and more than 15 deg from the Galactic plane,
cut on what was observed. Copy the file and declare the cuts your catalogue was made with.
"""

from bayespot import Catalog, LogisticGaussianProcess, MassSlopeNetwork, SnapshotModel
from bayespot.likelihood import GalacticLatitude, HeliocentricDistance, MeasurementErrors

#: The cuts that were applied to the observed coordinates.
SELECTION = HeliocentricDistance(10.0) * GalacticLatitude(15.0)


def build(catalog: Catalog) -> SnapshotModel:
    """Return the model; 32 samples of every star within its errors."""
    return SnapshotModel(
        MassSlopeNetwork.for_stars(catalog.w, n_features=8),
        LogisticGaussianProcess(),
        selection=SELECTION,
        errors=MeasurementErrors.where_needed(catalog, n_samples=32),
    )
