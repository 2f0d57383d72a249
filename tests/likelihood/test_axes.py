"""Stars, potential and selection about the same axes: what a fit refuses before it begins, and what it only mentions.

Stars are warm discs on a Miyamoto-Nagai disc's circular speeds, turned by scipy's rotations; refusals are exact
(no false alarm over 40 seeds of upright discs and of round systems).
"""

from __future__ import annotations

import re
import warnings

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from bayespot import Catalog, SnapshotModel, SphericalMixture, fit
from bayespot.actions import StaeckelFudge
from bayespot.df import LogisticGaussianProcess
from bayespot.likelihood import (
    Custom,
    GalacticLatitude,
    Healpix,
    HeliocentricDistance,
    MagnitudeLimit,
    Rotated,
    SkyCone,
    SphericalShell,
)
from bayespot.mock import mock
from bayespot.potential import Isochrone, MiyamotoNagai
from bayespot.storage import read, write

DISC = MiyamotoNagai(1e11, 3.0, 0.3)
#: Selections on the sky, or from the Sun's place.
SKY = [
    HeliocentricDistance(8.0),
    MagnitudeLimit(15.0, 0.5, 0.3),
    GalacticLatitude(10.0),
    SkyCone(30.0, 20.0, 40.0),
    Healpix([1.0] * 4 + [0.5] * 4 + [0.1] * 4, frame="galactic"),
]


def warm_disc(n=400, seed=1, tilt=0.0):
    """Stars near circular orbits of `DISC`, 0.3 kpc and 20 km/s thick, turned by ``tilt`` degrees about x."""
    rng = np.random.default_rng(seed)
    R, phi = rng.uniform(2, 12, n), rng.uniform(0, 2 * np.pi, n)
    x = np.stack([R * np.cos(phi), R * np.sin(phi), 0.3 * rng.normal(size=n)], -1)
    speed = DISC.circular_speed(torch.as_tensor(R)).numpy()[:, None]
    v = speed * np.stack([-np.sin(phi), np.cos(phi), 0 * phi], -1) + 20 * rng.normal(size=(n, 3))
    return Catalog(np.concatenate([x, v], 1)).rotated(rotation=Rotation.from_euler("x", tilt, degrees=True))


def model(selection=None, potential=DISC):
    return SnapshotModel(potential, SphericalMixture(1), selection=selection)


@pytest.mark.parametrize("tilt", [20.0, 75.0, 120.0])
def test_a_tilted_disc_is_refused(tilt):
    """The angle and the remedy are named, and the remedy serves; a sphere takes the stars as they are."""
    stars = warm_disc(tilt=tilt)
    with pytest.raises(ValueError, match=r"rotate about \(.*\), .* deg from the z axis.*catalog.rotated") as caught:
        fit(model(), stars)
    angle, error = re.search(r"\), ([\d.]+) \+- ([\d.]+) deg", str(caught.value)).groups()
    assert abs(float(angle) - min(tilt, 180 - tilt)) < 4 * float(error) < 4
    upright = stars.rotated(stars.rotation_axis().direction)
    assert torch.equal(model().prepare(upright), upright.w)
    assert torch.equal(model(potential=Isochrone(1e11, 3.0)).prepare(stars), stars.w)


