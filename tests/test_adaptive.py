"""Adaptive attack check: against attacks one sample at a time, and slices point by point."""

import random
from dataclasses import asdict, replace
from functools import cache, partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import small_net, trained_net
from matplotlib.image import imread
from pydantic import TypeAdapter
from torch import nn
from torch.utils.data import TensorDataset

from flatreg import evaluate
from flatreg.attacks import apgd, cascade, pgd
from flatreg.attacks.query import QueriedModel
from flatreg.evaluation.adaptive import AdaptiveAttackCheck, adaptive_attack_check
from flatreg.report.figures.report import margin_slices
from flatreg.report.figures.style import save

EPS = {"linf": 0.03, "l2": 0.25, "l1": 1.5}
SHORT = dict(steps=8, restarts=2, progress=False)
WEAK = partial(pgd, steps=1, step_size=0.3)


class Shattered(nn.Module):
    """The logits of `net`, and no gradient of them."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x).detach() + 0 * x.flatten(1).sum(1, keepdim=True)


@cache
def nets():
    """A network, its baseline, and their images, in float64: a verdict is the same in any batch."""
    (model, x, y), (baseline, _, _) = trained_net(n=60), trained_net(n=50, seed=1)
    return model.double(), baseline.double(), x.double(), y


def evaluated(model, x, y, norm="linf", attack=WEAK, **settings):
    settings = dict(eps=EPS[norm], diagnose=False, progress=False) | settings
    data = TensorDataset(x, y)
    return data, evaluate(model, data, norm=norm, attack=attack, **settings)


def margin_by_hand(logits, label):
    others = [z for s, z in enumerate(logits.tolist()) if s != label]
    return logits[label].item() - max(others)


def transferred(model, baseline, x, y, index, *, norm, steps, restarts, seed):
    """Attack the baseline with one sample, keep every image, try them one by one."""
    met = []
    apgd(
        baseline,
        x,
        y,
        eps=EPS[norm],
        norm=norm,
        loss="margin",
        steps=steps,
        restarts=restarts,
        seed=seed,
        indices=[index],
        callback=lambda *told: met.extend(told[2]),
        early_stop=False,
    )
    order = {"linf": float("inf"), "l2": 2, "l1": 1}[norm]
    met = [p for p in met if float((p - x[0]).norm(p=order)) <= EPS[norm] + 1e-4]
    return any(model(torch.stack(met)).argmax(1) != y), len(met)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_transfer_and_search_are_those_of_a_slow_loop(norm):
    model, baseline, x, y = nets()
    data, evaluation = evaluated(model, x, y, norm)
    settings = dict(steps=10, restarts=2)
    result = adaptive_attack_check(
        model,
        data,
        evaluation,
        baseline=baseline,
        samples=5,
        slices=0,
        seed=5,
        batch_size=3,
        progress=False,
        **settings,
    )
    survivors = [i for i, v in zip(evaluation.indices, evaluation.verdicts, strict=True) if v == -1]
    assert set(result.indices) <= set(survivors) and result.n == len(result.indices) == 5
    for row, i in enumerate(result.indices):
        one, label = x[i : i + 1], y[i : i + 1]
        fooled, met = transferred(model, baseline, one, label, i, norm=norm, seed=5, **settings)
        assert result.fooled_by_transfer[row] == fooled
        assert (met == 22) == (norm != "l1")  # L1-APGD begins in a larger ball
        losses = enumerate(("margin", "rescaled_cross_entropy"))
        assert result.fooled_by_search[row] == any(
            apgd(
                model,
                one,
                label,
                eps=EPS[norm],
                norm=norm,
                loss=loss,
                seed=5 + stage,
                indices=[i],
                **settings,
            ).fooled.item()
            for stage, loss in losses
        )
    assert 0 < sum(result.fooled_by_search) and sum(result.fooled_by_transfer) < 5


class Steadfast(nn.Module):
    """Class `label` everywhere; remembers where it was asked."""

    def __init__(self, label):
        super().__init__()
        self.logits = nn.Parameter(2.0 * F.one_hot(torch.tensor(label), 5).double())
        self.asked = []

    def forward(self, x):
        self.asked.extend(x.detach().flatten(1))
        return self.logits + 0 * x.flatten(1).sum(1, keepdim=True)


@pytest.mark.parametrize("norm", ["linf", "l1"])
def test_every_image_in_the_ball_is_tried_and_none_outside(norm):
    _, baseline, x, y = nets()
    model = Steadfast(y[0].item())
    data, evaluation = evaluated(model, x[:1], y[:1], norm)
    fooled = apgd(
        baseline, x[:1], y[:1], eps=EPS[norm], norm=norm, loss="margin", indices=[0], seed=9
    )
    assert fooled.fooled.all()  # and goes on from there
    counts = []
    for other in (None, baseline):
        model.asked.clear()
        settings = dict(baseline=other, slices=0, seed=9, steps=20, restarts=2, progress=False)
        assert not any(adaptive_attack_check(model, data, evaluation, **settings).fooled_by_search)
        counts.append(len(model.asked))
    assert counts[0] == 1 + 2 * 2 * 21  # the image itself, then two losses, twice
    _, met = transferred(model, baseline, x[:1], y[:1], 0, norm=norm, steps=20, restarts=2, seed=9)
    assert counts[1] - counts[0] == met and (met == 42) == (norm == "linf")


def test_hidden_gradients_are_shown_by_the_baseline():
    model, _, x, y = nets()
    data, evaluation = evaluated(Shattered(model), x, y, attack="fast")
    assert evaluation.attacked.count == evaluation.clean.count  # nothing to climb
    result = adaptive_attack_check(Shattered(model), data, evaluation, baseline=model, **SHORT)
    transfer, search = result.findings
    assert (transfer.name, transfer.verdict) == ("transfer wins", "flagged")
    truth = apgd(model, x[result.indices], y[result.indices], eps=0.03, steps=8, loss="margin")
    assert transfer.value == pytest.approx(float(truth.fooled.double().mean()), abs=0.1)
    assert search.value < transfer.value / 2 and transfer.n == result.n == result.survivors
    assert result.attacked.count <= evaluation.attacked.count - sum(result.fooled_by_transfer)


def test_an_attack_that_stops_short_is_shown_by_a_long_search_and_a_sound_one_is_not():
    model, baseline, x, y = nets()
    for attack, verdict in (
        (WEAK, "flagged"),
        (partial(cascade, attacks=[pgd, partial(apgd, steps=30, loss="margin")]), "ok"),
    ):
        data, evaluation = evaluated(model, x, y, attack=attack)
        result = adaptive_attack_check(model, data, evaluation, baseline=baseline, **SHORT)
        search = next(f for f in result.findings if f.name == "long search wins")
        assert search.verdict == verdict == ("flagged" if search.value > search.threshold else "ok")
        assert search.value == sum(result.fooled_by_search) / result.n
        assert search.threshold == max(0.02, 1 / result.n)
        pairs = zip(result.fooled_by_search, result.fooled_by_transfer, strict=True)
        assert result.attacked.count == evaluation.attacked.count - sum(map(any, pairs))


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_a_slice_is_what_the_model_says_point_by_point(norm):
    model, _, x, y = nets()
    data, evaluation = evaluated(model, x, y, norm)
    result = adaptive_attack_check(model, data, evaluation, samples=3, slices=1, seed=2, **SHORT)
    (drawn,) = result.slices
    eps, i = EPS[norm], drawn.index
    image, label = x[i : i + 1].clone().requires_grad_(), y[i].item()
    assert drawn.label == label and drawn.index in result.indices
    logits = model(image)[0]
    rival = logits.detach().clone().index_fill(0, y[i], -torch.inf).argmax()
    (slope,) = torch.autograd.grad(logits[rival] - logits[label], image)
    noise = torch.from_numpy(np.random.default_rng([2, i]).standard_normal(image.shape))
    down, side = (unit_step(image[0], g[0], eps, norm) for g in (slope, noise))
    assert drawn.axis[0] == -2 and drawn.axis[20] == 0 and drawn.axis[40] == 2
    order = {"linf": float("inf"), "l2": 2, "l1": 1}[norm]
    for row in range(0, 41, 10):
        for column in range(0, 41, 4):
            point = image.detach()[0] + drawn.axis[column] * down + drawn.axis[row] * side
            point = point.clamp(0, 1)
            z = model(point[None])[0].detach()
            assert drawn.margin[row][column] == pytest.approx(margin_by_hand(z, label), abs=1e-9)
            loss = float(F.cross_entropy(z[None], y[i : i + 1]))
            assert drawn.cross_entropy[row][column] == pytest.approx(loss, abs=1e-9)
            change = float((point - image.detach()[0]).norm(p=order))
            assert drawn.distance[row][column] == pytest.approx(change, abs=1e-9)
    assert drawn.margin[20][25] < drawn.margin[20][20] and drawn.distance[20][20] == 0


def unit_step(x, gradient, eps, norm):
    """The step of length eps along a gradient, pixel by pixel where it is sparse."""
    if norm == "linf":
        return eps * gradient.sign()
    if norm == "l2":
        return eps * gradient / gradient.norm()
    step, left = torch.zeros_like(x).flatten(), eps
    for pixel in gradient.flatten().abs().argsort(descending=True).tolist():
        sign = gradient.flatten()[pixel].sign().item()
        moved = min(left, 1 - x.flatten()[pixel].item() if sign > 0 else x.flatten()[pixel].item())
        step[pixel], left = sign * moved, left - moved
    return step.reshape(x.shape)


def test_the_ball_is_a_diamond_where_two_steps_of_signs_add_up():
    weak = partial(pgd, steps=1, step_size=1e-9)
    model, _, x, y = nets()
    data, evaluation = evaluated(model, 0.3 + 0.4 * x, y, attack=weak)
    drawn = adaptive_attack_check(model, data, evaluation, samples=1, slices=1, **SHORT).slices[0]
    a = np.abs(drawn.axis)
    np.testing.assert_allclose(drawn.distance, 0.03 * (a[:, None] + a[None]), atol=1e-12)


def test_the_result_does_not_depend_on_the_batch_and_depends_on_the_seed():
    model, baseline, x, y = nets()
    data, evaluation = evaluated(model, x, y)
    results = [
        asdict(
            adaptive_attack_check(
                model,
                data,
                evaluation,
                baseline=baseline,
                samples=20,
                slices=2,
                seed=seed,
                batch_size=size,
                **SHORT,
            )
        )
        for seed, size in ((None, 256), (1, 6), (2, 256))
    ]
    for result in results:
        del result["seconds"]
        result["slices"] = [s["index"] for s in result["slices"]]
    assert results[0] == results[1]  # left out, the seed is one more than the evaluation's
    assert results[0]["indices"] != results[2]["indices"]


def test_both_models_are_left_as_they_were():
    _, _, x, y = nets()
    model, baseline = (small_net(s, dropout=0.5, dtype=torch.float64).train() for s in (0, 1))
    for network in (model, baseline):
        network[1].eval()
        network[0].bias.requires_grad_(False)
        F.cross_entropy(network(x), y).backward()
    data, evaluation = evaluated(model, x, y)
    networks = nn.ModuleList([model, baseline])
    state = {k: v.clone() for k, v in networks.state_dict().items()}
    gradients = [None if p.grad is None else p.grad.clone() for p in networks.parameters()]
    modes = [m.training for m in networks.modules()]
    streams = torch.get_rng_state(), np.random.get_state(), random.getstate()
    assert adaptive_attack_check(model, data, evaluation, baseline=baseline, **SHORT).n > 0
    assert all(torch.equal(v, state[k]) for k, v in networks.state_dict().items())
    for p, g in zip(networks.parameters(), gradients, strict=True):
        assert (p.grad is None) if g is None else torch.equal(p.grad, g)
    assert [m.training for m in networks.modules()] == modes
    assert torch.equal(torch.get_rng_state(), streams[0]) and random.getstate() == streams[2]
    assert np.array_equal(np.random.get_state()[1], streams[1][1])


def test_where_nobody_survived_there_is_nothing_to_find(tmp_path):
    model, baseline, x, y = nets()
    data, evaluation = evaluated(model, x, y, eps=0.5, attack="fast")
    assert evaluation.attacked.count == 0
    result = adaptive_attack_check(model, data, evaluation, baseline=baseline, **SHORT)
    assert (result.n, result.survivors, result.findings, result.slices) == (0, 0, [], [])
    assert "0 of 0 survivors" in str(result)
    with pytest.raises(ValueError, match="expected an adaptive check with slices, got none"):
        save(margin_slices(result), tmp_path / "slice.png")


def test_without_a_baseline_there_is_no_transfer():
    model, _, x, y = nets()
    data, evaluation = evaluated(model, x, y)
    result = adaptive_attack_check(model, data, evaluation, samples=8, slices=0, **SHORT)
    assert [f.name for f in result.findings] == ["long search wins"]
    assert result.fooled_by_transfer == [] and len(result.fooled_by_search) == 8


def test_another_model_or_other_data_are_refused_in_one_line():
    model, _, x, y = nets()
    data, evaluation = evaluated(model, x, y)
    check = partial(adaptive_attack_check, evaluation=evaluation, progress=False)
    stranger = small_net(7, dtype=torch.float64)
    for message, wrong in {
        "survivors are misclassified when clean": lambda: check(stranger, data),
        r"it has no sample \d+": lambda: check(model, TensorDataset(x[:20], y[:20])),
        "steps: expected a whole number from 1, got 0": lambda: check(model, data, steps=0),
        "restarts: expected a whole number from 1, got 0": lambda: check(model, data, restarts=0),
        "samples: expected a whole number from 1, got 0": lambda: check(model, data, samples=0),
    }.items():
        with pytest.raises(ValueError, match=message) as error:
            wrong()
        assert "\n" not in str(error.value)


def test_passes_are_bounded_by_the_batch_size(monkeypatch):
    model, baseline, x, y = nets()
    data, evaluation = evaluated(model, x, y)
    sizes, init = [], QueriedModel.__init__
    monkeypatch.setattr(
        QueriedModel, "__init__", lambda self, *a: sizes.append(a[1]) or init(self, *a)
    )
    adaptive_attack_check(
        model, data, evaluation, baseline=baseline, samples=8, batch_size=5, **SHORT
    )
    assert set(sizes) == {5}


@pytest.mark.parametrize("slices", [1, 5])
def test_draws_the_slices_side_by_side(tmp_path, slices):
    model, _, x, y = nets()
    data, evaluation = evaluated(model, x, y)
    result = adaptive_attack_check(model, data, evaluation, samples=6, slices=slices, **SHORT)
    save(margin_slices(result), tmp_path / "slice.png")
    height, width, _ = imread(tmp_path / "slice.png").shape
    assert height > 250 and width > 300
    panels = [a for a in margin_slices(result).axes if a.get_title("left")]
    assert len(panels) == min(slices, 4)
    constant = replace(result.slices[0], margin=[[0.0] * 41] * 41, distance=[[0.0] * 41] * 41)
    constant = replace(result, slices=[constant])  # no contour: matplotlib must not warn
    save(margin_slices(constant), tmp_path / "constant.png")


def test_prints_what_a_reader_needs_and_reads_back_from_json():
    model, baseline, x, y = nets()
    data, evaluation = evaluated(model, x, y)
    result = adaptive_attack_check(
        model, data, evaluation, baseline=baseline, samples=8, slices=1, **SHORT
    )
    text = str(result)
    for part in ("8 of ", "8 steps x 2 restarts", "transfer wins", "long search wins", "at most"):
        assert part in text
    assert max(map(len, text.split("\n"))) <= 100
    adapter = TypeAdapter(AdaptiveAttackCheck)
    assert adapter.validate_json(adapter.dump_json(result)) == result
