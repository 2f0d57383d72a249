"""The phase-mixing test: are angles uniform given the actions?"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bayespot.likelihood.model import SnapshotModel
from bayespot.units import takes_tensors

#: Fourier modes of the angles, (k_r, k_phi, k_z), whose mean vanishes in a phase-mixed population.
MODES = ((1, 0, 0), (2, 0, 0), (3, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 2))
#: Below this p-value a system is called not phase-mixed.
ALARM = 0.001


@dataclass(frozen=True)
class AngleTest:
    """``statistic`` is chi-square distributed with ``dof`` degrees for uniform angles; ``p_value`` accordingly.

    Both are NaN where no star is bound.
    """

    statistic: float
    dof: int
    p_value: float


@takes_tensors(w="phase_space")
@torch.no_grad()
def angle_statistic(fixed: SnapshotModel, w: Tensor, n_bins: int = 6) -> AngleTest:
    r"""Test whether angles are uniform given the actions, the mark of a phase-mixed system.

    In bins of equal numbers of stars along :math:`J_r + L` the mean of :math:`e^{i k \cdot \theta}` is taken for
    the `MODES`; :math:`T = \sum_{bins} \sum_k 2 n\, |\overline{e^{i k \theta}}|^2` is chi-square distributed with two
    degrees per bin and mode (Rayleigh's test; Mardia & Jupp 2000, section 6.3). Bins keep a phase spiral, whose
    angle winds with the actions, from averaging out.

    Parameters
    ----------
    fixed
        A model with its sites fixed.
    w : Float[Tensor, "n 6"]
        Stars without selection and with small errors; otherwise compare with replicas.
    """
    J, theta, _ = fixed.finder.rough().actions_angles(fixed.potential, w)
    good = torch.isfinite(theta).all(-1)
    return angle_test(J[good], theta[good], n_bins)


@takes_tensors(J="action", theta="phase")
def angle_test(J: Tensor, theta: Tensor, n_bins: int = 6) -> AngleTest:
    """Return the test of `angle_statistic` of stars whose actions and angles ``(n, 3)`` are known."""
    from scipy.special import chdtrc

    size = J[:, 0] + J[:, 2] + J[:, 1].abs()
    n_bins = max(1, min(n_bins, len(J) // 20))
    total = 0.0
    for part in size.argsort().tensor_split(n_bins):
        phase = theta[part] @ torch.tensor(MODES, dtype=torch.float64).T
        total += 2 * len(part) * float((phase.cos().mean(0) ** 2 + phase.sin().mean(0) ** 2).sum())
    dof = 2 * n_bins * len(MODES)
    return AngleTest(total, dof, float(chdtrc(dof, total)))


def phase_mixing_warning(test: AngleTest) -> str | None:
    """Return a warning in words if angles are not uniform at the level `ALARM`."""
    if not test.p_value < ALARM:
        return None
    return (
        f"angles are not uniform (chi-square {test.statistic:.0f} for {test.dof} degrees, p = {test.p_value:.1g}): the "
        "stars are not phase-mixed in any potential the model can have, or the model's symmetry is wrong; the error "
        "bars do not cover that"
    )
