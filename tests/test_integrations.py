"""The wrapper inside other people's training loops: Lightning, Hugging Face's Trainer, timm."""

import copy
import gc
import warnings
from contextlib import nullcontext

import pytest
import timm
import torch
import torch.nn.functional as F
from by_hand import DECAY, METHODS, MOMENTUM, estimate, note_step
from cases import images, small_net
from oracles import set_gradient, two_pass_sam_step
from timm.optim import Lookahead, create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import flatreg
from flatreg.optimizers.sharpness_aware import find_wrapper

RHO = 0.1


def net():
    return small_net(batch_norm=False, dtype=torch.float64)


def samples(n):
    x, y = images(n)
    return x.double(), y


def sgd(model, lr=0.1):
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=1e-3)


def loss_of(model, x, y):
    return lambda: F.cross_entropy(model(x), y)


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def distance(a, b):
    return float((flat(a) - flat(b)).abs().max())


class Collected:
    """Stands in for the base optimizer of a SAM step: adds up the gradients it would step on."""

    def __init__(self, model):
        self.model = model
        self.sums = [torch.zeros_like(p) for p in model.parameters()]
        self.zero_grad = model.zero_grad

    def step(self):
        for total, p in zip(self.sums, self.model.parameters(), strict=True):
            total += p.grad


def accumulated_sam_step(model, base, closures, max_norm=None):
    """One step on the sum of the micro-batches' gradients, each perturbed along its own."""
    collected = Collected(model)
    for closure in closures:
        two_pass_sam_step(model, collected, RHO, closure)
    for p, total in zip(model.parameters(), collected.sums, strict=True):
        p.grad = total
    if max_norm is not None:
        nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    base.step()


# Lightning


@pytest.fixture
def lightning():
    return pytest.importorskip("lightning", reason="needs lightning")


quiet = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",
    "ignore:.*LeafSpec.* is deprecated",
    "ignore:GPU available but not used",
)


SILENT = {
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def fit(lightning, module, batches, **options):
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        **(SILENT | options),
    )
    trainer.fit(module, DataLoader(TensorDataset(*samples(4 * batches)), batch_size=4))
    return trainer


def micro_batches(batches):
    return zip(*(t.split(4) for t in samples(4 * batches)), strict=True)


