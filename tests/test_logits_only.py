"""Models of transformers behind `logits_only`: the same numbers as one that returns logits."""

import re
from collections import namedtuple

import pytest
import torch
from accelerate import Accelerator
from cases import METHODS, PENALTIES
from test_entrance import ENTRANCES, refusal
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset

from flatreg import (
    NFGSM,
    SAM,
    LayerFlatness,
    Objective,
    backward,
    evaluate,
    find_head,
    logits_only,
    with_normalization,
)

transformers = pytest.importorskip("transformers", reason="needs transformers")

TINY = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
WIDE = dict(num_labels=5, initializer_range=1.0)  # weights by which logits differ
PIXELS = dict(image_size=8, patch_size=4)


def vit():
    torch.manual_seed(3)
    config = transformers.ViTConfig(**TINY, **PIXELS, **WIDE)
    return transformers.ViTForImageClassification(config).eval()


def convnext():
    torch.manual_seed(0)
    config = transformers.ConvNextConfig(num_stages=2, hidden_sizes=[4, 8], depths=[1, 1], **WIDE)
    return transformers.ConvNextForImageClassification(config).eval()


def clip():
    vision, text = TINY | PIXELS, TINY | {"vocab_size": 9, "bos_token_id": 0, "eos_token_id": 1}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    return transformers.CLIPModel(config).eval()


class ByHand(nn.Module):
    """What a user would write without the adapter."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(pixel_values=x).logits


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(192, 5)

    def forward(self, x, mask):
        return self.head(x.flatten(1) * mask)


class Gives(nn.Module):
    """A linear classifier whose logits are among other outputs."""

    def __init__(self, pack):
        super().__init__()
        self.head, self.pack = nn.Linear(192, 5), pack

    def forward(self, x):
        return self.pack(self.head(x.flatten(1)))


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(24, 3, 8, 8, generator=generator)
    with torch.no_grad():
        labels = vit()(x).logits.argmax(1)  # right, so that there is something to attack
    assert len(labels.unique()) > 1
    return x, labels


@pytest.mark.parametrize("entrance", ENTRANCES)
def test_every_entrance_takes_it(entrance, batch):
    run = ENTRANCES[entrance]
    ByHand.__name__ = "LogitsOnly"  # a card names the class
    assert run(logits_only(vit()), *batch) == run(ByHand(vit()), *batch)


@pytest.mark.parametrize("make", [vit, convnext])
def test_it_trains_under_every_penalty_and_its_head_is_found(make, batch):
    x, y = batch
    wrong = []
    third = LayerFlatness(strength=0.1, method=METHODS[1])  # LayerNorm's order 3 is wrong in torch
    for penalty in (None, *(p for p in PENALTIES if p != third)):
        losses = []
        for adapt in (logits_only, ByHand):
            model = adapt(make().train())
            torch.manual_seed(1)
            loss = Objective(model, NFGSM(eps=0.1), penalty)(x, y)
            torch.autograd.backward(loss.total)
            losses.append([loss.total.detach(), *(p.grad for p in model.parameters())])
        same = all(a is b is None or torch.equal(a, b) for a, b in zip(*losses, strict=True))
        wrong += [] if same else [penalty]
    assert not wrong
    head = find_head(logits_only(make()), x)
    assert head.name == "model.classifier" and len(head.weight) == 5


def test_wrapper_normalisation_and_accelerate_go_around_it(batch):
    x, y = batch
    model = with_normalization(logits_only(vit()), [0.5] * 3, [0.5] * 3)
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.05)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    model, optimizer = accelerator.prepare(model, optimizer)
    before = evaluate(model, TensorDataset(x, y), eps=0.01, attack="fast", progress=False)
    for _ in range(3):
        backward(optimizer, Objective(model).bind(x, y), accelerator=accelerator)
        optimizer.step()
        optimizer.zero_grad()
    after = evaluate(model, TensorDataset(x, y), eps=0.01, attack="fast", progress=False)
    assert before.n == 24 and (before.margins != after.margins)


Pair = namedtuple("Pair", ["logits", "features"])


@pytest.mark.parametrize(
    ("pack", "output"),
    [
        (lambda z: {"logits": z, "loss": None}, "logits"),
        (lambda z: {"output": z}, "output"),
        (lambda z: (z, z * 2), 0),
        (lambda z: [z * 2, z], 1),
        (lambda z: (z * 2, z), -1),
        (lambda z: Pair(z, z * 2), "logits"),
    ],
)
def test_the_logits_are_found_by_name_or_place(pack, output, batch):
    model, x = Gives(pack), batch[0]
    assert torch.equal(logits_only(model, output)(x), model.head(x.flatten(1)))
    assert find_head(logits_only(model, output), x).name == "model.head"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: logits_only(Gives(lambda z: (z, z))),
            "'logits', Gives returns a tuple of 2: give",
        ),
        (lambda: logits_only(Gives(lambda z: {"out": z})), "Gives returns a dict with out: give"),
        (lambda: logits_only(Gives(lambda z: (z,)), 3), "with 3, Gives returns a tuple of 1"),
        (lambda: logits_only(Gives(lambda z: z)), "Gives returns a Tensor: give"),
        (vit, r"returns a? ?ImageClassifierOutput: give flatreg.logits_only\(model\)"),
        (clip, "CLIPModel takes input_ids first: put it into a module"),
        (lambda: logits_only(clip()), "CLIPModel takes input_ids first: put it into a module"),
        (Masked, "missing 1 required positional argument: 'mask': put it into a module"),
        (lambda: logits_only(Masked()), "argument: 'mask': put it into a module"),
    ],
)
def test_every_entrance_refuses_in_one_line(make, message, batch):
    model, wrong = make(), []
    entrances = ENTRANCES | {
        "objective": lambda m, x, y: Objective(m)(x, y),
        "head": lambda m, x, y: find_head(m, x),
        "normalised": lambda m, x, y: Objective(with_normalization(m, [0.5], [0.5]))(x, y),
    }
    for name, entrance in entrances.items():
        line = refusal(entrance, model, *batch)
        wrong += [] if re.search(message, line) else [f"{name}: {line}"]
    assert not wrong, "\n".join(wrong)


def test_what_is_no_module_and_ddp_are_refused():
    with pytest.raises(TypeError, match=r"an nn\.Module, got a function"):
        logits_only(lambda x: x)
    ddp = object.__new__(DistributedDataParallel)
    with pytest.raises(ValueError, match="logits_only goes inside DDP"):
        logits_only(ddp)
    with pytest.raises(ValueError, match="with_normalization goes inside DDP"):
        with_normalization(ddp, [0.5], [0.5])
