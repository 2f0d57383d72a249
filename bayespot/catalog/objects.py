"""Stars as other packages hold them in memory: which constructor takes what, and coordinates of astropy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bayespot.catalog.refusal import CatalogError

if TYPE_CHECKING:
    from astropy.table import Table

#: Types by name, so that none of their packages is imported, and what takes them.
_TAKEN_BY = {
    "DataFrame": "Catalog.from_dataframe(frame)",
    "Table": "Catalog.from_table(table)",
    "QTable": "Catalog.from_table(table)",
    "SkyCoord": "Catalog.from_skycoord(coordinates)",
    "Orbit": "Catalog.from_skycoord(orbit.SkyCoord())",
    "Catalog": "as it is, since it is a Catalog",
    "str": "Catalog.read(path)",
    "PosixPath": "Catalog.read(path)",
    "WindowsPath": "Catalog.read(path)",
    "dict": "Catalog.from_table(astropy.table.Table(columns))",
}
_TAKES = {
    "from_table": ("Table", "QTable", "TimeSeries"),
    "from_gaia": ("Table", "QTable"),
    "from_dataframe": ("DataFrame",),
    "from_skycoord": ("SkyCoord",),
    "Catalog(w)": (),
}


def require_kind(given: Any, constructor: str) -> None:
    """Raise CatalogError, with the constructor that takes it, if ``given`` is another's."""
    names = [kind.__name__ for kind in type(given).__mro__]
    if any(name in _TAKES[constructor] for name in names):
        return
    other = next((name for name in names if name in _TAKEN_BY), None)
    if other is not None:
        raise CatalogError(f"{constructor} does not take a {other}; use {_TAKEN_BY[other]}")
    if constructor != "Catalog(w)":
        wanted = " or ".join(_TAKES[constructor][:2])
        raise CatalogError(f"{constructor} takes a {wanted}, got {type(given).__name__}")


def skycoord_columns(coordinates: Any) -> tuple[Table, Any]:
    """Return the columns that `Catalog.from_table` takes, and the Galactocentric frame that the coordinates carry."""
    from astropy import coordinates as coord
    from astropy import units as u
    from astropy.table import Table

    coordinates = coordinates.ravel() if coordinates.shape else coordinates.reshape(1)
    if "s" not in coordinates.data.differentials:
        raise CatalogError("these coordinates have no velocities: give pm_ra_cosdec, pm_dec and radial_velocity")
    if coordinates.data.norm().unit.is_equivalent(u.one):
        raise CatalogError("these coordinates have no distances: give distance")
    table = Table()
    if coordinates.frame.name == "galactocentric":
        own = coordinates.frame.replicate_without_data()
        x = coordinates.data.represent_as(coord.CartesianRepresentation, coord.CartesianDifferential)
        for name, value, speed in zip("xyz", x.xyz, x.differentials["s"].d_xyz, strict=True):
            table[name], table[f"v{name}"] = value.to(u.kpc), speed.to(u.km / u.s)
        return table, own
    # galpy's coordinates carry the Sun that they were made with
    carried = {name: getattr(coordinates, name, None) for name in ("galcen_distance", "z_sun", "galcen_v_sun")}
    own = None if any(value is None for value in carried.values()) else coord.Galactocentric(**carried)
    sky = coordinates.icrs
    table["ra"], table["dec"], table["distance"] = sky.ra.to(u.deg), sky.dec.to(u.deg), sky.distance.to(u.kpc)
    table["pmra"], table["pmdec"] = sky.pm_ra_cosdec.to(u.mas / u.yr), sky.pm_dec.to(u.mas / u.yr)
    table["radial_velocity"] = sky.radial_velocity.to(u.km / u.s)
    return table, own