def automatic(lightning):
    class Automatic(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = net()

        def configure_optimizers(self):
            sam = flatreg.SAM(sgd(self), rho=RHO)
            schedule = torch.optim.lr_scheduler.StepLR(sam, 1, 0.8)
            return [sam], [{"scheduler": schedule, "interval": "step"}]

        def training_step(self, batch, index):
            return F.cross_entropy(self.net(batch[0]), batch[1])

    return Automatic()


def manual(lightning, *, facade, every=2):
    class Manual(lightning.LightningModule):
        automatic_optimization = False

        def __init__(self):
            super().__init__()
            self.net = net()

        def configure_optimizers(self):
            return flatreg.SAM(sgd(self), rho=RHO)

        def training_step(self, batch, index):
            x, y = batch
            optimizer = self.optimizers(use_pl_optimizer=facade)
            flatreg.backward(optimizer, lambda: F.cross_entropy(self.net(x), y) / every, model=self)
            if (index + 1) % every == 0:
                optimizer.step()
                optimizer.zero_grad()

    return Manual()


@quiet
def test_lightning_automatic_optimisation_takes_both_passes(lightning):
    module, theirs = automatic(lightning), net()
    trainer = fit(lightning, module, 6)
    reference = sgd(theirs)
    for x, y in micro_batches(6):
        two_pass_sam_step(theirs, reference, RHO, loss_of(theirs, x, y))
        reference.param_groups[0]["lr"] *= 0.8
    assert trainer.global_step == 6
    assert trainer.optimizers[0].base.param_groups[0]["lr"] == pytest.approx(0.1 * 0.8**6)
    assert distance(module.net, theirs) < 1e-12
    assert distance(theirs, net()) > 1e-2


@quiet
def test_lightning_automatic_accumulation_names_the_way_out(lightning):
    with pytest.raises(RuntimeError, match=r"flatreg\.backward"):
        fit(lightning, automatic(lightning), 2, accumulate_grad_batches=2)


@quiet
@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize(
    "facade",
    [pytest.param(True, id="LightningOptimizer"), pytest.param(False, id="its own")],
)
def test_lightning_manual_optimisation(lightning, facade, every):
    module, theirs = manual(lightning, facade=facade, every=every), net()
    trainer = fit(lightning, module, 6)
    reference, batches = sgd(theirs), list(micro_batches(6))
    for start in range(0, 6, every):
        closures = [
            lambda x=x, y=y: F.cross_entropy(theirs(x), y) / every
            for x, y in batches[start : start + every]
        ]
        accumulated_sam_step(theirs, reference, closures)
    assert distance(module.net, theirs) < 1e-12
    assert distance(theirs, net()) > 1e-2
    if facade:  # Lightning counts the steps of its own wrapper only
        assert trainer.global_step == 6 // every


@quiet
@pytest.mark.parametrize("method", METHODS)
def test_lightning_resumes_bit_for_bit(lightning, method, tmp_path):
    class Module(type(automatic(lightning))):
        def configure_optimizers(self):
            return METHODS[method](torch.optim.AdamW(self.parameters(), lr=1e-2), self.net)

    batches = [*micro_batches(6)]
    trained = []
    for parts in ([batches], [batches[:3], batches[3:]]):
        module, path = Module(), None
        for epoch, part in enumerate(parts):
            trainer = lightning.Trainer(
                accelerator="cpu", max_epochs=epoch + 1, logger=False, **SILENT, deterministic=True
            )
            trainer.fit(module, DataLoader(part, batch_size=None), ckpt_path=path)
            trainer.save_checkpoint(path := tmp_path / "half.ckpt")
            trained.append(module.net)
            module = Module()
    assert torch.equal(flat(trained[0]), flat(trained[-1]))
    assert not torch.equal(flat(trained[0]), flat(trained[1]))


@quiet
@pytest.mark.parametrize("clip", ["norm", "value"])
@pytest.mark.parametrize("method", METHODS)
def test_lightning_clips_the_gradient_that_is_stepped_on_alone(lightning, method, clip):
    """Inside its closure: clipped there, a first gradient gives another direction and mixture."""

    class Module(type(automatic(lightning))):
        def configure_optimizers(self):
            base = torch.optim.SGD(self.parameters(), lr=0.2, momentum=MOMENTUM)
            optimizer = METHODS[method](base, self.net)
            schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, DECAY)
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    module, theirs, memory = Module(), net(), {}
    limit = 0.3 if clip == "norm" else 0.01
    fit(lightning, module, 3, gradient_clip_val=limit, gradient_clip_algorithm=clip)
    reference = torch.optim.SGD(theirs.parameters(), lr=0.2, momentum=MOMENTUM)
    changed = []
    for step, (x, y) in enumerate(micro_batches(3)):
        loss = lambda m, x=x, y=y: F.cross_entropy(m(x), y)  # noqa: E731
        set_gradient(theirs, estimate(method, theirs, loss, step, memory))
        before = [p.grad.clone() for p in theirs.parameters()]
        if clip == "norm":
            nn.utils.clip_grad_norm_(theirs.parameters(), limit)
        else:
            nn.utils.clip_grad_value_(theirs.parameters(), limit)
        pairs = zip(before, theirs.parameters(), strict=True)
        changed += [not torch.equal(a, p.grad) for a, p in pairs]
        note_step(theirs, memory)
        reference.step()
        reference.param_groups[0]["lr"] *= DECAY
    assert any(changed)
    assert distance(module.net, theirs) < 1e-7 * distance(theirs, net())


@quiet
def test_lightning_moves_statistics_once(lightning):
    class Module(type(automatic(lightning))):
        def __init__(self):
            super().__init__()
            self.net = small_net(dtype=torch.float64)

    module, theirs = Module(), small_net(dtype=torch.float64)
    fit(lightning, module, 3)
    reference = sgd(theirs)
    for x, y in micro_batches(3):
        gradient = estimate("SAM", theirs, lambda m, x=x, y=y: F.cross_entropy(m(x), y), 0, {})
        theirs(x)  # the pass whose statistics count
        set_gradient(theirs, gradient)
        reference.step()
        reference.param_groups[0]["lr"] *= 0.8
    assert distance(module.net, theirs) < 1e-10
    for name, buffer in theirs.named_buffers():
        torch.testing.assert_close(module.net.get_buffer(name), buffer)
    assert int(theirs[1].num_batches_tracked) == 3


