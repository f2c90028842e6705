"""Hugging Face transformers: a model that returns a ModelOutput, through one adapter.

Run: python examples/transformers_model.py
"""

import torch
import transformers
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

import flatreg

transformers.set_seed(0)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16  # in [0,1]
labels = torch.tensor(digits.target)
train = DataLoader(TensorDataset(images[:1500], labels[:1500]), batch_size=64, shuffle=True)
test = TensorDataset(images[1500:], labels[1500:])

config = transformers.ViTConfig(  # or from_pretrained("google/vit-base-patch16-224")
    image_size=8,
    patch_size=4,
    num_channels=1,
    hidden_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=96,
    num_labels=10,
)
vit = transformers.ViTForImageClassification(config)
# Images in [0,1] to logits: what its image processor does to pixels is now a part of the model.
model = flatreg.with_normalization(flatreg.logits_only(vit), mean=[0.5], std=[0.5])

optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
penalties = [
    flatreg.RelativeFlatness(strength=0.1),
    flatreg.MarginBound(strength=0.3, eps=0.05),
]
objective = flatreg.Objective(model, flatreg.CrossEntropy(), penalties)
for epoch in range(5):
    for inputs, targets in train:
        loss = flatreg.backward(optimizer, objective.bind(inputs, targets))
        optimizer.step()
        optimizer.zero_grad()
    print(f"epoch {epoch}: loss {float(loss.total):.3f}")

print(flatreg.evaluate(model, test, eps=0.05, samples=100, attack="fast", progress=False))
card = flatreg.measure(model, test, eps=0.05, samples=100, parts=["kappa"], progress=False)
print("kappa of the clean images:", card.kappa.by_outcome.clean.raw)
vit.save_pretrained("vit-digits")  # the adapters share its weights: it is saved as it came
