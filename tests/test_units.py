"""The internal units against astropy's constants."""

from __future__ import annotations

import pytest
from astropy import constants
from astropy import units as u

from bayespot.units import UNITS, G, unit


def test_gravitational_constant():
    """G is astropy.constants.G over IAU GM_sun in kpc (km/s)^2 / Msun; G is known to 2e-5, agreement to 1e-6."""
    expected = (constants.G * u.Msun).to_value(u.kpc * u.km**2 / u.s**2)
    assert pytest.approx(expected, rel=1e-6) == G


def test_circular_speed_of_the_earth():
    """sqrt(G M_sun / 1 au) in these units is the Earth's 29.785 km/s, to 1e-4."""
    au = (1 * u.au).to_value(u.kpc)
    assert (G / au) ** 0.5 == pytest.approx(29.785, rel=1e-4)


def test_units_are_consistent():
    """Products of the internal units close: acceleration x length, G x density x length^2 and J x Omega are Phi."""
    G_unit = u.kpc * u.km**2 / u.s**2 / u.Msun
    for found in (
        unit("acceleration") * unit("r"),
        unit("radial_acceleration") * unit("r"),
        G_unit * unit("density") * unit("r") ** 2,
        G_unit * unit("enclosed_mass") / unit("r"),
        unit("circular_speed") ** 2,
        unit("action") * unit("frequency"),
        unit("action") / unit("time"),
    ):
        assert found.is_equivalent(unit("potential"))
        assert found.to(unit("potential")) == pytest.approx(1, abs=1e-14)
    assert all(isinstance(unit(name), u.UnitBase) for name in UNITS)


def test_unknown_quantity():
    """An unknown quantity is a ValueError with the value received and the choices."""
    with pytest.raises(ValueError, match=r"'mass'.*enclosed_mass"):
        unit("mass")
