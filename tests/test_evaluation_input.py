"""What an evaluation is given: how images are fetched, what is refused, and what the bar says."""

import copy
import dataclasses
import re
from functools import partial

import pytest
import torch
from cases import trained_net
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from flatreg import (
    AttackedAccuracy,
    accuracy_curve,
    attacks,
    compare,
    evaluate,
    measure,
    read_evaluation,
)
from flatreg.attacks import AttackResult, apgd, cascade, pgd
from flatreg.data import loading as sharding
from flatreg.data import progress

QUIET = dict(progress=False, diagnose=False)


@pytest.fixture(scope="module")
def case():
    model, x, y = trained_net(n=80)
    return model, TensorDataset(x, y), x, y


def test_the_bar_bounds_the_evaluations_own_threat(case, monkeypatch):
    model, data, _, _ = case
    texts = []

    class Bar(progress.tqdm):
        def set_postfix_str(self, s="", refresh=True):
            texts.append(s)

    monkeypatch.setattr(progress, "_Lines", Bar)
    attack = [partial(pgd, steps=5), partial(apgd, steps=5)]
    options = dict(eps=0.02, attack=attack, other_threats={"l2": 0.3}, batch_size=5, diagnose=False)
    result = evaluate(model, data, **options)
    bounds = [float(re.search(r"<= ([\d.]+)%", t)[1]) / 100 for t in texts if "l2" not in t]
    assert len(bounds) >= 8  # two stages on each of four blocks
    left = [v == -1 for v in result.verdicts]
    for block, bound in enumerate(bounds[1::2]):  # before the last stage of a block
        end = 20 * (block + 1)
        assert sum(left[:end]) / end <= bound + 5e-4
    assert bounds[-1] <= result.stages[0].accuracy.value + 5e-4


def test_images_are_fetched_as_the_loader_does(case, monkeypatch):
    """Its workers and its collate function, in its subset's order, one batch ahead."""
    model, data, x, y = case
    made = []

    class Spy(DataLoader):
        def __init__(self, *args, **options):
            made.append((args[1], options))
            super().__init__(*args, **options)

    loader = DataLoader(data, batch_size=3, shuffle=True, num_workers=2)
    dataset, indices, loading = sharding.map_style(loader)
    monkeypatch.setattr(sharding, "DataLoader", Spy)
    found = list(sharding.batches(model, dataset, indices[7:], 30, loading))
    ((size, options),) = made
    assert (size, options["num_workers"]) == (8, 2) and options["collate_fn"] is loader.collate_fn
    assert [len(batch.indices) for batch in found] == [32, 32, 9]
    assert [i for batch in found for i in batch.indices] == list(range(7, 80))
    assert torch.equal(torch.cat([batch.inputs for batch in found]), x[7:])
    assert torch.equal(torch.cat([batch.labels for batch in found]), y[7:])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda m, x, y: (nn.Sequential(m, nn.Linear(5, 1)), x, 0 * y),
            "expected logits of two classes or more",
        ),
        (lambda m, x, y: (m, x, y + 5), "labels: expected 0 to 4, got 5 to"),
        (lambda m, x, y: (Half(m), x, y), "verdicts are float32: the model returns torch.bfloat16"),
    ],
)
def test_what_cannot_be_judged_is_refused_in_one_line(case, spoil, message):
    model, x, y = spoil(case[0], case[2], case[3])
    with pytest.raises(ValueError, match=message) as error:
        evaluate(model, TensorDataset(x, y), eps=0.03, attack="fast", **QUIET)
    assert "\n" not in str(error.value)


class Half(nn.Module):
    """A forward with an autocast of its own."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.model(x)


def test_logits_of_float64_from_a_model_of_float32_are_judged(case):
    """A buffer in numpy's precision does that."""
    model, data, _, _ = case

    class Double(nn.Sequential):
        def forward(self, x):
            return super().forward(x).double()

    plain, double = (
        evaluate(m, data, eps=0.03, attack="fast", **QUIET) for m in (model, Double(*model))
    )
    assert double.verdicts == plain.verdicts
    assert double.kappas == pytest.approx(plain.kappas, rel=1e-4)


