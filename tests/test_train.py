import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from flatreg import AttackedAccuracy, Estimate, load_recipe
from flatreg.attacks import fgsm
from flatreg.data.files import PARTIAL, sweep_partials, write_digests, write_whole
from flatreg.evaluation.evaluate import evaluate
from flatreg.evaluation.findings import Finding
from flatreg.measures.manifold import PCAManifold
from flatreg.optimizers.passes import backward
from flatreg.run import checkpoints, interrupt
from flatreg.run import epoch as epochs
from flatreg.run import train as training
from flatreg.run.build import build_model, build_training, fit_manifolds
from flatreg.run.checkpoints import (
    TRAINING,
    Continued,
    Epoch,
    flagged,
    load_checkpoint,
    resume,
    save_checkpoint,
)
from flatreg.run.cli import main
from flatreg.run.interrupt import HeldSignals, Interrupted
from flatreg.run.train import make_accelerator, train

RECIPE = """
data: {kind: digits, test: 0.8, validation: 0.1}
augment: {crop: 1, flip: true}
model: {name: test_convnext3, args: {kernel_sizes: 3, drop_path_rate: 0.2}, mean: [0.5], std: [0.5]}
criterion: {kind: NFGSM, eps: 0.1}
penalties:
  - {kind: RelativeFlatness, strength: 0.01}
optimizer: {lr: 3.0e-3, warmup_epochs: 0.5, clip_norm: 1.0, wrapper: {kind: SAM, rho: 0.05}}
epochs: 4
batch_size: 64
monitor: {every: 2, samples: 20}
evaluation: {eps: 0.1, samples: 40, attack: fast}
"""


