"""Which stars belong to the system: the slower ones that a fit starts from, and the probabilities of a finished fit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayespot.inference.blocks import mapped
from bayespot.likelihood.model import SnapshotModel

#: Fraction of the stars that a start leaves out where the model allows for outliers: the fastest for their radius.
_TRIMMED = 0.05
#: Stars per bin of the median speed.
_PER_BIN = 50
#: Most outliers that a result names, and the least probability of one that it does.
_MOST_NAMED, _WORTH_NAMING = 100, 0.1


def unremarkable(w: Tensor) -> Tensor:
    """Return which stars ``(n,)`` a fit with outliers starts from: all but the fastest 5 % for their radius.

    A potential that binds a fast foreign star is too deep, and the way back is barred: the star is lost at a price
    first, paid before the others gain. From a potential that is too shallow the way up is free, as every
    member that becomes bound gains. Speeds are compared with the median at the same radius; beyond the median radius of
    the outermost bin that falls as the escape speed of a point mass: a foreign star that is alone far outside
    would else be compared with stars far inside of it, where all are faster.
    """
    n = len(w)
    ln_r = torch.linalg.vector_norm(w[:, :3], dim=-1).clamp(min=1e-300).log()
    v2 = (w[:, 3:] ** 2).sum(-1)
    order = ln_r.argsort()
    bins = order.tensor_split(max(1, min(_PER_BIN, n // _PER_BIN)))
    at = [float(ln_r[part].median()) for part in bins]
    typical = [float(v2[part].median().clamp(min=1e-300).log()) for part in bins]
    expected = torch.as_tensor(np.interp(ln_r.numpy(), at, typical)) - (ln_r - at[-1]).clamp(min=0)
    ratio = v2.clamp(min=1e-300).log() - expected
    mask = torch.ones(n, dtype=torch.bool)
    mask[ratio.topk(int(_TRIMMED * n)).indices] = False
    return mask


def named(probability: Tensor | None, names: Sequence[str] | None) -> list[dict[str, Any]]:
    """Return ``row``, ``name`` (if stars have names) and ``probability`` of the most likely outliers, at most 100.

    Rows count from 0; stars with a probability below a tenth are not named.
    """
    if probability is None:
        return []
    found: list[dict[str, Any]] = []
    top = probability.topk(min(_MOST_NAMED, len(probability)))
    for p, row in zip(top.values.tolist(), top.indices.tolist(), strict=True):
        if p >= _WORTH_NAMING:
            found.append({"row": row} | ({} if names is None else {"name": names[row]}) | {"probability": p})
    return found


@torch.no_grad()
def outlier_probability(fixed: Iterable[SnapshotModel], data: Tensor) -> Tensor:
    """Return the probability ``(n,)`` that each star is an outlier, averaged over models with their sites fixed.

    ``data`` are the stars as `SnapshotModel.prepare` returns them.
    """
    total, count = torch.zeros(len(data), dtype=torch.float64), 0
    for model in fixed:
        density = model.tabulated(data).density()
        total += torch.cat(list(mapped(density.outlier_probability, data)))
        count += 1
    return total / max(count, 1)
