"""Attacked accuracy: the evaluation, its hook for training, and what says whether to believe it."""

from flatreg.evaluation.adaptive import AdaptiveAttackCheck, adaptive_attack_check
from flatreg.evaluation.attack_path import AttackPath, aligned_bands, attack_path
from flatreg.evaluation.binarization import BinarizationTest, binarization_test
from flatreg.evaluation.compare import Comparison, compare
from flatreg.evaluation.evaluate import AttackedAccuracy, accuracy_curve, evaluate
from flatreg.evaluation.findings import Finding
from flatreg.evaluation.geometry import (
    FlatnessByOutcome,
    GeometryCard,
    HeadPasses,
    flatness_by_confidence,
    flatness_by_outcome,
    measure,
    pass_clean_and_attacked,
)
from flatreg.evaluation.results import (
    CurvePoint,
    Evaluation,
    model_info,
    read_evaluation,
    write_evaluation,
)

__all__ = [
    "AdaptiveAttackCheck",
    "AttackPath",
    "AttackedAccuracy",
    "BinarizationTest",
    "Comparison",
    "CurvePoint",
    "Evaluation",
    "Finding",
    "FlatnessByOutcome",
    "GeometryCard",
    "HeadPasses",
    "accuracy_curve",
    "adaptive_attack_check",
    "aligned_bands",
    "attack_path",
    "binarization_test",
    "compare",
    "evaluate",
    "flatness_by_confidence",
    "flatness_by_outcome",
    "measure",
    "model_info",
    "pass_clean_and_attacked",
    "read_evaluation",
    "write_evaluation",
]