def test_a_small_tilt_is_a_warning():
    """Four degrees of 2000 stars: mentioned; 0.3 degrees: not."""
    with pytest.warns(UserWarning, match=r"4\.\d+ \+- 0\.\d+ deg from the z axis"):
        model().prepare(warm_disc(2000, tilt=4.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model().prepare(warm_disc(2000, tilt=0.3))


def test_no_false_alarms():
    """Upright discs in either sense, and round systems without rotation, in 40 samples each: silence."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(40):
            stars = warm_disc(300, seed)
            model().prepare(stars)
            model().prepare(stars.rotated([0.0, 0.0, -1.0]))
        halo = mock("isochrone", n_stars=8000, seed=1)
        for rows in torch.arange(8000).reshape(40, 200):
            model().prepare(halo[rows])


@pytest.mark.parametrize("share", [1.0, 0.6])
@pytest.mark.parametrize("columns", [(2, 5), (2,), (5,)])
def test_stars_only_in_the_plane_are_refused(columns, share):
    """Of most stars z, v_z or both are zero, or 1e-6 of what they were."""
    stars = warm_disc()
    for factor in (0.0, 1e-6):
        w = stars.w.clone()
        w[: int(share * len(w)), list(columns)] *= factor
        names = " and ".join({2: "z", 5: "v_z"}[c] + r" = 0 \(median .*\)" for c in columns)
        with pytest.raises(ValueError, match=f"most of 400 stars have {names}: they say nothing of the motion off"):
            fit(model(), Catalog(w))
    # single orbits in the plane do have actions
    J = StaeckelFudge().actions(DISC, w)
    assert bool(torch.isfinite(J).all())


@pytest.mark.parametrize("selection", SKY, ids=lambda one: type(one).__name__)
def test_selections_turn_with_the_stars(selection):
    """S of turned stars by `Rotated` is that of the stars before; unturned ones are refused, alone and in a product."""
    stars = warm_disc(tilt=0.0)
    turned = stars.rotated([0.3, -0.4, 0.5])
    carried = Rotated(selection, turned.rotation)
    torch.testing.assert_close(carried(turned.w), selection(stars.w), rtol=1e-9, atol=1e-9)
    assert (carried.smooth, carried.position_only) == (selection.smooth, selection.position_only)
    chosen = turned[carried(turned.w) > 0]
    spherical = {"potential": Isochrone(1e11, 3.0)}
    assert len(model(carried, **spherical).prepare(chosen)) == len(chosen) > 0
    for wrong in (selection, selection * SphericalShell(0, 100)):
        with pytest.raises(
            ValueError, match=rf"{type(selection).__name__}.* is stated in the axes before .* Rotated\("
        ):
            model(wrong, **spherical).prepare(chosen)
    with pytest.raises(ValueError, match="turned by a rotation, the stars were not turned"):
        model(carried, **spherical).prepare(stars)
    with pytest.raises(ValueError, match="turned by a rotation, the stars were turned by another"):
        model(carried, **spherical).prepare(chosen.rotated([1.0, 0.0, 0.0]))


def test_selections_that_need_no_turning():
    """Shells, a user's own function, and distances from the Sun where the turned frame has it."""
    turned = warm_disc().rotated([0.3, -0.4, 0.5])
    own = Custom(lambda x, v: torch.ones_like(x[..., 0]), position_only=True)
    for selection in (SphericalShell(0, 100), own, HeliocentricDistance(100.0, observer=turned.frame.sun)):
        assert len(model(selection, potential=Isochrone(1e11, 3.0)).prepare(turned)) == 400


def test_a_selection_hides_the_axis():
    """Stars of one side of the sky may rotate about any axis on the mean: with a selection nothing is said of it."""
    stars = warm_disc(tilt=30.0)
    declared = SnapshotModel(DISC, LogisticGaussianProcess(rotation=True), selection=SphericalShell(0, 100))
    assert len(declared.prepare(stars)) == 400


def test_wrong_rotations():
    with pytest.raises(ValueError, match="Rotated turns a selection function"):
        Rotated(0.5, np.eye(3))
    with pytest.raises(ValueError, match="rotation must be orthogonal"):
        Rotated(SphericalShell(0, 9), np.ones((3, 3)))


def test_a_turned_selection_is_stored(tmp_path):
    """A saved model's selection of turned stars says the same afterwards."""
    stars = warm_disc().rotated([0.3, -0.4, 0.5])
    saved = Rotated(SkyCone(30.0, 20.0, 40.0), stars.rotation)
    write(saved, tmp_path / "s.safetensors")
    again = read(tmp_path / "s.safetensors")
    assert torch.equal(again(stars.w), saved(stars.w))
