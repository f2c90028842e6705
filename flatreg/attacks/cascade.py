"""A cascade: attacks in order of cost, each on the samples that survived the ones before."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from flatreg.attacks.apgd import apgd
from flatreg.attacks.eot import eot
from flatreg.attacks.options import (
    Attack,
    AttackOptions,
    AttackResult,
    Callback,
    for_rows,
    identities,
)
from flatreg.attacks.pgd import pgd
from flatreg.attacks.query import QueriedModel
from flatreg.attacks.race import race
from flatreg.attacks.spot_check import checked_attack, spot_check
from flatreg.attacks.square import square
from flatreg.data.configuration import whole
from flatreg.data.sharing import Batch
from flatreg.models.precision import class_indices
from flatreg.models.state import derived_seed
from flatreg.threat import check_eps, check_norm, check_within, per_sample

# The margin does not depend on the scale of the logits; two passes of it fool most samples.
_MARGIN = partial(pgd, loss="margin", steps=10, step_size=0.5)
_STANDARD: tuple[Attack, ...] = (
    _MARGIN,
    partial(apgd, loss="rescaled_cross_entropy", steps=25),
    race,
)

PRESETS: dict[str, tuple[Attack, ...]] = {
    # For the hook: on a model that is not robust four passes forward and two backward an image.
    "fast": (_MARGIN,),
    "standard": (*_STANDARD, partial(spot_check, attack=partial(square, queries=2500))),
    "standard-full": (*_STANDARD, partial(square, queries=5000)),
    # For a random forward, as AutoAttack's "rand": 20 draws a step.
    "rand": (
        partial(eot, attack=_MARGIN, draws=20),
        partial(eot, attack=partial(apgd, loss="rescaled_cross_entropy", steps=100), draws=20),
        partial(eot, attack=partial(apgd, loss="dlr", steps=100), draws=20),
    ),
}


def stages(attack: str | Attack | Sequence[Attack]) -> tuple[Attack, ...]:
    """Resolve a preset's name, one attack or a list of attacks to the stages of a cascade.

    Raises:
        TypeError: a stage is no function.
        ValueError: no preset has that name, the list is empty, or a spot check stands elsewhere
            than after other stages, at the end.
    """
    if isinstance(attack, str):
        if attack not in PRESETS:
            raise ValueError(f"attack must be one of {', '.join(PRESETS)}, got {attack!r}")
        return PRESETS[attack]
    one = callable(attack) or not isinstance(attack, Iterable)
    chosen: tuple[Any, ...] = (attack,) if one else tuple(attack)  # type: ignore[arg-type]
    if not chosen:
        raise ValueError("attack must name at least one stage, got an empty list")
    if wrong := [stage for stage in chosen if not callable(stage)]:
        raise TypeError(
            f"attack: expected functions as stages, as flatreg.attacks.pgd, got {wrong[0]!r:.60}"
        )
    checks = [number for number, stage in enumerate(chosen) if checked_attack(stage)]
    if checks not in ([], [max(1, len(chosen) - 1)]):
        raise ValueError(
            "expected a spot check as the last of several stages, got it as stage "
            f"{checks[0] + 1} of {len(chosen)}: put other attacks before it"
        )
    return chosen


def describe(attack: Attack) -> str:
    """Name a stage by its function and settings.

    >>> describe(partial(pgd, loss="margin", steps=10))
    'pgd(loss=margin, steps=10)'
    >>> describe(partial(eot, attack=pgd, draws=20))
    'eot(attack=pgd, draws=20)'
    """
    if isinstance(attack, partial):
        settings = ", ".join(f"{key}={_setting(value)}" for key, value in attack.keywords.items())
        return f"{describe(attack.func)}({settings})"
    return getattr(attack, "__name__", type(attack).__name__)


def _setting(value: Any) -> Any:
    """A setting of a stage in words; of a module its class, for its own words take many lines."""
    if isinstance(value, Mapping):
        return {key: _setting(inner) for key, inner in value.items()}
    return describe(value) if callable(value) else value


def on_survivors(
    attacks: Sequence[Attack], verdicts: Tensor
) -> Iterator[tuple[int, Attack, Tensor]]:
    """Yield each attack with the samples to run it on, until none is left.

    Args:
        attacks: in order.
        verdicts: `(batch,)`, -1 where a sample survives so far. Before the next attack the caller
            writes the number of this one where it fools a sample.

    Yields:
        The number of the attack, the attack, the survivors (positions in the batch, `(rows,)`).
    """
    for number, attack in enumerate(attacks):
        rows = (verdicts == -1).nonzero().flatten()
        if not len(rows):
            return
        yield number, attack, rows


def attack_rows(
    attack: Attack,
    model: nn.Module,
    batch: Batch,
    rows: Tensor,
    *,
    eps: float | Tensor,
    **options: Unpack[AttackOptions],
) -> AttackResult:
    """Run `attack` on the samples `rows` of a batch; the positions in its result are those in rows.

    A callback is told positions in the batch.

    Args:
        attack: any.
        model: images in [0,1] to logits.
        batch: of samples.
        rows: positions in it `(rows,)`.
        eps: radius, or one a sample of the batch.
        **options: of the attack.

    Raises:
        TypeError: it returns something else than an `AttackResult` of these samples.
    """
    result = attack(
        model,
        batch.inputs[rows],
        batch.labels[rows],
        eps=eps[rows] if isinstance(eps, Tensor) and eps.ndim else eps,
        **for_rows({**options, "indices": batch.indices}, rows),
    )
    shape = (len(rows), *batch.inputs.shape[1:])
    if not isinstance(result, AttackResult):
        raise TypeError(
            f"{describe(attack)}: expected an attack to return a flatreg.attacks.AttackResult, got "
            f"{type(result).__name__}"
        )
    for name, wanted in (("inputs", shape), ("fooled_by", shape[:1])):
        found: Any = getattr(result, name)
        got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        if got != wanted:
            raise TypeError(
                f"{describe(attack)}: expected an attack to return a flatreg.attacks.AttackResult, "
                f"its {name} of shape {wanted}, got {got}"
            )
    return result


def cascade(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    eps: float | Tensor,
    norm: str = "linf",
    attacks: str | Attack | Sequence[Attack] = "standard",
    seed: int = 0,
    indices: Sequence[int] | None = None,
    batch_size: int | None = None,
    callback: Callback | None = None,
) -> AttackResult:
    """Run `attacks` in order, each on the survivors; `fooled_by` of the result names the stage.

    What a stage reports as fooled is scored once more, on the images it returned.

    Arguments, result and errors as in `flatreg.attacks.pgd`; `attacks` is a preset ("fast",
    "standard", "standard-full", "rand") or a list.

    Raises:
        RuntimeError: also, an attack left its threat model.
    """
    known, labels = check_norm(norm), class_indices(labels, "an attack", len(inputs))
    check_eps(eps, known)
    seed = whole("seed", seed, 0)
    batch = Batch(identities(indices, len(inputs)), inputs, labels)
    found, radius = inputs.detach().clone(), per_sample(eps, inputs).flatten()
    fooled_by = torch.full_like(labels, -1)
    forwards = backwards = 0
    for number, attack, rows in on_survivors(stages(attacks), fooled_by):
        result = attack_rows(
            attack,
            model,
            batch,
            rows,
            eps=radius if isinstance(eps, Tensor) else eps,
            norm=norm,
            seed=derived_seed(seed, number),
            batch_size=batch_size,
            callback=callback,
        )
        # A sample that a spot check leaves out keeps the image that the stage before returned.
        tried = (result.inputs != inputs[rows]).flatten(1).any(1) | result.fooled
        found[rows[tried]] = result.inputs[tried]
        reported = rows[result.fooled]
        check_within(found[reported], inputs[reported], radius[reported], known)
        forwards += result.forwards
        backwards += result.backwards
        if len(reported):
            # A report that does not hold on the returned image leaves the sample to later stages.
            queried = QueriedModel(model, batch_size)
            wrong = queried.logits(found[reported]).argmax(1) != labels[reported]
            fooled_by[reported[wrong]] = number
            forwards += queried.forwards
    return AttackResult(found, fooled_by, forwards, backwards)
