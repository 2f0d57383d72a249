"""Units of N-body snapshots: what GADGET, AREPO, GIZMO, SWIFT and EAGLE files say of theirs, a and h applied."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bayespot.catalog.columns import CatalogError

if TYPE_CHECKING:
    import h5py

#: Groups whose attributes tell units and cosmology; the first that has one counts.
_GROUPS = ("Header", "Parameters", "Units", "Cosmology", "RuntimePars", "Constants")
#: Factor to cgs, exponent of a and exponent of h in the attributes of a dataset: SWIFT (new, old), AREPO and
#: GADGET-4, EAGLE.
_ATTRIBUTES = (
    ("Conversion factor to CGS (not including cosmological corrections)", "a-scale exponent", "h-scale exponent"),
    ("CGS conversion factor", "a-scale exponent", "h-scale exponent"),
    ("to_cgs", "a_scaling", "h_scaling"),
    ("CGSConversionFactor", "aexp-scale-exponent", "h-scale-exponent"),
)
#: By kind: what the code unit is called in headers, the exponents of a and h that GADGET's family means by
#: comoving, cgs units per kpc or km/s, and SWIFT's exponent of a.
_KINDS = {
    "length": (("UnitLength_in_cm", "UnitLength_In_CGS"), 1.0, -1.0, 3.0856775814913674e21, 1.0),
    "velocity": (("UnitVelocity_in_cm_per_s", "UnitVelocity_In_CGS"), 0.5, 0.0, 1e5, 0.0),
}
_SWIFT_LENGTH, _SWIFT_TIME = "Unit length in cgs (U_L)", "Unit time in cgs (U_t)"
#: Kilometres per kpc.
_KM = 3.0856775814913674e16


@dataclass(frozen=True)
class SnapshotUnits:
    """Factors to kpc and km/s, physical.

    Parameters
    ----------
    path
        File, for messages.
    comoving
        Whether coordinates are comoving.
    a, h
        Scale factor, and Hubble parameter in 100 km/s/Mpc if known.
    hubble
        H(a) in km/s/kpc if known; 0 without expansion.
    cgs
        Code units of length and velocity in cgs by kind, of the header or as stated.
    stated
        Kinds whose unit the user stated.
    swift
        Whether the file follows SWIFT's conventions.
    h_is_known
        Whether h applies where only the header tells: False in doubt.
    """

    path: Path
    comoving: bool
    a: float
    h: float | None
    hubble: float | None
    cgs: dict[str, float]
    stated: tuple[str, ...]
    swift: bool
    h_is_known: bool

    def factor(self, dataset: h5py.Dataset, kind: str) -> float:
        """Return what the values of a dataset (or those in its units) are multiplied with to be physical kpc or km/s.

        Raises
        ------
        CatalogError
            If the file does not tell, or contradicts itself; the message names the option that states it.
        """
        _, by_a, by_h, unit, swift_by_a = _KINDS[kind]
        own = _own_units(dataset)
        cgs = self.cgs.get(kind)
        if own is not None:
            if cgs is not None and kind not in self.stated and abs(own[0] / cgs - 1) > 0.01:
                raise CatalogError(
                    f"{self.path}: the unit of {dataset.name} is {own[0]:.6g} in cgs by its own attributes and "
                    f"{cgs:.6g} by the header; state it with {_option(kind)}"
                )
            cgs = cgs if kind in self.stated else own[0]
            power_a, power_h = own[1:]
        elif self.swift:
            power_a, power_h = swift_by_a, 0.0
        else:
            power_a, power_h = (by_a if self.comoving else 0.0), by_h
            if not self.comoving and by_h and not self.h_is_known and self.h not in (None, 0.0, 1.0):
                raise CatalogError(
                    f"{self.path}: the run is not comoving and its header has HubbleParam = {self.h:g}: lengths may be "
                    f"in units per h or not; state hubble_param=1 if they are not, hubble_param={self.h:g} if they are"
                )
        if cgs is None:
            raise CatalogError(
                f"{self.path}: the file does not tell the unit of {kind} (no {_KINDS[kind][0][0]} in its header, no "
                f"attributes of {dataset.name}, no Units group); state the code's unit with {_option(kind)}"
            )
        value = cgs / unit * self.a**power_a
        if power_h and (self.comoving or self.h_is_known or own is not None):
            value *= self._known_h() ** power_h
        return value

    def expansion(self) -> float:
        """Return H(a) in km/s/kpc, or raise CatalogError if it cannot be told."""
        if self.hubble is None:
            raise CatalogError(
                f"{self.path}: no Omega0 and OmegaLambda in the header, so the Hubble flow H r, a part of physical "
                "velocities, is unknown; state hubble_flow=False to leave it out"
            )
        return self.hubble

    def _known_h(self) -> float:
        if self.h is None or not 0.1 < self.h < 10:
            raise CatalogError(
                f"{self.path}: lengths are in units per h, and HubbleParam is "
                f"{'missing' if self.h is None else f'{self.h:g}'}; state it with hubble_param=0.7 (for 70 km/s/Mpc)"
            )
        return self.h


def read_units(
    file: h5py.File,
    path: Path,
    unit_length: str | None = None,
    unit_velocity: str | None = None,
    comoving: bool | None = None,
    hubble_param: float | None = None,
) -> SnapshotUnits:
    """Return the units of a snapshot from its header, what is stated taking precedence; see `SnapshotUnits`."""

    def find(*names: str) -> float | None:
        for group in _GROUPS:
            for name in names:
                if group in file and name in file[group].attrs:
                    return number(file[group].attrs[name], path, f"{group}/{name}")
        return None

    swift_length, swift_time = find(_SWIFT_LENGTH), find(_SWIFT_TIME)
    swift = swift_length is not None and swift_time is not None
    cgs = {"length": swift_length, "velocity": swift_length / swift_time} if swift_length and swift_time else {}
    for kind, (names, *_) in _KINDS.items():
        found = find(*names)
        if found is not None:
            cgs.setdefault(kind, found)
    stated = {"length": unit_length, "velocity": unit_velocity}
    for kind, text in stated.items():
        if text is not None:
            cgs[kind] = _stated_unit(kind, text)
    expands, a = _scale_factor(find, path, comoving, swift)
    h = hubble_param if hubble_param is not None else find("HubbleParam", "h")
    return SnapshotUnits(
        path,
        expands,
        a,
        h,
        _hubble(find, expands, a, h, swift_time),
        cgs,
        tuple(kind for kind, text in stated.items() if text is not None),
        swift,
        hubble_param is not None,
    )


def number(value: Any, path: Path, name: str) -> float:
    """Return an attribute as a number: codes write scalars, arrays of one, and text."""
    try:
        (one,) = np.asarray(value).reshape(-1)
        return float(one)
    except (ValueError, TypeError) as error:
        raise CatalogError(f"{path}: {name} = {value!r} is no number; the header is damaged: copy it again") from error


def _own_units(dataset: h5py.Dataset) -> tuple[float, float, float] | None:
    """Return factor to cgs, exponent of a and exponent of h of a dataset that carries them."""
    for names in _ATTRIBUTES:
        if all(name in dataset.attrs for name in names):
            cgs, a, h = (float(np.asarray(dataset.attrs[name]).reshape(-1)[0]) for name in names)
            # SWIFT states the exponent even of what it has multiplied already
            if bool(np.any(dataset.attrs.get("Value stored as physical", False))):
                a = 0.0
            # AREPO writes 0 where a field has no units
            if cgs > 0:
                return cgs, a, h
    return None


def _stated_unit(kind: str, text: str) -> float:
    from astropy import units as u

    try:
        return float(u.Unit(text).to("cm" if kind == "length" else "cm/s"))
    except (ValueError, TypeError) as error:
        raise CatalogError(f"unit_{kind}={text!r} is no unit of {kind}; write for instance {_option(kind)}") from error


def _option(kind: str) -> str:
    return "unit_length='kpc'" if kind == "length" else "unit_velocity='km/s'"


def _scale_factor(
    find: Callable[..., float | None], path: Path, stated: bool | None, swift: bool
) -> tuple[bool, float]:
    """Return whether the run expands, and the scale factor."""
    z, time = find("Redshift"), find("ExpansionFactor", "Scale-factor", *(() if swift else ("Time",)))
    flag = find("ComovingIntegrationOn", "Cosmological run")
    if stated is None and flag is not None:
        stated = bool(flag)
    if stated is False:
        return False, 1.0
    agree = z is not None and time is not None and abs(time * (1 + z) - 1) < 1e-3
    if stated is None:
        if swift and not z:
            return False, 1.0
        if z is None or time is None or (z != 0 and not agree):
            raise CatalogError(
                f"{path}: the file does not tell whether it is of an expanding universe (Time = {time}, Redshift = "
                f"{z}, no ComovingIntegrationOn); state comoving=True or comoving=False"
            )
        if not agree:
            return False, 1.0  # Time is a time
        h, dark = find("HubbleParam"), find("OmegaLambda", "Omega_Lambda")
        if z == 0 and not dark:
            if h not in (None, 0.0, 1.0):
                raise CatalogError(
                    f"{path}: Time = 1, Redshift = 0, OmegaLambda = 0 and HubbleParam = {h:g} are those of an "
                    "expanding universe today or of an isolated run; state comoving=True or comoving=False"
                )
            return False, 1.0
    if z is None and time is None:
        raise CatalogError(
            f"{path}: a comoving run without Time or Redshift in its header; it is damaged: copy it again"
        )
    if z is not None and time is not None and not agree:
        raise CatalogError(
            f"{path}: Time = {time:g} is not 1 / (1 + Redshift) with Redshift = {z:g}, which it is in comoving runs; "
            "state comoving=False if it is a time, or restore the header"
        )
    a = time if time is not None else 1 / (1 + float(z or 0))
    if not 0 < a <= 10:
        raise CatalogError(f"{path}: the scale factor {a:g} is not positive; the header is damaged: copy it again")
    return True, a


def _hubble(
    find: Callable[..., float | None], expands: bool, a: float, h: float | None, swift_time: float | None
) -> float | None:
    """Return H(a) in km/s/kpc: of matter, curvature and a cosmological constant unless the file has it itself."""
    if not expands:
        return 0.0
    own = find("H [internal units]")
    if own is not None and swift_time:
        return own / swift_time * _KM
    matter, dark = find("Omega0", "Omega_Matter", "Omega_m"), find("OmegaLambda", "Omega_Lambda", "Omega_lambda")
    if matter is None or dark is None or h is None:
        return None
    return float(0.1 * h * np.sqrt(matter / a**3 + (1 - matter - dark) / a**2 + dark))
