"""Criterion and penalties on one batch: one loss with named parts, sharing forward passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

from torch import Tensor, nn

from flatreg.criteria import CrossEntropy
from flatreg.forward import Forward, local_module, run_forward
from flatreg.heads import Head, find_head
from flatreg.isolation import frozen_statistics
from flatreg.terms import Adversary, Need, Term
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

    def detach(self) -> ObjectiveLoss:
        """The same without a graph."""
        return ObjectiveLoss(self.total.detach(), self.parts)


class Objective:
    """Mean over the batch of a criterion plus penalties.

    Clean and attacked batch pass through the model at most once each; features are captured on the
    way; passes that terms add move no BatchNorm statistics.

    Args:
        model: images to logits; as `accelerator.prepare` returned it, where that is used.
        criterion: what to train on.
        penalties: what to add.

    Raises:
        ValueError: a penalty reads the attacked batch and the criterion does not attack.
    """

    def __init__(
        self, model: nn.Module, criterion: Term | None = None, penalties: Sequence[Term] = ()
    ) -> None:
        self.model = model
        self.criterion = CrossEntropy() if criterion is None else criterion
        self.terms: tuple[Term, ...] = (self.criterion, *penalties)
        self.needs: frozenset[Need] = reduce(frozenset.union, (t.needs for t in self.terms))
        self._head: Head | None = None
        self._inputs_checked = False
        if "attacked" in self.needs and not isinstance(self.criterion, Adversary):
            reader = next(t for t in self.terms if "attacked" in t.needs)
            raise ValueError(
                f"{type(reader).__name__} reads the attacked batch, "
                f"but {type(self.criterion).__name__} does not attack"
            )

    def __call__(self, inputs: Tensor, labels: Tensor) -> ObjectiveLoss:
        """Evaluate once: `inputs` `(batch, ...)`, `labels` `(batch,)`.

        Raises:
            ValueError: on the first batch, where a term moves images: they are not in [0,1]; where
                a term reads features: no head can be found.
        """
        return self.bind(inputs, labels)()

    def bind(self, inputs: Tensor, labels: Tensor) -> BoundObjective:
        """Return the closure for `flatreg.backward`; it attacks the batch once and keeps it."""
        return BoundObjective(self, inputs, labels.long())

    def check(self, inputs: Tensor) -> None:
        """Check the range of the inputs and prove the head, on the first batch alone."""
        if "unit_inputs" in self.needs and not self._inputs_checked:
            check_unit_range(inputs)
            self._inputs_checked = True
        if "features" in self.needs and self._head is None:
            self._head = find_head(local_module(self.model), inputs)

    def evaluate(self, inputs: Tensor, labels: Tensor, attacked: Tensor | None) -> ObjectiveLoss:
        """Run the passes the terms need and add the terms up."""
        # Under DDP exactly one pass goes through the wrapper, which broadcasts buffers and arms the
        # gradient reduction; another one would overwrite buffers the first graph still needs.
        model, passes = self.model, dict[str, Forward]()
        if attacked is not None:
            passes["attacked"] = run_forward(model, attacked, labels, self._head)
            model = local_module(model)
        if "clean" in self.needs:
            inputs = inputs.detach().requires_grad_("input_gradient" in self.needs)
            passes["clean"] = run_forward(model, inputs, labels, self._head)
        values = [term(passes).mean() for term in self.terms]
        names = _distinct([type(term).__name__ for term in self.terms])
        parts = {name: value.detach() for name, value in zip(names, values, strict=True)}
        return ObjectiveLoss(sum(values[1:], values[0]), parts)


class BoundObjective:
    """An objective on one batch: a closure whose calls all see the same attack."""

    def __init__(self, objective: Objective, inputs: Tensor, labels: Tensor) -> None:
        self.objective, self.inputs, self.labels = objective, inputs, labels
        self._attacked: Tensor | None = None
        self._prepared = False

    @property
    def model(self) -> nn.Module:
        """The model of the objective."""
        return self.objective.model

    def prepare(self) -> None:
        """Attack the batch, once; `flatreg.backward` calls it before it records random streams."""
        if self._prepared:
            return
        self.objective.check(self.inputs)
        criterion = self.objective.criterion
        if isinstance(criterion, Adversary):
            module = local_module(self.model)
            with frozen_statistics(module):
                self._attacked = criterion.attack(module, self.inputs, self.labels)
        self._prepared = True

    def __call__(self) -> ObjectiveLoss:
        """Evaluate the objective on the batch."""
        self.prepare()
        return self.objective.evaluate(self.inputs, self.labels, self._attacked)


def _distinct(names: list[str]) -> list[str]:
    """Number the names that occur more than once: two penalties of one kind are two parts."""
    return [
        name if names.count(name) == 1 else f"{name}.{names[:i].count(name)}"
        for i, name in enumerate(names)
    ]
