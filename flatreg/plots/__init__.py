"""Figures; matplotlib lives here alone."""

import matplotlib

matplotlib.use("agg")  # files, no windows

from flatreg.plots.card import draw_card
from flatreg.plots.claims import draw_claim
from flatreg.plots.pareto import draw_pareto
from flatreg.plots.path import draw_path
from flatreg.plots.report import draw
from flatreg.plots.scrutiny import draw_slice
from flatreg.plots.sweep import draw_sweep

__all__ = [
    "draw",
    "draw_card",
    "draw_claim",
    "draw_pareto",
    "draw_path",
    "draw_slice",
    "draw_sweep",
]
