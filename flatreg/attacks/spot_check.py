"""Black box on suspicion: an attack on a random part of the samples; where it fools one, on all.

A search without gradients costs more than all searches with gradients, and of a model whose
gradients lead to what is there it fools nearly nobody. Drawn at random, a few samples show which
model this is, and bound how many of the others the search would fool.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import comb

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from flatreg.attacks.options import (
    Attack,
    AttackOptions,
    AttackResult,
    complete,
    for_rows,
    identities,
)
from flatreg.data.configuration import whole
from flatreg.models.precision import class_indices
from flatreg.threat import per_sample

_STREAM = 2**30  # of the draw; no job has this number
_SAMPLES, _DOUBT = 64, 0.05


@dataclass(frozen=True)
class SpotChecked:
    """Whom a spot check attacked.

    Attributes:
        survivors: of the stages before it.
        attacked: how many of these it attacked: those drawn at random; or all, after a success or a
            flagged finding.
        at_most: how many of the others its attack would fool at most, with 95% confidence.
    """

    survivors: int
    attacked: int
    at_most: int

    def __str__(self) -> str:
        if self.attacked == self.survivors:
            return f"attacked all {self.survivors} survivors"
        return (
            f"attacked {self.attacked} of {self.survivors} survivors, fooled none: it would fool "
            f"at most {100 * self.at_most / self.survivors:.1f}% (95% confidence)"
        )


def spot_check(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    attack: Attack,
    samples: int = _SAMPLES,
    eps: float | Tensor,
    **options: Unpack[AttackOptions],
) -> AttackResult:
    """Run `attack` on `samples` of the samples, drawn at random; if it fools one, on all of them.

    Who is drawn depends on the seed, the identities of the samples and who else is there, and not
    on their order. `flatreg.evaluate` draws from the survivors of all blocks and processes, and
    runs `attack` on all of them where a finding says that gradients are masked too.
    `at_most` bounds how many of those that were not drawn `attack` would fool.

    Other arguments, result and errors as in `flatreg.attacks.pgd`; a sample that `attack` has not
    seen keeps its image.

    Raises:
        ValueError: also fewer than 1 sample.
    """
    samples = whole("samples", samples, 1)
    common = complete(options, "spot_check")
    labels = class_indices(labels, "an attack", len(inputs))
    indices = common["indices"] = identities(common["indices"], len(inputs))
    first = drawn(indices, samples, common["seed"])
    images, fooled_by = inputs.detach().clone(), torch.full_like(labels, -1)
    forwards = backwards = 0
    for part in (first, sorted(set(range(len(inputs))) - set(first))):
        if not part:
            break
        rows = torch.tensor(part, device=labels.device)
        radius = per_sample(eps, inputs).flatten()[rows] if isinstance(eps, Tensor) else eps
        result = attack(model, inputs[rows], labels[rows], eps=radius, **for_rows(common, rows))
        images[rows], fooled_by[rows] = result.inputs, result.fooled_by
        forwards, backwards = forwards + result.forwards, backwards + result.backwards
        if not bool(result.fooled.any()):
            break
    return AttackResult(images, fooled_by, forwards, backwards)


def drawn(indices: Sequence[int], samples: int, seed: int) -> list[int]:
    """Positions of a random `samples` of the samples `indices`, rising; all, of fewer.

    Those are drawn whose random number is smallest. It is the sample's own: a part of the samples
    that holds the drawn ones draws the same.

    >>> drawn(range(100), 3, seed=0)
    [35, 39, 90]
    """
    numbers = [np.random.default_rng([seed, _STREAM, index]).random() for index in indices]
    return sorted(sorted(range(len(numbers)), key=numbers.__getitem__)[:samples])


def at_most(survivors: int, samples: int) -> int:
    r"""How many survivors the attack fools, with 95% confidence, if it fools none of the drawn.

    .. math:: \max \{M : \tbinom{N - M}{k} / \tbinom{N}{k} > 0.05\}

    the exact bound of a draw without replacement. It tends to 4.57% of many survivors for 64 drawn:
    1 - 0.05^(1/64).

    Args:
        survivors: N, those drawn included.
        samples: k, how many were drawn.

    >>> at_most(100, 64), at_most(1000, 64), at_most(64, 64), at_most(0, 0)
    (2, 44, 0, 0)
    """
    threshold = _DOUBT * comb(survivors, samples)
    fooled = 0
    while fooled < survivors - samples and comb(survivors - fooled - 1, samples) > threshold:
        fooled += 1
    return fooled


def checked_attack(stage: Attack) -> Attack | None:
    """The attack of a stage that is `spot_check` with its settings; of another stage, None.

    Raises:
        ValueError: it has no attack, or fewer than 1 sample.
    """
    if isinstance(stage, partial) and stage.func is spot_check:
        attack: Attack | None = stage.keywords.get("attack")
        if not callable(attack) or samples_of(stage) < 1:
            raise ValueError(
                "a spot check needs attack=ATTACK and samples >= 1, got "
                f"attack={attack!r:.60}, samples={samples_of(stage)}"
            )
        return attack
    return None


def on_everyone(stages: Sequence[Attack]) -> tuple[Attack, ...]:
    """Stages of a cascade whose spot check attacks every survivor, as at other eps of a curve."""
    return tuple(checked_attack(stage) or stage for stage in stages)


def samples_of(stage: Attack) -> int:
    """How many samples a stage draws that is `spot_check` with its settings."""
    settings = stage.keywords if isinstance(stage, partial) else {}
    return int(settings.get("samples", _SAMPLES))


def checked_samples(stage: Attack, left: int, fooled: int, masked: bool) -> SpotChecked | None:
    """Whom a stage attacked that is `spot_check`; of another stage, None.

    Args:
        stage: of a cascade.
        left: samples that survive it.
        fooled: samples that it fooled: one is enough for it to go on to all.
        masked: whether a finding was flagged, which has the same effect.
    """
    if checked_attack(stage) is None:
        return None
    survivors = left + fooled
    attacked = survivors if masked or fooled else min(samples_of(stage), survivors)
    return SpotChecked(survivors, attacked, at_most(survivors, attacked))
