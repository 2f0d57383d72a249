"""Stars as files and tables have them, and as the fit takes them: columns, units, frames, checks."""

from bayespot.catalog.catalog import Catalog, Observed
from bayespot.catalog.columns import CatalogError
from bayespot.catalog.frame import Frame
from bayespot.catalog.projected import ProjectedCatalog
from bayespot.catalog.rotation import RotationAxis

__all__ = ["Catalog", "CatalogError", "Frame", "Observed", "ProjectedCatalog", "RotationAxis"]
