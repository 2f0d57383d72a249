"""Posterior fields of axisymmetric potentials, from draws of a Miyamoto-Nagai disc in an NFW halo made by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from astropy import units as u
from pyro.distributions import LogNormal

from bayespot import Isochrone, Posterior, SnapshotModel
from bayespot.df import ActionMixture
from bayespot.posterior import EnsemblePosterior
from bayespot.potential import (
    AXIAL_FIELDS,
    MERIDIONAL_FIELDS,
    NFW,
    RADIAL_FIELDS,
    MiyamotoNagai,
    axial_fields,
    meridional_fields,
)
from bayespot.units import UNITS

N = 24
RADII = np.array([1.0, 4.0, 8.2])
HEIGHTS = np.array([-1.1, 0.0, 2.0])


def prior(value: float) -> LogNormal:
    return LogNormal(torch.tensor(math.log(value)).double(), torch.tensor(0.2).double())


@pytest.fixture(scope="module")
def posterior() -> Posterior:
    model = SnapshotModel(MiyamotoNagai(prior(6e10), 3.0, prior(0.3)) + NFW(prior(8e11), 16.0), ActionMixture(1))
    generator = torch.Generator().manual_seed(2)

    def around(value: float) -> torch.Tensor:
        return value * torch.exp(0.1 * torch.randn(N, dtype=torch.float64, generator=generator))

    draws = {
        "potential.members.0.m_tot": around(6e10),
        "potential.members.0.b": around(0.3),
        "potential.members.1.m_s": around(8e11),
    }
    x = 8 * np.random.default_rng(0).normal(size=(500, 3)) * [1, 1, 0.1]
    return Posterior(model, draws, {"n_stars": 500, "r_q": np.geomspace(0.1, 30, 9).tolist(), "positions": x})


def test_fields_are_those_of_each_potential(posterior):
    """Every field of every draw equals that of its potential, to 1e-10; names, units and points."""
    found = posterior.axial_fields(RADII, height=0.9)
    assert tuple(found) == AXIAL_FIELDS
    over = posterior.meridional_fields(RADII, HEIGHTS)
    assert tuple(over) == MERIDIONAL_FIELDS
    R, z = (torch.as_tensor(part.ravel()) for part in np.meshgrid(RADII, HEIGHTS))
    for i in (0, 7):
        potential = posterior.potential_at(i)
        for name, value in axial_fields(potential, RADII, height=0.9).items():
            np.testing.assert_allclose(found[name].draws[i], value.detach(), rtol=1e-10, err_msg=name)
        for name, value in meridional_fields(potential, R, z).items():
            np.testing.assert_allclose(over[name].draws[i], value.detach(), rtol=1e-10, err_msg=name)
        for name, field in posterior.radial_fields(RADII).items():
            np.testing.assert_allclose(field.draws[i], posterior.field(name, RADII).draws[i], rtol=1e-10)
    for name, field in (found | over).items():
        assert field.unit == UNITS[name]
    np.testing.assert_allclose(over["density"].points[:, [0, 2]], np.stack([R, z], -1))


def test_repeated_draws_and_ensembles(posterior):
    """Draws that are the same are evaluated once and counted as often as they occur, in every order."""
    index = torch.tensor([3, 3, 0, 3])
    counted: list[int] = []
    few = posterior.taken(index)
    field = few.axial_fields(RADII, ["vertical_frequency"], tick=lambda: counted.append(1))["vertical_frequency"]
    assert len(counted) == 4
    whole = posterior.axial_fields(RADII, ["vertical_frequency"])["vertical_frequency"].draws
    np.testing.assert_allclose(field.draws, whole[index.numpy()], rtol=1e-12)
    mixture = EnsemblePosterior([posterior, few], [0.5, 0.5])
    assert mixture.symmetry == "axisymmetric"
    assert mixture.axial_fields(RADII, ["surface_density"])["surface_density"].draws.shape == (mixture.n_draws, 3)


def test_tables(posterior):
    """Against R the fields of axisymmetric potentials come beside the others, a sphere's table has none of them; over
    (R, z) a row per place. Units and quantiles."""
    table = posterior.predict(RADII)
    for name in (*RADIAL_FIELDS, *AXIAL_FIELDS):
        for suffix in ("q50", "q16", "q84", "mean", "sd", "q2.5", "q97.5"):
            assert table[f"{name}_{suffix}"].unit == u.Unit(UNITS[name])
    sphere = SnapshotModel(Isochrone(prior(1e11), 3.0), ActionMixture(1))
    ball = Posterior(sphere, {"potential.m_tot": torch.tensor([1e11, 2e11]).double()})
    assert ball.symmetry == "spherical"
    assert not [name for name in ball.predict(RADII).colnames if name.startswith(AXIAL_FIELDS)]
    counted: list[int] = []
    over = posterior.predict_plane(RADII * 1000 * u.pc, HEIGHTS, tick=lambda: counted.append(1))
    assert len(counted) == N * len(MERIDIONAL_FIELDS)
    assert over.colnames[:5] == ["R", "z", "potential_q50", "potential_q16", "potential_q84"]
    assert len(over) == 9
    assert over["R"][:4].to_value(u.kpc) == pytest.approx([1.0, 4.0, 8.2, 1.0])
    assert over["z"][[0, 3, 6]].to_value(u.kpc) == pytest.approx([-1.1, 0.0, 2.0])
    a_z = posterior.field("acceleration", [[8.2, 0.0, 2.0]]).draws[:, 0, 2]
    assert over["acceleration_z_sd"][8].to_value(u.Unit(UNITS["acceleration_z"])) == pytest.approx(a_z.std(ddof=1))
    assert over["acceleration_z_q50"][8].value == pytest.approx(np.median(a_z))
    # of a sphere too: |a| is -dPhi/dr
    round_ = ball.meridional_fields([3.0], [4.0])
    inward = np.hypot(round_["acceleration_R"].draws, round_["acceleration_z"].draws)
    np.testing.assert_allclose(inward, -ball.field("radial_acceleration", [5.0]).draws, rtol=1e-12)


def test_maps(posterior, monkeypatch):
    """Mean and sd of every cell are those of the field there, in whatever blocks; the extent is the stars'."""
    maps = posterior.meridional_maps(r_max=10.0, z_max=4.0, n=5)
    assert [one.name for one in maps] == list(MERIDIONAL_FIELDS)
    assert maps[0].first.tolist() == pytest.approx([1, 3, 5, 7, 9])
    assert maps[0].second.tolist() == pytest.approx([1, 3])
    assert [axis[[0, -1]].tolist() for axis in maps[0].edges] == [[0, 10], [0, 4]]
    density = posterior.field("density", maps[1].points.reshape(-1, 3)).draws
    np.testing.assert_allclose(maps[1].mean.ravel(), density.mean(0), rtol=1e-9)
    np.testing.assert_allclose(maps[1].sd.ravel(), density.std(0, ddof=1), rtol=1e-9)
    monkeypatch.setattr("bayespot.posterior.meridian._BLOCK", 5 * N)
    np.testing.assert_allclose(posterior.meridional_maps(r_max=10.0, z_max=4.0, n=5)[3].sd, maps[3].sd, rtol=1e-12)
    x = posterior.meta["positions"]
    R = np.quantile(np.hypot(x[:, 0], x[:, 1]), 0.84)
    # a thin disc of stars is shown to a quarter of its radius
    edges = posterior.meridional_maps(["potential"], n=8)[0].edges
    assert (edges[0][-1], edges[1][-1]) == pytest.approx((R, R / 4))


