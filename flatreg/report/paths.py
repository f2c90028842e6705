"""Attack paths of a report."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from flatreg.attacks.bands import AlignedBands, aligned_bands
from flatreg.attacks.path import attack_path
from flatreg.attacks.pgd import pgd
from flatreg.data import ImageArrays
from flatreg.evaluation.results import Evaluation
from flatreg.geometry.outcomes import CONFIDENCE
from flatreg.isolation import untouched
from flatreg.sharding import subset
from flatreg.threat import to_unit_range

_SAMPLES, _STEPS, _WINDOW = 128, 40, 12


def followed_paths(model: nn.Module, data: ImageArrays, evaluation: Evaluation) -> AlignedBands:
    """Follow PGD out to 2 eps on samples that are classified right."""
    verdicts = zip(evaluation.indices, evaluation.verdicts, strict=True)
    correct = [index for index, verdict in verdicts if verdict > -2]
    if not correct:
        return AlignedBands({}, {}, 0)
    correct = [correct[row] for row in subset(len(correct), _SAMPLES, evaluation.seed)]
    eps = 2 * evaluation.eps
    with untouched(model):
        inputs, labels = samples(data, correct, model)
        path = attack_path(
            model, inputs, labels, eps=min(1.0, eps) if evaluation.norm == "linf" else eps,
            norm=evaluation.norm, matched=CONFIDENCE,
            attack=partial(pgd, steps=_STEPS, step_size=2 / _STEPS),
        )  # fmt: skip
    return aligned_bands(path, _WINDOW)


def samples(data: ImageArrays, indices: list[int], model: nn.Module) -> tuple[Tensor, Tensor]:
    """Images in [0,1] and labels at `indices`, on the device of `model`."""
    device = next(model.parameters()).device
    return to_unit_range(data.images[indices].to(device)), data.labels[indices].to(device)
