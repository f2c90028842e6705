"""The geometry of one model on one card: flatness, curvature, bounds, sharpness."""

from flatreg.evaluation.geometry.by_outcome import (
    FlatnessByOutcome,
    HeadPasses,
    flatness_by_confidence,
    flatness_by_outcome,
    head_passes,
)
from flatreg.evaluation.geometry.card import GeometryCard
from flatreg.evaluation.geometry.measure import PARTS, measure

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
