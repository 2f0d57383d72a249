"""Writers of small N-body snapshots: the same physical particles in each code's units, attributes and conventions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np

KPC, KM, GRAM = 3.0856775814913674e21, 1e5, 1.988409870698051e33
OMEGA, LAMBDA, H_PARAM, SCALE = 0.3, 0.7, 0.7, 0.5
#: H(a) in km/s/kpc of that cosmology at that scale factor.
HUBBLE = 0.1 * H_PARAM * (OMEGA / SCALE**3 + LAMBDA) ** 0.5
LAYOUTS = ("gadget2", "gadget4", "arepo", "tng", "gizmo", "eagle", "swift")
#: Code units: cm, cm/s, g; SWIFT's velocity unit follows from that of time.
UNIT = {
    "gadget2": (KPC, KM, 1e10 * GRAM),
    "gadget4": (1e3 * KPC, KM, 1e10 * GRAM),
    "arepo": (KPC, KM, 1e10 * GRAM),
    "tng": (KPC, KM, 1e10 * GRAM),
    "gizmo": (3.0e21, 1.1e5, 1e10 * GRAM),
    "eagle": (1e3 * KPC, KM, 1e10 * GRAM),
    "swift": (1e3 * KPC, 9.77e7, 1e10 * GRAM),
}
_COSMOLOGICAL: dict[str, Any] = {"Omega0": OMEGA, "OmegaLambda": LAMBDA, "HubbleParam": H_PARAM}


def write_snapshot(
    path: Path,
    layout: str,
    particles: dict[int, np.ndarray],
    comoving: bool = False,
    centre: np.ndarray | None = None,
    box: float = 1000.0,
    n_files: int = 1,
    masses: dict[int, np.ndarray] | None = None,
    dtype: str = "f8",
) -> list[Path]:
    """Write particles ``{type: w (n, 6)}``, physical kpc and km/s with the Hubble flow about ``centre`` (kpc).

    ``box`` is physical. Identifiers count from 10^6 (type + 1).
    """
    a, h = (SCALE, H_PARAM) if comoving else (1.0, 1.0)
    length, velocity, mass_unit = UNIT[layout]
    by_h = 1.0 if layout == "swift" else h
    by_a = 1.0 if layout == "swift" else a**0.5
    to_length = KPC / length / a * by_h
    flow = (HUBBLE if comoving else 0.0) * (0 if centre is None else 1)
    paths = [path] if n_files == 1 else [path.with_name(f"{path.stem}.{i}.hdf5") for i in range(n_files)]
    total = np.array([len(particles.get(kind, ())) for kind in range(7 if layout == "swift" else 6)])
    for i, one in enumerate(paths):
        with h5py.File(one, "w") as file:
            counts = np.zeros_like(total)
            for kind, w in particles.items():
                rows = np.array_split(np.arange(len(w)), n_files)[i]
                counts[kind] = len(rows)
                group = file.create_group(f"PartType{kind}")
                pecular = w[rows, 3:] - flow * (w[rows, :3] - (0 if centre is None else centre))
                m = np.ones(len(w)) if masses is None else masses[kind]
                data = {
                    "Coordinates": (w[rows, :3] * to_length, length, 1.0, 0.0 if layout == "swift" else -1.0),
                    "Velocities": (pecular * KM / velocity / by_a, velocity, 0.0 if layout == "swift" else 0.5, 0.0),
                    "Masses": (m[rows], mass_unit, 0.0, 0.0 if layout == "swift" else -1.0),
                }
                for name, (values, cgs, power_a, power_h) in data.items():
                    dataset = group.create_dataset(name, data=values.astype(dtype))
                    powers = (power_a, power_h) if comoving or layout in ("swift", "eagle") else (0.0, 0.0)
                    dataset.attrs.update(_attributes(layout, cgs, *powers))
                group.create_dataset("ParticleIDs", data=(rows + 10**6 * (kind + 1)).astype("u8"))
            _write_header(file, layout, counts, total, n_files, comoving, box * to_length)
    return paths


def _attributes(layout: str, cgs: float, power_a: float, power_h: float) -> dict[str, Any]:
    if layout == "swift":
        name = "Conversion factor to CGS (not including cosmological corrections)"
        return {name: [cgs], "a-scale exponent": [power_a], "h-scale exponent": [power_h]}
    if layout in ("arepo", "gadget4"):
        return {"to_cgs": cgs, "a_scaling": power_a, "h_scaling": power_h}
    if layout == "eagle":
        return {"CGSConversionFactor": cgs, "aexp-scale-exponent": power_a, "h-scale-exponent": power_h}
    return {}


def _write_header(
    file: h5py.File, layout: str, counts: np.ndarray, total: np.ndarray, n_files: int, comoving: bool, box: float
) -> None:
    length, velocity, mass = UNIT[layout]
    a = SCALE if comoving else 1.0
    header = file.create_group("Header").attrs
    header.update(
        {
            "NumPart_ThisFile": counts,
            "NumPart_Total": total.astype("u4"),
            "NumFilesPerSnapshot": n_files,
            "BoxSize": box,
        }
    )
    header["NumPart_Total_HighWord"] = np.zeros_like(total)
    header["MassTable"] = np.zeros(len(total))
    header["Redshift"] = 1 / a - 1
    if layout == "swift":
        file.create_group("Units").attrs.update(
            {
                "Unit length in cgs (U_L)": [length],
                "Unit mass in cgs (U_M)": [mass],
                "Unit time in cgs (U_t)": [length / velocity],
            }
        )
        cosmology = file.create_group("Cosmology").attrs
        cosmology["Cosmological run"] = [int(comoving)]
        header.update({"Scale-factor": [a], "Time": [0.0123], "BoxSize": [box] * 3, "Code": b"SWIFT"})
        if comoving:
            per_time = HUBBLE / (KPC / KM) * length / velocity
            cosmology.update(
                {"Scale-factor": [a], "Redshift": [1 / a - 1], "h": [H_PARAM], "H [internal units]": [per_time]}
            )
        return
    # the time of an isolated run is a time
    header["Time"] = a if comoving else 0.37
    header.update(_COSMOLOGICAL if comoving else {"Omega0": 0.0, "OmegaLambda": 0.0, "HubbleParam": 1.0})
    units = {"UnitLength_in_cm": length, "UnitVelocity_in_cm_per_s": velocity, "UnitMass_in_g": mass}
    if layout == "gadget4":
        file.create_group("Parameters").attrs.update({**units, "ComovingIntegrationOn": int(comoving)})
    elif layout in ("arepo", "tng"):
        header.update(units)
    elif layout == "gizmo":
        header.update({"UnitLength_In_CGS": length, "UnitVelocity_In_CGS": velocity, "UnitMass_In_CGS": mass})
        header["ComovingIntegrationOn"] = int(comoving)
    elif layout == "eagle":
        file.create_group("Units").attrs.update(units)
        header["ExpansionFactor"] = a
