"""Positions and velocities to actions and angles and back (steps A, B and F of the chain), and orbits."""

from bayespot.actions.base import ActionAngles, ActionFinder, TorusMap
from bayespot.actions.genfunc import GeneratingFunctionActions
from bayespot.actions.isochrone import IsochroneActions
from bayespot.actions.orbit import integrate
from bayespot.actions.spherical import SphericalActions
from bayespot.actions.staeckel import StaeckelFudge

__all__ = [
    "ActionAngles",
    "ActionFinder",
    "GeneratingFunctionActions",
    "IsochroneActions",
    "SphericalActions",
    "StaeckelFudge",
    "TorusMap",
    "integrate",
]
