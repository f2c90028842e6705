import copy
import random
import sys
from functools import partial

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from cases import LIGHT, small_net, trained_net
from timm.utils import ModelEmaV3
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from flatreg import AttackedAccuracy, Estimate, evaluate, relative_flatness
from flatreg.attacks import AttackResult, cascade, pgd
from flatreg.evaluation.evaluate import CURVE_ATTACK
from flatreg.measures import margin


def quiet(*args, **options):
    return evaluate(*args, **{"attack": LIGHT, "progress": False} | options)


@pytest.fixture(scope="module")
def case():
    model, x, y = trained_net(n=200)
    return model, TensorDataset(x, y), x, y


def test_reports_what_the_cascade_finds(case):
    model, data, x, y = case
    result = quiet(model, data, eps=0.03)
    right = model(x).argmax(1) == y
    survived = ~cascade(model, x, y, eps=0.03, attacks=LIGHT, indices=range(200)).fooled & right
    assert result.n == 200 and result.clean.count == int(right.sum())
    assert result.attacked.count == int(survived.sum())
    assert [v == -1 for v in result.verdicts] == survived.tolist()
    left = [stage.accuracy.count for stage in result.stages]
    assert len(left) == 5 and left == sorted(left, reverse=True)
    assert left[-1] == result.attacked.count
    assert result.indices == list(range(200)) and result.versions["torch"] == torch.__version__


def test_counts_every_pass(case):
    model, data, _, _ = case
    seen = []
    hook = model.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    result = quiet(model, data, eps=0.03, batch_size=64, diagnose=False)
    hook.remove()
    assert result.forwards == sum(seen) - 8 - 4  # eight to check the logits, four to find the head
    more = dict(curve=[0.01], other_threats={"l2": 0.1}, batch_size=64, diagnose=False)
    other = quiet(model, data, eps=0.03, **more)
    assert (other.forwards, other.backwards) == (result.forwards, result.backwards)
    fallen = sum(v >= 0 for v in result.verdicts)
    assert 0 < result.backwards <= result.forwards - 200 - fallen


def test_wilson_interval():
    """Against the formula written out, and at the ends where the normal interval has width zero."""
    accuracy, z, n, p = Estimate.share(7, 40), 1.959963984540054, 40, 7 / 40
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5 / (1 + z * z / n)
    assert (accuracy.low, accuracy.high) == pytest.approx((centre - half, centre + half))
    assert Estimate.share(0, 50).low == 0 and Estimate.share(0, 50).high == pytest.approx(
        0.0713, abs=1e-3
    )


def test_leaves_no_trace_in_a_model_that_is_being_trained():
    """Train mode, one frozen BatchNorm, accumulated gradients, a frozen weight, all streams."""
    _, x, y = trained_net(n=64)
    model = small_net(batch_norm=True, dropout=0.5).train()
    model[1].eval()
    model[0].bias.requires_grad_(False)
    torch.nn.functional.cross_entropy(model(x), y).backward()
    hook = AttackedAccuracy(TensorDataset(x, y), eps=0.03, samples=32)
    for act in (
        lambda: hook(model, 0),
        lambda: quiet(model, TensorDataset(x, y), eps=0.03, curve=[0.1]),
    ):
        state = {k: v.clone() for k, v in model.state_dict().items()}
        gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        flags = [p.requires_grad for p in model.parameters()]
        modes = [m.training for m in model.modules()]
        streams = torch.get_rng_state(), np.random.get_state(), random.getstate()
        assert act() is not None
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
        for p, g in zip(model.parameters(), gradients, strict=True):
            assert (p.grad is None) if g is None else torch.equal(p.grad, g)
        assert [p.requires_grad for p in model.parameters()] == flags
        assert [m.training for m in model.modules()] == modes
        assert torch.equal(torch.get_rng_state(), streams[0])
        assert all(
            np.array_equal(a, b) for a, b in zip(np.random.get_state(), streams[1], strict=True)
        )
        assert random.getstate() == streams[2]


