"""peft: LoRA on a ViT of timm, trained with MarginBound and a sharpness-aware optimizer.

Run: python examples/peft_lora.py
"""

import timm
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import TensorDataset

import flatreg

torch.manual_seed(0)
images, labels = torch.rand(32, 3, 32, 32), torch.randint(10, (32,))  # yours, in [0,1]
# pretrained=True: ImageNet weights, in place of random ones
vit = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=10, depth=2)
config = LoraConfig(r=4, target_modules=["qkv"], modules_to_save=["head"])
# The normalisation goes around the adapted model: peft then looks at a plain model of timm.
model = flatreg.with_normalization(get_peft_model(vit, config))
trained = [p for p in model.parameters() if p.requires_grad]
print(f"{sum(p.numel() for p in trained)} of {sum(p.numel() for p in model.parameters())} weights")

optimizer = flatreg.SAM(torch.optim.AdamW(trained, lr=1e-3), rho=0.05)
objective = flatreg.Objective(model, penalties=[flatreg.MarginBound(strength=1.0, eps=2 / 255)])
for step in range(3):
    loss = flatreg.backward(optimizer, objective.bind(images, labels))
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {float(loss.total):.3f}")

model.model.merge_and_unload()  # a plain model of timm again
data = TensorDataset(images, labels)
print(flatreg.evaluate(model, data, eps=2 / 255, attack="fast", progress=False))
