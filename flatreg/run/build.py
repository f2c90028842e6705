"""From a recipe to the objects of a training, and from the files of a run back to its model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count
from math import ceil
from pathlib import Path
from typing import Any
from warnings import catch_warnings, simplefilter

import timm
import torch
from accelerate.utils import set_seed
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.utils.data import DataLoader, Dataset, RandomSampler, TensorDataset

import flatreg.models.cifar  # noqa: F401  # registers its networks with timm
from flatreg.data.images import Splits, physical_memory
from flatreg.data.streamed import StreamedImages
from flatreg.data.text import did_you_mean, one_line
from flatreg.models.entrance import check_classifier, non_finite_weight
from flatreg.models.hub import is_stored
from flatreg.models.normalize import with_normalization
from flatreg.models.pretrained import check_names, load_weights, pretrained_weights
from flatreg.models.state import untouched
from flatreg.optimizers.methods import wrap
from flatreg.run.checkpoints import load_checkpoint, read_built
from flatreg.run.fine_tuning import add_lora, body_of, merge_lora, set_up
from flatreg.run.recipe import Arm, Recipe
from flatreg.run.recipe_sections import Model, Optimizer
from flatreg.threat import to_unit_range

_MOST_MODULES = 10_000  # the largest models of timm have a third of it


class _TooManyModules(Exception):
    """Ends the building of a model."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Training:
    """What the training of one arm needs.

    Attributes:
        name: of the arm, for the progress bar and messages.
        arm: its manifolds are fitted.
        model: images in [0,1] to logits.
        optimizer: in the arm's wrapper if it has one.
        average: exponential moving average of the weights; None without `ema`.
        loader: shuffled micro-batches of the training images as they are stored, all of one size.
        shuffle: generator of the order in `loader`.
        schedule: of the learning rate, in updates.
        body: parameters outside the classifier, where some setting needs them: they are not updated
            in the first `head_updates` updates.
    """

    recipe: Recipe
    name: str
    arm: Arm
    splits: Splits
    model: nn.Module
    optimizer: torch.optim.Optimizer
    average: ModelEmaV3 | None
    loader: DataLoader[Any]
    shuffle: torch.Generator
    schedule: Scheduler
    body: list[nn.Parameter]
    head_updates: int

    @cached_property
    def network(self) -> Model:
        """The model as the recipe spells it, a stored one by its architecture."""
        return (self.arm.model or self.recipe.model).registered()[0]


def build_training(recipe: Recipe, name: str, arm: Arm, splits: Splits) -> Training:
    """Build what the training of `arm` needs, after `fit_manifolds`.

    Raises:
        ValueError: the batch is larger than the training split; timm has no such model or
            optimizer, or refuses its arguments; the model does not take these images; or it has
            no such scope for the wrapper.
    """
    if recipe.batch_size > len(splits.train):
        raise ValueError(
            f"batch_size: expected at most the {len(splits.train)} training images, "
            f"got {recipe.batch_size}"
        )
    network, spec, shuffle = arm.model or recipe.model, recipe.optimizer, torch.Generator()
    model, two = build_model(network, splits, seed=recipe.seed), splits.train.first(2)
    check_input(network.name, model, two)
    set_up(network, model)
    updates = len(splits.train) // recipe.batch_size  # an epoch; the images left over wait
    per_epoch, micro_batch = updates * recipe.batch_size, recipe.batch_size // recipe.accumulation
    if isinstance(splits.train, StreamedImages):
        changed = splits.train.augmented(recipe.augment.transforms())
        loader = changed.loader(micro_batch, count=per_epoch, generator=shuffle)
    else:
        wanted = arm.criterion is not None and "indices" in arm.criterion.requires
        train: Dataset[Any] = splits.train
        if wanted:
            everyone = torch.arange(len(splits.train))
            train = TensorDataset(splits.train.images, splits.train.labels, everyone)
        sampler = RandomSampler(splits.train, num_samples=per_epoch, generator=shuffle)
        loader = DataLoader(train, micro_batch, sampler=sampler)
    try:
        optimizer: torch.optim.Optimizer = create_optimizer_v2(
            model, opt=spec.name, lr=spec.lr, weight_decay=spec.weight_decay, **spec.args
        )
    except Exception as error:  # of any kind: it depends on the optimizer what args do to it
        raise ValueError(f"optimizer {spec.name}: {_told(error)}") from error
    if arm.wrapper:
        optimizer = wrap(arm.wrapper, optimizer, model, to_unit_range(two), updates)
    average = ModelEmaV3(model, decay=recipe.ema, use_warmup=True) if recipe.ema else None
    schedule, _ = create_scheduler_v2(
        optimizer,
        sched=spec.schedule,
        num_epochs=recipe.epochs,
        warmup_lr=0.0,
        warmup_epochs=spec.warmup_epochs,
        step_on_epochs=False,
        updates_per_epoch=updates,
        **spec.schedule_args,
    )
    if arm.wrapper and arm.wrapper.tail < 1:
        _refuse_a_tail_that_never_comes(arm.wrapper.tail, optimizer, schedule, recipe, updates)
    return Training(
        recipe=recipe,
        name=name,
        arm=arm,
        splits=splits,
        model=model,
        optimizer=optimizer,
        average=average,
        loader=loader,
        shuffle=shuffle,
        schedule=schedule,
        body=body_of(model) if spec.head_epochs or spec.clip_mode == "agc" else [],
        head_updates=round(spec.head_epochs * updates),
    )


