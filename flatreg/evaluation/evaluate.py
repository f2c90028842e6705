"""Clean and attacked accuracy, with intervals and findings."""

from __future__ import annotations

import hashlib
import re
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from flatreg.attacks.apgd import apgd
from flatreg.attacks.cascade import describe, stages
from flatreg.attacks.options import Attack
from flatreg.data.loading import Batch, batches, gather, map_style, rank_and_world, subset
from flatreg.evaluation.eps_curve import curve_columns
from flatreg.evaluation.evaluator import Evaluator, Threat
from flatreg.evaluation.export import write_evaluation
from flatreg.evaluation.masking import check_logits, masking_checks
from flatreg.evaluation.results import Evaluation, versions
from flatreg.evaluation.resume import CachedWork, Columns, ResumeCache
from flatreg.evaluation.summary import summarise
from flatreg.models.forward import in_float32
from flatreg.models.heads import Head, find_head
from flatreg.models.state import untouched
from flatreg.threat import check_eps, check_norm

_DIAGNOSED = 256  # samples the findings are taken on: their shares are known to 0.06
_BLOCK = 4  # batches held in memory at once: enough jobs to keep a batch full to the end
_VOTES = 15  # of a random forward

# Of the curve: the cheap half of the standard cascade.
POLISH: tuple[Attack, ...] = (
    partial(apgd, loss="rescaled_cross_entropy", steps=50),
    partial(apgd, loss="margin", steps=50),
)


