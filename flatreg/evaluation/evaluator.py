"""Judge a block of samples: who is right, and which stage of a cascade fools whom."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from flatreg.attacks.cascade import describe
from flatreg.attacks.eot import majority
from flatreg.attacks.options import Attack, Callback
from flatreg.attacks.query import QueriedModel, Surrogate
from flatreg.data.loading import Batch
from flatreg.evaluation.resume import CachedWork, Columns, ResumeCache
from flatreg.measures.linearised_margin import margin
from flatreg.measures.relative_flatness import relative_flatness
from flatreg.models.forward import run_forward
from flatreg.models.heads import Head
from flatreg.models.state import derived_seed, seed_streams
from flatreg.threat import Norm, check_within, per_sample, within

_CHECKED, _SAME = 8, 0.05  # samples passed again on resuming, and what TF32 may move a margin by


@dataclass(frozen=True)
class Threat:
    """A ball, and the attacks that search it."""

    eps: float
    norm: Norm
    stages: tuple[Attack, ...]

    @property
    def key(self) -> str:
        """Name of its records."""
        return f"{self.norm} {self.eps!r}"


class InBfloat16(Surrogate):
    """Search in bfloat16; what is found there is scored in float32."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits in float32."""
        with torch.autocast(inputs.device.type, torch.bfloat16):
            logits: Tensor = self.model(inputs)
        return logits.float()

    def verify(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Whether float32 says so too."""
        wrong: Tensor = self.model(inputs).argmax(1) != labels
        return wrong


@dataclass(frozen=True, eq=False)
class Evaluator:
    """What every verdict of an evaluation shares.

    Attributes:
        model: in float32, in eval mode.
        head: its last linear map, for kappa; None where it has none.
        journal: what has been found out.
        threat: the evaluation's own: only passes spent on it are counted.
        seed: of the attacks.
        batch_size: samples at a time.
        keep_images: keep the images that the evaluation's own threat ends with.
        votes: passes of a random forward whose majority is its prediction.
        bfloat16: search in bfloat16.
        callback: told of every look of an attack.
    """

    model: nn.Module
    head: Head | None
    cache: ResumeCache
    threat: Threat
    seed: int
    batch_size: int
    keep_images: bool = False
    votes: int = 1
    bfloat16: bool = False
    callback: Callback | None = None
    searched: nn.Module = field(init=False)

    def __post_init__(self) -> None:
        searched = InBfloat16(self.model) if self.bfloat16 else self.model
        object.__setattr__(self, "searched", searched)

    def clean(self, block: Batch) -> Columns:
        """Prediction, margin and kappa of every sample of a block as it is.

        Raises:
            ValueError: what the journal has is of other samples, or of another model.
        """
        digests = _digests(block)
        known = self.cache.knows("clean", block.indices)

        def work(rows: list[int]) -> CachedWork:
            self.seed_forward("clean", block, rows)
            scores = self.score(block.inputs[rows], block.labels[rows])
            return CachedWork(scores | {"digest": digests[rows]}, forwards=self.votes * len(rows))

        found = self.cache.rows("clean", block.indices, work)
        if not torch.equal(found["digest"], digests):
            raise ValueError(
                "the folder holds an evaluation of other images or labels under these indices: "
                "take another folder"
            )
        self._check_known(block, known[:_CHECKED], found["margin"])
        return {name: values for name, values in found.items() if name != "digest"}

    def _check_known(self, block: Batch, rows: list[int], margins: Tensor) -> None:
        """Refuse records of a model whose weights are the same and whose forward is not."""
        if not rows:
            return
        images, labels = block.inputs[rows], block.labels[rows]
        now, again = (self.score(images, labels)["margin"] for _ in range(2))
        slack = _SAME * float(now.abs().max())
        if float((now - again).abs().max()) > slack:
            return  # a random forward: nothing can be told
        if float((now - margins[rows]).abs().max()) > slack:
            raise ValueError(
                "the folder holds an evaluation of a model with these weights that computes other "
                "logits: take another folder"
            )

    def score(self, images: Tensor, labels: Tensor) -> Columns:
        """Prediction, margin, kappa (nan without a head), `(batch,)` on the CPU."""
        parts = list(
            QueriedModel(self.model, self.batch_size).in_parts(
                len(images), lambda rows: self._score(images[rows], labels[rows])
            )
        )
        return {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}

    def _score(self, images: Tensor, labels: Tensor) -> Columns:
        with torch.no_grad():
            passes = [run_forward(self.model, images, labels, self.head) for _ in range(self.votes)]
            kappas = [
                relative_flatness(p.features, p.logits, p.weight)
                if self.head
                else torch.full(labels.shape, torch.nan)
                for p in passes
            ]
            logits = torch.stack([p.logits for p in passes])
            classes = logits.shape[2]
            if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
                raise ValueError(
                    f"expected labels below the {classes} classes of the model, got labels from "
                    f"{int(labels.min())} to {int(labels.max())}"
                )
            broken = logits.isnan().any(2).any(0)  # no class at all: never right
            return {
                "prediction": torch.where(broken, -1, majority(logits)),
                "margin": margin(logits.mean(0), labels).double(),
                "kappa": torch.stack(kappas).mean(0).double(),
            }

    def run_attacks(
        self,
        block: Batch,
        among: Sequence[int],
        threat: Threat,
        begin: Callable[[str, int, int], None] | None = None,
    ) -> Columns:
        """Run a cascade on the samples `among` of a block.

        Args:
            block: of samples.
            among: positions in it.
            threat: the ball and the attacks.
            begin: told of each stage: its name, how many it runs on, how many the block has.

        Returns:
            For each of them the verdict (-1 survived, else the stage that fooled it), the score of
            the image that did or of the last one tried, and with `keep_images` the image.

        Raises:
            RuntimeError: an attack left its threat model.
        """
        out: Columns = {}
        alive = list(range(len(among)))
        for number, attack in enumerate(threat.stages):
            if not alive:
                break
            chosen = [among[i] for i in alive]
            if begin is not None:
                begin(describe(attack), len(chosen), len(block.indices))
            found = self.cache.rows(
                f"{threat.key} {number} {describe(attack)}",
                [block.indices[row] for row in chosen],
                partial(self._attack, block, chosen, threat, number),
            )
            fooled = found.pop("fooled")
            found["verdict"] = torch.where(fooled, number, -1)
            if not out:
                out = {name: values.clone() for name, values in found.items()}
            else:
                for name, values in found.items():
                    out[name][alive] = values
            alive = [i for i, hit in zip(alive, fooled.tolist(), strict=True) if not hit]
        return out

    def _attack(
        self, block: Batch, chosen: list[int], threat: Threat, number: int, missing: list[int]
    ) -> CachedWork:
        """Run one stage and score what it returns; claims that do not hold are not counted."""
        rows, attack = [chosen[i] for i in missing], threat.stages[number]
        inputs, labels = block.inputs[rows], block.labels[rows]
        self.seed_forward(f"{threat.key} {number}", block, rows)
        result = attack(
            self.searched,
            inputs,
            labels,
            eps=threat.eps,
            norm=threat.norm,
            seed=derived_seed(self.seed, number),
            indices=[block.indices[row] for row in rows],
            batch_size=self.batch_size,
            callback=self.callback,
        )
        claimed = result.fooled
        check_within(result.inputs[claimed], inputs[claimed], threat.eps, threat.norm)
        # Of a random forward a claim is one vote: what is not claimed is voted on as well.
        everyone = number == len(threat.stages) - 1 or self.votes > 1
        scored = torch.ones_like(claimed) if everyone else claimed
        images = result.inputs.to(inputs.dtype)
        stays = within(images, inputs, threat.eps, threat.norm)  # what fools nobody may stray
        images = torch.where(per_sample(stays, inputs).bool(), images, inputs)
        columns = {
            "fooled": (claimed | (self.votes > 1)).cpu(),
            "prediction": labels.cpu().clone(),
            "margin": torch.full(labels.shape, torch.nan, dtype=torch.float64),
            "kappa": torch.full(labels.shape, torch.nan, dtype=torch.float64),
        }
        if bool(scored.any()):
            scores = self.score(images[scored], labels[scored])
            for name, values in scores.items():
                columns[name][scored.cpu()] = values
            columns["fooled"] = columns["fooled"] & (columns["prediction"] != labels.cpu())
        if threat != self.threat:
            return CachedWork(columns)
        if self.keep_images:
            columns["image"] = images.cpu()
        forwards = result.forwards + self.votes * int(scored.sum())
        return CachedWork(columns, forwards, result.backwards)

    def seed_forward(self, what: str, block: Batch, rows: Sequence[int]) -> None:
        """Fix the stream a random forward draws from: for this work, and these samples."""
        key = [*what.encode(), self.seed, block.indices[rows[0]]]
        seed_streams(self.model, derived_seed(*key))


def _digests(block: Batch) -> Tensor:
    """What tells a sample, image and label, from another one `(n,)`."""
    found = []
    for image, label in zip(block.inputs.cpu().numpy(), block.labels.tolist(), strict=True):
        content = hashlib.sha256(image.tobytes() + b"label" + str(label).encode()).digest()
        found.append(int.from_bytes(content[:7], "big"))
    return torch.tensor(found)
