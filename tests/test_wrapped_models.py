"""The model beneath its wrappers: precision, compilation, shards; buffers and streams come back."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from cases import trained_net
from timm.utils import ModelEmaV3
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import TensorDataset

from flatreg import (
    AttackedAccuracy,
    Objective,
    RelativeFlatness,
    adaptive_attack_check,
    binarization_test,
    evaluate,
    find_head,
)
from flatreg.attacks import apgd, fmn, pgd, square
from flatreg.evaluation import attack_path
from flatreg.evaluation.geometry import measure
from flatreg.measures import (
    average_case_sharpness,
    hessian_top_eigenvalue,
    hessian_trace_estimate,
    layer_flatness,
    lipschitz_estimate,
    normal_trace,
    top_curvature,
    worst_case_sharpness,
)
from flatreg.models.forward import in_float32, local_module

QUIET = dict(progress=False, diagnose=False)


@pytest.fixture(scope="module")
def case():
    model, x, y = trained_net(n=80)
    return model, TensorDataset(x, y), x, y


def test_mixed_precision_is_seen_through_at_any_depth(case):
    model, data, x, _ = case
    prepared = Accelerator(mixed_precision="bf16", cpu=True).prepare(copy.deepcopy(model))
    wrappers = (
        ModelEmaV3(prepared),
        torch.optim.swa_utils.AveragedModel(prepared),
        nn.Sequential(nn.Identity(), prepared),
    )
    expected = model(x)
    for wrapped in wrappers:
        before = [dict(m.__dict__) for m in wrapped.modules()]
        assert not torch.equal(wrapped(x), expected)
        with in_float32(wrapped) as module:
            assert torch.equal(module(x), expected)
        assert [m.__dict__ for m in wrapped.modules()] == before
    seen = set()
    head = [m for m in prepared.modules() if isinstance(m, nn.Linear)][-1]
    hook = head.register_forward_hook(lambda *args: seen.add(args[2].dtype))
    result = evaluate(prepared, data, eps=0.03, attack="fast", **QUIET)
    adaptive_attack_check(prepared, data, result, steps=2, restarts=1, slices=0, progress=False)
    binarization_test(prepared, data, eps=0.1, attack="fast", samples=2, inner=5, progress=False)
    attack_path(prepared, x[:4], data.tensors[1][:4], eps=0.03)
    hook.remove()
    assert seen == {torch.float32}


def test_shards_of_fsdp2_are_refused_and_ddp_is_found_under_compile(case, tmp_path):
    _, data, _, _ = case
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        plain = trained_net(n=80)[0]
        nested = torch.compile(DistributedDataParallel(plain), backend="eager")
        assert local_module(nested) is plain
        with in_float32(nested) as module:
            assert module is plain
        sharded = fully_shard(trained_net(n=80)[0], mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(ValueError, match="whole weights, got a model under FSDP2") as error:
            evaluate(sharded, data, eps=0.03, attack="fast", **QUIET)
    finally:
        torch.distributed.destroy_process_group()
    assert "\n" not in str(error.value)


def test_buffers_and_streams_come_back(case):
    """Of a forward that counts its passes, in place and by a new tensor."""
    model, data, _, _ = case

    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model
            self.register_buffer("passes", torch.zeros(()))
            self.register_buffer("renewed", torch.zeros(()))

        def forward(self, x):
            self.passes += 1
            self.renewed = self.renewed + 1
            return self.model(x)

    counting = Counting()
    counting(data.tensors[0])
    kept = counting.renewed
    torch.manual_seed(5)
    state = torch.get_rng_state()
    evaluate(counting, data, eps=0.03, attack="fast", **QUIET)
    assert float(counting.passes) == 1 and counting.renewed is kept and float(kept) == 1
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
def test_a_callers_modes_of_autograd_change_nothing(case, around):
    """Lightning's test loop runs in inference mode, in which no graph can be built."""
    model, data, x, y = case
    short = TensorDataset(x[:8], y[:8])

    def results():
        result = evaluate(model, data, eps=0.03, attack="fast", progress=False)
        card = measure(model, short, eps=0.1, num_probes=2, progress=False)
        assert not card.refused
        check = adaptive_attack_check(
            model, data, result, steps=3, restarts=1, slices=1, progress=False
        )
        return (
            result.verdicts,
            result.findings,
            AttackedAccuracy(data, eps=0.03)(model, 0).verdicts,
            binarization_test(model, short, eps=0.1, attack="fast", inner=5, progress=False),
            attack_path(model, x[:8].clone(), y[:8].clone(), eps=0.03).loss.tolist(),
            (check.fooled_by_search, check.slices),
            repr((card.layers, card.curvature, card.kappa)),
            *(a(model, x.clone(), y.clone(), eps=0.03).fooled.tolist() for a in (pgd, apgd, fmn)),
        )

    expected = results()
    with torch.inference_mode():
        built = nn.Sequential(nn.Flatten(), nn.Linear(256, 5))
        with pytest.raises(ValueError, match=r"were made inside torch.inference_mode"):
            evaluate(built, data, eps=0.03, progress=False)
    with around():
        assert results() == expected
        assert torch.is_inference_mode_enabled() == (around is torch.inference_mode)


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
def test_a_callers_modes_of_autograd_change_no_measure(case, around):
    model, _, x, y = case

    def results():
        images, labels = x[:8].clone(), y[:8].clone()
        with torch.inference_mode(False):
            kept = labels.clone()  # a function of the caller's own is told what it may use
        loss = lambda at: F.cross_entropy(model(at), kept, reduction="none")  # noqa: E731
        return repr(
            (
                layer_flatness(model, images, labels, num_probes=2),
                hessian_trace_estimate(model, images, labels, num_probes=2),
                hessian_top_eigenvalue(model, images, labels, steps=3),
                worst_case_sharpness(model, [(images, labels)], rho=0.05),
                normal_trace(loss, images, num_probes=2).values.tolist(),
                top_curvature(loss, images, steps=3).values.tolist(),
                lipschitz_estimate(model, images, steps=3).value.tolist(),
            )
        )

    expected = results()
    with around():
        assert results() == expected
        assert torch.is_inference_mode_enabled() == (around is torch.inference_mode)
        assert not torch.is_grad_enabled()


