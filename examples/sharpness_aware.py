"""Accelerate: sharpness-aware training, in the form of Accelerate's examples/by_feature.

Run: accelerate launch examples/sharpness_aware.py --gradient_accumulation_steps 2
"""

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

# New Code #
import flatreg


def training_function(config, args):
    accelerator = Accelerator(
        cpu=args.cpu, gradient_accumulation_steps=args.gradient_accumulation_steps
    )
    set_seed(config["seed"])
    data, target = load_digits(return_X_y=True)
    dataset = TensorDataset(torch.tensor(data / 16, dtype=torch.float32), torch.tensor(target))
    train_dataloader = DataLoader(dataset, config["batch_size"], shuffle=True)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    # New Code #
    optimizer = flatreg.SAM(torch.optim.AdamW(model.parameters(), lr=config["lr"]), rho=args.rho)
    model, optimizer, train_dataloader = accelerator.prepare(model, optimizer, train_dataloader)
    for epoch in range(config["num_epochs"]):
        for inputs, targets in train_dataloader:
            with accelerator.accumulate(model):
                # New Code #
                # Both passes, in place of `loss = ...` and `accelerator.backward(loss)`
                loss = flatreg.backward(
                    optimizer,
                    lambda x=inputs, y=targets: nn.functional.cross_entropy(model(x), y),
                    model=model,
                    accelerator=accelerator,
                )
                optimizer.step()
                optimizer.zero_grad()
        accelerator.print(f"epoch {epoch}: loss {accelerator.reduce(loss, 'mean'):.3f}")
    accelerator.end_training()


def main():
    parser = argparse.ArgumentParser(description="Sharpness-aware training with Accelerate.")
    parser.add_argument("--gradient_accumulation_steps", type=int, default=1)
    # New Code #
    parser.add_argument("--rho", type=float, default=0.05, help="Radius of the perturbation.")
    parser.add_argument("--cpu", action="store_true", help="If passed, will train on the CPU.")
    args = parser.parse_args()
    training_function({"lr": 3e-3, "num_epochs": 2, "seed": 42, "batch_size": 32}, args)


if __name__ == "__main__":
    main()
