import math
from decimal import Decimal, localcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import relative_flatness_by_hessian

from flatreg.measures.relative_flatness import (
    head_hessian_trace,
    layerwise_flatness,
    log_relative_flatness,
    max_eigenvalue_flatness,
    relative_flatness,
    scale_to_confidence,
)


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


def binary_cross_entropy(logits, targets):
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(1)


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


@settings(max_examples=25, deadline=None)
@given(shapes, st.sampled_from(["bce", "mse"]))
def test_named_losses_equal_the_hessian_block_sum_whatever_the_targets(shape, name):
    features, weight, bias, _ = draw(*shape)
    targets = torch.rand(len(features), len(weight), dtype=torch.float64)
    loss = {"bce": binary_cross_entropy, "mse": lambda z, t: (z - t).square().sum(1)}[name]
    kappa = relative_flatness(features, features @ weight.T + bias, weight, loss=name)
    for i in range(len(features)):
        oracle = relative_flatness_by_hessian(features[i], weight, bias, targets[i], loss)
        assert torch.isclose(kappa[i], oracle, rtol=1e-10, atol=1e-14)


def test_bce_keeps_its_digits_where_sigmoid_saturates():
    """1 - sigmoid(40) is 0 in float32; q (1 - q) is exp(-40)."""
    features, weight = torch.ones(1, 1), torch.ones(2, 1)
    kappa = relative_flatness(features, torch.tensor([[40.0, -50.0]]), weight, loss="bce")
    assert float(kappa) == pytest.approx(math.exp(-40), rel=1e-5)


@settings(max_examples=25, deadline=None)
@given(shapes)
def test_the_companions_equal_what_they_are_read_off_the_dense_hessian(shape):
    features, weight, bias, labels = draw(*shape)
    logits = features @ weight.T + bias
    trace = head_hessian_trace(features, logits)
    layerwise = layerwise_flatness(features, logits, weight)
    top = max_eigenvalue_flatness(features, logits, weight)
    assert bool((layerwise >= relative_flatness(features, logits, weight) - 1e-12).all())
    classes, width = weight.shape
    for i in range(len(features)):

        def loss(flat, i=i):
            z = features[i] @ flat.reshape(classes, width).T + bias
            return F.cross_entropy(z, labels[i])

        hessian = torch.autograd.functional.hessian(loss, weight.flatten())
        expected = hessian.trace()
        assert torch.isclose(trace[i], expected, rtol=1e-10, atol=1e-14)
        norm = weight.square().sum()
        assert torch.isclose(layerwise[i], norm * expected, rtol=1e-10, atol=1e-14)
        blocks = [hessian[s : s + width, s : s + width] for s in range(0, len(hessian), width)]
        largest = torch.stack([torch.linalg.eigvalsh(block)[-1] for block in blocks])
        expected = (weight.square().sum(1) * largest).sum()
        assert torch.isclose(top[i], expected, rtol=1e-10, atol=1e-14)


def exact_kappa(features, logits, weight):
    """The textbook formula in decimal arithmetic, whose exponents do not end."""
    with localcontext() as context:
        context.prec = 60 + int(2 * (logits.amax(1) - logits.amin(1)).max())  # p is squared
        phi, z = ([Decimal(v) for v in row.tolist()] for row in (features[0], logits[0]))
        rows = [[Decimal(v) for v in row] for row in weight.tolist()]
        e = [(v - max(z)).exp() for v in z]
        p = [v / sum(e) for v in e]
        mean = [sum(q * row[j] for q, row in zip(p, rows, strict=True)) for j in range(len(phi))]
        second = sum(q * sum(v * v for v in row) for q, row in zip(p, rows, strict=True))
        kappa = sum(v * v for v in phi) * (second - sum(v * v for v in mean))
        return kappa, float(kappa.ln())


