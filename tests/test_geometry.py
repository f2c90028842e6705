import json
import math
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import refused, small_net, trained_net
from pydantic import TypeAdapter
from safetensors.torch import save_file, save_model
from torch import nn
from torch.utils.data import TensorDataset

from flatreg import evaluate
from flatreg.attacks.pgd import pgd
from flatreg.evaluation.geometry.by_outcome import (
    HeadPasses,
    flatness_by_confidence,
    flatness_by_outcome,
    fooled_before,
    measured_by_outcome,
)
from flatreg.evaluation.geometry.card import GeometryCard
from flatreg.evaluation.geometry.measure import measure
from flatreg.measures.at_head import AtHead, pass_to_head
from flatreg.measures.estimate import Estimate
from flatreg.measures.feature_bound import bound_curve, feature_radius
from flatreg.measures.input_hessian import directional_curvature, normal_trace
from flatreg.measures.layer_flatness import layer_flatness
from flatreg.measures.manifold import PCAManifold
from flatreg.measures.relative_flatness import relative_flatness, scale_to_confidence
from flatreg.measures.sharpness import average_case_sharpness, worst_case_sharpness
from flatreg.measures.weight_hessian import hessian_top_eigenvalue, hessian_trace_estimate
from flatreg.report.card import card_text, kappa_cells, read_card, write_card

CARD = TypeAdapter(GeometryCard)
SETTINGS = dict(
    eps=0.02,
    samples=None,
    probed=20,
    num_probes=3,
    progress=False,
    name="net",
    data_name="strips",
)


def numbers(card):
    """Everything on the card but the time it took."""
    raw = json.loads(CARD.dump_json(replace(card, seconds={})))
    flat = {}

    def walk(value, path):
        if isinstance(value, dict | list):
            for key, child in value.items() if isinstance(value, dict) else enumerate(value):
                walk(child, f"{path}.{key}")
        else:
            flat[path] = value

    walk(raw, "")
    return flat


def assert_same(first, second):
    assert first.keys() == second.keys()
    for path, value in first.items():
        if isinstance(value, float):
            assert second[path] == pytest.approx(value, rel=2e-3, abs=1e-5), path
        else:
            assert second[path] == value, path


@pytest.fixture(scope="module")
def case():
    """A trained net, its data and its card."""
    model, x, y = trained_net(n=120)
    manifold = PCAManifold(rank=20).fit(x)
    card = measure(model, TensorDataset(x, y), manifold=manifold, batch_size=120, **SETTINGS)
    return model, x, y, manifold, card


@pytest.fixture(scope="module")
def probed(case):
    """The probed images of the card, in two blocks of 16 and 4."""
    _, x, y, _, _ = case
    rows = sorted(np.random.default_rng(0).choice(120, 20, replace=False).tolist())
    return x[rows], y[rows]


def test_kappa_by_outcome_is_the_mean_over_each_outcome(case):
    model, x, y, _, card = case
    weight = model[-1].weight.detach()
    with torch.no_grad():
        phi, z = model[:-1](x), model(x)
    right = z.argmax(1) == y
    found = pgd(model, x[right], y[right], eps=0.02, step_size=0.5)  # as every cascade begins
    attacked = found.inputs[found.fooled]
    with torch.no_grad():
        at_attack, z_attack = model[:-1](attacked), model(attacked)
    c = scale_to_confidence(z, 0.9)
    groups = {
        "clean": (phi, z),
        "right": (phi[right], z[right]),
        "wrong": (phi[~right], z[~right]),
        "attacked": (at_attack, z_attack),
    }
    assert 2 <= len(attacked) < int(right.sum()) < 119
    for name, (features, logits) in groups.items():
        got = getattr(card.kappa.by_outcome, name)
        assert got.n == len(logits)
        for scale, estimate in ((1.0, got.raw), (c, got.matched)):
            kappa = relative_flatness(features, scale * logits, scale * weight)
            assert estimate.value == pytest.approx(float(kappa.mean()), rel=1e-4)
            assert estimate.stderr == pytest.approx(
                float(kappa.std() / len(kappa) ** 0.5), rel=1e-4
            )


