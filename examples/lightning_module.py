"""Lightning: automatic optimisation with a sharpness-aware optimizer and a penalty.

Run: python examples/lightning_module.py
"""

import lightning
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import flatreg


class SharpnessAware(lightning.LightningModule):
    """Any module of Lightning: what is flatreg's is the objective and the optimizer."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 10))
        self.objective = flatreg.Objective(
            self.net, penalties=[flatreg.RelativeFlatness(strength=0.1)]
        )

    def training_step(self, batch, index):
        loss = self.objective(*batch)
        self.log_dict(loss.parts)
        return loss.total

    def configure_optimizers(self):
        optimizer = flatreg.SAM(torch.optim.AdamW(self.parameters(), lr=3e-3), rho=0.05)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3)]


torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16  # in [0,1]
data = TensorDataset(images, torch.tensor(digits.target))
module = SharpnessAware()
trainer = lightning.Trainer(
    accelerator="cpu",
    max_epochs=3,
    gradient_clip_val=1.0,  # clips once: the gradient that is stepped on
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
)
trainer.fit(module, DataLoader(data, batch_size=64, shuffle=True))
print({name: f"{float(value):.3f}" for name, value in trainer.callback_metrics.items()})
print(flatreg.evaluate(module.net, data, eps=0.05, samples=100, attack="fast", progress=False))