@pytest.fixture
def recipe_file(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(RECIPE)
    return path


def train_arm(recipe, arm, splits, folder):
    """Fit the manifolds of an arm, build what its training needs, and train it."""
    arm = fit_manifolds(arm, splits.train.images, {}, folder)
    training = build_training(recipe, "flatreg", arm, splits)
    return train(training, folder, make_accelerator())


def command(*arguments):
    return [sys.executable, "-m", "flatreg", "run", *map(str, arguments)]


def untimed(history):
    return [{k: v for k, v in epoch.items() if "seconds" not in k} for epoch in json.loads(history)]


def test_a_run_that_is_stopped_again_and_again_ends_as_if_it_was_not(recipe_file, tmp_path):
    """Killed, terminated and interrupted, each within an epoch.

    Adversarial noise, drop path, augmentation and mixing are on, micro-batches, an average and a
    wrapper with a memory. Every other way to train is stopped in `test_resumed_training.py`.
    """
    overrides = ["accumulation=2", "ema=0.9", "augment.mixup=0.4", "checkpoint_minutes=0.0001"]
    overrides.append("optimizer.wrapper={kind: LookSAM, rho: 0.05, every: 3}")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    settings = [str(recipe_file), *overrides]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main(["run", *settings, f"output={whole}"]) == 0
    checkpoints = cut / "checkpoints" / "flatreg"
    for epoch, number in ((1, signal.SIGKILL), (2, signal.SIGTERM), (4, signal.SIGINT)):
        run = subprocess.Popen(
            command(*settings, f"output={cut}"),
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        while not list(checkpoints.glob(f"within-{epoch:04d}-*")):
            assert run.poll() is None, (
                f"the run ended before it could be stopped: {run.stderr.read()}"
            )
            time.sleep(0.002)
        run.send_signal(number)
        error = run.communicate(timeout=300)[1]
        if number == signal.SIGKILL:
            continue
        assert run.returncode == 128 + number
        where = rf"after \d+ batches of epoch {epoch}, which are saved; the same command"
        assert re.search(f"flatreg: interrupted by {number.name} {where}", error)
    assert not (cut / "report.json").exists()
    assert main(["run", *settings, f"output={cut}"]) == 0
    final = [folder / "checkpoints/flatreg/epoch-0004" for folder in (whole, cut)]
    assert [p.name for p in checkpoints.iterdir() if "-0" in p.name] == ["epoch-0004"]
    names = {p.name for p in final[0].glob("*.safetensors")}
    for name in names:
        one, two = (load_file(folder / name) for folder in final)
        assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    one, two = (untimed((folder / "history.json").read_text()) for folder in final)
    assert one == two and len(one) == 4
    for key in ("monitored", "fgsm", "findings"):
        assert [bool(epoch[key]) for epoch in one] == [False, True, False, True]
    assert (whole / "figures/monitored.png").exists()
    assert "in each monitored epoch" in (whole / "report.html").read_text()
    one, two = (json.loads((f / "report.json").read_text())["rows"][0] for f in (whole, cut))
    assert one["evaluation"]["verdicts"] == two["evaluation"]["verdicts"]


def test_the_last_checkpoint_survives_a_full_disk(recipe_file, tmp_path, monkeypatch):
    recipe = load_recipe(recipe_file, ["monitor=null", "optimizer.wrapper=null"])
    splits, arm = recipe.data.load(), recipe.arms()["flatreg"]
    real = checkpoints.save_model

    def full(model, path):
        if "epoch-0003" in path:
            with open(path, "wb") as file:
                file.write(b"half a file")
            raise OSError(28, "No space left on device")
        real(model, path)

    monkeypatch.setattr(checkpoints, "save_model", full)
    with pytest.raises(OSError, match="No space"):
        train_arm(recipe, arm, splits, tmp_path)
    assert [p.name for p in tmp_path.glob("epoch-*")] == ["epoch-0002"]
    monkeypatch.setattr(checkpoints, "save_model", real)
    history = train_arm(recipe, arm, splits, tmp_path)
    assert [p.name for p in tmp_path.iterdir() if "epoch" in p.name] == ["epoch-0004"]
    assert [epoch.epoch for epoch in history] == [0, 1, 2, 3]


def test_a_loss_that_is_no_number_stops_before_the_checkpoint(recipe_file, tmp_path):
    recipe = load_recipe(recipe_file, ["monitor=null", "epochs=2"])
    splits, arm = recipe.data.load(), recipe.arms()["flatreg"]
    train_arm(recipe.model_copy(update={"epochs": 1}), arm, splits, tmp_path)
    good = (tmp_path / "epoch-0001/model.safetensors").read_bytes()
    broken = recipe.model_copy(
        update={"optimizer": recipe.optimizer.model_copy(update={"lr": 1e30, "clip_norm": None})}
    )
    with pytest.raises(FloatingPointError, match=r"^flatreg: .* (is (nan|inf) at step|not finite)"):
        train_arm(broken, arm, splits, tmp_path)
    assert (tmp_path / "epoch-0001/model.safetensors").read_bytes() == good
    assert [p.name for p in tmp_path.glob("epoch-*")] == ["epoch-0001"]


SHORT = ["monitor=null", "epochs=1", "augment={}", "batch_size=32", "optimizer.warmup_epochs=0"]


def spoilt(recipe, *, steps, passes=(0, 1), value=float("nan")):
    """A training whose gradient is `value` in these backward passes of these steps."""
    splits, arm = recipe.data.load(), recipe.arms()["flatreg"]
    built = build_training(recipe, "flatreg", arm, splits)
    count = 2 if recipe.optimizer.wrapper else 1
    spoil, seen = {(s, p) for s in steps for p in passes}, iter(range(10**6))

    def hook(gradient):
        n = next(seen)
        return gradient * value if (n // count, n % count) in spoil else gradient

    weight = dict(built.model.named_parameters())["model.head.fc.weight"]
    weight.register_hook(hook)
    return built


@pytest.mark.parametrize("passes", [(0,), (1,)])
def test_a_gradient_that_is_no_number_is_named_with_its_step(recipe_file, tmp_path, passes):
    """Also that of a second pass alone: the loss stays finite, and the weights do not."""
    recipe = load_recipe(recipe_file, [*SHORT, "optimizer.clip_norm=null"])
    if passes == (0,):
        recipe = load_recipe(
            recipe_file, [*SHORT, "optimizer.clip_norm=null", "optimizer.wrapper=null"]
        )
    built = spoilt(recipe, steps=[2], passes=passes)
    with pytest.raises(FloatingPointError, match=r"^flatreg: the gradient is nan at step 2; "):
        train(built, tmp_path, make_accelerator())
    assert not list(tmp_path.glob("epoch-*"))


def test_a_part_that_is_no_number_is_named_first(recipe_file, tmp_path, monkeypatch):
    from flatreg.terms.flatness import RelativeFlatness

    real, seen = RelativeFlatness.__call__, iter(range(1000))
    infinite = lambda *a: real(*a) * (float("inf") if next(seen) >= 9 else 1)  # noqa: E731
    recipe = load_recipe(recipe_file, [*SHORT, "optimizer.wrapper=null"])
    splits, arm = recipe.data.load(), recipe.arms()["flatreg"]
    built = build_training(recipe, "flatreg", arm, splits)
    monkeypatch.setattr(RelativeFlatness, "__call__", infinite)
    with pytest.raises(FloatingPointError, match=r": RelativeFlatness is inf at step 9 ?;"):
        train(built, tmp_path, make_accelerator())


def test_weights_that_are_no_numbers_are_not_kept(recipe_file, tmp_path):
    recipe = load_recipe(recipe_file, [*SHORT, "optimizer.wrapper=null"])
    built = spoilt(recipe, steps=[])
    steps = len(built.loader)
    real = built.optimizer.step

    def step(*arguments):
        real(*arguments)
        built.optimizer.calls = getattr(built.optimizer, "calls", 0) + 1
        if built.optimizer.calls == steps:  # nothing is evaluated after the last step
            built.model.get_submodule("model.head.fc").weight.data[0, 0] = float("inf")

    built.optimizer.step = step
    line = r"^flatreg: model.head.fc.weight is not finite after epoch 1; the checkpoint"
    with pytest.raises(FloatingPointError, match=line):
        train(built, tmp_path, make_accelerator())
    assert not list(tmp_path.glob("epoch-*"))


def test_an_infinite_buffer_is_no_reason_to_stop(recipe_file, tmp_path):
    """It masks attention."""
    recipe = load_recipe(recipe_file, [*SHORT, "optimizer.wrapper=null"])
    built = spoilt(recipe, steps=[])
    built.model.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
    assert len(train(built, tmp_path, make_accelerator())) == 1


def test_steps_without_a_finite_gradient_are_skipped_up_to_a_number_in_a_row(recipe_file, tmp_path):
    recipe = load_recipe(recipe_file, [*SHORT, "skip_nonfinite=2"])
    history = train(spoilt(recipe, steps=[1, 2, 5]), tmp_path / "a", make_accelerator())
    assert history[0].skipped == 3 and history[0].loss == pytest.approx(
        sum(history[0].parts.values()), rel=1e-4
    )
    with pytest.raises(FloatingPointError, match=r"gradients of 3 steps in a row.*last at step 3;"):
        train(spoilt(recipe, steps=[1, 2, 3]), tmp_path / "b", make_accelerator())


def test_steps_that_are_skipped_in_a_row_are_counted_over_epochs(recipe_file, tmp_path, capsys):
    """And are said; an epoch in which all of them are skipped is none."""
    recipe = load_recipe(recipe_file, [*SHORT, "skip_nonfinite=3", "epochs=2"])
    count = len(
        build_training(recipe, "flatreg", recipe.arms()["flatreg"], recipe.data.load()).loader
    )
    around = range(count - 2, count + 2)
    with pytest.raises(FloatingPointError, match=rf"of 4 steps in a row.*at step {count + 1};"):
        train(spoilt(recipe, steps=around), tmp_path / "a", make_accelerator())
    (line,) = checkpoints.read_history(tmp_path / "a")
    assert (line.skipped, line.skipped_last) == (2, 2)
    assert [f.name for f in flagged([line])] == ["skipped steps"]
    assert f"skipped steps: {2 / count:.1%} of {count}: gradients were not finite" in (
        capsys.readouterr().err
    )
    recipe = load_recipe(recipe_file, [*SHORT, "skip_nonfinite=99"])
    with pytest.raises(FloatingPointError, match=r"no step of epoch 1 has a finite gradient;"):
        train(spoilt(recipe, steps=range(count)), tmp_path / "b", make_accelerator())


def test_micro_batches_add_up_to_the_step(recipe_file, tmp_path):
    found = {}
    for parts in (1, 2, 4):
        settings = [
            *SHORT, f"accumulation={parts}", "ema=0.9", "criterion={kind: CrossEntropy}",
            "penalties.0={kind: RelativeFlatness, schedule: {kind: WarmUp, fraction: 1}}",
            "model.args.drop_path_rate=0", "optimizer.name=sgd",
            "optimizer.wrapper={kind: SAM, rho: 0.0, begin_epoch: 0.5}",
        ]  # fmt: skip
        recipe = load_recipe(recipe_file, settings)
        splits, arm = recipe.data.load(), recipe.arms()["flatreg"]
        built = build_training(recipe, "flatreg", arm, splits)
        updates = len(built.loader) // parts
        assert built.optimizer.begin == round(updates / 2)
        place = tmp_path / str(parts)
        history = train(built, place, make_accelerator(accumulation=parts))
        found[parts] = load_file(place / "epoch-0001/model.safetensors"), history[0].loss
    for parts in (2, 4):
        assert found[parts][1] == pytest.approx(found[1][1], rel=1e-4)
        for name, tensor in found[1][0].items():
            torch.testing.assert_close(found[parts][0][name], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "criterion", ["{kind: NFGSM, eps: 0.1}", "{kind: PGDAT, eps: 0.1, steps: 2}"]
)
def test_before_its_tail_a_wrapper_trains_as_no_wrapper(recipe_file, tmp_path, criterion):
    """Cosine over two epochs: at most half of the rate in the second."""
    found = {}
    for wrapper in ("null", "{kind: SAM, tail: 0.5}", "{kind: LookSAM, tail: 0.5}"):
        chosen = [f"criterion={criterion}", f"optimizer.wrapper={wrapper}", "monitor=null"]
        recipe = load_recipe(recipe_file, [*chosen, *SHORT[2:], "epochs=2", "data.limit=96"])
        splits = recipe.data.load()
        built = build_training(recipe, "flatreg", recipe.arms()["flatreg"], splits)
        history = train(built, tmp_path / str(len(found)), make_accelerator())
        found[wrapper] = [epoch.loss for epoch in history]  # at the weights, of each step
    plain, *tails = found.values()
    for tail in tails:
        assert tail[0] == plain[0] and tail[1] != plain[1]


@pytest.mark.parametrize(
    ("settings", "ends"),
    [
        (["optimizer.min_lr=1.5e-3"], "0.5"),
        (
            ["optimizer.schedule=step", "optimizer.decay_epochs=3", "optimizer.decay_rate=0.5"],
            "0.5 of",
        ),
        (["optimizer.warmup_epochs=4"], "1 of"),
    ],
    ids=str,
)
def test_a_tail_that_never_comes_is_refused(recipe_file, settings, ends):
    chosen = ["optimizer.wrapper={kind: SAM, tail: 0.3}", *settings]
    recipe = load_recipe(recipe_file, chosen)
    splits = recipe.data.load()
    with pytest.raises(ValueError, match=rf"falls to tail=0\.3 of its highest, it ends at {ends}"):
        build_training(recipe, "flatreg", recipe.arms()["flatreg"], splits)
    recipe = load_recipe(recipe_file, [chosen[0]])
    built = build_training(recipe, "flatreg", recipe.arms()["flatreg"], splits)
    assert built.optimizer.tail == 0.3 and built.optimizer.param_groups[0]["lr"] == 0


def test_another_accumulation_of_accelerate_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    with pytest.raises(ValueError, match="write accumulation: 2 in the recipe"):
        make_accelerator()
    assert make_accelerator(accumulation=2).gradient_accumulation_steps == 2


def test_another_precision_of_accelerate_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(ValueError, match="write mixed_precision: bf16 in the recipe"):
        make_accelerator(mixed_precision="no")


def test_a_training_in_bfloat16_is_near_that_in_float32(recipe_file, tmp_path):
    settings = [*SHORT, "ema=0.9", "optimizer.wrapper={kind: SAM}"]
    recipe = load_recipe(recipe_file, settings)
    splits, arm = recipe.data.load(), recipe.arms()["flatreg"]
    full = train_arm(recipe, arm, splits, tmp_path / "full")
    AcceleratorState._reset_state(True)
    try:
        accelerator = make_accelerator(mixed_precision="bf16")
        training_ = build_training(recipe, "flatreg", arm, splits)
        half = train(training_, tmp_path / "half", accelerator)
    finally:
        AcceleratorState._reset_state(True)
    assert half[0].loss != full[0].loss and half[0].loss == pytest.approx(full[0].loss, rel=0.05)
    weights = load_file(tmp_path / "half/epoch-0001/model.safetensors")
    assert all(v.dtype == torch.float32 for v in weights.values() if v.is_floating_point())


def test_parts_add_up_and_the_loss_falls(recipe_file, tmp_path):
    recipe = load_recipe(recipe_file, ["monitor=null", "optimizer.wrapper=null"])
    splits, arm = recipe.data.load(), recipe.arms()["flatreg"]
    history = train_arm(recipe, arm, splits, tmp_path)
    for epoch in history:
        assert sum(epoch.parts.values()) == pytest.approx(epoch.loss, rel=1e-4)
    assert history[-1].loss < history[0].loss and history[-1].lr < history[1].lr
    model = build_model(recipe.model, splits, seed=recipe.seed)
    fresh = {k: v.clone() for k, v in model.state_dict().items()}
    assert load_checkpoint(tmp_path, model) == history
    assert any(not torch.equal(v, fresh[k]) for k, v in model.state_dict().items())
    assert load_checkpoint(tmp_path / "nothing", model) == []


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.name=resnet_of_dreams", "model resnet_of_dreams: Unknown model"),
        ("model.name=resnet1818", r"Unknown model \(resnet1818\); did you mean resnet18\?$"),
        ("model.args={no_such: 1}", "model test_convnext3: .*no_such"),
        ("optimizer.name=adamwonder", "optimizer adamwonder:"),
        ("batch_size=5000", "batch_size: expected at most the 323 training images, got 5000"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_one_line(recipe_file, tmp_path, override, message):
    recipe = load_recipe(recipe_file, [override])
    with pytest.raises(ValueError, match=message) as error:
        build_training(recipe, "x", recipe.arms()["flatreg"], recipe.data.load())
    assert "\n" not in str(error.value)


def test_the_monitor_keeps_the_single_step_beside_the_attack(recipe_file, tmp_path):
    """FGSM accuracy is that of the same images, and the finding is of all epochs so far."""
    changes = ["monitor={every: 1, samples: 30}", "epochs=2", "optimizer.wrapper=null"]
    recipe = load_recipe(recipe_file, changes)
    splits, arm = recipe.data.load(), recipe.arms()["flatreg"]
    history = train_arm(recipe, arm, splits, tmp_path)
    model = build_model(recipe.model, splits, seed=recipe.seed)
    load_checkpoint(tmp_path, model)
    by_hand = evaluate(
        model,
        splits.validation,
        eps=0.1,
        samples=30,
        attack=fgsm,
        diagnose=False,
        progress=False,
    )
    assert history[-1].fgsm == by_hand.attacked and history[-1].fgsm.n == 30
    for epoch in history:
        (finding,) = epoch.findings
        assert finding.name == "catastrophic overfitting" and finding.n == 30
        assert finding.value == pytest.approx(epoch.fgsm.value - epoch.monitored.value)


def test_a_collapse_is_said_once(recipe_file, tmp_path, monkeypatch, capsys):
    """Also by a run that goes on after it."""
    seen = []

    def judge(fgsm, attacked, n):
        seen.append(len(fgsm))
        verdict = "flagged" if len(fgsm) > 1 else "ok"
        return Finding("catastrophic overfitting", 0.5, 0.3, verdict, n, "it is not robust", "")

    monkeypatch.setattr(training, "catastrophic_overfitting", judge)
    recipe = load_recipe(recipe_file, ["monitor={every: 1, samples: 4}", "optimizer.wrapper=null"])
    splits, arm = recipe.data.load(), recipe.arms()["flatreg"]
    short = recipe.model_copy(update={"epochs": 2})
    train_arm(short, arm, splits, tmp_path)
    first = capsys.readouterr().err
    longer = recipe.model_copy(update={"epochs": 3})
    history = train_arm(longer, arm, splits, tmp_path)
    assert seen == [1, 2, 3]
    assert first.count("flatreg: flatreg, epoch 2: catastrophic overfitting: FGSM ") == 1
    assert training._progress(history[-1]).endswith(", catastrophic overfitting")  # in the bar
    assert "flatreg: flatreg, epoch" not in capsys.readouterr().err
    assert [f.value for f in flagged(history)] == [0.5]


def test_the_log_says_what_the_monitor_saw_and_what_share_of_the_time_it_took():
    watched = Epoch(
        0,
        0.1,
        3.0,
        0.5,
        {"CrossEntropy": 0.5},
        monitored=Estimate.share(5, 10),
        monitor_seconds=1.0,
    )
    assert training._progress(watched) == "loss 0.500, attacked 50.0% (25% of the time)"
    quiet = Epoch(1, 0.1, 3.0, 0.25, {"CrossEntropy": 0.25})
    assert training._progress(quiet) == "loss 0.250"


def test_the_hook_knows_its_share_of_the_time(monkeypatch):
    clock = iter([100.0, 108.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    hook = AttackedAccuracy([(torch.zeros(1), 0)], eps=0.1)
    hook.seconds = 2.0
    assert hook.share_of_time == 0.25


def test_flagged_keeps_the_worst_of_each_kind():
    def line(epoch, value, verdict):
        finding = Finding("catastrophic overfitting", value, 0.2, verdict, 9, "", "")
        return Epoch(epoch, 0.1, 1.0, 1.0, {}, findings=[finding])

    history = [line(0, 0.1, "ok"), line(1, 0.3, "flagged"), line(2, 0.8, "flagged")]
    history += [line(3, 0.9, "ok"), Epoch(4, 0.1, 1.0, 1.0, {})]
    assert [f.value for f in flagged(history)] == [0.8]
    assert flagged(history[:1]) == []


def test_terms_are_told_the_share_of_training_done(recipe_file, tmp_path, monkeypatch):
    """In every step, and in the session that goes on after an interrupt."""
    recipe = load_recipe(recipe_file, ["monitor=null", "epochs=2", "optimizer.wrapper=null"])
    splits, arm = recipe.data.load(), recipe.arms()["flatreg"]
    real, seen = backward, []

    def spy(optimizer, bound, **kwargs):
        if len(seen) == 7:
            seen.append(None)
            raise KeyboardInterrupt
        seen.append(bound.objective.progress)
        return real(optimizer, bound, **kwargs)

    monkeypatch.setattr(epochs, "backward", spy)
    with pytest.raises(KeyboardInterrupt):
        train_arm(recipe, arm, splits, tmp_path)
    train_arm(recipe, arm, splits, tmp_path)
    steps = len(splits.train) // 64
    assert steps == 5
    expected = [i / 10 for i in range(7)] + [None] + [i / 10 for i in range(5, 10)]
    assert seen == expected


@dataclass(frozen=True, kw_only=True)
class OffManifold:
    """A penalty that has a manifold: length of what its normal part leaves of the images."""

    manifold: object
    requires: ClassVar = frozenset({"clean"})

    def __call__(self, passes):
        clean = passes["clean"]
        normal = self.manifold.split(clean.inputs, clean.inputs)[1]
        return 0.001 * normal.flatten(1).norm(dim=1)


def with_manifolds(recipe, *manifolds):
    penalties = [OffManifold(manifold=manifold) for manifold in manifolds]
    return recipe.arms()["flatreg"].model_copy(update={"penalties": penalties})


def test_manifolds_are_fitted_once_on_training_images(recipe_file, monkeypatch):
    recipe = load_recipe(recipe_file)
    splits, fits = recipe.data.load(), []
    real = PCAManifold.fit
    monkeypatch.setattr(
        PCAManifold, "fit", lambda self, images: fits.append(images) or real(self, images)
    )
    narrow, wide = PCAManifold(rank=4), PCAManifold(rank=6)
    known = {}
    one = fit_manifolds(with_manifolds(recipe, narrow, wide, narrow), splits.train.images, known)
    two = fit_manifolds(with_manifolds(recipe, wide), splits.train.images, known)
    assert len(fits) == 2 and all(images is splits.train.images for images in fits)
    bases = [penalty.manifold.fitted.basis for penalty in one.penalties]
    assert [len(basis) for basis in bases] == [4, 6, 4] and bases[0] is bases[2]
    assert two.penalties[0].manifold.fitted.basis is bases[1]
    again = fit_manifolds(one, splits.train.images, {})
    assert len(fits) == 2 and again.penalties[0].manifold.fitted is one.penalties[0].manifold.fitted


def test_a_resumed_training_reads_its_manifold(recipe_file, tmp_path, monkeypatch):
    manifold = PCAManifold(rank=4)
    recipe = load_recipe(recipe_file, ["monitor=null", "epochs=1", "optimizer.wrapper=null"])
    splits, arm = recipe.data.load(), with_manifolds(recipe, manifold)
    once = train_arm(recipe, arm, splits, tmp_path / "cut")
    assert once[0].parts["OffManifold"] > 0
    assert (tmp_path / "cut/manifold-0.safetensors").exists()
    longer = recipe.model_copy(update={"epochs": 2})
    whole = train_arm(longer, arm, splits, tmp_path / "whole")
    monkeypatch.setattr(type(manifold), "fit", lambda *_: pytest.fail("fitted again"))
    cut = train_arm(longer, arm, splits, tmp_path / "cut")
    # the learning rate of the first epoch differs: what it sees of the manifold does not
    assert len(cut) == len(whole) == 2
    state = load_file(tmp_path / "cut/manifold-0.safetensors")
    other = load_file(tmp_path / "whole/manifold-0.safetensors")
    assert all(torch.equal(state[name], other[name]) for name in state)
    assert cut[1].parts["OffManifold"] == pytest.approx(whole[1].parts["OffManifold"], rel=0.05)


def interrupting(function, number=signal.SIGTERM):
    """A function that sends a signal to this process before it does its work."""

    def called(*args, **kwargs):
        signal.raise_signal(number)
        return function(*args, **kwargs)

    return called


def test_a_signal_while_monitoring_ends_it_at_once_and_loses_no_step(
    recipe_file, tmp_path, monkeypatch
):
    recipe = load_recipe(recipe_file, ["epochs=2", "monitor.every=1"])
    splits, arm = recipe.data.load(), recipe.arms()["flatreg"]
    whole = train_arm(recipe, arm, splits, tmp_path / "whole")
    real = AttackedAccuracy.__call__
    monkeypatch.setattr(AttackedAccuracy, "__call__", interrupting(real))
    count = len(splits.train) // recipe.batch_size
    with pytest.raises(Interrupted, match=f"SIGTERM after {count} batches of epoch 1, which are"):
        train_arm(recipe, arm, splits, tmp_path / "cut")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    monkeypatch.setattr(AttackedAccuracy, "__call__", real)
    steps = []
    monkeypatch.setattr(epochs, "backward", lambda *a, **k: steps.append(1) or backward(*a, **k))
    history = train_arm(recipe, arm, splits, tmp_path / "cut")
    assert len(steps) == count  # of the second epoch alone
    for one, two in zip(whole, history, strict=True):
        assert (one.loss, one.monitored, one.fgsm) == (two.loss, two.monitored, two.fgsm)
    one, two = (load_file(tmp_path / f / "epoch-0002/model.safetensors") for f in ("whole", "cut"))
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_a_signal_that_comes_again_while_a_position_is_written_lets_it_be_written(
    recipe_file, tmp_path, monkeypatch
):
    """As it does by itself 8 s after the first one."""
    monkeypatch.setattr(interrupt, "_AGAIN", 0.0)
    recipe = load_recipe(recipe_file, [*SHORT, "monitor={every: 1, samples: 8}"])
    splits, arm = recipe.data.load(), recipe.arms()["flatreg"]
    monkeypatch.setattr(AttackedAccuracy, "__call__", interrupting(AttackedAccuracy.__call__))
    monkeypatch.setattr(training, "save_position", interrupting(training.save_position))
    with pytest.raises(Interrupted, match="of epoch 1, which are saved"):
        train_arm(recipe, arm, splits, tmp_path)
    assert len(list(tmp_path.glob("within-0001-*"))) == 1


def test_a_signal_that_comes_too_late_to_save_still_ends_the_training(
    recipe_file, tmp_path, monkeypatch
):
    """After the last batch there is nothing to save but the epoch."""
    recipe = load_recipe(recipe_file, SHORT)
    splits, arm = recipe.data.load(), recipe.arms()["flatreg"]
    monkeypatch.setattr(training, "save_checkpoint", interrupting(training.save_checkpoint))
    with pytest.raises(Interrupted, match=r"^interrupted by SIGTERM$"):
        train_arm(recipe, arm, splits, tmp_path)
    assert [p.name for p in tmp_path.glob("epoch-*")] == ["epoch-0001"]


def test_a_step_that_does_not_end_is_given_up(monkeypatch):
    monkeypatch.setattr(interrupt, "_GRACE", 0.2)
    monkeypatch.setattr(interrupt, "_AGAIN", 0.1)
    with pytest.raises(Interrupted), HeldSignals():
        signal.raise_signal(signal.SIGINT)
        for _ in range(100):
            time.sleep(0.1)
        pytest.fail("it went on")


def test_the_same_key_press_twice_is_one_and_a_later_one_ends_at_once(monkeypatch):
    with pytest.raises(Interrupted), HeldSignals() as held:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert held.number == signal.SIGINT
        monkeypatch.setattr(interrupt, "_AGAIN", 0.0)
        with held.writing():
            signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("it went on")


def test_the_scale_of_float16_is_kept(tmp_path):
    def continued(scale):
        model = torch.nn.Linear(2, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return Continued(model, optimizer, scaler=torch.amp.GradScaler("cpu", init_scale=scale))

    first, second = continued(8.0), continued(65536.0)
    first.scaler.scale(torch.ones(1))  # it takes its scale when it is first used
    save_checkpoint(tmp_path, first, [Epoch(0, 0.1, 1.0, 1.0, {})])
    resume(tmp_path, second)
    assert second.scaler.state_dict()["scale"] == 8.0


def test_every_arm_begins_with_the_same_scale_of_float16(recipe_file, tmp_path):
    recipe = load_recipe(recipe_file, [*SHORT, "optimizer.wrapper=null"])
    splits, arm, accelerator = recipe.data.load(), recipe.arms()["flatreg"], make_accelerator()
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1)
    for name in ("one", "two"):
        train(build_training(recipe, "flatreg", arm, splits), tmp_path / name, accelerator)
        kept = torch.load(tmp_path / name / "epoch-0001/scaler.pt", weights_only=True)
        assert kept["scale"] == 8.0 * 2 ** (len(splits.train) // recipe.batch_size)


DAMAGE = {
    "empty": lambda data: b"",
    "cut short": lambda data: data[: len(data) // 2],
    "another file": lambda data: b"not what it should be",
    "one byte": lambda data: bytes([data[0] ^ 255]) + data[1:],
}


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory):
    """A recipe, its data and arm, and the folder of one epoch."""
    folder = tmp_path_factory.mktemp("damaged")
    (folder / "small.yaml").write_text(RECIPE)
    recipe = load_recipe(folder / "small.yaml", SHORT)
    splits, arm = recipe.data.load(), recipe.arms()["flatreg"]
    train_arm(recipe, arm, splits, folder / "arm")
    return recipe, splits, arm, folder / "arm"


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "history.json"])
def test_a_damaged_checkpoint_says_which_file_and_what_to_do(trained_once, tmp_path, name, damage):
    recipe, splits, arm, folder = trained_once
    copied = tmp_path / "arm"
    shutil.copytree(folder, copied)
    file = copied / "epoch-0001" / name
    file.write_bytes(DAMAGE[damage](file.read_bytes()))
    with pytest.raises(ValueError, match=r"damaged, or of another training .*: delete ") as error:
        train_arm(recipe, arm, splits, copied)
    assert str(error.value).startswith(str(file)) and "\n" not in str(error.value)
    shutil.rmtree(file.parent)
    assert len(train_arm(recipe, arm, splits, copied)) == 1


def test_damaged_weights_that_are_kept_are_refused(tmp_path):
    """Those of an earlier, better epoch: no training reads them, and the next epoch copies them."""
    model = torch.nn.Linear(2, 2)
    kept = Continued(model, torch.optim.SGD(model.parameters(), lr=0.1))
    history = [Epoch(0, 0.1, 1.0, 1.0, {})]
    save_checkpoint(tmp_path, kept, history)
    save_checkpoint(tmp_path, kept, 2 * history, keep=True)
    file = tmp_path / "epoch-0002/model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    for go_on in (
        lambda: resume(tmp_path, kept),
        lambda: save_checkpoint(tmp_path, kept, 3 * history, keep=True),
    ):
        with pytest.raises(ValueError, match=r"other bytes .* to train this arm again"):
            go_on()


def test_a_training_goes_on_with_its_own_images_alone(trained_once, tmp_path):
    recipe, splits, arm, folder = trained_once
    shutil.copytree(folder, copied := tmp_path / "arm")
    fewer = splits._replace(train=splits.train.at(torch.arange(len(splits.train) - 1)))
    with pytest.raises(ValueError, match="expected the training images that its checkpoints were"):
        train_arm(recipe, arm, fewer, copied)
    assert len(train_arm(recipe, arm, splits, copied)) == 1


@pytest.fixture(scope="module")
def stopped_within(trained_once, tmp_path_factory):
    """Folder of a training that was stopped within its second epoch."""
    recipe, splits, arm, folder = trained_once
    copied = tmp_path_factory.mktemp("stopped") / "arm"
    shutil.copytree(folder, copied)
    longer = recipe.model_copy(update={"epochs": 2, "checkpoint_minutes": 1e-9, "ema": 0.9})
    shutil.copyfile(folder / "epoch-0001/model.safetensors", copied / "epoch-0001" / TRAINING)
    write_digests(copied / "epoch-0001")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(training, "save_position", interrupting(training.save_position))
        train_arm(longer, arm, splits, copied)
    return longer, copied


WITHIN = ["training.safetensors", "average.safetensors", "optimizer.pt", "position.pt"]


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", WITHIN)
def test_a_damaged_checkpoint_within_an_epoch_leaves_the_one_before(
    trained_once, stopped_within, tmp_path, name, damage
):
    _, splits, arm, _ = trained_once
    recipe, folder = stopped_within
    shutil.copytree(folder, copied := tmp_path / "arm")
    (within,) = copied.glob("within-0002-*")
    assert sorted(p.name for p in within.iterdir()) == sorted([*WITHIN, "digests.json"])
    file = within / name
    file.write_bytes(DAMAGE[damage](file.read_bytes()))
    with pytest.raises(ValueError, match=r"to go on from the epoch before$") as error:
        train_arm(recipe, arm, splits, copied)
    assert str(error.value).startswith(str(file)) and "\n" not in str(error.value)
    if damage == "one byte":
        shutil.rmtree(within)
        assert len(train_arm(recipe, arm, splits, copied)) == 2


def test_a_full_disk_is_called_that(trained_once, tmp_path, monkeypatch):
    recipe, splits, arm, folder = trained_once
    copied = tmp_path / "arm"
    shutil.copytree(folder, copied)
    usage = type(shutil.disk_usage(tmp_path))

    def fail(*_):
        raise RuntimeError("PytorchStreamWriter failed writing file")

    monkeypatch.setattr(checkpoints.torch, "save", fail)
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda _: usage(10, 10, 0))
    longer = recipe.model_copy(update={"epochs": 2})
    with pytest.raises(OSError, match="the disk is full: 0 MiB are free, the weights alone take"):
        train_arm(longer, arm, splits, copied)
    assert [p.name for p in copied.glob("epoch-*")] == ["epoch-0001"]


def test_what_a_killed_run_left_half_written_is_swept(tmp_path):
    kept = [tmp_path / "a/epoch-0001/model.safetensors", tmp_path / "report.json"]
    left = [tmp_path / f"a/.epoch-0002{PARTIAL}/x", tmp_path / f"b/.report.json.0123{PARTIAL}"]
    for path in (*kept, *left):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    sweep_partials(tmp_path)
    assert all(path.exists() for path in kept) and not any(path.exists() for path in left)
    assert not left[0].parent.exists()


def test_what_a_killed_process_left_of_a_file_is_removed_when_the_file_is_written_again(tmp_path):
    names = (".t[1].md.0", ".t[1].md.1", ".u.md.0")
    old, young, other = (tmp_path / f"{name}{PARTIAL}" for name in names)
    for path in (old, young, other):
        path.touch()
        os.utime(path, (time.time() - (0 if path is young else 3700),) * 2)
    write_whole(tmp_path / "t[1].md", "table")
    assert sorted(tmp_path.iterdir()) == sorted([young, other, tmp_path / "t[1].md"])


class Together:
    """Stands in for an Accelerator of two processes, of which the other one sees a signal."""

    num_processes, device = 2, torch.device("cpu")

    def __init__(self):
        self.asked, self.signal = [], 0

    def gather(self, mine):
        self.asked.append(mine)
        return torch.cat([mine, torch.tensor([[self.signal, 0.0, 0.0]])])


def test_processes_ask_each_other_about_once_a_second_also_after_a_resume(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(epochs.time, "monotonic", lambda: clock[0])
    saved, both = [], Together()
    pauses = epochs.Pauses(both, HeldSignals(), 10.0, saved.append)
    for update in range(5000, 5100):  # a session that goes on, with steps of 0.1 s
        clock[0] += 0.1
        assert not pauses.due(update, at_once=False)
    assert 9 <= len(both.asked) <= 13
    both.signal = int(signal.SIGTERM)
    found = [pauses.due(update, at_once=False) for update in range(5100, 5112)]
    assert any(found)
    position = checkpoints.Position(3, 7, 0.0, 0, 0, [], [])
    with pytest.raises(Interrupted, match="SIGTERM after 7 batches of epoch 4, which are saved"):
        pauses.take(position)
    assert saved == [position]
