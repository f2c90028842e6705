"""Clean and attacked accuracy, with intervals and findings; the same in a training loop."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from flatreg.attacks.apgd import apgd
from flatreg.attacks.bpda import Modules, check_modules, with_bpda
from flatreg.attacks.cascade import describe, stages
from flatreg.attacks.options import Attack
from flatreg.attacks.spot_check import on_everyone
from flatreg.data.configuration import switch, whole
from flatreg.data.files import alone_in
from flatreg.data.loading import batches, map_style, subset
from flatreg.data.sharing import Batch, gather, rank_and_world, same_everywhere
from flatreg.evaluation.evaluator import Evaluator, Request
from flatreg.evaluation.findings import Checks, masking_checks
from flatreg.evaluation.progress import AttackProgress
from flatreg.evaluation.results import CurvePoint, Evaluation, versions, write_evaluation
from flatreg.evaluation.resume import CachedWork, ResumeCache, digest, forward_digest, level_digests
from flatreg.evaluation.spot_checks import run_spot_checks
from flatreg.evaluation.summary import SampleResults, summarise
from flatreg.models.entrance import check_classifier
from flatreg.models.forward import evaluated
from flatreg.models.heads import Head, find_head
from flatreg.threat import Threat, as_radii, check_norm

_CHECKED = 256  # samples the findings are taken on: their shares are known to 0.06
_BLOCK = 4  # batches held in memory at once: enough jobs to keep a batch full to the end
_VOTES = 15  # of a random forward
_MASKING = "masking checks with jumps"  # another name than that of records that lack a check

# Of the curve: the cheap half of the standard cascade.
CURVE_ATTACK: tuple[Attack, ...] = (
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
    curve_attack: str | Attack | Sequence[Attack] = CURVE_ATTACK,
    other_threats: Mapping[str, float] | None = None,
    seed: int = 0,
    batch_size: int = 256,
    bfloat16: bool = False,
    votes: int | None = None,
    bpda: Modules = (),
    diagnose: bool = True,
    folder: str | Path | None = None,
    save_inputs: bool = False,
    progress: bool = True,
) -> Evaluation:
    """Clean accuracy and attacked accuracy under a cascade, with findings.

    Gradients, buffers, modes, requires_grad flags and every random stream are left as they were.
    Where a process group exists the samples are shared out, and before each attack those that
    survive are shared out anew; every process returns the whole result. Random starts are keyed by
    sample, so the sharing does not change them.

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
        curve_attack: tried at each eps of the curve on the samples that a minimal-norm pass leaves
            undecided; left out, APGD-50 on two losses, which makes the curve a looser bound than
            `attacked`.
        other_threats: other threats to report, as norm to eps, by the same cascade.
        seed: of the subset and the random starts.
        batch_size: samples at a time; halved where memory runs out.
        bfloat16: search in bfloat16; verdicts are float32 all the same.
        votes: passes of a random forward whose majority is its prediction; left out, 15 for "rand"
            and 1 for the others.
        bpda: names or classes of modules whose gradients hide what is there. The stages that follow
            gradients run a second time, with the identity in the backward pass of these modules, or
            with the module that a mapping gives for it; verdicts are the model's own. See
            `flatreg.attacks.bpda`.
        diagnose: take the findings about masked gradients too, on up to 256 samples.
        folder: where to keep the resume cache, so that a killed evaluation goes on, and to write
            `evaluation.json` and `samples.csv`; left out, nothing is written.
        save_inputs: write the attacked images to `adversarial.safetensors` in `folder` too.
        progress: show a bar with the survivors so far.

    Raises:
        TypeError: eps is no number, `curve` no grid of them, `other_threats` no mapping; `bpda` is
            one name; a stage of `attack` is no function or returns no
            `flatreg.attacks.AttackResult`.
        ValueError: images or eps outside [0,1], another norm, an iterable dataset, no samples;
            `bpda` as in `flatreg.attacks.bpda`; labels that are no class of the model; a model that
            returns probabilities or half precision, in float16, or under FSDP2; data that gives
            another image when a spot check reads a sample again; an attack that leaves another
            mode; a folder with other samples or another model, or which another evaluation writes.
        OSError: `folder` cannot be written.
        RuntimeError: an attack reports an image outside its ball as fooling; a pass mixes dtypes.
    """
    started = time.perf_counter()
    own = Threat(norm=check_norm(norm), eps=eps, attacks=with_bpda(stages(attack), bpda))
    at_curve = with_bpda(on_everyone(stages(curve_attack)), bpda)
    if switch("save_inputs", save_inputs) and folder is None:
        raise ValueError("save_inputs needs a folder to write to")
    place = folder if folder is None else Path(folder).absolute()  # a model may change directory
    votes = (_VOTES if attack == "rand" else 1) if votes is None else votes
    votes, batch_size = whole("votes", votes, 1), whole("batch_size", batch_size, 1)
    dataset, available, loading = map_style(data)
    chosen = same_everywhere(subset(available, samples, seed))
    # A random subset: of a dataset sorted by class, the first samples would all be of one.
    checked = frozenset(subset(chosen, _CHECKED, seed) if switch("diagnose", diagnose) else ())
    request = Request(
        threats=(own, *_others(own, other_threats or {})),
        curve=tuple(replace(own, eps=r, attacks=at_curve) for r in as_radii("curve", curve, norm)),
        checked=checked,
        seed=seed,
        batch_size=batch_size,
        votes=votes,
        bfloat16=switch("bfloat16", bfloat16),
        keep_images=save_inputs,
    )
    rank, world = rank_and_world()
    mine, watched = chosen[rank::world], (request.threats, request.curve, len(checked))
    classes, waiting, blocks = 0, _Waiting(), list[SampleResults]()
    with (
        nullcontext() if place is None else alone_in(place, rank == 0),
        evaluated(model) as module,
        AttackProgress(len(mine), *watched, shown=progress and rank == 0) as shown,
    ):
        check_modules(module, bpda)
        cache, evaluator = _resume_cache(place, module, chosen, request), None
        gather({})  # all have read what is there before anyone writes
        fetch = partial(batches, module, dataset, batch_size=_BLOCK * batch_size, loading=loading)
        for part in _parts(mine, -(-len(chosen) // world), _BLOCK * batch_size):
            for block in waiting.over(fetch(part)):
                if evaluator is None:  # a head is found by passing images, and the first are here
                    classes, head = _outputs(module, block.inputs)
                    together = len(chosen) >= world  # each has a sample, so that each knows a head
                    evaluator = Evaluator(request, module, head, cache, shown, together)
                blocks.append(_of_block(evaluator, block))
        # A process without samples takes part as well: it learns whether others go on.
        evaluator = evaluator or Evaluator(request, module, None, cache, shown)
        run_spot_checks(evaluator, blocks, fetch)
        found = SampleResults.gathered(blocks)
        own_work = {"forwards": [cache.forwards], "backwards": [cache.backwards]}
        spent = gather(own_work | {"classes": [classes], "waiting": [waiting.seconds]})
        result = summarise(
            found,
            request,
            classes=max(spent["classes"]),  # 0 where a process has no samples
            # Every process has read all records: what these took is added once.
            forwards=sum(spent["forwards"]) + cache.read_forwards,
            backwards=sum(spent["backwards"]) + cache.read_backwards,
            seconds=time.perf_counter() - started,
        )
        result = replace(result, waiting_seconds=max(spent["waiting"]))
        if place is not None and rank == 0:
            write_evaluation(result, place, found.images)
    return result


def _others(own: Threat, other_threats: Mapping[str, float]) -> list[Threat]:
    if not isinstance(other_threats, Mapping):
        raise TypeError(
            "other_threats: expected a norm and its eps, as {'l2': 0.5}, got "
            f"{other_threats!r:.60}"
        )
    return [replace(own, norm=check_norm(norm), eps=eps) for norm, eps in other_threats.items()]


def accuracy_curve(
    model: nn.Module,
    data: Dataset[Any] | DataLoader[Any],
    *,
    eps: Sequence[float],
    norm: str = "linf",
    attack: str | Attack | Sequence[Attack] = CURVE_ATTACK,
    **options: Any,
) -> list[CurvePoint]:
    """Attacked accuracy at each eps of a grid; monotone by construction.

    One minimal-norm pass finds the distance at which each sample is fooled; `attack` then tries,
    at each eps, the samples that are still undecided.

    Args:
        model: as in `evaluate`.
        data: as in `evaluate`.
        eps: the grid, in [0,1] pixel units.
        norm: "linf", "l2" or "l1".
        attack: for the undecided samples; left out, APGD-50 on two losses. "standard" makes every
            point as strong a bound as `evaluate` gives, at its price.
        **options: as in `evaluate`.

    Raises:
        TypeError: eps is one number, or a grid of something else; `curve_attack` is given.
        ValueError: no eps; otherwise as in `evaluate`.
    """
    if "curve_attack" in options:
        raise TypeError("accuracy_curve: expected attack=, got curve_attack=")
    radii = as_radii("eps", eps, norm)
    if not radii:
        raise ValueError("eps must have at least one radius, got none")
    options |= dict(norm=norm, attack=attack, curve_attack=attack, diagnose=False)
    return evaluate(model, data, eps=radii[-1], curve=radii, **options).curve


class AttackedAccuracy:
    """Hook for a training loop: attacked accuracy every few epochs; the training goes on unchanged.

    Args:
        data: as in `evaluate`: neither training images nor, where it decides anything, the test
            split.
        eps: radius in [0,1] pixel units.
        norm: "linf", "l2" or "l1".
        every: epochs between evaluations; the last of each `every` is evaluated.
        samples: size of the fixed subset.
        attack: as in `evaluate`; the default takes four passes forward and two backward an image
            on a model that is not robust.
        seed: of the subset and the random starts.
        batch_size: samples at a time.

    Raises:
        ValueError: as in `evaluate`, of the arguments; `every` is below 1.

    Attributes:
        history: (epoch, result) of every evaluation so far.
        seconds: all of them took.
    """

    def __init__(
        self,
        data: Dataset[Any] | DataLoader[Any],
        *,
        eps: float,
        norm: str = "linf",
        every: int = 1,
        samples: int | None = 1000,
        attack: str | Attack | Sequence[Attack] = "fast",
        seed: int = 0,
        batch_size: int = 256,
    ) -> None:
        # Here, and not in the first epoch that is evaluated.
        Threat(norm=check_norm(norm), eps=eps, attacks=stages(attack))
        subset(map_style(data)[1], samples, seed)
        self.data, self.every = data, whole("every", every, 1)
        self.settings: dict[str, Any] = dict(
            eps=eps, norm=norm, samples=samples, attack=attack, seed=seed, batch_size=batch_size
        )
        self.history: list[tuple[int, Evaluation]] = []
        self.seconds, self._since = 0.0, time.perf_counter()

    @property
    def share_of_time(self) -> float:
        """Share of the time since the hook was made that it has taken, in [0, 1]."""
        return self.seconds / max(self.seconds, time.perf_counter() - self._since)

    def __call__(self, model: nn.Module, epoch: int) -> Evaluation | None:
        """Evaluate `model` after `epoch` (counted from 0) if it is due.

        Raises:
            TypeError: these are no model and no epoch.
            ValueError: as in `evaluate`.
        """
        if not isinstance(model, nn.Module) or not hasattr(epoch, "__index__"):
            raise TypeError(
                "expected hook(model, epoch), a module and the epoch counted from 0, got "
                f"({type(model).__name__}, {type(epoch).__name__})"
            )
        if (epoch + 1) % self.every:
            return None
        result = evaluate(model, self.data, **self.settings, diagnose=False, progress=False)
        self.history.append((epoch, result))
        self.seconds += result.seconds
        return result


class _Waiting:
    """Seconds in which batches were waited for."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def over(self, fetched: Iterable[Batch]) -> Iterator[Batch]:
        """The batches, and the time until each is there is counted."""
        since = time.perf_counter()
        for batch in fetched:
            self.seconds += time.perf_counter() - since
            yield batch
            since = time.perf_counter()


