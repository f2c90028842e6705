"""Criterion and penalties on one batch: one loss with named parts, sharing forward passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial, reduce
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from flatreg.models.compiled import graphs_last, is_compiled, sharded_parts, trace_anew
from flatreg.models.double_backward import twice_differentiable
from flatreg.models.entrance import as_labels, outside_inference
from flatreg.models.forward import Forward, local_module, run_forward
from flatreg.models.heads import Head, find_head
from flatreg.models.pass_start import PassStart, ends_with
from flatreg.models.state import kept_buffers
from flatreg.optimizers.data_parallel import broadcast_buffers, find_ddp
from flatreg.terms.criteria import CrossEntropy, LossOfTorch, part_names
from flatreg.terms.first_batch import (
    REPEATED,
    check_head,
    check_model,
    check_pass,
    check_places,
    check_repeats,
    check_term,
    check_twice_differentiable,
    check_value,
)
from flatreg.terms.memory import Memory, Remembers, check_one_reader
from flatreg.terms.protocol import Adversary, Forwards, HandlesMode, Requirement, Term, scheduled
from flatreg.threat import check_unit_range


@dataclass(frozen=True, eq=False)
class ObjectiveLoss:
    """Loss of a batch.

    Attributes:
        total: 0-d, with its graph.
        parts: detached mean of each term on the device, by its class name; they sum to `total`.
    """

    total: Tensor
    parts: dict[str, Tensor]

    if not TYPE_CHECKING:  # where a name is unknown anyway

        def __getattr__(self, name: str) -> object:
            hint = "" if name.startswith("_") else ": the tensor is loss.total"
            raise AttributeError(f"'ObjectiveLoss' object has no attribute {name!r}{hint}")

    def detach(self) -> ObjectiveLoss:
        """The same without a graph."""
        return ObjectiveLoss(self.total.detach(), self.parts)

    def __add__(self, other: ObjectiveLoss | Tensor | float) -> ObjectiveLoss:
        """Sum of the losses, part by part; what is none of an objective is the part `added`."""
        if isinstance(other, ObjectiveLoss):
            shared = {k: v + other.parts[k] for k, v in self.parts.items() if k in other.parts}
            parts = {**self.parts, **other.parts, **shared}
            return ObjectiveLoss(self.total + other.total, parts)
        if not isinstance(other, Tensor) and other == 0:
            return self  # as `sum` begins
        value = torch.as_tensor(other, dtype=self.total.dtype, device=self.total.device)
        return self + ObjectiveLoss(value, {"added": value.detach()})

    __radd__ = __add__

    def __mul__(self, factor: float) -> ObjectiveLoss:
        """Multiple of the loss and of its parts."""
        return ObjectiveLoss(self.total * factor, {k: v * factor for k, v in self.parts.items()})

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> ObjectiveLoss:
        """Loss and parts, divided as by the number of accumulated batches."""
        return self * (1 / divisor)


class Objective:
    """Mean over the batch of a criterion plus penalties.

    Clean and attacked batch pass through the model at most once each; features are captured on the
    way; passes that terms add move no BatchNorm statistics.

    Args:
        model: images to logits; as `accelerator.prepare` returned it, where that is used.
        criterion: what to train on: a term, or a loss of torch as `nn.CrossEntropyLoss()`.
        penalties: what to add, one term or several.
        memory: what a criterion keeps from batch to batch; of its own where it is left out.

    Attributes:
        progress: fraction of the training that is done, in [0, 1], for terms that have a schedule;
            a loop that wants one sets it before each step.

    Raises:
        ValueError: a penalty stands where the criterion should, a criterion that attacks stands
            among the penalties, or one of these reads an attacked batch that nothing makes; a term
            requires what is not known.
        TypeError: the model is no module; the criterion or a penalty is no term.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Term | nn.Module | None = None,
        penalties: Sequence[Term] | Term | None = (),
        *,
        memory: Memory | None = None,
    ) -> None:
        check_model(model)
        self.model = model
        self.memory = Memory() if memory is None else memory
        if isinstance(criterion, nn.Module) and not isinstance(criterion, Term):
            criterion = LossOfTorch(criterion)
        self.criterion = CrossEntropy() if criterion is None else criterion
        added = [penalties] if isinstance(penalties, Term) else penalties or ()
        self.terms: tuple[Term, ...] = (self.criterion, *added)
        for term in self.terms:
            check_term(term)
        check_places(self.criterion, self.terms[1:])
        self.requires: frozenset[Requirement] = reduce(
            frozenset.union, (t.requires for t in self.terms)
        )
        self._head: Head | None = None
        self._has_no_head, self._in_range, self._splits, self._batches = False, False, False, 0
        self._classes: int | None = None
        self._layers: list[nn.Module] = []
        several = len({"clean", "attacked", "start"} & self.requires) > 1
        self._compares_passes = several or not self.reads_only_the_head
        self.progress = 1.0

    def __call__(self, inputs: Tensor, labels: Tensor) -> ObjectiveLoss:
        """Evaluate once: `inputs` `(batch, ...)`, `labels` `(batch,)` or `(batch, classes)`.

        Labels are class indices, or floating: class probabilities.

        Raises:
            ValueError: the batch is empty; where a term moves images: they are not in [0,1]; where
                a term reads features: no head can be found; where a term differentiates twice: the
                model is compiled, sharded by FSDP2 or in DDP with a static graph, or has an
                operator whose derivatives are wrong; where a term takes a gradient in the inputs:
                checkpointing is reentrant. A term needs a class, and the labels are probabilities.
                The model returns no logits, or the labels are not of its classes.
        """
        return self.bind(inputs, labels)()

    def bind(self, inputs: Tensor, labels: Tensor, indices: Tensor | None = None) -> BoundObjective:
        """Return the closure for `flatreg.backward`; it attacks the batch once and keeps it.

        `indices` `(batch,)` are the places of the samples among the training images, for a
        criterion that stores something of each.
        """
        if not len(inputs):
            raise ValueError("expected a batch of one sample or more, got an empty one")
        self._see_layers()
        on_host = isinstance(labels, Tensor) and labels.device.type == "cpu"
        labels = as_labels(labels, len(inputs), self._classes, read=on_host)
        return BoundObjective(self, inputs, labels, indices=indices)

    def _see_layers(self) -> None:
        """Forget what was proven of a model of which a layer was added, removed or replaced."""
        layers = list(local_module(self.model).modules())  # kept: the address of one is its own
        if [*map(id, layers)] != [*map(id, self._layers)]:
            self._layers, self._head, self._has_no_head = layers, None, False
            self._classes, self._batches = None, 0

    def check(self, inputs: Tensor) -> None:
        """Check model and range of the inputs, and prove the head; most of it only once."""
        self._see_layers()
        if self._compares_passes:
            trace_anew(self.model, "its graphs are kept")
        if "features" in self.requires:
            trace_anew(self.model, "a hook reads its features")
        if "unit_inputs" in self.requires and not self._in_range:
            check_unit_range(inputs)
        self._in_range = True
        for term in self.terms:
            check_twice_differentiable(term, self.model, inputs)
        if "features" in self.requires and self._head is None:
            self._head = find_head(local_module(self.model), inputs)

    def head(self, inputs: Tensor) -> Head | None:
        """The head; None where none can be proven."""
        try:
            if self._head is None and not self._has_no_head:
                self._head = find_head(local_module(self.model), inputs)
        except (ValueError, RuntimeError):
            self._has_no_head = True  # the search costs passes, and would fail every time
        return self._head

    @property
    def reads_only_the_head(self) -> bool:
        """Whether all terms are functions of features and logits of the two passes.

        An adversary moves images before the passes; any other term that does takes passes of its
        own.
        """
        free: set[Requirement] = {"clean", "attacked", "start", "features"}
        own = self.criterion.requires - free
        about_the_batch: set[Requirement] = {"unit_inputs", "whole_batch", "indices"}
        adversary = isinstance(self.criterion, Adversary) and own <= about_the_batch
        return (not own or adversary) and all(t.requires <= free for t in self.terms[1:])

    def run_forwards(
        self, inputs: Tensor, labels: Tensor, moved: Mapping[str, Tensor], head: Head | None = None
    ) -> dict[str, Forward]:
        """Run the passes the terms need, by name, capturing the input of `head`.

        `moved` are the images of all passes but the clean one.
        """
        # Under DDP exactly one pass goes through the wrapper, which broadcasts buffers and arms the
        # gradient reduction; another one would overwrite buffers the first graph still needs.
        model, passes = self.model, dict[str, Forward]()
        module = local_module(model)

        def run(batch: Tensor, start: PassStart | None) -> Forward:
            forward = run_forward(model, batch, labels, head, start)
            if start is not None:
                start.ends()
            return forward

        start = None
        if self._compares_passes or (head is not None and head.is_computed):
            broadcast_buffers(model)  # passes beside the wrapper start from the same as its own
            start = PassStart(module)
        with twice_differentiable() if "double_backward" in self.requires else nullcontext():
            for name, images in moved.items():
                passes[name] = run(images, start)
                model = module
                if start is not None:
                    start.replay()  # the two passes draw the same masks
                    start = PassStart(module)
            if "clean" in self.requires:
                inputs = inputs.detach().requires_grad_("input_gradient" in self.requires)
                passes["clean"] = run(inputs, start)
            self._check_passes(next(iter(passes.values())))  # within: by the same formulas
        return passes

    def _check_passes(self, at: Forward) -> None:
        if self._batches == 0:
            check_pass(self.terms, at)
            self._classes = at.logits.shape[1]
        if at.logits.device.type == "cpu" or self._batches in REPEATED:
            check_head(at)
        if self._splits and isinstance(self.criterion, LossOfTorch) and self._batches in REPEATED:
            self.criterion.check_parts(at)
        if self._compares_passes and self._batches in REPEATED:
            check_repeats(at, self.model)
        self._batches += 1

    def add_up(
        self, passes: Forwards, criterion: Callable[[Forwards], Tensor] | None = None
    ) -> ObjectiveLoss:
        """Add the terms up; `criterion` is the loss in place of its own."""
        at, values = next(iter(passes.values())), list[Tensor]()
        for term in self.terms:
            loss_of = scheduled(term, self.progress)
            value = (criterion or loss_of)(passes) if term is self.criterion else loss_of(passes)
            values.append(check_value(term, value, len(at.logits)).mean())
        names = part_names(self.terms)
        parts = {name: value.detach() for name, value in zip(names, values, strict=True)}
        loss = ObjectiveLoss(sum(values[1:], values[0]), parts)
        if at.start is not None:
            ends_with(loss.total, at.model)
        return loss

    def evaluate(
        self,
        inputs: Tensor,
        labels: Tensor,
        moved: Mapping[str, Tensor],
        criterion: Callable[[Forwards], Tensor] | None = None,
    ) -> ObjectiveLoss:
        """Run the passes and add the terms up."""
        if torch.is_grad_enabled():
            return self.add_up(self.run_forwards(inputs, labels, moved, self._head), criterion)
        with torch.inference_mode(False), torch.enable_grad():  # terms take gradients
            inputs, labels = outside_inference(inputs), outside_inference(labels)
            moved = {name: outside_inference(images) for name, images in moved.items()}
            return self.evaluate(inputs, labels, moved, criterion).detach()