def test_bins_of_confidence_hold_every_sample_once(case):
    model, x, y, _, card = case
    by_outcome = card.kappa.by_outcome
    for bins in (card.kappa.by_confidence, card.kappa.by_confidence_matched):
        for outcome in ("right", "wrong", "attacked"):
            assert sum(b.n[outcome] for b in bins) == getattr(by_outcome, outcome).n
    with torch.no_grad():
        phi, z = model[:-1](x), model(x)
    confidence = z.double().softmax(1).amax(1)
    kappa = relative_flatness(phi, z, model[-1].weight.detach())
    fullest = max(card.kappa.by_confidence, key=lambda b: b.n["right"])
    inside = (confidence > fullest.low) & (confidence <= fullest.high) & (z.argmax(1) == y)
    assert fullest.n["right"] == int(inside.sum())
    assert fullest.kappa["right"].value == pytest.approx(float(kappa[inside].mean()), rel=1e-4)
    uncertainty = float(1 - confidence[inside].mean())
    assert fullest.uncertainty["right"] == pytest.approx(uncertainty, rel=1e-6)


def test_one_sample_is_no_estimate_and_a_scale_may_not_exist():
    weight = torch.eye(2)
    z = torch.tensor([[2.0, 0.0], [3.0, 0.0], [1.0, 0.0]])
    clean = AtHead(z, z, torch.tensor([0, 0, 1]), weight)
    passes = HeadPasses(clean, clean.rows(torch.empty(0).long()))
    by_outcome = flatness_by_outcome(passes)
    assert (by_outcome.right.n, by_outcome.wrong.n, by_outcome.attacked.n) == (2, 1, 0)
    assert by_outcome.wrong.raw is None and by_outcome.attacked.matched is None
    assert by_outcome.right.raw.n == 2 and by_outcome.clean.matched is not None
    flat = flatness_by_outcome(passes._replace(clean=replace(clean, logits=torch.zeros(3, 2))))
    assert flat.scale is None and flat.clean.matched is None and flat.clean.raw is not None
    assert "-" in kappa_cells({"arm": by_outcome})[1][0]
    bins = flatness_by_confidence(passes)
    assert [b.n["wrong"] for b in bins if b.low == 0.7] == [1]  # sigmoid(1) = 0.73
    assert all(b.kappa["wrong"] is None for b in bins)


def test_layers_are_those_of_the_measure(case, probed):
    model, _, _, _, card = case
    for kind in ("hessian", "gauss_newton"):
        direct = layer_flatness(model, *probed, num_probes=3, matrix=kind)
        assert getattr(card.layers, kind) == direct


class Turned:
    """A manifold whose tangent directions count as normal."""

    def __init__(self, manifold):
        self.manifold = manifold

    def split(self, inputs, vectors):
        return self.manifold.split(inputs, vectors)[::-1]


@pytest.mark.parametrize("name", ["on", "off"])
def test_curvature_is_that_of_the_measure_on_both_sides(case, probed, name):
    model, _, _, manifold, card = case
    space, dimension = (manifold, 236) if name == "off" else (Turned(manifold), 20)
    found = {"curvature": [], "slope": [], "along_gradient": []}
    for block, rows in enumerate((slice(0, 16), slice(16, 20))):
        x, y = (t[rows] for t in probed)

        def loss_at(inputs, labels=y):
            return F.cross_entropy(model(inputs), labels, reduction="none")

        trace = normal_trace(loss_at, x, manifold=space, num_probes=3, seed=block).values
        points = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss_at(points).sum(), points)
        part = space.split(x, gradient)[1]
        length = part.flatten(1).norm(dim=1)
        unit = part / length.reshape(-1, 1, 1, 1)
        found["curvature"].append(trace / dimension)
        found["slope"].append(length)
        found["along_gradient"].append(directional_curvature(loss_at, x, unit))
    side = getattr(card.curvature, name)
    assert side.dimension == dimension
    for field, values in found.items():
        got, want = getattr(side, field), torch.cat(values).double()
        quartiles = want.quantile(torch.tensor([0.25, 0.5, 0.75]).double(), interpolation="nearest")
        assert [got.lower, got.median, got.upper] == pytest.approx(quartiles.tolist(), rel=1e-3)
        assert got.mean.value == pytest.approx(float(want.mean()), rel=1e-3)
    assert side.top.mean.value > side.curvature.mean.value


def test_bounds_are_those_of_the_measure(case, probed):
    model, x, y, _, card = case
    bounds, weight = card.bounds, model[-1].weight.detach()
    with torch.no_grad():
        every, z = model(x), model(probed[0])
    curve = bound_curve(z, probed[1], weight, bounds.radii)
    for name in ("local_bound", "relative_bound", "global_bound", "worst_loss"):
        for quartile, q in (("lower", 0.25), ("median", 0.5), ("upper", 0.75)):
            want = getattr(curve, name).double().quantile(q, dim=1, interpolation="nearest")
            got = getattr(getattr(bounds, name), quartile)
            assert got == pytest.approx(want.tolist(), rel=1e-4)
    distance = feature_radius(every, y, weight).double()
    lower = float(distance.quantile(0.25, interpolation="nearest"))
    assert bounds.feature_radius.n == 120
    assert bounds.feature_radius.lower == pytest.approx(lower, rel=1e-4)
    assert bounds.radii[-1] == pytest.approx(2 * float(distance[distance > 0].median()), rel=1e-4)
    assert bounds.lipschitz.n == 20 and bounds.lipschitz_kind == "estimate"
    assert bounds.reach == pytest.approx(bounds.lipschitz.median * 0.02 * 16)


