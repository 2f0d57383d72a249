"""Turned stars: distances, speeds, covariances, frames and files; the axis about which stars rotate.

Rotations are scipy's, by random angles. Exact identities to 1e-10 relative; means of samples within their errors.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from contracts.catalog import observed_table, phase_space
from scipy.spatial.transform import Rotation

from bayespot import Isochrone
from bayespot.catalog import Catalog, CatalogError, Frame
from bayespot.catalog.frame import galactocentric_w, heliocentric
from bayespot.likelihood import MeasurementErrors
from bayespot.mock import mock, observe
from bayespot.potential import MiyamotoNagai, describe

TURN = Rotation.from_euler("zyx", [40, 25, -70], degrees=True)


def rotating(n=400, share=0.9, seed=1, tilt=0.0):
    """Stars near circular orbits in the plane, ``share`` of them in the positive sense, turned by ``tilt`` about x."""
    rng = np.random.default_rng(seed)
    R, phi, sense = rng.uniform(2, 12, n), rng.uniform(0, 2 * np.pi, n), np.where(rng.random(n) < share, 1, -1)
    x = np.stack([R * np.cos(phi), R * np.sin(phi), 0.3 * rng.normal(size=n)], -1)
    v = 200 * sense[:, None] * np.stack([-np.sin(phi), np.cos(phi), 0 * phi], -1) + 20 * rng.normal(size=(n, 3))
    stars = Catalog(np.concatenate([x, v], 1))
    return stars.rotated(rotation=Rotation.from_euler("x", tilt, degrees=True))


def test_lengths_and_products():
    """|x|, |v|, x . v and the angular momentum (turned itself) of 50 stars; back again they are where they were."""
    stars = Catalog(phase_space())
    turned = stars.rotated(rotation=TURN)
    for before, after in ((stars.x, turned.x), (stars.v, turned.v)):
        np.testing.assert_allclose(after.norm(dim=1), before.norm(dim=1), rtol=1e-12)
        np.testing.assert_allclose(after, TURN.apply(before.numpy()), rtol=1e-10, atol=1e-10)
    L = [np.cross(c.x.numpy(), c.v.numpy()) for c in (stars, turned)]
    np.testing.assert_allclose(L[1], TURN.apply(L[0]), rtol=1e-9, atol=1e-9)
    back = turned.rotated(rotation=TURN.inv())
    np.testing.assert_allclose(back.w, stars.w, rtol=1e-12, atol=1e-12)
    assert stars.rotation is back.rotation is None


@pytest.mark.parametrize(
    "axis", [(0.0, 0.0, 1.0), (0.0, 0.0, -1.0), (3.0, 0.0, 0.0), (1.0, -2.0, -0.5), (1e-9, 0, -1.0)]
)
def test_axis_becomes_z(axis):
    """The axis' own direction has x = y = 0, z > 0; the matrix is a proper rotation."""
    turned = Catalog(np.concatenate([[axis], [[5.0, 6.0, 7.0]]], 1)).rotated(axis)
    np.testing.assert_allclose(turned.x[0], [0, 0, np.linalg.norm(axis)], atol=1e-12 * np.linalg.norm(axis))
    if turned.rotation is not None:
        assert torch.linalg.det(turned.rotation).item() == pytest.approx(1)
    else:
        assert axis == (0, 0, 1)


def test_covariance_against_a_sample():
    """Of the covariance of one star with all correlations: R C R^T, against 2e5 draws turned one by one (2 %)."""
    rng = np.random.default_rng(2)
    a = rng.normal(size=(6, 6)) * [[0.1], [0.1], [0.1], [5.0], [5.0], [5.0]]
    w = phase_space(1)
    draws = rng.multivariate_normal(w[0], a @ a.T, 200_000)
    turned = Catalog(w, (a @ a.T)[None]).rotated(rotation=TURN)
    found = np.cov(Catalog(draws).rotated(rotation=TURN).w.numpy().T)
    size = np.sqrt(np.diag(found))
    np.testing.assert_allclose(
        turned.covariance[0].numpy() / np.outer(size, size), found / np.outer(size, size), atol=0.02
    )
    trace = torch.linalg.eigvalsh(turned.covariance[0])
    np.testing.assert_allclose(trace, np.linalg.eigvalsh(a @ a.T), rtol=1e-8, atol=1e-10)


