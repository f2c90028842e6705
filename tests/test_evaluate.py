import random
import sys
from functools import partial

import numpy as np
import pytest
import torch
from cases import small_net, trained_net
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from flatreg import Accuracy, AttackedAccuracy, cascade, evaluate, pgd


def quiet(*args, **kwargs):
    return evaluate(*args, progress=False, **kwargs)


@pytest.fixture(scope="module")
def case():
    model, x, y = trained_net(n=200)
    return model, TensorDataset(x, y), x, y


def test_reports_what_the_cascade_finds(case):
    model, data, x, y = case
    result = quiet(model, data, eps=0.03, attack="standard")
    right = model(x).argmax(1) == y
    survived = ~cascade(model, x, y, eps=0.03, indices=range(200)).fooled & right
    assert result.n == 200 and result.clean.correct == int(right.sum())
    assert result.attacked.correct == int(survived.sum())
    assert [v == -1 for v in result.verdicts] == survived.tolist()
    left = [stage.accuracy.correct for stage in result.stages]
    assert len(left) == 3 and left == sorted(left, reverse=True)
    assert left[-1] == result.attacked.correct
    assert result.indices == list(range(200)) and result.versions["torch"] == torch.__version__


def test_counts_every_pass(case):
    model, data, _, _ = case
    seen = []
    hook = model.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    result = quiet(model, data, eps=0.03, batch_size=64, diagnose=False)
    hook.remove()
    assert result.forwards == sum(seen)
    fallen = sum(v >= 0 for v in result.verdicts)
    assert 0 < result.backwards <= result.forwards - 200 - fallen


def test_wilson_interval():
    """Against the formula written out, and at the ends where the normal interval has width zero."""
    accuracy, z, n, p = Accuracy.of(7, 40), 1.959963984540054, 40, 7 / 40
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5 / (1 + z * z / n)
    assert (accuracy.low, accuracy.high) == pytest.approx((centre - half, centre + half))
    assert Accuracy.of(0, 50).low == 0 and Accuracy.of(0, 50).high == pytest.approx(
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
        result = pgd(model, inputs, labels, steps=0, **kwargs)
        return type(result)(inputs, torch.zeros_like(labels), 0, 0)

    with pytest.raises(RuntimeError, match="an attack left its threat model"):
        quiet(model, data, eps=0.05, attack=too_far)
    result = quiet(model, data, eps=0.05, attack=empty_claim)
    assert result.attacked.correct == result.clean.correct  # re-scored: nothing was fooled


@pytest.mark.parametrize(("scale", "allowed"), [(1024.0, 0), (1000.0, 1)])
def test_the_scale_of_the_head_changes_no_verdict(scale, allowed):
    model, x, y = trained_net(n=1000)
    data = TensorDataset(x, y)
    before = quiet(model, data, eps=0.02)
    with torch.no_grad():
        model[-1].weight.mul_(scale)
        model[-1].bias.mul_(scale)
    after = quiet(model, data, eps=0.02)
    changed = sum(a != b for a, b in zip(before.verdicts, after.verdicts, strict=True))
    assert changed <= allowed
    assert 0.1 < before.attacked.value < 0.9


def test_findings_fire_when_confidence_hides_the_truth_and_only_then():
    model, x, y = trained_net(n=256)
    data = TensorDataset(x, y)
    assert {f.verdict for f in quiet(model, data, eps=0.05).findings} == {"ok"}
    for scale in (10.0, 1000.0):
        model, _, _ = trained_net(n=256)
        with torch.no_grad():
            model[-1].weight.mul_(scale)
            model[-1].bias.mul_(scale)
        findings = {f.name: f for f in quiet(model, data, eps=0.05).findings}
        if scale == 1000:
            assert {f.verdict for f in findings.values()} == {"flagged"}
            assert findings["cross-entropy gap"].value > 0.3
        assert findings["saturation share"].value > 0.25
        assert {f.n for f in findings.values()} == {int((model(x).argmax(1) == y).sum())}


def test_the_curve_is_monotone_and_agrees_with_separate_evaluations(case):
    model, data, _, _ = case
    grid = [0.005, 0.02, 0.03, 0.06, 0.2]
    result = quiet(model, data, eps=0.03, curve=grid)
    values = [point.accuracy.correct for point in result.curve]
    assert values == sorted(values, reverse=True) and values[2] == result.attacked.correct
    assert values[0] <= result.clean.correct and values[-1] == 0
    for point in result.curve:
        alone = quiet(model, data, eps=point.eps, diagnose=False)
        assert abs(point.accuracy.correct - alone.attacked.correct) <= 2


def test_subset_and_verdicts_depend_on_the_seed_and_not_on_the_batch_size(case):
    model, data, _, _ = case
    one = quiet(model, data, eps=0.03, samples=60, seed=5)
    two = quiet(model, data, eps=0.03, samples=60, seed=5, batch_size=7)
    other = quiet(model, data, eps=0.03, samples=60, seed=6)
    assert (one.indices, one.verdicts) == (two.indices, two.verdicts)
    assert one.indices != other.indices and len(set(one.indices)) == 60


def test_takes_loaders_and_uint8_images(case):
    model, _, x, y = case
    bytes_ = TensorDataset((x * 255).round().to(torch.uint8), y)
    result = quiet(model, DataLoader(bytes_, batch_size=9, shuffle=True), eps=0.03, samples=50)
    same = quiet(model, TensorDataset(bytes_.tensors[0].float() / 255, y), eps=0.03, samples=50)
    assert result.verdicts == same.verdicts


def test_labels_and_images_of_any_type_give_the_same_verdicts(case):
    model, data, x, y = case
    expected = quiet(model, data, eps=0.03, samples=50).verdicts
    fooled_by = cascade(model, x, y, eps=0.03).fooled_by
    for labels in (y.to(torch.uint8), y.int()):
        assert quiet(model, TensorDataset(x, labels), eps=0.03, samples=50).verdicts == expected
        assert torch.equal(cascade(model, x, labels, eps=0.03).fooled_by, fooled_by)
    assert quiet(model, TensorDataset(x.double(), y), eps=0.03, samples=50).verdicts == expected
    half = TensorDataset(x.half(), y)
    assert quiet(model, half, eps=0.03, samples=50).attacked.n == 50
    with pytest.raises(ValueError, match=r"expected a float32 model, got torch\.bfloat16"):
        quiet(small_net().bfloat16(), data, eps=0.03)


def test_findings_are_taken_on_a_random_subset_not_on_the_first_class(monkeypatch):
    module = sys.modules["flatreg.evaluation.evaluate"]  # the package's name for it is the function
    model, x, y = trained_net(n=400)
    order = y.argsort(stable=True)
    seen = []
    real = module.masking_evidence

    def spy(model, inputs, labels, **kwargs):
        seen.extend(labels.tolist())
        return real(model, inputs, labels, **kwargs)

    monkeypatch.setattr(module, "masking_evidence", spy)
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
        "nothing to evaluate": (data, dict(eps=0.1, samples=0)),
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
    for part in ("upper bound", "after pgd(loss=margin, steps=10)", "n = 200", "saturation share"):
        assert part in text
    assert max(map(len, text.split("\n"))) <= 100
