"""Judge a block of samples: who is classified right, and which attack of a cascade fools whom."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import torch
from torch import Tensor, nn

from flatreg.attacks.cascade import attack_rows, describe
from flatreg.attacks.eot import majority
from flatreg.attacks.fmn import fmn
from flatreg.attacks.options import Attack
from flatreg.attacks.query import QueriedModel, Surrogate
from flatreg.attacks.spot_check import checked_attack
from flatreg.data.files import ELSEWHERE
from flatreg.data.sharing import Batch, in_equal_shares
from flatreg.evaluation.progress import AttackProgress
from flatreg.evaluation.resume import CachedWork, Columns, ResumeCache, digest, sample_digests
from flatreg.measures.linearised_margin import margin
from flatreg.measures.relative_flatness import relative_flatness
from flatreg.models.entrance import as_labels, check_finite, logits_of
from flatreg.models.forward import run_forward
from flatreg.models.heads import Head
from flatreg.models.state import accelerators, derived_seed, modes_of
from flatreg.threat import Norm, Threat, check_within, distance, per_sample, within

_CHECKED, _SAME = 8, 0.05  # samples passed again on resuming, and what TF32 may move a margin by
_STEPS, _STREAM = 100, 1000  # of the minimal-norm pass; its seed is no stage's


@dataclass(frozen=True, kw_only=True)
class Request:
    """What an evaluation is asked for.

    Attributes:
        threats: the evaluation's own, then the others that it reports.
        curve: a threat for each eps of the curve, the eps rising.
        checked: dataset indices of the samples on which the masking checks are taken.
        seed: of the attacks.
        batch_size: samples at a time.
        votes: passes of a random forward whose majority is its prediction.
        bfloat16: search in bfloat16.
        keep_images: keep the images that the evaluation's own threat ends with.
    """

    threats: tuple[Threat, ...]
    curve: tuple[Threat, ...]
    checked: frozenset[int]
    seed: int
    batch_size: int
    votes: int
    bfloat16: bool
    keep_images: bool

    @property
    def threat(self) -> Threat:
        """The evaluation's own: only the passes spent on it are counted."""
        return self.threats[0]


