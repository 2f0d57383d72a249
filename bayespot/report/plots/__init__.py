"""Figures: every function takes an Axes and returns it, or builds one figure from such Axes.

Sizes, fonts and colours are those of `style`: one column (88 mm) or two (180 mm) wide. `SINGLE` and `DOUBLE` are
these widths in inches. Functions that return a figure draw into ``figure=`` (a figure or subfigure) if it
is given.
"""

from bayespot.report.plots.checks import chain_ranks, elbo_trace, parameters, predictive_check, predictive_figure
from bayespot.report.plots.forecasts import forecast_figure
from bayespot.report.plots.maps import star_map, uncertainty_map, uncertainty_maps
from bayespot.report.plots.meridian import bands_figure, meridional_maps, star_region
from bayespot.report.plots.profiles import (
    band,
    draws,
    formulas,
    formulas_figure,
    relative_sd,
    sd_profiles,
    stars,
    two_panel,
)
from bayespot.report.plots.style import (
    BLUE,
    DOUBLE,
    GREEN,
    GREY,
    ORANGE,
    SINGLE,
    VERMILION,
    label,
    radius_axis,
    save,
    style,
)

__all__ = [
    "BLUE",
    "DOUBLE",
    "GREEN",
    "GREY",
    "ORANGE",
    "SINGLE",
    "VERMILION",
    "band",
    "bands_figure",
    "chain_ranks",
    "draws",
    "elbo_trace",
    "forecast_figure",
    "formulas",
    "formulas_figure",
    "label",
    "meridional_maps",
    "parameters",
    "predictive_check",
    "predictive_figure",
    "radius_axis",
    "relative_sd",
    "save",
    "sd_profiles",
    "star_map",
    "star_region",
    "stars",
    "style",
    "two_panel",
    "uncertainty_map",
    "uncertainty_maps",
]
