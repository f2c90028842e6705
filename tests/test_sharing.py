"""The commands and the code of docs/sharing.md, in their order, on a recipe of seconds."""

import re
import shlex
from pathlib import Path

import timm
import torch

import flatreg
from flatreg.run.cli import main

PAGE = (Path(__file__).parent.parent / "docs/sharing.md").read_text(encoding="utf-8")
RECIPE = """
arm: margin-bound
data: {kind: digits, limit: 100, test_limit: 20}
model: {name: test_convnext3, args: {kernel_sizes: 3}, mean: [0.5], std: [0.5]}
penalties: [{kind: MarginBound, strength: 1.0, eps: 0.05}]
optimizer: {lr: 1.0e-3}
epochs: 1
batch_size: 50
evaluation: {eps: 0.05, attack: fast}
"""


def test_the_page_runs_from_top_to_bottom(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/quickstart.yaml").write_text(RECIPE)
    blocks = re.findall(r"```(\w*)\n(.*?)```", PAGE, re.S)
    commands = [line for language, text in blocks if not language for line in text.splitlines()]
    assert len(commands) == 3
    for command in commands:
        assert main(shlex.split(command)[1:]) == 0, command
    told = capsys.readouterr().out
    assert "attacked_images.safetensors" in told and "nothing is uploaded" in told
    folder = flatreg.export("runs/quickstart/margin-bound", "again")
    assert (folder / "config.json").is_file()
    trained = flatreg.load_model("runs/quickstart/checkpoints/margin-bound")
    images = torch.rand(4, 1, 32, 32)
    codes = [text for language, text in blocks if language == "py"]
    assert len(codes) == 2
    for code in codes:
        exec(code, found := {})
        model = flatreg.with_normalization(found["model"].eval())
        assert torch.equal(model(images), trained(images))
    file = "runs/quickstart/export/margin-bound/model.safetensors"
    how = {"kernel_sizes": 3, "in_chans": 1, "num_classes": 10}
    overlay = {"file": file, "mean": (0.5,), "std": (0.5,)}
    for known, same in ((overlay, False), (overlay | {"num_classes": 10}, True)):
        network = timm.create_model(
            "test_convnext3", pretrained=True, pretrained_cfg_overlay=known, **how
        )
        model = flatreg.with_normalization(network.eval())
        assert torch.equal(model(images), trained(images)) is same  # the head is gone, or not
