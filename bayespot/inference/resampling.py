"""Draws without weights from draws with weights."""

from __future__ import annotations

import torch
from torch import Tensor


def systematic(weights: Tensor, n: int, seed: int) -> Tensor:
    """Return n indices, sorted, each as often as n times its weight says to within one (systematic resampling)."""
    offset = torch.rand((), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ticks = (torch.arange(n, dtype=torch.float64) + offset) / n
    cumulative = weights.double().cumsum(0)
    return torch.searchsorted(cumulative / cumulative[-1], ticks).clamp(max=len(weights) - 1)


def by_weight(log_weights: Tensor, n: int, seed: int) -> Tensor:
    """Return n indices of draws, each as often as its weight says: what they choose has no weights any more."""
    return systematic(log_weights.softmax(0), n, seed)
