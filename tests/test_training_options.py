"""What a training keeps: averages, the best epoch, an early end; soft labels and trackers."""

import copy
import functools
import itertools
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from timm.utils import ModelEmaV3

from flatreg import Objective, load_recipe
from flatreg.evaluation.evaluate import evaluate
from flatreg.measures.estimate import Estimate
from flatreg.run import train as training
from flatreg.run.build import build_model, build_training
from flatreg.run.checkpoints import Epoch, load_checkpoint
from flatreg.run.epoch import augmented
from flatreg.run.recipe import RecipeError
from flatreg.run.train import finished, make_accelerator, train

RECIPE = """
data: {kind: digits, test: 0.8, validation: 0.1}
augment: {crop: 1}
model: {name: test_convnext3, args: {kernel_sizes: 3}, mean: [0.5], std: [0.5]}
optimizer: {lr: 3.0e-3}
epochs: 3
batch_size: 64
evaluation: {eps: 0.1, samples: 40, attack: fast}
"""


@pytest.fixture
def read(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(RECIPE)
    return lambda *overrides: load_recipe(path, list(overrides))


def fit(recipe, folder, epochs=None):
    if epochs:
        recipe = recipe.model_copy(update={"epochs": epochs})
    arm, splits = recipe.arms()["flatreg"], recipe.data.load()
    return train(build_training(recipe, "flatreg", arm, splits), folder, make_accelerator())


def test_the_average_is_what_is_judged_and_follows_its_formula(read, tmp_path, monkeypatch):
    """timm's decay warms up: min(ema, 1 - n ** (-2/3)) at update n, counted from 1."""
    recipe, real = read("ema=0.9", "epochs=1"), ModelEmaV3.update
    expected, raw, updates = {}, {}, itertools.count(1)

    def spy(self, model, step=None):
        decay = min(0.9, 1 - next(updates) ** (-2 / 3))
        for key, value in model.state_dict().items():
            if value.is_floating_point():
                old = expected.get(key, value)
                expected[key] = decay * old + (1 - decay) * value
                raw[key] = value.clone()
        real(self, model, step)

    monkeypatch.setattr(ModelEmaV3, "update", spy)
    fit(recipe, tmp_path)
    judged = load_file(tmp_path / "epoch-0001/model.safetensors")
    trained = load_file(tmp_path / "epoch-0001/training.safetensors")
    for key, value in judged.items():
        assert torch.allclose(value, expected[key], atol=1e-5), key
        assert torch.equal(trained[key], raw[key])
    assert any(not torch.allclose(judged[key], trained[key], atol=1e-4) for key in judged)


def test_a_resumed_average_goes_on(read, tmp_path, monkeypatch):
    recipe = read("ema=0.95", "monitor={every: 1, samples: 20, keep: best}")
    fit(recipe, tmp_path / "whole")
    real, calls = training.save_checkpoint, []

    def cut(*args, **kwargs):
        real(*args, **kwargs)
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(training, "save_checkpoint", cut)
    with pytest.raises(KeyboardInterrupt):
        fit(recipe, tmp_path / "cut")
    fit(recipe, tmp_path / "cut")
    names = {p.name for p in (tmp_path / "whole/epoch-0003").glob("*.safetensors")}
    assert "training.safetensors" in names
    for name in names:
        one, two = (load_file(tmp_path / run / "epoch-0003" / name) for run in ("whole", "cut"))
        assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def test_the_best_epoch_is_judged(read, tmp_path, monkeypatch):
    """Attacked accuracy on what is held back falls after the second of four epochs."""
    recipe = read("monitor={every: 1, samples: 20, keep: best}", "epochs=4")
    values, states = iter([0.1, 0.4, 0.4, 0.2]), []
    real = training.AttackedAccuracy.__call__

    def scripted(self, model, epoch):
        result = real(self, model, epoch)
        states.append(copy.deepcopy(model.state_dict()))
        value = next(values)
        result.stages[-1] = result.stages[-1].__class__(
            result.stages[-1].attack, Estimate.share(round(20 * value), 20)
        )
        object.__setattr__(result, "attacked", Estimate.share(round(20 * value), 20))
        return result

    monkeypatch.setattr(training.AttackedAccuracy, "__call__", scripted)
    history = fit(recipe, tmp_path)
    assert [round(e.monitored.value, 2) for e in history] == [0.1, 0.4, 0.4, 0.2]
    model = build_model(recipe.model, recipe.data.load(), seed=5)
    load_checkpoint(tmp_path, model)
    assert all(torch.equal(v, states[1][k]) for k, v in model.state_dict().items())
    trained = load_file(tmp_path / "epoch-0004/training.safetensors")
    assert all(torch.equal(v, states[3][k]) for k, v in trained.items())


def test_patience_ends_a_training_and_the_run_is_complete(read):
    recipe = read("monitor={every: 1, samples: 20, patience: 2}", "epochs=9")

    def history(*values):
        return [
            Epoch(n, 0.1, 1.0, 1.0, {}, monitored=None if v is None else Estimate.share(v, 20))
            for n, v in enumerate(values)
        ]

    assert not finished(recipe, history(5, 7, 7)) and finished(recipe, history(5, 7, 7, 6))
    assert not finished(recipe, history(5, None, None, None)) and not finished(recipe, [])
    assert not finished(recipe, history(5, 4, 6, 5)) and finished(recipe, history(*[1] * 9))
    assert not finished(read("epochs=9"), history(5, 4, 3, 2, 1))


def test_the_monitor_looks_at_what_is_held_back_and_judges_the_average(read, tmp_path):
    recipe = read("ema=0.9", "epochs=2", "monitor={every: 1, samples: 30}")
    history, splits = fit(recipe, tmp_path), recipe.data.load()
    model = build_model(recipe.model, splits, seed=0)
    load_checkpoint(tmp_path, model)
    by_hand = evaluate(
        model, splits.validation, eps=0.1, samples=30, attack="fast", diagnose=False, progress=False
    )
    assert history[-1].monitored == by_hand.attacked


def test_soft_labels_are_timms(read):
    splits = read().data.load()
    images, labels = splits.train.images[:8], splits.train.labels[:8]
    plain = augmented(read("augment={}"), splits)(images, labels, 0)
    assert plain[1] is labels and plain[0].max() <= 1
    inputs, soft = augmented(read("augment={label_smoothing: 0.1}"), splits)(images, labels, 0)
    assert torch.equal(inputs, plain[0]) and soft.shape == (8, 10)
    assert torch.allclose(soft.sum(1), torch.ones(8)) and torch.equal(soft.argmax(1), labels)
    assert soft.max(1).values.tolist() == pytest.approx([0.91] * 8)
    mix = augmented(read("augment={mixup: 1.0}"), splits)
    inputs, soft = mix(images, labels, 0)
    differ = labels != labels.flip(0)
    share = soft[differ].gather(1, labels[differ, None])[0, 0]
    assert torch.allclose(inputs, share * plain[0] + (1 - share) * plain[0].flip(0), atol=1e-6)
    with pytest.raises(RecipeError, match=r"mixing pairs needs an even batch_size.* got 7"):
        read("augment={cutmix: 1.0}", "batch_size=7")


@pytest.mark.parametrize("augment", ["mixup: 1.0", "noise: 0.1"])
def test_images_that_are_stored_as_floats_are_not_changed_where_they_lie(read, augment):
    splits = read().data.load()
    images, labels = splits.train.images[:8] / 255, splits.train.labels[:8]
    before = images.clone()
    inputs, _ = augmented(read(f"augment={{{augment}}}"), splits)(images, labels, 0)
    assert torch.equal(images, before) and not torch.equal(inputs, before)


def test_all_arms_see_the_same_images_whatever_their_terms_draw(read, tmp_path, monkeypatch):
    """N-FGSM draws its noise from torch's global stream; and mixup draws from numpy's."""
    seen, real = {}, Objective.bind
    changes = "augment={crop: 1, flip: true, mixup: 0.4, noise: 0.1}", "epochs=2", "data.limit=300"
    for kind in ("CrossEntropy", "NFGSM, eps: 0.1"):

        def spy(self, inputs, targets, *rest, kind=kind):
            seen.setdefault(kind, []).extend((inputs.clone(), targets.clone()))
            return real(self, inputs, targets, *rest)

        monkeypatch.setattr(Objective, "bind", spy)
        arm = read(*changes, f"criterion={{kind: {kind}}}", "penalties=[]", "monitor=null")
        fit(arm, tmp_path / kind[:5])
    one, other = seen.values()
    assert len(one) == len(other) > 8 and all(map(torch.equal, one, other))
    assert not torch.equal(one[0], one[len(one) // 2])  # of another epoch


def test_noise_is_uniform_comes_last_and_draws_from_the_seed_alone(read):
    splits = read().data.load()
    images, labels = splits.train.images[:200], splits.train.labels[:200]
    for augment in ("crop: 1, flip: true", "mixup: 1.0"):
        plain, targets = augmented(read(f"augment={{{augment}}}"), splits)(images, labels, 5)
        prepare = augmented(read(f"augment={{{augment}, noise: 0.2}}"), splits)
        streams = torch.get_rng_state(), np.random.get_state()[1].tolist()
        noisy, same = prepare(images, labels, 5)
        assert torch.equal(streams[0], torch.get_rng_state())
        assert streams[1] == np.random.get_state()[1].tolist()
        assert torch.equal(same, targets) and 0 <= noisy.min() and noisy.max() <= 1
        added = (noisy - plain)[(plain > 0.2) & (plain < 0.8)]
        assert len(added) > 1000 and added.abs().max() <= 0.2 + 1e-6
        assert float(added.std()) == pytest.approx(0.2 / math.sqrt(3), rel=0.05)
        assert torch.equal(noisy, prepare(images, labels, 5)[0])
        assert not torch.equal(noisy, prepare(images, labels, 6)[0])
    with pytest.raises(RecipeError, match=r"augment.noise: .* less than or equal to 1, got 25"):
        read("augment.noise=25")


def test_a_training_on_mixed_and_smoothed_labels_learns(read, tmp_path):
    changes = "augment={mixup: 0.2, label_smoothing: 0.1}", "criterion={kind: NFGSM, eps: 0.05}"
    history = fit(read(*changes, "data.test=0.5"), tmp_path)
    assert history[-1].loss < history[0].loss < math.log(10) + 1


# What a fine-tuning needs.

CHECKPOINTING = ["model.grad_checkpointing=true"]
VIT = ["model.name=test_vit", "model.args={img_size: 32}", "data.limit=200", "epochs=1"]


def built(recipe):
    return build_training(recipe, "flatreg", recipe.arms()["flatreg"], recipe.data.load())


def trained(recipe, folder):
    """Parameters by name before and after a training."""
    training_ = built(recipe)
    before = {n: p.detach().clone() for n, p in training_.model.named_parameters()}
    train(training_, folder, make_accelerator())
    return before, dict(training_.model.named_parameters()), training_


def moved(before, after):
    return {name for name, values in before.items() if not torch.equal(values, after[name])}


def test_frozen_modules_keep_their_weights_and_statistics(read, tmp_path):
    settings = ["epochs=1", "data.limit=200", "model.name=test_efficientnet", "model.args={}"]
    recipe = read(*settings, "model.freeze=[conv_stem, bn1, blocks.0]")
    before, after, net = trained(recipe, tmp_path)
    frozen = ("model.conv_stem.", "model.bn1.", "model.blocks.0.")
    assert moved(before, after) == {n for n in before if not n.startswith(frozen)}
    statistics = {n: b for n, b in net.model.named_buffers() if n.endswith("running_mean")}
    for name, mean in statistics.items():
        assert bool(mean.any()) != name.startswith(frozen), name
    assert load_checkpoint(tmp_path, build_model(recipe.model, recipe.data.load(), seed=0))


def test_frozen_statistics_are_those_the_network_came_with(read, tmp_path):
    settings = ["epochs=1", "data.limit=200", "model.name=test_efficientnet", "model.args={}"]
    before, after, net = trained(read(*settings, "model.frozen_statistics=true"), tmp_path)
    assert moved(before, after) == set(before)
    means = [b for n, b in net.model.named_buffers() if n.endswith("running_mean")]
    assert means and not any(bool(mean.any()) for mean in means)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["model.freeze=[block.0]"], "freeze: there is no module block.0; did you mean blocks.0?"),
        (
            ["model.freeze=[patch_embed, pos_drop, blocks, norm, fc_norm, head, cls_token]"],
            "there is no module cls_token",
        ),
        (["optimizer.clip_norm=1", "optimizer.clip_mode=agc", "model.name=nobody"], "nobody"),
        (
            ["model.freeze=[head]", "optimizer.head_epochs=1"],
            "expected a classifier that is not fr",
        ),
        (["model.frozen_statistics=true"], "frozen_statistics has no effect without BatchNorm"),
        (
            ["model.name=wide_resnet28_10", "model.args={}", "model.grad_checkpointing=true"],
            "has no",
        ),
    ],
)
def test_what_cannot_be_set_up_is_refused_in_one_line(read, settings, message):
    with pytest.raises(ValueError) as error:
        built(read(*VIT, *settings))
    assert message in str(error.value) and "\n" not in str(error.value)


