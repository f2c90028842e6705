"""Every script of examples/ runs, is short, and stands on the page that lists them."""

import runpy
import sys
from inspect import signature
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from by_hand import estimate
from cases import images, small_net
from oracles import set_gradient
from timm.utils import NativeScaler, dispatch_clip_grad
from torch.utils.data import DataLoader

import flatreg

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
NEEDS = {
    "hf_trainer": "transformers",
    "sharpness_aware": "transformers",
    "transformers_model": "transformers",
    "lightning_module": "lightning",
    "peft_lora": "peft",
    "timm_task": "timm.task",
    "torchmetrics_metric": "torchmetrics",
}
ARGUMENTS = {"compiled": ["eager"], "sharpness_aware": ["--cpu", "--rho", "0.02"]}
# What it prints when it has done what it is for.
SAYS = {
    "sharpness_aware": "epoch 2: {'accuracy': ",
    "timm_task": "update 2: loss",
    "transformers_model": "kappa of the clean images: ",
}
LINES = {"sharpness_aware": 84}  # it loads its data as Accelerate's examples do; 60 of the others


@pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",
    "ignore:.*LeafSpec.* is deprecated",
    "ignore:'pin_memory' argument is set",
)
@pytest.mark.parametrize("script", EXAMPLES, ids=lambda script: script.stem)
def test_example(script, capsys, monkeypatch, tmp_path):
    needed = pytest.importorskip(NEEDS.get(script.stem, "torch"))
    if script.stem == "timm_task" and "criterion_kwargs" not in str(
        signature(needed.ClassificationTask)
    ):
        pytest.skip("needs a newer timm")
    torch.manual_seed(0)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(sys, "argv", [str(script), *ARGUMENTS.get(script.stem, [])])
    monkeypatch.chdir(tmp_path)
    if script.stem == "sharpness_aware":
        without_the_hub(monkeypatch)
    runpy.run_path(str(script), run_name="__main__")
    assert SAYS.get(script.stem, "attacked") in capsys.readouterr().out


def without_the_hub(monkeypatch):
    """Data, weights and metric of Accelerate's examples, mocked as Accelerate's tests mock data."""
    import transformers

    def dataloaders(accelerator, batch_size):
        sentences = torch.randint(1, 30, (24, 8))
        inputs = {"input_ids": sentences, "attention_mask": torch.ones_like(sentences)}
        rows = [{k: v[i] for k, v in inputs.items()} | {"labels": i % 2} for i in range(24)]
        return DataLoader(rows, batch_size, shuffle=True), DataLoader(rows, batch_size)

    class Accuracy:
        def add_batch(self, predictions, references):
            self.right = (predictions == references).float()

        def compute(self):
            return {"accuracy": round(self.right.mean().item(), 3)}

    small = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    bert = transformers.BertConfig(vocab_size=30, **small)
    monkeypatch.setattr(
        transformers.AutoModelForSequenceClassification,
        "from_pretrained",
        lambda name: transformers.BertForSequenceClassification(bert),
    )
    monkeypatch.setenv("TESTING_MOCKED_DATALOADERS", "1")
    monkeypatch.setattr("accelerate.test_utils.training.mocked_dataloaders", dataloaders)
    stubs = {"datasets": {"load_dataset": None}, "evaluate": {"load": lambda *_: Accuracy()}}
    for name, contents in stubs.items():
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**contents))


@pytest.mark.parametrize("loss_scale", [None, 1024.0])
def test_timms_task_takes_the_sharpness_aware_step(loss_scale):
    """Through timm's own scaler, which calls backward on what the task returns."""
    pytest.importorskip("timm.task")
    module = runpy.run_path(str(ROOT / "examples/timm_task.py"))
    (x, y), scaler = images(8), None
    ours, theirs = (small_net(batch_norm=False) for _ in range(2))
    if loss_scale:
        scaler = NativeScaler("cpu")
        scaler._scaler = torch.amp.GradScaler("cpu", init_scale=loss_scale)
    task = module["SharpnessAwareTask"](
        ours, torch.nn.CrossEntropyLoss(), scaler=scaler and scaler._scaler
    )
    optimizer = task.optimizer = flatreg.SAM(torch.optim.SGD(ours.parameters(), lr=0.1), rho=0.1)
    loss = task(x, y)["loss"]
    assert loss.item() == pytest.approx(F.cross_entropy(theirs(x), y).item())
    if scaler:
        scaler(loss, optimizer, clip_grad=1.0, parameters=task.get_clip_parameters())
    else:
        loss.backward()
        dispatch_clip_grad(task.get_clip_parameters(), 1.0)
        optimizer.step()
    gradient = estimate("SAM", theirs, lambda model: F.cross_entropy(model(x), y), 0, {})
    set_gradient(theirs, gradient)
    dispatch_clip_grad(theirs.parameters(), 1.0)
    torch.optim.SGD(theirs.parameters(), lr=0.1).step()
    for found, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(found, expected)


def test_examples_are_short_and_listed():
    page = (ROOT / "docs/in_your_tools.md").read_text()
    wrong = [
        script.name
        for script in EXAMPLES
        if len(script.read_text().splitlines()) > LINES.get(script.stem, 60)
        or f"(../examples/{script.name})" not in page
    ]
    assert not wrong and len(EXAMPLES) >= 10