class BoundObjective:
    """An objective on one batch, a `BatchLoss`: all its evaluations see the same attack.

    `weight` multiplies the loss. That of a part of a batch is its fraction of the samples, so that
    the losses of all parts add up to that of the batch.
    """

    def __init__(
        self,
        objective: Objective,
        inputs: Tensor,
        labels: Tensor,
        weight: float = 1.0,
        indices: Tensor | None = None,
    ) -> None:
        self.objective, self.inputs, self.labels = objective, inputs, labels
        self.weight, self._indices = weight, indices
        self._moved: dict[str, Tensor] = {}
        self._criterion: Callable[[Forwards], Tensor] | None = None
        self._prepared = False

    @property
    def model(self) -> nn.Module:
        """The model of the objective."""
        return self.objective.model

    @property
    def attacked(self) -> Tensor | None:
        """The attacked images `(batch, ...)`, once there are any."""
        return self._moved.get("attacked")

    def prepare(self) -> None:
        """Check the batch and attack it, once: later calls do nothing."""
        if self._prepared:
            return
        self.objective.check(self.inputs)
        criterion = scheduled(self.objective.criterion, self.objective.progress)
        if isinstance(criterion, Adversary):
            module = local_module(self.model)
            # The attack's own passes must not count as batches of the training.
            handled = isinstance(criterion, HandlesMode)
            kept = nullcontext() if handled else kept_buffers(module)
            with kept, graphs_last(module):
                self._attack(criterion, module)
        self._prepared = True

    def _attack(self, criterion: Adversary, module: nn.Module) -> None:
        if not isinstance(criterion, Remembers):
            self._moved["attacked"] = criterion.attack(module, self.inputs, self.labels)
            return
        memory = self.objective.memory
        memory = memory if torch.is_grad_enabled() else memory.read_only()
        if memory.writes:
            check_one_reader(memory, self.objective, type(criterion).__name__)
        moved = criterion.move(module, self.inputs, self.labels, memory, self._indices)
        memory.batches += 1
        found = {"attacked": moved.attacked, "start": moved.start}
        self._moved = {name: images for name, images in found.items() if images is not None}
        self._criterion = moved.loss

    def __call__(self) -> ObjectiveLoss:
        """Evaluate the objective on the batch."""
        self.prepare()
        with graphs_last(self.model):
            loss = self.objective.evaluate(self.inputs, self.labels, self._moved, self._criterion)
            return self._weighted(loss)

    def split(self, count: int) -> list[BoundObjective]:
        """Cut the batch, attacked already, into at most `count` parts whose losses add up to it.

        Raises:
            ValueError: the criterion is a loss of torch that is no mean over the samples, or a
                criterion of the whole batch.
        """
        criterion = self.objective.criterion
        if isinstance(criterion, LossOfTorch) and not criterion.is_mean_of_samples:
            raise ValueError(criterion.no_mean)
        if "whole_batch" in criterion.requires:
            raise ValueError(
                f"{type(criterion).__name__} is of the whole batch, and the losses of its parts do "
                "not add up: delete micro_batches"
            )
        if not self.objective._splits and count > 1:
            self.objective._splits, self.objective._batches = True, 0  # to check the parts
        self.prepare()
        size, parts = len(self.inputs), []
        for indices in torch.arange(size).tensor_split(min(count, size)):
            rows = slice(int(indices[0]), int(indices[-1]) + 1)
            weight = self.weight * len(indices) / size
            part = BoundObjective(self.objective, self.inputs[rows], self.labels[rows], weight)
            part._moved = {name: images[rows] for name, images in self._moved.items()}
            part._criterion, part._prepared = self._criterion, True
            parts.append(part)
        return parts

    def at_head(
        self, parameters: Sequence[Tensor]
    ) -> tuple[Callable[[], ObjectiveLoss], Callable[[], ObjectiveLoss]] | None:
        """Two evaluations on one pass: now, and once `parameters` of the head have moved.

        None, and no pass, where more than the head depends on them, where terms read more than the
        head, where hooks or a parametrization compute its weight in a pass, where the features
        depend on it too, or where its inside is out of reach: FSDP2, torch.compile, a static graph
        of DDP.
        """
        self.prepare()
        ddp = find_ddp(self.model)
        closed = sharded_parts(self.model) or is_compiled(self.model)
        if not self.objective.reads_only_the_head or closed or (ddp and ddp.static_graph):
            return None
        head = self.objective.head(self.inputs)
        own = {id(p) for p in head.parameters()} if head else set()
        if (
            head is None
            or head.is_computed
            or head.is_tied
            or not {id(p) for p in parameters} <= own
        ):
            return None
        passes = self.objective.run_forwards(self.inputs, self.labels, self._moved, head)

        def again() -> dict[str, Forward]:
            return {name: at.through_head() for name, at in passes.items()}

        add_up = partial(self.objective.add_up, criterion=self._criterion)
        return (lambda: self._weighted(add_up(passes)), lambda: self._weighted(add_up(again())))

    def _weighted(self, loss: ObjectiveLoss) -> ObjectiveLoss:
        return loss if self.weight == 1.0 else loss * self.weight
