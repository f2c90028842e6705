"""timm: a training task for timm's train.py that takes sharpness-aware steps.

Run: python examples/timm_task.py
"""

import timm
import torch
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask

import flatreg


class SharpnessAwareTask(ClassificationTask):
    """`ClassificationTask` that leaves the sharpness-aware gradient in `.grad` by itself.

    train.py calls backward on the loss that it gets: that loss has no path to the weights, so its
    backward pass adds nothing. In train.py import flatreg and, from this file beside it, the task,
    write it in place of `ClassificationTask(`, and add behind `optimizer = create_optimizer_v2(`:

        optimizer = task.optimizer = flatreg.SAM(optimizer, rho=0.05)

    Args:
        accumulation: train.py's `--grad-accum-steps`.
        scaler: `loss_scaler._scaler` where train.py scales the loss (`--amp-dtype float16`).
    """

    def __init__(self, *args, accumulation=1, scaler=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.accumulation, self.scaler, self.optimizer = accumulation, scaler, None

    def forward(self, input, target):
        outputs = []

        def closure():
            outputs.append(self.trainable_module(input))
            return self.criterion(outputs[-1], target) / self.accumulation

        loss = flatreg.backward(
            self.optimizer, closure, model=self.trainable_module, scaler=self.scaler
        )
        reported = (loss * self.accumulation).requires_grad_()
        return {"loss": reported.clone(), "output": outputs[0].detach()}


if __name__ == "__main__":
    torch.manual_seed(0)
    model = timm.create_model("test_convnext3", num_classes=10)
    task = SharpnessAwareTask(model, criterion_kwargs={"smoothing": 0.1}, accumulation=2)
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-3)
    optimizer = task.optimizer = flatreg.SAM(optimizer, rho=0.05)
    images, labels = torch.rand(32, 3, 32, 32), torch.randint(10, (32,))
    for update in range(3):
        for inputs, targets in zip(images.split(16), labels.split(16), strict=True):
            loss = task(inputs, targets)["loss"]  # what train.py does, from here on
            loss /= 2
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"update {update}: loss {2 * loss.item():.3f}")
