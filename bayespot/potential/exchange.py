"""Potentials to and from galpy, gala and AGAMA; each package is imported only when it is asked for."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bayespot.files import replacing
from bayespot.potential.base import EXPORTS, Potential, Symmetry
from bayespot.potential.callables import CallablePotential, require_fixed
from bayespot.potential.checked import Checked
from bayespot.potential.profile import require_spherical
from bayespot.units import takes

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


def bridge(package: str) -> Any:
    """Return the module of ours that imports ``package``, or say how to install it."""
    try:
        return importlib.import_module(f"bayespot.potential.{package}_bridge")
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != package:
            raise
        raise ModuleNotFoundError(f"{package} is not installed: pip install {package}", name=package) from error


@takes(ro="length", vo="speed")
def from_galpy(
    potential: Any, ro: float | None = None, vo: float | None = None, symmetry: Symmetry | None = None
) -> CallablePotential:
    """Return a galpy potential as one of ours, differentiable to second order and without parameters.

    Parameters
    ----------
    potential
        A galpy potential or a sum of them: ``a + b``, an object since galpy 1.12, or a list.
    ro, vo
        What galpy's internal units stand for, in kpc and km/s or with units; None: the potential's own, and where it
        has none those of galpy's configuration, with a warning.
    symmetry
        As in `CallablePotential`.

    Raises
    ------
    ModuleNotFoundError
        If galpy is not installed.
    ValueError
        If it is not a three-dimensional galpy potential, depends on time or velocity, rotates, its forces are not those
        of its Phi, or its units contradict each other or ``ro`` and ``vo``.

    Warns
    -----
    UserWarning
        If it has no units, or its forces depart from the slope of its Phi by more than 1e-4 anywhere.

    Examples
    --------
    >>> from galpy.potential import MWPotential2014  # doctest: +SKIP
    >>> from_galpy(MWPotential2014, ro=8.0, vo=220.0).symmetry  # doctest: +SKIP
    'axisymmetric'
    """
    return _checked(bridge("galpy").GalpyCallables(potential, ro, vo), symmetry)


def from_gala(potential: Any, symmetry: Symmetry | None = None) -> CallablePotential:
    """Return a gala potential as one of ours, differentiable to second order and without parameters.

    gala's second derivatives are used where they are those of its forces, else differences of its forces (`Checked`).

    Parameters
    ----------
    potential
        A gala potential with units.
    symmetry
        As in `CallablePotential`.

    Raises
    ------
    ModuleNotFoundError
        If gala is not installed.
    ValueError
        If it is not a three-dimensional gala potential with units, depends on time, or its forces are not those of its
        Phi.
    """
    return _checked(bridge("gala").GalaCallables(potential), symmetry)


def _checked(source: Any, symmetry: Symmetry | None) -> CallablePotential:
    return CallablePotential(Checked(source, type(source.potential).__name__.removeprefix("_")), symmetry)


def agama_text(potential: Potential, radii: ArrayLike | None = None) -> str:
    """Return a spherical potential as a file of AGAMA's, a Multipole expansion of order zero.

    The layout is that of AGAMA's own ``Potential.export()``, with Phi and dPhi/dr at every radius; AGAMA continues it
    by power laws beyond both ends.

    Parameters
    ----------
    potential
        Spherical, its parameters fixed.
    radii : (n,)
        In kpc; None: 161 from 1e-3 to 1e5, 20 per decade.

    Raises
    ------
    ValueError
        If the potential is not spherical, has a prior, or the radii are not positive and increasing.
    """
    require_spherical(potential)
    require_fixed(potential)
    r = np.geomspace(1e-3, 1e5, 161) if radii is None else np.asarray(radii, dtype=float)
    if r.ndim != 1 or len(r) < 2 or not (np.isfinite(r).all() and r[0] > 0 and (np.diff(r) > 0).all()):
        raise ValueError(f"radii must be positive and increasing (kpc), got {r}")
    with torch.no_grad():
        phi = potential.phi_r(torch.as_tensor(r)).numpy()
        slope = -potential.radial_acceleration(torch.as_tensor(r)).numpy()
    tables = [
        "\n".join([f"#{name}", "#radius\tl=0,m=0", *(f"{a:.15g}\t{b:.17g}" for a, b in zip(r, values, strict=True))])
        for name, values in (("Phi", phi), ("dPhi/dr", slope))
    ]
    head = ["[Potential]", "type=Multipole", f"gridSizeR={len(r)}", "lmax=0", "symmetry=Spherical", "Coefficients"]
    # an empty line between the two tables is part of the format
    return "\n".join(head) + "\n" + "\n\n".join(tables) + "\n"


def write_agama(
    potential: Potential, path: str | os.PathLike[str], radii: ArrayLike | None = None, overwrite: bool = False
) -> None:
    """Write `agama_text` to a file, complete or not at all."""
    path = Path(path)
    if path.exists() and not overwrite:
        raise ValueError(f"{path} exists; choose another name or pass overwrite=True")
    text = agama_text(potential, radii)
    with replacing(path) as temporary:
        temporary.write_text(text)


EXPORTS["galpy"] = lambda potential, ro, vo: bridge("galpy").exported(potential, ro, vo)
EXPORTS["gala"] = lambda potential: bridge("gala").Exported(potential)
EXPORTS["agama"] = write_agama
