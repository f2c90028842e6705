"""The methods of `flatreg.optimizers` as a recipe spells them, and how they wrap its optimizer."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.optim import Optimizer

from flatreg.models.heads import find_head
from flatreg.optimizers import methods
from flatreg.optimizers.sharpness_aware import SharpnessAware, last_blocks
from flatreg.terms.protocol import Count, Number, Strength


class _Method(BaseModel):
    """What every method takes.

    `scope` is the head or the number of last blocks, all parameters by default; `begin_epoch` the
    warm-up, before which the optimizer takes plain steps.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    scope: Literal["head"] | Count | None = None
    every: Count = 1
    begin_epoch: Annotated[Number, Field(ge=0)] = 0.0
    micro_batches: Count = 1
    sync_perturbation: bool = False


class SAM(_Method):
    """See `flatreg.SAM`."""

    kind: Literal["SAM"] = "SAM"
    rho: Strength = 0.05


class ASAM(_Method):
    """See `flatreg.ASAM`."""

    kind: Literal["ASAM"] = "ASAM"
    rho: Strength = 0.5
    eta: Strength = 0.01


class RelativeSAM(_Method):
    """See `flatreg.RelativeSAM`; with `scope: head` it is `flatreg.HeadRelativeSAM`."""

    kind: Literal["RelativeSAM"] = "RelativeSAM"
    rho: Strength = 0.05


class RandomSAM(_Method):
    """See `flatreg.RandomSAM`."""

    kind: Literal["RandomSAM"] = "RandomSAM"
    rho: Strength = 0.05


class FriendlySAM(_Method):
    """See `flatreg.FriendlySAM`."""

    kind: Literal["FriendlySAM"] = "FriendlySAM"
    rho: Strength = 0.05
    sigma: Strength = 1.0
    decay: Annotated[Number, Field(ge=0, le=1)] = 0.9


class GSAM(_Method):
    """See `flatreg.GSAM`."""

    kind: Literal["GSAM"] = "GSAM"
    rho: Strength = 0.05
    alpha: Strength = 0.4


class WSAM(_Method):
    """See `flatreg.WSAM`."""

    kind: Literal["WSAM"] = "WSAM"
    rho: Strength = 0.05
    gamma: Annotated[Number, Field(ge=0, lt=1)] = 0.9


class GNP(_Method):
    """See `flatreg.GNP`."""

    kind: Literal["GNP"] = "GNP"
    rho: Strength = 0.05
    alpha: Strength = 0.5


class LookSAM(_Method):
    """See `flatreg.LookSAM`."""

    kind: Literal["LookSAM"] = "LookSAM"
    rho: Strength = 0.05
    alpha: Strength = 0.7
    every: Count = 5


class AWP(_Method):
    """See `flatreg.AWP`."""

    kind: Literal["AWP"] = "AWP"
    gamma: Strength = 0.01


Wrapper = Annotated[
    SAM | ASAM | RelativeSAM | RandomSAM | FriendlySAM | GSAM | WSAM | GNP | LookSAM | AWP,
    Field(discriminator="kind"),
]


def wrap(
    spec: Wrapper, base: Optimizer, model: nn.Module, inputs: Tensor, steps_per_epoch: int
) -> SharpnessAware:
    """Wrap `base`.

    Args:
        spec: the method.
        base: the optimizer of `model`.
        model: a timm model behind its normalisation.
        inputs: two images, on which the head is proven where it is the scope.
        steps_per_epoch: of the training.

    Raises:
        ValueError: no head is found, or the model has fewer blocks.
    """
    options: dict[str, Any] = spec.model_dump(exclude={"kind", "scope", "begin_epoch"})
    options["begin"] = round(spec.begin_epoch * steps_per_epoch)
    if spec.scope == "head":
        options["scope"] = find_head(model, inputs).layer
    elif spec.scope is not None:
        options["scope"] = last_blocks(model, spec.scope)
    if spec.kind == "RelativeSAM":
        options["model"] = model
    wrapped: SharpnessAware = getattr(methods, spec.kind)(base, **options)
    return wrapped
