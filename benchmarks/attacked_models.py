"""Models and images that `benchmarks/attacks.py` and `benchmarks/findings.py` judge.

The two CIFAR ResNets are the pretrained ones of github.com/akamaster/pytorch_resnet_cifar10 as
safetensors; the small models are arms of finished runs of `flatreg run`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import flatreg
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
