"""What the draws say: fields with error bars, predictive checks, forecasts."""

from bayespot.posterior.cylindrical import cylindrical_profiles
from bayespot.posterior.forecast import Forecast, forecast
from bayespot.posterior.on_the_sky import Factors, astrophysical_factors, line_of_sight_fields, velocity_check
from bayespot.posterior.posterior import EnsemblePosterior, Posterior, PotentialDraws, member_spread
from bayespot.posterior.predictive import Predictive, posterior_predictive

__all__ = [
    "EnsemblePosterior",
    "Factors",
    "Forecast",
    "Posterior",
    "PotentialDraws",
    "Predictive",
    "astrophysical_factors",
    "cylindrical_profiles",
    "forecast",
    "line_of_sight_fields",
    "member_spread",
    "posterior_predictive",
    "velocity_check",
]