def test_inference_data(posterior):
    """Fields over (R, z) with both coordinates, fields of R with one; units as attributes; the sites stay."""
    group = posterior.to_inference_data(RADII, HEIGHTS)["posterior"]
    over = posterior.meridional_fields(RADII, HEIGHTS)
    for name, field in over.items():
        assert group[name].dims == ("chain", "draw", "z", "R")
        assert group[name].attrs["unit"] == UNITS[name]
        np.testing.assert_allclose(group[name].sel(R=8.2, z=2.0)[0], field.draws[:, 8])
    assert group["R"].attrs["unit"] == group["z"].attrs["unit"] == "kpc"
    assert "potential.members.1.m_s" in group
    plane = posterior.to_inference_data(RADII)["posterior"]
    assert {*RADIAL_FIELDS, *AXIAL_FIELDS} <= set(plane.data_vars)
    assert plane["vertical_frequency"].dims == ("chain", "draw", "r")
    with pytest.raises(ValueError, match="heights need radii"):
        posterior.to_inference_data(heights=HEIGHTS)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p.axial_fields([1.0, -2.0]), r"radii must be positive and finite \(kpc\), got \[-2.0\]"),
        (lambda p: p.axial_fields([1.0], ["mass"]), "unknown field 'mass'"),
        (lambda p: p.meridional_fields([0.0], [1.0]), "radii must be positive"),
        (lambda p: p.meridional_fields([1.0], [np.nan]), r"heights must be finite numbers \(kpc\), got \[nan\]"),
        (lambda p: p.meridional_maps(r_max=-1.0, z_max=1.0), r"r_max must be positive and finite \(kpc\), got -1"),
        (lambda p: p.meridional_maps(n=1), "n must be at least 2, got 1"),
        (lambda p: Posterior(p.model, p.draws).meridional_maps(), "know no stars: give r_max and z_max"),
    ],
)
def test_refusals(posterior, call, message):
    """What was given and what is wanted."""
    with pytest.raises(ValueError, match=message):
        call(posterior)