def test_sharpness_is_that_of_the_measure(case, probed):
    model, _, _, _, card = case
    x, y = probed
    blocks = [(x[:16], y[:16]), (x[16:], y[16:])]
    plain, adaptive, noise, relative_noise = card.sharpness.rises
    for rise, flag in ((plain, False), (adaptive, True)):
        direct = worst_case_sharpness(
            model, blocks, rho=rise.radius.size, adaptive=flag, restarts=0
        )
        assert rise.radius.adaptive is flag and rise.rise.n == 2
        assert (rise.rise.value, rise.rise.stderr) == pytest.approx(
            (direct.value, direct.stderr), rel=1e-4
        )
    for rise, flag in ((noise, False), (relative_noise, True)):
        options = {"std": rise.radius.size, "adaptive": flag, "num_draws": 1}
        draws = [average_case_sharpness(model, [(x, y)], **options, seed=s).value for s in range(3)]
        direct = Estimate.mean(torch.tensor(draws))
        assert rise.rise.value == pytest.approx(direct.value, rel=1e-2, abs=1e-6)
        assert rise.rise.stderr == pytest.approx(direct.stderr, rel=1e-2, abs=1e-6)
    traces = [hessian_trace_estimate(model, x, y, num_probes=1, seed=s).value for s in range(3)]
    assert card.sharpness.trace.value == pytest.approx(sum(traces) / 3, rel=1e-3)
    top = hessian_top_eigenvalue(model, x, y)
    assert card.sharpness.top_eigenvalue.value == pytest.approx(top.value, rel=1e-4)


def test_the_batch_size_changes_nothing_but_rounding(case):
    model, x, y, manifold, card = case
    again = measure(model, TensorDataset(x, y), manifold=manifold, batch_size=7, **SETTINGS)
    assert_same(numbers(card), numbers(again))


def test_the_card_reads_back_and_fits_the_terminal(case, tmp_path):
    card = case[-1]
    endless = replace(card.bounds.feature_radius, upper=math.inf)
    card = replace(card, bounds=replace(card.bounds, feature_radius=endless), notes=["word " * 60])
    write_card(card, tmp_path, {"a.png": "caption"})
    assert read_card(tmp_path) == card and "![caption](a.png)" in (tmp_path / "card.md").read_text()
    text = card_text(card)
    assert max(map(len, text.split("\n"))) <= 100
    for word in ("KAPPA", "LAYERS", "CURVATURE", "BOUNDS", "SHARPNESS", "estimate (no bound)"):
        assert word in text
    assert "mean curvature: Hessian trace / dimension" in text
    (tmp_path / "card.json").write_text('{"schema": 99}')
    with pytest.raises(ValueError, match="expected schema 1, got 99"):
        read_card(tmp_path)


def test_an_altered_card_is_refused_in_one_line_or_read(case, tmp_path):
    card = case[-1]
    write_card(card, tmp_path, {})
    raw = json.loads((tmp_path / "card.json").read_text())
    assert refused(raw, tmp_path / "card.json", read_card) > 1000


def test_a_rise_over_one_block_reads_back_without_an_error(case, tmp_path):
    model, x, y, _, _ = case
    settings = {"eps": 0.02, "probed": 3, "num_probes": 2, "parts": ["sharpness"]}
    card = measure(model, TensorDataset(x, y), progress=False, **settings)
    write_card(card, tmp_path, {})
    assert read_card(tmp_path).sharpness.rises[0].rise.value == card.sharpness.rises[0].rise.value
    assert "nan" not in card_text(card)


def test_the_attack_and_the_reach_are_of_the_norm_that_is_asked_for(case):
    model, x, y, _, _ = case
    settings = {"parts": ["kappa", "bounds"], "samples": None, "probed": 4, "progress": False}
    card = measure(model, TensorDataset(x, y), eps=1.5, norm="l2", **settings)
    with torch.no_grad():
        right = model(x).argmax(1) == y
    found = pgd(model, x[right], y[right], eps=1.5, norm="l2", step_size=0.5)
    assert card.norm == "l2" and card.kappa.by_outcome.attacked.n == int(found.fooled.sum())
    assert card.bounds.reach == pytest.approx(card.bounds.lipschitz.median * 1.5)
    text = card_text(card)
    assert "L2 eps 1.5" in text and "the L2 ball of eps reaches" in text and "Linf" not in text


