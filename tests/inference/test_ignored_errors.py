"""Measurement errors are taken into account, or the fit says that it ignores them; negligible ones need neither."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from bayespot.models import gaia_sphere, isochrone, spherical

from bayespot import Catalog, CatalogError, FitConfig, SnapshotModel, SphericalMixture, fit
from bayespot.actions import IsochroneActions
from bayespot.catalog import Observed
from bayespot.cli.fitting import _built
from bayespot.df import LogisticGaussianProcess
from bayespot.inference import verdict
from bayespot.likelihood import MeasurementErrors
from bayespot.likelihood.errors import ignored_errors, relative_errors
from bayespot.mock import mock, observe
from bayespot.potential import Isochrone

TRUE = mock("isochrone", n_stars=120, seed=11)
NOISY = observe(TRUE, 12, distance_error=0.05, pm_error=0.01, v_error=1.0)
QUICK = FitConfig(seed=1, n_components=1, guide="laplace", n_draws=60, k_hat_draws=0)


def galactocentric(radius: float, velocity: float) -> Catalog:
    """The stars with errors of these fractions of the radius and of the velocity dispersion per axis, exactly."""
    r2 = (TRUE.x**2).sum(-1)
    sigma2 = float((TRUE.v**2).sum(-1).median() / 2.37)
    variance = torch.cat([(radius**2 * r2 / 3)[:, None].expand(-1, 3), torch.full((120, 3), velocity**2 * sigma2)], -1)
    return Catalog(TRUE.w, torch.diag_embed(variance))


def without_velocities(catalog: Catalog) -> Catalog:
    """The catalogue with the radial velocity of the first star missing."""
    values = catalog.observed.values.clone()
    values[0, 5] = torch.nan
    return dataclasses.replace(catalog, observed=Observed(catalog.observed.names, values, catalog.observed.covariance))


@pytest.mark.parametrize(
    ("radius", "velocity", "needed"), [(0.009, 0.009, False), (0.011, 0.0, True), (0.0, 0.011, True), (0.0, 0.0, False)]
)
def test_one_per_cent_decides(radius, velocity, needed):
    """Errors in radius and in velocity, each on either side of the limit."""
    catalog = galactocentric(radius, velocity)
    found = relative_errors(catalog)
    assert found.radius == pytest.approx(radius, rel=1e-6)
    assert found.velocity == pytest.approx(velocity, rel=0.1)  # the dispersion is that of the better half of the stars
    assert (MeasurementErrors.where_needed(catalog) is not None) == needed
    assert bool(ignored_errors(catalog)) == needed


def test_no_errors_and_missing_coordinates():
    """A catalogue without errors needs none; one star without a radial velocity does, however small the errors."""
    assert relative_errors(TRUE) is None
    assert MeasurementErrors.where_needed(TRUE) is None
    fine = observe(TRUE, 1, distance_error=1e-4, pm_error=1e-5, v_error=0.01)
    assert MeasurementErrors.where_needed(fine) is None
    lost = without_velocities(fine)
    assert MeasurementErrors.where_needed(lost, n_samples=8).n_samples == 8
    assert "1 lack a distance or a radial velocity" in ignored_errors(lost)[0]


@pytest.mark.parametrize("module", [spherical, isochrone])
def test_built_in_models(module):
    """Errors and a Gaussian process for f(J) where the catalogue has errors, neither where it has none."""
    model = module.build(NOISY)
    assert isinstance(model.errors, MeasurementErrors)
    assert isinstance(model.df, LogisticGaussianProcess)
    for exact in (TRUE, NOISY.without_errors()):
        model = module.build(exact)
        assert model.errors is None
        assert isinstance(model.df, SphericalMixture)


def test_a_catalogue_without_its_errors():
    """Same coordinates and names, a note; stars whose coordinates are place holders are refused by number."""
    bare = NOISY.without_errors()
    assert bare.covariance is None
    assert bare.observed is None
    assert torch.equal(bare.w, NOISY.w)
    assert "measurement errors left out" in bare.summary()
    assert TRUE.without_errors().meta == TRUE.meta
    with pytest.raises(CatalogError, match="1 of 120 stars lack a distance or a radial velocity"):
        without_velocities(NOISY).without_errors()


def test_a_fit_that_ignores_errors_says_so():
    """A user's model without errors: a note with the largest errors, and the verdict is to be taken with care."""
    own = SnapshotModel(isochrone.build(TRUE).potential, SphericalMixture(), IsochroneActions())
    diagnostics = fit(own, NOISY, QUICK).diagnostics
    (note,) = (note for note in diagnostics.notes if "measurement errors are ignored" in note)
    assert f"{100 * relative_errors(NOISY).radius:.2g} % in radius" in note
    assert note in diagnostics.warnings
    assert verdict(dataclasses.asdict(diagnostics)).level != "trusted"
    exact = fit(own, TRUE, QUICK).diagnostics
    assert not any("measurement errors" in note for note in exact.notes)


def test_the_command_line_says_what_it_does(capsys):
    """Taken into account, ignored as asked, ignored by the model, and a model that cannot ignore them."""
    assert _built(spherical, None, "spherical", NOISY, False).errors is not None
    assert "are taken into account (--ignore-errors: not): 5 % of the stars" in capsys.readouterr().err
    assert _built(spherical, None, "spherical", NOISY, True).errors is None
    assert capsys.readouterr().err == ""  # the verdict says so
    assert _built(spherical, None, "spherical", TRUE, False).errors is None
    assert capsys.readouterr().err == ""

    class Own:
        @staticmethod
        def build(catalog):
            return SnapshotModel(Isochrone(1e11, 3.0), SphericalMixture())

    assert _built(Own, None, "own.py", NOISY, False).errors is None
    assert "are ignored by this model" in capsys.readouterr().err
    Own.build = staticmethod(
        lambda catalog: SnapshotModel(Isochrone(1e11, 3.0), SphericalMixture(), errors=MeasurementErrors())
    )
    with pytest.raises(ValueError, match=r"own\.py takes measurement errors into account whatever the catalogue"):
        _built(Own, None, "own.py", NOISY, True)
    assert _built(gaia_sphere, None, "gaia_sphere", NOISY, True).errors is None
