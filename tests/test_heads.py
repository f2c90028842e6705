import math

import pytest
import timm
import torch
import torch.nn.functional as F
from cases import images, small_net, timm_net
from oracles import relative_flatness_by_hessian
from torch import nn

from flatreg.measures.relative_flatness import relative_flatness
from flatreg.models.forward import run_forward
from flatreg.models.heads import find_head
from flatreg.optimizers.methods import HeadRelativeSAM
from flatreg.terms.flatness import RelativeFlatness
from flatreg.terms.objective import Objective

SINGLE = {
    "test_resnet": "fc",
    "test_convnext3": "head.fc",
    "test_vit": "head",
    "test_efficientnet": "classifier",
    "test_nfnet": "head.fc",
    "test_mambaout": "head.fc",
    "mobilenetv4_conv_small": "classifier",  # timm's own Linear
    "lcnet_035": "classifier",
    "ghostnet_050": "classifier",
    "starnet_s050": "head",
    "regnety_002": "head.fc",
    "xcit_nano_12_p16_224": "head",
    "efficientvit_b0": "head.classifier.4",
    "efficientvit_m0": "head.linear",  # NormLinear
    "iformer_t": "head.head.l",
    "resnetv2_18": "head.fc",  # a 1x1 convolution, as in the next two
    "dla46_c": "fc",
    "dpn48b": "classifier",
    "convformer_s18": "head.fc.fc2",  # MlpHead
    "sequencer2d_s": "head.fc",
}
MEANS = {
    "deit_tiny_distilled_patch16_224": "head+head_dist",
    "pit_ti_distilled_224": "head+head_dist",
    "efficientformerv2_s0": "head+head_dist",
    "swiftformer_xs": "head+head_dist",
    "levit_128s": "head.linear+head_dist.linear",
    "crossvit_tiny_240": "head.0+head.1",
    "repvit_m0_9": "head.head.l+head.head_dist.l",
}


def build(name):
    """A timm model of 7 classes with images as small as it takes."""
    if not timm.is_model(name):
        pytest.skip(f"this timm has no {name}")
    fixed = timm.get_pretrained_cfg(name).fixed_input_size
    size = 240 if name.startswith("crossvit") else 64
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7, **({"img_size": size} if fixed else {}))
    return model.eval(), torch.rand(2, 3, size, size)


def draw_anew(head, features):
    """Logits of order one, whatever the model's first weights and features are."""
    with torch.no_grad():
        for p in head.parameters():
            p.normal_(std=0.5 if p.ndim == 1 else float(1 / features.norm(dim=1).mean()))


def kappa_by_columns(feature, weight, bias, label):
    """Sum of <w_s, w_s'> Tr H_ss', the trace summed over the Hessians of single columns."""

    def loss(column, old, phi):
        return F.cross_entropy(F.linear(feature, weight, bias) + (column - old) * phi, label)

    columns = weight.T.contiguous()
    blocks = torch.func.vmap(torch.func.jacrev(torch.func.grad(loss)))(columns, columns, feature)
    return ((weight @ weight.T) * blocks.sum(0)).sum()


@torch.no_grad()
@pytest.mark.parametrize(("name", "path"), (SINGLE | MEANS).items())
def test_the_head_of_a_timm_family_is_found_and_right(name, path):
    model, x = build(name)
    labels = torch.tensor([1, 2])
    head = find_head(model, x)
    assert head.name == path
    draw_anew(head, run_forward(model, x, labels, head).features)
    at = run_forward(model, x, labels, head)
    in_training = run_forward(model.train(), x, labels, head)
    for forward in (at, in_training):
        remade = forward.features @ head.weight.T + (0 if head.bias is None else head.bias)
        assert forward.logits.abs().max() > 0.1
        torch.testing.assert_close(remade, forward.logits, rtol=1e-4, atol=1e-5)
    phi, weight = at.features.double(), head.weight.double()
    bias = torch.zeros(7).double() if head.bias is None else head.bias.double()
    kappa = relative_flatness(phi, F.linear(phi, weight, bias), weight)
    for i in range(2):
        oracle = kappa_by_columns(phi[i], weight, bias, labels[i])
        assert torch.isclose(kappa[i], oracle, rtol=1e-10)


