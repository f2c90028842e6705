"""One of the two processes of tests/optimizers/test_two_processes.py: DDP and FSDP2 steps."""

import sys
from contextlib import nullcontext

import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from cases import images, small_net
from safetensors.torch import save_file
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

import flatreg
from flatreg import ASAM, GSAM, SAM, WSAM, FriendlySAM, HeadRelativeSAM, LookSAM, RandomSAM

STEPS = 4
METHODS = {
    "sam": lambda base, net: SAM(base, rho=0.1),
    "asam": lambda base, net: ASAM(base, rho=0.3),
    "synced": lambda base, net: SAM(base, rho=0.1, sync_perturbation=True),
    "friendly": lambda base, net: FriendlySAM(base, rho=0.1),
    "gsam": lambda base, net: GSAM(base, rho=0.1, alpha=0.3),
    "wsam": lambda base, net: WSAM(base, rho=0.1, gamma=0.8, sync_perturbation=True),
    "looksam": lambda base, net: LookSAM(base, rho=0.1, every=2),
    "head": lambda base, net: SAM(base, rho=0.1, scope=net[8]),
    "relative head": lambda base, net: HeadRelativeSAM(base, net[8], rho=0.1),
    "split": lambda base, net: SAM(base, rho=0.1, micro_batches=2),
    "random": lambda base, net: RandomSAM(base, rho=0.1, sync_perturbation=True),
}
SHARDED = ("sam", "asam", "friendly", "gsam", "wsam", "looksam")
SETTINGS = {
    "plain": {},
    "bucket view": {"gradient_as_bucket_view": True},
    "static graph": {"static_graph": True},
    "unused": {"find_unused_parameters": True},
}


def batches(process, accumulation):
    """Micro-batches of this process, `accumulation` a step."""
    x, y = images(16)
    x = x.double()[process::2]
    return [(x[i::accumulation], y[process::2][i::accumulation]) for i in range(accumulation)]


class WithUnused(torch.nn.Sequential):
    """A parameter that no pass reaches."""

    def __init__(self, *layers):
        super().__init__(*layers)
        self.unused = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))

    def forward(self, x):
        for layer in self:
            x = layer(x)
        return x


def net_of(setting):
    net = small_net(dtype=torch.float64, batch_norm=setting != "fsdp2")
    return WithUnused(*net) if setting == "unused" else net


def train(net, model, optimizer, process, accumulation):
    """The loop a user writes, with and without accumulation."""
    objective = flatreg.Objective(model)
    for _ in range(STEPS):
        for i, (x, y) in enumerate(batches(process, accumulation)):
            with nullcontext() if i == accumulation - 1 else model.no_sync():
                flatreg.backward(optimizer, objective.bind(x, y))
        optimizer.step()
        optimizer.zero_grad()
    return {k: v.detach().clone() for k, v in net.state_dict().items()}


def use_fsdp2(accelerator):
    """Accelerate offers FSDP2 on accelerators alone, and can prepare it on CPUs as well."""
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, cpu_ram_efficient_loading=False
    )


def train_sharded(accelerator, method, accumulation):
    """The loop a user writes with Accelerate and FSDP2."""
    net = net_of("fsdp2")
    wrapped = METHODS[method](torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9), net)
    use_fsdp2(accelerator)
    model, optimizer = accelerator.prepare(net, wrapped)
    use_fsdp2(accelerator)
    assert isinstance(model, FSDPModule)

    def closure(x, y):
        # Accelerate divides by the accumulation steps, the other loops add up.
        return lambda: F.cross_entropy(model(x), y) * accumulation

    for _ in range(STEPS):
        for x, y in batches(accelerator.process_index, accumulation):
            with accelerator.accumulate(model):
                flatreg.backward(optimizer, closure(x, y), model=model, accelerator=accelerator)
                optimizer.step()
                optimizer.zero_grad()
    return {name: value.full_tensor() for name, value in model.state_dict().items()}


def sharded():
    """All of them, one Accelerator for each accumulation."""
    out = {}
    for accumulation in (1, 2):
        AcceleratorState._reset_state(True)
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
        for method in SHARDED:
            got = train_sharded(accelerator, method, accumulation)
            out |= {f"fsdp2/{method}/{accumulation}/{k}": v for k, v in got.items()}
    return out


def main(folder):
    dist.init_process_group("gloo")
    process, out = dist.get_rank(), {}
    for setting, options in SETTINGS.items():
        for method, wrap in METHODS.items():
            for accumulation in (1, 2):
                if accumulation == 2 and setting == "static graph":
                    continue  # DDP itself refuses no_sync before its first synchronised pass
                torch.manual_seed(process)
                net = net_of(setting)
                base = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
                optimizer = wrap(base, net)
                model = DistributedDataParallel(net, **options)
                got = train(net, model, optimizer, process, accumulation)
                out |= {f"{setting}/{method}/{accumulation}/{k}": v for k, v in got.items()}
    out |= sharded()
    save_file({k: v.contiguous() for k, v in out.items()}, f"{folder}/{process}.safetensors")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
