import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from flatreg import load_recipe
from flatreg import train as training
from flatreg.train import build_model, load_checkpoint, make_accelerator, train

RECIPE = """
data: {kind: digits, hold_back: 0.1}
augment: {crop: 1, flip: true}
model: {name: test_convnext3, args: {kernel_sizes: 3, drop_path_rate: 0.2}, mean: [0.5], std: [0.5]}
criterion: {kind: NFGSM, eps: 0.1}
penalties:
  - {kind: RelativeFlatness, strength: 0.01}
optimizer: {lr: 3.0e-3, warmup_epochs: 0.5, clip_norm: 1.0, wrapper: {kind: SAM, rho: 0.05}}
epochs: 4
batch_size: 256
monitor: {every: 2, samples: 20}
evaluation: {eps: 0.1, samples: 40, attack: fast, curve: [0.05]}
"""


@pytest.fixture
def recipe_file(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(RECIPE)
    return path


def command(*arguments):
    return [sys.executable, "-m", "flatreg", "run", *map(str, arguments)]


def untimed(history):
    return [{k: v for k, v in epoch.items() if k != "seconds"} for epoch in json.loads(history)]


def test_a_killed_run_resumes_to_the_same_weights_and_history(recipe_file, tmp_path):
    """SIGKILL after some epoch; adversarial noise, drop path, augmentation and SAM are on."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    subprocess.run(
        command(recipe_file, f"output={whole}"), check=True, env=environment, capture_output=True
    )
    run = subprocess.Popen(
        command(recipe_file, f"output={cut}"), env=environment,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    checkpoints = cut / "checkpoints" / "flatreg"
    while not list(checkpoints.glob("epoch-000[1-3]")):
        assert run.poll() is None, "the run ended before it could be killed"
        time.sleep(0.005)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert not (cut / "report.json").exists()
    subprocess.run(
        command(recipe_file, f"output={cut}"), check=True, env=environment, capture_output=True
    )
    final = [folder / "checkpoints/flatreg/epoch-0004" for folder in (whole, cut)]
    one, two = (load_file(folder / "model.safetensors") for folder in final)
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    one, two = (untimed((folder / "history.json").read_text()) for folder in final)
    assert one == two and len(one) == 4
    assert [epoch["monitored"] is not None for epoch in one] == [False, True, False, True]
    one, two = (json.loads((f / "report.json").read_text())["rows"][0] for f in (whole, cut))
    assert one["evaluation"]["verdicts"] == two["evaluation"]["verdicts"]


def test_the_last_checkpoint_survives_a_full_disk(recipe_file, tmp_path, monkeypatch):
    recipe = load_recipe(recipe_file, ["monitor=null", "optimizer.wrapper=null"])
    splits, arm = recipe.data.load(), recipe.arms()["flatreg"]
    real = training.save_model

    def full(model, path):
        if "epoch-0003" in path:
            with open(path, "wb") as file:
                file.write(b"half a file")
            raise OSError(28, "No space left on device")
        real(model, path)

    monkeypatch.setattr(training, "save_model", full)
    with pytest.raises(OSError, match="No space"):
        train(recipe, "flatreg", arm, splits, tmp_path, make_accelerator())
    assert [p.name for p in tmp_path.glob("epoch-*")] == ["epoch-0002"]
    monkeypatch.setattr(training, "save_model", real)
    history = train(recipe, "flatreg", arm, splits, tmp_path, make_accelerator())
    assert [p.name for p in tmp_path.iterdir() if "epoch" in p.name] == ["epoch-0004"]
    assert [epoch.epoch for epoch in history] == [0, 1, 2, 3]


def test_a_loss_that_is_no_number_stops_before_the_checkpoint(recipe_file, tmp_path):
    recipe = load_recipe(recipe_file, ["monitor=null", "epochs=2"])
    splits, arm = recipe.data.load(), recipe.arms()["flatreg"]
    train(
        recipe.model_copy(update={"epochs": 1}),
        "flatreg",
        arm,
        splits,
        tmp_path,
        make_accelerator(),
    )
    good = (tmp_path / "epoch-0001/model.safetensors").read_bytes()
    broken = recipe.model_copy(
        update={"optimizer": recipe.optimizer.model_copy(update={"lr": 1e30, "clip_norm": None})}
    )
    with pytest.raises(FloatingPointError, match="the loss of epoch 1 is"):
        train(broken, "flatreg", arm, splits, tmp_path, make_accelerator())
    assert (tmp_path / "epoch-0001/model.safetensors").read_bytes() == good
    assert [p.name for p in tmp_path.glob("epoch-*")] == ["epoch-0001"]


def test_parts_add_up_and_the_loss_falls(recipe_file, tmp_path):
    recipe = load_recipe(recipe_file, ["monitor=null", "optimizer.wrapper=null"])
    splits, arm = recipe.data.load(), recipe.arms()["flatreg"]
    history = train(recipe, "flatreg", arm, splits, tmp_path, make_accelerator())
    for epoch in history:
        assert sum(epoch.parts.values()) == pytest.approx(epoch.loss, rel=1e-4)
    assert history[-1].loss < history[0].loss and history[-1].lr < history[1].lr
    model = build_model(recipe, splits)
    fresh = {k: v.clone() for k, v in model.state_dict().items()}
    assert load_checkpoint(tmp_path, model) == history
    assert any(not torch.equal(v, fresh[k]) for k, v in model.state_dict().items())
    assert load_checkpoint(tmp_path / "nothing", model) == []


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.name=resnet_of_dreams", "model resnet_of_dreams: Unknown model"),
        ("model.args={no_such: 1}", "model test_convnext3: .*no_such"),
        ("optimizer.name=adamwonder", "optimizer adamwonder:"),
        ("batch_size=5000", "batch_size: expected at most the 1293 training images, got 5000"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_one_line(recipe_file, tmp_path, override, message):
    recipe = load_recipe(recipe_file, [override])
    with pytest.raises(ValueError, match=message) as error:
        train(
            recipe, "x", recipe.arms()["flatreg"], recipe.data.load(), tmp_path, make_accelerator()
        )
    assert "\n" not in str(error.value)