def test_the_model_comes_back_when_an_attack_raises(case):
    model, data, _, _ = case
    model.train()

    def broken(*args, **kwargs):
        raise KeyError("boom")

    with pytest.raises(KeyError):
        quiet(model, data, eps=0.03, attack=broken)
    assert all(m.training for m in model.modules())
    model.eval()


def test_a_lying_attack_is_caught(case):
    model, data, _, _ = case

    def too_far(model, inputs, labels, *, eps, **kwargs):
        return pgd(model, inputs, labels, eps=2 * eps, **kwargs)

    def empty_claim(model, inputs, labels, **kwargs):
        return AttackResult(inputs, torch.zeros_like(labels), 0, 0)

    with pytest.raises(RuntimeError, match="an attack left its threat model"):
        quiet(model, data, eps=0.05, attack=too_far)
    result = quiet(model, data, eps=0.05, attack=empty_claim)
    assert result.attacked.count == result.clean.count  # re-scored: nothing was fooled


@pytest.mark.parametrize(
    ("preset", "scale", "samples"),
    [
        ("fast", 1024.0, 200),
        ("fast", 1000.0, 200),
        ("standard", 1024.0, 40),
        ("standard", 1000.0, 40),
        ("standard-full", 1024.0, 30),
        ("rand", 1024.0, 30),
    ],
)
def test_the_scale_of_the_head_changes_no_verdict(preset, scale, samples):
    model, x, y = trained_net(n=200)
    data = TensorDataset(x, y)
    options = dict(eps=0.028, samples=samples, attack=preset, diagnose=False, votes=1)
    before = quiet(model, data, **options)
    with torch.no_grad():
        model[-1].weight.mul_(scale)
        model[-1].bias.mul_(scale)
    after = quiet(model, data, **options)
    changed = sum(a != b for a, b in zip(before.verdicts, after.verdicts, strict=True))
    assert changed == 0
    assert 0 < before.attacked.value < 0.9
    if scale == 1024:
        assert before.attacked_margins == [m and m / 1024 for m in after.attacked_margins]


def test_the_curve_is_monotone_and_agrees_with_separate_evaluations(case):
    model, data, _, _ = case
    grid = [0.005, 0.02, 0.03, 0.06, 0.2]
    result = quiet(model, data, eps=0.03, curve=grid, diagnose=False)
    values = [point.accuracy.count for point in result.curve]
    assert values == sorted(values, reverse=True) and values[2] == result.attacked.count
    assert values[0] <= result.clean.count and values[-1] == 0
    for point in result.curve:
        alone = quiet(model, data, eps=point.eps, attack=CURVE_ATTACK, diagnose=False)
        assert abs(point.accuracy.count - alone.attacked.count) <= 2


class Threshold(torch.nn.Module):
    """One pixel, two classes: above a half, and below. The margin is the distance."""

    def forward(self, x):
        pixel = x.flatten(1)
        return torch.cat([0.5 - pixel, pixel - 0.5], 1)


def test_expected_robustness_is_the_area_under_the_curve_of_each_sample():
    distances = torch.linspace(0.011, 0.29, 40)
    x = (0.5 + distances).reshape(-1, 1, 1, 1)
    y = torch.ones(40, dtype=torch.long)
    y[::10] = 0  # wrong when clean: these survive at no radius
    data, eps, radii = TensorDataset(x, y), 0.2, [0.05, 0.1]
    result = quiet(Threshold(), data, eps=eps, curve=[*radii, 0.25], diagnose=False)
    areas = []
    for far, label in zip(distances.tolist(), y.tolist(), strict=True):
        heights = [float(label == 1 and far > radius) for radius in (0.0, *radii, eps)]
        pieces = zip((0.05, 0.05, 0.1), heights[:-1], heights[1:], strict=True)
        areas.append(sum(width * (a + b) / 2 for width, a, b in pieces) / eps)
    assert result.expected.value == pytest.approx(np.mean(areas))
    assert result.expected.stderr == pytest.approx(np.std(areas, ddof=1) / 40**0.5)
    assert result.attacked.value < result.expected.value < result.clean.value
    assert "expected, 0 to eps" in str(result)
    for point in result.curve:
        assert f"at eps {point.eps:<13.4g} {point.accuracy}" in str(result)
    assert quiet(Threshold(), data, eps=eps, curve=[0.25], diagnose=False).expected is None


