import copy
from functools import partial

import pytest
import torch
from cases import small_net, trained_net
from torch import nn
from torch.utils.data import TensorDataset

from flatreg.attacks import pgd
from flatreg.evaluation import binarization as module
from flatreg.evaluation.binarization import binarization_test
from flatreg.models.heads import find_head
from flatreg.threat import Threat, distance

EPS = {"linf": 0.05, "l2": 0.5, "l1": 4.0}
STRONG = partial(pgd, steps=10)


def binarized(model, data, norm="linf", attack=STRONG, samples=8, inner=29, **options):
    return binarization_test(
        model,
        data,
        eps=EPS[norm],
        norm=norm,
        attack=attack,
        samples=samples,
        inner=inner,
        progress=False,
        **options,
    )


@pytest.fixture(scope="module")
def trained():
    return trained_net(n=64)


@pytest.fixture
def case(trained):
    model, x, y = trained
    return copy.deepcopy(model), TensorDataset(x, y)


def times(model, scale):
    with torch.no_grad():
        model[-1].weight.mul_(scale)
        model[-1].bias.mul_(scale)
    return model


@pytest.mark.parametrize("norm", EPS)
def test_a_strong_attack_passes_and_broken_ones_are_flagged(case, norm):
    model, data = case
    strong = binarized(model, data, norm)
    assert strong.success.value == 1 and strong.finding.verdict == "ok"
    assert strong.n == strong.success.n == strong.random.n == 8
    assert strong.random.value < 0.7  # the boundary is hard to meet by chance
    weak = binarized(model, data, norm, partial(pgd, steps=1, step_size=0.01))
    assert weak.success.value < 0.5 and weak.finding.verdict == "flagged"
    assert weak.finding.value == 1 - weak.success.value > weak.finding.threshold == 0.05


def test_cross_entropy_passes_on_the_model_and_is_flagged_where_the_model_saturates_it(case):
    model, data = case
    plain = partial(pgd, loss="cross_entropy")
    assert binarized(model, data, attack=plain).finding.verdict == "ok"
    times(model, 1000)
    assert binarized(model, data, attack=plain).success.value < 0.5
    assert binarized(model, data).finding.verdict == "ok"


def test_the_image_found_fools_within_the_ball_and_the_clean_one_does_not(case, monkeypatch):
    model, data = case
    seen = []
    real = module.cascade

    def spy(binary, image, labels, **options):
        result = real(binary, image, labels, **options)
        seen.append((binary, image, result))
        return result

    monkeypatch.setattr(module, "cascade", spy)
    for norm, eps in EPS.items():
        seen.clear()
        binarized(model, data, norm, samples=4)
        assert len(seen) == 4
        for binary, image, result in seen:
            with torch.no_grad():
                logits, own = binary(image)[0], model(image)[0].sort().values
            assert float(logits[0] - logits[1]) == pytest.approx(
                float(own[-1] - own[-2]), rel=1e-3, abs=1e-3
            )
            assert bool(result.fooled) and int(binary(result.inputs).argmax(1)) == 1
            assert float(distance(result.inputs, image, norm)) <= eps + 1e-4


def test_a_head_is_fitted_between_the_points_and_refused_where_there_is_no_gap():
    g = torch.Generator().manual_seed(0)
    inner = torch.randn(40, 8, generator=g)
    outer = torch.full((1, 8), 3.0)
    weight, bias = module._discriminate(inner, outer, margin=7.0)
    assert bool((inner @ weight + bias < 0).all()) and bool((outer @ weight + bias > 0).all())
    assert float(inner[0] @ weight + bias) == pytest.approx(-7, rel=1e-4)
    nearest, boundary = float((inner @ weight + bias).max()), float(outer[0] @ weight + bias)
    assert -nearest == pytest.approx(9 * boundary, rel=1e-2)  # near the boundary point
    assert module._discriminate(inner, inner.mean(0, keepdim=True), margin=7.0) is None


@pytest.mark.parametrize("norm", EPS)
def test_boundary_points_lie_on_the_boundary_and_inner_points_inside(norm):
    image = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    ball = module._Ball(image, Threat(norm=norm, eps=EPS[norm]), seed=0)
    outer, inner = ball.boundary(20, 3), ball.points(0.95 * EPS[norm], 20, 0)
    images = image.expand_as(outer)
    assert torch.allclose(
        distance(outer, images, norm), torch.full((20,), EPS[norm], dtype=torch.float64), rtol=1e-3
    )
    assert float(distance(inner, images, norm).max()) <= 0.95 * EPS[norm] * 1.001
    assert 0 <= float(outer.min()) and float(outer.max()) <= 1
    assert not torch.equal(outer[0], outer[1])


def test_the_model_is_left_as_it_was_and_the_seed_decides(case):
    _, data = case
    model = small_net(dropout=0.5).train()
    model[1].eval()
    nn.functional.cross_entropy(model(data.tensors[0]), data.tensors[1]).backward()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    gradients = [p.grad.clone() for p in model.parameters()]
    modes, stream = [m.training for m in model.modules()], torch.get_rng_state()
    first = binarized(model, data, samples=4, seed=3)
    assert torch.equal(torch.get_rng_state(), stream)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    assert binarized(model, data, samples=4, seed=3, batch_size=4) == first
    assert find_head(model, data.tensors[0]).name == "8"


def test_bad_input_is_refused_in_one_line(case):
    model, data = case
    x, y = data.tensors
    blind = nn.Sequential(nn.Flatten(), nn.Threshold(2.0, 0.0), nn.Linear(256, 5))
    squashed = nn.Sequential(model, nn.Softmax(1))
    for message, call in {
        "inner: expected a whole number from 1, got 0": lambda: binarized(model, data, inner=0),
        "norm must be one of linf": lambda: binarization_test(model, data, eps=0.1, norm="l3"),
        "for 8 grey levels of 255": lambda: binarization_test(model, data, eps=8),
        "images in": lambda: binarized(model, TensorDataset(x - 1, y)),
        "got none for 8 samples": lambda: binarized(blind, data),
        "returns probabilities": lambda: binarized(squashed, data),
    }.items():
        with pytest.raises(ValueError, match=message) as error:
            call()
        assert "\n" not in str(error.value)


def test_the_result_reads_in_one_line(case):
    text = str(binarized(*case, samples=4))
    assert text.startswith("binarization test: 100.0%") and "n = 4: ok" in text
