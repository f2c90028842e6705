"""Defences that hide what is there: the finding that names them, and the attack through them."""

import importlib.util
import math
import sys
from collections import OrderedDict
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cases import images, trained_net
from torch import nn
from torch.utils.data import TensorDataset

from flatreg import adaptive_attack_check, evaluate
from flatreg.attacks import bpda, eot, noise, pgd, spot_check, square
from flatreg.attacks.bpda import with_bpda
from flatreg.attacks.cascade import PRESETS, describe
from flatreg.attacks.query import QueriedModel
from flatreg.data.sharing import Batch
from flatreg.evaluation import jumps
from flatreg.evaluation.findings import masking_checks, masking_findings
from flatreg.evaluation.jumps import jump_check
from flatreg.run.recipe_sections import EvaluationSettings
from flatreg.threat import Threat

EPS = {"linf": 0.02, "l2": 0.2, "l1": 1.5}
PGD = partial(pgd, steps=10)


def load_defences():
    file = Path(__file__).parent.parent / "benchmarks" / "defences.py"
    spec = importlib.util.spec_from_file_location("defences", file)
    module = sys.modules["defences"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


D = load_defences()


@pytest.fixture(scope="module")
def case():
    model, x, y = trained_net(n=64)
    return model, x, y


def behind(front, model):
    return nn.Sequential(OrderedDict(front=front, model=model)).eval()


def with_activation(model, make):
    """The network with other activations, which nothing trained: it is judged at its own labels."""
    layers = [make() if isinstance(layer, nn.SiLU) else layer for layer in model]
    return nn.Sequential(*layers).eval()


def mean_sparse(model, alpha=0.2):
    sparse, (x, _) = D.MeanSparse(6, alpha), images(64)
    with torch.no_grad():
        a = model[0](x)
    sparse.mean.copy_(a.mean((0, 2, 3)).view(-1, 1, 1))
    sparse.deviation.copy_(a.std((0, 2, 3)).view(-1, 1, 1))
    return nn.Sequential(model[0], sparse, *model[1:]).eval()


def jumping(model, x, norm="linf"):
    """Share of the images on which the margin jumps; above .05 the finding is flagged."""
    with torch.no_grad():
        batch = Batch(list(range(len(x))), x, model(x).argmax(1))
    found = jump_check(QueriedModel(model), batch, Threat(norm=norm, eps=EPS[norm]), seed=0)
    return float(found.double().mean())


class Ripples(nn.Module):
    def forward(self, x):
        return x + 0.02 * torch.sin(8000 * x)


class Half(nn.Module):
    """Every second column is rounded: half of the pixels have a gradient."""

    def forward(self, x):
        rounded = (x * 8).round() / 8
        return torch.where(torch.arange(x.shape[-1]) % 2 == 0, rounded, x)


JUMPING = {
    "MeanSparse": mean_sparse,
    "MeanSparse, narrow": partial(mean_sparse, alpha=0.1),
    "k-winners-take-all": lambda m: with_activation(m, lambda: D.WinnersTakeAll(0.2)),
    "8 grey levels": partial(behind, D.Quantize(8)),
    "255 grey levels": partial(behind, D.Quantize(255)),
    "slope between levels": partial(behind, D.Quantize(16, 0.05)),
    "slope the wrong way": partial(behind, D.Quantize(16, -0.2)),
    "smooth stairs": partial(behind, D.SoftStairs(32, 4.0)),
    "half of the pixels": partial(behind, Half()),
    "JPEG": partial(behind, D.Jpeg(0.1)),
    "noise by image": partial(behind, D.Noise(0.05, by_image=True)),
    "ripples": partial(behind, Ripples()),
    "rounded features": lambda m: nn.Sequential(*m[:-1], D.Quantize(64), m[-1]).eval(),
}


@pytest.mark.parametrize("name", JUMPING)
def test_a_margin_that_moves_otherwise_than_its_gradient_is_flagged(case, name):
    model, x, _ = case
    assert jumping(JUMPING[name](model), x[:32]) > 0.05


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_jumps_are_flagged_in_every_norm(case, norm):
    model, x, _ = case
    assert jumping(mean_sparse(model), x[:32], norm) > 0.5
    assert jumping(model, x[:32], norm) == 0


CONTINUOUS = {
    **{a.__name__: a for a in (nn.ReLU, nn.ReLU6, nn.GELU, nn.Hardswish, nn.Sigmoid, nn.LeakyReLU)},
    "maximum of neighbours": lambda: nn.Sequential(nn.MaxPool2d(3, 1, 1), nn.ReLU()),
    "ReLU, BatchNorm": lambda: nn.Sequential(nn.LazyBatchNorm2d(), nn.ReLU()),
}


@pytest.mark.parametrize("name", CONTINUOUS)
def test_a_continuous_margin_is_not_flagged(case, name):
    model, x, _ = case
    changed = with_activation(model, CONTINUOUS[name])
    changed(x)
    assert jumping(changed, x[:32]) == 0


def kinky(depth, width, x):
    """A deep ReLU network that nothing trained: kinks every few percent of the way."""
    torch.manual_seed(0)
    layers, inside = [nn.Flatten()], x[0].numel()
    for outside in [width] * depth + [5]:
        layers += [nn.Linear(inside, outside), nn.ReLU()]
        nn.init.kaiming_normal_(layers[-2].weight)
        nn.init.normal_(layers[-2].bias, std=0.2)
        inside = outside
    return nn.Sequential(*layers[:-1]).eval()


@pytest.mark.parametrize(("depth", "width", "eps"), [(6, 64, 1.0), (10, 128, 0.5)])
def test_kinks_are_no_jumps_however_many(depth, width, eps, monkeypatch):
    """16 steps miss more than a tenth of the way, as of jumps; of these 64 steps miss less."""
    x = torch.rand(32, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    model = kinky(depth, width, x)
    monkeypatch.setitem(EPS, "linf", eps)
    assert jumping(model, x) <= 0.05
    assert jumping(behind(D.Quantize(8), model), x) > 0.05
    monkeypatch.setattr(jumps, "_SHORT_STEPS", 16)
    assert jumping(model, x) > 0.05


def test_rounding_at_a_tiny_eps_is_no_jump(case, monkeypatch):
    model, x, _ = case
    monkeypatch.setitem(EPS, "linf", 1e-6)
    assert jumping(model, x[:32]) <= 0.05


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_the_scale_of_the_logits_is_no_jump(case, scale):
    model, x, _ = case
    scaled = nn.Sequential(*model[:-1], nn.Linear(32, 5))
    with torch.no_grad():
        scaled[-1].weight.copy_(scale * model[-1].weight)
        scaled[-1].bias.copy_(scale * model[-1].bias)
    assert jumping(scaled.eval(), x[:32]) == 0


def test_a_new_draw_in_every_pass_is_random_and_no_jump(case):
    model, x, _ = case
    noisy, batch = (
        behind(D.Noise(0.05), model),
        Batch(list(range(8)), x[:8], model(x[:8]).argmax(1)),
    )
    nobody = torch.zeros(8, dtype=torch.bool)
    checks = masking_checks(noisy, batch, Threat(norm="linf", eps=0.02), seed=0, survived=nobody)
    flagged = {f.name for f in masking_findings(checks) if f.verdict == "flagged"}
    assert "stochastic forward" in flagged and "margin jumps" not in flagged


class InPlace(nn.Module):
    def forward(self, x):
        return x.mul_(8).round_().div_(8)


class Through(nn.Module):
    """Through numpy, where no gradient goes."""

    def forward(self, x):
        return torch.from_numpy((x.detach().numpy() * 8).round() / 8)


def straight(f, g=lambda a: a):
    """The backward pass of g for that of f, by hand."""
    return lambda a: g(a) + (f(a.detach().clone()) - g(a)).detach()


class ByHand(nn.Module):
    """Modules in order, some of them with another backward pass."""

    def __init__(self, steps):
        super().__init__()
        self.steps = steps

    def forward(self, x):
        for step in self.steps:
            x = step(x)
        return x


FRONTS = {
    "Quantize": D.Quantize(8),
    "Jpeg": D.Jpeg(0.3),
    "InPlace": InPlace(),
    "Through": Through(),
    "Noise": D.Noise(0.02, by_image=True),
}


@pytest.mark.parametrize("norm", EPS)
@pytest.mark.parametrize("name", FRONTS)
def test_the_attack_is_that_of_a_backward_pass_written_by_hand(case, name, norm):
    model, x, y = case
    front, options = FRONTS[name], dict(eps=EPS[norm], norm=norm)
    defended = behind(front, model)
    by_hand = PGD(ByHand([straight(front), model]), x, y, **options)
    found = bpda(defended, x, y, attack=PGD, modules=[name], **options)
    assert torch.equal(found.fooled, by_hand.fooled)
    torch.testing.assert_close(found.inputs, by_hand.inputs, rtol=0, atol=1e-6)
    with torch.no_grad():  # the verdict is the defended model's own
        wrong = defended(found.inputs[found.fooled]).argmax(1) != y[found.fooled]
    assert bool(wrong.all()) and bool(found.fooled.any())


@pytest.mark.parametrize("where", ["class", "path", "module"])
def test_modules_are_named_by_class_by_path_or_with_another_backward_pass(case, where):
    model, x, y = case
    defended = with_activation(model, lambda: D.WinnersTakeAll(0.3))
    paths = [str(i) for i, m in enumerate(defended) if isinstance(m, D.WinnersTakeAll)]
    names = {"class": ["WinnersTakeAll"], "path": paths, "module": {"WinnersTakeAll": nn.ReLU()}}
    g = F.relu if where == "module" else (lambda a: a)
    steps = [straight(m, g) if isinstance(m, D.WinnersTakeAll) else m for m in defended]
    found = bpda(defended, x, y, attack=PGD, modules=names[where], eps=0.05)
    by_hand = PGD(ByHand(steps), x, y, eps=0.05)
    torch.testing.assert_close(found.inputs, by_hand.inputs, rtol=0, atol=1e-6)
    assert not torch.equal(found.inputs, PGD(defended, x, y, eps=0.05).inputs)


def test_a_pass_is_bit_for_bit_the_models_own_and_no_hook_stays(case):
    model, x, y = case
    defended, passes = behind(D.Jpeg(0.1), model), []

    def compared(attacked, inputs, labels, *, eps, **options):
        points = inputs.clone().requires_grad_()
        passes.append(torch.equal(attacked(points), defended_before))
        return PGD(attacked, inputs, labels, eps=eps, **options)

    defended_before = defended(x)
    for attack in (compared, lambda *a, **k: 1 / 0):
        try:
            bpda(defended, x, y, attack=attack, modules=["front"], eps=0.02)
        except ZeroDivisionError:
            pass
    assert passes == [True]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in defended.modules())


def test_a_random_defence_is_attacked_through_its_mean(case):
    model, x, y = case
    defended = nn.Sequential(D.Noise(0.02), D.Quantize(8), model).eval()
    attack, options = partial(eot, attack=PGD, draws=4), dict(eps=0.05)
    for outer in (
        partial(bpda, attack=attack, modules=["Quantize"]),
        partial(eot, attack=partial(bpda, attack=PGD, modules=["Quantize"]), draws=4),
    ):
        torch.manual_seed(0)
        left = int((~outer(defended, x, y, **options).fooled).sum())
        assert left < int((~attack(defended, x, y, **options).fooled).sum()) / 2


REFUSED = {
    "no such module": (["nope"], ValueError, "no module of the name or class 'nope'; it has front"),
    "one name": ("front", TypeError, r"write \['front'\]"),
    "no module": ({"front": 3}, ValueError, "mapping of names to modules"),
    "the model itself": ([""], ValueError, "expected names of modules"),
    "another shape": (["model.8"], ValueError, "'model.8' makes .* its substitute"),
    "never called": (["front.unused"], ValueError, "no pass of the model calls 'front.unused'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_named_is_refused_in_one_line(case, name):
    model, x, y = case
    defended = behind(D.Quantize(8), model)
    defended.front.unused = nn.Identity()
    modules, kind, message = REFUSED[name]
    data = TensorDataset(x[:4], y[:4])
    with pytest.raises(kind, match=message) as error:
        evaluate(defended, data, eps=0.02, attack=PGD, bpda=modules, progress=False)
    assert "\n" not in str(error.value)


def test_a_wrong_name_is_refused_where_no_image_is_attacked(case):
    model, x, _ = case
    wrong = TensorDataset(x[:4], (model(x[:4]).argmax(1) + 1) % 5)
    with pytest.raises(ValueError, match="no module of the name or class 'nope'"):
        evaluate(model, wrong, eps=0.02, attack=PGD, bpda=["nope"], progress=False)


def test_of_no_images_none_is_attacked(case):
    model, x, y = case
    found = bpda(behind(nn.Identity(), model), x[:0], y[:0], attack=PGD, modules=["front"], eps=0.1)
    assert len(found.inputs) == len(found.fooled) == 0


def test_stages_with_gradients_run_twice_and_a_spot_check_stays_last():
    own = PRESETS["standard"]
    longer = with_bpda(own, ["front"])
    assert longer[:3] == own[:3] and longer[-1] is own[-1] and len(longer) == 7
    assert all(stage.func is bpda for stage in longer[3:6])
    assert with_bpda(own, ()) == own
    blind = (partial(noise, draws=3), PGD, partial(square, queries=9))
    named = [describe(stage) for stage in with_bpda(blind, {"front": nn.Sequential(nn.ReLU())})]
    assert named == [
        "noise(draws=3)",
        "pgd(steps=10)",
        "bpda(attack=pgd(steps=10), modules={'front': 'Sequential'})",
        "square(queries=9)",
    ]


def test_an_evaluation_finds_what_the_rounding_hid(case, tmp_path):
    model, x, y = case
    defended, data = behind(D.Quantize(8), model), TensorDataset(x, y)
    cascade = (PGD, partial(spot_check, attack=partial(square, queries=5), samples=4))
    options = dict(
        eps=0.02, attack=cascade, progress=False, curve=[0.01], other_threats={"l2": 0.2}
    )
    hidden = evaluate(defended, data, **options)
    kept = dict(folder=tmp_path, bpda={"front": nn.Identity()}, diagnose=False)
    found, again = (evaluate(defended, data, **options, **kept) for _ in range(2))
    assert "margin jumps" in {f.name for f in hidden.findings if f.verdict == "flagged"}
    assert hidden.attacked.value - found.attacked.value > 0.3
    assert found.curve[0].accuracy.value < hidden.curve[0].accuracy.value
    assert found.other_threats[0].attacked.value < hidden.other_threats[0].attacked.value
    assert again.verdicts == found.verdicts
    right = [v > -2 for v in found.verdicts]
    by_hand = PGD(ByHand([straight(defended.front), model]), x, y, eps=0.02).fooled
    rows = torch.tensor(found.indices)
    survived = torch.tensor([v == -1 for v in found.verdicts])
    assert not bool((survived & by_hand[rows]).any()) and sum(right) > 32


def test_the_adaptive_check_says_that_the_named_modules_hid_it(case):
    model, x, y = case
    defended, data = behind(D.Quantize(8), model), TensorDataset(x, y)
    result = evaluate(defended, data, eps=0.02, attack=PGD, diagnose=False, progress=False)
    short = dict(steps=8, restarts=1, slices=0, progress=False)
    check = adaptive_attack_check(defended, data, result, bpda=["Quantize"], **short)
    (finding,) = (f for f in check.findings if f.name == "bpda wins")
    assert finding.verdict == "flagged" and finding.value == sum(check.fooled_by_bpda) / check.n
    assert "bpda wins" in str(check)
    lost = sum(a or b for a, b in zip(check.fooled_by_bpda, check.fooled_by_search, strict=True))
    assert math.isclose(check.attacked.value, (check.survivors - lost) / result.n)
    plain = adaptive_attack_check(defended, data, result, **short)
    assert plain.fooled_by_bpda == [] and "bpda wins" not in str(plain)


def test_a_recipe_names_modules():
    settings = EvaluationSettings(eps=0.1, bpda=["front"]).settings()
    assert settings["bpda"] == ["front"] and EvaluationSettings(eps=0.1).settings()["bpda"] == []
    for wrong in ("front", [""], [3]):
        with pytest.raises(ValueError, match="bpda"):
            EvaluationSettings(eps=0.1, bpda=wrong)
