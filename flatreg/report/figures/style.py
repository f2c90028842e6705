"""What all figures share."""

from __future__ import annotations

from typing import Any

COLORS = ["#6b7280", "#d97706", "#0f766e", "#7c3aed", "#be123c", "#1d4ed8"]
STYLE: dict[Any, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e5e7eb",
    "axes.axisbelow": True,
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "figure.dpi": 120,
}
