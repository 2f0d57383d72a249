"""Importance sampling of a few expensive values, against densities whose moments are known."""

from __future__ import annotations

import math

import pytest
import torch

from bayespot.inference import importance
from bayespot.inference.importance import MOST_ROUNDS, adaptive_importance, n_in_round
from bayespot.inference.proposals import Proposal, effective, learnable

F64 = torch.float64


def silent(note: str) -> None:
    """Tell nobody."""


def banana(x: torch.Tensor) -> float:
    """ln of a normalised density: x_0 normal, x_1 normal about x_0^2 / 2 with sd 0.7, x_2 normal with sd 3."""
    log_p = -0.5 * (x[0] ** 2 + (x[1] - x[0] ** 2 / 2) ** 2 / 0.49 + x[2] ** 2 / 9)
    return float(log_p) - 1.5 * math.log(2 * math.pi) - math.log(0.7 * 3)


def test_importance_sampling_of_a_bent_density():
    """Moments and the evidence of a banana, from a first proposal that is too narrow and beside it, within 4 standard
    errors of so many effective draws: the weights are those under the mixture of all proposals."""
    start, covariance = torch.tensor([0.5, 0.5, 1.0], dtype=F64), torch.tensor([0.5, 0.5, 4.0], dtype=F64).diag()
    found = adaptive_importance(banana, start, covariance, 200.0, 3, silent)
    log_weights = found.log_p - found.log_q
    n = effective(log_weights)
    assert n >= 200
    weight = torch.softmax(log_weights, 0)
    mean = weight @ found.x
    sd = (weight @ (found.x - mean) ** 2).sqrt()
    true_sd = torch.tensor([1.0, (0.5 + 0.49) ** 0.5, 3.0], dtype=F64)
    assert ((mean - torch.tensor([0.0, 0.5, 0.0], dtype=F64)).abs() < 4 * true_sd / n**0.5).all()
    assert ((sd / true_sd).log().abs() < 4 / n**0.5).all()
    assert float(log_weights.logsumexp(0)) - math.log(len(log_weights)) == pytest.approx(0.0, abs=4 / n**0.5)


def test_importance_sampling_ends():
    """A density of another shape than any t ends after the most rounds; where there is none draws have no weight; one
    without any place is told."""
    shell = adaptive_importance(
        lambda x: -1e4 * float((x.norm() - 1) ** 2) if x[0] > 0 else math.nan,
        torch.zeros(3, dtype=F64),
        torch.eye(3, dtype=F64),
        1e6,
        1,
        silent,
    )
    assert len(shell.x) == MOST_ROUNDS * n_in_round(3) == 400
    assert torch.equal(torch.isneginf(shell.log_p), shell.x[:, 0] <= 0)
    longer = adaptive_importance(
        lambda x: -1e4 * float((x.norm() - 1) ** 2),
        torch.zeros(3, dtype=F64),
        torch.eye(3, dtype=F64),
        1e6,
        1,
        silent,
        MOST_ROUNDS + 2,
    )
    assert len(longer.x) == 480
    with pytest.raises(ValueError, match="no draw about the maximum has a finite log posterior"):
        adaptive_importance(lambda x: math.nan, torch.zeros(2, dtype=F64), torch.eye(2, dtype=F64), 10, 1, silent)


def test_proposal_is_the_density_of_its_draws():
    """A mixture of Student's t in two dimensions: shares of the draws within squares are those of the log-density
    summed over them; `torch` knows the same in one dimension."""
    roots = torch.tensor([[[2.0, 0.0], [-1.0, 0.5]], [[0.5, 0.0], [0.5, 0.5]]], dtype=F64)
    proposal = Proposal(torch.tensor([[1.0, 2.0], [3.0, 1.0]], dtype=F64), roots)
    draws = proposal.sample(200_000, torch.Generator().manual_seed(1))
    axis = torch.linspace(-0.5, 0.5, 101, dtype=F64)
    steps = torch.cartesian_prod(axis, axis)
    for centre in ([1.0, 2.0], [3.0, 1.0], [1.0, 4.0]):
        inside = ((draws - torch.tensor(centre, dtype=F64)).abs() < 0.505).all(-1).double().mean()
        expected = proposal.log_prob(torch.tensor(centre, dtype=F64) + steps).exp().sum() * 0.01**2
        assert float(inside) == pytest.approx(float(expected), abs=4 * float(expected / 200_000) ** 0.5)
    line = Proposal.of(torch.zeros(1, dtype=F64), torch.full((1, 1), 4.0, dtype=F64))
    x = torch.linspace(-20, 20, 9, dtype=F64)
    assert torch.allclose(line.log_prob(x[:, None]), torch.distributions.StudentT(5.0, 0.0, 2.0).log_prob(x))


def funnel(x: torch.Tensor) -> float:
    """ln of a normalised density: x_0 normal of sd 2, the other seven normal of sd exp(x_0 / 6)."""
    sd = torch.cat([x.new_tensor([2.0]), (x[0] / 6).exp().expand(7)])
    return float(-0.5 * (x**2 / sd**2).sum() - sd.log().sum()) - 4 * math.log(2 * math.pi)


def test_a_funnel_is_sampled_to_its_wide_end(monkeypatch):
    """A density in eight dimensions that is four times as wide at one end as at the other, from a first proposal at the
    narrow one, in three runs of 800 draws: proposals with the draws' moments miss more of its volume (its evidence,
    which is 1) and of the wide end (its mean) than those learned from all values, which get both within 10 %."""
    start, covariance = torch.tensor([-2.0] + 7 * [0.0], dtype=F64), 0.25 * torch.eye(8, dtype=F64)

    def runs() -> tuple[float, float]:
        means, evidences = [], []
        for seed in range(3):
            found = adaptive_importance(funnel, start, covariance, 1e6, seed, silent)
            log_weights = found.log_p - found.log_q
            means.append(float(torch.softmax(log_weights, 0) @ found.x[:, 0]))
            evidences.append(float(log_weights.exp().mean()))
        return sum(means) / 3, sum(evidences) / 3

    mean, evidence = runs()
    assert mean == pytest.approx(0.0, abs=0.1 * 2)
    assert evidence == pytest.approx(1.0, abs=0.1)
    monkeypatch.setattr(importance, "learnable", lambda values, d: False)
    other_mean, other_evidence = runs()
    assert abs(other_mean) > 1.3 * abs(mean)
    assert abs(other_evidence - 1) > 1.3 * abs(evidence - 1)


def test_a_surrogate_needs_points():
    values = torch.cat([torch.zeros(9), torch.full((100,), -1e3), torch.full((5,), -math.inf)])
    assert not learnable(values, 2)
    assert learnable(torch.cat([values, torch.zeros(1)]), 2)
