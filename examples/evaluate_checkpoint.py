"""Judge a checkpoint of others, as RobustBench does: weights from a .pth, attacks, findings.

Run: python examples/evaluate_checkpoint.py
"""

import tempfile
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

import flatreg

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16  # in [0,1]
labels = torch.tensor(digits.target)


def network() -> nn.Module:
    """The architecture of the checkpoint; a model that wants normalised images gets them inside."""
    inner = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 10))
    return flatreg.with_normalization(inner, mean=[0.3], std=[0.4])


folder = Path(tempfile.mkdtemp())
torch.manual_seed(0)
model = network()  # in place of a training of yours
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
for _ in range(40):
    loss = flatreg.backward(optimizer, flatreg.Objective(model).bind(images[:1500], labels[:1500]))
    optimizer.step()
    optimizer.zero_grad()
torch.save({"state_dict": model.state_dict()}, folder / "checkpoint.pth")

model = network()
state = torch.load(folder / "checkpoint.pth", weights_only=True)  # unpickles no code
model.load_state_dict(state["state_dict"])
result = flatreg.evaluate(
    model,
    TensorDataset(images[1500:], labels[1500:]),
    eps=0.05,
    samples=100,
    folder=folder,  # evaluation.json and samples.csv; a killed evaluation goes on from here
    save_inputs=True,  # the attacked images, for others to check
    progress=False,
)
print(result)