@dataclasses.dataclass  # which compares, and so has no hash
class Ours:
    steps: int = 2

    def __call__(self, model, inputs, labels, *, eps, restarts=1, **options):
        options = options | {"steps": self.steps, "restarts": restarts}
        return pgd(model, inputs, labels, eps=eps, **options)


@pytest.mark.parametrize(
    ("attack", "name"), [(Ours(), "Ours"), (partial(Ours(), restarts=2), "Ours(restarts=2)")]
)
def test_an_attack_of_yours_may_be_any_object_that_is_called(case, attack, name):
    model, data, _, _ = case
    result = evaluate(model, data, eps=0.03, attack=attack, curve=[0.01], **QUIET)
    settings = {"steps": 2} | getattr(attack, "keywords", {})
    plain = evaluate(model, data, eps=0.03, attack=partial(pgd, **settings), **QUIET)
    assert result.verdicts == plain.verdicts and result.stages[0].attack == name


def steps_backward(model, inputs, labels, *, eps, train=False, **options):
    """An attack that leaves what a training step leaves."""
    model.train(train)
    x = inputs.clone().requires_grad_()
    nn.functional.cross_entropy(model(x), labels).backward()
    model.requires_grad_(False)
    x = (inputs + eps * x.grad.sign()).clamp(0, 1)
    fooled = model(x).argmax(1) != labels
    return AttackResult(x, fooled.long() - 1, 2 * len(x), len(x))


def test_an_attack_of_yours_leaves_no_gradient_and_no_mode(case):
    model = copy.deepcopy(case[0])
    weight, *others = model.parameters()
    weight.grad = gradient = torch.ones_like(weight)
    result = evaluate(model, case[1], eps=0.03, attack=steps_backward, **QUIET)
    assert 0 < result.attacked.value < result.clean.value
    with pytest.raises(ValueError, match="an attack that leaves the model in eval mode"):
        attack = partial(steps_backward, train=True)
        evaluate(model.eval(), case[1], eps=0.03, attack=attack, **QUIET)
    assert not any(module.training for module in model.modules())
    assert all(w.requires_grad for w in model.parameters())
    assert weight.grad is gradient and bool((gradient == 1).all())
    assert all(w.grad is None for w in others)


def test_the_default_dtype_of_a_caller_moves_no_number(case):
    model, data, _, _ = case
    options = dict(eps=0.03, attack="fast", curve=[0.01, 0.02], **QUIET)
    before, result = torch.get_default_dtype(), evaluate(model, data, **options)
    try:
        torch.set_default_dtype(torch.bfloat16)
        coarse = evaluate(model, data, **options)
    finally:
        torch.set_default_dtype(before)
    assert coarse.expected == result.expected and result.expected.value < result.clean.value
    assert coarse.verdicts == result.verdicts and coarse.curve == result.curve


def test_mistakes_in_the_call_are_named(case):
    model, data, x, y = case
    with pytest.raises(ValueError, match="votes: expected a whole number from 1, got -1"):
        evaluate(model, data, eps=0.03, attack="fast", votes=-1, **QUIET)
    with pytest.raises(ValueError, match="batch_size: expected a whole number from 1, got 0"):
        evaluate(model, data, eps=0.03, attack="fast", batch_size=0, **QUIET)
    with pytest.raises(TypeError, match="expected functions as stages, as "):
        evaluate(model, data, eps=0.03, attack=["pgd", "square"], **QUIET)
    with pytest.raises(TypeError, match=r"other_threats: expected a norm and its .*, got \['l2'\]"):
        evaluate(model, data, eps=0.03, attack="fast", other_threats=["l2"], **QUIET)
    for wrong, got in (
        (None, "NoneType"),
        (x, "Tensor"),
        (AttackResult(x[:1, :1], y, 0, 0), "1, 1"),
        (AttackResult(x, y[:, None], 0, 0), r"fooled_by of shape \(80,\), got \(80, 1\)"),
        (AttackResult(x, y.tolist(), 0, 0), r"fooled_by of shape \(80,\), got list"),
    ):
        with pytest.raises(TypeError, match=f"expected an attack to return .*{got}"):
            evaluate(model, data, eps=0.03, attack=lambda *_, given=wrong, **__: given, **QUIET)
    with pytest.raises(ValueError, match="float16 logits"):
        pgd(copy.deepcopy(model).half(), x.half(), y, eps=0.03)
    pairs = [{"image": image, "label": label} for image, label in zip(x, y, strict=True)]
    with pytest.raises(ValueError, match=r"batches of \(images, labels\), the data gives a dict"):
        evaluate(model, pairs, eps=0.03, attack="fast", **QUIET)
    one = evaluate(model, data, eps=0.03, attack="fast", **QUIET)
    with pytest.raises(ValueError, match="their labels differ"):
        compare(one, dataclasses.replace(one, labels=[(v + 1) % 5 for v in one.labels]))


