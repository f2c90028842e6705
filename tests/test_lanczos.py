"""Lanczos against the dense eigendecomposition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flatreg.measures.lanczos import lanczos


def symmetric(spectrum, seed=0, batch=1):
    """Matrices `(batch, n, n)` of this spectrum in random bases."""
    generator = torch.Generator().manual_seed(seed)
    n = len(spectrum)
    noise = torch.randn(batch, n, n, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(noise).Q
    matrix = basis @ torch.diag(torch.tensor(spectrum, dtype=torch.float64)) @ basis.mT
    return (matrix + matrix.mT) / 2


def product_with(matrix):
    return lambda v: torch.einsum("bij,bj->bi", matrix, v)


def random_start(batch, n, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, n, generator=generator, dtype=torch.float64)


def assert_eigenpairs(ritz, matrix, tolerance=1e-10):
    """Orthonormal vectors whose true residual is the one that was reported."""
    scale = torch.linalg.matrix_norm(matrix, 2)[:, None] + 1e-300
    true = torch.linalg.vector_norm(
        matrix @ ritz.vectors - ritz.vectors * ritz.values[:, None], dim=1
    )
    assert (true <= ritz.residuals * (1 + 1e-6) + tolerance * scale).all()
    gram = ritz.vectors.mT @ ritz.vectors
    eye = torch.eye(gram.shape[1], dtype=gram.dtype).expand_as(gram)
    torch.testing.assert_close(gram, eye, atol=1e-10, rtol=0)
    assert (ritz.values.diff(dim=1) >= 0).all()


@settings(deadline=None, max_examples=40)
@given(
    spectrum=st.lists(
        st.sampled_from([-3.0, -1.0, 0.0, 0.0, 1e-9, 1.0, 1.0, 2.5, 100.0]), min_size=1, max_size=12
    ),
    seed=st.integers(0, 2**16),
)
def test_all_steps_give_the_whole_spectrum(spectrum, seed):
    """Degenerate, rank-deficient and zero spectra included."""
    matrix = symmetric(spectrum, seed, batch=2)
    ritz = lanczos(product_with(matrix), random_start(2, len(spectrum), seed + 1), len(spectrum))
    expected = torch.linalg.eigvalsh(matrix)
    torch.testing.assert_close(ritz.values, expected, atol=1e-11 * 100, rtol=1e-10)
    assert_eigenpairs(ritz, matrix)


def test_few_steps_find_the_ends_of_a_spectrum():
    spectrum = [*torch.linspace(-1, 1, 98).tolist(), -5.0, 8.0]
    matrix = symmetric(spectrum, batch=3)
    ritz = lanczos(product_with(matrix), random_start(3, 100), 25)
    assert ritz.values.shape == (3, 25) and ritz.vectors.shape == (3, 100, 25)
    torch.testing.assert_close(ritz.values[:, -1], torch.full((3,), 8.0, dtype=torch.float64))
    torch.testing.assert_close(ritz.values[:, 0], torch.full((3,), -5.0, dtype=torch.float64))
    assert ritz.residuals[:, [0, -1]].max() < 1e-5 < ritz.residuals[:, 12].max()
    assert_eigenpairs(ritz, matrix)


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 30])
def test_residuals_are_the_true_ones_and_bound_the_error(steps):
    matrix = symmetric(torch.linspace(-2, 3, 30).tolist(), seed=steps)
    ritz = lanczos(product_with(matrix), random_start(1, 30), steps)
    true = torch.linalg.vector_norm(
        matrix @ ritz.vectors - ritz.vectors * ritz.values[:, None], dim=1
    )
    torch.testing.assert_close(ritz.residuals, true, atol=1e-12, rtol=1e-6)
    nearest = (ritz.values[:, :, None] - torch.linalg.eigvalsh(matrix)[:, None]).abs().amin(2)
    assert (nearest <= ritz.residuals + 1e-12).all()


def test_residuals_bound_the_error_in_float32_where_they_underflow():
    spectrum = [1e4, *torch.linspace(0, 1, 39).tolist()]
    matrix = symmetric(spectrum, batch=8)
    single = matrix.float()
    ritz = lanczos(product_with(single), random_start(8, 40).float(), 40)
    assert ritz.values.dtype == torch.float32
    top = torch.linalg.eigvalsh(single.double())[:, -1]
    error = (ritz.values[:, -1].double() - top).abs()
    assert (error <= ritz.residuals[:, -1]).all() and ritz.residuals[:, -1].max() < 0.1


def test_start_orthogonal_to_the_top_is_left_by_a_new_direction():
    """In exact arithmetic its Krylov space is one eigenvector wide."""
    matrix = torch.diag(torch.tensor([1.0, 2.0, 9.0, 4.0], dtype=torch.float64))[None]
    start = torch.tensor([[1.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    ritz = lanczos(product_with(matrix), start, 4)
    torch.testing.assert_close(ritz.values, torch.linalg.eigvalsh(matrix))
    assert_eigenpairs(ritz, matrix)


def test_rows_do_not_see_each_other():
    """One row closes at once, one is zero, one starts from zero; the fourth is as if alone."""
    matrix = symmetric(torch.linspace(1, 2, 9).tolist(), batch=4)
    matrix[0] = torch.eye(9)
    matrix[1] = 0
    start = random_start(4, 9)
    start[2] = 0
    together = lanczos(product_with(matrix), start, 5)
    alone = lanczos(product_with(matrix[3:]), start[3:], 5)
    torch.testing.assert_close(together.values[3:], alone.values)
    torch.testing.assert_close(together.values[0], torch.ones(5, dtype=torch.float64))
    assert (together.values[1] == 0).all() and (together.residuals[1] == 0).all()
    assert_eigenpairs(together, matrix)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_any_scale(scale):
    matrix = symmetric([1.0, 2.0, 3.0, 4.0, 5.0])
    ritz = lanczos(product_with(matrix * scale), random_start(1, 5), 5)
    torch.testing.assert_close(ritz.values / scale, torch.linalg.eigvalsh(matrix))


def test_leaves_the_random_stream_and_makes_no_graph():
    before = torch.get_rng_state()
    matrix = torch.eye(3, dtype=torch.float64)[None].requires_grad_()
    ritz = lanczos(product_with(matrix), torch.ones(1, 3, dtype=torch.float64), 3)
    assert torch.equal(torch.get_rng_state(), before) and not ritz.values.requires_grad


def test_half_precision_is_cast_up():
    seen = []
    lanczos(lambda v: seen.append(v.dtype) or v, torch.ones(1, 3, dtype=torch.bfloat16), 2)
    assert seen[0] == torch.float32


@pytest.mark.parametrize(
    ("matvec", "shape", "steps", "message"),
    [
        (lambda v: v, (3,), 2, r"start must have shape \(batch, n\), got \(3,\)"),
        (lambda v: v, (1, 3), 0, "steps: expected a whole number from 1, got 0"),
        (lambda v: v[:, :2], (1, 3), 2, r"matvec must map \(batch, n\) to itself, got \(1, 2\)"),
        (lambda v: v * float("nan"), (1, 3), 2, "matvec must return finite numbers"),
    ],
)
def test_refusals(matvec, shape, steps, message):
    with pytest.raises(ValueError, match=message):
        lanczos(matvec, torch.ones(shape), steps)
