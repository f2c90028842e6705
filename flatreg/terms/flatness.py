"""Penalties on flatness: how the loss curves as weights change relative to themselves."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from flatreg.data.configuration import configuration
from flatreg.measures.layer_flatness import gauss_newton_flatness
from flatreg.measures.parameters import linear_layers
from flatreg.measures.relative_flatness import relative_flatness
from flatreg.models.double_backward import Method
from flatreg.models.forward import run_forward
from flatreg.terms.protocol import Amount, Forwards, Pass, Requirement, WarmUp, requirements_for


@configuration
class RelativeFlatness:
    """strength * kappa / d of the last layer (see `flatreg.relative_flatness`); flattens the loss.

    kappa / d, d features, is the second-order term of the loss under a relative change of the head,
    W -> W (I + M), M random with entries of variance 1/d: in the unit of the loss, whatever the
    width. It bounds the loss near the data and says nothing further out: on its own it does not
    make a model robust. Costs a few products of the size of the head.

    Args:
        strength: factor.
        at: on the clean or on the attacked batch.
        schedule: lets the strength warm up.
    """

    strength: Amount = 1.0
    at: Pass = "clean"
    schedule: WarmUp | None = None
    kind: Literal["RelativeFlatness"] = "RelativeFlatness"

    @property
    def requires(self) -> frozenset[Requirement]:
        """What the term reads."""
        return frozenset({self.at, "features"})

    def __call__(self, passes: Forwards) -> Tensor:
        """Penalty per sample `(batch,)`."""
        at = passes[self.at]
        kappa = relative_flatness(at.features, at.logits, at.weight)
        return self.strength / at.weight.shape[1] * kappa


@configuration
class LayerFlatness:
    r"""strength * sum over layers of their Gauss-Newton flatness / fan-in, by one random probe.

    The same quantity as `RelativeFlatness`, for every linear and convolution layer at once: the
    second-order term of the loss under W -> W (I + M) in all of them. Below the head the Hessian is
    not positive semi-definite; its Gauss-Newton part is, and is what is penalised. See
    `flatreg.measures.layer_flatness`. Costs a forward and backward pass with moved weights.

    Args:
        strength: factor.
        at: on the clean or on the attacked batch.
        layers: paths of the layers in the model; left out, all that are trained.
        method: `"finite_difference"` takes plain forward passes; `"double_backward"` is exact.
        central: difference two passes: an error of second order in the step.
        schedule: lets the strength warm up.
    """

    strength: Amount = 1.0
    at: Pass = "clean"
    layers: tuple[str, ...] | None = None
    method: Method = "finite_difference"
    central: bool = False
    schedule: WarmUp | None = None
    kind: Literal["LayerFlatness"] = "LayerFlatness"
    forward_only: ClassVar[str] = "method='finite_difference'"

    @property
    def requires(self) -> frozenset[Requirement]:
        """What the term reads."""
        return requirements_for(self.method, self.at, "weights", third=True)

    def __call__(self, passes: Forwards) -> Tensor:
        """Penalty per sample `(batch,)`."""
        at = passes[self.at]
        model = getattr(at.model, "_orig_mod", at.model)  # moved weights would be compiled anew
        if model is not at.model and at.drew:  # compiled code may draw other masks
            with at.again():
                at = run_forward(model, at.inputs, at.labels, start=at.start)
        layers = None if self.layers is None else linear_layers(model, self.layers)
        value = gauss_newton_flatness(
            model,
            at.inputs,
            at.logits,
            layers=layers,
            method=self.method,
            central=self.central,
            per_fan_in=True,
            again=at.again,
        )
        return self.strength * value
