"""What the draws say: fields with error bars, predictive checks, forecasts."""

from bayespot.posterior.cylindrical import cylindrical_profiles
from bayespot.posterior.forecast import Forecast, forecast
from bayespot.posterior.posterior import EnsemblePosterior, Posterior, PotentialDraws, member_spread
from bayespot.posterior.predictive import Predictive, posterior_predictive

__all__ = [
    "EnsemblePosterior",
    "Forecast",
    "Posterior",
    "PotentialDraws",
    "Predictive",
    "cylindrical_profiles",
    "forecast",
    "member_spread",
    "posterior_predictive",
]
