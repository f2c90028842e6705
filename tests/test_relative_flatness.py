import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import relative_flatness_by_hessian

from flatreg import relative_flatness, scale_to_confidence


def draw(batch, classes, width, seed, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    features = torch.randn(batch, width, generator=g, dtype=torch.float64)
    weight = torch.randn(classes, width, generator=g, dtype=torch.float64)
    bias = torch.randn(classes, generator=g, dtype=torch.float64)
    labels = torch.randint(0, classes, (batch,), generator=g)
    return features, scale * weight, scale * bias, labels


shapes = st.tuples(st.integers(1, 3), st.integers(2, 5), st.integers(1, 5), st.integers(0, 10**6))


@settings(max_examples=40, deadline=None)
@given(shapes)
def test_equals_the_hessian_block_sum(shape):
    features, weight, bias, labels = draw(*shape)
    logits = features @ weight.T + bias
    kappa = relative_flatness(features, logits, weight)
    for i in range(len(features)):
        oracle = relative_flatness_by_hessian(features[i], weight, bias, labels[i])
        assert torch.isclose(kappa[i], oracle, rtol=1e-10, atol=1e-14)


def focal(logits, labels):
    log_p = -F.cross_entropy(logits, labels, reduction="none")
    return -((1 - log_p.exp()) ** 2) * log_p


def cross_entropy(logits, labels):
    return F.cross_entropy(logits, labels, reduction="none")


def squared_error(logits, labels):
    return (logits - F.one_hot(labels, logits.shape[1]).to(logits)).square().sum(1)


def affine(logits, labels):
    return -logits.gather(1, labels[:, None])[:, 0]


@pytest.mark.parametrize("loss", [focal, cross_entropy, squared_error, affine])
def test_any_loss_of_logits_equals_the_hessian_block_sum(loss):
    features, weight, bias, labels = draw(3, 4, 5, seed=1)
    logits = features @ weight.T + bias
    kappa = relative_flatness(features, logits, weight, loss=loss, labels=labels)
    for i in range(3):
        oracle = relative_flatness_by_hessian(features[i], weight, bias, labels[i], loss)
        assert torch.isclose(kappa[i], oracle, rtol=1e-10)


def test_a_loss_of_ones_own_is_differentiable_and_agrees_with_the_closed_form():
    features, weight, bias, labels = draw(3, 4, 5, seed=6)
    gradients = []
    for settings_ in ({}, {"loss": cross_entropy, "labels": labels}):
        phi = features.clone().requires_grad_()
        kappa = relative_flatness(phi, phi @ weight.T + bias, weight, **settings_)
        gradients.append(torch.autograd.grad(kappa.sum(), phi)[0])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_soft_targets_have_the_same_kappa():
    features, weight, bias, _ = draw(1, 4, 3, seed=2)
    soft = torch.tensor([[0.1, 0.2, 0.3, 0.4]], dtype=torch.float64)
    oracle = relative_flatness_by_hessian(features[0], weight, bias, soft[0])
    assert torch.isclose(relative_flatness(features, features @ weight.T + bias, weight)[0], oracle)


def test_gradcheck_through_features_weight_and_logits():
    features, weight, bias, _ = draw(3, 4, 3, seed=3)

    def through_the_head(phi, w):
        return relative_flatness(phi, phi @ w.T + bias, w)

    assert torch.autograd.gradcheck(
        through_the_head, (features.requires_grad_(), weight.requires_grad_())
    )
    logits = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(relative_flatness, (features, logits, weight))


@settings(max_examples=30, deadline=None)
@given(shapes, st.floats(0.01, 100))
def test_invariant_under_rescaling_between_features_and_weight(shape, c):
    features, weight, bias, _ = draw(*shape)
    logits = features @ weight.T + bias
    kappa = relative_flatness(features, logits, weight)
    rescaled = relative_flatness(c * features, logits, weight / c)
    torch.testing.assert_close(rescaled, kappa, rtol=1e-9, atol=1e-14)


@settings(max_examples=50, deadline=None)
@given(shapes, st.floats(0, 500))
def test_never_negative_in_float32(shape, scale):
    features, weight, bias, _ = draw(*shape, scale=scale)
    kappa = relative_flatness(
        features.float(), (features @ weight.T + bias).float(), weight.float()
    )
    assert bool((kappa >= 0).all())


def test_float32_keeps_its_digits_where_softmax_saturates():
    """Logits scaled by 60: the textbook form has no digit right there, the stable one has four."""
    features, weight, bias, _ = draw(256, 10, 32, seed=4)
    logits = (60 * (features @ weight.T + bias) / 32**0.5).float()
    low = features.float(), logits, weight.float()
    exact = relative_flatness(*(t.double() for t in low))
    p = logits.softmax(1)
    squared = low[2].square().sum(1)
    naive = low[0].square().sum(1) * (p @ squared - (p @ low[2]).square().sum(1))
    representable = exact > 1e-30  # below, the probabilities themselves leave float32
    assert int(representable.sum()) > 200
    error = ((relative_flatness(*low).double() - exact) / exact).abs()[representable]
    naive_error = ((naive.double() - exact) / exact).abs()[representable]
    assert float(error.max()) < 1e-4
    assert float(naive_error.median()) > 0.1


def test_a_common_offset_of_the_rows_costs_no_digit():
    """A variance does not see it; the Gram matrix of the rows, squared, does."""
    features, weight, bias, _ = draw(64, 10, 64, seed=7)
    logits = features @ weight.T + bias
    kappa = relative_flatness(features.float(), logits.float(), (weight + 100).float())
    exact = relative_flatness(features, logits.float().double(), (weight + 100).float().double())
    torch.testing.assert_close(kappa.double(), exact, rtol=1e-4, atol=1e-8)


def test_bfloat16_autocast_is_within_one_percent():
    features, weight, bias, _ = draw(64, 10, 32, seed=5)
    head = torch.nn.Linear(32, 10)
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.copy_(bias)
    with torch.autocast("cpu", torch.bfloat16):
        low = features.bfloat16()
        logits = head(low)
        assert logits.dtype == torch.bfloat16
        kappa = relative_flatness(low, logits, head.weight)
    exact = relative_flatness(low.double(), logits.double(), head.weight.double())
    assert kappa.dtype == torch.float32
    torch.testing.assert_close(kappa.double(), exact, rtol=1e-2, atol=1e-6)


def test_a_loss_of_ones_own_needs_labels():
    with pytest.raises(ValueError, match="needs labels"):
        relative_flatness(torch.ones(1, 2), torch.ones(1, 2), torch.ones(2, 2), loss=focal)


def test_scale_to_confidence_meets_it_and_undoes_a_scaled_head():
    logits = torch.randn(101, 5, generator=torch.Generator().manual_seed(0))
    c = scale_to_confidence(logits, 0.9)
    assert abs(float((c * logits.double()).softmax(1).amax(1).median()) - 0.9) < 1e-9
    assert scale_to_confidence(100 * logits, 0.9) == pytest.approx(c / 100)
    with pytest.raises(ValueError, match="no scale"):
        scale_to_confidence(torch.zeros(3, 5), 0.9)
