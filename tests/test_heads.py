import pytest
import timm
import torch
from cases import images, small_net, timm_net
from torch import nn

from flatreg import find_head, relative_flatness
from flatreg.forward import run_forward


@pytest.mark.parametrize(
    "name",
    ["test_resnet", "test_convnext3", "test_vit", "test_efficientnet", "mobilenetv4_conv_small"],
)
def test_finds_the_head_of_timm_models_and_its_features_reproduce_the_logits(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7)
    size = model.pretrained_cfg["input_size"][-1] if "vit" in name else 64
    x = torch.rand(3, 3, size, size)
    head = find_head(model, x)
    assert head.layer is model.get_classifier()
    at = run_forward(model.eval(), x, torch.zeros(3, dtype=torch.long), head)
    remade = at.features @ at.weight.T + head.layer.bias
    torch.testing.assert_close(remade, at.logits, rtol=1e-4, atol=1e-5)


def test_kappa_of_captured_features_equals_autograd():
    """The gradient of the loss in the head's weight, differentiated once more, sample by sample."""
    from oracles import relative_flatness_by_hessian

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


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(256, 5), nn.Linear(256, 5)

    def forward(self, x):
        return (self.a(x.flatten(1)) + self.b(x.flatten(1))) / 2


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
        (TwoHeads(), "does not reproduce the logits"),
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


def test_a_named_layer_is_proved_too():
    model = nn.Sequential(nn.Flatten(), nn.Linear(256, 5), nn.Linear(5, 5))
    assert find_head(model, images()[0], layer="2").layer is model[2]
    with pytest.raises(ValueError, match=r"layer '1' .* does not reproduce"):
        find_head(model, images()[0], layer="1")


def test_leaves_no_hook_no_mode_and_no_statistics_behind():
    model = small_net().train()
    model[1].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    find_head(model, images()[0])
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_the_proof_holds_where_accelerate_keeps_autocast_inside_the_model():
    """A float32 LayerNorm before a bfloat16 head, as ConvNeXt and ViT have on a GPU."""

    class Float32Norm(nn.LayerNorm):
        def forward(self, x):
            with torch.autocast("cpu", enabled=False):
                return super().forward(x.float())

    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(256, 64), Float32Norm(64), nn.Linear(64, 5))
    prepared = Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
    AcceleratorState._reset_state(True)
    assert find_head(prepared, images()[0]).layer is model[3]


def test_a_head_behind_normalization_is_found():
    assert find_head(timm_net(), images(size=32)[0]).name == "model.head.fc"