@settings(max_examples=25, deadline=None)
@given(shapes, st.floats(0, 300))
def test_logarithm_equals_exact_arithmetic_at_any_confidence(shape, scale):
    features, weight, bias, _ = draw(1, *shape[1:])
    logits = scale * (features @ weight.T + bias)
    _, expected = exact_kappa(features, logits, weight)
    value = log_relative_flatness(features, logits, weight)
    assert float(value) == pytest.approx(expected, rel=1e-9, abs=1e-8)


def test_logarithm_is_the_logarithm_of_kappa_where_that_has_digits():
    features, weight, bias, _ = draw(64, 6, 8, seed=8)
    logits = features @ weight.T + bias
    kappa = relative_flatness(features, logits, weight)
    torch.testing.assert_close(log_relative_flatness(features, logits, weight), kappa.log())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logarithm_pulls_where_kappa_has_no_gradient_left(dtype):
    """Logits times 1000: kappa is 0 and so is its gradient; the logarithm falls like the margin."""
    features, weight, bias, _ = (t.to(dtype) for t in draw(16, 5, 8, seed=9))
    logits = (1000 * (features @ weight.T + bias)).requires_grad_()
    top = logits.detach().topk(2, 1)
    gap = top.values[:, 0] - top.values[:, 1]
    kappa = relative_flatness(features, logits, weight)
    value = log_relative_flatness(features, logits, weight)
    assert bool((value < -1000).any()) and bool((kappa == 0).any())
    (dead,) = torch.autograd.grad(kappa.sum(), logits, retain_graph=True)
    (pull,) = torch.autograd.grad(value.sum(), logits)
    far = gap > 800
    assert int(far.sum()) >= 5
    assert dead[far].count_nonzero() == 0 and bool(pull.isfinite().all())
    ones = torch.ones(16, dtype=dtype)
    torch.testing.assert_close(pull.gather(1, top.indices[:, :1])[far, 0], -ones[far])
    torch.testing.assert_close(pull.gather(1, top.indices[:, 1:])[far, 0], ones[far])


@pytest.mark.parametrize("scale", [1, 1000])
def test_gradient_of_the_logarithm(scale):
    features, weight, bias, _ = draw(3, 4, 3, seed=11)
    logits = scale * (features @ weight.T + bias)
    arguments = [t.requires_grad_() for t in (features, logits, weight)]
    assert torch.autograd.gradcheck(log_relative_flatness, arguments)


def test_the_logarithm_needs_two_classes():
    features, weight, bias, _ = draw(2, 3, 4, seed=12)
    logits = features @ weight.T + bias
    with pytest.raises(ValueError, match="two classes at least"):
        log_relative_flatness(features, logits[:, :1], weight[:1])


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


@pytest.mark.parametrize("loss", ["cross_entropy", "bce", "mse"])
def test_gradcheck_of_named_losses_and_companions(loss):
    features, weight, bias, _ = draw(2, 4, 3, seed=13)

    def through_the_head(phi, w):
        logits = phi @ w.T + bias
        own = relative_flatness(phi, logits, w, loss=loss)
        return own, layerwise_flatness(phi, logits, w), max_eigenvalue_flatness(phi, logits, w)

    assert torch.autograd.gradcheck(
        through_the_head, [t.requires_grad_() for t in (features, weight)]
    )


@pytest.mark.parametrize("loss", ["cross_entropy", "bce", "mse"])
def test_invariant_under_orthogonal_maps_and_not_under_rescaling_of_single_features(loss):
    features, weight, bias, _ = draw(4, 5, 6, seed=14)
    logits = features @ weight.T + bias
    kappa = relative_flatness(features, logits, weight, loss=loss)
    turn = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
    turned = relative_flatness(features @ turn, logits, weight @ turn, loss=loss)
    torch.testing.assert_close(turned, kappa, rtol=1e-10, atol=0)
    c = torch.linspace(0.2, 3, 6, dtype=torch.float64)
    torch.testing.assert_close((features * c) @ (weight / c).T + bias, logits)
    rescaled = relative_flatness(features * c, logits, weight / c, loss=loss)
    assert bool(((rescaled / kappa).log().abs() > 0.05).all())


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
    assert float(error.max()) < 2e-5
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


