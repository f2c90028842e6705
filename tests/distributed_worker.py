"""One of the two processes of tests/optimizers/test_two_processes.py."""

import copy
import importlib.util
import sys
from contextlib import nullcontext

import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from cases import images, small_net
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import flatreg
from flatreg import (
    ASAM,
    AWP,
    GSAM,
    SAM,
    WSAM,
    FriendlySAM,
    HeadRelativeSAM,
    LookSAM,
    MomentumSAM,
    RandomSAM,
    StaleSAM,
)
from flatreg.optimizers.vector import average_over

STEPS = 4
METHODS = {
    "sam": lambda base, net: SAM(base, rho=0.1),
    "asam": lambda base, net: ASAM(base, rho=0.3),
    "awp": lambda base, net: AWP(base, gamma=0.1),
    "synced": lambda base, net: SAM(base, rho=0.1, sync_perturbation=True),
    "friendly": lambda base, net: FriendlySAM(base, rho=0.1),
    "friendly synced": lambda base, net: FriendlySAM(base, rho=0.1, sync_perturbation=True),
    "gsam": lambda base, net: GSAM(base, rho=0.1, alpha=0.3),
    "wsam": lambda base, net: WSAM(base, rho=0.1, gamma=0.8, sync_perturbation=True),
    "looksam": lambda base, net: LookSAM(base, rho=0.1, every=2),
    "momentum": lambda base, net: MomentumSAM(base, rho=0.1),
    "stale": lambda base, net: StaleSAM(base, rho=0.1),
    "head": lambda base, net: SAM(base, rho=0.1, scope=net[8]),
    "relative head": lambda base, net: HeadRelativeSAM(base, net[8], rho=0.1),
    "split": lambda base, net: SAM(base, rho=0.1, micro_batches=2),
    "random": lambda base, net: RandomSAM(base, rho=0.1, sync_perturbation=True),
}
SHARDED = ("sam", "asam", "awp", "friendly", "gsam", "wsam", "looksam", "momentum", "stale")
IN_PART = ("sam", "asam", "awp", "friendly", "gsam", "looksam", "head", "momentum", "stale")
LIGHTNING = ("sam", "synced", "friendly", "gsam", "looksam", "head", "split")
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


def sharded_in_part(process):
    """FSDP2 on the convolution and the first layer, by fully_shard; the head is whole."""
    out, mesh = {}, init_device_mesh("cpu", (2,))
    for method in IN_PART:
        net = net_of("fsdp2")
        for part in (net[0], net[3]):
            fully_shard(part, mesh=mesh)
        base = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        optimizer = METHODS[method](base, net)
        for _ in range(STEPS):
            ((x, y),) = batches(process, 1)
            flatreg.backward(optimizer, lambda x=x, y=y, m=net: F.cross_entropy(m(x), y), model=net)
            for p in net[8].parameters():  # what FSDP2 does not own, the loop averages
                dist.all_reduce(p.grad.div_(2))
            optimizer.step()
            optimizer.zero_grad()
        out |= {f"part/{method}/1/{k}": whole(v) for k, v in net.state_dict().items()}
    optimizer = RandomSAM(torch.optim.SGD(net.parameters(), lr=0.1))
    try:
        flatreg.backward(optimizer, lambda: F.cross_entropy(net(x), y), model=net)
        raise AssertionError("a random direction over both kinds was not refused")
    except ValueError as error:
        assert "all weights sharded by FSDP2, or none" in str(error)
    return out


def whole(value):
    return value.full_tensor() if isinstance(value, DTensor) else value.detach().clone()


def weights_whose_shards_move():
    """After a step with lr 0, by `backward` and by hand, whose pass gives shards new memory."""
    out, (x, y) = {}, images()
    for way in ("backward", "perturbed"):
        net = net_of("fsdp2")
        fully_shard(net, mesh=init_device_mesh("cpu", (2,)))
        optimizer = RandomSAM(torch.optim.SGD(net.parameters(), lr=0.0), rho=0.1)

        def loss(net=net):
            for p in net.parameters():  # as FSDP2 of torch 2.7 does with uneven ones
                p._local_tensor = p._local_tensor.clone()
            return F.cross_entropy(net(x.double()), y)

        if way == "backward":
            flatreg.backward(optimizer, loss, model=net)
        else:
            with optimizer.perturbed():
                loss().backward()
        optimizer.step()
        out |= {f"moved/{way}/{name}": p.full_tensor() for name, p in net.named_parameters()}
    return out


