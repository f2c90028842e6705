"""The geometry of one model on one card: flatness, curvature, bounds, sharpness."""

from flatreg.evaluation.geometry.by_outcome import (
    FlatnessByOutcome,
    HeadPasses,
    flatness_by_confidence,
    flatness_by_outcome,
    pass_clean_and_attacked,
)
from flatreg.evaluation.geometry.card import PARTS, GeometryCard
from flatreg.evaluation.geometry.measure import measure
from flatreg.evaluation.geometry.sharded import MeasureSettings

__all__ = [
    "PARTS",
    "FlatnessByOutcome",
    "GeometryCard",
    "HeadPasses",
    "MeasureSettings",
    "flatness_by_confidence",
    "flatness_by_outcome",
    "measure",
    "pass_clean_and_attacked",
]