def test_kappa_of_captured_features_equals_autograd():
    """The gradient of the loss in the head's weight, differentiated once more, sample by sample."""
    model, (x, y) = small_net().double().eval(), images(2)
    head = find_head(model, x.double())
    at = run_forward(model, x.double(), y, head)
    kappa = relative_flatness(at.features, at.logits, at.weight).detach()
    for i in range(2):
        args = at.features[i].detach(), at.weight.detach(), head.layer.bias.detach(), y[i]
        assert torch.isclose(kappa[i], relative_flatness_by_hessian(*args), rtol=1e-10)


def test_a_subclass_of_linear_passes():
    class Linear(nn.Linear):
        pass

    model = nn.Sequential(nn.Flatten(), Linear(256, 5))
    assert find_head(model, images()[0]).layer is model[1]


def test_a_head_that_is_called_by_keyword_is_found_and_captured():
    class Named(nn.Linear):
        def __call__(self, x):
            return super().__call__(input=x)

    torch.manual_seed(0)
    model, (x, y) = nn.Sequential(nn.Flatten(), Named(256, 5)), images()
    assert find_head(model, x).layer is model[1]
    kappa = Objective(model, None, RelativeFlatness())(x, y).parts["RelativeFlatness"]
    plain = nn.Sequential(nn.Flatten(), nn.Linear(256, 5))
    plain.load_state_dict(model.state_dict())
    assert kappa == Objective(plain, None, RelativeFlatness())(x, y).parts["RelativeFlatness"]


class TwoHeads(nn.Module):
    """logits = share a(x) + (1 - share) b(x)."""

    def __init__(self, share=0.5, zero=False):
        super().__init__()
        self.a, self.b, self.share = nn.Linear(256, 5), nn.Linear(256, 5, bias=False), share
        if zero:
            for p in self.parameters():
                nn.init.zeros_(p)

    def forward(self, x):
        return self.share * self.a(x.flatten(1)) + (1 - self.share) * self.b(x.flatten(1) ** 2)


class MainAndAuxiliary(TwoHeads):
    """As VOLO adds the auxiliary head to the one of the class token."""

    def forward(self, x):
        return self.a(x.flatten(1)) + 0.5 * self.b(x.flatten(1))


class Mixture(TwoHeads):
    """A mixture that is learned, and starts as the mean."""

    def __init__(self):
        super().__init__()
        self.mixing = nn.Parameter(torch.zeros(2))

    def forward(self, x):
        first, second = self.mixing.softmax(0)
        return first * self.a(x.flatten(1)) + second * self.b(x.flatten(1))


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.head, self.scale = nn.Linear(256, 5), nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.scale * self.head(x.flatten(1))


class Pooled(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        return self.head(x[:, 0]).mean(1)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(256, 256)

    def forward(self, x):
        return self.head(self.head(x.flatten(1)))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (TwoHeads(0.3), r"\(b\) does not reproduce the logits"),
        (TwoHeads(0.3, zero=True), r"does not make the logits alone: off by"),
        (MainAndAuxiliary(zero=True), "does not make the logits alone: off by"),
        (Mixture(), r"\(a\+b\) does not make the logits alone: they depend on mixing"),
        (Scaled(), "they depend on scale"),
        (Pooled(), r"maps \(2, 16, 16\) to 5 outputs"),
        (Twice(), "called more than once"),
        (nn.Sequential(nn.Conv2d(1, 5, 16), nn.Flatten()), "was not called"),
        (nn.Sequential(nn.Linear(16, 5)), r"\(batch, classes\), the model returns"),
        (nn.Sequential(nn.Flatten(), nn.Linear(256, 9), nn.Softmax(1)), "does not reproduce"),
    ],
)
def test_refuses_with_the_reason(model, reason):
    with pytest.raises(ValueError, match=reason) as error:
        find_head(model, images()[0])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("volo_d1_224", r"\(aux_head\)"), ("efficientvim_m1", "they depend on weights")],
)
def test_refuses_timm_models_whose_logits_are_no_mean_of_linear_maps(name, reason):
    with pytest.raises(ValueError, match=reason):
        find_head(*build(name))


