"""Clean and attacked accuracy, with intervals and findings; and the hook for training."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from flatreg.attacks.cascade import cascade, describe, stages
from flatreg.attacks.result import Attack
from flatreg.evaluation.findings import masking_evidence, masking_findings
from flatreg.evaluation.results import Accuracy, CurvePoint, Evaluation, Stage, versions
from flatreg.forward import local_module
from flatreg.isolation import untouched
from flatreg.sharding import Batch, batches, gather, map_style, rank_and_world, subset
from flatreg.threat import check_eps, check_norm

_DIAGNOSED = 256  # samples the findings are taken on: their shares are known to 0.06
_ULP = 1e-6  # rounding of x +- eps in float32; an adversarial image may not be further out


def evaluate(
    model: nn.Module,
    data: Dataset[Any] | DataLoader[Any],
    *,
    eps: float,
    norm: str = "linf",
    attack: str | Attack | Sequence[Attack] = "standard",
    samples: int | None = None,
    curve: Sequence[float] = (),
    seed: int = 0,
    batch_size: int = 256,
    diagnose: bool = True,
    progress: bool = True,
) -> Evaluation:
    """Clean accuracy and attacked accuracy under a cascade, with findings.

    Gradients, buffers, modes, requires_grad flags and every random stream are left as they were.
    Where a process group exists the samples are shared out and every process returns the whole
    result; random starts are keyed by sample, so the sharing does not change them.

    Args:
        model: images in [0,1] to logits; a DDP wrapper too. Evaluated in eval mode as it is:
            for a float32 verdict hand over the float32 model.
        data: map-style dataset of (image, label), or a loader of one; images are uint8 or in [0,1].
        eps: radius in [0,1] pixel units.
        norm: "linf".
        attack: "fast", "standard", one attack or a list of them (see `flatreg.attacks.cascade`).
        samples: size of a fixed, seeded subset; left out, everything.
        curve: other eps at which to report attacked accuracy.
        seed: of the subset and the random starts.
        batch_size: samples at a time.
        diagnose: take the findings, on up to 256 samples.
        progress: show a bar with the survivors.

    Raises:
        ValueError: images or eps outside [0,1], another norm, an iterable dataset, no samples.
    """
    for radius in (eps, *curve):
        check_eps(radius, check_norm(norm))
    started = time.perf_counter()
    cascade_stages = stages(attack)
    dataset, collate = map_style(data)
    chosen = subset(len(dataset), samples, seed)  # type: ignore[arg-type]
    module = local_module(model)
    rank, world = rank_and_world()
    share = chosen[rank::world]
    rows = subset(len(chosen), _DIAGNOSED, seed) if diagnose else []
    diagnosed = frozenset(chosen[row] for row in rows)
    threat = _Threat(eps, norm, cascade_stages, tuple(sorted(set(curve))), seed, diagnosed)
    columns: defaultdict[str, list[Any]] = defaultdict(list)
    with (
        untouched(module),
        tqdm(total=len(share), desc=f"attack {eps:.3g}", unit="img", leave=False,
             disable=not progress or rank > 0) as bar,
    ):  # fmt: skip
        for batch in batches(module, dataset, share, batch_size, collate):
            for name, values in _judge(module, batch, threat).items():
                columns[name] += values
            bar.update(len(batch.indices))
            upper_bound = columns["verdict"].count(-1) / len(columns["verdict"])
            bar.set_postfix_str(f"attacked accuracy <= {upper_bound:.1%}")
    merged = gather(columns)
    order = np.argsort(merged["index"], kind="stable").tolist()
    verdicts = [merged["verdict"][i] for i in order]
    n = len(verdicts)
    left = [sum(v == -1 or v > k for v in verdicts) for k in range(len(cascade_stages))]
    evidence = {
        name.removeprefix("evidence."): torch.tensor(values)
        for name, values in merged.items()
        if name.startswith("evidence.")
    }
    return Evaluation(
        eps=eps,
        norm=norm,
        n=n,
        clean=Accuracy.of(sum(v > -2 for v in verdicts), n),
        attacked=Accuracy.of(sum(v == -1 for v in verdicts), n),
        stages=[
            Stage(describe(stage), Accuracy.of(count, n))
            for stage, count in zip(cascade_stages, left, strict=True)
        ],
        curve=[
            CurvePoint(radius, Accuracy.of(sum(merged[f"survives.{radius!r}"]), n))
            for radius in threat.curve
        ],
        findings=masking_findings(evidence) if evidence else [],
        forwards=sum(merged["forwards"]),
        backwards=sum(merged["backwards"]),
        seed=seed,
        seconds=time.perf_counter() - started,
        versions=versions(),
        indices=[merged["index"][i] for i in order],
        verdicts=verdicts,
    )


@dataclass(frozen=True)
class _Threat:
    eps: float
    norm: str
    attacks: tuple[Any, ...]
    curve: tuple[float, ...]
    seed: int
    diagnosed: frozenset[int]  # dataset indices that findings are taken on


def _judge(model: nn.Module, batch: Batch, threat: _Threat) -> dict[str, list[Any]]:
    """Attack one batch at every eps; one list per column, per sample but for the pass counts."""
    with torch.no_grad():
        correct = model(batch.inputs).argmax(1) == batch.labels
    verdict = torch.full_like(batch.labels, -2)
    verdict[correct], forwards, backwards = _attack(model, batch, correct, threat, threat.eps)
    columns = {
        "index": batch.indices,
        "verdict": verdict.tolist(),
        "forwards": [len(correct) + forwards],
        "backwards": [backwards],
    }

    # A ball contains every smaller one: what fell in the smaller has fallen, what survived the
    # larger has survived. So each further eps is tried only on the samples it leaves open.
    def survive(radius: float, among: Tensor) -> Tensor:
        alive = torch.zeros_like(among)
        alive[among] = _attack(model, batch, among, threat, radius)[0] == -1
        return alive

    held, open_below = verdict == -1, verdict >= 0
    for radius in (r for r in threat.curve if r < threat.eps):
        open_below = survive(radius, open_below)
        columns[f"survives.{radius!r}"] = (held | open_below).tolist()
    for radius in (r for r in threat.curve if r >= threat.eps):
        held = survive(radius, held) if radius > threat.eps else held
        columns[f"survives.{radius!r}"] = held.tolist()

    diagnosed = correct & torch.tensor([i in threat.diagnosed for i in batch.indices]).to(correct)
    if not bool(diagnosed.any()):
        return columns
    evidence = masking_evidence(
        model, batch.inputs[diagnosed], batch.labels[diagnosed], eps=threat.eps, seed=threat.seed,
        indices=_rows(batch.indices, diagnosed),
    )  # fmt: skip
    return columns | {f"evidence.{name}": values.tolist() for name, values in evidence.items()}


def _attack(
    model: nn.Module, batch: Batch, among: Tensor, threat: _Threat, eps: float
) -> tuple[Tensor, int, int]:
    """Verdicts of the samples `among` the batch, and the passes they took."""
    inputs = batch.inputs[among]
    result = cascade(
        model, inputs, batch.labels[among], eps=eps, norm=threat.norm, attacks=threat.attacks,
        seed=threat.seed, indices=_rows(batch.indices, among),
    )  # fmt: skip
    images = result.inputs[result.fooled]
    outside = (images - inputs[result.fooled]).abs().max() - eps if len(images) else torch.zeros(())
    if float(outside) > _ULP or not bool(((images >= 0) & (images <= 1)).all()):
        raise RuntimeError(
            f"an attack left its threat model: {float(outside):.2g} beyond eps, or pixels outside "
            "[0, 1]; its verdicts are void"
        )
    return result.fooled_by, result.forwards, result.backwards


def _rows(values: list[int], mask: Tensor) -> list[int]:
    return [values[row] for row in mask.nonzero().flatten().tolist()]
