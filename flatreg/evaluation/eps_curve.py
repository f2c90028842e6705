"""Attacked accuracy over a grid of eps: one minimal-norm pass, then attacks at each eps."""

from __future__ import annotations

import torch
from torch import Tensor

from flatreg.attacks.fmn import fmn
from flatreg.data.loading import Batch
from flatreg.evaluation.evaluator import Evaluator
from flatreg.evaluation.resume import CachedWork
from flatreg.models.state import derived_seed
from flatreg.threat import Norm, distance

_STEPS, _STREAM = 100, 1000  # of the minimal-norm pass; its seed is no stage's


def survivors_by_eps(
    evaluator: Evaluator, block: Batch, correct: Tensor, verdict: Tensor
) -> Tensor:
    """Which samples of a block survive at each eps of the curve, `(eps, n)` booleans on the CPU.

    It is monotone by construction, because a ball contains every smaller one: a sample fooled in
    the smaller counts as fooled in the larger, one that survived the larger counts as a survivor of
    the smaller. The minimal-norm pass gives each sample a distance at which it is fooled. From the
    largest eps down, the attacks of the curve then run only on the samples that have not survived
    at a larger eps and are not known to be fooled within this one.

    Args:
        evaluator: of the block; its request names the curve.
        block: of samples.
        correct: which are classified right `(n,)`, booleans on the CPU.
        verdict: of each under the evaluation's own threat, as in `Evaluation`.
    """
    curve, own = evaluator.request.curve, evaluator.request.threat
    survived = torch.zeros_like(correct)
    fooled_at = torch.full(verdict.shape, torch.inf, dtype=torch.float64)
    if bool(correct.any()) and any(threat.eps != own.eps for threat in curve):
        fooled_at[correct] = _distances(evaluator, block, correct.nonzero().flatten(), own.norm)
    # The cascade has shown at which eps these are fooled, whatever the minimal-norm pass found.
    fooled_at = torch.where(verdict >= 0, fooled_at.clamp_max(own.eps), fooled_at)
    rows = []
    for threat in reversed(curve):
        if threat.eps <= own.eps:
            survived = survived | (verdict == -1)
        undecided = correct & ~survived & (fooled_at > threat.eps)
        found = evaluator.run_attacks(block, undecided, threat)
        survived = survived | (found["verdict"] == -1)
        rows.append(survived)
    return torch.stack(rows[::-1]) if rows else survived.new_empty((0, len(survived)))


def _distances(evaluator: Evaluator, block: Batch, rows: Tensor, norm: Norm) -> Tensor:
    """Distance of the closest adversarial image found, infinite where none was, `(rows,)`."""

    def work(missing: list[int]) -> CachedWork:
        chosen = rows[missing]
        evaluator.seed_forward("distances", block, chosen.tolist())
        inputs, labels = block.inputs[chosen], block.labels[chosen]
        result = fmn(
            evaluator.searched,
            inputs,
            labels,
            norm=norm,
            steps=_STEPS,
            seed=derived_seed(evaluator.request.seed, _STREAM),
            indices=[block.indices[row] for row in chosen.tolist()],
            batch_size=evaluator.request.batch_size,
            callback=evaluator.progress.callback,
        )
        wrong = evaluator.score(result.inputs, labels)["prediction"] != labels.cpu()
        length = distance(result.inputs, inputs, norm).cpu()
        fooled = wrong & result.fooled.cpu()
        return CachedWork({"distance": torch.where(fooled, length, torch.inf)})

    indices = [block.indices[row] for row in rows.tolist()]
    return evaluator.cache.rows(f"{norm} distances", indices, work)["distance"]
