"""What comes in: every entrance refuses the same outputs and labels, and reads the others alike."""

import copy
import dataclasses
import re
from functools import partial

import pytest
import torch
from cases import PENALTIES, images, small_net, trained_net
from torch import nn
from torch.utils.data import TensorDataset

from flatreg import (
    APGDAT,
    MART,
    NFGSM,
    PGDAT,
    TRADES,
    AttackedAccuracy,
    CrossEntropy,
    Objective,
    accuracy_curve,
    binarization_test,
    evaluate,
    find_head,
    measures,
)
from flatreg.attacks import apgd, cascade, eot, fgsm, fmn, noise, pgd, random_search, square
from flatreg.evaluation.attack_path import attack_path
from flatreg.evaluation.geometry import measure
from flatreg.models.entrance import as_labels, as_logits, check_no_probabilities
from flatreg.models.precision import cross_entropy

N = 24
FAST = dict(eps=0.03, attack="fast", progress=False)
ATTACKS = {
    "pgd": partial(pgd, steps=3),
    "pgd of one": partial(pgd, steps=3, batch_size=1),
    "fgsm": fgsm,
    "noise": partial(noise, draws=3),
    "apgd": partial(apgd, steps=5),
    "apgd, targets": partial(apgd, steps=5, targets=2, loss="dlr"),
    "fmn": partial(fmn, steps=5),
    "fmn, restarts": partial(fmn, steps=5, targets=2, restarts=2),
    "square": partial(square, queries=5),
    "random_search": partial(random_search, queries=5),
    "eot": partial(eot, attack=partial(pgd, steps=3), draws=2),
    "cascade": partial(cascade, attacks="fast"),
}


@pytest.fixture(scope="module")
def case():
    model, x, _ = trained_net()
    with torch.no_grad():
        y = model(x).argmax(1)[:N]
    data = TensorDataset(x[:N], y)
    return model, data, evaluate(model, data, **FAST, diagnose=False)


def attacked(name):
    return lambda model, x, y: ATTACKS[name](model, x, y, eps=0.03).fooled.tolist()


def card(model, x, y):
    found = measure(model, TensorDataset(x, y), eps=0.03, num_probes=2, probed=8, progress=False)
    assert not found.refused
    return repr(dataclasses.replace(found, seconds={}))


def verdicts(result):
    return result.verdicts, result.margins


ENTRANCES = {
    "evaluate": lambda m, x, y: verdicts(evaluate(m, TensorDataset(x, y), **FAST)),
    "rand": lambda m, x, y: verdicts(
        evaluate(m, TensorDataset(x, y), **FAST, votes=3, bfloat16=True, diagnose=False)
    ),
    "curve": lambda m, x, y: accuracy_curve(m, TensorDataset(x, y), **FAST | {"eps": [0.03]}),
    "hook": lambda m, x, y: verdicts(AttackedAccuracy(TensorDataset(x, y), eps=0.03)(m, 0)),
    "binarization": lambda m, x, y: binarization_test(
        m, TensorDataset(x, y), **FAST | {"eps": 0.2}, samples=4, inner=9
    ),
    "measure": card,
    "path": lambda m, x, y: attack_path(m, x, y, eps=0.03).loss.tolist(),
    **{name: attacked(name) for name in ATTACKS},
    "pass_to_head": lambda m, x, y: measures.pass_to_head(m, x, y).right.tolist(),
    "trace": lambda m, x, y: measures.hessian_trace_estimate(m, x, y, num_probes=2),
    "layers": lambda m, x, y: measures.layer_flatness(m, x, y, num_probes=2).trace,
    "sharpness": lambda m, x, y: measures.average_case_sharpness(m, [(x, y)], std=0.1, num_draws=2),
}
UNREAD = ("pass_to_head", "trace", "layers", "sharpness")  # whose result shows what came in


class Returns(nn.Module):
    """A model whose outputs are those of another, changed."""

    def __init__(self, model, change):
        super().__init__()
        self.model, self.change = model, change

    def forward(self, x):
        return self.change(self.model(x))


class ModelOutput(dict):
    __getattr__ = dict.__getitem__


OUTPUTS = {
    "tuple": (lambda z: (z, z), r"expected logits \(\d+, classes\), the model returns a tuple: "),
    "dict": (lambda z: {"logits": z}, "the model returns a dict: give flatreg.logits_only"),
    "output": (
        lambda z: ModelOutput(logits=z),
        "returns a ModelOutput: give flatreg.logits_only",
    ),
    "one": (lambda z: z[:, :1], r"shape \(\d+, 1\): give a single logit z as torch.stack"),
    "flat": (lambda z: z[:, 0], r"shape \(\d+,\): give a single logit z as torch.stack"),
    "maps": (lambda z: z[:, :, None], r"the model returns shape \(\d+, 5, 1\)"),
    "whole": (lambda z: z.long(), "expected floating logits, the model returns torch.int64"),
    "nan": (lambda z: z * torch.nan, "expected finite logits, the model returns nan or inf for"),
    "inf": (lambda z: z / 0.0, "expected finite logits, the model returns nan or inf for"),
    "softmax": (lambda z: z.softmax(1), "expected logits, the model returns probabilities"),
}


