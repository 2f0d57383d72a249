"""Internal units (kpc, km/s, Msun) and the astropy boundary.

Inside the package every number is a plain float64 tensor in these units; astropy units are attached or
removed only where data enter or leave (catalogues, result tables, plots).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from astropy import units as u

#: Gravitational constant in kpc (km/s)^2 / Msun: astropy.constants.G (CODATA 2018) over IAU 2015 GM_sun,
#: kept as a number so that importing bayespot does not import astropy; a test compares the two.
G = 4.300917270036279e-06

#: Unit strings (astropy syntax) of every quantity the package writes.
UNITS: dict[str, str] = {
    "r": "kpc",
    "potential": "km2 / s2",
    "acceleration": "km2 / (s2 kpc)",
    "radial_acceleration": "km2 / (s2 kpc)",
    "density": "Msun / kpc3",
    "enclosed_mass": "Msun",
    "circular_speed": "km / s",
    "action": "kpc km / s",
    "frequency": "km / (s kpc)",
    "time": "kpc s / km",
}


def unit(quantity: str) -> u.UnitBase:
    """Return the astropy unit in which bayespot writes ``quantity``.

    Parameters
    ----------
    quantity
        A key of `UNITS`, for instance ``"density"``.

    Raises
    ------
    ValueError
        If the quantity is unknown.
    """
    from astropy import units as u

    if quantity not in UNITS:
        raise ValueError(f"unknown quantity {quantity!r}; choose one of {', '.join(UNITS)}")
    return u.Unit(UNITS[quantity])