def test_subset_and_verdicts_depend_on_the_seed_and_not_on_the_batch_size(case):
    model, data, _, _ = case
    one = quiet(model, data, eps=0.03, samples=40, seed=5, diagnose=False)
    two = quiet(model, data, eps=0.03, samples=40, seed=5, diagnose=False, batch_size=7)
    other = quiet(model, data, eps=0.03, samples=40, seed=6, attack="fast", diagnose=False)
    assert (one.indices, one.verdicts) == (two.indices, two.verdicts)
    assert one.indices != other.indices and len(set(one.indices)) == 40


def test_takes_loaders_and_uint8_images(case):
    model, _, x, y = case
    bytes_ = TensorDataset((x * 255).round().to(torch.uint8), y)
    result = quiet(model, DataLoader(bytes_, batch_size=9, shuffle=True), eps=0.03, samples=50)
    same = quiet(model, TensorDataset(bytes_.tensors[0].float() / 255, y), eps=0.03, samples=50)
    assert result.verdicts == same.verdicts


def test_labels_and_images_of_any_type_give_the_same_verdicts(case):
    model, data, x, y = case
    options = dict(eps=0.03, samples=50, attack=CURVE_ATTACK, diagnose=False)
    expected = quiet(model, data, **options).verdicts
    fooled_by = cascade(model, x, y, eps=0.03, attacks="fast").fooled_by
    for labels in (y.to(torch.uint8), y.int()):
        assert quiet(model, TensorDataset(x, labels), **options).verdicts == expected
        assert torch.equal(cascade(model, x, labels, eps=0.03, attacks="fast").fooled_by, fooled_by)
    assert quiet(model, TensorDataset(x.double(), y), **options).verdicts == expected
    assert quiet(model, TensorDataset(x.half(), y), **options).attacked.n == 50
    with pytest.raises(ValueError, match=r"a float32 or bfloat16 model, got torch\.float16"):
        quiet(small_net().half(), data, eps=0.03)


def test_findings_are_taken_on_a_random_subset_not_on_the_first_class(monkeypatch):
    module = sys.modules["flatreg.evaluation.evaluate"]  # the package's name for it is the function
    model, x, y = trained_net(n=400)
    order = y.argsort(stable=True)
    seen = []
    real = module.masking_checks

    def spy(model, batch, threat, **kwargs):
        seen.extend(batch.labels.tolist())
        return real(model, batch, threat, **kwargs)

    monkeypatch.setattr(module, "masking_checks", spy)
    quiet(model, TensorDataset(x[order], y[order]), eps=0.03)
    assert set(seen) == set(y.tolist()) and 150 < len(seen) <= 256


def test_bad_input_is_refused_in_one_line(case):
    model, data, x, y = case

    class Stream(IterableDataset):
        def __iter__(self):
            return iter([(x[0], y[0])])

    for message, wrong in {
        r"images in \[0, 1\], got values from -1": (TensorDataset(2 * x - 1, y), dict(eps=0.1)),
        "for 8 grey levels of 255 write 8/255": (data, dict(eps=8)),
        "got the iterable Stream": (Stream(), dict(eps=0.1)),
        "samples: expected a whole number from 1, got 0": (data, dict(eps=0.1, samples=0)),
        "norm must be one of linf, l2, l1": (data, dict(eps=0.1, norm="l3")),
        "one of fast, standard": (data, dict(eps=0.1, attack="strongest")),
    }.items():
        with pytest.raises(ValueError, match=message) as error:
            quiet(model, wrong[0], **wrong[1])
        assert "\n" not in str(error.value)