def refusal(entrance, *arguments):
    """The line in which an entrance refuses them; empty where it takes them."""
    try:
        entrance(*arguments)
    except ValueError as error:
        assert "\n" not in str(error)
        return str(error)
    return ""


@pytest.mark.parametrize("outputs", OUTPUTS)
def test_every_entrance_refuses_the_same_outputs(case, outputs):
    model, data, _ = case
    change, message = OUTPUTS[outputs]
    wrong = []
    for name, entrance in ENTRANCES.items():
        if name in UNREAD and outputs in ("nan", "inf", "softmax", "whole"):
            continue
        line = refusal(entrance, Returns(model, change), *data.tensors)
        # `find_head` comes first there, and refuses in its own words.
        said = r"no head found|no tensor" if name == "pass_to_head" else message
        wrong += [] if line and re.search(said, line) else [f"{name}: {line}"]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("bright", [0.5, 0.0])
def test_a_diverged_model_is_refused_and_not_of_accuracy_zero(case, bright, tmp_path):
    """Logits that are no number for some images; a weight that is not finite, by its name."""
    model, data, _ = case
    x, y = data.tensors
    level = x.flatten(1).mean(1).quantile(bright)

    def undefined(z, x):
        return torch.where(x.flatten(1).mean(1, keepdim=True) >= level, torch.nan, z)

    some = WithInputs(model, undefined)
    for name in ("evaluate", "hook", "curve", "measure", *ATTACKS):
        line = refusal(ENTRANCES[name], some, x, y)
        assert "expected finite logits, the model returns nan or inf for" in line, name
    weights = copy.deepcopy(model)
    weights[8].bias.data[3] = torch.inf
    for name in ("evaluate", "hook", "curve", "measure", "binarization", "path", *ATTACKS):
        line = refusal(ENTRANCES[name], weights, x, y)
        assert "expected finite weights, '8.bias' of Sequential holds nan or inf" in line, name


def test_a_buffer_that_is_no_number_is_named(case):
    model, data, _ = case
    norm = nn.BatchNorm2d(1)
    norm.running_var[0] = torch.nan
    for name in ("evaluate", "measure", "pgd"):
        line = refusal(ENTRANCES[name], nn.Sequential(norm, model).eval(), *data.tensors)
        assert "the buffer '0.running_var' of Sequential holds nan" in line, name


class WithInputs(Returns):
    def forward(self, x):
        return self.change(self.model(x), x)


LABELS = {
    "one-hot": (lambda y: nn.functional.one_hot(y, 5), "got torch.int64 of shape"),
    "probabilities": (lambda y: nn.functional.one_hot(y, 5).float(), "got probabilities of shape"),
    "ignored": (lambda y: torch.where(y == y[0], -100, y), "expected 0 .*, got -100 to"),
    "negative": (lambda y: torch.where(y == y[0], -1, y), "expected 0 .*, got -1 to"),
    "high": (lambda y: torch.where(y == y[0], 5, y), "expected 0 to 4, got . to 5"),
    "halves": (lambda y: y + 0.5, "that are not whole"),
    "rows": (lambda y: torch.stack([y, y], 1), r"got torch.int64 of shape \(\d+, 2\)"),
}


@pytest.mark.parametrize("labels", LABELS)
def test_every_entrance_refuses_the_same_labels(case, labels):
    model, data, _ = case
    x, y = data.tensors
    change, message = LABELS[labels]
    wrong = []
    for name, entrance in ENTRANCES.items():
        if labels == "probabilities" and name in ("trace", "layers", "sharpness"):
            continue  # cross-entropy takes them
        if labels == "high" and name == "binarization":
            continue  # it reads no labels
        line = refusal(entrance, model, x, change(y))
        fits = line and re.search(f"labels: expected .*{message}|labels: {message}", line)
        wrong += [] if fits else [f"{name}: {line}"]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("form", ["column", "floats", "int32", "column of floats"])
def test_every_entrance_reads_other_forms_of_class_indices(case, form):
    model, data, _ = case
    x, y = data.tensors
    other = {
        "column": y[:, None],
        "floats": y.float(),
        "int32": y.int(),
        "column of floats": y[:, None].double(),
    }[form]
    for name, entrance in ENTRANCES.items():
        # Of a single draw the standard error is nan, which equals no other.
        assert repr(entrance(model, x, other)) == repr(entrance(model, x, y)), name


