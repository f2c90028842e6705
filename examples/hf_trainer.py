"""Hugging Face's Trainer: an objective of flatreg and a sharpness-aware optimizer.

Run: python examples/hf_trainer.py
"""

import tempfile

import torch
import transformers
from sklearn.datasets import load_digits

import flatreg


class FlatTrainer(transformers.Trainer):
    """Steps through `flatreg.backward`; clipping, schedule, precision and logging stay the same."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        inputs = self._prepare_inputs(inputs)
        self.objective.model = model  # as the Trainer has prepared it
        batch = self.objective.bind(inputs["pixel_values"], inputs["labels"])
        batch.weight /= self.current_gradient_accumulation_steps
        with self.compute_loss_context_manager():
            loss = flatreg.backward(self.optimizer, batch, accelerator=self.accelerator)
        return loss.total

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        logits = model(inputs["pixel_values"])  # in the Trainer's evaluation
        loss = torch.nn.functional.cross_entropy(logits, inputs["labels"])
        return (loss, {"loss": loss, "logits": logits}) if return_outputs else loss


transformers.set_seed(0)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16  # in [0,1]
data = [{"pixel_values": x, "labels": y} for x, y in zip(images, digits.target, strict=True)]
config = transformers.ResNetConfig(
    num_channels=1, embedding_size=16, hidden_sizes=[32], depths=[1], num_labels=10
)
model = flatreg.logits_only(transformers.ResNetForImageClassification(config))
optimizer = flatreg.SAM(torch.optim.AdamW(model.parameters(), lr=1e-2), rho=0.05)
arguments = transformers.TrainingArguments(
    tempfile.mkdtemp(),
    num_train_epochs=3,
    per_device_train_batch_size=32,
    gradient_accumulation_steps=2,
    eval_strategy="epoch",
    save_strategy="no",
    label_names=["labels"],
    remove_unused_columns=False,
    disable_tqdm=True,
)
train, test = data[:1500], data[1500:]
trainer = FlatTrainer(model, arguments, None, train, test, optimizers=(optimizer, None))
penalty = flatreg.RelativeFlatness(strength=0.1)
trainer.objective = flatreg.Objective(model, flatreg.NFGSM(eps=0.05), penalty)
trainer.train()
pairs = [(example["pixel_values"], example["labels"]) for example in test]
print(flatreg.evaluate(model, pairs, eps=0.05, samples=100, attack="fast", progress=False))