@pytest.mark.parametrize("loss", ["cross_entropy", "bce", "mse", squared_error])
def test_half_precision_is_cast_up(loss):
    features, weight, bias, labels = draw(32, 10, 32, seed=15)
    low = [t.bfloat16() for t in (features, features @ weight.T + bias, weight)]
    high = [t.double() for t in low]
    kappa = relative_flatness(*low, loss=loss, labels=labels)
    assert kappa.dtype == torch.float32
    exact = relative_flatness(*high, loss=loss, labels=labels)
    torch.testing.assert_close(kappa.double(), exact, rtol=1e-4, atol=1e-6)
    for measure in (layerwise_flatness, max_eigenvalue_flatness, log_relative_flatness):
        value = measure(*low)
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), measure(*high), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("measure", [layerwise_flatness, max_eigenvalue_flatness])
def test_companions_keep_their_digits_where_softmax_saturates(measure):
    features, weight, bias, _ = draw(256, 10, 32, seed=16)
    low = features.float(), (10 * (features @ weight.T + bias)).float(), weight.float()
    exact = measure(*(t.double() for t in low))
    representable = exact > 1e-30
    error = ((measure(*low).double() - exact) / exact).abs()[representable]
    assert int(representable.sum()) > 100 and float(error.max()) < 2e-5


def test_an_unknown_loss_is_named():
    one = torch.ones(1, 2)
    with pytest.raises(ValueError, match=r"cross_entropy, bce, mse or a function, got 'hinge'"):
        relative_flatness(one, one, torch.eye(2), loss="hinge")


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_loss_of_the_batch_is_refused(reduction):
    """Its kappa would be a multiple of that of the samples."""
    ones, labels = torch.ones(2, 2), torch.tensor([0, 1])
    loss = partial(F.cross_entropy, reduction=reduction)
    with pytest.raises(ValueError, match="expected a loss per sample"):
        relative_flatness(ones, ones, ones, loss=loss, labels=labels)


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


def test_many_classes_take_another_road_to_the_same_value():
    """More classes than samples: no Gram matrix of all of them."""
    torch.manual_seed(0)
    weight, features = torch.randn(40, 6).double(), torch.randn(50, 6).double()
    logits = features @ weight.T
    whole = relative_flatness(features, logits, weight)  # 50 samples, 40 classes
    parts = [
        relative_flatness(f[None], z[None], weight) for f, z in zip(features, logits, strict=True)
    ]
    torch.testing.assert_close(torch.cat(parts), whole)


def test_log_kappa_of_a_head_that_starts_at_zero_is_finite():
    features = torch.randn(4, 6, requires_grad=True)
    weight = torch.zeros(5, 6, requires_grad=True)
    value = log_relative_flatness(features, features @ weight.T, weight)
    value.sum().backward()
    assert bool(value.isfinite().all()) and bool(features.grad.isfinite().all())
    assert bool(weight.grad.isfinite().all())


@pytest.mark.parametrize(
    "measure",
    [relative_flatness, log_relative_flatness, layerwise_flatness, max_eigenvalue_flatness],
)
def test_features_of_another_layer_are_refused(measure):
    features, weight, bias, _ = draw(4, 3, 5, seed=0)
    logits = features @ weight.T + bias
    assert measure(features, logits, weight).shape == (4,)
    for wrong in (
        (features[:, :2], logits, weight),
        (features, logits, weight.T),
        (features[:1], logits, weight),
        (features, logits[:, :2], weight),
        (features, logits, weight[:, :, None, None]),
    ):
        with pytest.raises(ValueError, match=r"^expected features \(batch, d\), logits") as error:
            measure(*wrong)
        assert "\n" not in str(error.value)
    with pytest.raises(TypeError, match=r"got a Linear: flatreg.measures.pass_to_head\(model"):
        measure(torch.nn.Linear(3, 5), features, torch.zeros(4))
