"""Attacked accuracy over a grid of eps: one minimal-norm pass, polished at fixed eps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from flatreg.attacks.fmn import fmn
from flatreg.data.loading import Batch
from flatreg.evaluation.evaluator import Evaluator, Threat
from flatreg.evaluation.resume import CachedWork, Columns
from flatreg.models.state import derived_seed
from flatreg.threat import distance

_STEPS, _STREAM = 100, 1000  # of the minimal-norm pass; its seed is no stage's


def curve_columns(
    evaluator: Evaluator,
    block: Batch,
    correct: Sequence[int],
    verdict: Tensor,
    eps: float,
    polish: Threat,
    grid: Sequence[float],
) -> Columns:
    """For each eps of `grid`, which samples of the block survive; monotone by construction.

    A ball contains every smaller one: what falls in the smaller falls in the larger, what survived
    the larger counts as survived in the smaller. The minimal-norm pass gives each sample a distance
    at which it falls. From the largest eps down, the polishing attack then tries only the samples
    that have not survived at a larger eps and are not known to fall here: the borderline ones.

    Args:
        evaluator: of the block.
        block: of samples.
        correct: positions in it of those classified right.
        verdict: of the block at `eps`, as in `Evaluation`.
        eps: of that verdict.
        polish: the norm, and the attacks tried at each eps.
        grid: of eps.
    """
    survived = torch.zeros(verdict.shape, dtype=torch.bool)
    columns: Columns = {}
    falls_at = torch.full(verdict.shape, torch.inf, dtype=torch.float64)
    if correct and any(radius != eps for radius in grid):
        falls_at[correct] = _distances(evaluator, block, correct, polish)
    falls_at = torch.where(verdict >= 0, falls_at.clamp_max(eps), falls_at)
    for radius in sorted(grid, reverse=True):
        if radius <= eps:
            survived = survived | (verdict == -1)
        among = [r for r in correct if not survived[r] and falls_at[r] > radius]
        if among:
            found = evaluator.run_attacks(block, among, replace(polish, eps=radius))
            survived[among] = found["verdict"] == -1
        columns[f"survives {radius!r}"] = survived.clone()
    return columns


def _distances(
    evaluator: Evaluator, block: Batch, correct: Sequence[int], polish: Threat
) -> Tensor:
    """Distance of the closest adversarial image found, infinite where none was, `(correct,)`."""

    def work(missing: list[int]) -> CachedWork:
        rows = [correct[i] for i in missing]
        evaluator.seed_forward("distances", block, rows)
        inputs, labels = block.inputs[rows], block.labels[rows]
        result = fmn(
            evaluator.searched,
            inputs,
            labels,
            norm=polish.norm,
            steps=_STEPS,
            seed=derived_seed(evaluator.seed, _STREAM),
            indices=[block.indices[row] for row in rows],
            batch_size=evaluator.batch_size,
            callback=evaluator.callback,
        )
        wrong = evaluator.score(result.inputs, labels)["prediction"] != labels.cpu()
        length = distance(result.inputs, inputs, polish.norm).cpu()
        held = torch.where(wrong & result.fooled.cpu(), length, torch.inf)
        return CachedWork({"distance": held})

    indices = [block.indices[row] for row in correct]
    return evaluator.cache.rows(f"{polish.norm} distances", indices, work)["distance"]