def evaluate(
    model: nn.Module,
    data: Dataset[Any] | DataLoader[Any],
    *,
    eps: float,
    norm: str = "linf",
    attack: str | Attack | Sequence[Attack] = "standard",
    samples: int | None = None,
    curve: Sequence[float] = (),
    polish: str | Attack | Sequence[Attack] = POLISH,
    other_threats: Mapping[str, float] | None = None,
    seed: int = 0,
    batch_size: int = 256,
    bfloat16: bool = False,
    votes: int | None = None,
    diagnose: bool = True,
    folder: str | Path | None = None,
    save_inputs: bool = False,
    progress: bool = True,
) -> Evaluation:
    """Clean accuracy and attacked accuracy under a cascade, with findings.

    Gradients, buffers, modes, requires_grad flags and every random stream are left as they were.
    Where a process group exists the samples are shared out and every process returns the whole
    result; random starts are keyed by sample, so the sharing does not change them.

    Args:
        model: images in [0,1] to logits; evaluated in eval mode and float32, whatever DDP, compiled
            or mixed-precision wrapper it is in.
        data: map-style dataset of (image, label), or a loader of one, whose workers and collate
            function are used and whose order and batch size are not; images are uint8 or in [0,1].
        eps: radius in [0,1] pixel units.
        norm: "linf", "l2" or "l1".
        attack: "fast", "standard", "standard-full", "rand" (for a random forward), one attack or a
            list of them (see `flatreg.attacks.cascade`).
        samples: size of a fixed, seeded subset; left out, everything.
        curve: other eps at which to report attacked accuracy.
        polish: what attacks the borderline samples of the curve at each eps, after a minimal-norm
            pass; left out, APGD-50 on two losses, which makes the curve a looser bound than
            `attacked`.
        other_threats: other threats to report, as norm to eps, by the same cascade.
        seed: of the subset and the random starts.
        batch_size: samples at a time; halved where memory runs out.
        bfloat16: search in bfloat16; verdicts are float32 all the same.
        votes: passes of a random forward whose majority is its prediction; left out, 15 for "rand"
            and 1 for the others.
        diagnose: take the findings, on up to 256 samples.
        folder: where to keep what has been found out, so that a killed evaluation goes on, and to
            write `evaluation.json` and `samples.csv`; left out, nothing is written.
        save_inputs: write the attacked images to `adversarial.safetensors` in `folder` too.
        progress: show a bar with the survivors.

    Raises:
        ValueError: images or eps outside [0,1], another norm, an iterable dataset, no samples;
            labels that are no class of the model; a model that returns probabilities or half
            precision, in float16, or under FSDP2; a folder with other samples or another model.
        RuntimeError: an attack claims an image outside its threat model.
    """
    started = time.perf_counter()
    cascade = stages(attack)
    balls = [(norm, float(eps)), *((ball, float(r)) for ball, r in (other_threats or {}).items())]
    threats = [Threat(radius, check_norm(ball), cascade) for ball, radius in balls]
    polish_threat = replace(threats[0], stages=stages(polish))
    for threat in (*threats, *(replace(polish_threat, eps=radius) for radius in curve)):
        check_eps(threat.eps, threat.norm)
    if save_inputs and folder is None:
        raise ValueError("save_inputs needs a folder to write to")
    dataset, loading = map_style(data)
    chosen = subset(len(dataset), samples, seed)  # type: ignore[arg-type]
    votes = (_VOTES if attack == "rand" else 1) if votes is None else votes
    if votes < 1:
        raise ValueError(f"votes must be >= 1, got {votes}")
    rank, world = rank_and_world()
    share = chosen[rank::world]
    rows = subset(len(chosen), _DIAGNOSED, seed) if diagnose else []
    diagnosed = frozenset(chosen[row] for row in rows)
    grid = sorted({float(radius) for radius in curve})
    columns: defaultdict[str, list[Any]] = defaultdict(list)
    with in_float32(model) as module, untouched(module):
        cache = _resume_cache(  # the curve and other threats have records of their own in it
            folder,
            module,
            chosen,
            threat=threats[0].key,
            attack=[describe(s) for s in cascade],
            seed=seed,
            votes=votes,
            bfloat16=bfloat16,
            images=save_inputs,
        )
        gather({})  # all have read what is there before anyone writes
        with _bar(len(share), eps, quiet=not progress or rank > 0) as bar:
            evaluator: Evaluator | None = None
            for block in batches(module, dataset, share, _BLOCK * batch_size, loading):
                evaluator = evaluator or Evaluator(
                    module,
                    _head(module, block.inputs),
                    cache,
                    threats[0],
                    seed,
                    batch_size,
                    keep_images=save_inputs,
                    votes=votes,
                    bfloat16=bfloat16,
                    callback=bar.callback,
                )
                found = _judge_block(
                    evaluator, block, threats, polish_threat, grid, diagnosed, save_inputs, bar
                )
                for name, values in found.items():
                    columns[name] += values
    columns["forwards"], columns["backwards"] = [cache.forwards], [cache.backwards]
    kept = gather({"image": columns.pop("image", [])}, everyone=False)
    merged = gather(columns)
    merged["forwards"].append(cache.read_forwards)
    merged["backwards"].append(cache.read_backwards)
    result = summarise(merged, threats, grid, seed, time.perf_counter() - started)
    if folder is not None and rank == 0:
        order = np.argsort(merged["index"], kind="stable").tolist()
        images = torch.stack([kept["image"][i] for i in order]) if save_inputs else None
        write_evaluation(result, Path(folder), images)
    return result


def _head(model: nn.Module, images: Tensor) -> Head | None:
    """The last linear map, if there is one; refuses a model that returns probabilities."""
    with torch.no_grad():
        check_logits(model(images[:8]))
    try:
        return find_head(model, images[:2])
    except ValueError:
        return None


class _Bar:
    """Progress: samples decided, passes the stage may still take, the running upper bound."""

    def __init__(self, bar: Any) -> None:
        self.bar, self.decided, self.survivors = bar, 0, 0
        self._text, self._shown = "", 0.0

    def count(self, verdicts: Sequence[int]) -> None:
        """Count samples whose verdict is final."""
        self.decided += len(verdicts)
        self.survivors += sum(verdict == -1 for verdict in verdicts)
        self.bar.update(len(verdicts))

    def begin(self, stage: str, among: int, undecided: int) -> None:
        """Say what runs, on how many survivors."""
        seen = self.decided + undecided
        bound = (self.survivors + among) / seen if seen else 1.0
        self._text = f"{stage}: {among} left, attacked accuracy <= {bound:.1%}"
        self.bar.set_postfix_str(self._text)

    def callback(self, *seen: Any) -> None:
        """Say how many passes the stage may still take; told of every look of an attack."""
        if time.perf_counter() - self._shown > 0.5:
            self._shown = time.perf_counter()
            self.bar.set_postfix_str(f"{self._text}, <= {seen[-1]:,} passes in this stage")