def test_a_mean_of_heads_is_one_linear_map_of_their_inputs_side_by_side():
    model, (x, y) = TwoHeads(), images(4)
    head = find_head(model, x)
    assert head.branches == (model.a, model.b) and head.names == ("a", "b")
    at = run_forward(model, x, y, head)
    assert torch.equal(at.features, torch.cat([x.flatten(1), x.flatten(1) ** 2], 1))
    torch.testing.assert_close(at.features @ head.weight.T + head.bias, at.logits)
    at.weight[:, 256:].sum().backward()
    assert model.a.weight.grad.count_nonzero() == 0
    assert torch.equal(model.b.weight.grad, torch.full((5, 256), 0.5))
    assert {id(p) for p in head.parameters()} == {id(p) for p in model.parameters()}


def test_kappa_of_a_mean_is_that_of_the_loss_in_the_weights_of_both_heads():
    """Through the model: the effective weight is half of each, so each is twice its half."""
    torch.manual_seed(0)
    model = TwoHeads().double()
    model.a, model.b = nn.Linear(3, 4).double(), nn.Linear(3, 4, bias=False).double()
    x, label = torch.rand(1, 3).double(), torch.tensor([1])
    head = find_head(model, x)

    def loss(weight):
        moved = {"a.weight": 2 * weight[:, :3], "b.weight": 2 * weight[:, 3:]}
        return F.cross_entropy(torch.func.functional_call(model, moved, x), label)

    weight = head.weight.detach()
    hessian = torch.autograd.functional.hessian(loss, weight)
    traces = torch.einsum("siti->st", hessian)
    at = run_forward(model, x, label, head)
    kappa = relative_flatness(at.features, at.logits, at.weight)[0]
    torch.testing.assert_close(kappa, ((weight @ weight.T) * traces).sum(), rtol=1e-10, atol=0)


def test_heads_that_start_at_zero_are_told_apart():
    """All of them return the logits then; only both together make them."""
    assert find_head(TwoHeads(zero=True), images()[0]).names == ("a", "b")


def test_a_convolution_of_one_pixel_is_a_linear_map():
    model = nn.Sequential(nn.AvgPool2d(4), nn.Conv2d(1, 6, 4), nn.Conv2d(6, 5, 1), nn.Flatten())
    x, y = images(3)
    head = find_head(model, x)
    assert head.layer is model[2] and head.weight.shape == (5, 6)
    at = run_forward(model, x, y, head)
    assert at.features.shape == (3, 6)
    torch.testing.assert_close(at.features @ head.weight.T + head.bias, at.logits)
    torch.testing.assert_close(at.through_head().logits, at.logits)


def test_a_convolution_standardised_in_its_forward_is_refused():
    """Its weight is not the linear map."""

    class Standardised(nn.Conv2d):
        def forward(self, x):
            return F.conv2d(x, self.weight - self.weight.mean(), self.bias)

    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), Standardised(1, 5, 1), nn.Flatten())
    with pytest.raises(ValueError, match="does not reproduce the logits"):
        find_head(model, images()[0])


@pytest.mark.parametrize("model", [TwoHeads(), small_net()], ids=["mean", "one"])
def test_the_head_evaluated_anew_sees_the_weights_of_now(model):
    x, y = images(4)
    head = find_head(model.eval(), x)
    at = run_forward(model, x, y, head)
    torch.testing.assert_close(at.through_head().logits, at.logits)
    with torch.no_grad():
        for p in head.parameters():
            p += 0.1 * torch.randn_like(p)
    torch.testing.assert_close(at.through_head().logits, model(x))
    assert (at.logits - model(x)).abs().max() > 0.1


def test_two_heads_are_perturbed_on_one_pass():
    model, (x, y) = TwoHeads(), images(4)
    head, objective = find_head(model, x), Objective(model)
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = HeadRelativeSAM(base, head.layer, rho=0.1)
    scope = optimizer.parameters(perturbed=True)
    assert {id(p) for p in scope} == {id(p) for p in head.parameters()}
    now, moved = objective.bind(x, y).at_head(list(head.parameters()))
    before = now().total
    with torch.no_grad():
        model.b.weight.mul_(-3)
    torch.testing.assert_close(moved().total, objective(x, y).total)
    assert (moved().total - before).abs() > 1e-3


