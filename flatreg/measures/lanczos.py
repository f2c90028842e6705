r"""Extreme eigenvalues of symmetric operators known by their products, a batch of them at once.

.. math:: A Q = Q T + \beta_k q_{k+1} e_k^T , \qquad
          T = \operatorname{tridiag}(\alpha, \beta) = S \Theta S^T

Lanczos, "An iteration method for the solution of the eigenvalue problem of linear differential
and integral operators", J. Res. Nat. Bur. Standards, 1950; with full reorthogonalisation, so that
no eigenvalue is found twice by rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import einsum
from torch import Tensor

from flatreg.data.configuration import whole
from flatreg.models.precision import at_least_float32


class Ritz(NamedTuple):
    """Approximate eigenpairs.

    Attributes:
        values: `(batch, k)`, ascending.
        vectors: `(batch, n, k)`, orthonormal columns.
        residuals: `(batch, k)`, norm of A v - value v: within it of each value lies an eigenvalue.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor


def lanczos(matvec: Callable[[Tensor], Tensor], start: Tensor, steps: int) -> Ritz:
    r"""Ritz pairs of symmetric operators, one a row of the batch; the extreme ones converge first.

    The residual of a pair is :math:`|\beta_k S_{ki}|`, and never less than what rounding leaves
    open, :math:`\sqrt n\,\epsilon \max|\theta|`. Where the Krylov space closes (an invariant
    subspace was found, or `start` is zero) the iteration goes on from a new direction orthogonal
    to it, drawn from a generator of its own, so repeated eigenvalues come out repeated.

    Args:
        matvec: `(batch, n) -> (batch, n)`, row b times the operator of row b.
        start: first directions `(batch, n)` of any length; half precision is cast up.
        steps: products per row; k = min(steps, n).

    Returns:
        k Ritz pairs a row, detached.

    Raises:
        ValueError: `start` is not `(batch, n)`, `steps` is below 1, or `matvec` returns another
            shape or a number that is not finite.

    >>> diagonal = torch.tensor([[1.0, 2.0, 5.0]])
    >>> lanczos(lambda v: diagonal * v, torch.ones(1, 3), steps=3).values
    tensor([[1.0000, 2.0000, 5.0000]])
    """
    start = at_least_float32(start.detach())
    if start.ndim != 2 or not start.numel():
        raise ValueError(f"start must have shape (batch, n), got {tuple(start.shape)}")
    steps = whole("steps", steps, 1)
    basis, diagonal, off_diagonal = _tridiagonalise(matvec, start, min(steps, start.shape[1]))
    inner = off_diagonal[:, :-1]
    tridiagonal = torch.diag_embed(diagonal)
    tridiagonal += torch.diag_embed(inner, 1) + torch.diag_embed(inner, -1)
    if not bool(torch.isfinite(tridiagonal).all()):
        raise ValueError("matvec must return finite numbers, got inf or nan")
    values, rotation = torch.linalg.eigh(tridiagonal)
    floor = _rounding(start) * values.abs().amax(1, keepdim=True)
    residuals = torch.maximum((off_diagonal[:, -1:] * rotation[:, -1]).abs(), floor)
    return Ritz(values, einsum(basis, rotation, "b j n, b j k -> b n k"), residuals)


def _tridiagonalise(
    matvec: Callable[[Tensor], Tensor], start: Tensor, steps: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Basis `(batch, k, n)`, diagonal of T `(batch, k)` and what lies beside it `(batch, k)`."""
    batch, n = start.shape
    generator = torch.Generator().manual_seed(0)
    basis = start.new_zeros(batch, steps, n)
    diagonal, off_diagonal = start.new_zeros(batch, steps), start.new_zeros(batch, steps)
    scale, rest = start.new_zeros(batch), start
    for j in range(steps):
        length = torch.linalg.vector_norm(rest, dim=1)
        closed = length <= 10 * _rounding(start) * scale  # a zero start too: then scale is zero
        if j:
            off_diagonal[:, j - 1] = torch.where(closed, 0, length)
        basis[:, j] = rest / torch.where(closed, 1, length)[:, None]
        if bool(closed.any()):
            fresh = _fresh_directions(basis[:, :j], generator)
            basis[:, j] = torch.where(closed[:, None], fresh, basis[:, j])
        product = matvec(basis[:, j].clone()).detach().to(start)
        if product.shape != start.shape:
            raise ValueError(f"matvec must map (batch, n) to itself, got {tuple(product.shape)}")
        diagonal[:, j] = (basis[:, j] * product).sum(1)
        scale = torch.maximum(scale, torch.linalg.vector_norm(product, dim=1))
        rest = _orthogonal_part(product, basis[:, : j + 1])
    length = torch.linalg.vector_norm(rest, dim=1)
    off_diagonal[:, -1] = torch.where(length <= 10 * _rounding(start) * scale, 0, length)
    return basis, diagonal, off_diagonal


def _orthogonal_part(vectors: Tensor, basis: Tensor) -> Tensor:
    """What is left of `vectors` outside `basis`; one projection loses digits, two do not."""
    for _ in range(2):
        shares = einsum(basis, vectors, "b j n, b n -> b j")
        vectors = torch.sub(vectors, einsum(basis, shares, "b j n, b j -> b n"))
    return vectors


def _fresh_directions(basis: Tensor, generator: torch.Generator) -> Tensor:
    """Random unit vectors orthogonal to `basis` `(batch, j, n)`, j < n."""
    batch, _, n = basis.shape
    drawn = torch.randn(batch, n, generator=generator, dtype=basis.dtype).to(basis)
    fresh = F.normalize(_orthogonal_part(drawn, basis), dim=1)
    return F.normalize(_orthogonal_part(fresh, basis), dim=1)


def _rounding(like: Tensor) -> float:
    """Relative error of a product of n terms in this precision."""
    return float(torch.finfo(like.dtype).eps * like.shape[1] ** 0.5)