@pytest.mark.parametrize(
    ("attack", "settings", "message"),
    [
        ("pgd", {"steps": 2.5}, "steps: expected a whole number from 1, got 2.5"),  # had no end
        ("pgd", {"steps": 0}, "steps: .*, got 0"),  # fools nobody
        ("pgd", {"step_size": -0.25}, r"step_size: expected a number in \(0, inf\), got -0.25"),
        ("pgd", {"step_size": 0}, "step_size: .*, got 0"),
        ("pgd", {"step_size": float("nan")}, "step_size: .*, got nan"),
        ("pgd", {"restarts": 1.5}, "restarts: .*, got 1.5"),
        ("pgd", {"loss": "ce"}, "loss: expected one of margin, .*, got 'ce'"),
        ("pgd", {"batch_size": 2.5}, "batch_size: .*, got 2.5"),
        ("pgd", {"random_start": "no"}, "random_start: expected True or False, got 'no'"),
        ("apgd", {"early_stop": "no"}, "early_stop: expected True or False, got 'no'"),
        ("apgd", {"steps": 0}, "steps: .*, got 0"),
        ("apgd", {"targets": 2.5}, "targets: .*, got 2.5"),
        ("fmn", {"steps": 0}, "steps: .*, got 0"),
        ("square", {"queries": 1.5}, "queries: .*, got 1.5"),  # had no end
        ("random_search", {"queries": 1.5}, "queries: .*, got 1.5"),
        ("noise", {"draws": 1.5}, "draws: .*, got 1.5"),
        ("race", {"apgd": (0, 1)}, "classes: .*, got 0"),
        ("race", {"fmn": (2, 0)}, "steps: .*, got 0"),
    ],
)
def test_settings_of_attacks_are_refused_in_one_line(case, attack, settings, message):
    model, _, x, y = case
    with pytest.raises(ValueError, match=message) as told:
        getattr(attacks, attack)(model, x, y, eps=0.03, **settings)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eps": True}, "eps: expected a number, as 8 / 255, got True"),
        (
            {"eps": torch.full((4,), 0.03)},
            "eps: expected one number, got a tensor of shape",
        ),
        ({"eps": torch.zeros(0)}, r"eps: expected real numbers, got torch.float32 of shape \(0,\)"),
        ({"curve": 0.01}, r"curve: expected a grid of radii, got 0.01: write \[0.01\]"),
        ({"curve": "0.01"}, "curve: expected a grid of radii, got '0.01'"),
        ({"curve": None}, "curve: expected a grid of radii, got None"),
        ({"curve": torch.tensor(0.01)}, r"curve: expected a grid of radii, got tensor\(0.0100\)"),
        ({"curve": ["a"]}, "curve: eps: expected a number, as 8 / 255, got 'a'"),
        ({"curve": [8]}, r"curve: eps must be in \[0, 1\] pixel units, got 8"),
        ({"attack": None}, "attack: expected functions as stages, .*, got None"),
        ({"samples": 1.5}, "samples: expected a whole number from 1, got 1.5"),
        ({"samples": True}, "samples: .*, got True"),
        ({"seed": -1}, "seed: expected a whole number from 0, got -1"),
        ({"votes": 2.5}, "votes: .*, got 2.5"),
        ({"batch_size": 2.5}, "batch_size: .*, got 2.5"),
        ({"bfloat16": "no"}, "bfloat16: expected True or False, got 'no'"),
        ({"diagnose": "false"}, "diagnose: expected True or False, got 'false'"),
    ],
)
def test_settings_of_an_evaluation_are_refused_in_one_line(case, settings, message):
    model, data, _, _ = case
    with pytest.raises((TypeError, ValueError), match=message) as told:
        evaluate(model, data, **{"eps": 0.03, "attack": "fast", **QUIET, **settings})
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("attack", ["pgd", "fgsm", "apgd", "fmn", "square", "race", "cascade"])
def test_radii_of_another_shape_than_the_batch_are_refused_in_one_line(case, attack):
    model, _, x, y = case
    for shape in [(len(x), 1), (len(x) + 1,), (1, 1, 1, 1)]:
        with pytest.raises(ValueError, match=r"one a sample \(\d+,\), got a tensor") as told:
            getattr(attacks, attack)(model, x, y, eps=torch.full(shape, 0.03))
        assert "\n" not in str(told.value)


