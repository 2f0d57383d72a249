"""Published constraints on the Milky Way that results are set beside."""

from __future__ import annotations

from typing import NamedTuple


class Measurement(NamedTuple):
    """A published value of a field at a radius (kpc), with its errors and source."""

    field: str
    r: float
    value: float
    plus: float
    minus: float
    source: str


#: Circular speed in km/s and enclosed mass in Msun.
MILKY_WAY = (
    Measurement("circular_speed", 8.2, 228.9, 6.9, 6.9, "Eilers et al. 2019"),
    Measurement("circular_speed", 20.3, 199.8, 6.0, 6.0, "Eilers et al. 2019"),
    Measurement("enclosed_mass", 20.0, 1.91e11, 0.18e11, 0.17e11, "Posti & Helmi 2019"),
    Measurement("enclosed_mass", 21.1, 2.1e11, 0.4e11, 0.3e11, "Watkins et al. 2019"),
    Measurement("enclosed_mass", 39.5, 4.2e11, 0.7e11, 0.6e11, "Watkins et al. 2019"),
    Measurement("enclosed_mass", 50.0, 3.7e11, 0.0, 0.0, "Eadie & Juric 2019"),
)
