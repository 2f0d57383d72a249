"""What a forecast promises, against radius."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from bayespot.posterior.forecast import Forecast
from bayespot.report.plots.profiles import relative_sd, stars
from bayespot.report.plots.style import BLUE, DOUBLE, GREEN, GREY, ORANGE, SYMBOLS, new_figure
from bayespot.units import takes

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


@takes(radii="length")
def forecast_figure(found: Forecast, radii: ArrayLike, n_stars: int, factor: float = 10, figure: Any = None) -> Any:
    """Return a figure, two columns wide, of forecast relative sd against radius, a panel per field.

    For ``n_stars``, a ``factor`` fewer and a ``factor`` more: solid with the model's prior, dashed the Cramer-Rao
    bound; the stars' radii are shaded.
    """
    r = np.asarray(radii)
    figure = new_figure(figure, DOUBLE, 0.4 * DOUBLE)
    panels = figure.subplots(1, len(found.fields))
    for ax, name in zip(panels, found.fields, strict=True):
        shown = []
        for n, color in ((n_stars / factor, ORANGE), (n_stars, BLUE), (n_stars * factor, GREEN)):
            n = max(1, round(n))
            with_prior = found.relative_sd(name, r, n, True)
            shown.append(with_prior)
            relative_sd(ax, r, with_prior, color, f"N = {n:,}".replace(",", " "))
            relative_sd(ax, r, found.relative_sd(name, r, n), color, ls="--")
        ax.yaxis.set_major_formatter("{x:g}")
        # where the stars leave a free form open its bound may be enormous; the panel shows what the prior allows
        ax.set_ylim(40 * np.min(shown), 300 * np.max(shown))
        stars(ax, found.stars_r)
        ax.set_title(SYMBOLS[name])
    panels[0].set_ylabel("relative sd [%]")
    panels[0].plot([], [], color=GREY, label="with the prior")
    panels[0].plot([], [], color=GREY, ls="--", label="bound")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return figure
