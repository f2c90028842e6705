"""The two networks of the CIFAR literature that timm lacks, under timm's registry.

`cifar_resnet18` and `wide_resnet28_10` can be named in recipes wherever a timm model can. For
`timm.create_model`, `import flatreg.models.cifar` first: it registers them. 32x32 images; any size
that four (three) halvings leave works.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from timm.layers import get_act_layer
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn

default_cfgs = generate_default_cfgs(
    {
        name: {
            "input_size": (3, 32, 32),
            "num_classes": 10,
            "mean": None,  # of the data set: a recipe says it
            "std": None,
            "first_conv": stem,
            "classifier": "fc",
        }
        for name, stem in (("cifar_resnet18", "conv1"), ("wide_resnet28_10", "stem"))
    }
)


@register_model  # type: ignore[untyped-decorator]
def cifar_resnet18(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNet-18 with a 3x3 stem of stride 1 and no pooling; timm's arguments.

    He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, for CIFAR as in Madry et
    al. 2018 and after.

    Raises:
        RuntimeError: pretrained weights are asked for and no file of them is named.
    """
    model: ResNet = build_model_with_cfg(_cifar_resnet, "cifar_resnet18", pretrained, **kwargs)
    return model


@register_model  # type: ignore[untyped-decorator]
def wide_resnet28_10(pretrained: bool = False, **kwargs: Any) -> WideResNet:
    """WRN-28-10; `depth`, `width`, `act_layer`, `drop_rate` change it.

    Raises:
        RuntimeError: pretrained weights are asked for and no file of them is named.
    """
    model: WideResNet = build_model_with_cfg(WideResNet, "wide_resnet28_10", pretrained, **kwargs)
    return model


def _cifar_resnet(in_chans: int = 3, **kwargs: Any) -> ResNet:
    model = ResNet(BasicBlock, [2, 2, 2, 2], in_chans=in_chans, **kwargs)
    model.conv1 = nn.Conv2d(in_chans, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
    return model


class WideResNet(nn.Module):
    """Pre-activation residual network of three stages, `width` times as wide as ResNet.

    Zagoruyko and Komodakis, "Wide Residual Networks", BMVC 2016.

    Args:
        depth: 6n + 4 convolutions.
        width: 16, 32 and 64 channels times this.
        num_classes: outputs of the head `fc`.
        in_chans: channels of the images.
        act_layer: an activation by timm's name; a smooth one gives curvature penalties something to
            act on.
        drop_rate: dropout between the convolutions of a block.

    Raises:
        ValueError: `depth` is not 6n + 4.
    """

    def __init__(
        self,
        depth: int = 28,
        width: int = 10,
        num_classes: int = 10,
        in_chans: int = 3,
        act_layer: str = "relu",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 4, 6)
        if rest or blocks < 1:
            raise ValueError(f"depth must be 6n + 4, got {depth}")
        activation = get_act_layer(act_layer)
        self.stem = nn.Conv2d(in_chans, 16, 3, padding=1, bias=False)
        stages, inside = list[nn.Module](), 16
        for stage, channels in enumerate((16 * width, 32 * width, 64 * width)):
            for block in range(blocks):
                stride = 2 if stage and not block else 1
                stages.append(_Block(inside, channels, stride, activation(), drop_rate))
                inside = channels
        self.stages = nn.Sequential(*stages)
        self.norm, self.act = nn.BatchNorm2d(inside), activation()
        self.num_features, self.num_classes = inside, num_classes
        self.fc = nn.Linear(inside, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `(batch, num_classes)`."""
        x = self.act(self.norm(self.stages(self.stem(x))))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


class _Block(nn.Module):
    def __init__(
        self, inside: int, channels: int, stride: int, activation: nn.Module, drop_rate: float
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(inside), nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(inside, channels, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        same = stride == 1 and inside == channels
        self.shortcut = None if same else nn.Conv2d(inside, channels, 1, stride, bias=False)
        self.act, self.drop_rate = activation, drop_rate

    def forward(self, x: Tensor) -> Tensor:
        ready = self.act(self.norm1(x))
        y = self.act(self.norm2(self.conv1(ready)))
        y = self.conv2(F.dropout(y, self.drop_rate, self.training))
        total: Tensor = y + (x if self.shortcut is None else self.shortcut(ready))
        return total
