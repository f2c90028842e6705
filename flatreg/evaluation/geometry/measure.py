"""Measure the geometry of a model: one card with everything flatreg can say about it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from flatreg.data.loading import batches, map_style, subset
from flatreg.data.sharing import Batch, rank_and_world, same_everywhere
from flatreg.evaluation.findings import chance_finding
from flatreg.evaluation.geometry.card import PARTS, SCHEMA, GeometryCard
from flatreg.evaluation.geometry.parts import MEASURE_PART
from flatreg.evaluation.geometry.sharded import MeasureSettings, ShardedMeasurement
from flatreg.evaluation.results import versions
from flatreg.measures.estimate import Estimate
from flatreg.measures.manifold import IdentityManifold, Manifold
from flatreg.models.double_backward import is_piecewise_linear
from flatreg.models.entrance import as_labels, check_classifier, logits_of
from flatreg.models.forward import evaluated

_KINKS = (
    "activations are piecewise linear (ReLU): between their kinks the network is linear in its "
    "input, and second derivatives see the curvature of the softmax only"
)


def measure(
    model: nn.Module,
    data: Dataset[Any] | DataLoader[Any],
    *,
    eps: float,
    manifold: Manifold | None = None,
    name: str | None = None,
    data_name: str | None = None,
    notes: Iterable[str] = (),
    progress: bool = True,
    **settings: Any,
) -> GeometryCard:
    """Measure the geometry of a classifier; **larger numbers mean sharper** wherever they are.

    The model is evaluated in eval mode and left untouched. Where a process group exists the samples
    are shared out and every process returns the whole card; random directions are keyed so that
    neither the number of processes nor the batch size changes a number beyond rounding.

    Args:
        model: images in [0,1] to logits; in eval mode and float32, whatever wrapper it is in.
        data: map-style dataset of (image, label), or a loader of one; images are uint8 or in [0,1].
        eps: radius of the attack that makes the "attacked" samples, in [0,1] pixel units.
        manifold: fitted; left out, every direction in the input is off the manifold.
        name: of the model, for the card.
        data_name: of the data, for the card.
        notes: for the card.
        progress: show bars.
        settings: `norm` of the attack ("linf"), `samples` (512), `probed` (64), `num_probes` (32),
            `radii`, `seed`, `batch_size` and `parts`: see
            `flatreg.evaluation.geometry.MeasureSettings`.

    Returns:
        The card. A part that this model refuses is named there with the reason.

    Raises:
        ValueError: settings out of range, images or eps outside [0,1], an iterable dataset, a model
            in half precision, a manifold that is not fitted.
        TypeError: there is no such setting.
    """
    chosen = MeasureSettings(eps=eps, **settings)
    manifold = manifold or IdentityManifold()
    _ = manifold.tangent_dimension  # raises here, before anything is measured, if it is not fitted
    dataset, available, loading = map_style(data)
    indices = same_everywhere(subset(available, chosen.samples, chosen.seed))
    with evaluated(model) as module:
        if isinstance(module, nn.DataParallel):
            module = module.module  # which cannot be called at other weights
        first = next(batches(module, dataset, indices[:2], 2, loading)).inputs
        classes = check_classifier(module, first)
        measurement = ShardedMeasurement(
            model=module,
            dataset=dataset,
            loading=loading,
            indices=indices,
            probed=subset(indices, chosen.probed, chosen.seed),
            shape=tuple(first.shape[1:]),
            manifold=manifold,
            settings=chosen,
            progress=progress and rank_and_world()[0] == 0,
        )
        remarks = [*notes, *_remarks(measurement, first, classes)]
        results, refused, seconds = _measured_parts(measurement)
    return GeometryCard(
        schema=SCHEMA,
        model=name or type(module).__name__,
        parameters=sum(p.numel() for p in module.parameters()),
        data=data_name or type(dataset).__name__,
        n=len(indices),
        probed=len(measurement.probed),
        eps=chosen.eps,
        norm=chosen.norm,
        seed=chosen.seed,
        **results,
        refused=refused,
        notes=remarks,
        seconds=seconds,
        versions=versions(),
    )


def _remarks(measurement: ShardedMeasurement, images: Tensor, classes: int) -> Iterator[str]:
    """What the reader of any part must know: accuracy at chance, a model without curvature."""
    right = sum(measurement.per_batch("outputs", partial(_check, measurement.model))["right"])
    clean = Estimate.share(right, len(measurement.probed))
    chance = chance_finding(clean, classes)
    if chance.verdict == "flagged":
        yield f"of the probed samples {clean} are right: {chance.meaning}"
    if "curvature" in measurement.settings.parts:
        with torch.enable_grad():
            logits = logits_of(measurement.model, images.requires_grad_())
        if is_piecewise_linear(logits):
            yield _KINKS


def _measured_parts(
    measurement: ShardedMeasurement,
) -> tuple[dict[str, Any], dict[str, str], dict[str, float]]:
    """Each part, None where it was not asked for or is refused; why; and the seconds it took."""
    results: dict[str, Any] = dict.fromkeys(PARTS)
    refused: dict[str, str] = {}
    seconds: dict[str, float] = {}
    for part in (part for part in PARTS if part in measurement.settings.parts):
        started = time.perf_counter()
        try:
            results[part] = MEASURE_PART[part](measurement)
        except ValueError as error:
            refused[part] = str(error)
        seconds[part] = time.perf_counter() - started
    return results, refused, seconds


@torch.no_grad()
def _check(model: nn.Module, batch: Batch) -> dict[str, int]:
    """Number of samples that are right; not finite logits and labels of no class are refused."""
    logits = logits_of(model, batch.inputs)
    return {"right": int((logits.argmax(1) == as_labels(batch.labels, *logits.shape)).sum())}