def test_the_hook_runs_when_due_and_remembers(case):
    model, data, _, _ = case
    hook = AttackedAccuracy(data, eps=0.03, every=2, samples=40, attack=partial(pgd, steps=3))
    results = [hook(model, epoch) for epoch in range(4)]
    assert [r is not None for r in results] == [False, True, False, True]
    assert [epoch for epoch, _ in hook.history] == [1, 3] and results[1].n == 40


def test_prints_what_a_reader_needs(case):
    model, data, _, _ = case
    text = str(quiet(model, data, eps=0.03))
    for part in ("upper bound", "after pgd(steps=10)", "n = 200", "saturation share"):
        assert part in text
    assert max(map(len, text.split("\n"))) <= 100


class Stochastic(torch.nn.Module):
    """Logits with noise of its own in every pass, whatever the mode."""

    def __init__(self, model, noise):
        super().__init__()
        self.model, self.noise = model, noise

    def forward(self, x):
        z = self.model(x)
        return z + self.noise * torch.randn_like(z)


def test_a_random_forward_is_judged_by_majority_and_reproducibly(case):
    model, data, _, _ = case
    noisy = Stochastic(model, 0.5)
    torch.manual_seed(1)
    one = quiet(noisy, data, eps=0.03, attack="rand", samples=30, diagnose=False)
    torch.manual_seed(2)
    two = quiet(noisy, data, eps=0.03, attack="rand", samples=30, diagnose=False)
    assert one.verdicts == two.verdicts and one.margins == two.margins
    still = quiet(model, data, eps=0.03, attack="rand", samples=30, diagnose=False)
    assert abs(one.clean.count - still.clean.count) <= 3
    assert abs(one.attacked.count - still.attacked.count) <= 6


@pytest.mark.parametrize("stream", [np.random, random])
def test_the_seed_fixes_noise_that_is_not_of_torch(case, stream):
    class Shifted(torch.nn.Module):
        def forward(self, x):
            return case[0]((x + stream.uniform(-0.5, 0.5)).clamp(0, 1))

    results = []
    for seed in (1, 2):
        stream.seed(seed)
        results.append(quiet(Shifted(), case[1], eps=0.03, attack="fast", diagnose=False))
        drawn = stream.uniform(0, 1)
        stream.seed(seed)
        assert drawn == stream.uniform(0, 1)  # the caller's stream has not moved
    assert results[0].margins == results[1].margins
    assert results[0].verdicts == results[1].verdicts


def test_other_threats_are_reported_by_the_same_cascade(case):
    model, data, _, _ = case
    attack = [partial(pgd, steps=10)]
    result = quiet(model, data, eps=0.02, attack=attack, other_threats={"l2": 0.2, "l1": 1.5})
    survive = [[v == -1 for v in result.verdicts]]
    for threat, (norm, eps) in zip(result.other_threats, [("l2", 0.2), ("l1", 1.5)], strict=True):
        alone = quiet(model, data, eps=eps, norm=norm, attack=attack)
        assert (threat.norm, threat.eps) == (norm, eps) and threat.verdicts == alone.verdicts
        assert 0.05 < threat.attacked.value < 0.75
        survive.append([v == -1 for v in threat.verdicts])
    assert result.union.count == sum(map(all, zip(*survive, strict=True)))
    assert "l2 eps 0.2" in str(result) and "under all of these" in str(result)