def test_samples_at_the_head_are_what_the_model_computes(case):
    model, x, y, _, _ = case
    with torch.no_grad():
        phi, z = model[:-1](x), model(x)
    at = pass_to_head(model, x, y, batch_size=50, dtype=torch.float64)
    assert at.features.dtype == at.logits.dtype == at.weight.dtype == torch.float64
    assert torch.allclose(at.features.float(), phi, atol=1e-5)
    assert torch.allclose(at.logits.float(), z, atol=1e-5)
    assert pass_to_head(model, x, y).logits.dtype == torch.float32
    wrong = at.rows(~at.right)
    assert torch.equal(wrong.labels, y[z.argmax(1) != y]) and not wrong.right.any()
    assert torch.allclose(at.kappa(3.0), at.scaled(3.0).kappa(), rtol=1e-12)
    certain = replace(at, logits=torch.tensor([[40.0, 0.0]]))
    assert float(certain.uncertainty) == pytest.approx(math.exp(-40), rel=1e-9)


def test_only_a_missing_head_leaves_flatness_by_outcome_out(case):
    model, x, y, _, _ = case
    every, headless = list(range(12)), nn.Sequential(nn.Flatten(), nn.Linear(256, 5), nn.Tanh())
    assert measured_by_outcome(headless, TensorDataset(x, y), every, eps=0.1) is None
    found = measured_by_outcome(model, TensorDataset(x, y), every, eps=0.1)
    assert found.clean.n == 12
    with pytest.raises(ValueError, match="norm must be one of linf, l2, l1"):
        measured_by_outcome(model, TensorDataset(x, y), every, eps=0.1, norm="l3")
    with pytest.raises(ValueError, match=r"images in \[0, 1\]"):
        measured_by_outcome(model, TensorDataset(4 * x - 2, y), every, eps=0.1)


def test_the_model_is_left_untouched():
    _, x, y = trained_net(n=16)
    model = small_net(batch_norm=True, dropout=0.5).train()
    model[1].eval()
    model[0].bias.requires_grad_(False)
    F.cross_entropy(model(x), y).backward()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    flags = [p.requires_grad for p in model.parameters()]
    modes = [m.training for m in model.modules()]
    streams = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    card = measure(model, TensorDataset(x, y), eps=0.03, probed=4, num_probes=2, progress=False)
    assert not card.refused
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    for p, g in zip(model.parameters(), gradients, strict=True):
        assert (p.grad is None) if g is None else torch.equal(p.grad, g)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), streams[0])
    assert np.array_equal(np.random.get_state()[1], streams[1]) and random.getstate() == streams[2]


def test_what_a_model_cannot_do_is_refused_and_the_rest_goes_on():
    x, y = torch.rand(12, 1, 4, 4), torch.arange(12) % 3
    headless = nn.Sequential(nn.Flatten(), nn.Linear(16, 3), nn.Tanh())
    card = measure(headless, TensorDataset(x, y), eps=0.1, probed=4, num_probes=2, progress=False)
    assert set(card.refused) == {"kappa", "bounds"} and card.kappa is None
    assert all("no head found" in reason for reason in card.refused.values())
    assert card.layers and card.curvature and card.sharpness
    torch.manual_seed(0)
    hard = nn.Sequential(nn.Flatten(), nn.Linear(16, 5), nn.Hardsigmoid(), nn.Linear(5, 3))
    card = measure(hard, TensorDataset(x, y), eps=0.1, probed=4, num_probes=2, progress=False)
    assert "curvature" in card.refused and "derivatives of order 2" in card.refused["curvature"]
    assert card.kappa and card.bounds and "derivative" in card.bounds.lipschitz_refused
    assert card.sharpness.rises and "derivative" in card.sharpness.hessian_refused
    assert "\n" not in "".join(card.refused.values())


