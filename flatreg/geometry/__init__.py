"""The geometry of one model on one card: flatness, curvature, bounds, sharpness."""

from flatreg.geometry.card import GeometryCard
from flatreg.geometry.measure import PARTS, measure
from flatreg.geometry.outcomes import (
    FlatnessByOutcome,
    HeadPasses,
    flatness_by_confidence,
    flatness_by_outcome,
    head_passes,
)

__all__ = [
    "PARTS",
    "FlatnessByOutcome",
    "GeometryCard",
    "HeadPasses",
    "flatness_by_confidence",
    "flatness_by_outcome",
    "head_passes",
    "measure",
]
