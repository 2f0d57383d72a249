"""Selection functions tabulated on HEALPix pixels (Gorski et al. 2005, ApJ 622, 759), and on bins of magnitude."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bayespot.catalog.frame import galactocentric_w
from bayespot.likelihood.selection import SUN, SelectionFunction
from bayespot.units import takes

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    Array = NDArray[Any]

#: healpy writes this where a pixel has no value.
_UNSEEN = -1.6375e30
#: Most points per call of a function that is tabulated.
_BLOCK = 2**17


class TabulationError(NamedTuple):
    """Table minus function at random directions and magnitudes: mean of the absolute value, largest, mean; n points."""

    mean: float
    largest: float
    bias: float
    n: int


class Healpix(SelectionFunction):
    """S from a table over the sky and, if it has a second axis, over bins of apparent magnitude or of distance.

    S is constant within a pixel: a selection with hard edges, of which a fit only needs the mean. A star costs about
    0.4 us, whatever made the table. `tabulate` makes it from any function, `from_gaiaunlimited` from that package's
    objects.

    Parameters
    ----------
    table : Float[Array, "n_pix"] or Float[Array, "n_pix n_bins"]
        Probabilities, :math:`12\\,n_{side}^2` pixels; NaN or healpy's UNSEEN where there is none.
    frame
        ``"icrs"`` or ``"galactic"``: what the pixels are laid on.
    nest
        Whether pixels are counted in the nested order instead of by rings.
    magnitudes : Float[Array, "n_bins + 1"], optional
        Edges of the bins, apparent magnitudes; with ``absolute_magnitude``, that of the stars, which makes them bins
        of distance: m = M + 5 log10(d / 10 pc).
    distances : Float[Array, "n_bins + 1"], optional
        Edges of bins of heliocentric distance in kpc, instead.
    empty
        What a pixel without a value means: a probability (0: nothing can be observed there), or ``"parent"``, the
        mean of the smallest coarser pixel that has one. By default such pixels are refused.
    outside
        S beyond the first and last bin: by default 0, not observed.
    interpolate
        Whether to interpolate linearly between the bins' centres.
    observer
        Galactocentric position of the observer in kpc; the Sun by default.

    Raises
    ------
    ValueError
        If a shape, a value or an edge is wrong, or pixels are empty; the message says which and what to do.

    Examples
    --------
    >>> import torch
    >>> from bayespot.likelihood import Healpix
    >>> north = Healpix([1.0] * 4 + [0.5] * 4 + [0.0] * 4, frame="galactic")  # 12 pixels, from the north to the south
    >>> at = torch.tensor([[-8.0, 0.0, 5.0, 0.0, 0.0, 0.0], [-8.0, 0.0, -5.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    >>> north(at)
    tensor([1., 0.], dtype=torch.float64)
    """

    position_only = True

    @takes(magnitudes="magnitude", absolute_magnitude="magnitude", distances="length", observer="length")
    def __init__(
        self,
        table: ArrayLike,
        frame: Literal["icrs", "galactic"] = "icrs",
        nest: bool = False,
        magnitudes: ArrayLike | None = None,
        absolute_magnitude: float | None = None,
        distances: ArrayLike | None = None,
        empty: float | Literal["parent"] | None = None,
        outside: float = 0.0,
        interpolate: bool = False,
        observer: tuple[float, float, float] = SUN,
    ) -> None:
        values = np.array(table, dtype=float)
        self.nside = _nside(values.shape)
        self.magnitudes, self.distances = (
            _edges(n, e) for n, e in (("magnitudes", magnitudes), ("distances", distances))
        )
        self.absolute_magnitude, self.observer = absolute_magnitude, observer
        self.frame, self.outside, self.interpolate = frame, float(outside), interpolate
        edges = self.magnitudes if self.distances is None else self.distances
        _check_axes(values, self.magnitudes, self.distances, absolute_magnitude)
        if nest:
            values = values[ring_to_nested(self.nside)]
        values = np.where(np.isclose(values, _UNSEEN, rtol=1e-3), np.nan, values)
        self.table = torch.as_tensor(_filled(values, self.nside, empty))
        for what, s in (("table", self.table), ("outside", torch.tensor(self.outside))):
            if not bool(((s >= 0) & (s <= 1)).all()):
                wrong = s[~((s >= 0) & (s <= 1))][0] if s.dim() else s
                raise ValueError(f"{what} has S = {float(wrong):.6g}; probabilities are between 0 and 1: normalise it")
        #: How far the table is from the function that it was made from, where `tabulate` has compared them.
        self.error: TabulationError | None = None
        self._edges, self._rotation = edges, torch.as_tensor(_rotation(frame))

    @classmethod
    @takes(magnitudes="magnitude", absolute_magnitude="magnitude", distances="length", observer="length")
    def tabulate(
        cls,
        function: Callable[..., ArrayLike],
        nside: int,
        frame: Literal["icrs", "galactic"] = "icrs",
        magnitudes: ArrayLike | None = None,
        absolute_magnitude: float | None = None,
        distances: ArrayLike | None = None,
        empty: float | Literal["parent"] | None = None,
        outside: float = 0.0,
        interpolate: bool = False,
        observer: tuple[float, float, float] = SUN,
        oversample: int = 1,
        n_check: int = 2000,
        seed: int = 0,
    ) -> Healpix:
        """Tabulate a function of direction, and of magnitude or distance, once; ``error`` then tells how well.

        Parameters
        ----------
        function
            ``function(coords)``, or ``function(coords, magnitude)``, ``function(coords, distance)`` with bins: an
            astropy SkyCoord of the frame and numbers, all one-dimensional, to probabilities.
        nside
            Resolution: pixels are 58.6 deg / nside wide.
        oversample
            Average over so many by so many points in each pixel (1, 2, 4, ...) instead of its centre.
        n_check, seed
            Random directions and magnitudes (distances) at which table and function are compared.
        frame, magnitudes, absolute_magnitude, distances, empty, outside, interpolate, observer
            As above.
        """
        _check_sides(nside, oversample)
        bins = magnitudes if distances is None else distances
        edges = _edges("magnitudes" if distances is None else "distances", bins)
        centres = None if edges is None else ((edges[1:] + edges[:-1]) / 2).numpy()
        fine = nside * oversample
        values = _evaluate(function, pixel_directions(fine, nest=oversample > 1), frame, centres)
        if oversample > 1:
            # a mean over the points that have a value: the edge of a map is no empty pixel
            values = _mean_of_known(values.reshape(12 * nside**2, oversample**2, *values.shape[1:]), axis=1)
        found = cls(
            values,
            frame,
            oversample > 1,
            magnitudes,
            absolute_magnitude,
            distances,
            empty,
            outside,
            interpolate,
            observer,
        )
        if n_check > 0:
            found.error = found._compared(function, n_check, seed)
        return found

    def probability(self, w: Tensor) -> Tensor:
        x = w[..., :3] - w.new_tensor(self.observer)
        pixel = pixel_of(x @ self._rotation.to(w), self.nside)
        if self._edges is None:
            return self.table.to(w)[pixel]
        return self._in_bins(pixel, self._coordinate(torch.linalg.vector_norm(x, dim=-1)))

    def _coordinate(self, d: Tensor) -> Tensor:
        """Return what the bins are bins of, at distances d (kpc)."""
        if self.absolute_magnitude is None:
            return d
        return self.absolute_magnitude + 5 * torch.log10(100 * d.clamp(min=1e-12))

    def _in_bins(self, pixel: Tensor, at: Tensor) -> Tensor:
        assert self._edges is not None
        edges, table = self._edges.to(at), self.table.to(at)
        i = torch.bucketize(at, edges, right=True) - 1
        inside = (i >= 0) & (i < table.shape[1])
        flat, row = table.reshape(-1), pixel * table.shape[1]
        if not self.interpolate:
            s = flat[row + i.clamp(0, table.shape[1] - 1)]
        else:
            centres = (edges[1:] + edges[:-1]) / 2
            low = (torch.bucketize(at, centres) - 1).clamp(0, max(len(centres) - 2, 0))
            high = (low + 1).clamp(max=len(centres) - 1)
            t = ((at - centres[low]) / (centres[high] - centres[low]).clamp(min=1e-300)).clamp(0, 1)
            s = torch.lerp(flat[row + low], flat[row + high], t)
        return torch.where(inside, s, self.outside)

    def _compared(self, function: Callable[..., ArrayLike], n: int, seed: int) -> TabulationError:
        """Compare with the function at random places, those without a value left out."""
        rng = np.random.default_rng(seed)
        directions = rng.normal(size=(n, 3))
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        pixel = pixel_of(torch.as_tensor(directions), self.nside)
        if self._edges is None:
            s, truth = self.table[pixel].numpy(), _evaluate(function, directions, self.frame, None)
        else:
            at = rng.uniform(float(self._edges[0]), float(self._edges[-1]), n)
            s = self._in_bins(pixel, torch.as_tensor(at)).numpy()
            truth = _call(function, directions, self.frame, at)
        difference = (s - truth)[np.isfinite(truth)]
        if not len(difference):
            return TabulationError(math.nan, math.nan, math.nan, 0)
        size = np.abs(difference)
        return TabulationError(float(size.mean()), float(size.max()), float(difference.mean()), len(size))

    def __repr__(self) -> str:
        axis = (
            ""
            if self._edges is None
            else f", {self.table.shape[1]} bins of "
            + ("distance" if self.distances is not None else f"magnitude, absolute_magnitude={self.absolute_magnitude}")
        )
        off = "" if self.error is None else f", error: mean {self.error.mean:.2g}, largest {self.error.largest:.2g}"
        return f"Healpix(nside={self.nside}, frame={self.frame!r}{axis}{off})"


def pixel_of(x: Tensor, nside: int) -> Tensor:
    """Return the pixels, counted by rings, that directions ``x (*batch, 3)`` of any length lie in."""
    xy = torch.linalg.vector_norm(x[..., :2], dim=-1)
    r = torch.hypot(xy, x[..., 2]).clamp(min=1e-300)
    z = x[..., 2] / r
    quarter = torch.remainder(torch.atan2(x[..., 1], x[..., 0]) * (2 / math.pi), 4.0)
    quarter = torch.where(quarter >= 4.0, 0.0, quarter)
    n_around = 4 * nside
    # equatorial belt: ascending and descending edge lines
    up, down = nside * (0.5 + quarter), 0.75 * nside * z
    a, b = torch.floor(up - down).long(), torch.floor(up + down).long()
    ring = nside + 1 + a - b
    shift = 1 - (ring & 1)
    i = torch.remainder((a + b - nside + shift + 1) >> 1, n_around)
    belt = 2 * nside * (nside - 1) + (ring - 1) * n_around + i
    # polar caps; sqrt(3 (1 - |z|)) from the sine keeps its digits at the poles
    within = quarter - torch.floor(quarter)
    reach = nside * (xy / r) * torch.sqrt(3 / (1 + z.abs()))
    ring = torch.floor(within * reach).long() + torch.floor((1 - within) * reach).long() + 1
    ring = ring.clamp(max=nside)
    i = torch.remainder(torch.floor(quarter * ring).long(), 4 * ring)
    north = 2 * ring * (ring - 1) + i
    south = 12 * nside**2 - 2 * ring * (ring + 1) + i
    return torch.where(z.abs() <= 2 / 3, belt, torch.where(z > 0, north, south))


def pixel_directions(nside: int, nest: bool = False) -> Array:
    """Return unit vectors (n_pix, 3) towards the pixels' centres."""
    from astropy_healpix.healpy import pix2vec

    return np.stack(pix2vec(nside, np.arange(12 * nside**2), nest=nest), -1)


def ring_to_nested(nside: int) -> Array:
    """Return the nested number of each pixel counted by rings."""
    if nside & (nside - 1):
        raise ValueError(f"the nested order needs nside to be a power of 2, got {nside}; reorder the table by rings")
    from astropy_healpix.healpy import ring2nest

    return np.asarray(ring2nest(nside, np.arange(12 * nside**2)))


def _rotation(frame: str) -> Array:
    """Return (3, 3): directions in the frame are separations along the Galactocentric axes times it."""
    if frame not in ("icrs", "galactic"):
        raise ValueError(f"frame must be 'icrs' or 'galactic', got {frame!r}")
    axes = {"ra": [0.0, 90.0, 0.0, 0.0], "dec": [0.0, 0.0, 90.0, 0.0], "distance": [1.0, 1.0, 1.0, 0.0]}
    still = dict.fromkeys(("pmra", "pmdec", "radial_velocity"), [0.0] * 4)
    x = galactocentric_w({k: torch.tensor(v, dtype=torch.float64) for k, v in (axes | still).items()})[:, :3].numpy()
    to_icrs = (x[:3] - x[3]).T
    if frame == "icrs":
        return np.asarray(to_icrs)
    return np.asarray(to_icrs @ np.stack(_sky(np.eye(3), "icrs").galactic.cartesian.xyz.value, -1))


def _sky(directions: Array, frame: str) -> Any:
    """Return directions (n, 3) as an astropy SkyCoord of longitudes and latitudes."""
    from astropy import units as u
    from astropy.coordinates import SkyCoord

    longitude = np.arctan2(directions[:, 1], directions[:, 0]) % (2 * np.pi)
    latitude = np.arctan2(directions[:, 2], np.hypot(directions[:, 0], directions[:, 1]))
    return SkyCoord(longitude * u.rad, latitude * u.rad, frame=frame)


def _call(function: Callable[..., ArrayLike], directions: Array, frame: str, at: Array | None) -> Array:
    arguments = () if at is None else (np.asarray(at, float),)
    s = np.asarray(function(_sky(directions, frame), *arguments), float)
    if s.shape != (len(directions),):
        raise ValueError(
            f"the function returns shape {s.shape} for {len(directions)} directions; return one probability "
            "per direction"
        )
    return s


def _evaluate(function: Callable[..., ArrayLike], directions: Array, frame: str, centres: Array | None) -> Array:
    """Return the function (n_pix,) or (n_pix, n_bins), called in blocks of one-dimensional arrays."""
    n_bins = 1 if centres is None else len(centres)
    rows = max(1, _BLOCK // n_bins)
    parts = []
    for start in range(0, len(directions), rows):
        block = directions[start : start + rows]
        if centres is None:
            parts.append(_call(function, block, frame, None))
        else:
            s = _call(function, np.repeat(block, n_bins, 0), frame, np.tile(centres, len(block)))
            parts.append(s.reshape(len(block), n_bins))
    return np.concatenate(parts)


def _mean_of_known(values: Array, axis: int) -> Array:
    """Return the mean over what is not NaN; NaN where all are."""
    known = np.isfinite(values)
    n = known.sum(axis)
    return np.where(n > 0, np.where(known, values, 0.0).sum(axis) / np.maximum(n, 1), np.nan)


def _filled(values: Array, nside: int, empty: float | str | None) -> Array:
    """Give empty pixels (and bins) their value."""
    missing = np.isnan(values)
    if not missing.any():
        return values
    n_pixels = int(missing.reshape(len(values), -1).any(1).sum())
    if empty is None:
        bins = f" ({int(missing.sum())} of {values.size} pixels and bins)" if values.ndim > 1 else ""
        raise ValueError(
            f"{n_pixels} of {len(values)} pixels have no value{bins}: say what they mean with empty=0 (nothing is "
            "observed there), another probability, or empty='parent' (the mean of the coarser pixel)"
        )
    if empty != "parent":
        if isinstance(empty, str) or not 0 <= empty <= 1:
            raise ValueError(f"empty must be a probability or 'parent', got {empty!r}")
        return np.where(missing, float(empty), values)
    nested = ring_to_nested(nside)
    filled = np.empty_like(values)
    filled[nested] = values
    coarse, n = filled, 1
    while np.isnan(filled).any() and len(coarse) > 12:
        coarse, n = _mean_of_known(coarse.reshape(len(coarse) // 4, 4, *coarse.shape[1:]), 1), 4 * n
        filled = np.where(np.isnan(filled), np.repeat(coarse, n, 0), filled)
    if np.isnan(filled).any():
        raise ValueError(
            f"{int(np.isnan(filled).sum())} of {values.size} pixels and bins have no value even as a mean over a "
            "twelfth of the sky: empty='parent' cannot fill them; leave those bins out, or give empty a probability"
        )
    return filled[nested]


def _nside(shape: Sequence[int]) -> int:
    n_pix = shape[0] if shape else 0
    nside = math.isqrt(n_pix // 12)
    if len(shape) not in (1, 2) or nside == 0 or 12 * nside**2 != n_pix:
        raise ValueError(
            f"table has shape {tuple(shape)}; give (n_pix,) or (n_pix, n_bins) n_pix = 12 nside^2 (12, 48, 192, ...)"
        )
    return nside


def _check_sides(nside: int, oversample: int) -> None:
    for name, n in (("nside", nside), ("oversample", oversample)):
        if n < 1 or n & (n - 1):
            raise ValueError(f"{name} must be a power of 2 (1, 2, 4, ...), got {n}")


def _edges(name: str, edges: ArrayLike | None) -> Tensor | None:
    if edges is None:
        return None
    found = torch.as_tensor(np.array(edges, dtype=float))
    if found.dim() != 1 or len(found) < 2 or not bool((found.diff() > 0).all()) or not bool(found.isfinite().all()):
        raise ValueError(f"{name} must be the increasing edges of the bins, one more than bins; got {edges!r}")
    return found


def _check_axes(values: Array, magnitudes: Tensor | None, distances: Tensor | None, absolute: float | None) -> None:
    if magnitudes is not None and distances is not None:
        raise ValueError("give bins of magnitude or of distance, not both: of stars of one luminosity they are one")
    if (magnitudes is None) != (absolute is None):
        raise ValueError(
            "bins of apparent magnitude need absolute_magnitude, that of the stars, and the other way round; give both"
        )
    edges = magnitudes if distances is None else distances
    n_bins = None if edges is None else len(edges) - 1
    if (values.shape[1] if values.ndim == 2 else None) != n_bins:
        raise ValueError(
            f"table has shape {values.shape} and there are {n_bins or 'no'} bins; give it as (n_pix, n_bins), with "
            "n_bins + 1 edges in magnitudes or distances"
        )
