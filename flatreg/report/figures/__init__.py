"""Figures; matplotlib lives here alone."""

import matplotlib

from flatreg.report.figures.adaptive import draw_slice
from flatreg.report.figures.card import draw_card
from flatreg.report.figures.pareto import draw_pareto
from flatreg.report.figures.path import draw_path
from flatreg.report.figures.report import draw
from flatreg.report.figures.sweep import draw_sweep

matplotlib.use("agg")  # files, no windows


__all__ = [
    "draw",
    "draw_card",
    "draw_pareto",
    "draw_path",
    "draw_slice",
    "draw_sweep",
]