def test_measure_says_the_eps_it_measured_at(case):
    model, data, _, _ = case
    card = measure(model, data, eps="8/255", parts=["kappa"], progress=False)
    assert card.eps == 8 / 255


def test_first_mistakes_say_what_to_write_instead(case, tmp_path):
    model, data, x, y = case
    hook = AttackedAccuracy(data, eps=0.03)
    for message, call in {
        r"expected hook\(model, epoch\), .* got \(int, Sequential\)": lambda: hook(0, model),
        r"got \(Sequential, str\)": lambda: hook(model, "last"),
        "the model comes first": lambda: evaluate(data, model, eps=0.03),
        "a function goes into a module": lambda: evaluate(lambda x: model(x), data, eps=0.03),
        "got the model Sequential: the model comes": lambda: AttackedAccuracy(model, eps=0.03),
        r"expected a grid of radii, got 0.03: write \[0.03\]": lambda: accuracy_curve(
            model, data, eps=0.03
        ),
        "expected attack=, got curve_attack=": lambda: accuracy_curve(
            model, data, eps=[0.03], curve_attack="standard"
        ),
        "for 8 grey levels of 255 write 8/255": lambda: AttackedAccuracy(data, eps=8),
        "attack must be one of fast": lambda: AttackedAccuracy(data, eps=0.03, attack="pgd"),
        "samples: expected a whole number from 1, got 0": lambda: AttackedAccuracy(
            data, eps=0.03, samples=0
        ),
        "give torch.utils.data.TensorDataset": lambda: AttackedAccuracy((x, y), eps=0.03),
        "got a tuple: give torch.utils.data.TensorDataset": lambda: AttackedAccuracy(
            (x.numpy(), y.numpy()), eps=0.03
        ),
        "got a list of batches: give torch.utils.data.ConcatDataset": lambda: evaluate(
            model, [(x[:2], y[:2]), (x[2:4], y[2:4])], eps=0.03
        ),
        "inputs must be images in .* got nan: leave such": lambda: pgd(
            model, x * float("nan"), y, eps=0.03
        ),
        r"got torch.uint8: give images / 255": lambda: pgd(model, (255 * x).byte(), y, eps=0.03),
        "from .* to 255: give images / 255": lambda: cascade(model, 255 * x, y, eps=0.03),
        r"normalise inside the model": lambda: apgd(model, 4 * x - 2, y, eps=0.03),
    }.items():
        with pytest.raises((ValueError, TypeError), match=message) as error:
            call()
        assert "\n" not in str(error.value)
    evaluate(model, data, eps=0.03, attack="fast", folder=str(tmp_path), **QUIET)
    assert read_evaluation(str(tmp_path)).n == len(y)
    with pytest.raises(ValueError, match="expected the folder, got a file in it: give "):
        read_evaluation(str(tmp_path / "evaluation.json"))
