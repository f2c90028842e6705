"""Public names, grouped by concept; `__init__.py` reads them here and imports them on first use."""

__version__: str

# rooms: every other public name is reached through one of them
from . import attacks as attacks
from . import data as data
from . import evaluation as evaluation
from . import measures as measures
from . import models as models
from . import optimizers as optimizers
from . import report as report
from . import run as run
from . import terms as terms
from . import threat as threat

# a forward pass, and the head it goes through
from .models.forward import Forward as Forward
from .models.heads import Head as Head, find_head as find_head
from .models.logits_only import logits_only as logits_only
from .models.normalize import with_normalization as with_normalization

# the loss of a training step: criterion, penalties, schedules
from .terms.criteria import (
    APGDAT as APGDAT,
    Brier as Brier,
    CrossEntropy as CrossEntropy,
    FGSMRS as FGSMRS,
    MART as MART,
    NFGSM as NFGSM,
    PGDAT as PGDAT,
    TRADES as TRADES,
)
from .terms.fast_criteria import FGSMRSCS as FGSMRSCS, LIET as LIET, NUAT as NUAT
from .terms.stored_start import FGSMPGI as FGSMPGI
from .terms.curvature import (
    OffManifoldConfidence as OffManifoldConfidence,
    OffManifoldCurvature as OffManifoldCurvature,
)
from .terms.flatness import LayerFlatness as LayerFlatness, RelativeFlatness as RelativeFlatness
from .terms.input_slope import (
    GradAlign as GradAlign,
    InputGradient as InputGradient,
    JacobianNorm as JacobianNorm,
    LocalLinearity as LocalLinearity,
    MarginBound as MarginBound,
)
from .terms.memory import Memory as Memory
from .terms.objective import Objective as Objective, ObjectiveLoss as ObjectiveLoss
from .terms.protocol import EpsWarmUp as EpsWarmUp, Term as Term, WarmUp as WarmUp

# the data manifold
from .measures.manifold import (
    IdentityManifold as IdentityManifold,
    LocalPCAManifold as LocalPCAManifold,
    PCAManifold as PCAManifold,
)

# sharpness-aware optimizers
from .optimizers.methods import (
    ASAM as ASAM,
    AWP as AWP,
    FriendlySAM as FriendlySAM,
    GNP as GNP,
    GSAM as GSAM,
    HeadRelativeSAM as HeadRelativeSAM,
    LookSAM as LookSAM,
    MomentumSAM as MomentumSAM,
    RandomSAM as RandomSAM,
    RelativeSAM as RelativeSAM,
    SAM as SAM,
    StaleSAM as StaleSAM,
    WSAM as WSAM,
)
from .optimizers.passes import backward as backward
from .optimizers.sharpness_aware import SharpnessAware as SharpnessAware
from .optimizers.parameter_state import last_blocks as last_blocks

# evaluation under attack
from .threat import Threat as Threat
from .evaluation.adaptive import adaptive_attack_check as adaptive_attack_check
from .evaluation.binarization import binarization_test as binarization_test
from .evaluation.compare import compare as compare
from .evaluation.evaluate import (
    AttackedAccuracy as AttackedAccuracy,
    accuracy_curve as accuracy_curve,
    evaluate as evaluate,
)
from .evaluation.results import (
    Evaluation as Evaluation,
    model_info as model_info,
    read_evaluation as read_evaluation,
    write_evaluation as write_evaluation,
)
from .measures.estimate import Estimate as Estimate

# measures, and all of them on one card
from .evaluation.geometry.card import GeometryCard as GeometryCard
from .evaluation.geometry.measure import measure as measure
from .measures.layer_flatness import layer_flatness as layer_flatness
from .measures.relative_flatness import (
    relative_flatness as relative_flatness,
    scale_to_confidence as scale_to_confidence,
)

# recipes, and what their runs leave
from .report.rows import read_report as read_report
from .run.build import load_model as load_model
from .run.commands import run_recipe as run_recipe
from .run.export import export as export
from .run.recipe import Recipe as Recipe, load_recipe as load_recipe
from .run.settings import RecipeError as RecipeError
