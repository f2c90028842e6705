"""The model beneath its wrappers: precision, compilation, shards; buffers and streams come back."""

import copy

import pytest
import torch
from accelerate import Accelerator
from cases import trained_net
from timm.utils import ModelEmaV3
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset

from flatreg import adaptive_attack_check, binarization_test, evaluate
from flatreg.evaluation import attack_path
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