WITHOUT_EFFECT = {
    "optimizer.decay_rate=0.1": "has no effect on the schedule cosine",
    "optimizer.decay_milestones=[2]": "has no effect on the schedule cosine",
    "optimizer.clip_mode=agc": "needs clip_norm",
    "optimizer.min_lr=1": "min_lr: expected less than lr=0.003, got 1",
    "optimizer.schedule=step": "needs decay_epochs",
    "optimizer.schedule=multistep": "needs decay_milestones",
    "optimizer={lr: 1, schedule: step, decay_epochs: 1, decay_rate: 2}": "expected less than 1",
    "optimizer={lr: 1, schedule: step, decay_epochs: 3}": "expected less than the 3 epochs, got 3",
    "optimizer={lr: 1, schedule: multistep, decay_milestones: [1, 9]}": "the 3 epochs, got 9",
    "optimizer.warmup_epochs=4": "optimizer.warmup_epochs: expected at most the 3 epochs, got 4",
    "optimizer={lr: 1, schedule: tanh, warmup_epochs: 3}": "less than the 3 epochs, as tanh",
    "monitor={every: 4}": "monitor.every: expected at most the 3 epochs, got 4",
    "optimizer.head_epochs=4": "optimizer.head_epochs: expected at most the 3 epochs, got 4",
}


