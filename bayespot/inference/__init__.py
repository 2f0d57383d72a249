"""From a model and stars to draws of its parameters (step I), and whether they can be trusted."""

from bayespot.inference.ensemble import fit_ensemble
from bayespot.inference.fit import fit
from bayespot.inference.phase_mixing import ALARM, AngleTest, angle_statistic
from bayespot.inference.result import Diagnostics, EnsembleResult, FitConfig, FitError, FitResult
from bayespot.inference.symmetry import SymmetryTest, symmetry_test
from bayespot.inference.verdict import Verdict, verdict

__all__ = [
    "ALARM",
    "AngleTest",
    "Diagnostics",
    "EnsembleResult",
    "FitConfig",
    "FitError",
    "FitResult",
    "SymmetryTest",
    "Verdict",
    "angle_statistic",
    "fit",
    "fit_ensemble",
    "symmetry_test",
    "verdict",
]
