"""Selection functions of gaiaunlimited (Cantat-Gaudin et al. 2023, Castro-Ginard et al. 2023) as HEALPix tables."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from bayespot.likelihood.healpix import Healpix
from bayespot.likelihood.selection import SUN
from bayespot.units import takes

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    Array = NDArray[Any]

#: Names of the axis of apparent magnitude: of the ready-made functions, and of Gaia's columns in subsamples.
_MAGNITUDES = ("g", "phot_g_mean_mag_", "phot_rp_mean_mag_", "phot_bp_mean_mag_", "grvs_mag_")
#: Data file of the one function whose pixels are laid on Galactic coordinates.
_GALACTIC = "dr3-rvs-nk.h5"


@takes(magnitudes="magnitude", absolute_magnitude="magnitude", observer="length")
def from_gaiaunlimited(
    selection: Any,
    absolute_magnitude: float | None = None,
    magnitudes: ArrayLike | None = None,
    at: Mapping[str, float] | None = None,
    nside: int = 32,
    empty: float | Literal["parent"] | None = None,
    outside: float = 0.0,
    interpolate: bool = False,
    observer: tuple[float, float, float] = SUN,
    oversample: int = 1,
    n_check: int = 2000,
) -> Healpix:
    """Turn a selection function of gaiaunlimited (0.3.3) into a table that a fit can use.

    Objects that are tables themselves (``DR3RVSSelectionFunction``, ``SubsampleSelectionFunction`` and its hierarchical
    form) are taken as they are, pixel by pixel, in their own bins. Of the others (``DR3SelectionFunction``,
    ``DR3SelectionFunctionTCG``, anything with ``query(coords, gmag)``) a table is made by ``12 nside^2`` queries per
    magnitude, of 80 us or so each, and compared with the object at random places (``error``).

    What would enter unseen is not taken over: the constant with which gaiaunlimited goes on beyond the last magnitude
    (S is ``outside`` there), pixels without stars (``empty`` says what they mean), and in the hierarchical form the
    half bin by which its ``query`` is shifted and the 1/2 that it gives magnitudes without any star.

    Parameters
    ----------
    selection
        The object, with its data loaded.
    absolute_magnitude
        Of the stars, in the band of the object's magnitudes (G); needed where it depends on magnitude.
    magnitudes
        Edges of the bins, for objects that are no tables.
    at
        Values of further axes, for instance ``{"c": 0.8}`` for G - G_RP of the stars.
    nside, oversample, n_check
        For objects that are no tables, as in `Healpix.tabulate`.
    empty, outside, interpolate, observer
        As in `Healpix`.

    Raises
    ------
    ValueError
        If an axis has no value, magnitudes are beyond those of the object, pixels are empty, or it is none of these.
    """
    table = _hierarchical(selection) if hasattr(selection, "hds") else _plain_table(selection)
    if table is not None:
        if magnitudes is not None:
            raise ValueError(f"{_name(selection)} is a table with bins of its own; leave magnitudes out")
        values, edges = table.fixed(at or {})
        if edges is None and absolute_magnitude is not None:
            raise ValueError(f"{table.name} does not depend on magnitude; leave absolute_magnitude out")
        return Healpix(
            values,
            table.frame,
            True,
            edges,
            absolute_magnitude,
            None,
            empty,
            outside,
            interpolate,
            observer,
        )
    if not callable(getattr(selection, "query", None)):
        raise ValueError(f"{_name(selection)} has no query(coords, gmag); for functions and maps see Healpix.tabulate")
    if magnitudes is None or absolute_magnitude is None:
        raise ValueError(
            f"{_name(selection)} depends on magnitude: give the edges of the bins, for instance "
            "magnitudes=np.arange(10, 21.1, 0.1), and the stars' absolute_magnitude"
        )
    if at:
        raise ValueError(f"{_name(selection)} has no axes beside magnitude; leave at={dict(at)} out")
    _check_range(selection, np.asarray(magnitudes, float))

    def function(coords: Any, gmag: Array) -> Array:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints of points outside of its map, which are NaN
            return np.asarray(selection.query(coords, gmag), float)

    return Healpix.tabulate(
        function,
        nside,
        "icrs",
        magnitudes,
        absolute_magnitude,
        None,
        empty,
        outside,
        interpolate,
        observer,
        oversample,
        n_check,
    )


class _Table(NamedTuple):
    """Probabilities with pixels (nested) along the first axis, and names and edges of the others."""

    name: str
    values: Array
    axes: dict[str, Array]
    frame: Literal["icrs", "galactic"]

    def fixed(self, at: Mapping[str, float]) -> tuple[Array, Array | None]:
        """Return the table over pixels, and magnitudes if it has them, with the other axes at given values."""
        values, edges, position = self.values, None, 1
        unknown = set(at) - set(self.axes)
        if unknown:
            raise ValueError(f"{self.name} has no axis {min(unknown)}; it has {', '.join(self.axes) or 'none'}")
        for name, bins in self.axes.items():
            if name in _MAGNITUDES and edges is None and name not in at:
                edges, position = bins, position + 1
                continue
            if name not in at:
                raise ValueError(
                    f"{self.name} depends on {name} as well ({bins[0]:.4g} to {bins[-1]:.4g}): give the stars' value, "
                    f"for instance at={{'{name}': {bins.mean():.3g}}}"
                )
            if not bins[0] <= at[name] <= bins[-1]:
                raise ValueError(
                    f"{name} = {at[name]:g} is outside of the table of {self.name}, {bins[0]:.4g} to {bins[-1]:.4g}, "
                    "beyond which it would repeat its last bin"
                )
            i = min(int(np.searchsorted(bins, at[name], side="right")) - 1, len(bins) - 2)
            values = values.take(i, axis=position)
        return values, edges


def _plain_table(selection: Any) -> _Table | None:
    """Return the table of a SelectionFunctionBase; None if the object is no table."""
    dataset = getattr(selection, "ds", None)
    if dataset is None or "logitp" not in dataset or "ipix" not in dataset.dims:
        return None
    array = dataset["logitp"].transpose("ipix", ...)
    axes = {str(dim): _edges_about(np.asarray(array[dim], float)) for dim in array.dims if dim != "ipix"}
    files = list(getattr(selection, "datafiles", None) or [])
    frame: Literal["icrs", "galactic"] = "galactic" if files[:1] == [_GALACTIC] else "icrs"
    level = (getattr(selection, "hplevel_and_binning", None) or {}).get("healpix")
    pixels = np.asarray(array["ipix"], float) if "ipix" in array.coords else np.arange(array.sizes["ipix"], dtype=float)
    values = _all_pixels(_name(selection), pixels, _probability(np.asarray(array, float)), level)
    return _Table(_name(selection), values, axes, frame)


def _hierarchical(selection: Any) -> _Table:
    """Return the finest table of a SubsampleSelectionFunctionHMLE, with the bins that it was made with."""
    if not selection.hds:
        raise ValueError(f"{_name(selection)} holds no data yet; call its use(...) first")
    finest, binning = selection.hds[-1], dict(selection.hplevel_and_binning)
    binning.pop("healpix", None)
    array = finest["logitp"].transpose("ipix", ...)
    # its coordinates are the bins' lower edges, where those of the plain form are their centres
    axes = {
        f"{key}_": np.append(np.arange(low, high, step), np.arange(low, high, step)[-1] + step)
        for key, (low, high, step) in binning.items()
    }
    values = _probability(np.asarray(array, float))
    # without any star it is (0 + 1) / (0 + 2) on all levels: nothing is known
    stars = np.asarray(finest["n"].transpose("ipix", ...), float).sum(0)
    values = np.where(stars > 0, values, np.nan)
    return _Table(_name(selection), values, {str(dim): axes[str(dim)] for dim in array.dims if dim != "ipix"}, "icrs")


def _probability(logit: Array) -> Array:
    from scipy.special import expit

    return np.asarray(expit(logit))


def _all_pixels(name: str, pixels: Array, values: Array, level: int | None) -> Array:
    """Return rows for all pixels, NaN where there were none: a query of Gaia lists only pixels with stars."""
    known = np.isfinite(pixels)
    number = pixels[known].astype(int)
    if level is None:
        level = max(0, int(np.ceil(np.log(max(number.max() + 1, 12) / 12) / np.log(4))))
        if len(number) != 12 * 4**level:
            raise ValueError(
                f"{name} has {len(number)} pixels, which are not all of a HEALPix map, and does not tell its level; "
                "reindex its dataset to all pixels"
            )
    full = np.full((12 * 4**level, *values.shape[1:]), np.nan)
    full[number] = values[known]
    return full


def _edges_about(centres: Array) -> Array:
    """Return the edges of bins about these centres, half way between them."""
    if len(centres) == 1:
        raise ValueError(
            f"an axis with the one bin {centres[0]:g} does not tell its width; give a table with more bins"
        )
    half = np.diff(centres) / 2
    return np.concatenate([[centres[0] - half[0]], centres[:-1] + half, [centres[-1] + half[-1]]])


def _check_range(selection: Any, edges: Array) -> None:
    """Refuse magnitudes beyond the object's own, where it repeats its last value."""
    dataset = getattr(selection, "ds", None)
    if dataset is None or "g" not in dataset:
        return
    own = _edges_about(np.asarray(dataset["g"], float))
    if edges.min() < own[0] - 1e-9 or edges.max() > own[-1] + 1e-9:
        raise ValueError(
            f"{_name(selection)} knows magnitudes {own[0]:.4g} to {own[-1]:.4g} and repeats its last value beyond; "
            f"magnitudes reach from {edges.min():.4g} to {edges.max():.4g}: stay within (beyond them S is outside=0)"
        )


def _name(selection: Any) -> str:
    return type(selection).__name__
