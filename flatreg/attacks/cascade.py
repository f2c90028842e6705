"""A cascade: attacks in order of cost, each on the samples that survived the ones before."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from flatreg.attacks.apgd import apgd
from flatreg.attacks.eot import eot
from flatreg.attacks.fmn import fmn
from flatreg.attacks.options import Attack, AttackResult, Callback
from flatreg.attacks.pgd import pgd
from flatreg.attacks.query import QueriedModel
from flatreg.attacks.square import square
from flatreg.models.precision import class_indices
from flatreg.models.state import derived_seed
from flatreg.threat import check_norm, check_within, per_sample

_MARGIN = partial(pgd, loss="margin", steps=10)
_STANDARD: tuple[Attack, ...] = (
    # The margin sees through any logit scale and fells most in two passes.
    _MARGIN,
    partial(apgd, loss="rescaled_cross_entropy", steps=50),
    # Targets at the closest boundary: cheap, and tried before all targets at the fixed eps.
    partial(fmn, targets=5, steps=60),
    partial(apgd, loss="dlr", targets=9, steps=50),
)

PRESETS: dict[str, tuple[Attack, ...]] = {
    # For the hook: two to three passes an image on a model that is not robust.
    "fast": (_MARGIN,),
    "standard": (*_STANDARD, partial(square, queries=2500)),
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
        ValueError: no preset has that name, or the list is empty.
    """
    if isinstance(attack, str):
        if attack not in PRESETS:
            raise ValueError(f"attack must be one of {', '.join(PRESETS)}, got {attack!r}")
        return PRESETS[attack]
    chosen = (attack,) if callable(attack) else tuple(attack)
    if not chosen:
        raise ValueError("attack must name at least one stage, got an empty list")
    return chosen


def describe(attack: Attack) -> str:
    """Name a stage by its function and settings.

    >>> describe(partial(pgd, loss="margin", steps=10))
    'pgd(loss=margin, steps=10)'
    >>> describe(partial(eot, attack=pgd, draws=20))
    'eot(attack=pgd, draws=20)'
    """
    if isinstance(attack, partial):
        settings = ", ".join(
            f"{key}={describe(value) if callable(value) else value}"
            for key, value in attack.keywords.items()
        )
        return f"{attack.func.__name__}({settings})"
    return getattr(attack, "__name__", type(attack).__name__)


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

    What a stage claims to have fooled is scored once more, on the images it returned.

    Arguments, result and errors as in `flatreg.attacks.pgd`; `attacks` is a preset ("fast",
    "standard", "standard-full", "rand") or a list.

    Raises:
        RuntimeError: also, an attack left its threat model.
    """
    labels = class_indices(labels, "an attack")
    indices = range(len(inputs)) if indices is None else indices
    found, radius = inputs.detach().clone(), per_sample(eps, inputs).flatten()
    fooled_by = torch.full_like(labels, -1)
    forwards = backwards = 0
    for number, attack in enumerate(stages(attacks)):
        rows = (fooled_by < 0).nonzero().flatten()
        if not len(rows):
            break
        result = attack(
            model,
            inputs[rows],
            labels[rows],
            eps=radius[rows] if isinstance(eps, Tensor) else eps,
            norm=norm,
            seed=derived_seed(seed, number),
            indices=[indices[r] for r in rows.tolist()],
            batch_size=batch_size,
            callback=callback,
        )
        found[rows] = result.inputs
        claimed = rows[result.fooled]
        forwards, backwards = forwards + result.forwards, backwards + result.backwards
        if len(claimed):
            check_within(found[claimed], inputs[claimed], radius[claimed], check_norm(norm))
            # Score the images returned: a claim that does not hold leaves the sample to the others.
            victim = QueriedModel(model, batch_size)
            confirmed = victim.logits(found[claimed]).argmax(1) != labels[claimed]
            fooled_by[claimed[confirmed]] = number
            forwards += victim.forwards
    return AttackResult(found, fooled_by, forwards, backwards)
