r"""The Hessian of the loss in the input, exactly, by its products; for measurement.

H is the Hessian per sample and P the projector off the manifold. Every function takes `loss_at`,
which maps inputs `(batch, ...)` to a loss per sample `(batch,)`. Each loss must depend on its own
input only: no BatchNorm in train mode. Results are detached. All of it is double backward, under
math attention.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from flatreg.data.configuration import whole
from flatreg.measures.input_curvature import FORWARD_ONLY, LossAt
from flatreg.measures.input_gradient import values_of
from flatreg.measures.lanczos import lanczos
from flatreg.measures.manifold import IdentityManifold, Manifold
from flatreg.models.double_backward import differentiable_gradient, pull_back, twice_differentiable
from flatreg.models.entrance import outside_inference


def hvp(loss_at: LossAt, inputs: Tensor, direction: Tensor) -> Tensor:
    """Hessian-vector product H n per sample, exact.

    Args:
        loss_at: inputs to loss per sample.
        inputs: x `(batch, ...)`.
        direction: n, shaped as `inputs`, of any length.

    Returns:
        Shaped as `inputs`.

    Raises:
        ValueError: the model has an operator without a second derivative.
    """
    return _hessian(loss_at, inputs, "hvp")(direction)


def directional_curvature(loss_at: LossAt, inputs: Tensor, direction: Tensor) -> Tensor:
    """Second derivative n^T H n along `direction`, exact: what `second_difference` tends to.

    Args:
        loss_at: inputs to loss per sample.
        inputs: x `(batch, ...)`.
        direction: n, shaped as `inputs`; of unit length for a curvature per squared input unit.

    Returns:
        `(batch,)`, signed.

    Raises:
        ValueError: the model has an operator without a second derivative.
    """
    product = _hessian(loss_at, inputs, "directional_curvature")(direction)
    return (direction * product).flatten(1).sum(1)


class Trace(NamedTuple):
    """Traces per sample `(batch,)` and their standard errors `(batch,)`, nan for one probe."""

    values: Tensor
    stderr: Tensor


def normal_trace(
    loss_at: LossAt,
    inputs: Tensor,
    *,
    manifold: Manifold | None = None,
    num_probes: int = 16,
    seed: int = 0,
) -> Trace:
    r"""Trace of the Hessian off the manifold, :math:`Tr(P H P) = E\,\xi^T P H P \xi`.

    Hutchinson 1990, with Rademacher probes projected off the manifold.

    Args:
        loss_at: inputs to loss per sample.
        inputs: x `(batch, ...)`.
        manifold: left out, every direction is off-manifold.
        num_probes: probes per sample, one Hessian-vector product each.
        seed: of the probes.

    Returns:
        Traces, loss per squared input unit, signed, with standard errors.

    Raises:
        ValueError: the model has an operator without a second derivative.
    """
    manifold = manifold or IdentityManifold()
    product = _hessian(loss_at, inputs, "normal_trace")
    generator = torch.Generator().manual_seed(seed)
    draws, num_probes = [], whole("num_probes", num_probes, 1)
    for _ in range(num_probes):
        signs = torch.randint(2, inputs.shape, generator=generator).to(inputs) * 2 - 1
        normal = manifold.split(inputs, signs)[1]
        draws.append((normal * product(normal)).flatten(1).sum(1))
    probes = torch.stack(draws)
    spread = probes.std(0) if num_probes > 1 else torch.full_like(probes[0], torch.nan)
    return Trace(probes.mean(0), spread / num_probes**0.5)


class TopCurvature(NamedTuple):
    """Largest eigenvalues of P H P with their eigenvectors.

    Attributes:
        values: `(batch,)`, loss per squared input unit.
        directions: of unit length, shaped as the inputs.
        residuals: `(batch,)`; within it of each value lies an eigenvalue.
    """

    values: Tensor
    directions: Tensor
    residuals: Tensor


def top_curvature(
    loss_at: LossAt,
    inputs: Tensor,
    *,
    manifold: Manifold | None = None,
    steps: int = 16,
    seed: int = 0,
) -> TopCurvature:
    """Direction off the manifold along which the loss curves up most, by Lanczos.

    Args:
        loss_at: inputs to loss per sample.
        inputs: x `(batch, ...)`.
        manifold: left out, every direction is off-manifold.
        steps: Hessian-vector products; the residual tells whether they were enough.
        seed: of the start.

    Returns:
        Largest (most positive) curvature within the normal space.

    Raises:
        ValueError: the model has an operator without a second derivative.
    """
    manifold = manifold or IdentityManifold()
    product = _hessian(loss_at, inputs, "top_curvature")

    def normal(flat: Tensor) -> Tensor:
        return manifold.split(inputs, flat.reshape(inputs.shape).to(inputs))[1]

    noise = torch.randn(inputs.shape, generator=torch.Generator().manual_seed(seed)).to(inputs)
    ritz = lanczos(
        lambda v: normal(product(normal(v)).flatten(1)).flatten(1), normal(noise).flatten(1), steps
    )
    # Once the normal space is exhausted Lanczos goes on in the tangent space, with eigenvalue 0.
    vectors = rearrange(ritz.vectors, "b n k -> k b n")
    lengths = torch.stack([normal(v).flatten(1).norm(dim=1) for v in vectors], 1)
    best = torch.where(lengths > 0.5, ritz.values, -torch.inf).argmax(1, keepdim=True)
    value, residual = (t.gather(1, best)[:, 0] for t in (ritz.values, ritz.residuals))
    direction = vectors[best[:, 0], torch.arange(len(inputs), device=inputs.device)]
    return TopCurvature(value, direction.reshape(inputs.shape), residual)


def _hessian(loss_at: LossAt, inputs: Tensor, what: str) -> Callable[[Tensor], Tensor]:
    """Make the map n -> H n at `inputs`; its products share one pass and one gradient."""
    # Callers may be under no_grad or inference_mode.
    with torch.inference_mode(False), torch.enable_grad(), twice_differentiable():
        points = outside_inference(inputs).requires_grad_()
        gradient = differentiable_gradient(
            values_of(loss_at, points), points, what=what, alternative=FORWARD_ONLY
        )
    product = pull_back([gradient], [points])
    return lambda direction: product([direction.detach()])[0]