def resumed_under_fsdp2(process):
    """Half of the steps, torch's distributed checkpoint into fresh objects, the other half."""
    out, mesh = {}, init_device_mesh("cpu", (2,))

    def fresh(method):
        net = net_of("fsdp2")
        fully_shard(net, mesh=mesh)
        return net, METHODS[method](torch.optim.AdamW(net.parameters(), lr=0.01), net)

    def steps(net, optimizer):
        for x, y in batches(process, 2):
            flatreg.backward(optimizer, lambda x=x, y=y, m=net: F.cross_entropy(m(x), y), model=net)
            optimizer.step()
            optimizer.zero_grad()

    for method in SHARDED:
        for full in (False, True):
            options = StateDictOptions(full_state_dict=full)
            pair, again = fresh(method), fresh(method)
            steps(*pair)
            steps(*pair)
            saved = get_optimizer_state_dict(*pair, options=options)
            weights = get_model_state_dict(pair[0], options=options)
            set_model_state_dict(again[0], copy.deepcopy(weights), options=options)
            set_optimizer_state_dict(*again, copy.deepcopy(saved), options=options)
            for chosen, name in ((pair, "straight"), (again, "resumed")):
                steps(*chosen)
                for k, v in chosen[0].state_dict().items():
                    out[f"checkpoint {full}/{method}/{name}/{k}"] = v.full_tensor()
    return out


