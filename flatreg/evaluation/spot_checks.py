"""Spot checks of an evaluation: on survivors of all blocks and processes, after everything else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from flatreg.attacks.spot_check import checked_attack, drawn, samples_of
from flatreg.data.sharing import Batch, gather
from flatreg.evaluation.evaluator import Evaluator
from flatreg.evaluation.findings import joined, masking_findings
from flatreg.evaluation.resume import level_digests
from flatreg.evaluation.summary import SampleResults
from flatreg.models.state import derived_seed
from flatreg.threat import Threat

Load = Callable[[list[int]], Iterator[Batch]]
"""Batches of the samples at these dataset indices."""


def run_spot_checks(evaluator: Evaluator, blocks: list[SampleResults], load: Load) -> None:
    """Run the spot check that ends a cascade, and write what it finds into `blocks`.

    Its attack runs on survivors drawn from those of all processes. Where it fools one of them, or a
    finding says that gradients are masked, it runs on the other survivors too. Every process calls,
    and each attacks the samples that it holds.

    Args:
        evaluator: of this process.
        blocks: of this process, judged by the other stages.
        load: images of samples of this process.

    Raises:
        ValueError: they are other images than the blocks were judged by.
    """
    request = evaluator.request
    ended = [threat for threat in request.threats if checked_attack(threat.attacks[-1])]
    if not ended:
        return
    found = gather({"checks": [block.checks for block in blocks]})["checks"]
    masked = any(f.verdict == "flagged" for f in masking_findings(joined(found)))
    alone = replace(evaluator, together=False)
    for threat in dict.fromkeys(ended):
        row, stage = request.threats.index(threat), len(threat.attacks) - 1
        held = [i for b in blocks for i in b.index[b.verdicts[row] == -1].tolist()]
        survivors = sorted(gather({"held": held})["held"])
        seed = derived_seed(request.seed, stage)
        places = drawn(survivors, samples_of(threat.attacks[-1]), seed)
        first = {survivors[place] for place in places}
        for wanted in (first, set(survivors) - first):
            fooled = _check(alone, blocks, load, threat, [i for i in held if i in wanted])
            if not (masked or any(gather({"fooled": [fooled]})["fooled"])):
                break


def _check(
    evaluator: Evaluator,
    blocks: list[SampleResults],
    load: Load,
    threat: Threat,
    indices: list[int],
) -> bool:
    """Run the last stage on samples of this process; whether it fooled one."""
    at = {index: (b, r) for b in blocks for r, index in enumerate(b.index.tolist())}
    rows = [r for r, other in enumerate(evaluator.request.threats) if other == threat]
    own, stage, any_fooled = threat == evaluator.request.threat, len(threat.attacks) - 1, False
    for batch in load(indices) if indices else ():
        judged = torch.stack([at[i][0].digest[at[i][1]] for i in batch.indices])
        if not torch.equal(level_digests(batch), judged):
            raise ValueError(
                "data: expected the same image whenever a sample is read, the spot check was given "
                "another one than the other stages: leave random transforms out"
            )
        everyone = torch.arange(len(batch.indices))
        columns = evaluator.run_stage(batch, everyone, threat, stage)
        fooled = columns["fooled"]
        any_fooled |= bool(fooled.any())
        verdict = torch.where(fooled, stage, -1)
        # Nobody has tried these at the smaller eps: they had survived the largest.
        again = own and bool(fooled.any())
        survives = evaluator.survivors_by_eps(batch, fooled, verdict) if again else None
        for place, index in enumerate(batch.indices):
            block, row = at[index]
            block.verdicts[rows, row] = verdict[place]
            if not own:
                continue
            for name in ("prediction", "margin", "kappa"):
                getattr(block, f"attacked_{name}")[row] = columns[name][place]
            if block.images is not None:
                block.images[row] = columns["image"][place]
            if survives is not None and bool(fooled[place]):
                block.survives[:, row] = survives[:, place]
    return any_fooled
