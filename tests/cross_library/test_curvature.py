"""Against curvlinops: products, trace and top eigenvalue of the same matrices."""

from __future__ import annotations

import pytest
import torch
from cases import images
from torch import nn

from flatreg.measures.parameters import LossInWeights
from flatreg.measures.weight_hessian import (
    curvature_product,
    hessian_top_eigenvalue,
    hessian_trace_estimate,
)
from flatreg.models.state import untouched

curvlinops = pytest.importorskip("curvlinops", reason="a peer that is not required")
# torch scripts its own forward-mode rules, which the peer uses.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")


@pytest.fixture(scope="module")
def case():
    """A small convolutional net, its data, and the peer's Hessian and Gauss-Newton matrix.

    Tanh, because the peer (3.0.1) differentiates forward over backward and SiLU lacks that rule.
    """
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3, stride=2, padding=1),
        nn.BatchNorm2d(6),
        nn.Tanh(),
        nn.Conv2d(6, 8, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 5),
    ).to(torch.float64)
    model, (x, y) = model.eval(), images()
    data = [(x.double(), y)]
    parameters = list(model.parameters())
    operators = {
        "hessian": curvlinops.HessianLinearOperator,
        "gauss_newton": curvlinops.GGNLinearOperator,
    }
    made = {
        name: operator(model, nn.CrossEntropyLoss(), parameters, data, check_deterministic=False)
        for name, operator in operators.items()
    }
    return model, x.double(), y, made


@pytest.mark.parametrize("curvature", ["hessian", "gauss_newton"])
def test_products(case, curvature):
    model, x, y, operators = case
    torch.manual_seed(1)
    vectors = [torch.randn_like(p) for p in model.parameters()]
    with untouched(model):
        found = curvature_product(LossInWeights.of(model, x, y), curvature)(vectors)
    expected = operators[curvature] @ vectors
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("curvature", ["hessian", "gauss_newton"])
def test_top_eigenvalue(case, curvature):
    """By scipy's eigsh on the peer's operator."""
    from scipy.sparse.linalg import eigsh

    model, x, y, operators = case
    (expected,) = eigsh(operators[curvature].to_scipy(), k=1, which="LA")[0]
    found = hessian_top_eigenvalue(model, x, y, matrix=curvature, steps=40)
    assert abs(found.value - expected) <= (found.high - found.low) / 2 + 1e-8 * expected
    assert found.high - found.value < 1e-3 * expected


def test_trace(case):
    """Two independent estimates: ours within four errors of the peer's exact diagonal."""
    model, x, y, operators = case
    operator = operators["gauss_newton"]
    size = operator.shape[1]
    exact = float((operator @ torch.eye(size, dtype=torch.float64)).trace())
    found = hessian_trace_estimate(model, x, y, matrix="gauss_newton", num_probes=100)
    assert abs(found.value - exact) < 4 * found.stderr < 0.5 * exact