def test_a_kinked_network_is_noted_once_and_a_smooth_one_not(case):
    layers = [nn.Flatten(), nn.Linear(256, 8), nn.ReLU(), nn.Linear(8, 5), nn.ReLU()]
    _, x, y, _, smooth = case
    card = measure(
        nn.Sequential(*layers, nn.Linear(5, 5)),
        TensorDataset(x, y),
        eps=0.1,
        probed=2,
        num_probes=2,
        parts=["curvature"],
        progress=False,
    )
    assert sum("ReLU" in note for note in card.notes) == 1 and smooth.notes == []
    assert card.curvature.on is None and card.curvature.off.dimension == 256
    assert card.kappa is None and set(card.seconds) == {"curvature"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": 8}, "for 8 grey levels of 255 write 8/255"),
        ({"eps": -1.0, "norm": "l2"}, "eps must be >= 0 and finite, got -1"),
        ({"norm": "l3"}, "norm: .* 'linf', 'l2' or 'l1', got 'l3'"),
        ({"num_probes": 1}, "num_probes: .* greater than or equal to 2, got 1"),
        ({"probed": 2.5}, "probed: .* valid integer, .* got 2.5"),
        ({"batch_size": 0}, "batch_size: .* greater than or equal to 1, got 0"),
        ({"parts": []}, "parts: .* at least 1 item"),
        ({"parts": ["kapa"]}, "parts.0: .* 'kappa', .* got 'kapa'"),
        ({"radii": [-1.0]}, "radii.0: .* greater than or equal to 0, got -1.0"),
        ({"manifold": PCAManifold(rank=2)}, "not fitted"),
        ({"samples": 0}, "samples: .*, got 0"),
    ],
)
def test_wrong_settings_are_refused(case, options, message):
    model, x, y, _, _ = case
    with pytest.raises(ValueError, match=message):
        measure(model, TensorDataset(x, y), **{"eps": 0.1, "progress": False} | options)


TWO = """
import sys
folder, rank, tests = sys.argv[1:]
sys.path.insert(0, tests)
import torch
from cases import small_net
from flatreg.evaluation.geometry.card import GeometryCard
from flatreg.evaluation.geometry.measure import measure
from flatreg.measures.manifold import PCAManifold
from pydantic import TypeAdapter
from safetensors.torch import load_file, load_model
from torch.utils.data import TensorDataset

torch.distributed.init_process_group(
    "gloo", init_method=f"file://{folder}/store", rank=int(rank), world_size=2
)
model, data = small_net(batch_norm=False), load_file(f"{folder}/data.safetensors")
load_model(model, f"{folder}/model.safetensors")
x, y = data["x"], data["y"]
card = measure(
    model, TensorDataset(x, y), eps=0.02, samples=None, probed=20, num_probes=3,
    manifold=PCAManifold(rank=20).fit(x), batch_size=120, progress=False, name="net",
    data_name="strips",
)
open(f"{folder}/{rank}.json", "wb").write(TypeAdapter(GeometryCard).dump_json(card))
torch.distributed.destroy_process_group()
"""


def test_two_processes_find_what_one_does(case, tmp_path):
    model, x, y, _, card = case
    save_model(model, str(tmp_path / "model.safetensors"))
    save_file({"x": x, "y": y}, tmp_path / "data.safetensors")
    (tmp_path / "two.py").write_text(TWO)
    command = [sys.executable, str(tmp_path / "two.py"), str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    both = [
        subprocess.Popen([*command, rank, str(Path(__file__).parent)], env=environment)
        for rank in "01"
    ]
    assert [process.wait(timeout=120) for process in both] == [0, 0]
    cards = [CARD.validate_json((tmp_path / f"{rank}.json").read_bytes()) for rank in "01"]
    assert numbers(cards[0]) == numbers(cards[1])
    assert_same(numbers(card), numbers(cards[0]))


def test_only_what_the_same_attack_fooled_before_has_to_be_attacked_again():
    model, x, y = trained_net(n=80)
    data, every, passed = TensorDataset(x, y), list(range(80)), []
    hook = model.register_forward_pre_hook(lambda _, args: passed.append(len(args[0])))
    threat = dict(eps=0.02, batch_size=80)
    whole = measured_by_outcome(model, data, every, **threat)
    before = sum(passed)
    found = evaluate(model, data, eps=0.02, attack="fast", progress=False)
    fooled = fooled_before(found, bfloat16=False)
    assert fooled == {i for i, verdict in enumerate(found.verdicts) if verdict == 0}
    assert 0 < len(fooled) < sum(verdict > -2 for verdict in found.verdicts)
    passed.clear()
    assert measured_by_outcome(model, data, every, among=fooled, **threat) == whole
    hook.remove()
    assert sum(passed) < before
    # The verdicts of another attack, or of the same in another precision, say nothing here.
    assert fooled_before(found, bfloat16=True) is None
    other = evaluate(model, data, eps=0.02, attack=pgd, progress=False)
    assert other.stages[0].attack == "pgd" and fooled_before(other, bfloat16=False) is None
