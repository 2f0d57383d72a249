"""Formulas for the potential from its posterior, by symbolic regression; the only room that imports physo."""

from bayespot.distill.distill import distill
from bayespot.distill.grammar import FAMILIES, DistillConfig, Family
from bayespot.distill.result import Distillation
from bayespot.distill.search import DistillError

__all__ = ["FAMILIES", "DistillConfig", "DistillError", "Distillation", "Family", "distill"]