class CastsItself(nn.Module):
    """Its layer runs in bfloat16; afterwards it may be as it was."""

    def __init__(self, restores):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.restores = nn.Linear(256, 5), restores

    def forward(self, x):
        self.layer.to(torch.bfloat16)
        logits = self.layer(x.flatten(1).bfloat16()).float()
        if self.restores:
            self.layer.float()
        return logits


@pytest.mark.parametrize("restores", [True, False])
def test_a_forward_that_casts_its_layers_is_judged_as_it_is(case, restores):
    _, data, x, y = case
    right = CastsItself(restores)(x).argmax(1) == y
    model = CastsItself(restores)
    options = dict(eps=0.01, attack="fast", **QUIET)
    blocks = evaluate(model, data, batch_size=4, **options)
    assert blocks.clean.value == float(right.double().mean())
    assert evaluate(model, data, **options).clean == blocks.clean
    assert measure(model, data, eps=0.01, parts=["kappa"], progress=False).kappa is not None


def test_curvature_in_weights_that_a_forward_casts_to_and_fro_is_refused(case):
    _, _, x, y = case
    for of in (layer_flatness, hessian_trace_estimate, hessian_top_eigenvalue):
        with pytest.raises(ValueError, match="layers that stay as they are in a pass"):
            of(CastsItself(True), x, y)
        of(CastsItself(False), x, y)  # its weights stay what the graph holds
    with pytest.raises(ValueError, match="layers that stay as they are in a pass"):
        worst_case_sharpness(CastsItself(True), [(x, y)], rho=0.05)


def test_a_forward_that_mixes_dtypes_is_refused_in_one_line(case):
    model, data, x, y = case

    class CastsImages(nn.Sequential):
        def forward(self, x):
            return super().forward(x.bfloat16()).float()

    half = CastsImages(nn.Flatten(), nn.Linear(256, 5)).bfloat16()
    double = copy.deepcopy(model).double()
    for call in (
        lambda: evaluate(half, data, eps=0.03, attack="fast", **QUIET),
        lambda: AttackedAccuracy(data, eps=0.03)(half, 0),
        lambda: measure(half, data, eps=0.03, progress=False),
        lambda: pgd(double, x, y, eps=0.03),
        lambda: hessian_trace_estimate(double, x, y),
    ):
        with pytest.raises(RuntimeError, match=r"a model of .* its pass mixes dtypes") as told:
            call()
        assert "\n" not in str(told.value)


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
@pytest.mark.parametrize("kind", ["script", "trace", "freeze", "DataParallel"])
def test_other_forms_of_a_module_are_judged_like_it(case, kind, tmp_path):
    model, data, x, y = case
    other = {
        "script": lambda: torch.jit.script(model),
        "trace": lambda: torch.jit.trace(model, x[:4]),
        "freeze": lambda: torch.jit.freeze(torch.jit.script(model)),
        "DataParallel": lambda: nn.DataParallel(model),
    }[kind]()
    options = dict(eps=0.03, attack="fast", progress=False)
    plain, found = evaluate(model, data, **options), evaluate(other, data, **options)
    assert found.verdicts == plain.verdicts
    assert evaluate(other, data, **options, folder=tmp_path).verdicts == plain.verdicts
    fooled = pgd(model, x, y, eps=0.03).fooled
    assert torch.equal(pgd(other, x, y, eps=0.03).fooled, fooled)
    card = measure(other, data, eps=0.1, probed=8, num_probes=2, progress=False)
    assert all("\n" not in reason for reason in card.refused.values())
    if kind == "DataParallel":
        assert not card.refused


