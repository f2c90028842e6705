"""torch.compile: an objective and a sharpness-aware optimizer on a compiled model.

Run: python examples/compiled.py [backend]; the backend is inductor where none is named.
"""

import sys

import torch
from torch import nn
from torch.utils.data import TensorDataset

import flatreg

torch.manual_seed(0)
images, labels = torch.rand(64, 1, 8, 8), torch.randint(10, (64,))  # yours, in [0,1]
network = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 10))
model = torch.compile(network, backend=sys.argv[1] if len(sys.argv) > 1 else "inductor")
optimizer = flatreg.SAM(torch.optim.AdamW(model.parameters(), lr=1e-3), rho=0.05)
# Penalties by forward passes alone: torch.compile has no second derivative, and flatreg refuses
# the penalties that need one (docs/penalties.md has the table).
objective = flatreg.Objective(
    model, penalties=[flatreg.RelativeFlatness(strength=0.1), flatreg.MarginBound(eps=0.05)]
)
for step in range(3):
    loss = flatreg.backward(optimizer, objective.bind(images, labels))
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {float(loss.total):.3f}")

# The evaluation takes the module inside: its batches change their size.
data = TensorDataset(images, labels)
print(flatreg.evaluate(model, data, eps=0.05, attack="fast", progress=False))
