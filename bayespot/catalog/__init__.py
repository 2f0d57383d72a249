"""Stars as files and tables have them, and as the fit takes them: columns, units, frames, checks."""

from bayespot.catalog.catalog import Catalog, Observed
from bayespot.catalog.columns import CatalogError

__all__ = ["Catalog", "CatalogError", "Observed"]
