"""Densities of orbits: normalisation, boundary behaviour, sampling, limits, fits, number of components.

Normalisation is by quadrature on the compact chart J = s u/(1-u); samples are compared with the density by
chi-square in cells of known probability; seeds fixed.
"""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import pytest
import torch
from pyro.distributions import MultivariateStudentT
from torch.distributions import Gamma

from bayespot.df import (
    ActionDistribution,
    ActionMixture,
    SphericalActionDistribution,
    SphericalMixture,
    choose_n_components,
)
from bayespot.df.components import log_evidence
from bayespot.df.mixture import SiteCoordinates
from bayespot.numerics import gauss_legendre
from bayespot.pyro_modules import freeze


def _t(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def spherical(rotation: bool = False) -> SphericalActionDistribution:
    return SphericalActionDistribution(
        _t(0.3, -0.4), _t(150.0, 900.0), _t(300.0, 600.0), _t(1.0, 1.8), _t(2.0, 2.7), _t(2.2, 6.0),
        _t(1.5, -0.7) if rotation else None, validate_args=True,
    )  # fmt: skip


def general() -> ActionDistribution:
    return ActionDistribution(
        _t(0.3, -0.4), _t(50.0, 90.0), _t(30.0, 60.0), _t(1500.0, -300.0), _t(200.0, 400.0), _t(1.0, 1.8),
        _t(1.0, 2.7), _t(2.5, 6.0), validate_args=True,
    )  # fmt: skip


def _half_line(n: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Nodes and weights on [0, inf), J = scale exp(t): wide enough for power-law tails."""
    x, w = gauss_legendre(n)
    t = 18 * x
    return scale * t.exp(), scale * t.exp() * 18 * w


@pytest.mark.parametrize("rotation", [False, True])
def test_spherical_density_integrates_to_one(rotation):
    """int f dJ_r dJ_phi dJ_z = 1 within 1e-6, as int f L dJ_r dL dcos i."""
    r, wr = _half_line(200, 300.0)
    L, wL = _half_line(200, 400.0)
    c, wc = gauss_legendre(12)
    J_r, LL, cc = torch.meshgrid(r, L, c, indexing="ij")
    J = torch.stack([J_r, LL * cc, LL * (1 - cc.abs())], -1)
    f = spherical(rotation).log_prob(J).exp()
    # |cos i| in J_z makes no kink: f depends on L and cos i only
    total = torch.einsum("ijk,i,j,k->", f * LL, wr, wL, wc)
    assert abs(float(total) - 1) < 1e-6


def test_general_density_integrates_to_one():
    """int f dJ = 1 within 1e-5 (J_phi by the substitution mu + 300 sinh t)."""
    r, wr = _half_line(90, 60.0)
    z, wz = _half_line(90, 40.0)
    x, w = gauss_legendre(400)
    t = 14 * x
    phi, wp = 300 * t.sinh(), 14 * w * 300 * t.cosh()
    total = 0.0
    for k in range(0, 400, 50):
        part = slice(k, k + 50)
        J = torch.stack(torch.meshgrid(r, phi[part], z, indexing="ij"), -1)
        total += float(torch.einsum("ijk,i,j,k->", general().log_prob(J).exp(), wr, wp[part], wz))
    assert abs(total - 1) < 1e-5


@pytest.mark.parametrize("make", [spherical, lambda: spherical(True), general], ids=["sphere", "rotating", "general"])
def test_samples_match_density(make):
    """E[1/f over a box] = the box's volume: mean of indicator/f within 5 standard errors, six boxes."""
    torch.manual_seed(0)
    f = make()
    J = f.sample((200_000,))
    assert bool((J[:, 0] >= 0).all())
    assert bool((J[:, 2] >= 0).all())
    inverse = (-f.log_prob(J)).exp()
    lows = torch.quantile(J[:100_000], _t(0.2, 0.35), dim=0)
    highs = torch.quantile(J[:100_000], _t(0.5, 0.8, 0.65), dim=0)
    for low in lows:
        for high in highs:
            inside = ((low < J) & (high > J)).all(-1)
            estimate = inverse * inside
            volume = float((high - low).prod())
            error = float(estimate.std()) / len(J) ** 0.5
            assert abs(float(estimate.mean()) - volume) < 5 * error, (low, high)


def test_finite_at_the_boundary():
    """f tends to a finite, non-zero value as J_r -> 0 and as L -> 0 when the shapes are 1 and 2."""
    one = SphericalActionDistribution(_t(0.0), _t(100.0), _t(200.0), _t(1.0), _t(2.0), _t(3.0))
    J = torch.tensor([[1e-3, 50.0, 20.0], [0.0, 50.0, 20.0], [40.0, 1e-4, 0.0], [40.0, 0.0, 0.0]], dtype=torch.float64)
    log_f = one.log_prob(J)
    assert torch.isfinite(log_f).all()
    assert float((log_f[0] - log_f[1]).abs()) < 1e-4
    assert float((log_f[2] - log_f[3]).abs()) < 1e-4


def test_gamma_limit():
    """tail -> infinity gives the product of Gammas in J_r and L, to 1e-5."""
    a, c, s_r, s_L = 1.7, 2.4, 120.0, 310.0
    compound = SphericalActionDistribution(_t(0.0), _t(s_r), _t(s_L), _t(a), _t(c), _t(1e7))
    J = torch.tensor([[30.0, 100.0, 200.0], [500.0, -400.0, 50.0]], dtype=torch.float64)
    L = J[:, 2] + J[:, 1].abs()
    expected = (
        Gamma(_t(a), _t(1 / s_r)).log_prob(J[:, 0]) + Gamma(_t(c), _t(1 / s_L)).log_prob(L) - L.log() - math.log(2)
    )
    torch.testing.assert_close(compound.log_prob(J), expected, rtol=0, atol=1e-5)


def test_rotation_is_odd_in_cos_i():
    """f(J_phi)/f(-J_phi) = exp(2 k cos i) for one component."""
    one = SphericalActionDistribution(_t(0.0), _t(100.0), _t(200.0), _t(1.2), _t(2.2), _t(3.0), _t(1.3))
    up = torch.tensor([[40.0, 60.0, 20.0]], dtype=torch.float64)
    down = up * torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64)
    assert float(one.log_prob(up) - one.log_prob(down)) == pytest.approx(2 * 1.3 * 60 / 80, rel=1e-10)


@pytest.mark.parametrize("kind", [SphericalMixture, ActionMixture])
def test_gradients(kind):
    """d ln f / d(sites) by autograd against central differences, 1e-6 relative."""
    J = general().sample((50,))
    df = kind().resolved(3, J)
    start = df.initial_values(J)
    names = list(start)

    def log_f(flat: torch.Tensor) -> torch.Tensor:
        return freeze(df, dict(zip(names, flat.split(3), strict=True))).log_prob(J).sum()

    flat = torch.cat(list(start.values())).requires_grad_()
    (grad,) = torch.autograd.grad(log_f(flat), flat)
    for k in range(len(flat)):
        step = torch.zeros_like(flat)
        step[k] = 1e-5
        with torch.no_grad():
            difference = (log_f(flat + step) - log_f(flat - step)) / 2e-5
        assert float(difference) == pytest.approx(float(grad[k]), rel=1e-5, abs=1e-5), names[k // 3]


def test_fit_recovers_held_out_likelihood():
    """A two-component truth, 4 000 stars: the fit's held-out ln f is within 0.01 of the truth's own."""
    torch.manual_seed(1)
    truth = spherical()
    J, held = truth.sample((4000,)), truth.sample((4000,))
    df = SphericalMixture().resolved(2, J)
    fitted = freeze(df, df.fit_actions(J, seed=0))
    with torch.no_grad():
        gap = float((truth.log_prob(held) - fitted.log_prob(held)).mean())
    assert -0.005 < gap < 0.01


def test_number_of_components():
    """One component is recognised as one; three well separated ones are not taken for fewer."""
    torch.manual_seed(2)
    one = SphericalActionDistribution(_t(0.0), _t(100.0), _t(200.0), _t(1.3), _t(2.3), _t(4.0))
    choice = choose_n_components(SphericalMixture(), one.sample((1500,)), seed=0, candidates=(1, 2, 3))
    assert choice.n_components == 1
    three = SphericalActionDistribution(
        _t(0.0, 0.0, 0.0), _t(3.0, 100.0, 3000.0), _t(5.0, 150.0, 5000.0), _t(3.0, 3.0, 3.0), _t(8.0, 8.0, 8.0),
        _t(30.0, 30.0, 30.0),
    )  # fmt: skip
    choice = choose_n_components(SphericalMixture(), three.sample((1500,)), seed=0, candidates=(1, 2, 3, 4))
    assert choice.n_components >= 3
    assert [row["n_components"] for row in choice.table][:3] == [1, 2, 3]


def test_number_of_components_by_evidence():
    """The evidence prefers one component for one, and at least three for three well separated ones."""
    torch.manual_seed(2)
    one = SphericalActionDistribution(_t(0.0), _t(100.0), _t(200.0), _t(1.3), _t(2.3), _t(4.0))
    choice = choose_n_components(SphericalMixture(), one.sample((800,)), 0, (1, 2, 3), criterion="evidence")
    assert choice.n_components == 1
    three = SphericalActionDistribution(
        _t(0.0, 0.0, 0.0), _t(3.0, 100.0, 3000.0), _t(5.0, 150.0, 5000.0), _t(3.0, 3.0, 3.0), _t(8.0, 8.0, 8.0),
        _t(30.0, 30.0, 30.0),
    )  # fmt: skip
    choice = choose_n_components(SphericalMixture(), three.sample((800,)), 0, (1, 2, 3), criterion="evidence")
    assert choice.n_components == 3
    assert choice.table[0]["below_best"] > 50


def test_evidence_of_one_component():
    """Laplace against importance sampling from a wide t about the maximum, one component: ln p(J) to 0.3."""
    torch.manual_seed(5)
    J = SphericalActionDistribution(_t(0.0), _t(100.0), _t(200.0), _t(1.3), _t(2.3), _t(4.0)).sample((200,))
    df = SphericalMixture().resolved(1, J)
    values = df.fit_actions(J, 0)
    coordinates = SiteCoordinates(df)

    def log_joint(z: torch.Tensor) -> torch.Tensor:
        return coordinates.log_prior(z) + freeze(df, coordinates.values(z)).log_prob(J).sum()

    z = coordinates.whitened(coordinates.flat(values)).detach()
    H = -torch.autograd.functional.hessian(log_joint, z)
    q = MultivariateStudentT(8.0, z, torch.linalg.cholesky(torch.linalg.inv(H)))
    draws = q.sample((1500,))
    with torch.no_grad():
        log_weights = torch.stack([log_joint(one) for one in draws]) - q.log_prob(draws)
    exact = float(log_weights.logsumexp(0)) - math.log(1500)
    assert log_evidence(df, values, J) == pytest.approx(exact, abs=0.3)


def test_stick_breaking_weights():
    """Weights sum to one and follow the formula; components that the data do not ask for keep little weight."""
    torch.manual_seed(3)
    truth = SphericalActionDistribution(_t(0.0), _t(100.0), _t(200.0), _t(1.3), _t(2.3), _t(4.0))
    J = truth.sample((2000,))
    df = SphericalMixture(weights="stick_breaking").resolved(4, J)
    fixed = freeze(df, df.initial_values(J) | {"sticks": _t(0.5, 0.2, 0.75)})
    torch.testing.assert_close(fixed.log_weights().exp(), _t(0.5, 0.1, 0.3, 0.1))
    fitted = freeze(df, df.fit_actions(J, seed=0))
    with torch.no_grad():
        gap = float((truth.log_prob(J) - fitted.log_prob(J)).mean())
    assert -0.01 < gap < 0.003
    with pytest.raises(ValueError, match="dirichlet"):
        SphericalMixture(weights="dirichlet")


def test_refusals():
    """Zero components, an unresolved mixture and shapes below their bound are refused."""
    with pytest.raises(ValueError, match="got 0"):
        SphericalMixture(0)
    with pytest.raises(ValueError, match="resolved"):
        SphericalMixture().initial_values(torch.rand(5, 3).double())
    with pytest.raises(ValueError, match="shape_L"):
        SphericalActionDistribution(_t(0.0), _t(1.0), _t(1.0), _t(1.0), _t(1.5), _t(3.0), validate_args=True)


@pytest.mark.parametrize("kind", [SphericalMixture, ActionMixture])
def test_priors_near_the_data_are_narrower(kind):
    """near_data halves the sd of every logarithm of a scale, keeps its mean, and leaves shapes near 1."""
    J = 100 * torch.rand(500, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 1
    broad, near = (kind().resolved(2, J, near_data=flag) for flag in (False, True))
    names = [name for name in broad._priors if name.startswith(("ln_scale", "ln_sigma"))]
    assert len(names) >= 2
    for name in names:
        assert near._priors[name].sd == broad._priors[name].sd / 2
        assert near._priors[name].mean == broad._priors[name].mean
    assert near._priors["ln_shape_r"].mean < broad._priors["ln_shape_r"].mean
    assert {k: v for k, v in near._priors.items() if k not in (*names, "ln_shape_r")} == {
        k: v for k, v in broad._priors.items() if k not in (*names, "ln_shape_r")
    }


def test_a_fit_at_fixed_actions_does_not_run_away():
    """A hot halo and a cold rotating shell, two components: trial steps of L-BFGS went where sums of log-gammas lose
    all digits, a spurious gain of 1e105, and on to NaN. Held-out ln f is now that of the fits to the other folds
    (-24.32), 0.5 better than one component's."""
    path = Path(__file__).parents[1] / "benchmarks" / "densities.py"
    spec = importlib.util.spec_from_file_location("densities_benchmark", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    J = module.actions("two-component", 5000, 4001)
    one, two = choose_n_components(SphericalMixture(rotation=True), J, 4001, candidates=(1, 2)).table
    assert two["log_f"] > one["log_f"] + 0.5
    assert -24.4 < two["log_f"] < -24.2


@pytest.mark.parametrize("rotation", [False, True])
def test_derivatives_of_the_mixture(rotation):
    """First and second derivatives by J and by all parameters against differences (gradcheck); L = 0 and K = 1 too."""
    generator = torch.Generator().manual_seed(2)
    for k in (1, 3):
        J = 100 * torch.rand(7, 3, generator=generator, dtype=torch.float64) + 1
        J[:, 1] -= 50
        shapes = [torch.rand(k, generator=generator, dtype=torch.float64) for _ in range(7)]

        def log_f(J, *p):
            scales = (100 * (1 + p[1]), 100 * (1 + p[2]), 1 + p[3], 2 + p[4], 1 + p[5])
            return SphericalActionDistribution(p[0], *scales, p[6] if rotation else None).log_prob(J)

        inputs = [x.requires_grad_() for x in (J, *shapes[: 7 if rotation else 6])]
        assert torch.autograd.gradcheck(log_f, inputs, atol=1e-7)
        assert torch.autograd.gradgradcheck(log_f, inputs, atol=1e-6)
    edge = torch.tensor([[1.0, 0.0, 0.0], [0.0, 3.0, 1.0]], dtype=torch.float64, requires_grad=True)
    value = log_f(edge, *shapes)
    assert torch.isfinite(value).all()
    assert torch.isfinite(torch.autograd.grad(value.sum(), edge)[0]).all()