def zero_redundancy(process):
    """SAM around an optimizer whose processes keep the state of a share each."""
    net = net_of("plain")
    base = ZeroRedundancyOptimizer(net.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
    got = train(net, DistributedDataParallel(net), SAM(base, rho=0.1), process, 1)
    try:
        inside = ZeroRedundancyOptimizer(net.parameters(), torch.optim.SGD, lr=0.1)
        inside.optim = SAM(inside.optim)
        flatreg.backward(inside, lambda: net(batches(0, 1)[0][0]).sum(), model=net)
        refusal = ""
    except ValueError as error:
        refusal = str(error)
    assert "write SAM(ZeroRedundancyOptimizer(...))" in refusal
    return {f"plain/sam zero/1/{k}": v for k, v in got.items()}


def refuse_flattened():
    """FSDP1 by its model, and by the parameters that it hands out, which is all that step sees."""
    for original in (True, False):
        net = FullyShardedDataParallel(
            net_of("fsdp2"), use_orig_params=original, device_id=torch.device("cpu")
        )
        optimizer = SAM(torch.optim.SGD(net.parameters(), lr=0.1))
        (x, y) = batches(0, 1)[0]
        closure = lambda x=x, y=y, m=net: F.cross_entropy(m(x), y)  # noqa: E731

        def stepping(closure=closure):
            loss = closure()
            loss.backward()
            return loss

        for attempt in (
            lambda c=closure, m=net, o=optimizer: flatreg.backward(o, c, model=m),
            lambda c=closure, m=net.module, o=optimizer: flatreg.backward(o, c, model=m),
            lambda o=optimizer, c=stepping: o.step(c),
        ):
            try:
                attempt()
                raise AssertionError("FSDP1 was not refused")
            except ValueError as error:
                assert "FSDP1" in str(error) and "FSDP2" in str(error)


def through_lightning(process):
    """Manual optimisation as the page gives it, and Fabric; both wrap the module by themselves."""
    import lightning

    class Module(lightning.LightningModule):
        automatic_optimization = False

        def __init__(self, method, accumulation):
            super().__init__()
            self.net, self.method, self.accumulation = net_of("plain"), method, accumulation

        def configure_optimizers(self):
            base = torch.optim.SGD(self.net.parameters(), lr=0.1, momentum=0.9)
            return METHODS[self.method](base, self.net)

        def training_step(self, _, index):
            optimizer = self.optimizers()
            for i, (x, y) in enumerate(batches(process, self.accumulation)):
                last = i == self.accumulation - 1
                with optimizer.toggle_model(sync_grad=last):
                    if self.method == "split":  # an objective knows the network alone
                        flatreg.backward(optimizer, flatreg.Objective(self.net).bind(x, y))
                        continue
                    closure = lambda x=x, y=y: F.cross_entropy(self.net(x), y)  # noqa: E731
                    model = self if self.accumulation == 1 else self.net
                    flatreg.backward(optimizer, closure, model=model)
            optimizer.step()
            optimizer.zero_grad()

    out = {}
    for method in LIGHTNING:
        for accumulation in (1, 2):
            module = Module(method, accumulation)
            lightning.Trainer(
                accelerator="cpu",
                devices=2,
                strategy="ddp",
                max_steps=STEPS,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            ).fit(module, torch.utils.data.DataLoader(torch.zeros(2 * STEPS)))
            state = module.net.state_dict()
            out |= {f"lightning/{method}/{accumulation}/{k}": v.clone() for k, v in state.items()}
    fabric = lightning.Fabric(accelerator="cpu", devices=2, strategy="ddp")
    fabric.launch()
    for method in LIGHTNING:
        net = net_of("plain")
        base = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        model, optimizer = fabric.setup(net, METHODS[method](base, net))
        for _ in range(STEPS):
            ((x, y),) = batches(process, 1)
            flatreg.backward(optimizer, flatreg.Objective(model).bind(x, y))
            optimizer.step()
            optimizer.zero_grad()
        out |= {f"fabric/{method}/1/{k}": v.clone() for k, v in net.state_dict().items()}
    return out


def count_collectives():
    """A method that combines or synchronises sends all gradients at once, and not one by one."""
    for method in ("gsam", "looksam", "wsam", "synced", "random"):
        net, (batch,) = net_of("plain"), batches(0, 1)
        optimizer = METHODS[method](torch.optim.SGD(net.parameters(), lr=0.1), net)
        model, reduce, sent = DistributedDataParallel(net), dist.all_reduce, []

        def counted(tensor, *arguments, reduce=reduce, sent=sent, **keywords):
            sent.append(tensor.numel())
            return reduce(tensor, *arguments, **keywords)

        dist.all_reduce = counted
        flatreg.backward(optimizer, flatreg.Objective(model).bind(*batch))
        dist.all_reduce = reduce
        whole = sum(p.numel() for p in net.parameters())
        assert sent and set(sent) == {whole} and len(sent) <= 2, (method, sent)


def compare_buckets(process):
    """What two processes average in buckets equals what they average tensor by tensor."""
    torch.manual_seed(process)
    tensors = [torch.randn(shape) for shape in ((3, 4), (), (1000,), (7, 2, 3), (1,))]
    one_by_one = [tensor.clone() for tensor in tensors]
    for tensor in one_by_one:
        dist.all_reduce(tensor.div_(2))
    average_over(tensors, dist.group.WORLD)
    assert all(map(torch.equal, tensors, one_by_one))


def main(folder):
    dist.init_process_group("gloo")
    process, out = dist.get_rank(), {}
    refuse_flattened()
    count_collectives()
    compare_buckets(process)
    out |= sharded_in_part(process) | resumed_under_fsdp2(process) | zero_redundancy(process)
    out |= weights_whose_shards_move()
    if importlib.util.find_spec("lightning"):
        out |= through_lightning(process)
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
                memories = [s.memory.values() for s in optimizer.parameter_states()]
                kept = [value.flatten() for values in memories for value in values]
                if kept:
                    out[f"memory/{setting}/{method}/{accumulation}"] = torch.cat(kept)
    out |= sharded()
    save_file({k: v.contiguous() for k, v in out.items()}, f"{folder}/{process}.safetensors")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
