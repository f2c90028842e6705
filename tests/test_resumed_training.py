"""A training that is stopped within an epoch and goes on ends as if it had not been stopped.

For every wrapper, criterion, penalty and base optimizer that a recipe can name, with an average of
the weights, a monitor, mixing, dropped paths and micro-batches; see also the killed runs of
`test_train.py`.
"""

import json
import signal
from typing import get_args

import pytest
import torch
from cases import PENALTIES
from PIL import Image
from pydantic import TypeAdapter

from flatreg import load_recipe
from flatreg.optimizers.methods import METHODS
from flatreg.run import epoch as epochs
from flatreg.run.build import build_training, fit_manifolds
from flatreg.run.interrupt import Interrupted
from flatreg.run.train import make_accelerator, train
from flatreg.terms import Criterion, Penalty

RECIPE = """
data: {kind: digits, limit: 128, test: 0.9, validation: 0.2}
augment: {crop: 1, flip: true}
model: {name: test_convnext3, args: {kernel_sizes: 3, drop_path_rate: 0.2}, mean: [0.5], std: [0.5]}
optimizer: {lr: 3.0e-3, clip_norm: 1.0}
epochs: 2
batch_size: 24
ema: 0.9
monitor: {every: 1, samples: 8}
evaluation: {eps: 0.1, samples: 8, attack: fast}
"""
STOP_AFTER = 6  # updates, of 4 an epoch


def kinds(union):
    """The classes of a union that recipes know."""
    return get_args(get_args(union)[0])


@pytest.fixture
def stopped(tmp_path, monkeypatch):
    """The files of a training, whole or stopped and gone on with, without the seconds."""
    (tmp_path / "small.yaml").write_text(RECIPE)

    def run(*overrides, stop=False):
        recipe = load_recipe(tmp_path / "small.yaml", overrides)
        accelerator = make_accelerator(accumulation=recipe.accumulation)
        folder = tmp_path / ("cut" if stop else "whole")
        real, passes = epochs.backward, []

        def backward(*arguments, **keywords):
            passes.append(1)
            if len(passes) == (STOP_AFTER - 1) * recipe.accumulation + 1:
                signal.raise_signal(signal.SIGTERM)
            return real(*arguments, **keywords)

        splits, arm = recipe.data.load(), recipe.arms()["flatreg"]
        if stop:
            with monkeypatch.context() as patch, pytest.raises(Interrupted, match="of epoch 2"):
                patch.setattr(epochs, "backward", backward)
                fitted = fit_manifolds(arm, splits.to_fit(), {}, folder)
                train(build_training(recipe, "flatreg", fitted, splits), folder, accelerator)
            assert list(folder.glob("within-0002-*"))
        fitted = fit_manifolds(arm, splits.to_fit(), {}, folder)
        history = train(build_training(recipe, "flatreg", fitted, splits), folder, accelerator)
        numbers = [(e.loss, e.parts, e.lr, e.monitored, e.fgsm) for e in history]
        files = {p.name: p.read_bytes() for p in (folder / "epoch-0002").glob("*.safetensors")}
        assert files
        state = torch.load(folder / "epoch-0002/optimizer.pt", weights_only=True)
        return numbers, files, repr(state)

    return run


def ends_the_same(stopped, *overrides):
    assert stopped(*overrides) == stopped(*overrides, stop=True)


@pytest.mark.parametrize("kind", [method.__name__ for method in METHODS])
def test_every_wrapper(stopped, kind):
    ends_the_same(stopped, f"optimizer.wrapper={{kind: {kind}}}", "augment.mixup=0.4")


@pytest.mark.parametrize(
    "overrides",
    [
        ["optimizer.wrapper={kind: SAM, every: 3, begin_epoch: 0.5}"],
        ["optimizer.wrapper={kind: LookSAM, every: 3, scope: head}", "accumulation=2"],
        ["optimizer.wrapper={kind: FriendlySAM, micro_batches: 2}", "optimizer.name=sgd"],
        [
            "optimizer.wrapper={kind: LookSAM, every: 2, tail: 0.5}",
            "criterion={kind: NFGSM, eps: 0.1}",
        ],
        ["optimizer.wrapper={kind: StaleSAM, tail: 0.5, begin_epoch: 0.5}", "accumulation=2"],
        ["optimizer.name=lookahead_adam", "optimizer.warmup_epochs=1"],
        ["skip_nonfinite=2", "accumulation=3", "ema=null"],
        ["monitor={every: 2, samples: 8, keep: best}"],
    ],
    ids=str,
)
def test_every_way_to_step(stopped, overrides):
    ends_the_same(stopped, *overrides)


ATTACKING = [kind.__name__ for kind in kinds(Criterion) if hasattr(kind, "attack")]
BY_KIND = {penalty.kind: penalty for penalty in reversed(PENALTIES)}


@pytest.mark.parametrize("kind", ATTACKING)
def test_every_criterion_that_draws(stopped, kind):
    ends_the_same(stopped, f"criterion={{kind: {kind}, eps: 0.1}}", "monitor=null")


@pytest.mark.parametrize("kind", [kind.__name__ for kind in kinds(Penalty)])
def test_every_penalty(stopped, kind):
    penalty = TypeAdapter(Penalty).dump_python(BY_KIND[kind], mode="json")
    wrapper = "optimizer.wrapper={kind: SAM}"
    ends_the_same(stopped, f"penalties={json.dumps([penalty])}", wrapper, "monitor=null")


def test_images_that_stream(stopped, tmp_path):
    for split, count in (("train", 16), ("test", 3)):
        for label in range(4):
            (tmp_path / "files" / split / str(label)).mkdir(parents=True)
            for number in range(count):
                pixels = torch.randint(0, 256, (20, 24, 3), dtype=torch.uint8).numpy()
                file = tmp_path / "files" / split / str(label) / f"{number}.png"
                Image.fromarray(pixels).save(file)
    data = {"kind": "folder", "path": str(tmp_path / "files"), "size": 32, "workers": 1}
    augment = {"scale": [0.5, 1], "auto_augment": "rand-m9", "flip": True, "crop": 1, "mixup": 0.4}
    overrides = (f"data={json.dumps(data)}", f"augment={json.dumps(augment)}", "monitor=null")
    ends_the_same(stopped, *overrides, "batch_size=16")