@quiet
def test_the_wrapper_is_found_inside_lightnings(lightning):
    found = {}

    class Module(type(manual(lightning, facade=True))):
        def training_step(self, batch, index):
            found["wrapper"] = find_wrapper(self.optimizers())

    trainer = fit(lightning, Module(), 1)
    assert found["wrapper"] is trainer.optimizers[0]


@quiet
def test_after_the_training_the_optimizer_steps_in_a_plain_loop(lightning):
    """Lightning's wrapper refers to a strategy that is gone."""
    module = manual(lightning, facade=True, every=1)
    fit(lightning, module, 1)
    optimizer = module.optimizers()
    module._trainer = None
    gc.collect()
    (x, y), theirs = samples(4), copy.deepcopy(module.net)
    flatreg.backward(optimizer, loss_of(module.net, x, y), model=module.net)
    expected = estimate("SAM", theirs, lambda m: F.cross_entropy(m(x), y), 0, {})
    torch.testing.assert_close(torch.cat([p.grad.flatten() for p in module.parameters()]), expected)


def test_fabric(lightning):
    ours, theirs, (x, y) = net(), net(), samples(8)
    fabric = lightning.Fabric(accelerator="cpu")
    model, optimizer = fabric.setup(ours, flatreg.SAM(sgd(ours), rho=RHO))
    reference = sgd(theirs)
    for _ in range(3):
        flatreg.backward(optimizer, loss_of(model, x, y), model=model)
        optimizer.step()
        optimizer.zero_grad()
        two_pass_sam_step(theirs, reference, RHO, loss_of(theirs, x, y))
    assert distance(ours, theirs) < 1e-12


def scaled_precision(lightning, plugin):
    """The scaling of "16-mixed", which wants a GPU, in the precision of the weights."""

    class Scaled(plugin):
        def __init__(self):
            super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))

        def forward_context(self):
            return nullcontext()

        def convert_input(self, data):
            return data

        convert_output = convert_input

    return Scaled()


@quiet
@pytest.mark.parametrize("method", ["SAM", "FriendlySAM", "GSAM", "head"])
@pytest.mark.parametrize("model", ["self", "self.net", "Fabric"])
def test_a_loss_scale_of_lightnings_changes_nothing(lightning, model, method):
    weights = []
    for scaled in (False, True):
        if model == "Fabric":
            from lightning.fabric.plugins import MixedPrecision

            ours = net()
            plugins = [scaled_precision(lightning, MixedPrecision)] if scaled else []
            fabric = lightning.Fabric(accelerator="cpu", plugins=plugins)
            prepared, optimizer = fabric.setup(ours, METHODS[method](sgd(ours), ours))
            for x, y in micro_batches(3):
                closure = loss_of(prepared, x, y)
                flatreg.backward(optimizer, closure, model=prepared, accelerator=fabric)
                optimizer.step()
                optimizer.zero_grad()
            weights.append(flat(ours))
            continue
        from lightning.pytorch.plugins import MixedPrecision

        class Module(type(manual(lightning, facade=True))):
            def configure_optimizers(self):
                return METHODS[method](sgd(self.net), self.net)

            def training_step(self, batch, index):
                optimizer = self.optimizers()
                closure = loss_of(self.net, *batch)
                chosen = self if model == "self" else self.net
                flatreg.backward(optimizer, closure, model=chosen)
                optimizer.step()
                optimizer.zero_grad()

        module = Module()
        plugins = [scaled_precision(lightning, MixedPrecision)] if scaled else []
        fit(lightning, module, 3, plugins=plugins)
        weights.append(flat(module.net))
    torch.testing.assert_close(*weights, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(weights[0], flat(net()), rtol=1e-3)


# Hugging Face's Trainer


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers", reason="needs transformers")


class Classifier(nn.Module):
    """Returns a mean loss, as does a model that knows nothing of accumulation."""

    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, x, labels=None):
        logits = self.net(x)
        if labels is None:
            return {"logits": logits}
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class CountingClassifier(Classifier):
    """Divides by the samples of all micro-batches of a step, as do the models of transformers."""

    def forward(self, x, labels=None, num_items_in_batch=None, **kwargs):
        logits = self.net(x)
        return {"loss": summed({"logits": logits}, labels, num_items_in_batch), "logits": logits}


def summed(outputs, labels, num_items_in_batch):
    return F.cross_entropy(outputs["logits"], labels, reduction="sum") / num_items_in_batch


