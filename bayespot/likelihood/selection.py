"""Selection functions: the probability S(x, v) that a star of given position and velocity is in the catalogue."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bayespot.catalog.rotation import rotation_matrix, turned_stars
from bayespot.units import Declared, takes, takes_tensors

#: The Sun in astropy's v4.0 Galactocentric frame (kpc), the default observer.
SUN = (-8.121973366, 0.0, 0.0208)


class SelectionFunction(Declared, abc.ABC):
    """S(w) in [0, 1] for w = (x, v) in kpc and km/s; products are selections in sequence.

    ``smooth`` tells whether S may be differentiated: a hard edge has derivative zero almost everywhere, which
    is not the derivative of its mean. ``position_only`` promises that S does not depend on the velocity: its mean over
    directions is then a function of r alone, which is found to more digits than one of r and v.
    """

    smooth: bool = False
    position_only: bool = False

    @takes_tensors(w="phase_space")
    @abc.abstractmethod
    def probability(self, w: Tensor) -> Tensor:
        """Return S for ``w (*batch, 6)``, shape ``(*batch,)``."""

    @takes_tensors(w="phase_space")
    def __call__(self, w: Tensor) -> Tensor:
        """Return S, checked.

        Raises
        ------
        ValueError
            If a value is outside [0, 1], not a number, or the shape is wrong.
        """
        s = torch.as_tensor(self.probability(w), dtype=torch.float64)
        if s.shape != w.shape[:-1]:
            raise ValueError(
                f"{self}: S has shape {tuple(s.shape)} for stars of shape {tuple(w.shape)}; return one number per star"
            )
        bad = ~((s >= 0) & (s <= 1))
        if bool(bad.any()):
            i = int(bad.flatten().int().argmax())
            where = ", ".join(f"{float(c):.4g}" for c in w.reshape(-1, 6)[i])
            raise ValueError(
                f"{self}: S = {float(s.flatten()[i]):.6g} at w = ({where}); a selection function is a probability, "
                "between 0 and 1: normalise or clamp it"
            )
        return s

    def __mul__(self, other: SelectionFunction) -> SelectionFunction:
        return Product(self, other)

    def __repr__(self) -> str:
        inner = ", ".join(f"{k}={v!r}" for k, v in vars(self).items() if not k.startswith("_"))
        return f"{type(self).__name__}({inner})"


class Custom(SelectionFunction):
    """Any function ``s(x, v)`` of position (kpc) and velocity (km/s), each ``(*batch, 3)``.

    Parameters
    ----------
    function
        Returns S, ``(*batch,)``; a module-level function, so that runs can be saved.
    smooth
        Whether it has no hard edges and is differentiable.
    position_only
        Whether it does not depend on v.
    """

    def __init__(
        self, function: Callable[[Tensor, Tensor], Tensor], smooth: bool = False, position_only: bool = False
    ) -> None:
        self.function, self.smooth, self.position_only = function, smooth, position_only

    def probability(self, w: Tensor) -> Tensor:
        return self.function(w[..., :3], w[..., 3:])


class Product(SelectionFunction):
    """The product of selection functions."""

    def __init__(self, *factors: SelectionFunction) -> None:
        self.factors = factors
        self.smooth = all(factor.smooth for factor in factors)
        self.position_only = all(factor.position_only for factor in factors)

    def probability(self, w: Tensor) -> Tensor:
        return torch.stack([factor(w) for factor in self.factors]).prod(0)


class Rotated(SelectionFunction):
    r"""A selection of stars whose axes were turned, :math:`S'(x, v) = S(R^T x, R^T v)`.

    The selection is stated in the axes in which the stars were read, with the Sun where it is there:
    ``Rotated(selection, catalog.rotation)`` for a ``catalog`` that `bayespot.catalog.Catalog.rotated` returned.

    Parameters
    ----------
    selection
        S before the rotation.
    rotation
        R, ``(3, 3)``; of a catalogue, its ``rotation``.

    Raises
    ------
    ValueError
        If it is no rotation.

    Examples
    --------
    >>> upright = Rotated(HeliocentricDistance(5.0), [[1.0, 0.0, 0.0], [0.0, 0.0, -1.0], [0.0, 1.0, 0.0]])
    >>> upright(torch.tensor([-8.1, -0.02, 1.0, 0.0, 0.0, 0.0], dtype=torch.float64)).item()
    1.0
    """

    @takes(rotation="number")
    def __init__(self, selection: SelectionFunction, rotation: Any) -> None:
        if not isinstance(selection, SelectionFunction):
            raise ValueError(f"Rotated turns a selection function, got {selection!r}")
        self.selection, self.rotation = selection, rotation_matrix(None, rotation).tolist()
        self.smooth, self.position_only = selection.smooth, selection.position_only

    def probability(self, w: Tensor) -> Tensor:
        back = torch.tensor(self.rotation, dtype=torch.float64).T
        return self.selection(turned_stars(w, back))

    def __repr__(self) -> str:
        return f"Rotated({self.selection!r})"


class SphericalShell(SelectionFunction):
    """Stars with r_min <= r < r_max (kpc) from the Galactic centre.

    Raises
    ------
    ValueError
        Unless 0 <= r_min < r_max.
    """

    position_only = True

    @takes(r_min="length", r_max="length")
    def __init__(self, r_min: float = 0.0, r_max: float = math.inf) -> None:
        self.r_min, self.r_max = _ordered("r_min", r_min, "r_max", r_max)

    def probability(self, w: Tensor) -> Tensor:
        r = torch.linalg.vector_norm(w[..., :3], dim=-1)
        return ((r >= self.r_min) & (r < self.r_max)).double()


class HeliocentricDistance(SelectionFunction):
    """Stars with d_min <= d < d_max (kpc) from the observer.

    Parameters
    ----------
    d_max, d_min
        Limits in kpc.
    observer
        Galactocentric position of the observer in kpc; the Sun by default.
    """

    position_only = True

    @takes(d_max="length", d_min="length", observer="length")
    def __init__(self, d_max: float, d_min: float = 0.0, observer: tuple[float, float, float] = SUN) -> None:
        self.d_min, self.d_max = _ordered("d_min", d_min, "d_max", d_max)
        self.observer = _point(observer)

    def probability(self, w: Tensor) -> Tensor:
        d = _distance(w, self.observer)
        return ((d >= self.d_min) & (d < self.d_max)).double()


class MagnitudeLimit(SelectionFunction):
    r"""Stars of one absolute magnitude with a smooth limit,
    :math:`S = [1 + \exp((m - m_{lim})/\Delta)]^{-1}`, :math:`m = M + 5 \log_{10}(d / 10\,pc)`.

    Parameters
    ----------
    limit, absolute_magnitude, width
        m_lim, M and Delta in magnitudes.
    observer
        Galactocentric position of the observer in kpc; the Sun by default.
    """

    smooth = True
    position_only = True

    @takes(limit="magnitude", absolute_magnitude="magnitude", width="magnitude", observer="length")
    def __init__(
        self, limit: float, absolute_magnitude: float, width: float, observer: tuple[float, float, float] = SUN
    ) -> None:
        if not width > 0:
            raise ValueError(f"width must be positive (magnitudes), got {width}; for a hard limit cut in distance")
        self.limit, self.absolute_magnitude, self.width = limit, absolute_magnitude, width
        self.observer = _point(observer)

    def probability(self, w: Tensor) -> Tensor:
        d = _distance(w, self.observer).clamp(min=1e-12)
        m = self.absolute_magnitude + 5 * torch.log10(100 * d)
        return torch.sigmoid((self.limit - m) / self.width)


class GalacticLatitude(SelectionFunction):
    """Stars with b_min <= abs(b) <= b_max (deg) as seen by the observer, for instance outside the disc's plane.

    b is measured from the plane through the observer parallel to z = 0; the true Galactic plane is tilted
    against it by 0.15 deg.
    """

    position_only = True

    @takes(b_min="angle", b_max="angle", observer="length")
    def __init__(self, b_min: float = 0.0, b_max: float = 90.0, observer: tuple[float, float, float] = SUN) -> None:
        self.b_min, self.b_max = _ordered("b_min", b_min, "b_max", b_max)
        self.observer = _point(observer)

    def probability(self, w: Tensor) -> Tensor:
        x = w[..., :3] - w.new_tensor(self.observer)
        sine = (x[..., 2].abs() / torch.linalg.vector_norm(x, dim=-1).clamp(min=1e-300)).clamp(max=1.0)
        b = torch.rad2deg(torch.asin(sine))
        return ((b >= self.b_min) & (b <= self.b_max)).double()


class SkyCone(SelectionFunction):
    """Stars within ``radius`` (deg) of a direction (l, b) (deg) as seen by the observer; ``inside=False``: beyond.

    l is measured from the direction of +x towards +y, which from the Sun is Galactic longitude.
    """

    position_only = True

    @takes(longitude="angle", latitude="angle", radius="angle", observer="length")
    def __init__(
        self,
        longitude: float,
        latitude: float,
        radius: float,
        inside: bool = True,
        observer: tuple[float, float, float] = SUN,
    ) -> None:
        if not 0 < radius < 180:
            raise ValueError(f"radius must be between 0 and 180 deg, got {radius}")
        self.longitude, self.latitude, self.radius = longitude, latitude, radius
        self.inside, self.observer = inside, _point(observer)

    def probability(self, w: Tensor) -> Tensor:
        angle, b = math.radians(self.longitude), math.radians(self.latitude)
        axis = w.new_tensor([math.cos(b) * math.cos(angle), math.cos(b) * math.sin(angle), math.sin(b)])
        x = w[..., :3] - w.new_tensor(self.observer)
        cosine = (x @ axis) / torch.linalg.vector_norm(x, dim=-1).clamp(min=1e-300)
        near = cosine >= math.cos(math.radians(self.radius))
        return (near if self.inside else ~near).double()


@takes_tensors(w="phase_space")
def require_selected(selection: SelectionFunction, w: Tensor) -> None:
    """Raise ValueError if the selection rejects (S = 0) a star that is in the catalogue, ``w (n, 6)``."""
    s = selection(w)
    rejected = s <= 0
    if bool(rejected.any()):
        row = int(rejected.int().argmax())
        x = ", ".join(f"{float(c):.4g}" for c in w[row, :3])
        raise ValueError(
            f"{selection} rejects {int(rejected.sum())} of {len(w)} stars of the catalogue, the first in row {row} "
            f"(counting from 0) at x = ({x}) kpc: S = 0 there means that it cannot have been observed; correct the "
            "selection or drop those stars"
        )


def _point(observer: Sequence[float]) -> tuple[float, float, float]:
    if len(observer) != 3:
        raise ValueError(f"observer is a Galactocentric position (x, y, z) in kpc, got {observer}")
    x, y, z = (float(value) for value in observer)
    return x, y, z


def _distance(w: Tensor, observer: tuple[float, float, float]) -> Tensor:
    return torch.linalg.vector_norm(w[..., :3] - w.new_tensor(observer), dim=-1)


def _ordered(low_name: str, low: float, high_name: str, high: float) -> tuple[float, float]:
    if not 0 <= low < high:
        raise ValueError(f"need 0 <= {low_name} < {high_name}, got {low_name}={low} and {high_name}={high}")
    return float(low), float(high)