@pytest.mark.parametrize("setting", WITHOUT_EFFECT)
def test_a_setting_without_effect_is_refused(read, setting):
    with pytest.raises(RecipeError) as error:
        read(setting)
    assert WITHOUT_EFFECT[setting] in str(error.value)


@pytest.mark.parametrize("wrapper", ["null", "{kind: SAM, rho: 0.05}"])
def test_in_the_head_epochs_only_the_classifier_moves(read, tmp_path, wrapper):
    setting = f"optimizer.wrapper={wrapper}"
    recipe = read(*VIT, "optimizer.head_epochs=1", setting)
    before, after, _ = trained(recipe, tmp_path / "head")
    assert moved(before, after) == {"model.head.weight", "model.head.bias"}
    recipe = read(*VIT, "optimizer.head_epochs=1", "epochs=2", setting)
    before, after, _ = trained(recipe, tmp_path / "both")
    assert moved(before, after) == set(before)


FORMULAS = {
    "cosine": ({"min_lr": 0.001}, lambda t: 0.001 + 0.001 * (1 + math.cos(math.pi * t))),
    "poly": ({"decay_rate": 2}, lambda t: 0.003 * (1 - t) ** 2),
    "step": ({"decay_epochs": 1, "decay_rate": 0.5}, lambda t: 0.003 * 0.5 ** int(4 * t)),
    "multistep": (
        {"decay_milestones": [3, 2], "decay_rate": 0.1},
        # timm counts the update that is to come, of 20
        lambda t: 0.003 * 0.1 ** sum(round(20 * t) + 1 >= 5 * m for m in (2, 3)),
    ),
}