def test_an_exported_program_is_refused_where_its_mode_counts(case):
    model, data, x, _ = case
    exported = torch.export.export(model, (x[:4],)).module()
    for entrance in (evaluate, measure):
        with pytest.raises(ValueError, match="give the module it was exported from"):
            entrance(exported, data, eps=0.03, progress=False)


class Keeping(nn.Module):
    """As the attention of timm's LeViT: keeps what it computes of a weight in eval mode."""

    def __init__(self, keeps):
        super().__init__()
        self.log_scale, self.keeps, self.kept = nn.Parameter(torch.full((), 0.3)), keeps, None

    def train(self, mode=True):
        super().train(mode)
        self.kept = None
        return self

    def forward(self, x):
        if self.training or not self.keeps:
            return x * self.log_scale.exp()
        self.kept = self.log_scale.exp() if self.kept is None else self.kept
        return x * self.kept


@pytest.mark.parametrize("mode", [False, True])
def test_what_a_module_keeps_of_its_weights_is_not_used_at_others(mode):
    x, y = torch.rand(6, 1, 4, 4), torch.arange(6) % 3
    torch.manual_seed(0)
    layers = nn.Flatten(), nn.Linear(16, 8), nn.SiLU(), Keeping(True), nn.Linear(8, 3)
    model = nn.Sequential(*layers).train(mode)
    twin = copy.deepcopy(model)
    twin[3].keeps = False

    def gradient(m):
        loss = Objective(m, None, RelativeFlatness()).bind(x, y)()
        return torch.autograd.grad(loss.total, m[3].log_scale)[0].item()

    measured = {
        "gradient": gradient,
        "average": lambda m: average_case_sharpness(m, [(x, y)], std=0.5, num_draws=3).value,
        "worst": lambda m: worst_case_sharpness(m, [(x, y)], rho=0.5, steps=3).value,
        "trace": lambda m: hessian_trace_estimate(m, x, y, num_probes=2).value,
        "top": lambda m: hessian_top_eigenvalue(m, x, y).value,
    }
    for name, take in measured.items():
        assert take(model) == pytest.approx(take(twin), rel=1e-4), name
        assert model[3].training is mode
        model.train(mode)  # as a loop does, before the next


def test_a_bfloat16_model_that_keeps_a_tensor_with_its_graph_is_judged():
    class KeepsFeatures(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(16, 3)

        def forward(self, x):
            self.features = self.layer(x.flatten(1))
            return self.features * 1

    model = KeepsFeatures().bfloat16()
    x, y = torch.rand(6, 1, 4, 4), torch.arange(6) % 3
    model(x.bfloat16())
    with in_float32(model) as module:
        assert module(x).dtype == torch.float32
    assert model.features.requires_grad and model.features.dtype == torch.bfloat16
    assert evaluate(model, TensorDataset(x, y), eps=0.03, attack="fast", **QUIET).n == 6


def test_a_module_that_merges_in_eval_mode_is_told_to_train_again():
    """As loralib's layers: merged in training mode, they would train nothing, in silence."""

    class Merging(nn.Linear):
        merged = False

        def train(self, mode=True):
            self.merged = not mode
            return super().train(mode)

    model = nn.Sequential(nn.Flatten(), Merging(16, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    model[2].eval()  # frozen
    find_head(model, torch.rand(2, 1, 4, 4))
    assert [m.training for m in model] == [True, True, False, True] and not model[1].merged


class Checkpointed(nn.Module):
    def __init__(self, model, reentrant):
        super().__init__()
        self.model, self.reentrant = model, reentrant

    def forward(self, x):
        inside = partial(checkpoint, self.model[:6], use_reentrant=self.reentrant)
        return self.model[6:](inside(x))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
def test_checkpoints_are_right_or_refused(case):
    """A reentrant one gives no gradient in the image, and hides the weights in it: those are 0."""
    model, data, x, y = case
    measured = {
        "evaluate": lambda m: evaluate(m, data, eps=0.03, attack="fast", progress=False).verdicts,
        "pgd": lambda m: pgd(m, x, y, eps=0.03).fooled.tolist(),
        "layers": lambda m: [
            layer.trace.value for layer in layer_flatness(m, x, y, num_probes=2).layers.values()
        ],
        "trace": lambda m: hessian_trace_estimate(m, x, y, num_probes=2).value,
        "sharpness": lambda m: worst_case_sharpness(m, [(x, y)], rho=0.05, steps=3).value,
    }
    sound, reentrant = Checkpointed(model, False), Checkpointed(model, True)
    for name, take in measured.items():
        assert take(sound) == pytest.approx(take(model), rel=1e-2), name
        with pytest.raises(ValueError, match="use_reentrant=True") as error:
            take(reentrant)
        assert "\n" not in str(error.value)
    card = measure(reentrant, data, eps=0.1, probed=8, num_probes=2, progress=False)
    assert {"kappa", "layers", "curvature"} <= set(card.refused)
    square_alone = dict(eps=0.03, attack=partial(square, queries=20), **QUIET)
    assert evaluate(reentrant, data, **square_alone).verdicts == (
        evaluate(model, data, **square_alone).verdicts
    )
