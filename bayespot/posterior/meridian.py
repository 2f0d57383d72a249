"""Posterior draws of axisymmetric potentials: fields of R in the plane and over (R, z), with credible bands."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from bayespot.potential.axial_fields import (
    AXIAL_FIELDS,
    HEIGHT,
    MERIDIONAL_FIELDS,
    axial_fields,
    fields_of_draws,
    meridional_fields,
    meridional_grid,
)
from bayespot.potential.base import Potential, Symmetry, least_symmetric
from bayespot.potential.fields import Field, PlaneField, add_bands, plane_points, positive_radii
from bayespot.units import UNITS, takes, unit

if TYPE_CHECKING:
    from astropy.table import QTable
    from numpy.typing import ArrayLike, NDArray

    from bayespot.likelihood.model import SnapshotModel

#: Most numbers of all draws that maps hold at a time.
_BLOCK = 4_000_000
#: A map reaches at least this fraction of its radius above the plane, however thin the stars' disc.
_LEAST_HEIGHT = 0.25


class MeridionalDraws(ABC):
    """What draws of potentials symmetric about z have beside the fields of radius; part of `PotentialDraws`."""

    n_draws: int
    meta: dict[str, Any]

    @abstractmethod
    def source(self, i: int) -> tuple[SnapshotModel, dict[str, Tensor]]:
        """Return the model that draw ``i`` belongs to and the values of its sites."""

    @property
    def symmetry(self) -> Symmetry:
        """The potentials' symmetry; of several that of the least symmetric."""
        found = {id(model): model.potential for model in (self.source(i)[0] for i in range(self.n_draws))}
        return least_symmetric(found.values())

    @takes(radii="length", height="length")
    def axial_fields(
        self,
        radii: ArrayLike,
        names: Sequence[str] = AXIAL_FIELDS,
        height: float = HEIGHT,
        tick: Callable[[], None] | None = None,
    ) -> dict[str, Field]:
        """Evaluate `bayespot.potential.axial_fields` in every draw, in one pass.

        Parameters
        ----------
        radii : (n,)
            Cylindrical radii R in kpc, in the plane z = 0.
        names
            Which of `bayespot.potential.AXIAL_FIELDS`. Beside them `radial_fields` has those of all potentials, on the
            x axis: of an axisymmetric one those at R in the plane.
        height
            Of the vertical force, and of the column on either side of the plane, in kpc.
        tick
            Called after every draw and field.

        Returns
        -------
        dict of Field
            By name; a flattening is NaN in draws where the surface has none (`Potential.density_flattening`).

        Raises
        ------
        ValueError
            If a name is unknown, a radius or the height is not positive and finite, or the potential is triaxial.
        """
        r = positive_radii(radii)
        evaluate = functools.partial(axial_fields, names=names, height=height)
        found = self._of_draws(evaluate, (r,), len(names), tick)
        return {name: Field(name, UNITS[name], r, found[name]) for name in names}

    @takes(radii="length", heights="length")
    def meridional_fields(
        self,
        radii: ArrayLike,
        heights: ArrayLike,
        names: Sequence[str] = MERIDIONAL_FIELDS,
        tick: Callable[[], None] | None = None,
    ) -> dict[str, Field]:
        """Evaluate `bayespot.potential.MERIDIONAL_FIELDS` in every draw on the grid of radii and heights, in one pass.

        Parameters
        ----------
        radii : (n,)
            Cylindrical radii R in kpc.
        heights : (m,)
            Heights z in kpc.
        names
            ``"potential"``, ``"density"``, ``"acceleration_R"``, ``"acceleration_z"``.
        tick
            Called after every draw and field.

        Returns
        -------
        dict of Field
            By name, at the m n positions (R, 0, z) of `bayespot.potential.fields.plane_points`, z by z.

        Raises
        ------
        ValueError
            If a name is unknown, a radius not positive and finite, or a height not finite.
        """
        R, z = meridional_grid(radii, heights)
        points = plane_points("Rz", R, z).reshape(-1, 3)
        evaluate = functools.partial(meridional_fields, names=names)
        found = self._of_draws(evaluate, (points[:, 0], points[:, 2]), len(names), tick)
        return {name: Field(name, UNITS[name], points, found[name]) for name in names}

    @takes(r_max="length", z_max="length")
    def meridional_maps(
        self,
        names: Sequence[str] = MERIDIONAL_FIELDS,
        r_max: float | None = None,
        z_max: float | None = None,
        n: int = 32,
        tick: Callable[[], None] | None = None,
    ) -> list[PlaneField]:
        """Return mean and standard deviation of fields over (R, z), z > 0, for maps: one pass over the draws.

        Parameters
        ----------
        names
            Of `bayespot.potential.MERIDIONAL_FIELDS`.
        r_max, z_max
            Largest radius and height in kpc; None: those that hold 84 % of the stars, z_max at least a
            quarter of r_max.
        n
            Number of cells along R, at least two; those along z are as large.
        tick
            Called after every draw and field.

        Raises
        ------
        ValueError
            If a name is unknown, a length is not positive and finite, or must be given since the draws know no stars.
        """
        if n < 2:
            raise ValueError(f"n must be at least 2, got {n}")
        R_max, height = self._extent(r_max, z_max)
        step = R_max / n
        R = (np.arange(n) + 0.5) * step
        z = (np.arange(max(round(height / step), 2)) + 0.5) * step
        blocks = np.array_split(z, min(len(z), -(-n * len(z) * self.n_draws * len(names) // _BLOCK)))
        parts = [self.meridional_fields(R, block, names, tick if i == 0 else None) for i, block in enumerate(blocks)]
        maps = []
        for name in names:
            mean, sd = (np.concatenate([getattr(part[name], what) for part in parts]) for what in ("mean", "sd"))
            shape = (len(z), n)
            maps.append(PlaneField(name, UNITS[name], "Rz", R, z, mean.reshape(shape), sd.reshape(shape)))
        return maps

    @takes(radii="length", heights="length")
    def predict_plane(self, radii: ArrayLike, heights: ArrayLike, tick: Callable[[], None] | None = None) -> QTable:
        """Return a table of `bayespot.potential.MERIDIONAL_FIELDS` over (R, z) with units, a row per place.

        Columns ``R``, ``z``, then of every field median and 68 % interval, ``_q50 _q16 _q84``, and ``_mean _sd _q2.5
        _q97.5``. Parameters and exceptions are those of `meridional_fields`.
        """
        from astropy.table import QTable

        fields = self.meridional_fields(radii, heights, tick=tick)
        points = next(iter(fields.values())).points
        table = QTable({"R": points[:, 0] * unit("r"), "z": points[:, 2] * unit("r")})
        return add_bands(table, fields)

    # --------------------------------------------------------------------------------------------- draw by draw

    def _of_draws(
        self,
        evaluate: Callable[..., dict[str, Tensor]],
        places: Sequence[NDArray[Any]],
        n_fields: int,
        tick: Callable[[], None] | None,
    ) -> dict[str, NDArray[Any]]:
        """Return ``evaluate(potential, *places)`` of every draw; draws that are the same are evaluated once."""
        rows, place = self._distinct()
        repeats = np.bincount(place, minlength=len(rows))
        x = [torch.as_tensor(np.array(one, dtype=float)) for one in places]
        found: dict[str, NDArray[Any]] = {}
        for potential, ranks, sites in self._by_potential(rows):
            left = iter(repeats[ranks])

            def evaluated(left: Iterator[int] = left) -> None:
                for _ in range(n_fields * next(left) if tick else 0):
                    tick()  # type: ignore[misc]

            for name, values in fields_of_draws(evaluate, potential, sites, x, evaluated).items():
                # without sites all draws are one
                found.setdefault(name, np.empty((len(rows), len(x[0]))))[ranks] = values
        return {name: values[place] for name, values in found.items()}

    def _by_potential(self, rows: Sequence[int]) -> Iterator[tuple[Potential, list[int], dict[str, Tensor]]]:
        """Yield every potential, which of the rows are draws of it, and its sites' values there, stacked."""
        groups: dict[int, tuple[Potential, list[int], list[dict[str, Tensor]]]] = {}
        for k, i in enumerate(rows):
            model, values = self.source(i)
            own = {n.removeprefix("potential."): v for n, v in values.items() if n.startswith("potential.")}
            _, ranks, sites = groups.setdefault(id(model), (model.potential, [], []))
            ranks.append(k)
            sites.append(own)
        for potential, ranks, sites in groups.values():
            yield potential, ranks, {name: torch.stack([one[name] for one in sites]) for name in sites[0]}

    def _distinct(self) -> tuple[list[int], list[int]]:
        """Rows of draws whose potentials differ, and each draw's place among them: re-weighted draws repeat."""
        seen: dict[tuple[int, bytes], int] = {}
        rows: list[int] = []
        place: list[int] = []
        for i in range(self.n_draws):
            model, values = self.source(i)
            own = [v.detach().numpy().tobytes() for name, v in values.items() if name.startswith("potential.")]
            key = (id(model), b"|".join(own))
            if key not in seen:
                seen[key] = len(rows)
                rows.append(i)
            place.append(seen[key])
        return rows, place

    def _extent(self, r_max: float | None, z_max: float | None) -> tuple[float, float]:
        """Return radius and height of the maps, by the stars where they are not given."""
        if r_max is None or z_max is None:
            if "positions" in self.meta:
                x = np.asarray(self.meta["positions"])
                R, z = (float(np.quantile(part, 0.84)) for part in (np.hypot(x[:, 0], x[:, 1]), np.abs(x[:, 2])))
            elif "r_q" in self.meta:
                R = z = float(self.meta["r_q"][5])
            else:
                raise ValueError("these draws know no stars: give r_max and z_max in kpc")
            r_max = R if r_max is None else r_max
            z_max = max(z, _LEAST_HEIGHT * r_max) if z_max is None else z_max
        for name, value in (("r_max", r_max), ("z_max", z_max)):
            if not 0 < value < np.inf:
                raise ValueError(f"{name} must be positive and finite (kpc), got {value}")
        return float(r_max), float(z_max)
