"""Attacked accuracy as claims take it: on their own samples, by a cascade that fits their time."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal

from torch import nn
from torch.utils.data import Subset

from flatreg.attacks.apgd import apgd
from flatreg.attacks.cascade import PRESETS
from flatreg.attacks.options import Attack
from flatreg.claims.result import Trained
from flatreg.data.loading import subset
from flatreg.evaluation.evaluate import evaluate
from flatreg.evaluation.results import Evaluation

Cascade = Literal["short", "fast", "standard"]
# The kinds of stage that "standard" has, black box aside, at a twentieth of its price.
SHORT: tuple[Attack, ...] = (
    *PRESETS["fast"],
    partial(apgd, loss="rescaled_cross_entropy", steps=20),
    partial(apgd, loss="dlr", targets=9, steps=10),
)


def stages_of(cascade: Cascade) -> tuple[Attack, ...]:
    """Stages of "short", or of a preset of `flatreg.evaluate`."""
    return SHORT if cascade == "short" else PRESETS[cascade]


def evaluated(
    model: nn.Module, attack: Sequence[Attack], trained: Trained, samples: int
) -> Evaluation:
    """Evaluate under the threat of the run; the samples are those of `Trained.test_batch`."""
    threat = trained.threat
    rows = subset(len(threat.indices), samples, threat.seed)
    return evaluate(
        model,
        Subset(trained.splits.test, [threat.indices[row] for row in rows]),
        eps=threat.eps,
        norm=threat.norm,
        attack=attack,
        seed=threat.seed,
        diagnose=False,
        progress=False,
    )
