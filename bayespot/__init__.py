"""bayespot: free-form gravitational potentials, with error bars, from one snapshot of stars.

Names are imported on first use, so that ``import bayespot`` stays fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "Catalog": "catalog",
    "CatalogError": "catalog",
    "Potential": "potential",
    "Isochrone": "potential",
    "MassSlopeNetwork": "potential",
    "DirectNetwork": "potential",
    "SphericalActions": "actions",
    "LogisticGaussianProcess": "df",
    "SphericalMixture": "df",
    "SnapshotModel": "likelihood",
    "FitConfig": "inference",
    "FitError": "inference",
    "fit": "inference",
    "fit_ensemble": "inference",
    "Posterior": "posterior",
    "EnsemblePosterior": "posterior",
    "load_run": "report",
    "save_run": "report",
}
__all__ = ["__version__", *_HOMES]

if TYPE_CHECKING:
    from bayespot.actions.spherical import SphericalActions as SphericalActions
    from bayespot.catalog.catalog import Catalog as Catalog
    from bayespot.catalog.columns import CatalogError as CatalogError
    from bayespot.df import LogisticGaussianProcess as LogisticGaussianProcess
    from bayespot.df import SphericalMixture as SphericalMixture
    from bayespot.inference.ensemble import fit_ensemble as fit_ensemble
    from bayespot.inference.fit import fit as fit
    from bayespot.inference.result import FitConfig as FitConfig
    from bayespot.inference.result import FitError as FitError
    from bayespot.likelihood.model import SnapshotModel as SnapshotModel
    from bayespot.posterior.posterior import EnsemblePosterior as EnsemblePosterior
    from bayespot.posterior.posterior import Posterior as Posterior
    from bayespot.potential import DirectNetwork as DirectNetwork
    from bayespot.potential import Isochrone as Isochrone
    from bayespot.potential import MassSlopeNetwork as MassSlopeNetwork
    from bayespot.potential import Potential as Potential
    from bayespot.report.runs import load_run as load_run
    from bayespot.report.runs import save_run as save_run


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'bayespot' has no attribute {name!r}")
    module = importlib.import_module(f"bayespot.{_HOMES[name]}")
    value = getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