def test_the_verdict_is_that_of_the_float32_module_whatever_wraps_it(case):
    model, data, x, _ = case
    expected = quiet(model, data, eps=0.03, attack="fast").verdicts
    compiled = torch.compile(model, backend="eager")
    in_place = copy.deepcopy(model)
    in_place.compile(backend="eager")
    averaged = torch.optim.swa_utils.AveragedModel(model)
    prepared = Accelerator(mixed_precision="bf16", cpu=True).prepare(copy.deepcopy(model))
    state = dict(prepared.__dict__)
    for wrapped in (compiled, in_place, averaged, ModelEmaV3(model), prepared):
        assert quiet(wrapped, data, eps=0.03, attack="fast").verdicts == expected
    assert prepared.__dict__ == state and prepared(x[:2]).dtype == torch.float32
    assert in_place._compiled_call_impl is not None
    with torch.autocast("cpu", torch.float16):
        assert quiet(model, data, eps=0.03, attack="fast").verdicts == expected
    half = copy.deepcopy(model).bfloat16()
    rounded = copy.deepcopy(half).float()
    assert quiet(half, data, eps=0.03).verdicts == quiet(rounded, data, eps=0.03).verdicts
    assert next(half.parameters()).dtype == torch.bfloat16


def test_a_search_in_bfloat16_is_judged_in_float32(case):
    model, data, _, _ = case
    seen = []

    def spy(module, args, output):
        seen.append(output.dtype)

    hook = model[-1].register_forward_hook(spy)
    result = quiet(model, data, eps=0.03, bfloat16=True, attack="fast", diagnose=False)
    hook.remove()
    assert torch.bfloat16 in seen and seen[0] == seen[-1] == torch.float32
    fell = [i for i, v in enumerate(result.verdicts) if v >= 0]
    assert all(result.attacked_predictions[i] != result.labels[i] for i in fell)
    exact = quiet(model, data, eps=0.03, attack="fast", diagnose=False)
    assert abs(result.attacked.count - exact.attacked.count) <= 10


def test_attacks_under_float16_autocast_are_refused(case):
    model, _, x, y = case
    with (
        torch.autocast("cpu", torch.float16),
        pytest.raises(ValueError, match="float16 autocast finds gradients of zero"),
    ):
        pgd(model, x, y, eps=0.03)


def test_a_model_without_a_gradient_is_refused(case):
    _, data, _, _ = case

    class Opaque(torch.nn.Module):
        def __init__(self, detach):
            super().__init__()
            self.layer, self.detach = torch.nn.Linear(256, 5), detach

        def forward(self, x):
            x = x.flatten(1)
            return (
                self.layer(x.detach())
                if self.detach
                else torch.from_numpy(x.detach().numpy()[:, :5])
            )

    for detach in (True, False):
        with pytest.raises(ValueError, match="no gradient in the inputs"):
            quiet(Opaque(detach), data, eps=0.03, attack="fast", diagnose=False)


def test_a_model_that_returns_probabilities_is_refused(case):
    model, data, _, _ = case
    with pytest.raises(ValueError, match="logits"):
        quiet(torch.nn.Sequential(model, torch.nn.Softmax(1)), data, eps=0.03)


def test_the_batch_shrinks_until_it_fits_into_memory(case):
    model, data, _, _ = case

    class Small(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            if len(x) > 12:
                raise torch.OutOfMemoryError("too many")
            return self.model(x)

    expected = quiet(model, data, eps=0.03, attack="fast", diagnose=False)
    small = quiet(Small(), data, eps=0.03, attack="fast", diagnose=False)
    assert small.verdicts == expected.verdicts and small.forwards == expected.forwards


def test_kappa_is_measured_before_and_after(case):
    model, data, x, y = case
    result = quiet(model, data, eps=0.03, attack="fast", diagnose=False)
    features = model[:-1](x)
    expected = relative_flatness(features, model(x), model[-1].weight)
    assert result.kappas == pytest.approx(expected.tolist(), rel=1e-4)
    assert result.margins == pytest.approx(margin(model(x), y).tolist(), rel=1e-4, abs=1e-5)
    for verdict, after, kappa in zip(
        result.verdicts, result.attacked_margins, result.attacked_kappas, strict=True
    ):
        assert (after is None) == (kappa is None) == (verdict == -2)
        assert verdict == -2 or (after < 0) == (verdict >= 0)
    wrapped = quiet(Stochastic(model, 0.0), data, eps=0.03, attack="fast", diagnose=False)
    assert wrapped.verdicts == result.verdicts
