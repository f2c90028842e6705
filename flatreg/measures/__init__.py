"""Measures: pure functions, tensors in, one number per sample out (or an estimate of one)."""

from flatreg.measures.at_head import AtHead, pass_to_head
from flatreg.measures.estimate import Estimate, QuantileBand, Quartiles
from flatreg.measures.feature_bound import (
    BoundCurve,
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
from flatreg.measures.lanczos import Ritz, lanczos
from flatreg.measures.layer_flatness import (
    FlatnessDraws,
    LayerFlatness,
    NetworkFlatness,
    combine_flatness,
    flatness_draws,
    gauss_newton_flatness,
    layer_flatness,
)
from flatreg.measures.linearised_margin import (
    LinearisedMargin,
    linearised_margin,
    margin,
    own_classes,
    runner_up,
)
from flatreg.measures.lipschitz import (
    Lipschitz,
    feature_displacement,
    lipschitz_certificate,
    lipschitz_estimate,
)
from flatreg.measures.manifold import IdentityManifold, LocalPCAManifold, Manifold, PCAManifold
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

__all__ = [
    "AtHead",
    "BoundCurve",
    "Estimate",
    "FlatnessDraws",
    "IdentityManifold",
    "LayerFlatness",
    "LinearisedMargin",
    "Lipschitz",
    "LocalPCAManifold",
    "Manifold",
    "NetworkFlatness",
    "PCAManifold",
    "QuantileBand",
    "Quartiles",
    "Ritz",
    "average_case_sharpness",
    "bound_curve",
    "chord",
    "combine_flatness",
    "directional_curvature",
    "feature_displacement",
    "feature_radius",
    "fisher",
    "flatness_draws",
    "gauss_newton_flatness",
    "global_bound",
    "grad_alignment",
    "gradient_difference",
    "gradient_dual_norm",
    "head_hessian_trace",
    "hessian_top_eigenvalue",
    "hessian_trace_estimate",
    "hvp",
    "jacobian_norm",
    "jacobian_norm_forward",
    "lanczos",
    "layer_flatness",
    "layerwise_flatness",
    "linear_layers",
    "linearised_margin",
    "lipschitz_certificate",
    "lipschitz_estimate",
    "local_bound",
    "local_linearity",
    "log_relative_flatness",
    "margin",
    "max_eigenvalue_flatness",
    "normal_direction",
    "normal_trace",
    "own_classes",
    "pass_to_head",
    "relative_flatness",
    "runner_up",
    "scale_to_confidence",
    "second_difference",
    "top_curvature",
    "worst_case_sharpness",
    "worst_loss",
]
