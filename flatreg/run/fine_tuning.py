"""What a fine-tuning freezes, and how its network computes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from flatreg.data.text import did_you_mean, one_line
from flatreg.run.recipe_sections import Model


def set_up(spec: Model, model: nn.Module) -> None:
    """Freeze what is not to be trained, and choose how the network computes.

    Raises:
        ValueError: there is no such module, or the network has no checkpointing.
    """
    network = model.get_submodule("model")
    kept = list(network.modules()) if spec.frozen_statistics else []
    if kept and not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in kept):
        raise ValueError(
            f"model {spec.name}: frozen_statistics has no effect without BatchNorm: delete it"
        )
    names = [name for name, _ in network.named_modules() if name]
    for name in spec.freeze:
        if name not in names:
            hint = did_you_mean(name, names)
            raise ValueError(f"model {spec.name}: freeze: there is no module {name}{hint}")
        part = network.get_submodule(name).requires_grad_(False)
        kept += part.modules()
    if not any(p.requires_grad for p in network.parameters()):
        raise ValueError(f"model {spec.name}: freeze: expected something left to train, got none")
    for module in kept:
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    if spec.grad_checkpointing:
        switch: Any = getattr(network, "set_grad_checkpointing", None)
        try:
            switch(True)
        except (TypeError, AssertionError) as error:  # there is none, or it says no
            raise ValueError(f"model {spec.name} has no grad_checkpointing") from error
    if spec.channels_last:
        model.to(memory_format=torch.channels_last)


def add_lora(spec: Model, model: nn.Module) -> None:
    """Put the adapters of `spec.lora` into the network; they and the classifier are trained.

    Raises:
        ValueError: peft is not installed; it has no adapter for such a layer; no layer has such a
            name, or the classifier has it.
    """
    if spec.lora is None:
        return
    try:
        from peft import LoraConfig, inject_adapter_in_model  # seconds to import
    except ImportError as error:
        raise ValueError("model.lora needs peft: pip install peft") from error
    lora, network, classifier = spec.lora, model.get_submodule("model"), _classifier(model)
    alpha = lora.rank if lora.alpha is None else lora.alpha
    config = LoraConfig(r=lora.rank, lora_alpha=alpha, target_modules=list(lora.target))
    try:
        inject_adapter_in_model(config, network)
    except Exception as error:  # of any kind: it depends on the layers
        raise ValueError(f"model {spec.name}: lora: {one_line(error, 200)}") from error
    if _classifier(model) is not classifier:
        raise ValueError(f"model {spec.name}: lora.target: the classifier is trained itself")
    classifier.requires_grad_(True)


def merge_lora(model: nn.Module) -> None:
    """Replace layers with adapters by layers whose weight is W + alpha / rank B A."""
    from peft.tuners.lora import LoraLayer

    for name, layer in list(model.named_modules()):
        if isinstance(layer, LoraLayer):
            layer.merge()
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.get_base_layer())
    model.requires_grad_(True)


def _classifier(model: nn.Module) -> nn.Module:
    """The classifier that timm names.

    Raises:
        ValueError: timm names none.
    """
    find: Any = getattr(model.get_submodule("model"), "get_classifier", None)
    found = find() if find else None
    if not isinstance(found, nn.Module):
        raise ValueError(
            "head_epochs, clip_mode agc, lora: expected a network with one classifier, timm names "
            "none"
        )
    return found


def body_of(model: nn.Module) -> list[nn.Parameter]:
    """Parameters outside the classifier.

    Raises:
        ValueError: timm names no classifier, or it is frozen.
    """
    parts = list(_classifier(model).parameters())
    if not any(p.requires_grad for p in parts):
        raise ValueError("head_epochs, clip_mode agc: expected a classifier that is not frozen")
    head = {id(p) for p in parts}
    return [p for p in model.parameters() if id(p) not in head]