def _refuse_a_tail_that_never_comes(
    tail: float, optimizer: torch.optim.Optimizer, schedule: Any, recipe: Recipe, updates: int
) -> None:
    """Refuse a tail that the learning rate, which falls after its warm-up, does not reach.

    Raises:
        ValueError: no step would be perturbed.
    """
    last = round(recipe.epochs * updates) - 1
    top = min(last, ceil(recipe.optimizer.warmup_epochs * updates))
    rates = []
    for update in (max(top - 1, 0), top, last, 0):  # and back to where it was
        schedule.step_update(update)
        rates.append(max(float(group["lr"]) for group in optimizer.param_groups))
    highest, end = max(rates[:2]), rates[2]
    if end > tail * highest:
        raise ValueError(
            f"wrapper: expected a learning rate that falls to tail={tail:g} of its highest, it "
            f"ends at {end / highest:.2g} of it: no step would be perturbed"
        )


def try_optimizer(spec: Optimizer) -> None:
    """Take a step of the optimizer on a few weights.

    Raises:
        ValueError: it does not take its arguments.
    """
    of_a_model = ("layer_decay", "fallback")  # about its layers and the names of its weights
    args = {key: value for key, value in spec.args.items() if not key.startswith(of_a_model)}
    device = "cuda" if torch.cuda.is_available() else "cpu"  # fused optimizers step on no other
    few = nn.Linear(3, 3, device=device)
    try:
        optimizer: torch.optim.Optimizer = create_optimizer_v2(
            few, opt=spec.name, lr=spec.lr, weight_decay=spec.weight_decay, **args
        )
        if getattr(optimizer, "is_second_order", False):
            raise ValueError("it needs second derivatives, and a recipe has none: choose another")
        few(torch.ones(2, 3, device=device))[:, :2].sum().backward()  # of one unit it is 0
        optimizer.step()
        if broken := non_finite_weight(few):
            raise ValueError(f"a step with a gradient of 0 leaves a {broken} that is not finite")
    except Exception as error:  # of any kind: it depends on the optimizer what args do to it
        raise ValueError(f"optimizer {spec.name}: {_told(error)}") from error


def build_model(spec: Model, splits: Splits, *, seed: int) -> nn.Module:
    """Create the model of a recipe for the images of `splits`, with the weights to start from.

    Raises:
        ValueError: as `create`, `load_weights` or `flatreg.run.fine_tuning.add_lora`.
    """
    set_seed(seed)
    model = create(spec, splits.num_classes, splits.channels, pretrained=spec.pretrained)
    if spec.weights is not None:
        load_weights(model, spec.weights, spec.weights_key)
    add_lora(spec, model)
    return model


def create(spec: Model, num_classes: int, channels: int, *, pretrained: bool) -> nn.Module:
    """Create a timm model, with the normalisation inside.

    Raises:
        ValueError: timm has no such model, it refuses the arguments, the weights cannot be had, or
            the normalisation is for another number of channels.
    """
    if is_stored(spec.name) and not pretrained:
        raise ValueError(f"model {spec.name}: expected the name of an architecture in timm")
    spec, stored = spec.registered()
    _refuse_too_large(spec, num_classes, channels)
    try:
        about = pretrained_weights(spec.name, stored) if pretrained else {}
        overlay = {"pretrained_cfg_overlay": about} if about else {}
        model = timm.create_model(
            spec.name,
            pretrained=pretrained,
            num_classes=num_classes,
            in_chans=channels,
            **overlay,
            **spec.args,
        )
        if stored is not None:
            check_names(model, about["state_dict"])
    except Exception as error:  # of any kind: it depends on the network what args do to it
        known = timm.is_model(spec.name.partition(".")[0])
        near = "" if known else did_you_mean(spec.name, timm.list_models())
        raise ValueError(f"model {spec.name}: {_told(error)}{near}") from error
    getattr(model, "pretrained_cfg", {}).pop("state_dict", None)  # loaded: a second copy is no use
    mean, std = spec.mean, spec.std
    if mean is None and std is None:  # what timm recorded, of whose channels the line below speaks
        mean, std = (getattr(model, "pretrained_cfg", {}).get(name) for name in ("mean", "std"))
    whole = with_normalization(model, mean, std)
    entries = whole.get_submodule("normalize").get_buffer("mean").numel()
    if entries not in (1, channels):
        raise ValueError(
            f"model {spec.name}: its normalisation has {entries} channels, the images have "
            f"{channels}: set mean and std to lists of {channels}"
        )
    return whole


