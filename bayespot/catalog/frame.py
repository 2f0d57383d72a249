"""The Galactocentric frame: heliocentric observables to (x, v) and back, in astropy's v4.0 frame or one's own."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from bayespot.catalog.refusal import CatalogError
from bayespot.catalog.rotation import rotation_matrix
from bayespot.units import takes

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]


@takes(r_sun="length", z_sun="length", v_sun="speed", galcen="angle", roll="angle", rotation="number")
@dataclass(frozen=True)
class Frame:
    """A Galactocentric frame, right-handed: x from the Sun to the centre, y along the rotation, z to the north.

    The Sun is at about (-r_sun, 0, z_sun) and moves with v_sun; the defaults are astropy's v4.0. galpy's own
    coordinates are left-handed (the Sun on the positive x axis): turn the sign of x and vx.

    Parameters
    ----------
    r_sun
        Distance from the Sun to the Galactic centre, kpc.
    z_sun
        Height of the Sun above the Galactic plane, kpc.
    v_sun
        Velocity of the Sun, km/s, the rotation of the Galaxy included.
    galcen
        Right ascension and declination of the centre, deg.
    roll
        Angle by which the plane is turned about the line to the centre, deg.
    rotation
        Rows of the matrix that turns the axes further, as `bayespot.catalog.Catalog.rotated` does; None: not at all.

    Raises
    ------
    CatalogError
        (A ValueError.) If a number cannot be the Milky Way's in these units.
    """

    r_sun: float = 8.122
    z_sun: float = 0.0208
    v_sun: tuple[float, float, float] = (12.9, 245.6, 7.78)
    galcen: tuple[float, float] = (266.4051, -28.936175)
    roll: float = 0.0
    rotation: tuple[tuple[float, float, float], ...] | None = None

    def __post_init__(self) -> None:
        v = tuple(float(c) for c in np.ravel(self.v_sun))
        object.__setattr__(self, "v_sun", v)
        object.__setattr__(self, "r_sun", float(self.r_sun))
        object.__setattr__(self, "z_sun", float(self.z_sun))
        if self.rotation is not None:
            rows = rotation_matrix(None, self.rotation).tolist()
            object.__setattr__(self, "rotation", tuple(tuple(row) for row in rows))
        if not 1 < self.r_sun < 100:
            raise CatalogError(f"r_sun = {self.r_sun:g} kpc is not the distance to the centre; give kpc, such as 8.122")
        if not abs(self.z_sun) < 1:
            raise CatalogError(f"z_sun = {self.z_sun:g} kpc is not the Sun's height; give kpc, such as 0.0208")
        if len(v) != 3 or not all(abs(c) < 1000 for c in v):
            raise CatalogError(
                f"v_sun = {v} km/s is not the Sun's velocity; give three numbers, such as 12.9,245.6,7.78"
            )

    @classmethod
    def of(cls, given: Any) -> Frame:
        """Return the frame that is meant by a `Frame`, an astropy ``Galactocentric``, a catalogue's metadata or None.

        Raises
        ------
        CatalogError
            If it is none of these.
        """
        if given is None:
            return cls()
        if isinstance(given, cls):
            return given
        if isinstance(given, Mapping):
            if "galcen_distance_kpc" in given:
                return cls(
                    given["galcen_distance_kpc"],
                    given["z_sun_pc"] / 1000,
                    tuple(given["galcen_v_sun_km_s"]),
                    (given["galcen_ra_deg"], given["galcen_dec_deg"]),
                    given["roll_deg"],
                )
        elif type(given).__name__ == "Galactocentric":
            from astropy.coordinates import CartesianDifferential

            centre, motion = given.galcen_coord, given.galcen_v_sun
            speed = motion.d_xyz if isinstance(motion, CartesianDifferential) else motion.xyz
            return cls(
                float(given.galcen_distance.to_value("kpc")),
                float(given.z_sun.to_value("kpc")),
                tuple(speed.to_value("km/s")),
                (float(centre.ra.deg), float(centre.dec.deg)),
                float(given.roll.to_value("deg")),
            )
        raise CatalogError(
            f"frame = {given!r} is no Galactocentric frame; give Frame(r_sun=8.178, z_sun=0.0208, "
            "v_sun=(11.1, 248.5, 8.59)) or an astropy Galactocentric"
        )

    @property
    def sun(self) -> tuple[float, float, float]:
        """Position of the Sun in this frame, kpc: what selections take as ``observer``."""
        _, sun = _rotation(self)
        return (float(sun[0]), float(sun[1]), float(sun[2]))

    def parameters(self) -> dict[str, Any]:
        """Return the frame as plain numbers, for the metadata; a rotation is recorded beside it, not in it."""
        return {
            "name": "astropy Galactocentric v4.0"
            if replace(self, rotation=None) == Frame()
            else "Galactocentric with a Sun of the user's",
            "galcen_ra_deg": self.galcen[0],
            "galcen_dec_deg": self.galcen[1],
            "galcen_distance_kpc": self.r_sun,
            "galcen_v_sun_km_s": list(self.v_sun),
            "z_sun_pc": 1000 * self.z_sun,
            "roll_deg": self.roll,
        }

    @takes(rotation="number")
    def turned(self, rotation: Any) -> Frame:
        """Return the frame with its axes turned by a matrix (3, 3) on top of what it is; None: itself."""
        if rotation is None:
            return self
        matrix = rotation_matrix(None, rotation)
        if self.rotation is not None:
            matrix = matrix @ torch.tensor(self.rotation, dtype=torch.float64)
        return replace(self, rotation=tuple(tuple(row) for row in matrix.tolist()))

    def astropy(self) -> Any:
        """Return the frame as astropy's ``Galactocentric``; CatalogError if its axes are turned, which that cannot."""
        if self.rotation is not None:
            raise CatalogError(
                "astropy's Galactocentric has no turned axes: take the frame of the stars before Catalog.rotated"
            )
        from astropy import coordinates as coord
        from astropy import units as u

        return coord.Galactocentric(
            galcen_coord=coord.ICRS(ra=self.galcen[0] * u.deg, dec=self.galcen[1] * u.deg),
            galcen_distance=self.r_sun * u.kpc,
            galcen_v_sun=coord.CartesianDifferential(list(self.v_sun) * u.km / u.s),
            z_sun=self.z_sun * u.kpc,
            roll=self.roll * u.deg,
        )


