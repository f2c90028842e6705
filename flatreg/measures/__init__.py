"""Measures: pure functions, tensors in, one number per sample out."""

from flatreg.measures.input_curvature import (
    chord,
    gradient_difference,
    normal_direction,
    second_difference,
)
from flatreg.measures.linearised_margin import linearised_margin, margin, runner_up
from flatreg.measures.manifold import IdentityManifold, LocalPCAManifold, PCAManifold
from flatreg.measures.relative_flatness import relative_flatness, scale_to_confidence

__all__ = [
    "IdentityManifold",
    "LocalPCAManifold",
    "PCAManifold",
    "chord",
    "gradient_difference",
    "linearised_margin",
    "margin",
    "normal_direction",
    "relative_flatness",
    "runner_up",
    "scale_to_confidence",
    "second_difference",
]
