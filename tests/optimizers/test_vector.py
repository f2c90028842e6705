"""Norms and displacements of many tensors, on the path of the CPU and on that of accelerators."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flatreg.optimizers import vector
from flatreg.optimizers.vector import chunks, displace, inner, norm, safe_inverse, undo


def tensors(dtype=torch.float32):
    torch.manual_seed(0)
    drawn = dtype if dtype.is_complex else torch.float32
    return [torch.randn(s, dtype=drawn).to(dtype) for s in ((3, 4), (5,), (2, 3, 2), (1,), (4, 5))]


def test_norm_and_inner_product():
    a, b = tensors(), tensors()[::1]
    flat = torch.cat([t.flatten() for t in a])
    torch.testing.assert_close(norm(a), flat.norm())
    torch.testing.assert_close(inner(a, b), flat @ flat)
    mixed = [a[0].bfloat16(), a[1], a[2].double()]
    exact = torch.cat([t.double().flatten() for t in mixed]).norm()
    torch.testing.assert_close(norm(mixed).double(), exact, rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match="got none"):
        norm([])


def test_of_complex_vectors_both_are_those_of_their_real_and_imaginary_parts():
    a = tensors(torch.complex128) + tensors(torch.float64)
    b = [1j * t if t.is_complex() else 3 * t for t in a]
    parts = [[torch.view_as_real(t) if t.is_complex() else t for t in v] for v in (a, b)]
    flat = [torch.cat([t.flatten() for t in v]) for v in parts]
    for got, expected in ((norm(a), flat[0].norm()), (inner(a, b), flat[0] @ flat[1])):
        assert not got.is_complex()
        torch.testing.assert_close(got, expected)


def test_the_norm_of_scaled_half_precision_gradients_does_not_overflow():
    gradients = [torch.full((1000,), 3e4, dtype=torch.float16)]
    assert torch.isinf(gradients[0].norm())
    torch.testing.assert_close(norm(gradients), torch.tensor(3e4 * 1000**0.5))


@pytest.mark.parametrize("size", [1e-4, 100.0])  # squares of the first are 0, of the others inf
def test_the_inner_product_of_half_precision_neither_underflows_nor_overflows(size):
    gradients = [torch.full((1000,), size, dtype=torch.float16)]
    exact = gradients[0].double().square().sum().float()
    torch.testing.assert_close(inner(gradients, gradients), exact)


@pytest.mark.parametrize("value", [0.0, float("inf"), float("nan"), -1.0, 1e-45])
def test_safe_inverse_of_what_cannot_be_inverted(value):
    assert safe_inverse(torch.tensor(value)) == 0


@given(st.lists(st.integers(1, 50), max_size=20))
@settings(deadline=None)
def test_chunks_cover_everything_once_and_are_no_larger_than_the_largest(sizes):
    vector = [torch.empty(n) for n in sizes]
    parts = [vector[part] for part in chunks(vector)]
    assert [t for part in parts for t in part] == vector or not sizes
    assert all(sum(t.numel() for t in part) <= max(sizes) for part in parts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.complex64])
@pytest.mark.parametrize("foreach", [False, True], ids=["cpu", "accelerator"])
@pytest.mark.parametrize("one", [True, False], ids=["one scale", "a scale each"])
def test_displacement_and_its_exact_undoing(foreach, dtype, one):
    weights, directions = tensors(dtype), [2 * t for t in tensors(dtype)]
    before = [w.clone() for w in weights]
    memory = {d.data_ptr() for d in directions}
    shared = torch.tensor(0.25)
    scales = [shared if one else torch.tensor(0.25 * i) for i in range(len(weights))]
    saved = []
    displace(weights, directions, scales, saved, foreach=foreach)
    for w, old, s in zip(weights, before, scales, strict=True):
        torch.testing.assert_close(w, (old + s * 2 * old).to(dtype))
    assert all(kept.data_ptr() in memory for _, kept in saved)  # nothing allocated is kept
    undo(saved)
    assert all(torch.equal(w, old) for w, old in zip(weights, before, strict=True))


@pytest.mark.parametrize("foreach", [False, True], ids=["cpu", "accelerator"])
def test_a_scale_of_zero_moves_nothing_whatever_the_direction_holds(foreach):
    weights = tensors()
    before = [w.clone() for w in weights]
    directions = [torch.full_like(w, float("nan")) for w in weights]
    nothing = torch.zeros(())
    displace(weights, directions, [nothing] * len(weights), saved := [], foreach=foreach)
    assert all(torch.equal(w, old) for w, old in zip(weights, before, strict=True))
    undo(saved)
    assert all(torch.equal(w, old) for w, old in zip(weights, before, strict=True))


@pytest.mark.parametrize("limit", [1 << 30, 64, 1])
def test_an_average_over_processes_is_sent_in_buckets(monkeypatch, limit):
    """The collective of two equal processes: it doubles what each sends."""
    sent = []

    class Done:
        def wait(self):
            pass

    def doubled(tensor, group, async_op):
        sent.append(tensor)
        tensor.mul_(2)
        return Done()

    monkeypatch.setattr(vector, "_BUCKET", limit)
    monkeypatch.setattr(vector.dist, "get_world_size", lambda group: 2)
    monkeypatch.setattr(vector.dist, "all_reduce", doubled)
    tensors = [
        torch.randn(3, 4),
        torch.randn(()),
        torch.randn(0, 2),
        torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        torch.randn(5, 2).double(),
        torch.randn(4, 3).t(),
        torch.randn(2, dtype=torch.complex64),
        torch.eye(3).to_sparse(),
        torch.randn(7),
    ]
    before = [tensor.clone() for tensor in tensors]
    vector.average_over(tensors, None)
    for tensor, was in zip(tensors, before, strict=True):
        assert tensor.shape == was.shape and torch.equal(tensor.to_dense(), was.to_dense())
    kinds = 4  # float32, float64, complex64 and sparse
    assert len(sent) == {1 << 30: kinds, 64: kinds + 3, 1: len(tensors)}[limit]


def test_two_parameters_in_one_memory_come_back():
    """As where the data of one was set to that of the other: both are displaced, in turn."""
    first = torch.rand(4, 3, dtype=torch.float64)
    weights = [first, first.view(4, 3)[1:]]
    before = first.clone()
    directions = [torch.rand_like(w) for w in weights]
    total = before + 0.5 * directions[0]
    total[1:] += 0.5 * directions[1]
    half = torch.tensor(0.5, dtype=torch.float64)
    displace(weights, directions, [half, half], saved := [], foreach=False)
    torch.testing.assert_close(first, total)
    undo(saved)
    assert torch.equal(first, before)
