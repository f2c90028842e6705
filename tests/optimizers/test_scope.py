import pytest
import timm
import torch
from cases import small_net, timm_net
from torch import nn

from flatreg import SAM, last_blocks
from flatreg.optimizers.parameter_state import layouts_of, make_states


def names(model, parameters):
    wanted = {id(p) for p in parameters}
    return [name for name, p in model.named_parameters() if id(p) in wanted]


def test_last_blocks_of_a_timm_model_also_behind_its_normalisation():
    model = timm_net("test_resnet")
    assert names(model, last_blocks(model, 1)) == ["model.fc.weight", "model.fc.bias"]
    two = names(model, last_blocks(model, 2))
    assert two[-2:] == ["model.fc.weight", "model.fc.bias"]
    assert len(two) > 2 and all(n.startswith(("model.layer4", "model.fc")) for n in two)
    bare = timm.create_model("test_vit", num_classes=5)
    assert names(bare, last_blocks(bare, 1)) == ["head.weight", "head.bias"]


def test_last_blocks_of_a_sequential_are_its_children_with_parameters():
    net = small_net()
    assert names(net, last_blocks(net, 2)) == ["3.weight", "3.bias", "8.weight", "8.bias"]


def test_what_has_no_blocks_says_so():
    with pytest.raises(ValueError, match="expected 1 to 4 blocks, got 9"):
        last_blocks(small_net(), 9)
    with pytest.raises(ValueError, match="Linear has no group_matcher"):
        last_blocks(nn.Linear(2, 2), 1)


def test_states_know_scope_and_layout():
    net = nn.Sequential(
        nn.Conv2d(4, 4, 3, groups=2), nn.ConvTranspose2d(4, 4, 3), nn.Linear(2, 2, bias=False)
    )
    states = make_states(list(net.parameters()), net[2], layouts_of(net))
    assert [s.in_scope for s in states] == [False] * 4 + [True]
    assert [(s.groups, s.transposed) for s in states] == [
        (2, False),
        (1, False),
        (1, True),
        (1, False),
        (1, False),
    ]


@pytest.mark.parametrize("scope", [[], nn.Linear(2, 2)], ids=["empty", "foreign"])
def test_a_scope_must_be_among_the_parameters(scope):
    net = small_net()
    with pytest.raises(ValueError, match="scope: expected parameters of the base optimizer"):
        SAM(torch.optim.SGD(net.parameters(), lr=0.1), scope=scope)


@pytest.mark.parametrize("scope", ["head", 2, list(nn.Linear(2, 2).named_parameters())])
def test_what_is_no_scope_in_python_is_told_what_is_one(scope):
    with pytest.raises(TypeError, match=r"^scope: expected .*, got ('head'|2|a tuple): write flat"):
        SAM(torch.optim.SGD(small_net().parameters(), lr=0.1), scope=scope)


def test_a_scope_may_hold_a_frozen_parameter_that_the_optimizer_has_not():
    net = small_net()
    net[8].bias.requires_grad_(False)
    trained = [p for p in net.parameters() if p.requires_grad]
    wrapped = SAM(torch.optim.SGD(trained, lr=0.1), scope=net[8])
    assert [p is net[8].weight for p in wrapped.parameters(perturbed=True)] == [True]
