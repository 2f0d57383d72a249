"""Sums over many stars: block by block, with what all blocks share computed and differentiated once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

#: Rows per block: few enough that intermediates take little memory, enough that all threads work on each operation
#: (blocks of 8000 to 200 000 cost 1.6 to 1.0 times as much; one thread per block gains nothing on this).
BLOCK = 65_536

T = TypeVar("T")


def blocks(w: Tensor, size: int = BLOCK) -> Iterator[Tensor]:
    """Yield consecutive blocks of stars, of at most ``size`` rows in all (a star may have many samples)."""
    yield from w.split(stars_in(w, size))


def stars_in(w: Tensor, n_rows: int) -> int:
    """Return how many stars make ``n_rows`` rows of the data that `SnapshotModel.prepare` returns."""
    return n_rows if w.dim() == 2 else max(1, n_rows // w.shape[1])


def mapped(function: Callable[[Tensor], T], w: Tensor, size: int = BLOCK) -> Iterator[T]:
    """Return an iterator over ``function(block)`` of consecutive blocks of stars, in their order."""
    return map(function, blocks(w, size))


class Cut:
    """Cuts the graph between what all blocks of stars share and what is computed of each block.

    Called with a tensor it returns a leaf of the same values. The gradients that blocks leave in the leaves are added
    up, and `gradient` passes them on once: the price of what they share does not depend on the number of blocks.
    """

    def __init__(self) -> None:
        self.roots: list[Tensor] = []
        self.leaves: list[Tensor] = []
        self._sums: list[Tensor | None] = []

    def __call__(self, shared: Tensor) -> Tensor:
        if not shared.requires_grad:
            return shared
        self.roots.append(shared)
        self.leaves.append(shared.detach().requires_grad_())
        self._sums.append(None)
        return self.leaves[-1]

    def add(self, gradients: Sequence[Tensor | None]) -> None:
        """Add the gradients of one block by the leaves; None: it does not depend on this one."""
        self._sums = [
            new if old is None else old if new is None else old + new
            for old, new in zip(self._sums, gradients, strict=True)
        ]

    def gradient(self, u: Tensor) -> Tensor:
        """Return the gradient by ``u``, which the roots were computed from."""
        used = [(root, total) for root, total in zip(self.roots, self._sums, strict=True) if total is not None]
        if not used:
            return torch.zeros_like(u)
        roots, sums = zip(*used, strict=True)
        return torch.autograd.grad(roots, u, sums)[0]
