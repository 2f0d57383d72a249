"""Mock observations: heliocentric observables with measurement errors, cut by a selection."""

from __future__ import annotations

import numpy as np
import torch

from bayespot.callers_state import keeps_callers_state
from bayespot.catalog.catalog import Catalog, Observed
from bayespot.catalog.frame import Frame, frame_parameters, galactocentric, heliocentric
from bayespot.likelihood.selection import SelectionFunction
from bayespot.units import takes


@takes(distance_error="number", pm_error="proper_motion", v_error="speed")
@keeps_callers_state
def observe(
    catalog: Catalog,
    seed: int,
    distance_error: float = 0.1,
    pm_error: float = 0.05,
    v_error: float = 2.0,
    selection: SelectionFunction | None = None,
) -> Catalog:
    """Return what a survey from the Sun would list of a mock: noisy observables of the stars it selects.

    Parameters
    ----------
    catalog
        Stars at their true coordinates.
    seed
        Seed of the noise and of the selection.
    distance_error
        Relative error of distances: Gaussian noise of this width in ln d.
    pm_error, v_error
        Errors of each proper motion (mas/yr) and of the radial velocity (km/s).
    selection
        Acts on the observed coordinates. A smooth S keeps each star with that probability.

    Raises
    ------
    ValueError
        If an error is negative or no star is selected.
    """
    for name, value in (("distance_error", distance_error), ("pm_error", pm_error), ("v_error", v_error)):
        if value < 0:
            raise ValueError(f"{name} must not be negative, got {value}")
    rng = np.random.default_rng(seed)
    # stars that were turned are seen from a Sun that turned with them
    frame = Frame().turned(catalog.rotation)
    values = heliocentric(catalog.w.numpy(), frame)
    n = len(catalog)
    values["distance"] = values["distance"] * np.exp(distance_error * rng.standard_normal(n))
    for name, sd in (("pmra", pm_error), ("pmdec", pm_error), ("radial_velocity", v_error)):
        values[name] = values[name] + sd * rng.standard_normal(n)
    zero = np.zeros(n)
    errors = np.stack(
        [zero, zero, distance_error * values["distance"], zero + pm_error, zero + pm_error, zero + v_error], -1
    )
    covariance = errors[:, :, None] ** 2 * np.eye(6)
    w, jacobian = galactocentric(values, frame)
    propagated = jacobian @ covariance @ jacobian.transpose(0, 2, 1)
    seen = Observed(
        tuple(values), torch.as_tensor(np.stack(list(values.values()), -1)), torch.as_tensor(covariance.copy()), frame
    )
    observed = Catalog(
        torch.as_tensor(w),
        torch.as_tensor((propagated + propagated.transpose(0, 2, 1)) / 2),
        catalog.names,
        {**catalog.meta, "frame": frame_parameters()},
        seen,
    )
    if selection is None:
        return observed
    keep = rng.random(n) < selection(observed.w).numpy()
    if not keep.any():
        raise ValueError(f"{selection} keeps none of {n} stars; simulate more or widen it")
    return observed[keep]
