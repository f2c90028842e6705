"""A training loop of PyTorch: penalty, sharpness-aware optimizer, attacked accuracy.

Run: python examples/plain_loop.py
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import flatreg

torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16  # in [0,1]
labels = torch.tensor(digits.target)
train = DataLoader(TensorDataset(images[:1500], labels[:1500]), batch_size=64, shuffle=True)
test = TensorDataset(images[1500:], labels[1500:])

model = nn.Sequential(
    nn.Conv2d(1, 16, 3, padding=1),
    nn.SiLU(),
    nn.Conv2d(16, 32, 3, stride=2, padding=1),
    nn.SiLU(),
    nn.Flatten(),
    nn.Linear(512, 10),
)
optimizer = flatreg.SAM(torch.optim.AdamW(model.parameters(), lr=3e-3), rho=0.05)
objective = flatreg.Objective(
    model, flatreg.CrossEntropy(), [flatreg.MarginBound(strength=1.0, eps=0.1)]
)
for epoch in range(3):
    for inputs, targets in train:
        # In place of loss.backward(); the other lines of the loop stay as they are.
        loss = flatreg.backward(optimizer, objective.bind(inputs, targets))
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    print(f"epoch {epoch}: loss {float(loss.total):.3f}")

print(flatreg.evaluate(model, test, eps=0.1, samples=100, progress=False))