@pytest.mark.parametrize("calls", [0, 2])
def test_a_layer_of_the_head_runs_once_in_a_pass(calls):
    model, (x, y) = TwoHeads(), images(2)
    head = find_head(model, x)
    model.forward = lambda x: (
        model.a(x.flatten(1)) + sum(model.b(x.flatten(1)) for _ in range(calls))
    )
    with pytest.raises(ValueError, match=f"'b' must run once in a pass, it ran {calls} times"):
        run_forward(model, x, y, head)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_a_model_in_distilled_training_is_refused_in_one_line():
    model, x = build("deit_tiny_distilled_patch16_224")
    head = find_head(model, x)
    model.set_distilled_training(True)
    with pytest.raises(ValueError, match=r"expected logits .*, the model returns a tuple"):
        run_forward(model.train(), x, torch.tensor([1, 2]), head)


def test_a_sharded_weight_is_refused_in_one_line(tmp_path):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, (x, _) = small_net(batch_norm=False), images(2)
    head = find_head(model, x)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(ValueError, match="the head '8' is sharded") as error:
            _ = head.weight
    finally:
        dist.destroy_process_group()
    assert "\n" not in str(error.value)


def test_a_named_layer_is_proved_too():
    model = nn.Sequential(nn.Flatten(), nn.Linear(256, 5), nn.Linear(5, 5))
    assert find_head(model, images()[0], layer="2").layer is model[2]
    with pytest.raises(ValueError, match=r"layer '1' .* does not reproduce"):
        find_head(model, images()[0], layer="1")


def test_a_first_batch_of_one_that_the_model_squeezes_has_its_head():
    class Squeezed(nn.Sequential):
        def forward(self, x):
            return super().forward(x).squeeze()

    net, (x, y) = small_net().eval(), images()
    found, want = (
        Objective(model, penalties=[RelativeFlatness()])(x[:1], y[:1])
        for model in (Squeezed(*net), net)
    )
    torch.testing.assert_close(found.parts, want.parts)


@pytest.mark.parametrize("model", [small_net(), TwoHeads(), Mixture()], ids=["one", "two", "none"])
def test_leaves_no_hook_no_mode_no_gradient_and_no_statistics_behind(model):
    model.train()
    next(model.children()).eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes, stream = [m.training for m in model.modules()], torch.get_rng_state()
    try:
        find_head(model, images()[0])
    except ValueError:
        assert isinstance(model, Mixture)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), stream)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


class Float32Norm(nn.LayerNorm):
    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.float())


class TwoNormalised(TwoHeads):
    def __init__(self):
        super().__init__()
        self.norm = Float32Norm(256)

    def forward(self, x):
        x = self.norm(x.flatten(1))
        return (self.a(x) + self.b(x)) / 2


@pytest.mark.parametrize("branches", [1, 2])
def test_the_proof_holds_where_accelerate_keeps_autocast_inside_the_model(branches):
    """A float32 LayerNorm before a bfloat16 head, as ConvNeXt and ViT have on a GPU."""
    from accelerate import Accelerator

    torch.manual_seed(0)
    one = nn.Sequential(nn.Flatten(), nn.Linear(256, 64), Float32Norm(64), nn.Linear(64, 5))
    model = one if branches == 1 else TwoNormalised()
    prepared = Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
    x, y = images()
    head = find_head(prepared, x)
    assert head.names == (("3",) if branches == 1 else ("a", "b"))
    at = run_forward(prepared, x, y, head)
    eps = torch.finfo(torch.bfloat16).eps
    torch.testing.assert_close(
        at.through_head().logits, at.logits, rtol=4 * eps, atol=math.sqrt(256) * eps / 4
    )


def test_a_head_behind_normalization_is_found():
    assert find_head(timm_net(), images(size=32)[0]).name == "model.head.fc"