def sharpness_aware(trainer):
    """`trainer`, a class, with the override that the documentation gives."""

    class SharpnessAwareTrainer(trainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            model.train()
            inputs = self._prepare_inputs(inputs)

            def closure():
                with self.compute_loss_context_manager():
                    loss = self.compute_loss(  # which may take the labels out of its dict
                        model, dict(inputs), num_items_in_batch=num_items_in_batch
                    )
                if num_items_in_batch is None:  # otherwise the loss is divided already
                    loss = loss / self.current_gradient_accumulation_steps
                return loss

            return flatreg.backward(
                self.optimizer, closure, model=model, accelerator=self.accelerator
            )

    return SharpnessAwareTrainer


def trainer_of(transformers, folder, kind, model, optimizer, schedule=None, n=24, **options):
    x, y = samples(n)
    settings = {
        "use_cpu": True,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 1,
        "max_grad_norm": 0.5,
        "train_sampling_strategy": "sequential",
        "report_to": [],
        "logging_strategy": "no",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    keep = {k: options.pop(k) for k in ("compute_loss_func",) if k in options}
    return kind(
        model=model,
        args=transformers.TrainingArguments(output_dir=str(folder), **(settings | options)),
        train_dataset=[{"x": a, "labels": b} for a, b in zip(x, y, strict=True)],
        optimizers=(optimizer, schedule),
        **keep,
    )


# Of 18 samples the last step has one micro-batch of two; of 22, one of four and one of two.
LOSSES = {
    "mean": (Classifier, {}, 18),
    "num_items_in_batch": (CountingClassifier, {}, 22),
    "compute_loss_func": (Classifier, {"compute_loss_func": summed}, 22),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_trainer_with_accumulation_clipping_and_a_scheduler(transformers, loss, tmp_path):
    kind, options, n = LOSSES[loss]
    model, theirs = kind(), net()
    sam = flatreg.SAM(sgd(model), rho=RHO)
    schedule = torch.optim.lr_scheduler.StepLR(sam, 1, 0.5)
    trainer = trainer_of(
        transformers,
        tmp_path,
        sharpness_aware(transformers.Trainer),
        model,
        sam,
        schedule,
        n,
        **options,
    )
    trainer.train()
    assert trainer.state.global_step == 3 and schedule.last_epoch == 3
    assert sam.base.param_groups[0]["lr"] == pytest.approx(0.1 / 8)

    reference, (x, y) = sgd(theirs), samples(n)
    for a, b in zip(x.split(8), y.split(8), strict=True):
        parts = list(zip(a.split(4), b.split(4), strict=True))
        weights = [1 / len(parts) if loss == "mean" else len(q) / len(b) for _, q in parts]
        closures = [
            lambda p=p, q=q, w=w: w * F.cross_entropy(theirs(p), q)
            for (p, q), w in zip(parts, weights, strict=True)
        ]
        accumulated_sam_step(theirs, reference, closures, max_norm=0.5)
        reference.param_groups[0]["lr"] *= 0.5
    assert distance(model.net, theirs) < 1e-12
    assert distance(theirs, net()) > 1e-2


@pytest.mark.parametrize("method", METHODS)
def test_trainer_resumes_bit_for_bit_with_its_own_scheduler(method, transformers, tmp_path):
    """The Trainer makes its scheduler on the wrapper."""

    def run(name, resume=None):
        model = Classifier()
        base = torch.optim.AdamW(model.parameters(), lr=1e-2)
        trainer = trainer_of(
            transformers,
            tmp_path / name,
            sharpness_aware(transformers.Trainer),
            model,
            METHODS[method](base, model.net),
            n=32,
            save_strategy="steps",
            save_steps=2,
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer, model

    first, straight = run("straight")
    again, resumed = run("resumed", str(tmp_path / "straight" / "checkpoint-2"))
    assert first.state.global_step == again.state.global_step == 4
    assert torch.equal(flat(straight), flat(resumed))
    assert first.optimizer.param_groups[0]["lr"] == 0  # linear to the end, by default
    assert find_wrapper(first.optimizer) is first.optimizer.optimizer


def test_trainer_without_the_override_warns_that_it_trains_plainly(transformers, tmp_path):
    model, plain = Classifier(), Classifier()
    sam = flatreg.SAM(sgd(model), rho=RHO)
    trainer = trainer_of(transformers, tmp_path / "sam", transformers.Trainer, model, sam)
    with pytest.warns(UserWarning, match="steps on gradients that loss.backward") as caught:
        trainer.train()
    assert len(caught) == 1 and trainer.state.global_step == 3
    trainer_of(transformers, tmp_path / "plain", transformers.Trainer, plain, sgd(plain)).train()
    assert torch.equal(flat(model), flat(plain))
    with warnings.catch_warnings():  # and the override says nothing
        warnings.simplefilter("error")
        trainer_of(
            transformers,
            tmp_path / "aware",
            sharpness_aware(transformers.Trainer),
            model,
            flatreg.SAM(sgd(model), rho=RHO),
        ).train()


# timm


def test_timms_layer_decay_and_scheduler_on_the_wrapper():
    x, y = images(8, size=32)
    x = x.double()

    def parts():
        torch.manual_seed(0)
        model = timm.create_model("test_convnext3", num_classes=5, in_chans=1).double()
        return model, create_optimizer_v2(
            model, "momentum", lr=0.1, weight_decay=0.05, layer_decay=0.5
        )

    (ours, base), (theirs, reference) = parts(), parts()
    sam = flatreg.SAM(base, rho=RHO)
    settings = {"sched": "cosine", "num_epochs": 4, "warmup_epochs": 1, "warmup_lr": 0.01}
    schedule, _ = create_scheduler_v2(sam, **settings)
    expected, _ = create_scheduler_v2(reference, **settings)
    seen = []
    for epoch in range(4):
        flatreg.backward(sam, loss_of(ours, x, y), model=ours)
        sam.step()
        sam.zero_grad()
        two_pass_sam_step(theirs, reference, RHO, loss_of(theirs, x, y))
        schedule.step(epoch + 1)
        expected.step(epoch + 1)
        seen.append([g["lr"] for g in base.param_groups])
        assert seen[-1] == [g["lr"] for g in reference.param_groups]
    assert len({g["lr_scale"] for g in base.param_groups}) > 2
    assert len({lrs[-1] for lrs in seen}) == 4 and len(set(seen[0])) > 2
    assert distance(ours, theirs) < 1e-10
    assert distance(ours, parts()[0]) > 1e-2


def lookahead_of_sam_steps(model, steps, k, alpha, x, y):
    """Every k steps the slow weights go to the fast ones by alpha, and the fast ones there.

    timm starts the slow weights at the first synchronisation, so the second is the first to act.
    """
    base, slow = sgd(model), None
    for step in range(1, steps + 1):
        two_pass_sam_step(model, base, RHO, loss_of(model, x, y))
        if step % k == 0:
            fast = [p.detach().clone() for p in model.parameters()]
            slow = [s.lerp(f, alpha) for s, f in zip(slow or fast, fast, strict=True)]
            for p, s in zip(model.parameters(), slow, strict=True):
                p.data.copy_(s)


LOOKAHEAD = {
    "inside": lambda m: flatreg.SAM(Lookahead(sgd(m), alpha=0.5, k=3), rho=RHO),
    "around": lambda m: Lookahead(flatreg.SAM(sgd(m), rho=RHO), alpha=0.5, k=3),
}


def closure_of(optimizer, model, x, y):
    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    return closure


@pytest.mark.parametrize(
    ("where", "by_step"),
    [
        pytest.param("inside", False, id="inside, backward"),
        pytest.param("inside", True, id="inside, step(closure)"),
        pytest.param("around", False, id="around, backward"),
        pytest.param("around", True, id="around, step(closure)"),
    ],
)
def test_timms_lookahead_in_both_orders_through_a_checkpoint(where, by_step):
    (x, y), model, theirs, plain = samples(8), net(), net(), net()
    optimizer = LOOKAHEAD[where](model)
    for step in range(8):
        if step == 4:  # between two synchronisations
            saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
            model = net()
            optimizer = LOOKAHEAD[where](model)
            model.load_state_dict(saved[0])
            optimizer.load_state_dict(saved[1])
        if by_step:
            optimizer.step(closure_of(optimizer, model, x, y))
        else:
            flatreg.backward(optimizer, loss_of(model, x, y), model=model)
            optimizer.step()
            optimizer.zero_grad()
    lookahead_of_sam_steps(theirs, 8, 3, 0.5, x, y)
    lookahead_of_sam_steps(plain, 8, 9, 0.5, x, y)
    assert distance(model, theirs) < 1e-12
    assert distance(theirs, plain) > 1e-2
