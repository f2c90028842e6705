"""torchmetrics: attacked accuracy as a Metric, beside the metrics that a loop has already.

Run: python examples/torchmetrics_metric.py
"""

import torch
import torchmetrics
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from torchmetrics.utilities import dim_zero_cat

import flatreg


class AttackedAccuracy(torchmetrics.Metric):
    """Share of the images that are classified right and survive the cascade.

    The attack runs in `compute`, on all images since the last `reset`: of several processes, each
    attacks a part of the images of all.

    Args:
        model: images in [0,1] to logits; attacked with the weights that it has in `compute`.
        eps: radius of the ball, in [0,1] pixel units.
        options: others of `flatreg.evaluate`, as `norm` and `attack`.
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = False
    images: list[Tensor]
    labels: list[Tensor]

    def __init__(self, model: nn.Module, eps: float, **options):
        super().__init__()
        # In a function: the metric's copies and its state do not hold the model.
        self.evaluate = lambda data: flatreg.evaluate(
            model, data, eps=eps, progress=False, **options
        )
        self.add_state("images", [], dist_reduce_fx="cat")
        self.add_state("labels", [], dist_reduce_fx="cat")

    def update(self, images: Tensor, labels: Tensor) -> None:
        """Keep one batch."""
        self.images.append(images.cpu())
        self.labels.append(labels.cpu())

    def compute(self) -> Tensor:
        """Attack all batches: an upper bound on robust accuracy."""
        data = TensorDataset(dim_zero_cat(self.images), dim_zero_cat(self.labels))
        return torch.tensor(self.evaluate(data).attacked.value)


if __name__ == "__main__":
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    metric = AttackedAccuracy(model, eps=0.01)
    for _ in range(2):
        images = torch.rand(32, 1, 8, 8)
        metric.update(images, model(images).argmax(1))
    print(f"attacked accuracy {metric.compute():.3f}, of images that are all right when clean")
