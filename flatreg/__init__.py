"""flatreg: training-time control of flatness and curvature for adversarial robustness."""

from flatreg.attacks import Attack, AttackPath, AttackResult, apgd, attack_path, cascade, pgd
from flatreg.criteria import NFGSM, PGDAT, CrossEntropy
from flatreg.diagnostics import Finding
from flatreg.evaluate import AttackedAccuracy, evaluate
from flatreg.forward import Forward
from flatreg.heads import Head, find_head
from flatreg.measures import (
    IdentityManifold,
    LocalPCAManifold,
    PCAManifold,
    chord,
    gradient_difference,
    linearised_margin,
    margin,
    normal_direction,
    relative_flatness,
    scale_to_confidence,
    second_difference,
)
from flatreg.normalize import with_normalization
from flatreg.objective import Objective, ObjectiveLoss
from flatreg.optimizers import (
    ASAM,
    AWP,
    GNP,
    GSAM,
    SAM,
    WSAM,
    Adaptive,
    Friendly,
    FriendlySAM,
    Global,
    HeadRelativeSAM,
    Layerwise,
    LookSAM,
    Mixed,
    Perturbed,
    Random,
    RandomSAM,
    Relative,
    RelativeSAM,
    Reuse,
    SharpnessAware,
    SurrogateGap,
    backward,
    last_blocks,
)
from flatreg.penalties import (
    GradAlign,
    InputGradient,
    JacobianNorm,
    LayerFlatness,
    LocalLinearity,
    MarginBound,
    OffManifoldConfidence,
    OffManifoldCurvature,
    RelativeFlatness,
)
from flatreg.recipe import Recipe, RecipeError, load_recipe
from flatreg.results import Accuracy, Evaluation
from flatreg.terms import EpsWarmUp, Term, WarmUp

__all__ = [  # noqa: RUF022 - grouped by concept
    # a pass, and the head it goes through
    "Forward",
    "Head",
    "find_head",
    "with_normalization",
    # measures
    "IdentityManifold",
    "LocalPCAManifold",
    "PCAManifold",
    "chord",
    "gradient_difference",
    "linearised_margin",
    "margin",
    "normal_direction",
    "relative_flatness",
    "scale_to_confidence",
    "second_difference",
    # terms: criteria and penalties
    "CrossEntropy",
    "NFGSM",
    "Objective",
    "ObjectiveLoss",
    "PGDAT",
    "Term",
    "GradAlign",
    "InputGradient",
    "JacobianNorm",
    "LayerFlatness",
    "LocalLinearity",
    "MarginBound",
    "OffManifoldConfidence",
    "OffManifoldCurvature",
    "RelativeFlatness",
    "EpsWarmUp",
    "WarmUp",
    # optimizers: the wrapper and its methods by name
    "ASAM",
    "AWP",
    "FriendlySAM",
    "GNP",
    "GSAM",
    "HeadRelativeSAM",
    "LookSAM",
    "RandomSAM",
    "RelativeSAM",
    "SAM",
    "SharpnessAware",
    "WSAM",
    "backward",
    "last_blocks",
    # ascent rules and gradient rules, to pair freely
    "Adaptive",
    "Friendly",
    "Global",
    "Layerwise",
    "Mixed",
    "Perturbed",
    "Random",
    "Relative",
    "Reuse",
    "SurrogateGap",
    # attacks
    "Attack",
    "AttackPath",
    "AttackResult",
    "apgd",
    "attack_path",
    "cascade",
    "pgd",
    # evaluation
    "Accuracy",
    "AttackedAccuracy",
    "Evaluation",
    "Finding",
    "evaluate",
    # recipes
    "Recipe",
    "RecipeError",
    "load_recipe",
]
