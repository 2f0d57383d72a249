"""What an approximation of a density lacks, learned from noisy ratios whose mean is known."""

from __future__ import annotations

import math

import pytest
import torch

from bayespot.inference import correction
from bayespot.inference.correction import log_ratio

F64 = torch.float64


def ratios(n: int, noise: float, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draws of a wide Gaussian, ratios of mean exp(0.3 + b . x) and log-normal noise, log-weights of a narrow one."""
    generator = torch.Generator().manual_seed(seed)
    x = 2 * torch.randn(n, 3, generator=generator, dtype=F64) + torch.tensor([5.0, -3.0, 0.0], dtype=F64)
    b = torch.tensor([0.4, -0.2, 0.0], dtype=F64)
    log_mean = 0.3 + x @ b
    z = torch.randn(n, generator=generator, dtype=F64)
    ratio = (log_mean + noise * z - noise**2 / 2).exp()
    log_weights = -0.5 * (1 - 0.25) * ((x - x.mean(0)) ** 2).sum(-1)
    return x, ratio, log_weights, b


def test_slopes_and_constant():
    """Without noise a ratio that is log-linear is found, up to the prior's pull, to 1e-3; ratios of noise 1.5 in the
    logarithm, of 4000 draws, within 4 standard errors: the mean of the logarithm, off by 1.1, plays no role."""
    x, ratio, log_weights, b = ratios(4000, 0.0, 1)
    a, slopes = log_ratio(x, ratio, log_weights)
    assert torch.allclose(slopes, b, atol=1e-3)
    assert float(a) == pytest.approx(0.3, abs=5e-3)
    x, ratio, log_weights, b = ratios(4000, 1.5, 2)
    a, slopes = log_ratio(x, ratio, log_weights)
    weight = torch.softmax(log_weights, 0)
    error = (math.exp(1.5**2) - 1) ** 0.5 * float((weight**2).sum()) ** 0.5
    centre = weight @ x
    assert float(a + slopes @ centre) == pytest.approx(float(0.3 + b @ centre), abs=4 * error)
    assert float((slopes - b).abs().max()) < 4 * error


def test_noise_alone_makes_no_slopes(monkeypatch):
    """Of few ratios with much noise, root mean square over 30 sets: slopes stay near their prior mean, zero, where
    they would follow the noise without a prior."""

    def scatter() -> float:
        squares = []
        for seed in range(30):
            x, ratio, log_weights, b = ratios(40, 1.5, 10 + seed)
            _, slopes = log_ratio(x, ratio * (-x @ b).exp(), log_weights)
            squares.append(float((slopes**2).mean()))
        return (sum(squares) / 30) ** 0.5

    found = scatter()
    monkeypatch.setattr(correction, "_SLOPE", 1e3)
    assert found < 0.25 < 0.8 * scatter()


def test_a_weightless_draw_changes_nothing():
    x, ratio, log_weights, _ = ratios(200, 0.5, 4)
    expected = log_ratio(x, ratio, log_weights)
    far = torch.cat([x, x[:1] + 100]), torch.cat([ratio, 1e9 * ratio[:1]])
    found = log_ratio(*far, torch.cat([log_weights, torch.tensor([-math.inf], dtype=F64)]))
    assert torch.allclose(found[1], expected[1], atol=1e-9)
    assert float(found[0]) == pytest.approx(float(expected[0]), abs=1e-8)


def test_one_ratio_beyond_all_others():
    """Where Laplace's method fails by a factor of e^600 in one potential the noise says so, and slopes stay at zero."""
    x, ratio, log_weights, _ = ratios(200, 0.5, 4)
    ratio[3] = math.exp(600.0)
    a, slopes = log_ratio(x, ratio, log_weights)
    assert math.isfinite(float(a))
    assert float(slopes.abs().max()) < 0.5


def test_no_ratio_is_told():
    x = torch.zeros(3, 1, dtype=F64)
    with pytest.raises(ValueError, match="no draw of f"):
        log_ratio(x, torch.zeros(3, dtype=F64), torch.zeros(3, dtype=F64))
