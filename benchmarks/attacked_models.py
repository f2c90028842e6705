"""Models and images that `benchmarks/attacks.py` and `benchmarks/findings.py` judge.

The two CIFAR ResNets are the pretrained ones of github.com/akamaster/pytorch_resnet_cifar10 as
safetensors; the small models are arms of finished runs of `flatreg run`. Two of these runs have
recipes of their own, which `python benchmarks/attacked_models.py FOLDER` writes, with their data.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import flatreg
from flatreg.data.files import write_whole
from flatreg.models.pretrained import pretrained_weights
from flatreg.threat import to_unit_range


class Block(nn.Module):
    """Two convolutions; where the width grows, the shortcut drops pixels and adds zero channels."""

    def __init__(self, inside: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.stride, self.added = stride, (width - inside) // 2

    def forward(self, x: Tensor) -> Tensor:
        """Residual branch plus shortcut."""
        shortcut = x[:, :, :: self.stride, :: self.stride]
        shortcut = F.pad(shortcut, (0, 0, 0, 0, self.added, self.added))
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + shortcut)


class CifarResNet(nn.Module):
    """He et al. 2016, section 4.2: three stages of 16, 32 and 64 channels."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*[Block(16, 16, 1) for _ in range(blocks)])
        self.layer2 = nn.Sequential(
            *[Block(16 if i == 0 else 32, 32, 1 + (i == 0)) for i in range(blocks)]
        )
        self.layer3 = nn.Sequential(
            *[Block(32 if i == 0 else 64, 64, 1 + (i == 0)) for i in range(blocks)]
        )
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def cifar_resnet(depth: int, folder: Path) -> nn.Module:
    """Load ResNet-`depth` with the weights in `folder`; it takes images in [0,1]."""
    model = CifarResNet((depth - 2) // 6)
    model.load_state_dict(load_file(folder / f"resnet{depth}_akamaster.safetensors"))
    return flatreg.with_normalization(
        model.eval(), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
    )


def npz_images(path: Path) -> TensorDataset:
    """Test images `(n, 3, 32, 32)` in [0,1] and labels of an .npz file."""
    with np.load(path, allow_pickle=False) as arrays:
        images, labels = torch.from_numpy(arrays["x_test"]), torch.from_numpy(arrays["y_test"])
    return TensorDataset(images.permute(0, 3, 1, 2).contiguous().float() / 255, labels.long())


def trained(run: Path, arm: str) -> tuple[nn.Module, TensorDataset]:
    """Load an arm of a finished run, with the test images of the run."""
    recipe = flatreg.load_recipe(run / "recipe.yaml")
    splits = recipe.data.load()
    images = to_unit_range(splits.test.images).float()
    return flatreg.load_model(run / "checkpoints" / arm), TensorDataset(images, splits.test.labels)


def imagenet_classifier(data: TensorDataset) -> tuple[nn.Module, TensorDataset]:
    """EfficientNet-Lite0 of 1,000 classes, 64 pixels wide; the labels are what it says itself."""
    name, mean, std = "tf_efficientnet_lite0", (0.5,), (0.5,)
    network = timm.create_model(
        name, pretrained_cfg_overlay=pretrained_weights(name), pretrained=True
    )
    model = flatreg.with_normalization(network.eval(), mean=mean, std=std)
    images = F.interpolate(data.tensors[0][:500], size=64, mode="bilinear", antialias=True)
    with torch.no_grad():
        labels = torch.cat([model(part).argmax(1) for part in images.split(50)])
    return model, TensorDataset(images.clamp(0, 1), labels)


RECIPES = {
    # Two handwritten digits side by side: 100 classes.
    "pairs": """\
seed: 0
data: {kind: array, path: pairs.npz}
model:
  name: test_convnext3
  args: {act_layer: gelu, kernel_sizes: 3}
  mean: [0.5]
  std: [0.5]
criterion: {kind: NFGSM, eps: 0.1}
optimizer: {name: adamw, lr: 3.0e-3, weight_decay: 0.05, warmup_epochs: 1, clip_norm: 1.0}
epochs: 12
batch_size: 64
evaluation: {eps: 0.1, samples: 200}
""",
    "vit": """\
seed: 0
data: {kind: digits}
model:
  name: vit_tiny_patch16_224
  args:
    {img_size: 32, patch_size: 8, embed_dim: 64, depth: 3, num_heads: 4, class_token: false,
     global_pool: avg}
  mean: [0.5]
  std: [0.5]
criterion: {kind: NFGSM, eps: 0.05}
optimizer: {name: adamw, lr: 3.0e-3, weight_decay: 0.05, warmup_epochs: 2, clip_norm: 1.0}
epochs: 25
batch_size: 64
evaluation: {eps: 0.05, samples: 200}
""",
}


def digit_pairs() -> dict[str, np.ndarray]:
    """Arrays of an .npz file: `x_train` `(6000, 32, 64, 1)`, `x_test` `(500, ...)`, labels 0-99."""
    splits = flatreg.data.Digits().load()
    arrays = {}
    for seed, (name, n) in enumerate((("train", 6000), ("test", 500))):
        split, draws = getattr(splits, name), np.random.default_rng(seed)
        left, right = (draws.integers(0, len(split.labels), n) for _ in range(2))
        images = torch.cat([split.images[left], split.images[right]], 3).permute(0, 2, 3, 1)
        arrays[f"x_{name}"] = images.numpy()
        arrays[f"y_{name}"] = (10 * split.labels[left] + split.labels[right]).numpy()
    return arrays


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "pairs.npz", **digit_pairs())
    for name, text in RECIPES.items():
        write_whole(folder / f"{name}.yaml", text.replace("pairs.npz", str(folder / "pairs.npz")))
