"""What a person reads and keeps: run folders, words, figures, the page."""

from bayespot.report.figures import draw_figures
from bayespot.report.manifest import RunError
from bayespot.report.page import write_page
from bayespot.report.runs import load_run, save_run
from bayespot.report.text import describe

__all__ = ["RunError", "describe", "draw_figures", "load_run", "save_run", "write_page"]