class InBfloat16(Surrogate):
    """Search in bfloat16; what is found there is scored in float32."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits in float32."""
        with torch.autocast(inputs.device.type, torch.bfloat16):
            logits = logits_of(self.model, inputs)
        return logits.float()

    def verify(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Whether float32 says so too."""
        return logits_of(self.model, inputs).argmax(1) != labels


@dataclass(frozen=True, eq=False)
class Evaluator:
    """A model, what is asked about it, and what is known already.

    Attributes:
        request: what is asked.
        model: in float32, in eval mode.
        head: its last linear map, for kappa; None where it has none.
        cache: what has been found out.
        progress: bar.
        together: whether all processes of a launch judge a block at the same time, and share out
            the samples that survive.
    """

    request: Request
    model: nn.Module
    head: Head | None
    cache: ResumeCache
    progress: AttackProgress
    together: bool = False

    @cached_property
    def searched(self) -> nn.Module:
        """What attacks see: the model, or its search in bfloat16."""
        return InBfloat16(self.model) if self.request.bfloat16 else self.model

    def clean(self, block: Batch) -> Columns:
        """Prediction, margin and kappa of every sample of a block as it is.

        Raises:
            ValueError: the records are of other samples, or of another model.
        """
        digests = sample_digests(block)
        missing, work = self.cache.missing("clean", block.indices), None
        if missing:
            self.seed_forward("clean", block, missing[0])
            scores = self.score(block.inputs[missing], block.labels[missing])
            forwards = self.request.votes * len(missing)
            work = CachedWork(scores | {"digest": digests[missing]}, forwards)
        found = self.cache.rows("clean", block.indices, work)
        if not torch.equal(found["digest"], digests):
            raise ValueError(
                "the folder holds an evaluation of other images or labels under these indices: "
                f"{ELSEWHERE}"
            )
        known = sorted(set(range(len(digests))) - set(missing))
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
            return  # a random forward: its margins cannot be compared
        if float((now - margins[rows]).abs().max()) > slack:
            raise ValueError(
                "the folder holds an evaluation of a model with these weights that computes other "
                f"logits: {ELSEWHERE}"
            )

    def score(self, images: Tensor, labels: Tensor) -> Columns:
        """Prediction, margin, kappa (nan without a head), `(batch,)` on the CPU."""
        parts = list(
            QueriedModel(self.model, self.request.batch_size).in_parts(
                len(images), lambda rows: self._score(images[rows], labels[rows])
            )
        )
        return {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}

    def _score(self, images: Tensor, labels: Tensor) -> Columns:
        with torch.no_grad():
            passes = [
                run_forward(self.model, images, labels, self.head)
                for _ in range(self.request.votes)
            ]
            kappas = [
                relative_flatness(p.features, p.logits, p.weight)
                if self.head
                else torch.full(labels.shape, torch.nan)
                for p in passes
            ]
            logits = torch.stack([p.logits for p in passes])
            check_finite(logits.flatten(0, 1), self.model)
            as_labels(labels, *logits.shape[1:])
            return {
                "prediction": majority(logits),
                "margin": margin(logits.mean(0), labels).double(),
                "kappa": torch.stack(kappas).mean(0).double(),
            }

    def run_attacks(self, block: Batch, among: Tensor, threat: Threat) -> Columns:
        """Run a cascade on the samples `among` of a block, all but a spot check at its end.

        Args:
            block: of samples.
            among: which of them to attack `(n,)`, booleans on the CPU.
            threat: the ball and the attacks.

        Returns:
            `(n,)` on the CPU: "verdict" (-2 not attacked, -1 survived, else the number of the
            attack that fooled it); "prediction", "margin" and "kappa" at the image that fooled it,
            or at the last one tried (of samples not attacked -1, nan and nan); and under the
            evaluation's own threat, with `keep_images`, this "image".

        Raises:
            RuntimeError: an attack left its threat model.
        """
        own, n = threat == self.request.threat, len(block.indices)
        columns = _unscored(n)
        if own and self.request.keep_images:
            columns["image"] = block.inputs.cpu().clone()

        verdict = torch.where(among, -1, -2)
        for number in range(_unconditional(threat)):
            rows = (verdict == -1).nonzero().flatten()
            found = self.run_stage(block, rows, threat, number)
            if not len(rows):
                continue  # another process may have survivors, some of which are attacked here
            for name, values in columns.items():
                values[rows] = found[name]
            verdict[rows[found["fooled"]]] = number
        return columns | {"verdict": verdict}

    def run_stage(self, block: Batch, rows: Tensor, threat: Threat, number: int) -> Columns:
        """Run one stage on the samples `rows` of a block, with a spot check's attack on all these.

        Args:
            block: of samples.
            rows: positions in it `(rows,)`.
            threat: the ball and the attacks.
            number: of the stage.

        Returns:
            `(rows,)` on the CPU: "fooled", and the columns of `run_attacks`.
        """
        attack = _attack_of(threat, number)
        if len(rows):
            self.progress.begin(threat, number, len(rows), len(block.indices))
        # Long settings look alike in words.
        exact = digest(attack) if self.cache.folder else id(attack)
        key = f"{threat.key} {number} {describe(attack)} {exact}"
        run = partial(self._attack, threat=threat, number=number)
        return self._found(key, block, rows, run)

    def _found(
        self, key: str, block: Batch, rows: Tensor, run: Callable[[Batch], CachedWork]
    ) -> Columns:
        """Columns of `rows`: what is not known is found by `run`, in equal shares of all processes.

        Attacks cost most on those that survive, and a process may have more of them than others.
        """
        indices = [block.indices[row] for row in rows.tolist()]
        missing = self.cache.missing(key, indices)
        chosen = rows[missing]
        asked = Batch([indices[m] for m in missing], block.inputs[chosen], block.labels[chosen])

        def compute(batch: Batch) -> Columns:
            work = run(batch)
            self.cache.keep(key, batch.indices, work)
            return work.columns

        if self.together:
            columns = in_equal_shares(asked, compute)
        else:
            columns = compute(asked) if missing else {}
        return self.cache.joined(key, indices, columns if missing else None)

    def _attack(self, block: Batch, threat: Threat, number: int) -> CachedWork:
        """Run one attack on a block and score the images it returns."""
        request, inputs, labels = self.request, block.inputs, block.labels
        self.seed_forward(f"{threat.key} {number}", block)
        modes = modes_of(self.model)
        result = attack_rows(
            _attack_of(threat, number),
            self.searched,
            block,
            torch.arange(len(labels)),
            eps=threat.eps,
            norm=threat.norm,
            # A stream a stage: a later attack must not start where an earlier one started.
            seed=derived_seed(request.seed, number),
            batch_size=request.batch_size,
            callback=self.progress.callback,
        )
        if modes_of(self.model) != modes:  # its statistics have moved as well
            raise ValueError(
                f"{describe(threat.attacks[number])}: expected an attack that leaves the model in "
                "eval mode, it left a part of it in another"
            )
        reported = result.fooled
        check_within(result.inputs[reported], inputs[reported], threat.eps, threat.norm)
        # Which images are scored: those reported as fooled, whose report may not hold; after the
        # last attack that all survivors meet all, because a survivor's last image is part of the
        # result; and all images of a random forward, because a report about it rests on one pass
        # and not on the majority.
        last = number >= _unconditional(threat) - 1
        scored = torch.ones_like(reported) if last or request.votes > 1 else reported
        # Of survivors the attack may return an image outside the ball: their clean image stands
        # for it.
        images = result.inputs.to(inputs.dtype)
        inside = within(images, inputs, threat.eps, threat.norm)
        images = torch.where(per_sample(inside, inputs).bool(), images, inputs)
        columns = _unscored(len(labels)) | {
            "fooled": torch.zeros(len(labels), dtype=torch.bool),
            "prediction": labels.cpu().clone(),
        }
        if bool(scored.any()):
            for name, values in self.score(images[scored], labels[scored]).items():
                columns[name][scored.cpu()] = values
            columns["fooled"] = columns["prediction"] != labels.cpu()
            if request.votes == 1:
                # A survivor whose last image is wrong in this pass (other kernels round otherwise
                # on another batch size) stays a survivor: the search is what decides.
                columns["fooled"] &= reported.cpu()
        if threat != request.threat:
            return CachedWork(columns)  # passes on other threats are not part of the count
        if request.keep_images:
            columns["image"] = images.cpu()
        forwards = result.forwards + request.votes * int(scored.sum())
        return CachedWork(columns, forwards, result.backwards)

    def survivors_by_eps(self, block: Batch, correct: Tensor, verdict: Tensor) -> Tensor:
        """Which samples survive at each eps of the curve, `(eps, n)` booleans on the CPU.

        It is monotone by construction, because a ball contains every smaller one: a sample fooled
        in the smaller counts as fooled in the larger, one that survived the larger counts as a
        survivor of the smaller. The minimal-norm pass gives each sample a distance at which it is
        fooled. From the largest eps down, the attacks of the curve then run only on the samples
        that have not survived at a larger eps and are not known to be fooled within this one.

        Args:
            block: of samples.
            correct: which are classified right `(n,)`, booleans on the CPU.
            verdict: of each under the evaluation's own threat, as in `Evaluation`.
        """
        curve, own = self.request.curve, self.request.threat
        survived = torch.zeros_like(correct)
        fooled_at = torch.full(verdict.shape, torch.inf, dtype=torch.float64)
        if any(threat.eps != own.eps for threat in curve):
            fooled_at[correct] = self._distances(block, correct.nonzero().flatten(), own.norm)
        # The cascade has shown at which eps these are fooled, whatever the minimal-norm pass found.
        fooled_at = torch.where(verdict >= 0, fooled_at.clamp_max(own.eps), fooled_at)
        rows = []
        for threat in reversed(curve):
            if threat.eps <= own.eps:
                survived = survived | (verdict == -1)
            undecided = correct & ~survived & (fooled_at > threat.eps)
            survived = survived | (self.run_attacks(block, undecided, threat)["verdict"] == -1)
            rows.append(survived)
        return torch.stack(rows[::-1]) if rows else survived.new_empty((0, len(survived)))

    def _distances(self, block: Batch, rows: Tensor, norm: Norm) -> Tensor:
        """Distance of the closest adversarial image found, infinite where none was, `(rows,)`."""

        def run(batch: Batch) -> CachedWork:
            self.seed_forward("distances", batch)
            result = fmn(
                self.searched,
                batch.inputs,
                batch.labels,
                norm=norm,
                steps=_STEPS,
                seed=derived_seed(self.request.seed, _STREAM),
                indices=batch.indices,
                batch_size=self.request.batch_size,
                callback=self.progress.callback,
            )
            wrong = self.score(result.inputs, batch.labels)["prediction"] != batch.labels.cpu()
            length = distance(result.inputs, batch.inputs, norm).cpu()
            fooled = wrong & result.fooled.cpu()
            return CachedWork({"distance": torch.where(fooled, length, torch.inf)})

        found = self._found(f"{norm} distances", block, rows, run)
        return found["distance"] if len(rows) else torch.empty(0, dtype=torch.float64)

    def seed_forward(self, what: str, block: Batch, first: int = 0) -> None:
        """Fix the stream a random forward draws from: for this work, from this sample on."""
        seed = derived_seed(*what.encode(), self.request.seed, block.indices[first])
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)  # and those of the model's devices, no others
        for device in accelerators(self.model):
            module = torch.get_device_module(device)
            with getattr(module, "device", nullcontext)(device):  # MPS has one, and no context
                module.manual_seed(seed)


def _attack_of(threat: Threat, number: int) -> Attack:
    """What a stage runs: of a spot check, its attack."""
    stage = threat.attacks[number]
    return checked_attack(stage) or stage


def _unconditional(threat: Threat) -> int:
    """How many of its attacks run on every survivor: all but a spot check at the end."""
    return len(threat.attacks) - (checked_attack(threat.attacks[-1]) is not None)


def _unscored(n: int) -> Columns:
    """Columns of `Evaluator.score` for samples without a score."""
    unknown = torch.full((n,), torch.nan, dtype=torch.float64)
    return {"prediction": torch.full((n,), -1), "margin": unknown, "kappa": unknown.clone()}