@contextmanager
def _bar(total: int, eps: float, quiet: bool) -> Iterator[_Bar]:
    title = f"attack {eps:.3g}"
    with tqdm(total=total, desc=title, unit="img", leave=False, disable=quiet) as bar:
        yield _Bar(bar)


def _judge_block(
    evaluator: Evaluator,
    block: Batch,
    threats: Sequence[Threat],
    polish: Threat,
    grid: Sequence[float],
    diagnosed: frozenset[int],
    images: bool,
    bar: _Bar,
) -> dict[str, list[Any]]:
    """Judge one block under every threat; one list per column, per sample."""
    attacked: Sequence[Tensor] = ()
    clean = evaluator.clean(block)
    right = clean["prediction"] == block.labels.cpu()
    correct = right.nonzero().flatten().tolist()
    n = len(block.indices)
    columns: Columns = {
        "index": torch.tensor(block.indices),
        "label": block.labels.cpu(),
        **{name: values for name, values in clean.items()},
        "attacked_prediction": clean["prediction"].clone(),
        "attacked_margin": torch.full((n,), torch.nan, dtype=torch.float64),
        "attacked_kappa": torch.full((n,), torch.nan, dtype=torch.float64),
    }
    for number, threat in enumerate(threats):
        found = evaluator.run_attacks(block, correct, threat, bar.begin if number == 0 else None)
        verdict = torch.full((n,), -2)
        if correct:
            verdict[correct] = found["verdict"]
        columns["verdict" if number == 0 else f"verdict {threat.key}"] = verdict
        if number == 0 and correct:
            attacked = [*found["image"]] if images else ()
            for name in ("prediction", "margin", "kappa"):
                columns[f"attacked_{name}"][correct] = found[name]
        if number == 0:
            bar.count(verdict.tolist())
    columns |= curve_columns(
        evaluator, block, correct, columns["verdict"], threats[0].eps, polish, grid
    )
    out = {name: values.tolist() for name, values in columns.items()}
    if images:
        out["image"] = [*block.inputs.cpu()]
        for row, image in zip(correct, attacked, strict=True):
            out["image"][row] = image
    rows = [row for row in correct if block.indices[row] in diagnosed]
    if rows:
        out |= _evidence(evaluator, block, rows, threats[0], columns["verdict"])
    return out


def _evidence(
    evaluator: Evaluator, block: Batch, rows: list[int], threat: Threat, verdict: Tensor
) -> dict[str, list[Any]]:
    def work(missing: list[int]) -> CachedWork:
        chosen = [rows[i] for i in missing]
        evaluator.seed_forward("evidence", block, chosen)
        return CachedWork(
            masking_checks(
                evaluator.model,
                block.inputs[chosen],
                block.labels[chosen],
                eps=threat.eps,
                norm=threat.norm,
                seed=evaluator.seed,
                indices=[block.indices[row] for row in chosen],
                survived=(verdict[chosen] == -1).to(block.labels.device),
                batch_size=evaluator.batch_size,
            )
        )

    evidence = evaluator.cache.rows("evidence", [block.indices[row] for row in rows], work)
    return {f"evidence.{name}": values.tolist() for name, values in evidence.items()}


def _resume_cache(
    folder: str | Path | None, model: nn.Module, chosen: Sequence[int], **settings: Any
) -> ResumeCache:
    """Records in `folder`, if there is one, of this model, these samples and settings."""
    if folder is None:
        return ResumeCache()
    weights = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        weights.update(name.encode())
        weights.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    samples = hashlib.sha256(np.asarray(chosen).tobytes()).hexdigest()[:16]
    layers = re.sub("0x[0-9a-f]+", "", repr(model))  # addresses change from process to process
    identity = {
        "model": weights.hexdigest()[:16],
        "layers": hashlib.sha256(layers.encode()).hexdigest()[:16],
        "samples": f"{len(chosen)} ({samples})",
        "versions": versions(),
        **settings,
    }
    return ResumeCache(Path(folder) / "state", identity)
