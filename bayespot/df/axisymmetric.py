"""f(J) of flattened galaxies: a mixture in (J_r, J_phi, J_z) that follows cold discs and haloes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Size, Tensor
from torch.distributions import Categorical, Gamma, constraints

from bayespot.df.distributions import OrbitDistribution, OrbitSample, action_space, strata
from bayespot.df.mixture import ActionMixtureModule, SitePrior, ln_median, quantile_levels
from bayespot.numerics import gamma_quantile
from bayespot.units import takes, takes_tensors

#: Smallest ratio of an action to the components' scale that ln |J_phi| is taken of.
_LEAST = 1e-12
#: Largest spin: f stays positive whatever the sense of rotation.
_MOST_SPIN = 1 - 1e-9
#: J_0 in units of the median |J_phi|.
_TURN = 0.02


class AxisymmetricActionDistribution(OrbitDistribution):
    r"""Mixture on (J_r, J_phi, J_z) whose components' scales of J_r and J_z vary with J_phi.

    .. math::
        f(J) = \sum_k w_k C_k \frac{|J_\phi|^{d-1}}{s_r s_z}
        \left[1 + \frac{\chi J_\phi}{\sqrt{J_\phi^2 + J_0^2}}\right]
        \left(1 + \frac{1}{b}\left[\frac{J_r}{s_r} + \frac{J_z}{s_z} + \frac{|J_\phi|}{s_\phi}\right]\right)^{-(2+d+b)}

    with scales :math:`s = \bar s \exp\left(q\,\frac{y - 1}{y + 1}\right)`, :math:`y = |J_\phi| / (d s_\phi)`. Each
    component is a product of exponentials in J_r and J_z and a Gamma of shape d >= 1 in |J_phi|, with a common
    inverse-Gamma(b) scale and a sense of rotation. f is finite and positive, with finite slopes, where J_r or J_z
    vanish, and with d = 1 where J_phi does. With q = 0, d = 1 and :math:`\chi = 0` a component is the double power law
    of Posti et al. (2015) with an inner slope of zero; with :math:`\chi = 1`, d = 2 and b -> infinity it is a disc
    whose dispersions change with radius, near the quasi-isothermal one of Binney & McMillan (2011).

    Parameters
    ----------
    logits : Float[Tensor, "K"]
        Log-weights.
    scale_r, scale_z, scale_phi : Float[Tensor, "K"]
        Scales in kpc km/s; :math:`\bar s` of J_r and J_z.
    shape_phi, tail : Float[Tensor, "K"]
        d and b.
    gradient_r, gradient_z : Float[Tensor, "K"]
        q: the scales at large |J_phi| are e^{2q} times those at J_phi = 0.
    spin : Float[Tensor, "K"]
        chi in [-1, 1].
    turn
        J_0 in kpc km/s, the width in J_phi of the change from one sense of rotation to the other.

    References
    ----------
    Posti, Binney, Nipoti & Ciotti (2015), MNRAS 447, 3060; Binney & McMillan (2011), MNRAS 413, 1889.
    """

    support = action_space
    has_rsample = False
    arg_constraints = {
        "logits": constraints.real,
        "scale_r": constraints.positive,
        "scale_z": constraints.positive,
        "scale_phi": constraints.positive,
        "shape_phi": constraints.greater_than_eq(1),
        "tail": constraints.positive,
        "gradient_r": constraints.real,
        "gradient_z": constraints.real,
        "spin": constraints.interval(-1, 1),
    }

    @takes_tensors(
        logits="number", scale_r="action", scale_z="action", scale_phi="action", shape_phi="number", tail="number",
        gradient_r="number", gradient_z="number", spin="number",
    )  # fmt: skip
    @takes(turn="action")
    def __init__(
        self,
        logits: Tensor,
        scale_r: Tensor,
        scale_z: Tensor,
        scale_phi: Tensor,
        shape_phi: Tensor,
        tail: Tensor,
        gradient_r: Tensor,
        gradient_z: Tensor,
        spin: Tensor,
        turn: float,
        validate_args: bool | None = False,
    ) -> None:
        self.logits, self.scale_r, self.scale_z, self.scale_phi = logits, scale_r, scale_z, scale_phi
        self.shape_phi, self.tail, self.spin, self.turn = shape_phi, tail, spin, float(turn)
        self.gradient_r, self.gradient_z = gradient_r, gradient_z
        super().__init__(Size(), Size([3]), validate_args=validate_args)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return ln f(J) in (kpc km/s)^-3."""
        if self._validate_args:
            self._validate_sample(value)
        d, b = self.shape_phi, self.tail
        constant = (
            torch.log_softmax(self.logits, -1) + torch.lgamma(2 + d + b) - torch.lgamma(d) - torch.lgamma(b)
            - d * (b * self.scale_phi).log() - math.log(2)
        )  # fmt: skip
        fixed = [constant, d - 1, 2 + d + b, 1 / (b * self.scale_phi), 1 / (d * self.scale_phi)]
        pairs = ((self.scale_r, self.gradient_r), (self.scale_z, self.gradient_z))
        scales = [x for scale, q in pairs for x in (-(b * scale).log() - q, 2 * q)]
        parameters = torch.stack([*fixed, *scales, self.spin])
        J = value.reshape(-1, 3).T
        least = _LEAST * self.scale_phi.detach().max()
        return _LogSumOfOrbits.apply(J, self._odd(J[1]), parameters, least).reshape(value.shape[:-1])

    def _scales(self, k: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
        """Scales of J_r and J_z of the components k at |J_phi|."""
        tau = 1 - 2 / (1 + size / (self.shape_phi[k] * self.scale_phi[k]))
        r, z = (self.gradient_r[k] * tau).exp(), (self.gradient_z[k] * tau).exp()
        return self.scale_r[k] * r, self.scale_z[k] * z

    def _odd(self, J_phi: Tensor) -> Tensor:
        """J_phi / (J_phi^2 + J_0^2)^(1/2)."""
        return J_phi / torch.hypot(J_phi, J_phi.new_tensor(self.turn))

    @torch.no_grad()
    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw orbits J ``(*sample_shape, 3)``."""
        k = Categorical(logits=self.logits).sample(Size(sample_shape))
        common = self.tail[k] / Gamma(self.tail[k], 1.0).sample()
        size_phi = Gamma(self.shape_phi[k], 1.0).sample() * common * self.scale_phi[k]
        J_r, J_z = (-torch.rand_like(common).log() * common * scale for scale in self._scales(k, size_phi))
        prograde = torch.rand_like(common) < (1 + self.spin[k] * self._odd(size_phi)) / 2
        return torch.stack([J_r, torch.where(prograde, size_phi, -size_phi), J_z], -1)

    def stratified(self, n: int, seed: int, n_spare: int = 0) -> OrbitSample:
        """Return n orbits, as many from each component and of each sense of rotation; see `OrbitSample`.

        The weights carry the rotation, so that no orbit turns round when the parameters change.
        """
        k, weight, u = strata(self.logits, n, seed, 5 + n_spare)
        common = self.tail[k] / gamma_quantile(self.tail[k], u[:, 0])
        size_phi = gamma_quantile(self.shape_phi[k], u[:, 1]) * common * self.scale_phi[k]
        scale_r, scale_z = self._scales(k, size_phi)
        J_phi = torch.where(u[:, 4] < 0.5, size_phi, -size_phi)
        weight = weight * (1 + self.spin[k] * self._odd(J_phi))
        J = torch.stack([-u[:, 2].log() * common * scale_r, J_phi, -u[:, 3].log() * common * scale_z], -1)
        return OrbitSample(J, weight / weight.sum(), u[:, 5:])


class _LogSumOfOrbits(torch.autograd.Function):
    """ln f of `AxisymmetricActionDistribution` in few passes over the stars, and its gradient.

    ``J (3, n)``, ``odd (n,)`` the odd function of J_phi; ``parameters (10, K)``: constant, d - 1, the exponent,
    1/(b s_phi), the rate of y, -ln(b s) of J_r at large |J_phi| and what is added to it at small, the same of J_z, and
    chi. Stars lie along the last axis, where sums over few components are fast, and as little memory is asked for as
    can be. Derivatives of its derivatives are those of the plain formula.
    """

    @staticmethod
    def forward(ctx: Any, J: Tensor, odd: Tensor, parameters: Tensor, least: Tensor) -> Tensor:
        p = parameters[..., None].unbind(0)
        size = J[1].abs().clamp(min=least)
        ln_size = size.log()
        h = (size * p[4]).add_(1).reciprocal_()
        per_r, per_z = torch.addcmul(p[5], p[6], h).exp_(), torch.addcmul(p[7], p[8], h).exp_()
        total = (size * p[3]).addcmul_(per_r, J[0]).addcmul_(per_z, J[2]).add_(1)
        log = total.log()
        bare = torch.addcmul(p[0], p[1], ln_size).addcmul_(p[2], log, value=-1)
        # as logsumexp: with no finite term the largest must not be subtracted
        largest = bare.amax(0)
        largest = torch.where(torch.isfinite(largest), largest, 0.0)
        bare.sub_(largest).exp_().mul_(per_r).mul_(per_z)
        summed = bare.sum(0).addcmul_(odd, parameters[9] @ bare)
        if any(ctx.needs_input_grad):
            ctx.least = least
            bare.div_(summed)
            ctx.save_for_backward(J, odd, parameters, size, ln_size, h, per_r, per_z, total, log, bare)
        return summed.log_().add_(largest)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        J, odd, parameters, size, ln_size, h, per_r, per_z, total, log, bare = ctx.saved_tensors
        if torch.is_grad_enabled():
            inputs = (J, odd, parameters)
            needed = [x for x, wanted in zip(inputs, ctx.needs_input_grad, strict=False) if wanted]
            found = iter(torch.autograd.grad(_plain(*inputs, ctx.least), needed, grad, create_graph=True))
            return (*(next(found) if wanted else None for wanted in ctx.needs_input_grad[:3]), None)
        p = parameters[..., None].unbind(0)
        share = torch.addcmul(grad, p[9], grad * odd).mul_(bare)
        falling = (share / total).mul_(-p[2])
        by_r, by_z = falling * per_r, falling * per_z
        by_J_r, by_J_z = by_r.sum(0), by_z.sum(0)
        rows = [share.sum(-1), share @ ln_size, -_dot(share, log), falling @ size]
        ends = []
        for by_ln_per, J_x in ((by_r, J[0]), (by_z, J[2])):
            by_ln_per.mul_(J_x).add_(share)
            ends += [by_ln_per.sum(-1), _dot(by_ln_per, h)]
        # by y, through h = 1 / (1 + y)
        by_y = by_r.mul_(-p[6]).addcmul_(by_z, p[8], value=-1).mul_(h).mul_(h)
        by_size = (parameters[1] @ share) / size + parameters[3] @ falling + parameters[4] @ by_y
        by_parameters = torch.stack([*rows, by_y @ size, *ends, bare @ (grad * odd)])
        by_J = torch.stack([by_J_r, by_size * J[1].sign(), by_J_z])
        return by_J, (parameters[9] @ bare) * grad, by_parameters, None


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """Sums of x y over the last axis."""
    return (x[:, None, :] @ y[:, :, None])[:, 0, 0]


def _plain(J: Tensor, odd: Tensor, parameters: Tensor, least: Tensor) -> Tensor:
    """The same as `_LogSumOfOrbits` by differentiable operations."""
    constant, d1, exponent, rate_phi, rate_y, r_0, r_1, z_0, z_1, spin = parameters[..., None].unbind(0)
    size = J[1].abs().clamp(min=least)
    h = 1 / (1 + size * rate_y)
    ln_r, ln_z = r_0 + r_1 * h, z_0 + z_1 * h
    total = J[0] * ln_r.exp() + J[2] * ln_z.exp() + size * rate_phi
    terms = constant + d1 * size.log() + ln_r + ln_z - exponent * total.log1p()
    return torch.logsumexp(terms + torch.log1p(spin * odd), 0)


class AxisymmetricMixture(ActionMixtureModule):
    r"""f(J) of stars in a flattened potential, `AxisymmetricActionDistribution`: cold discs, haloes and both.

    Sites: ``logits`` (or ``sticks``), ``ln_scale_r``, ``ln_scale_z``, ``ln_scale_phi``, ``root_shape_phi`` (its square
    is ln d where it is positive, else d = 1), ``atanh_spin``, ``gradient_r``, ``gradient_z`` and
    ``ln_tail``. d is exactly one unless the data ask for more, so haloes have no hole at J_phi = 0. The sense of
    rotation changes over a fiftieth of the median |J_phi|: L_z is the same in all potentials, and where along it the
    stars are tells them nothing of the potential.

    In J_r and J_z a component falls monotonically. A free power of J_r, as `ActionMixture` has, is for clumps; on
    smooth systems it costs a tenth of the information about the potential, since its slope diverges at J_r = 0.

    Parameters are those of `ActionMixtureModule`.

    Examples
    --------
    >>> J = 1000 * torch.rand(500, 3, dtype=torch.float64)
    >>> df = AxisymmetricMixture().resolved(2, J)
    >>> df.site_distributions()["ln_scale_phi"].event_shape
    torch.Size([2])
    """

    _turn = 1.0

    def _new(self, n_components: int) -> AxisymmetricMixture:
        return AxisymmetricMixture(n_components)

    def _site_priors(self, J: Tensor) -> dict[str, SitePrior]:
        self._turn = _TURN * math.exp(ln_median(J[:, 1].abs()))
        return {
            "logits": SitePrior(0.0, 1.5),
            "ln_scale_r": SitePrior(ln_median(J[:, 0]), 2.0),
            "ln_scale_z": SitePrior(ln_median(J[:, 2]), 2.0),
            "ln_scale_phi": SitePrior(ln_median(J[:, 1].abs()), 2.0),
            "root_shape_phi": SitePrior(-2.0, 1.0),
            "atanh_spin": SitePrior(0.0, 2.0),
            "gradient_r": SitePrior(0.0, 1.0),
            "gradient_z": SitePrior(0.0, 1.0),
            "ln_tail": SitePrior(1.5, 1.0),
        }

    def _start(self, J: Tensor, n_components: int) -> dict[str, Tensor]:
        size = J.abs().sum(-1).log()[:100_000]
        spread = torch.quantile(size, quantile_levels(n_components)) - size.median()
        return {
            "ln_scale_r": ln_median(J[:, 0]) + spread,
            "ln_scale_z": ln_median(J[:, 2]) + spread,
            "ln_scale_phi": ln_median(J[:, 1].abs()) + spread,
            # d = 2, as of a disc: where the root is negative no data could change it
            "root_shape_phi": torch.full_like(spread, 0.8),
        }

    def distribution(self) -> AxisymmetricActionDistribution:
        return AxisymmetricActionDistribution(
            self.log_weights(),
            self.ln_scale_r.exp(),
            self.ln_scale_z.exp(),
            self.ln_scale_phi.exp(),
            self.root_shape_phi.clamp(min=0).square().exp(),
            self.ln_tail.exp(),
            self.gradient_r,
            self.gradient_z,
            _MOST_SPIN * self.atanh_spin.tanh(),
            self._turn,
        )
