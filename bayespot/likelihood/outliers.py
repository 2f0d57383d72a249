r"""Stars that are no members: a broad background density beside f(J), with a small fraction that is inferred.

.. math:: p(w) = (1 - \epsilon)\, \frac{f(J(w))}{(2\pi)^3} + \epsilon\, g(w)

(Hogg, Bovy & Lang 2010, arXiv:1008.4686, section 3). Without it a single foreign star, or the -999 of a missing
velocity, decides the mass: f(J) is zero for unbound stars, and no potential is likely that does not bind it. With it
such a star has the density :math:`\epsilon g`, whatever the potential, and says nothing of it.

g is normalised and has no free parameters. With a selection it is the density of observed contaminants, which is not
divided by the fraction of the population that is selected; with measurement errors it is averaged over each star's
samples, as f is.
"""

from __future__ import annotations

import math

import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, PyroSample
from torch import Tensor

from bayespot.likelihood.phase_mixed import StarDensity
from bayespot.units import takes, takes_tensors

#: Degrees of freedom of the background in ln r and in velocity: tails fall as powers, slowly enough for sentinels.
_DOF = 3.0
#: Scale of the background's velocities, in units of the stars' typical velocity per axis.
_VELOCITY_SCALE = 3.0
#: Median of the fraction's prior, and its standard deviation in ln(fraction / (1 - fraction)): 2e-5 to 5e-2.
PRIOR_FRACTION, PRIOR_WIDTH = 1e-3, 2.0
#: From this probability on a star is called an outlier.
LIKELY = 0.5


class Background(StarDensity):
    r"""Broad density of stars that do not belong to the system.

    .. math:: g(w) = \frac{t_\nu((\ln r - \mu)/s)}{4\pi r^3 s}\; t_{\nu,3}(v / \sigma)\, \sigma^{-3}

    with Student's t in one and three dimensions, nu = 3: directions and velocities are isotropic.

    Parameters
    ----------
    ln_r
        Median mu of ln(r/kpc).
    ln_r_scale
        Width s of ln r.
    v_scale
        Scale sigma of the velocity per axis in km/s.

    Raises
    ------
    ValueError
        If a scale is not positive and finite.
    """

    @takes(ln_r="number", ln_r_scale="number", v_scale="speed")
    def __init__(self, ln_r: float, ln_r_scale: float, v_scale: float) -> None:
        for name, scale in (("ln_r_scale", ln_r_scale), ("v_scale", v_scale)):
            if not 0 < scale < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {scale}")
        self.ln_r, self.ln_r_scale, self.v_scale = float(ln_r), float(ln_r_scale), float(v_scale)
        super().__init__()

    @classmethod
    @takes_tensors(w="phase_space")
    def of_stars(cls, w: Tensor) -> Background:
        """Return the background about stars ``w (n, 6)``, from medians, which a minority of them cannot move.

        ln r has the stars' median and 1.48 times their median deviation, but at least 0.3; velocities are three times
        as wide as the stars'.
        """
        s = torch.linalg.vector_norm(w[:, :3], dim=-1).log()
        middle = s.median()
        width = max(0.3, 1.4826 * float((s - middle).abs().median()))
        # the median of chi-square with three degrees of freedom is 2.37
        speed = float((w[:, 3:] ** 2).sum(-1).median() / 2.366) ** 0.5
        return cls(float(middle), width, _VELOCITY_SCALE * max(speed, 1e-6))

    def log_prob(self, value: Tensor) -> Tensor:
        """Return ln g(w) in (kpc km/s)^-3 for ``value`` ``(*batch, 6)`` in kpc and km/s."""
        v2 = (value[..., 3:6] ** 2).sum(-1) * (1 / (_DOF * self.v_scale**2))
        log_norm = _log_norm(3) - 3 * math.log(self.v_scale)
        return self.log_position(value) + log_norm - (_DOF + 3) / 2 * v2.log1p()

    def log_position(self, value: Tensor) -> Tensor:
        ln_r = (value[..., :3] ** 2).sum(-1).log() / 2
        far = (ln_r - self.ln_r) ** 2 * (1 / (_DOF * self.ln_r_scale**2))
        log_norm = _log_norm(1) - math.log(4 * math.pi * self.ln_r_scale)
        return log_norm - 3 * ln_r - (_DOF + 1) / 2 * far.log1p()

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """Return n stars of the background ``(n, 6)``."""

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        # Student's t is a normal variable over the root of an independent chi-square per degree of freedom
        spread = ((normal(2, n, int(_DOF)) ** 2).mean(-1)).rsqrt()
        r = (self.ln_r + self.ln_r_scale * normal(n) * spread[0]).exp()
        x = torch.nn.functional.normalize(normal(n, 3), dim=-1) * r[:, None]
        return torch.cat([x, self.v_scale * normal(n, 3) * spread[1][:, None]], -1)


def _log_norm(d: int) -> float:
    """Logarithm of the norm of Student's t in d dimensions."""
    return math.lgamma((_DOF + d) / 2) - math.lgamma(_DOF / 2) - d / 2 * math.log(_DOF * math.pi)


def logit_normal(median: float, width: float) -> dist.TransformedDistribution:
    """Return the distribution of a fraction whose logit is normal, of standard deviation ``width``."""
    centre = torch.tensor(math.log(median / (1 - median)), dtype=torch.float64)
    normal = dist.Normal(centre, torch.tensor(width, dtype=torch.float64))
    return dist.TransformedDistribution(normal, [torch.distributions.SigmoidTransform()])


class Outliers(PyroModule):
    """The outlier component of a `SnapshotModel`: its site ``fraction`` (``outliers.fraction``) and its background.

    The prior of the fraction is logit-normal: a member of a clean catalogue is hardly ever called an outlier,
    and a population of its own, a tenth of the stars, needs a component of its own.

    Parameters
    ----------
    background
        Density of outliers; None: `Background.of_stars` of the catalogue that is fitted.
    median
        Median of the fraction's prior.
    width
        Standard deviation of the prior in ln(fraction / (1 - fraction)).

    Raises
    ------
    ValueError
        If the median is not between 0 and 1 or the width is not positive.

    Examples
    --------
    >>> from bayespot import Isochrone, SnapshotModel, SphericalMixture
    >>> model = SnapshotModel(Isochrone(1e11, 3.0), SphericalMixture(), outliers=Outliers())
    >>> list(model.sites())
    ['outliers.fraction']
    """

    @takes(median="number", width="number")
    def __init__(
        self, background: StarDensity | None = None, median: float = PRIOR_FRACTION, width: float = PRIOR_WIDTH
    ) -> None:
        super().__init__()
        if not 0 < median < 1 or not width > 0:
            raise ValueError(f"the prior needs a median between 0 and 1 and a positive width, got {median}, {width}")
        self.background, self.median, self.width = background, median, width
        self.fraction = PyroSample(logit_normal(median, width))

    @takes_tensors(w="phase_space")
    def about(self, w: Tensor) -> Outliers:
        """Return the component with the background of stars ``w (n, 6)``, unless it has one already."""
        return self if self.background is not None else Outliers(Background.of_stars(w), self.median, self.width)