def test_observables_turn_with_their_frame(tmp_path):
    """The observables stay as measured, and with the turned frame give the turned stars; so do samples within errors,
    a file and the Sun's place."""
    stars = Catalog.from_table(observed_table())
    turned = stars.rotated(rotation=TURN)
    assert torch.equal(turned.observed.values, stars.observed.values)
    values = dict(zip(turned.observed.names, turned.observed.values.unbind(-1), strict=True))
    np.testing.assert_allclose(galactocentric_w(values, turned.observed.frame), turned.w, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(galactocentric_w(values, turned.frame), turned.w, rtol=1e-9, atol=1e-9)
    back = heliocentric(turned.w.numpy(), turned.frame)
    np.testing.assert_allclose(back["ra"], values["ra"], rtol=1e-9)
    np.testing.assert_allclose(turned.frame.sun, TURN.apply(Frame().sun), rtol=1e-10)
    samples = [MeasurementErrors(n_samples=8).samples(one, 0) for one in (stars, turned)]
    np.testing.assert_allclose(
        samples[1][..., :3],
        TURN.apply(samples[0][..., :3].reshape(-1, 3).numpy()).reshape(40, 8, 3),
        rtol=1e-8,
        atol=1e-8,
    )
    path = tmp_path / "turned.ecsv"
    turned.write(path)
    again = Catalog.read(path)
    np.testing.assert_allclose(again.w, turned.w, rtol=1e-12)
    np.testing.assert_allclose(again.rotation, TURN.as_matrix(), atol=1e-12)
    assert again.observed.frame == turned.observed.frame
    np.testing.assert_allclose(again.rotated(rotation=again.rotation.T).w, stars.w, rtol=1e-9, atol=1e-9)


def test_observing_turned_stars():
    """A mock that is turned and then observed gives, turned back, what its observation without rotation gives."""
    stars = mock("isochrone", n_stars=40, seed=1)
    seen = observe(stars, 3, distance_error=0.1)
    turned = observe(stars.rotated(rotation=TURN), 3, distance_error=0.1)
    np.testing.assert_allclose(turned.observed.values, seen.observed.values, rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose(turned.rotated(rotation=turned.rotation.T).w, seen.w, rtol=1e-8, atol=1e-8)


def test_frames_of_other_packages():
    """astropy's Galactocentric cannot be turned: refused; names and rows of a turned catalogue are its own."""
    stars = Catalog.example("globular_clusters").rotated([0.0, 1.0, 1.0])
    with pytest.raises(CatalogError, match="has no turned axes"):
        stars.frame.astropy()
    assert stars[3].names == (stars.names[3],)
    assert stars[3].rotation is not None


def test_truth_after_a_rotation():
    """A sphere's potential stays true, a disc's only if z stays the axis; what is dropped is said."""
    disc = Catalog(phase_space(), meta={"truth": {"potential": describe(MiyamotoNagai(1e11, 3.0, 0.3)), "orbits": {}}})
    sphere = Catalog(phase_space(), meta={"truth": {"potential": describe(Isochrone(1e11, 3.0)), "seed": 1}})
    assert "truth" not in disc.rotated([0.0, 1.0, 1.0]).meta
    assert "left out" in disc.rotated([0.0, 1.0, 1.0]).meta["notes"][-1]
    assert disc.rotated([0.0, 0.0, -1.0]).meta["truth"] == disc.meta["truth"]
    assert disc.rotated(rotation=Rotation.from_euler("z", 1.0)).meta["truth"] == disc.meta["truth"]
    assert sphere.rotated([0.0, 1.0, 1.0]).meta["truth"] == sphere.meta["truth"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "give either axis="),
        ({"axis": [0, 0, 1], "rotation": np.eye(3)}, "give either axis="),
        ({"axis": [0, 0, 0]}, "axis must be three numbers that are not all zero"),
        ({"axis": [1, 0]}, "axis must be three numbers"),
        ({"rotation": np.diag([1.0, 1.0, -1.0])}, "the determinant is -1"),
        ({"rotation": 2 * np.eye(3)}, r"departs from one by 3"),
        ({"rotation": Rotation.random(4, rng=0)}, r"got shape \(4, 3, 3\)"),
        ({"rotation": np.full((3, 3), np.nan)}, "must be a matrix"),
    ],
)
def test_impossible_rotations(arguments, words):
    with pytest.raises(CatalogError, match=words):
        Catalog(phase_space()).rotated(**arguments)


@pytest.mark.parametrize("tilt", [0.0, 12.0, 80.0, 150.0])
def test_rotation_axis(tilt):
    """400 stars of a disc turned about x: direction and tilt within 4 of their errors, which are under a degree; turned
    upright they rotate about z in the positive sense."""
    stars = rotating(tilt=tilt)
    axis = stars.rotation_axis()
    expected = [0.0, -np.sin(np.radians(tilt)), np.cos(np.radians(tilt))]
    assert axis.tilt_error < 1.0
    assert np.degrees(np.arccos(np.dot(axis.direction, expected).clip(-1, 1))) < 4 * axis.tilt_error
    assert abs(axis.tilt - min(tilt, 180 - tilt)) < 4 * axis.tilt_error
    assert 0.7 < axis.rotation < 0.9
    assert (axis.p_value < 1e-10) == (tilt > 0)
    upright = stars.rotated(axis.direction).rotation_axis()
    assert upright.tilt < 1e-6
    assert upright.direction[2] == pytest.approx(1)


def test_error_of_the_axis():
    """Over 200 discs the tilt about y is scattered as its error says (12 %), p-values under 5 % come in 1 to 10 %."""
    found = [rotating(100, 0.9, seed).rotation_axis() for seed in range(200)]
    lean = np.degrees([np.arctan2(axis.direction[0], axis.direction[2]) for axis in found])
    assert np.std(lean) == pytest.approx(np.mean([axis.tilt_error for axis in found]), rel=0.12)
    assert 0.01 <= np.mean([axis.p_value < 0.05 for axis in found]) <= 0.1


def test_stars_without_rotation():
    """An isotropic sphere, and few stars: no axis."""
    for stars in (mock("isochrone", n_stars=500, seed=1), rotating(8)):
        with pytest.raises(CatalogError, match="have no axis"):
            stars.rotation_axis()
