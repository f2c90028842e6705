"""The steps of one epoch, from where it was left: batches, updates, and what is watched of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.data_loader import skip_first_batches
from accelerate.utils import gather_object
from timm.data import Mixup
from timm.data.mixup import mixup_target
from timm.utils import dispatch_clip_grad
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from flatreg.data.images import ImageArrays, Splits, augment
from flatreg.data.loading import told_in_a_line
from flatreg.evaluation.findings import make_finding
from flatreg.models.entrance import non_finite_buffer, non_finite_weight
from flatreg.models.state import RandomStreams, accelerators, derived_seed, random_streams
from flatreg.optimizers.passes import backward
from flatreg.run.build import Training
from flatreg.run.checkpoints import Epoch, Position
from flatreg.run.interrupt import HeldSignals, Interrupted
from flatreg.run.recipe import Recipe
from flatreg.terms.objective import Objective
from flatreg.threat import to_unit_range

Batch = tuple[Tensor, Tensor]


def augmented(recipe: Recipe, splits: Splits) -> Callable[[Tensor, Tensor, int], Batch]:
    """Function from stored images, labels and a seed to a batch in [0,1].

    It draws from the seed alone: arms whose terms draw too see the same images as the others. Soft
    labels are probabilities. Images that stream were mirrored where they were decoded.
    """
    spec, num_classes = recipe.augment, splits.num_classes
    smoothing, flip = spec.label_smoothing, spec.flip and isinstance(splits.train, ImageArrays)
    mix = Mixup(spec.mixup, spec.cutmix, label_smoothing=smoothing, num_classes=num_classes)

    def batch(images: Tensor, labels: Tensor, seed: int) -> Batch:
        generator = torch.Generator(images.device).manual_seed(seed)
        inputs = augment(to_unit_range(images), crop=spec.crop, flip=flip, generator=generator)
        if spec.mixes:  # in place, and what is stored as floats may still be what came in
            state = np.random.get_state()  # timm draws from numpy's own stream
            np.random.seed(seed)
            inputs, labels = mix(inputs.clone() if inputs is images else inputs, labels)
            np.random.set_state(state)
        elif smoothing:
            labels = mixup_target(labels, num_classes, 1.0, smoothing)
        if spec.noise:
            noise = torch.empty_like(inputs).uniform_(-spec.noise, spec.noise, generator=generator)
            inputs = (inputs + noise).clamp(0, 1)
        return inputs, labels

    return batch


@dataclass(kw_only=True)
class EpochSoFar:
    """What this process has of an epoch: see `Position`; its streams, where they are restored."""

    epoch: int
    taken: int = 0
    seconds: float = 0.0
    skipped: int = 0
    in_a_row: int = 0
    totals: dict[str, Tensor] = field(default_factory=dict)
    waiting_seconds: float = 0.0
    streams: RandomStreams | None = None

    @staticmethod
    def at(position: Position, model: nn.Module, accelerator: Accelerator) -> EpochSoFar:
        """The share of this process in a saved position.

        If the number of processes is another one now, each takes the mean of the sums, and no
        stream.
        """
        plain, sums, rank = position._asdict(), position.totals, accelerator.process_index
        streams = plain.pop("streams")
        same = len(sums) == accelerator.num_processes
        mean = {part: torch.stack([one[part] for one in sums]).mean(0) for part in sums[0]}
        totals = sums[rank] if same else mean
        plain["totals"] = {part: total.to(accelerator.device) for part, total in totals.items()}
        own = _from_plain(streams[rank], model) if same else None
        return EpochSoFar(**plain, streams=own)

    def add(self, numbers: Mapping[str, Tensor]) -> None:
        """Add to the sums, on the device: reading a number in every step would wait for it."""
        for part, value in numbers.items():
            self.totals[part] = self.totals.get(part, torch.zeros_like(value)) + value

    def position(self, model: nn.Module) -> Position:
        """The position of all processes, between two updates; every one must call."""
        totals = {part: total.cpu() for part, total in self.totals.items()}
        shares = gather_object([(totals, _as_plain(random_streams(model)))])
        own = (self.epoch, self.taken, self.seconds, self.skipped, self.in_a_row)
        totals_of_all, streams_of_all = (list(column) for column in zip(*shares, strict=True))
        return Position(*own, totals_of_all, streams_of_all, self.waiting_seconds)


def _as_plain(streams: RandomStreams) -> dict[str, Any]:
    """The states as tensors, numbers and strings alone, for a file that holds no code."""
    name, keys, *rest = streams.numpy
    return {
        "cpu": streams.cpu,
        "on_device": list(streams.on_device.values()),
        "numpy": (name, keys.tolist(), *rest),
        "python": streams.python,
    }


def _from_plain(plain: dict[str, Any], model: nn.Module) -> RandomStreams:
    """Inverse of `_as_plain`; states of devices go to those of the parameters of `model`."""
    devices = zip(accelerators(model), plain["on_device"], strict=False)
    name, keys, *rest = plain["numpy"]
    numpy_state = (name, np.array(keys, dtype=np.uint32), *rest)
    return RandomStreams(plain["cpu"], dict(devices), numpy_state, plain["python"])


def _record_buffers(model: nn.Module) -> Callable[[], None]:
    """Record the values of the buffers; calling the result puts them back."""
    values = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]

    def restore() -> None:
        with torch.no_grad():
            for buffer, value in values:
                buffer.copy_(value)

    return restore


class Pauses:
    """When, between two updates, all processes save a training, and whether it then ends."""

    def __init__(
        self,
        accelerator: Accelerator,
        held: HeldSignals,
        minutes: float,
        save: Callable[[Position], None],
    ) -> None:
        self._accelerator, self._held, self._save = accelerator, held, save
        self._seconds, self._number = 60 * minutes, 0
        self.saved = self._asked = time.monotonic()
        self._asked_at: int | None = None  # an update
        self._ask_at = 0

    def due(self, update: int, *, at_once: bool) -> bool:
        """Whether to save after this update: the time is over, or a signal came to any process.

        Several processes ask each other about once a second, or `at_once`, at the same updates.
        """
        now = time.monotonic()
        late, number = now - self.saved >= self._seconds, self._held.number
        if self._accelerator.num_processes > 1:
            if update < self._ask_at and not at_once:
                return False
            # The first update of a session is no measure: it may be any, and starts up.
            since = None if self._asked_at is None else update - self._asked_at
            pace = (now - self._asked) / since if since else 1.0
            mine = torch.tensor([[number, late, pace]], device=self._accelerator.device)
            number, late, pace = self._accelerator.gather(mine).amax(0).tolist()
            self._asked, self._asked_at = now, update
            self._ask_at = update + max(1, int(1 / max(pace, 1e-6)))
        self._number = int(number)
        return bool(late or number)

    def take(self, position: Position) -> None:
        """Save the position, and end the training if a signal asked for it.

        Raises:
            Interrupted: one did.
        """
        with self._held.writing():
            self._save(position)
        self.saved = time.monotonic()
        if self._number:
            raise interrupted_at(self._number, position)


def interrupted_at(number: int, position: Position) -> Interrupted:
    """The end of a training that was saved at `position`."""
    where = f"after {position.taken} batches of epoch {position.epoch + 1}"
    return Interrupted(number, f" {where}, which are saved")


def train_epoch(
    training: Training,
    objective: Objective,
    accelerator: Accelerator,
    bar: Any,
    sofar: EpochSoFar,
    pauses: Pauses,
) -> Epoch:
    """Take the other steps of an epoch; mean of the loss and its parts over steps and processes."""
    recipe, optimizer, count = training.recipe, training.optimizer, len(training.loader)
    prepare, watch = augmented(recipe, training.splits), FiniteWatch()
    look_every = 1 if accelerator.device.type == "cpu" and accelerator.num_processes == 1 else 50
    taken: list[dict[str, Tensor]] = []  # of the micro-batches of this update
    since = time.perf_counter()
    for stored in _batches(training.loader, sofar):
        step = sofar.epoch * count + sofar.taken
        update = step // recipe.accumulation
        training.schedule.step_update(update)
        # Of the update: its micro-batches are parts of one step.
        objective.progress = update * recipe.accumulation / (recipe.epochs * count)
        images, labels, *indices = stored
        # As many keys as no other stream of a training has.
        place = (sofar.epoch, 0, accelerator.process_index, sofar.taken)
        inputs, labels = prepare(images, labels, derived_seed(recipe.seed, *place))
        if training.network.channels_last:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        if recipe.skip_nonfinite and not taken:
            put_back = _record_buffers(objective.model)
        with accelerator.accumulate(objective.model):
            loss = backward(
                optimizer, objective.bind(inputs, labels, *indices), accelerator=accelerator
            )
            taken.append({"loss": loss.total, **loss.parts})
            norm = _clipped_norm(training, accelerator, update)
            finite = not recipe.skip_nonfinite or bool(norm.isfinite())
            if finite:
                optimizer.step()
            optimizer.zero_grad()
        bar.update()
        sofar.taken += 1
        if not accelerator.sync_gradients:
            continue
        if finite:
            sofar.in_a_row = 0
            if training.average:
                training.average.update(training.model, update + 1)  # timm counts from 1
            # A GradScaler looks for infinite gradients, skips their steps and lowers its scale.
            watched = {} if accelerator.scaler else {"the gradient": norm}
            for parts in taken:
                sofar.add(parts)
                parts.pop("loss")  # that of the parts, which have names
                watch.see(update, parts | watched)
        else:
            put_back()
            _skip(training, sofar, update)
        taken.clear()
        if update % look_every == 0:
            _stop_at_first(training.name, watch, accelerator)
        sofar.seconds += time.perf_counter() - since
        if pauses.due(update, at_once=sofar.taken == count):
            _stop_at_first(training.name, watch, accelerator)
            check_weights(training, f"at step {update}")
            pauses.take(sofar.position(training.model))
        since = time.perf_counter()
    _stop_at_first(training.name, watch, accelerator)  # waits for the device
    sofar.seconds += time.perf_counter() - since
    return _summed_up(training, sofar, accelerator)


def _skip(training: Training, sofar: EpochSoFar, update: int) -> None:
    """Count a step that is skipped.

    Raises:
        FloatingPointError: it is one too many in a row.
    """
    sofar.skipped, sofar.in_a_row = sofar.skipped + 1, sofar.in_a_row + 1
    if sofar.in_a_row > training.recipe.skip_nonfinite:
        what = f"the gradients of {sofar.in_a_row} steps in a row are not finite"
        _stop(training.name, f"{what}, the last at step {update}")


def _summed_up(training: Training, sofar: EpochSoFar, accelerator: Accelerator) -> Epoch:
    """The line of an epoch that is over: means over its steps and processes.

    Raises:
        FloatingPointError: all of its steps were skipped.
    """
    parts = training.recipe.accumulation
    updates = len(training.loader) // parts
    if sofar.skipped == updates:
        _stop(training.name, f"no step of epoch {sofar.epoch + 1} has a finite gradient")
    steps = (updates - sofar.skipped) * parts
    means = {p: float(accelerator.reduce(t / steps, "mean")) for p, t in sofar.totals.items()}
    meaning = "gradients were not finite, and their steps were skipped: it was trained for less"
    share = sofar.skipped / updates
    skipped = make_finding("skipped steps", share, 0.01, updates, meaning, "flatreg")
    # With layer decay: of the head.
    lr = max(float(group["lr"]) for group in training.optimizer.param_groups)
    return Epoch(
        epoch=sofar.epoch,
        lr=lr,
        seconds=sofar.seconds,
        loss=means.pop("loss"),
        parts=means,
        skipped=sofar.skipped,
        skipped_last=sofar.in_a_row,
        findings=[skipped] if sofar.skipped else [],
        waiting_seconds=sofar.waiting_seconds,
    )


def _batches(loader: Any, sofar: EpochSoFar) -> Iterator[tuple[Tensor, ...]]:
    """The batches of an epoch that are not taken yet; the seconds that they took are kept."""
    if sofar.taken == len(loader):
        return  # up to 1.8 at least, Accelerate's loader yields None where all are skipped
    left = skip_first_batches(loader, sofar.taken) if sofar.taken else loader
    since = time.perf_counter()
    fetched = told_in_a_line(iter(left), from_workers=left.num_workers > 0)
    for number, batch in enumerate(fetched):
        if number == 0 and sofar.streams is not None:
            sofar.streams.put_back()  # here: what iterates over the loader draws a number first
        sofar.waiting_seconds += time.perf_counter() - since
        yield batch
        since = time.perf_counter()


def _clipped_norm(training: Training, accelerator: Accelerator, update: int) -> Tensor:
    """Norm of the gradient that is about to be stepped on, which is clipped; 0 in between."""
    if not accelerator.sync_gradients:
        return torch.zeros((), device=accelerator.device)
    if update < training.head_updates:
        for parameter in training.body:
            parameter.grad = None  # not frozen: DDP shares the gradients that it was built with
    spec, parameters = training.recipe.optimizer, list(training.model.parameters())
    if spec.clip_norm and spec.clip_mode == "norm":
        norm = accelerator.clip_grad_norm_(parameters, spec.clip_norm)
    else:
        norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
    if spec.clip_norm and spec.clip_mode != "norm":
        accelerator.unscale_gradients()
        clipped = training.body if spec.clip_mode == "agc" else parameters
        given = [p for p in clipped if p.grad is not None]
        dispatch_clip_grad(given, spec.clip_norm, spec.clip_mode)
    whole: Tensor = norm.full_tensor() if isinstance(norm, DTensor) else norm
    return whole


def check_weights(training: Training, when: str) -> None:
    """Refuse to save weights, of the model or of their average, that are not finite.

    Raises:
        FloatingPointError: some are not.
    """
    average = training.average
    for weights in (training.model, average.module if average else None):
        broken = weights and (non_finite_weight(weights) or non_finite_buffer(weights))
        if broken:
            _stop(training.name, f"{broken} is not finite {when}")


def _stop_at_first(name: str, watch: FiniteWatch, accelerator: Accelerator) -> None:
    found = watch.first(accelerator.gather)
    if found is not None:
        _stop(name, f"{found.name} is {found.value} at step {found.step}")


def _stop(name: str, what: str) -> NoReturn:
    raise FloatingPointError(f"{name}: {what}; the checkpoint before stays")


class NonFinite(NamedTuple):
    """A number that was not finite: its name, its value, and the step that saw it first."""

    name: str
    value: float
    step: int


class FiniteWatch:
    """Remembers on the device where numbers were first not finite; the host may ask later."""

    def __init__(self) -> None:
        self._names: tuple[str, ...] = ()
        self._steps: Tensor | None = None
        self._values: Tensor | None = None

    def see(self, step: int, numbers: Mapping[str, Tensor]) -> None:
        """Look at the numbers of a step, 0-d each, the same names in every step."""
        now = torch.stack([value.detach().float() for value in numbers.values()])
        if self._steps is None or self._values is None:
            self._names = tuple(numbers)
            self._steps, self._values = torch.full_like(now, torch.inf), torch.zeros_like(now)
        new = ~now.isfinite() & self._steps.isinf()
        self._values = torch.where(new, now, self._values)
        self._steps = torch.where(new, float(step), self._steps)

    def first(self, gather: Callable[[Tensor], Tensor]) -> NonFinite | None:
        """The first of all that were not finite, on any process; reading it waits for the device.

        Args:
            gather: concatenates a tensor of every process.
        """
        if self._steps is None or self._values is None:
            return None
        steps, values = gather(self._steps), gather(self._values)
        index = int(steps.argmin())
        step = float(steps[index])
        if step == float("inf"):
            return None
        return NonFinite(self._names[index % len(self._names)], float(values[index]), int(step))
