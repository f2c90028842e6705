"""flatreg: training-time control of flatness and curvature for adversarial robustness."""

from flatreg.attacks.apgd import apgd
from flatreg.attacks.cascade import cascade
from flatreg.attacks.eot import eot
from flatreg.attacks.fmn import fmn
from flatreg.attacks.options import Attack, AttackResult
from flatreg.attacks.pgd import fgsm, noise, pgd
from flatreg.attacks.random_search import random_search
from flatreg.attacks.square import square
from flatreg.evaluation.adaptive import AdaptiveAttackCheck, adaptive_attack_check
from flatreg.evaluation.attack_path import AttackPath, aligned_bands, attack_path
from flatreg.evaluation.binarization import BinarizationTest, binarization_test
from flatreg.evaluation.compare import Comparison, compare
from flatreg.evaluation.evaluate import accuracy_curve, evaluate
from flatreg.evaluation.findings import Finding
from flatreg.evaluation.geometry.by_outcome import (
    FlatnessByOutcome,
    HeadPasses,
    flatness_by_confidence,
    flatness_by_outcome,
    pass_clean_and_attacked,
)
from flatreg.evaluation.geometry.card import GeometryCard
from flatreg.evaluation.geometry.measure import measure
from flatreg.evaluation.hook import AttackedAccuracy
from flatreg.evaluation.results import (
    CurvePoint,
    Evaluation,
    model_info,
    read_evaluation,
    write_evaluation,
)
from flatreg.measures.at_head import AtHead, pass_to_head
from flatreg.measures.estimate import Estimate
from flatreg.measures.feature_bound import (
    bound_curve,
    feature_radius,
    global_bound,
    local_bound,
    worst_loss,
)
from flatreg.measures.input_curvature import (
    chord,
    fisher,
    gradient_difference,
    normal_direction,
    second_difference,
)
from flatreg.measures.input_gradient import (
    grad_alignment,
    gradient_dual_norm,
    jacobian_norm,
    jacobian_norm_forward,
    local_linearity,
)
from flatreg.measures.input_hessian import directional_curvature, hvp, normal_trace, top_curvature
from flatreg.measures.layer_flatness import (
    combine_flatness,
    flatness_draws,
    gauss_newton_flatness,
    layer_flatness,
)
from flatreg.measures.linearised_margin import linearised_margin, margin
from flatreg.measures.lipschitz import (
    feature_displacement,
    lipschitz_certificate,
    lipschitz_estimate,
)
from flatreg.measures.manifold import IdentityManifold, LocalPCAManifold, PCAManifold
from flatreg.measures.parameters import linear_layers
from flatreg.measures.relative_flatness import (
    head_hessian_trace,
    layerwise_flatness,
    log_relative_flatness,
    max_eigenvalue_flatness,
    relative_flatness,
    scale_to_confidence,
)
from flatreg.measures.sharpness import average_case_sharpness, worst_case_sharpness
from flatreg.measures.weight_hessian import hessian_top_eigenvalue, hessian_trace_estimate
from flatreg.models.forward import Forward
from flatreg.models.heads import Head, find_head
from flatreg.models.normalize import with_normalization
from flatreg.optimizers.ascent import Adaptive, Friendly, Global, Layerwise, Random, Relative
from flatreg.optimizers.gradient import Mixed, Perturbed, Reuse, SurrogateGap
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
    RandomSAM,
    RelativeSAM,
)
from flatreg.optimizers.passes import backward
from flatreg.optimizers.sharpness_aware import SharpnessAware, last_blocks
from flatreg.run.models import load_model
from flatreg.run.recipe import Recipe, RecipeError, load_recipe
from flatreg.terms.criteria import FGSMRS, MART, NFGSM, PGDAT, TRADES, CrossEntropy
from flatreg.terms.curvature import OffManifoldConfidence, OffManifoldCurvature
from flatreg.terms.flatness import LayerFlatness, RelativeFlatness
from flatreg.terms.input_slope import (
    GradAlign,
    InputGradient,
    JacobianNorm,
    LocalLinearity,
    MarginBound,
)
from flatreg.terms.objective import Objective, ObjectiveLoss
from flatreg.terms.protocol import EpsWarmUp, Term, WarmUp

__all__ = [  # noqa: RUF022 - grouped by concept
    # a pass, and the head it goes through
    "AtHead",
    "Forward",
    "Head",
    "find_head",
    "pass_to_head",
    "with_normalization",
    # an estimate with its standard error; the data manifold
    "Estimate",
    "IdentityManifold",
    "LocalPCAManifold",
    "PCAManifold",
    # measures: flatness in the weights
    "average_case_sharpness",
    "combine_flatness",
    "flatness_draws",
    "gauss_newton_flatness",
    "head_hessian_trace",
    "hessian_top_eigenvalue",
    "hessian_trace_estimate",
    "layer_flatness",
    "layerwise_flatness",
    "linear_layers",
    "log_relative_flatness",
    "max_eigenvalue_flatness",
    "relative_flatness",
    "scale_to_confidence",
    "worst_case_sharpness",
    # measures: bounds in feature space
    "bound_curve",
    "feature_displacement",
    "feature_radius",
    "global_bound",
    "lipschitz_certificate",
    "lipschitz_estimate",
    "local_bound",
    "worst_loss",
    # measures: slope and curvature in the input
    "chord",
    "directional_curvature",
    "fisher",
    "grad_alignment",
    "gradient_difference",
    "gradient_dual_norm",
    "hvp",
    "jacobian_norm",
    "jacobian_norm_forward",
    "linearised_margin",
    "local_linearity",
    "margin",
    "normal_direction",
    "normal_trace",
    "second_difference",
    "top_curvature",
    # terms: criteria and penalties
    "CrossEntropy",
    "FGSMRS",
    "MART",
    "NFGSM",
    "Objective",
    "ObjectiveLoss",
    "PGDAT",
    "TRADES",
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
    "aligned_bands",
    "apgd",
    "attack_path",
    "cascade",
    "eot",
    "fgsm",
    "fmn",
    "noise",
    "pgd",
    "random_search",
    "square",
    # evaluation
    "Accuracy",
    "AttackedAccuracy",
    "Comparison",
    "CurvePoint",
    "Evaluation",
    "Finding",
    "BinarizationTest",
    "AdaptiveAttackCheck",
    "accuracy_curve",
    "compare",
    "evaluate",
    "model_info",
    "binarization_test",
    "read_evaluation",
    "adaptive_attack_check",
    "write_evaluation",
    # geometry of a model: everything above on one card
    "FlatnessByOutcome",
    "GeometryCard",
    "HeadPasses",
    "flatness_by_confidence",
    "flatness_by_outcome",
    "measure",
    "pass_clean_and_attacked",
    # recipes, and the models they train
    "Recipe",
    "RecipeError",
    "load_model",
    "load_recipe",
]