def frame_parameters(frame: Frame | None = None) -> dict[str, Any]:
    """Return the parameters of the Galactocentric frame (default: astropy's v4.0) as plain numbers."""
    return Frame.of(frame).parameters()


@functools.cache
def _rotation(frame: Frame) -> tuple[Array, Array]:
    """Return R (3, 3) and the Sun's w (6): x = R x_icrs + sun[:3], v = R v_icrs + sun[3:]."""
    from astropy import coordinates as coord
    from astropy import units as u

    corners = coord.CartesianRepresentation(
        np.concatenate([np.zeros((3, 1)), np.eye(3)], 1) * u.kpc,
        differentials=coord.CartesianDifferential(np.zeros((3, 4)) * u.km / u.s),
    )
    found = coord.ICRS(corners).transform_to(replace(frame, rotation=None).astropy())
    x, v = found.cartesian.xyz.to_value("kpc"), found.velocity.d_xyz.to_value("km/s")
    if frame.rotation is not None:
        x, v = (np.array(frame.rotation) @ part for part in (x, v))
    return x[:, 1:] - x[:, :1], np.concatenate([x[:, 0], v[:, 0]])


def proper_motion_factor() -> float:
    """Return k, the speed in km/s of 1 mas/yr at 1 kpc (4.74)."""
    from astropy import units as u

    return float((1 * u.mas * u.kpc / u.yr).to_value(u.km / u.s, u.dimensionless_angles()))


def heliocentric(w: Array, frame: Frame | None = None) -> dict[str, Array]:
    """Turn Galactocentric w (..., 6) into ``ra dec distance pmra pmdec radial_velocity``; see `galactocentric`."""
    rotation, sun = _rotation(Frame.of(frame))
    x, v = (w[..., :3] - sun[:3]) @ rotation, (w[..., 3:] - sun[3:]) @ rotation
    d = np.linalg.norm(x, axis=-1)
    n = x / d[..., None]
    ra, dec = np.arctan2(n[..., 1], n[..., 0]) % (2 * np.pi), np.arcsin(np.clip(n[..., 2], -1, 1))
    p, q, _ = _sky_axes(ra, dec)
    k = proper_motion_factor()
    return {
        "ra": np.degrees(ra),
        "dec": np.degrees(dec),
        "distance": d,
        "pmra": (v * p).sum(-1) / (k * d),
        "pmdec": (v * q).sum(-1) / (k * d),
        "radial_velocity": (v * n).sum(-1),
    }


