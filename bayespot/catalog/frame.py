"""The Galactocentric frame: heliocentric observables to (x, v) and back, in astropy's v4.0 frame."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]


def frame_parameters() -> dict[str, Any]:
    """Return astropy's v4.0 parameters of the Galactocentric frame as plain numbers, for the metadata."""
    frame = _frame()
    _, sun = _rotation()
    return {
        "name": "astropy Galactocentric v4.0",
        "galcen_ra_deg": float(frame.galcen_coord.ra.deg),
        "galcen_dec_deg": float(frame.galcen_coord.dec.deg),
        "galcen_distance_kpc": float(frame.galcen_distance.to_value("kpc")),
        "galcen_v_sun_km_s": [float(v) for v in sun[3:]],
        "z_sun_pc": float(frame.z_sun.to_value("pc")),
        "roll_deg": float(frame.roll.to_value("deg")),
    }


def _frame() -> Any:
    from astropy.coordinates import Galactocentric, galactocentric_frame_defaults

    return Galactocentric(**galactocentric_frame_defaults.get_from_registry("v4.0")["parameters"])


@functools.cache
def _rotation() -> tuple[Array, Array]:
    """Return R (3, 3) and the Sun's w (6): x = R x_icrs + sun[:3], v = R v_icrs + sun[3:]."""
    from astropy import coordinates as coord
    from astropy import units as u

    corners = coord.CartesianRepresentation(
        np.concatenate([np.zeros((3, 1)), np.eye(3)], 1) * u.kpc,
        differentials=coord.CartesianDifferential(np.zeros((3, 4)) * u.km / u.s),
    )
    found = coord.ICRS(corners).transform_to(_frame())
    x, v = found.cartesian.xyz.to_value("kpc"), found.velocity.d_xyz.to_value("km/s")
    return x[:, 1:] - x[:, :1], np.concatenate([x[:, 0], v[:, 0]])


def proper_motion_factor() -> float:
    """Return k, the speed in km/s of 1 mas/yr at 1 kpc (4.74)."""
    from astropy import units as u

    return float((1 * u.mas * u.kpc / u.yr).to_value(u.km / u.s, u.dimensionless_angles()))


def heliocentric(w: Array) -> dict[str, Array]:
    """Turn Galactocentric w (..., 6) into ``ra dec distance pmra pmdec radial_velocity``; see `galactocentric`."""
    rotation, sun = _rotation()
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


def galactocentric_w(values: Mapping[str, Tensor]) -> Tensor:
    """Turn heliocentric observables into w (*batch, 6), as `galactocentric` without the Jacobian; differentiable."""
    ra, dec = torch.deg2rad(values["ra"]), torch.deg2rad(values["dec"])
    d = (values["distance"] if "distance" in values else 1 / values["parallax"])[..., None]
    sin_a, cos_a, sin_d, cos_d = ra.sin(), ra.cos(), dec.sin(), dec.cos()
    p = torch.stack([-sin_a, cos_a, torch.zeros_like(ra)], -1)
    q = torch.stack([-cos_a * sin_d, -sin_a * sin_d, cos_d], -1)
    n = torch.stack([cos_a * cos_d, sin_a * cos_d, sin_d], -1)
    across = proper_motion_factor() * (values["pmra"][..., None] * p + values["pmdec"][..., None] * q)
    rotation, sun = (torch.as_tensor(a) for a in _rotation())
    v = values["radial_velocity"][..., None] * n + d * across
    return torch.cat([(d * n) @ rotation.T, v @ rotation.T], -1) + sun


def galactocentric(values: dict[str, Array]) -> tuple[Array, Array]:
    """Turn heliocentric observables into w (n, 6), with the Jacobian (n, 6, 6).

    With the unit vectors n (towards the star), p (east) and q (north), distance d and k = 4.74 km/s per
    mas/yr kpc, x = R d n + x_sun and v = R (v_r n + k d (pmra p + pmdec q)) + v_sun.

    Parameters
    ----------
    values
        ``ra dec`` (deg), ``distance`` (kpc) or ``parallax`` (mas), ``pmra pmdec`` (mas/yr), ``radial_velocity``
        (km/s).

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
    rotation, _ = _rotation()
    w = galactocentric_w({name: torch.as_tensor(value) for name, value in values.items()}).numpy()

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
