"""False alarms of the tests of symmetry on round systems (seeds from 50 000), one line of JSON per N and system.

    python tests/benchmarks/symmetry.py

Rates of p below 0.05 and 0.01, and alarms (p < 0.001), of directions, of planes, and of planes about z (f(J) of cos i).
"""

from __future__ import annotations

import json

import numpy as np
import torch

from bayespot import Isochrone, SnapshotModel, SphericalMixture
from bayespot.inference import ALARM
from bayespot.inference.symmetry import symmetry_test
from bayespot.mock import MOCKS, Equilibrium

MODELS = [SnapshotModel(Isochrone(1e11, 3.0), SphericalMixture(rotation=rotation)) for rotation in (False, True)]


def p_values(w: torch.Tensor) -> list[float]:
    """Return the p-values of the three tests."""
    isotropic, rotating = (symmetry_test(model, w) for model in MODELS)
    found = (isotropic.directions, isotropic.planes, rotating.planes)
    return [one.p_value for one in found if one is not None]


def main() -> None:
    torch.set_num_threads(1)
    for n, n_mocks in ((100, 4000), (300, 4000), (3000, 2000)):
        for k, name in enumerate(("isochrone", "isochrone-radial")):
            system = MOCKS[name]
            equilibrium = Equilibrium(system.potential, None, system.anisotropy_radius, system.beta)
            batches = (equilibrium.sample(200 * n, 50_000 + 1000 * k + i) for i in range(n_mocks // 200))
            p = np.array([p_values(w) for batch in batches for w in batch.reshape(200, n, 6)])
            rates = {f"below_{level}": (p < level).mean(0).tolist() for level in (0.05, 0.01)}
            row = {"n": n, "system": name, "n_mocks": len(p)} | rates | {"alarms": (p < ALARM).sum(0).tolist()}
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
