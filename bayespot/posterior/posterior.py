"""Posterior draws of the potential turned into fields with credible bands."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from bayespot.inference.membership import outlier_probability
from bayespot.inference.resampling import by_weight, systematic
from bayespot.inference.result import EnsembleResult, FitResult
from bayespot.likelihood.model import SnapshotModel
from bayespot.posterior.meridian import MeridionalDraws
from bayespot.potential.axial_fields import AXIAL_FIELDS, fields_on_x_axis, meridional_grid
from bayespot.potential.base import Potential
from bayespot.potential.fields import (
    PLANE_FIELDS,
    PLANES,
    QUANTILES,
    RADIAL_FIELDS,
    Field,
    PlaneField,
    add_bands,
    evaluator,
    plane_points,
    positive_radii,
    radial_fields_of_draws,
)
from bayespot.units import UNITS, takes, takes_tensors, unit

if TYPE_CHECKING:
    from astropy.table import QTable
    from numpy.typing import ArrayLike, NDArray

    from bayespot.catalog.catalog import Catalog
    from bayespot.diagnostics import InferenceData

#: Most numbers that `Posterior.plane` holds at a time.
_PLANE_BLOCK = 4_000_000


#: The order of a table of fields: what a reader looks for comes first.
_TABLE_ORDER = ("circular_speed", *(name for name in RADIAL_FIELDS[::-1] if name != "circular_speed"))


class PotentialDraws(MeridionalDraws):
    """Draws of a fitted model, and the fields that follow from them; what `Posterior` and its ensembles share.

    ``n_draws`` is their number and ``meta`` what is known of the catalogue: ``n_stars``, ``r_q`` (radius quantiles),
    ``meta``.
    """

    @abstractmethod
    def thinned(self, n: int) -> PotentialDraws:
        """Return ``n`` draws spread evenly over all (all of them if there are fewer)."""

    @abstractmethod
    def evaluated(self) -> PotentialDraws:
        """Return the draws that have importance weights, unweighted; compare them with `reweighted`."""

    @abstractmethod
    def reweighted(self, n: int = 1000, seed: int = 0) -> PotentialDraws:
        """Return n draws of the exact posterior by importance resampling; to be trusted where k-hat is below 0.7."""

    @abstractmethod
    def summary(self) -> QTable:
        """Return mean, standard deviation and quantiles of every latent parameter."""

    @takes(radii="length", heights="length")
    def to_inference_data(self, radii: ArrayLike | None = None, heights: ArrayLike | None = None) -> InferenceData:
        """Return the draws as ArviZ InferenceData (from ArviZ 1.0 on xarray's DataTree), one chain.

        It has the sites that every draw has in the same shape.

        Parameters
        ----------
        radii : (n,)
            In kpc; then the group ``posterior`` also has `RADIAL_FIELDS` at these radii, with a coordinate ``r`` and
            their units as attributes, and those of `predict` beside them for an axisymmetric potential.
        heights : (m,)
            In kpc; then the radii are cylindrical, and the group has `bayespot.potential.MERIDIONAL_FIELDS` instead,
            with coordinates ``R`` and ``z``.

        Raises
        ------
        ValueError
            If heights come without radii, or a number is out of range.
        """
        from bayespot.diagnostics import to_inference_data, with_fields

        values = [self.source(i)[1] for i in range(self.n_draws)]
        shapes = [{name: value.shape for name, value in one.items()} for one in values]
        common = [name for name, shape in shapes[0].items() if all(one.get(name) == shape for one in shapes)]
        data = to_inference_data({name: torch.stack([one[name] for one in values]) for name in common})
        if radii is None:
            if heights is not None:
                raise ValueError("heights need radii: give both, in kpc")
            return data
        if heights is not None:
            R, z = meridional_grid(radii, heights)
            return with_fields(data, {"z": z, "R": R}, self.meridional_fields(R, z))
        r = np.atleast_1d(np.asarray(radii, dtype=float))
        fields = self.radial_fields(r)
        return with_fields(data, {"r": r}, fields | (self.axial_fields(r) if self.symmetry == "axisymmetric" else {}))

    def outliers(self, catalog: Catalog, n_draws: int = 100, seed: int = 0) -> NDArray[Any]:
        """Return the probability of each star to be an outlier, averaged over draws ``(n,)``.

        Parameters
        ----------
        catalog
            The stars that were fitted, or others of the same system.
        n_draws
            Draws over which is averaged.
        seed
            Seed of the samples of measurement errors, if the model has these.

        Raises
        ------
        ValueError
            If the model has no outlier component.
        """
        few, data = self.thinned(n_draws), {}
        total = np.zeros(len(catalog))
        for i in range(few.n_draws):
            model, values = few.source(i)
            if model.outliers is None:
                raise ValueError("the model has no outlier component: fit with FitConfig(outliers=True) (--outliers)")
            if id(model) not in data:
                data[id(model)] = model.prepare(catalog, seed)
            total += outlier_probability([model.at(values)], data[id(model)]).numpy()
        return total / few.n_draws

    def has_outliers(self) -> bool:
        """Return whether the model has an outlier component."""
        return self.source(0)[0].outliers is not None

    def potential_at(self, i: int) -> Potential:
        """Return the potential of draw ``i`` with its parameters fixed."""
        model, values = self.source(i)
        return model.at({k: v for k, v in values.items() if k.startswith("potential.")}).potential

    @takes_tensors(points="length")
    def field(self, name: str, points: ArrayLike | Tensor, tick: Callable[[], None] | None = None) -> Field:
        """Evaluate a quantity in every draw.

        Parameters
        ----------
        name
            ``"potential"``, ``"acceleration"``, ``"radial_acceleration"``, ``"density"``,
            ``"enclosed_mass"``, ``"circular_speed"`` or ``"density_slope"``, d ln rho / d ln r at radii.
        points : (n,) or (n, 3)
            Radii, taken on the x axis, or positions in kpc; ``acceleration`` needs positions.
        tick
            Called after every draw.

        Raises
        ------
        ValueError
            If the quantity is unknown, the points do not fit it, or one is not finite or a radius is negative.
        """
        x = torch.as_tensor(points, dtype=torch.float64).detach()
        evaluate = evaluator(name, x)
        # with gradients off nothing keeps a graph; the derivatives inside are unaffected
        rows, place = self._distinct()
        with torch.no_grad():
            values = []
            for k, i in enumerate(rows):
                values.append(evaluate(self.potential_at(i)))
                if tick is not None:
                    for _ in range(place.count(k)):
                        tick()
        return Field(name, UNITS[name], x.numpy(), torch.stack(values).numpy()[place])

    @takes_tensors(radii="length")
    def radial_fields(
        self, radii: ArrayLike, names: Sequence[str] = RADIAL_FIELDS, tick: Callable[[], None] | None = None
    ) -> dict[str, Field]:
        """Evaluate several of `RADIAL_FIELDS` at radii (kpc): for spheres in one pass over the draws.

        ``tick`` is called after every draw and field.

        Raises
        ------
        ValueError
            If a name is unknown, or the radii are not one-dimensional.
        """
        r = torch.as_tensor(radii, dtype=torch.float64).detach()
        for name in names:
            evaluator(name, r)
        if not self._spherical():
            evaluate = functools.partial(fields_on_x_axis, names=names)
            by_name = self._of_draws(evaluate, (r.numpy(),), len(names), tick)
            return {name: Field(name, UNITS[name], r.numpy(), by_name[name]) for name in names}
        rows, place = self._distinct()
        repeats = np.bincount(place, minlength=len(rows))
        found: dict[str, NDArray[Any]] = {name: np.empty((len(rows), len(r))) for name in names}
        for potential, ranks, sites in self._by_potential(rows):
            left = iter(repeats[ranks])

            def evaluated(left: Iterator[int] = left) -> None:
                for _ in range(len(names) * next(left) if tick else 0):
                    tick()  # type: ignore[misc]

            values = radial_fields_of_draws(potential, sites, r, evaluated)
            for name in names:
                found[name][ranks] = values[name].numpy()
        return {name: Field(name, UNITS[name], r.numpy(), values[place]) for name, values in found.items()}

    def _spherical(self) -> bool:
        return self.symmetry == "spherical"

    @takes(extent="length")
    def plane(self, name: str, plane: str = "Rz", extent: float | None = None, n: int = 64) -> PlaneField:
        """Return mean and standard deviation over a plane, for maps; not all draws are held at a time.

        Parameters
        ----------
        name
            ``"potential"``, ``"acceleration"`` (its magnitude) or ``"density"``.
        plane
            ``"Rz"``: R from 0 and z on both sides of 0; ``"xy"``: both sides of 0.
        extent
            Largest coordinate in kpc; None: the radius that holds 84 % of the stars.
        n
            Number of cells from end to end, even: then none lies at the centre.

        Raises
        ------
        ValueError
            If an argument is unknown or not positive, n is odd, or the extent must be given.
        """
        first, second = self._cells(name, plane, extent, n)
        x = plane_points(plane, first, second).reshape(-1, 3)
        unique, index = x, np.arange(len(x))
        spherical = self._spherical()
        if spherical:
            # equal radii up to rounding; a sphere is the same at all of them
            r = np.linalg.norm(x, axis=-1)
            _, rows, index = np.unique(np.round(r / second[-1], 12), return_index=True, return_inverse=True)
            unique = r[rows]
        mean, sd = np.empty(len(unique)), np.empty(len(unique))
        size = 3 if name == "acceleration" else 1
        n_blocks = -(-len(unique) * self.n_draws * size // _PLANE_BLOCK)
        for block in np.array_split(np.arange(len(unique)), n_blocks):
            if spherical:
                radial = "radial_acceleration" if name == "acceleration" else name
                field = self.radial_fields(unique[block], (radial,))[radial]
            else:
                field = self.field(name, unique[block])
            if spherical and name == "acceleration":
                field = Field(name, field.unit, field.points, np.abs(field.draws))
            elif name == "acceleration":
                field = Field(name, field.unit, field.points, np.linalg.norm(field.draws, axis=-1))
            mean[block], sd[block] = field.mean, field.sd
        shape = (len(second), len(first))
        return PlaneField(name, UNITS[name], plane, first, second, mean[index].reshape(shape), sd[index].reshape(shape))

    def _cells(self, name: str, plane: str, extent: float | None, n: int) -> tuple[NDArray[Any], NDArray[Any]]:
        if name not in PLANE_FIELDS:
            raise ValueError(f"unknown field {name!r} of a plane; choose one of {', '.join(PLANE_FIELDS)}")
        if plane not in PLANES:
            raise ValueError(f"plane must be one of {', '.join(PLANES)}; got {plane!r}")
        if n < 2 or n % 2:
            raise ValueError(f"n must be even and positive, so that no cell lies at the centre; got {n}")
        if extent is None:
            if "r_q" not in self.meta:
                raise ValueError("these draws know no stars: give the extent in kpc")
            extent = float(self.meta["r_q"][5])
        if not 0 < extent < np.inf:
            raise ValueError(f"extent must be positive and finite (kpc), got {extent}")
        second = (np.arange(n) - (n - 1) / 2) * (2 * extent / n)
        return (second[n // 2 :] if plane == "Rz" else second), second

    @takes(radii="length")
    def predict(self, radii: ArrayLike, tick: Callable[[], None] | None = None) -> QTable:
        """Return a table of `RADIAL_FIELDS` at radii (kpc), with units; ``tick`` is called after every draw and field.

        Columns ``r``, then medians and 68 % intervals, ``_q50 _q16 _q84`` of the circular speed, the enclosed mass and
        the others, then ``_mean _sd _q2.5 _q97.5`` of all. For an axisymmetric potential ``r`` is the radius in the
        plane z = 0, and `bayespot.potential.AXIAL_FIELDS` are among the fields.

        Raises
        ------
        ValueError
            If a radius is not positive and finite.
        """
        from astropy.table import QTable

        r = positive_radii(radii)
        table = QTable({"r": r * unit("r")})
        fields = self.radial_fields(r, _TABLE_ORDER, tick)
        if self.symmetry == "axisymmetric":
            fields |= self.axial_fields(r, AXIAL_FIELDS, tick=tick)
        return add_bands(table, fields)


class Posterior(PotentialDraws):
    """Draws of a model's latent sites.

    Parameters
    ----------
    model
        The fitted model.
    draws
        Values by full site name with a leading axis of draws.
    meta
        What is known of the catalogue: ``n_stars``, ``r_q`` (radius quantiles), ``meta``.
    log_weights : Float[Tensor, "n_draws"]
        Log importance weights of the draws, NaN where they were not computed; None: of no draw.

    Examples
    --------
    >>> from bayespot.df import SphericalMixture
    >>> from bayespot.potential import MassSlopeNetwork
    >>> prior = Posterior.prior(SnapshotModel(MassSlopeNetwork(1.0, -2.0, 4.0, 25.0), SphericalMixture()), 50, 0)
    >>> prior.field("circular_speed", [1.0, 10.0]).draws.shape
    (50, 2)
    """

    def __init__(
        self,
        model: SnapshotModel,
        draws: Mapping[str, Tensor],
        meta: Mapping[str, Any] | None = None,
        log_weights: Tensor | None = None,
    ) -> None:
        sizes = {len(value) for value in draws.values()}
        if len(sizes) != 1 or 0 in sizes:
            raise ValueError(f"draws must have one leading axis of equal, positive length; got lengths {sorted(sizes)}")
        self.model, self.draws, self.meta = model, dict(draws), dict(meta or {})
        self.n_draws = sizes.pop()
        self.log_weights = log_weights

    @classmethod
    def from_result(cls, result: FitResult) -> Posterior:
        """Return the posterior of a finished fit."""
        return cls(result.model, result.draws, result.catalog, result.sample_stats.get("log_weights"))

    @classmethod
    def prior(cls, model: SnapshotModel, n: int, seed: int) -> Posterior:
        """Return prior draws in the same form, for prior-predictive checks."""
        return cls(model, model.sample_prior(n, seed))

    def taken(self, index: Tensor) -> Posterior:
        """Return the draws of the given indices, in their order."""
        weights = None if self.log_weights is None else self.log_weights[index]
        return Posterior(self.model, {k: v[index] for k, v in self.draws.items()}, self.meta, weights)

    def thinned(self, n: int) -> Posterior:
        """Return ``n`` draws spread evenly over all (all of them if there are fewer)."""
        return self.taken(torch.linspace(0, self.n_draws - 1, min(n, self.n_draws)).round().long())

    def evaluated(self) -> Posterior:
        """Return the draws that have importance weights, unweighted; compare them with `reweighted`."""
        # NaN: not computed; minus infinity: a draw that the exact posterior excludes
        has = None if self.log_weights is None else ~torch.isnan(self.log_weights)
        if has is None or self.log_weights is None or not bool(torch.isfinite(self.log_weights).any()):
            raise ValueError("no draw has an importance weight: fit with a Gaussian guide and k_hat_draws > 0")
        return self.taken(has.nonzero()[:, 0])

    def reweighted(self, n: int = 1000, seed: int = 0) -> Posterior:
        """Return n draws of the exact posterior by importance resampling.

        Systematic resampling of the draws that have weights: each appears as often as its Pareto-smoothed weight
        says, to within one. To be trusted where k-hat is below 0.7. With a point mass for f(J) the exact posterior is
        the one at that f(J).

        Raises
        ------
        ValueError
            If no draw has a weight (NUTS and SVGD need none; a run of an older version has none).
        """
        few = self.evaluated()
        assert few.log_weights is not None  # or evaluated had raised
        return few.taken(by_weight(few.log_weights, n, seed))

    def source(self, i: int) -> tuple[SnapshotModel, dict[str, Tensor]]:
        """Return the model and the values of its sites in draw ``i``."""
        return self.model, {k: v[i] for k, v in self.draws.items()}

    def summary(self) -> QTable:
        """Return mean, standard deviation and quantiles of every latent parameter; ``meta["outliers"]`` names stars."""
        from astropy.table import QTable

        rows = []
        for name, value in self.draws.items():
            flat = value.reshape(self.n_draws, -1).numpy()
            for j in range(flat.shape[1]):
                label = name if value.dim() == 1 else f"{name}[{j}]"
                q = np.quantile(flat[:, j], QUANTILES)
                rows.append((label, flat[:, j].mean(), flat[:, j].std(ddof=1) if self.n_draws > 1 else 0.0, *q))
        columns = ["parameter", "mean", "sd", *(f"q{100 * q:g}" for q in QUANTILES)]
        named = {"outliers": self.meta["outliers"]} if self.meta.get("outliers") else {}
        return QTable(rows=rows, names=columns, meta=named)


class EnsemblePosterior(PotentialDraws):
    """A weighted mixture of the posteriors of an ensemble's members, whose potentials may differ in shape.

    Member k contributes draws in proportion to its weight.

    Parameters
    ----------
    members
        Their posteriors.
    weights
        One per member, positive or zero; normalised here.
    n_draws
        Draws of the mixture; None: as many as the members have on average.
    """

    def __init__(self, members: Sequence[Posterior], weights: Sequence[float], n_draws: int | None = None) -> None:
        w = torch.as_tensor(weights, dtype=torch.float64)
        if len(w) != len(members) or not len(w) or not bool((w >= 0).all()) or not float(w.sum()) > 0:
            raise ValueError(f"an ensemble needs a weight per member, none negative; got {list(weights)}")
        self.members, self.weights = list(members), w / w.sum()
        self.meta = members[0].meta
        n = n_draws or sum(member.n_draws for member in members) // len(members)
        owner = systematic(self.weights, n, 0)
        self._draw: list[tuple[int, int]] = []
        for k, member in enumerate(members):
            own = int((owner == k).sum())
            # spread over the member's draws; over all more than once where the weight asks for more than it has
            rows = (torch.arange(own) * member.n_draws / max(own, 1)).long()
            self._draw += [(k, int(i)) for i in rows]
        self.n_draws = len(self._draw)

    @classmethod
    def from_result(cls, result: EnsembleResult) -> EnsemblePosterior:
        """Return the mixture of a finished ensemble."""
        return cls([Posterior.from_result(member) for member in result.members], result.weights)

    def source(self, i: int) -> tuple[SnapshotModel, dict[str, Tensor]]:
        """Return the member's model that draw ``i`` belongs to and the values of its sites."""
        member, row = self._draw[i]
        return self.members[member].source(row)

    def thinned(self, n: int) -> EnsemblePosterior:
        """Return ``n`` draws, each member's in proportion to its weight (all if there are fewer)."""
        return EnsemblePosterior(self.members, self.weights.tolist(), min(n, self.n_draws))

    def evaluated(self) -> EnsemblePosterior:
        """Return the mixture of the members' draws that have importance weights."""
        return EnsemblePosterior([member.evaluated() for member in self.members], self.weights.tolist())

    def reweighted(self, n: int = 1000, seed: int = 0) -> EnsemblePosterior:
        """Return the mixture of the re-weighted members; their weights stay."""
        return EnsemblePosterior([member.reweighted(n, seed) for member in self.members], self.weights.tolist(), n)

    def summary(self) -> QTable:
        """Return the members' summaries below each other, with columns ``member`` and ``weight``."""
        from astropy.table import vstack

        tables = []
        for k, member in enumerate(self.members):
            table = member.summary()
            table["member"], table["weight"] = k, float(self.weights[k])
            tables.append(table)
        return vstack(tables)


@takes(radii="length")
def member_spread(posterior: EnsemblePosterior, radii: ArrayLike) -> float:
    """Return the sd of the members' mean v_c over the mean sd within members, root mean square over radii."""
    fields = [member.thinned(200).field("circular_speed", radii) for member in posterior.members]
    w = posterior.weights.numpy()[:, None]
    means, variances = np.stack([f.mean for f in fields]), np.stack([f.sd**2 for f in fields])
    between = (w * (means - (w * means).sum(0)) ** 2).sum(0)
    return float(np.sqrt((between / (w * variances).sum(0)).mean()))
