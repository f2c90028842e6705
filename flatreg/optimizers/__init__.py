"""Sharpness-aware steps around an existing optimizer: pairs of ascent and gradient rules."""

from flatreg.optimizers.ascent import (
    Adaptive,
    Ascent,
    Friendly,
    Global,
    Layerwise,
    Momentum,
    Random,
    Relative,
    Stale,
    WithoutGradient,
)
from flatreg.optimizers.gradient import GradientRule, Mixed, Perturbed, Reuse, SurrogateGap
from flatreg.optimizers.methods import (
    ASAM,
    AWP,
    GNP,
    GSAM,
    SAM,
    WSAM,
    FriendlySAM,
    HeadRelativeSAM,
    LookSAM,
    MomentumSAM,
    RandomSAM,
    RelativeSAM,
    StaleSAM,
)
from flatreg.optimizers.parameter_state import last_blocks
from flatreg.optimizers.passes import backward
from flatreg.optimizers.sharpness_aware import SharpnessAware

__all__ = [
    "ASAM",
    "AWP",
    "GNP",
    "GSAM",
    "SAM",
    "WSAM",
    "Adaptive",
    "Ascent",
    "Friendly",
    "FriendlySAM",
    "Global",
    "GradientRule",
    "HeadRelativeSAM",
    "Layerwise",
    "LookSAM",
    "Mixed",
    "Momentum",
    "MomentumSAM",
    "Perturbed",
    "Random",
    "RandomSAM",
    "Relative",
    "RelativeSAM",
    "Reuse",
    "SharpnessAware",
    "Stale",
    "StaleSAM",
    "SurrogateGap",
    "WithoutGradient",
    "backward",
    "last_blocks",
]