@pytest.mark.parametrize("schedule", FORMULAS)
def test_schedules_are_their_formulas(read, schedule):
    settings, expected = FORMULAS[schedule]
    given = [f"optimizer.{key}={value}" for key, value in settings.items()]
    recipe = read("epochs=4", "data.limit=400", f"optimizer.schedule={schedule}", *given)
    found = built(recipe)
    updates = len(found.loader)
    for update in range(0, 4 * updates, 2):
        found.schedule.step_update(update)
        for group in found.optimizer.param_groups:
            assert group["lr"] == pytest.approx(expected(update / (4 * updates))), update


def test_values_and_units_are_clipped_as_timm_does(read, tmp_path):
    plain = ["optimizer.args={momentum: 0, nesterov: false}", "optimizer.lr=1"]
    sgd = ["optimizer.name=sgd", *plain]
    for mode, bound in (("value", 1e-4), ("agc", 1e-3)):
        recipe = read(*VIT, *sgd, f"optimizer.clip_norm={bound}", f"optimizer.clip_mode={mode}")
        recipe = recipe.model_copy(update={"batch_size": len(recipe.data.load().train)})
        before, after, _ = trained(recipe, tmp_path / mode)  # one step
        steps = {n: (after[n].detach() - before[n]) / recipe.optimizer.lr for n in before}
        if mode == "value":
            largest = max(float(step.abs().max()) for step in steps.values())
            assert largest == pytest.approx(bound, rel=1e-2)
            continue
        weight = "model.blocks.0.attn.qkv.weight"
        norms = steps[weight].norm(dim=1) / before[weight].norm(dim=1).clamp_min(1e-3)
        assert float(norms.max()) == pytest.approx(bound, rel=1e-2)
        head = steps["model.head.weight"].norm(dim=1) / before["model.head.weight"].norm(dim=1)
        assert float(head.max()) > 2 * bound


@pytest.mark.parametrize("setting", ["channels_last", "grad_checkpointing", "compile"])
def test_how_the_network_computes_changes_no_result(read, tmp_path, setting, monkeypatch):
    eager = functools.partial(torch.compile, backend="eager")  # inductor takes a minute
    monkeypatch.setattr(torch, "compile", eager)
    settings = [
        *VIT,
        "optimizer.wrapper={kind: SAM, rho: 0.05}",
        "criterion={kind: NFGSM, eps: 0.1}",
    ]
    _, plain, _ = trained(read(*settings), tmp_path / "plain")
    recipe, place = read(*settings, f"model.{setting}=true", "ema=0.5"), tmp_path / "other"
    _, other, _ = trained(recipe, place)
    for name, values in plain.items():
        torch.testing.assert_close(other[name], values, rtol=1e-3, atol=1e-4)
    assert load_checkpoint(
        tmp_path / "other", build_model(recipe.model, recipe.data.load(), seed=0)
    )