def _refuse_too_large(spec: Model, num_classes: int, channels: int) -> None:
    """Refuse a model that takes more than half of the memory, or too long, before it is built."""
    modules = count()

    def enough(*_: Any) -> None:
        if next(modules) > _MOST_MODULES:
            raise _TooManyModules

    hook = register_module_module_registration_hook(enough)
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"), catch_warnings():
            simplefilter("ignore")
            model = timm.create_model(
                spec.name, num_classes=num_classes, in_chans=channels, **spec.args
            )
    except _TooManyModules:
        raise ValueError(
            f"model {spec.name}: expected at most {_MOST_MODULES:,} modules: choose a smaller one"
        ) from None
    except Exception:  # not every network can be built without values; what is wrong, `create` says
        return
    finally:
        hook.remove()
    needed = sum(p.numel() * p.element_size() for p in model.parameters())
    memory = physical_memory()
    if needed > memory / 2:
        raise ValueError(
            f"model {spec.name}: the weights take {needed / 2**30:.1f} GiB, more than half of this "
            f"machine's {memory / 2**30:.1f}: choose a smaller one"
        )


def check_input(name: str, model: nn.Module, images: Tensor) -> None:
    """Evaluate `model` on some stored images and leave no trace in it.

    Raises:
        ValueError: it does not take images of this shape, or does not return logits.
    """
    try:
        with untouched(model):
            check_classifier(model, to_unit_range(images))
    except ValueError:
        raise
    except Exception as error:  # of any kind: it depends on the network
        raise ValueError(
            f"model {name} does not take images of shape {tuple(images.shape[1:])}: {_told(error)}"
        ) from error


def _told(error: Exception) -> str:
    """What went wrong; the kind of error too, where the message alone says little."""
    text = one_line(error, 300)
    plain = isinstance(error, (AssertionError, OSError, RuntimeError, TypeError, ValueError))
    return text if plain and text else f"{type(error).__name__}: {text}"


def fit_manifolds(
    arm: Arm,
    images: Tensor | Callable[[], Tensor],
    known: dict[str, Any],
    folder: Path | None = None,
) -> Arm:
    """Fit the manifolds that the penalties of `arm` carry unfitted, to `images` `(n, ...)`.

    `images` may be a function, which is called where there is something to fit. `known` holds
    fitted manifolds by their configuration; new ones are added, so arms share a fit. Those that an
    earlier session left in `folder`, that of the arm, are read.

    Raises:
        ValueError: there are too few images for a manifold.
    """
    penalties: list[Any] = list(arm.penalties)
    for n, penalty in enumerate(penalties):
        manifold: Any = getattr(penalty, "manifold", None)
        if not hasattr(manifold, "fit") or manifold.fitted is not None:
            continue
        if repr(manifold) not in known:
            saved = folder and _manifold_file(folder, n)
            there = saved is not None and saved.exists()
            if there:
                known[repr(manifold)] = manifold.load(saved)
            else:
                images = images if isinstance(images, Tensor) else images()
                known[repr(manifold)] = manifold.fit(images)
        penalties[n] = replace(penalty, manifold=known[repr(manifold)])
    return arm.model_copy(update={"penalties": penalties})


def save_manifolds(arm: Arm, folder: Path) -> None:
    """Keep the fitted manifolds of `arm` in its folder, once."""
    for n, penalty in enumerate(arm.penalties):
        manifold: Any = getattr(penalty, "manifold", None)
        if hasattr(manifold, "save") and not _manifold_file(folder, n).exists():
            folder.mkdir(parents=True, exist_ok=True)
            manifold.save(_manifold_file(folder, n))


def _manifold_file(folder: Path, penalty: int) -> Path:
    return folder / f"manifold-{penalty}.safetensors"


def load_model(folder: str | Path) -> nn.Module:
    """Model that a run has trained, in eval mode on the CPU: images in [0,1] to logits.

    Its weights are those that the report evaluates, with adapters (`lora`) merged into them.
    Neither the data nor pretrained weights are needed. `folder` is that of an arm's checkpoints,
    `RUN/checkpoints/ARM`. The model's attribute `class_names` is a tuple of the names of its
    classes, None where the data have none.

    Raises:
        ValueError: there is no complete checkpoint, or it is of another model; it has adapters, and
            peft is not installed.
    """
    folder = Path(folder)
    built = read_built(folder)
    with torch.random.fork_rng(devices=[]):  # weights drawn only to be replaced
        model: Any = create(built.model, built.num_classes, built.channels, pretrained=False)
        add_lora(built.model, model)
    model.class_names = built.class_names
    try:
        found = load_checkpoint(folder, model)
    except RuntimeError as error:
        raise ValueError(f"{folder}: {one_line(error, None)}") from error
    if not found:
        raise ValueError(f"{folder}: found no complete checkpoint")
    if built.model.lora:
        merge_lora(model)
    evaluated: nn.Module = model.eval()
    return evaluated
