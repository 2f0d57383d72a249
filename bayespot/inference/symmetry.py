r"""Tests of the model's symmetry on the stars alone: are they spread over their orbital planes, and are the planes?

Neither test needs a potential. Of each star only the direction of its position, x, and the direction n of its angular
momentum about the centre are used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bayespot.inference.phase_mixing import ALARM
from bayespot.likelihood.model import SnapshotModel
from bayespot.units import takes_tensors

#: Fewest stars for a test: its chi-square is an asymptotic one.
FEWEST = 30


class QuadrupoleTest(NamedTuple):
    """``statistic`` is chi-square distributed with ``dof`` degrees if the symmetry holds; ``p_value`` accordingly."""

    statistic: float
    dof: int
    p_value: float


@dataclass(frozen=True)
class SymmetryTest:
    """What the quadrupoles of positions and of orbital planes say; None for what the model does not demand.

    ``directions`` speaks of the potential, ``planes`` of the density of orbits.
    """

    directions: QuadrupoleTest | None = None
    planes: QuadrupoleTest | None = None

    def as_dict(self) -> dict[str, dict[str, float]]:
        """Return the tests that were made, by name, as `Diagnostics` keeps them."""
        tests = {"directions": self.directions, "planes": self.planes}
        return {name: test._asdict() for name, test in tests.items() if test is not None}

    @classmethod
    def from_dict(cls, tests: Mapping[str, Mapping[str, Any]]) -> SymmetryTest:
        """Return what `as_dict` wrote."""
        return cls(**{name: QuadrupoleTest(**test) for name, test in tests.items()})


@takes_tensors(w="phase_space")
@torch.no_grad()
def symmetry_test(model: SnapshotModel, w: Tensor) -> SymmetryTest:
    r"""Test the symmetry that a model demands of the stars.

    *Directions.* In a spherical potential every star stays in the plane of its orbit, and once phase-mixed it is
    equally likely at any azimuth psi in that plane, whatever the density of orbits and however the planes are oriented:
    rotating and flattened populations are allowed. Demanded is (`quadrupole_within_planes`)

    .. math:: E[x x^T \mid n] = (1 - n n^T)/2.

    In a flattened or triaxial potential planes precess, stars linger in the long directions, and this fails. In an
    axisymmetric potential only azimuths about z are uniform (`quadrupole_about_axis` of x).

    *Planes.* A sphere admits any distribution of n; the model's f(J) does not. One of (J_r, L) alone demands that n is
    isotropic (`quadrupole`; the dipole of n, which is rotation, is left free); one that depends on cos i too, that n is
    uniform in azimuth about z (`quadrupole_about_axis` of n). The potential is inferred from how stars move within
    their planes, so that planes of another distribution alone do no harm to it.

    Both are chi-squares by the exact covariance under the symmetry. Any linear combination of the sums over psi has a
    moment-generating function below that of the Gaussian with the same variance, so that few stars make alarms rarer,
    not more frequent. Given n, the first test does not depend on the second.

    Parameters
    ----------
    model
        The symmetry of its potential and of its f(J) decides what is tested; nothing in a triaxial potential.
    w : Float[Tensor, "n 6"]
        Stars without selection and with small errors: others spread unevenly in any case.
    """
    x, n = directions_and_planes(w)
    if len(x) < FEWEST or model.potential.symmetry == "triaxial":
        return SymmetryTest()
    if model.potential.symmetry == "axisymmetric":
        return SymmetryTest(quadrupole_about_axis(x), quadrupole_about_axis(n))
    isotropic = model.df.symmetry == "spherical"
    return SymmetryTest(quadrupole_within_planes(x, n), quadrupole(n) if isotropic else quadrupole_about_axis(n))


def directions_and_planes(w: Tensor) -> tuple[Tensor, Tensor]:
    """Return unit vectors ``(n, 3)`` along the positions and along the angular momenta, of stars that have both."""
    x = torch.nn.functional.normalize(w[:, :3], dim=-1)
    v = torch.nn.functional.normalize(w[:, 3:], dim=-1)
    L = torch.linalg.cross(x, v)
    sin = torch.linalg.vector_norm(L, dim=-1)
    moves = sin > 1e-9
    return x[moves], L[moves] / sin[moves, None]


#: Names of the five `moments`.
QUADRUPOLE = ("xy", "xz", "yz", "x^2 - y^2", "3z^2 - 1")


def moments(u: Tensor) -> Tensor:
    """Return the moments ``(n, 5)`` of unit vectors named in `QUADRUPOLE`, orthonormal as matrices: Q = uu^T - 1/3."""
    x, y, z = u.unbind(-1)
    root2, root6 = 2**0.5, 6**0.5
    return torch.stack([root2 * x * y, root2 * x * z, root2 * y * z, (x**2 - y**2) / root2, (3 * z**2 - 1) / root6], -1)


def quadrupole(u: Tensor) -> QuadrupoleTest:
    r"""Bingham's test that unit vectors ``(n, 3)`` are isotropic.

    :math:`T = \frac{15}{2n} |\sum_i (u_i u_i^T - 1/3)|^2`, five degrees (Mardia & Jupp 2000, section 10.7.1).
    """
    total = moments(u).sum(0)
    return _chi2(15 / (2 * len(u)) * float(total @ total), 5)


def quadrupole_within_planes(x: Tensor, n: Tensor) -> QuadrupoleTest:
    r"""Test that stars are uniform in azimuth within planes of whatever distribution.

    With unit vectors e_1, e_2 across n, :math:`x x^T - (1 - n n^T)/2 = \frac12 [\cos 2\psi\, (e_1 e_1^T - e_2 e_2^T) +
    \sin 2\psi\, (e_1 e_2^T + e_2 e_1^T)]`. Given the planes the sum over stars has mean zero and covariance
    :math:`\frac18 \sum_i (a_i a_i^T + b_i b_i^T)`, with a and b the moments of the two matrices.

    Parameters
    ----------
    x, n : Float[Tensor, "n 3"]
        Unit vectors along the positions and the angular momenta, at right angles.
    """
    y = torch.linalg.cross(n, x)
    total = (moments(x) - moments(y)).sum(0) / 2
    # x and y serve as e_1 and e_2: the covariance is the same for any pair across n
    a, b = moments(x) - moments(y), moments((x + y) / 2**0.5) - moments((x - y) / 2**0.5)
    return _mahalanobis(total, (a.T @ a + b.T @ b) / 8)


def quadrupole_about_axis(u: Tensor) -> QuadrupoleTest:
    r"""Test that unit vectors ``(n, 3)`` are uniform in azimuth about z, whatever their distribution of z.

    :math:`\sum_i \sin^2\theta_i\, e^{2 i\phi_i}` and :math:`\sum_i \sin\theta_i \cos\theta_i\, e^{i\phi_i}`, each part
    with variance half the sum of squared amplitudes: four degrees.
    """
    x, y, z = u.unbind(-1)
    s2 = x**2 + y**2
    total, dof = 0.0, 0
    for real, imaginary, weight2 in ((x**2 - y**2, 2 * x * y, s2**2), (x * z, y * z, s2 * z**2)):
        variance = float(weight2.sum()) / 2
        if variance > 1e-12 * len(u):  # all in the plane, or on the axis: nothing to test
            total += float(real.sum() ** 2 + imaginary.sum() ** 2) / variance
            dof += 2
    return _chi2(total, dof)


def _mahalanobis(total: Tensor, covariance: Tensor) -> QuadrupoleTest:
    values, vectors = torch.linalg.eigh(covariance)
    # planes that are all the same leave two directions in which stars can be unevenly spread
    free = values > 1e-10 * values[-1]
    return _chi2(float(((vectors.T @ total)[free] ** 2 / values[free]).sum()), int(free.sum()))


def _chi2(statistic: float, dof: int) -> QuadrupoleTest:
    from scipy.special import chdtrc

    return QuadrupoleTest(statistic, dof, float(chdtrc(dof, statistic)) if dof else 1.0)


def symmetry_warnings(potential: str, df: str, test: SymmetryTest) -> list[tuple[int, str]]:
    """Return warnings in words with their level (`bayespot.inference.verdict.LEVELS`), for p-values below `ALARM`.

    Parameters
    ----------
    potential, df
        Symmetries of the model's potential and of its f(J).
    test
        What `symmetry_test` returned.
    """
    found = []
    if (one := test.directions) is not None and one.p_value < ALARM:
        found.append((2, _of_directions(potential, one)))
    if (one := test.planes) is not None and one.p_value < ALARM:
        found.append((1, _of_planes(potential == df == "spherical", one)))
    return found


def _of_directions(potential: str, test: QuadrupoleTest) -> str:
    if potential == "spherical":
        return (
            f"the stars' directions exclude a spherical potential ({_words(test)}): it demands stars spread evenly in "
            "azimuth over the planes of their orbits, however these are oriented; the system is flattened, triaxial, "
            "not phase-mixed or incomplete, and the error bars do not cover that; take a potential of lower symmetry, "
            "or the stars of a region that is round"
        )
    return (
        f"the stars' directions exclude a potential symmetric about z ({_words(test)}): it demands stars spread evenly "
        "in azimuth about z, and the error bars do not cover that; turn the frame so that the axis is z, or take a "
        "triaxial potential"
    )


def _of_planes(isotropic: bool, test: QuadrupoleTest) -> str:
    if isotropic:
        return (
            f"orbital planes are not isotropic ({_words(test)}), which the model's f(J_r, L) demands: a spherical "
            "potential allows it, but flattened systems look like this; take an f(J) that depends on cos i "
            "(rotation=True) with z along the axis of symmetry, and doubt the sphere"
        )
    return (
        f"orbital planes are not spread evenly in azimuth about z ({_words(test)}), which the model's f(J) demands: "
        "turn the frame so that the axis of symmetry is z, and doubt the symmetry of the potential"
    )


def _words(test: QuadrupoleTest) -> str:
    return f"quadrupole, chi-square {test.statistic:.0f} for {test.dof} degrees, p = {test.p_value:.1g}"