def _sky_axes(ra: Array, dec: Array) -> tuple[Array, Array, Array]:
    """Unit vectors towards east, north and the star."""
    (sin_a, cos_a), (sin_d, cos_d) = ((np.sin(angle), np.cos(angle)) for angle in (ra, dec))
    p = np.stack([-sin_a, cos_a, np.zeros_like(ra)], -1)
    q = np.stack([-cos_a * sin_d, -sin_a * sin_d, cos_d], -1)
    n = np.stack([cos_a * cos_d, sin_a * cos_d, sin_d], -1)
    return p, q, n


def galactocentric_w(values: Mapping[str, Tensor], frame: Frame | None = None) -> Tensor:
    """Turn heliocentric observables into w (*batch, 6), as `galactocentric` without the Jacobian; differentiable."""
    ra, dec = torch.deg2rad(values["ra"]), torch.deg2rad(values["dec"])
    d = (values["distance"] if "distance" in values else 1 / values["parallax"])[..., None]
    sin_a, cos_a, sin_d, cos_d = ra.sin(), ra.cos(), dec.sin(), dec.cos()
    p = torch.stack([-sin_a, cos_a, torch.zeros_like(ra)], -1)
    q = torch.stack([-cos_a * sin_d, -sin_a * sin_d, cos_d], -1)
    n = torch.stack([cos_a * cos_d, sin_a * cos_d, sin_d], -1)
    across = proper_motion_factor() * (values["pmra"][..., None] * p + values["pmdec"][..., None] * q)
    rotation, sun = (torch.as_tensor(a) for a in _rotation(Frame.of(frame)))
    v = values["radial_velocity"][..., None] * n + d * across
    return torch.cat([(d * n) @ rotation.T, v @ rotation.T], -1) + sun


def galactocentric(values: dict[str, Array], frame: Frame | None = None) -> tuple[Array, Array]:
    """Turn heliocentric observables into w (n, 6), with the Jacobian (n, 6, 6).

    With the unit vectors n (towards the star), p (east) and q (north), distance d and k = 4.74 km/s per
    mas/yr kpc, x = R d n + x_sun and v = R (v_r n + k d (pmra p + pmdec q)) + v_sun.

    Parameters
    ----------
    values
        ``ra dec`` (deg), ``distance`` (kpc) or ``parallax`` (mas), ``pmra pmdec`` (mas/yr), ``radial_velocity``
        (km/s).
    frame
        Default: astropy's v4.0.

    Returns
    -------
    w
        kpc and km/s.
    jacobian
        Derivatives of w by (ra cos(dec), dec, distance or parallax, pmra, pmdec, radial_velocity).
    """
    k = proper_motion_factor()
    ra, dec = np.radians(values["ra"]), np.radians(values["dec"])
    d = values["distance"] if "distance" in values else 1 / values["parallax"]
    p, q, n = _sky_axes(ra, dec)
    mu_p, mu_q, v_r, far = (a[:, None] for a in (k * values["pmra"], k * values["pmdec"], values["radial_velocity"], d))
    rotation, _ = _rotation(Frame.of(frame))
    w = galactocentric_w({name: torch.as_tensor(value) for name, value in values.items()}, frame).numpy()

    # dn = p da + q dd, dp = (tan(dec) q - n) da, dq = -tan(dec) p da - n dd, with da = cos(dec) dra
    tan = np.tan(dec)[:, None]
    degree = np.pi / 180
    by_far = 1.0 if "distance" in values else -(far**2)
    zero = np.zeros_like(n)
    dx = [far * p * degree, far * q * degree, n * by_far, zero, zero, zero]
    dv = [
        (v_r * p + far * (mu_p * (tan * q - n) - mu_q * tan * p)) * degree,
        (v_r * q - far * mu_q * n) * degree,
        (mu_p * p + mu_q * q) * by_far,
        k * far * p,
        k * far * q,
        n,
    ]
    jacobian = np.concatenate([rotation @ np.stack(dx, -1), rotation @ np.stack(dv, -1)], 1)
    return w, jacobian