def _parts(mine: list[int], longest: int, size: int) -> list[list[int]]:
    """Samples of a process, in parts: blocks of `size` are as many as of the longest share.

    Processes share out the survivors of each block, so that all must have as many blocks. Shares
    differ by one sample at most.
    """
    fewer = -(-len(mine) // size) < -(-longest // size)
    return [mine[:-1], mine[-1:]] if fewer and len(mine) > 1 else [mine]


def _outputs(model: nn.Module, images: Tensor) -> tuple[int, Head | None]:
    """Number of classes, and the last linear map, if there is one; no logits are refused."""
    classes = check_classifier(model, images)
    try:
        return classes, find_head(model, images[:2])
    except ValueError:
        return classes, None


def _of_block(evaluator: Evaluator, block: Batch) -> SampleResults:
    """Evaluate one block under every threat and at every eps of the curve, and check it."""
    clean = evaluator.clean(block)
    right = clean["prediction"] == block.labels.cpu()
    own, *others = evaluator.request.threats
    attacked = evaluator.run_attacks(block, right, own)
    evaluator.progress.decide(attacked["verdict"].tolist())
    verdicts = [
        # The own threat may be named again: its passes are counted once.
        (attacked if threat == own else evaluator.run_attacks(block, right, threat))["verdict"]
        for threat in others
    ]
    return SampleResults(
        index=torch.tensor(block.indices),
        label=block.labels.cpu(),
        digest=level_digests(block),
        **clean,
        attacked_prediction=torch.where(right, attacked["prediction"], clean["prediction"]),
        attacked_margin=attacked["margin"],
        attacked_kappa=attacked["kappa"],
        verdicts=torch.stack([attacked["verdict"], *verdicts]),
        survives=evaluator.survivors_by_eps(block, right, attacked["verdict"]),
        checks=_checks(evaluator, block, right, attacked["verdict"]),
        images=attacked.get("image"),
    )


def _checks(evaluator: Evaluator, block: Batch, right: Tensor, verdict: Tensor) -> Checks:
    """Masking checks of the samples of a block that are to be checked and were right."""
    request = evaluator.request
    among = right & torch.tensor([index in request.checked for index in block.indices])
    rows = among.nonzero().flatten()
    indices = [block.indices[row] for row in rows.tolist()]
    missing, work = evaluator.cache.missing(_MASKING, indices), None
    if missing:
        chosen = rows[missing]
        # "evidence" names the random stream: another word would change stored results.
        evaluator.seed_forward("evidence", block, int(chosen[0]))
        checks = masking_checks(
            evaluator.model,
            Batch([indices[i] for i in missing], block.inputs[chosen], block.labels[chosen]),
            request.threat,
            seed=request.seed,
            survived=(verdict[chosen] == -1).to(block.labels.device),
            batch_size=request.batch_size,
            callback=evaluator.progress.begin_checks(len(chosen)),
        )
        work = CachedWork({name: values.cpu() for name, values in checks.items()})
    return evaluator.cache.rows(_MASKING, indices, work)


def _resume_cache(
    folder: Path | None, model: nn.Module, chosen: Sequence[int], request: Request
) -> ResumeCache:
    """Records in `folder`, if there is one, of this model, these samples and this request."""
    if folder is None:
        return ResumeCache()
    layers = re.sub("0x[0-9a-f]+", "", repr(model))  # addresses change from process to process
    # The curve and other threats are not part of it: they have records of their own, and one
    # evaluation can be grown by them.
    identity = {
        "model": digest(dict(model.state_dict())),
        "layers": digest(layers),
        "forward": forward_digest(model),
        "samples": f"{len(chosen)} ({digest(np.asarray(chosen))})",
        "versions": versions(),
        "threat": request.threat.key,
        "attack": [describe(attack) for attack in request.threat.attacks],
        "settings": digest(request.threat.attacks),
        "seed": request.seed,
        "votes": request.votes,
        "bfloat16": request.bfloat16,
        "images": request.keep_images,
    }
    return ResumeCache(folder / "state", identity)
