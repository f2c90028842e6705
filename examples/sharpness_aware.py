"""Accelerate: SAM on BERT and GLUE MRPC, in the form of Accelerate's examples/by_feature.

Run: accelerate launch examples/sharpness_aware.py --gradient_accumulation_steps 2
"""

import argparse
import os

import evaluate
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from datasets import load_dataset
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification as Classifier
from transformers import AutoTokenizer, DataCollatorWithPadding

# New Code #
import flatreg


def get_dataloaders(accelerator, batch_size=16):
    tokenizer = AutoTokenizer.from_pretrained("bert-base-cased")
    with accelerator.main_process_first():
        mrpc = load_dataset("nyu-mll/glue", "mrpc").map(
            lambda pair: tokenizer(pair["sentence1"], pair["sentence2"], truncation=True),
            remove_columns=["idx", "sentence1", "sentence2"],
        )
    loading = {"batch_size": batch_size, "collate_fn": DataCollatorWithPadding(tokenizer)}
    return DataLoader(mrpc["train"], shuffle=True, **loading), DataLoader(
        mrpc["validation"], **loading
    )


if os.environ.get("TESTING_MOCKED_DATALOADERS") == "1":  # as in their tests
    from accelerate.test_utils.training import mocked_dataloaders as get_dataloaders


def training_function(config, args):
    accelerator = Accelerator(
        cpu=args.cpu, gradient_accumulation_steps=args.gradient_accumulation_steps
    )
    metric = evaluate.load("glue", "mrpc")
    set_seed(config["seed"])
    train_dataloader, eval_dataloader = get_dataloaders(accelerator, config["batch_size"])
    model = Classifier.from_pretrained("bert-base-cased")
    # New Code #
    optimizer = flatreg.SAM(torch.optim.AdamW(model.parameters(), lr=config["lr"]), rho=args.rho)
    model, optimizer, train_dataloader, eval_dataloader = accelerator.prepare(
        model, optimizer, train_dataloader, eval_dataloader
    )
    for epoch in range(config["num_epochs"]):
        model.train()
        for batch in train_dataloader:
            with accelerator.accumulate(model):
                # New Code #
                # Both passes, in place of `loss = ...` and `accelerator.backward(loss)`
                flatreg.backward(
                    optimizer, lambda b=batch: model(**b).loss, model=model, accelerator=accelerator
                )
                optimizer.step()
                optimizer.zero_grad()
        model.eval()
        for batch in eval_dataloader:
            with torch.no_grad():
                predictions = model(**batch).logits.argmax(-1)
            pair = accelerator.gather_for_metrics((predictions, batch["labels"]))
            metric.add_batch(predictions=pair[0], references=pair[1])
        accelerator.print(f"epoch {epoch}:", metric.compute())
    accelerator.end_training()


def main():
    parser = argparse.ArgumentParser(description="Sharpness-aware training with Accelerate.")
    parser.add_argument("--gradient_accumulation_steps", type=int, default=1)
    # New Code #
    parser.add_argument("--rho", type=float, default=0.05, help="Radius of the perturbation.")
    parser.add_argument("--cpu", action="store_true", help="If passed, will train on the CPU.")
    args = parser.parse_args()
    training_function({"lr": 2e-5, "num_epochs": 3, "seed": 42, "batch_size": 16}, args)


if __name__ == "__main__":
    main()