class Squeezed(nn.Module):
    """`squeeze()` of features and logits, which in a batch of one takes the batch away."""

    def __init__(self, model, where):
        super().__init__()
        self.model, self.where = model, where

    def forward(self, x):
        features = self.model[:6](x).flatten(1)
        if self.where == "features":
            return self.model[7:](features.squeeze())
        return self.model[7:](features).squeeze()


@pytest.mark.parametrize("where", ["features", "logits"])
def test_a_batch_that_shrinks_to_one_is_the_same_sample(case, where):
    """The last survivor of an attack is a batch of one, and so is the last sample of a block."""
    model, data, plain = case
    x, y = data.tensors
    squeezed = Squeezed(model, where)
    assert squeezed(x[:1]).ndim == 1
    for eps in (0.01, 0.02, 0.03, 0.05):
        options = dict(FAST, eps=eps, diagnose=False)
        whole = evaluate(model, data, **options)
        for size in (256, 1, 23):
            again = evaluate(squeezed, data, **options, batch_size=size)
            assert again.verdicts == whole.verdicts
            assert again.kappas == pytest.approx(whole.kappas, rel=1e-3)
    for name in ATTACKS:
        assert ENTRANCES[name](squeezed, x, y) == ENTRANCES[name](model, x, y), name
    assert refusal(ENTRANCES["pgd"], squeezed, x[:1], y[:2]).startswith("an attack: labels: ")
    assert len(plain.verdicts) == N


class Shifted(nn.Module):
    """Normalises its images, in a tensor of its own or in that which it is given."""

    def __init__(self, model, in_place):
        super().__init__()
        self.model, self.in_place = model, in_place

    def forward(self, x):
        return self.model(x.sub_(0.1).div_(0.9) if self.in_place else (x - 0.1) / 0.9)


def test_a_model_that_normalises_in_place_changes_nothing_of_the_callers(case):
    model, data, _ = case
    x, y = data.tensors
    kept, (aside, in_place) = x.clone(), (Shifted(model, where) for where in (False, True))
    for name, entrance in ENTRANCES.items():
        assert repr(entrance(in_place, x, y)) == repr(entrance(aside, x, y)), name
        assert torch.equal(x, kept), name
    assert find_head(in_place, x).name == "model.8" and torch.equal(x, kept)


class ShiftedUnseen(Shifted):
    """Normalises in place where torch does not see it."""

    def forward(self, x):
        with torch.no_grad():
            x.sub_(0.1)
        return self.model(x)


def test_images_that_a_forward_writes_under_no_grad_are_told_in_one_line(case):
    model, data, _ = case
    x, y = data.tensors
    with pytest.raises(ValueError, match="that of ShiftedUnseen writes into them under") as error:
        pgd(ShiftedUnseen(model, True), x, y, eps=0.03)
    assert "\n" not in str(error.value)


CRITERIA = [
    CrossEntropy(),
    NFGSM(eps=0.1),
    PGDAT(eps=0.1),
    APGDAT(eps=0.1),
    TRADES(eps=0.1),
    MART(eps=0.1),
]


@pytest.mark.parametrize(
    ("criterion", "penalty"),
    [(CRITERIA[0], p) for p in PENALTIES] + [(c, PENALTIES[0]) for c in CRITERIA[1:]],
)
def test_a_model_that_normalises_in_place_is_trained_the_same(criterion, penalty):
    x, y = images()
    kept, found = x.clone(), []
    for in_place in (False, True):
        torch.manual_seed(0)
        model = Shifted(small_net().eval(), in_place)
        Objective(model, criterion, [penalty])(x, y).total.backward()
        assert torch.equal(x, kept)
        found.append([p.grad for p in model.parameters()])
    for aside, within in zip(*found, strict=True):
        torch.testing.assert_close(within, aside, rtol=1e-3, atol=1e-5)


def test_a_check_is_run_on_what_came_in():
    assert as_logits(torch.zeros(3), 1).shape == (1, 3)
    for outputs, size in ((torch.zeros(3), 2), (torch.zeros(3, 4), 2), (torch.zeros(1), 1)):
        with pytest.raises(ValueError, match="expected logits"):
            as_logits(outputs, size)
    check_no_probabilities(torch.tensor([[0.5, 0.4], [0.5, 0.5]]))
    with pytest.raises(ValueError, match="got a list"):
        as_labels([0, 1], 2)
    for labels in (torch.tensor([0, -100]), torch.tensor([[1], [-100]])):
        with pytest.raises(ValueError, match="labels: expected 0 to 2, got -100 to"):
            cross_entropy(torch.zeros(2, 3), labels)
