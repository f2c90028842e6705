"""Two processes on one machine, over gloo."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flatreg.data import sharing
from flatreg.evaluation.evaluator import Evaluator
from flatreg.run.cli import main

ROOT = Path(__file__).parent.parent
RUNNER = str(ROOT / "tests/run_and_exit.py")


def launch(processes, *arguments):
    """Run Python in several processes.

    Accelerate takes them from torchrun: `accelerate launch --cpu --num_processes 2` itself starts
    one process (1.15) unless it is given an MPI hostfile.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *start, RUNNER, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


RUN = [
    ROOT / "recipes/quickstart.yaml",
    "epochs=2",
    "batch_size=20",
    "data.limit=200",
    "data.test_limit=40",
    "variants.nfgsm.criterion={kind: FGSMPGI, eps: 0.15}",  # every process stores all images
    "model.name=test_vit",
    "model.args={img_size: 32, embed_dim: 32, depth: 1}",
    "evaluation.curve=[0.1]",
    "evaluation.attack=fast",
    "evaluation.samples=null",
]


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    launch(2, "-m", "flatreg", "run", *RUN, f"output={folder / 'two'}")
    return folder


def test_one_process_gives_the_verdicts_of_two(two_processes):
    assert main(["evaluate", str(two_processes / "two"), f"output={two_processes / 'one'}"]) == 0
    one, two = (
        json.loads((two_processes / name / "report.json").read_text()) for name in ("one", "two")
    )
    for a, b in zip(one["rows"], two["rows"], strict=True):
        assert a["evaluation"]["indices"] == b["evaluation"]["indices"] == list(range(40))
        assert a["evaluation"]["verdicts"] == b["evaluation"]["verdicts"]
        assert len(set(a["evaluation"]["verdicts"])) > 1
        assert a["evaluation"]["curve"] == b["evaluation"]["curve"]
        assert a["evaluation"]["forwards"] == b["evaluation"]["forwards"]
    environment = json.loads((two_processes / "two/environment.json").read_text())
    assert environment["processes"] == "2"


DDP = """
import sys, torch
import torch.nn.functional as F
from accelerate import Accelerator
sys.path.insert(0, sys.argv[2])
from cases import TRAINED_WITH_BATCH_NORM, images, small_net
from flatreg import SAM, CrossEntropy, NFGSM, Objective, backward
from safetensors.torch import save_file

accelerator = Accelerator(cpu=True)
x, y = images(8)
x, y = x.double(), y
out = {}
for kind in ("plain", "sam", "attacked"):
    torch.manual_seed(0)
    net = small_net(dtype=torch.float64)
    net[1].momentum = None
    if kind == "attacked":
        net[1].eval()
    base = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    model, optimizer = accelerator.prepare(net, SAM(base, rho=0.1) if kind == "sam" else base)
    criterion = NFGSM(eps=0.1, noise=0.0) if kind == "attacked" else CrossEntropy()
    objective = Objective(model, criterion, TRAINED_WITH_BATCH_NORM)
    share = slice(accelerator.process_index, None, accelerator.num_processes)
    for step in range(2):
        torch.manual_seed(10 * step + accelerator.process_index)
        backward(optimizer, objective.bind(x[share], y[share]), accelerator=accelerator)
        optimizer.step()
        optimizer.zero_grad()
    for name, value in accelerator.unwrap_model(model).state_dict().items():
        out[f"{kind}.{name}.{accelerator.process_index}"] = value
every = {k: v.contiguous() for k, v in out.items()}
save_file(every, f"{sys.argv[1]}/2.{accelerator.process_index}.safetensors")
"""


def test_ddp_with_batch_norm_and_double_backward_agrees_with_hand_averaged_gradients(tmp_path):
    """Two ranks equal one process that averages the gradients of the two shares itself."""
    script = tmp_path / "ddp.py"
    script.write_text(DDP)
    launch(2, script, tmp_path, ROOT / "tests")
    ranks = [load_file(tmp_path / f"2.{rank}.safetensors") for rank in (0, 1)]
    reference = by_hand()
    for name, value in reference.items():
        for rank in (0, 1):
            got = ranks[rank][f"{name}.{rank}"]
            torch.testing.assert_close(got, value, rtol=1e-9, atol=1e-11)


def by_hand():
    from cases import TRAINED_WITH_BATCH_NORM, images, small_net

    from flatreg import NFGSM, SAM, CrossEntropy, Objective, backward

    x, y = images(8)
    x = x.double()
    out = {}
    for kind in ("plain", "sam", "attacked"):
        net = small_net(dtype=torch.float64)
        net[1].eval() if kind == "attacked" else None
        base = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        optimizer = SAM(base, rho=0.1) if kind == "sam" else base
        criterion = NFGSM(eps=0.1, noise=0.0) if kind == "attacked" else CrossEntropy()
        objective = Objective(net, criterion, TRAINED_WITH_BATCH_NORM)
        for step in range(2):
            for rank in (0, 1):
                torch.manual_seed(10 * step + rank)
                backward(optimizer, objective.bind(x[rank::2], y[rank::2]))
            for p in net.parameters():
                p.grad.div_(2)
            optimizer.step()
            optimizer.zero_grad()
        out |= {f"{kind}.{k}": v.clone() for k, v in net.named_parameters()}
    return out


def test_processes_that_accelerate_does_not_start_are_missed(capsys, monkeypatch):
    from accelerate import Accelerator

    from flatreg.run.processes import warn_of_lost_processes

    accelerator = Accelerator()
    warn_of_lost_processes(accelerator)
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setenv("MASTER_PORT", "29500")
    warn_of_lost_processes(accelerator)
    assert "torchrun --nproc_per_node" in capsys.readouterr().err


VERDICTS = """
import json, os, sys
from functools import partial
from pathlib import Path
import torch
from accelerate import PartialState
sys.path.insert(0, sys.argv[2])
from cases import trained_net
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset
import flatreg

state = PartialState(cpu=True)
model, x, y = trained_net(n=60)
model, data = model.double(), TensorDataset(x.double(), y)
if state.num_processes > 1:
    model = DistributedDataParallel(model)
if state.num_processes == 2:
    model = torch.compile(model, backend="eager")  # as Accelerate nests
for samples in (1, 20):
    square = partial(flatreg.attacks.square, queries=20)
    attack = [
        partial(flatreg.attacks.pgd, steps=5), partial(flatreg.attacks.apgd, steps=8),
        partial(flatreg.attacks.race, heats=((3, 4, 2.5), (2, 8, 1.5)), fmn=(1, 5), apgd=(2, 8)),
        partial(flatreg.attacks.spot_check, attack=square, samples=samples),
    ]
    mode, folder = model.training, Path(sys.argv[1], str(samples))
    result = flatreg.evaluate(
        model, data, eps=0.03, attack=attack, curve=[0.02], other_threats={"l2": 0.2},
        progress=False, batch_size=int(sys.argv[3]), folder=folder, save_inputs=True,
    )
    assert model.training == mode
    if state.is_main_process:
        kept = [result.verdicts, result.other_threats[0].verdicts, result.curve[0].accuracy.count]
        kept.append(str(result.stages[-1].spot_check))
        (folder / "kept.json").write_text(json.dumps(kept))
"""


def run_here(monkeypatch, script, *arguments):
    """Run a script of several processes as one, without the seconds that a launch takes."""
    monkeypatch.setattr(sys, "argv", [str(argument) for argument in (script, *arguments)])
    runpy.run_path(str(script))


def test_verdicts_in_float64_do_not_depend_on_the_processes(tmp_path, monkeypatch):
    """Nor does it whom the spot check attacks; of one sample alone, a process has none."""
    script = tmp_path / "verdicts.py"
    script.write_text(VERDICTS)
    kept = {1: [], 20: []}
    for processes, batch_size in ((1, 256), (2, 7), (3, 16)):
        given = (script, tmp_path / str(processes), ROOT / "tests", batch_size)
        run_here(monkeypatch, *given) if processes == 1 else launch(processes, *given)
        for samples, found in kept.items():
            folder = tmp_path / str(processes) / str(samples)
            found.append(json.loads((folder / "kept.json").read_text()))
            images = load_file(folder / "adversarial.safetensors")["inputs"]
            assert images.shape == (60, 1, 16, 16) and images.dtype == torch.float64
            assert json.loads((folder / "evaluation.json").read_text())["n"] == 60
    for one, two, three in kept.values():
        assert one == two == three and {-1, 0} <= set(one[0])


COUNTED = """
import os, signal, sys, time
from pathlib import Path
from flatreg.evaluation.evaluator import Evaluator
from flatreg.run import epoch
from flatreg.run.cli import main

folder, stop, rank = Path(sys.argv[1]), sys.argv[2] == "stop", os.environ["RANK"]
attack, attacked, passes, evaluators = Evaluator._attack, set(), [], []

def counted(self, block, threat, number):
    if self not in evaluators:  # one an arm
        evaluators.append(self)
    key = f"{evaluators.index(self)} {threat.key} {number}"
    attacked.update(f"{key} {index}" for index in block.indices)
    return attack(self, block, threat, number)

def stopped(*arguments, **keywords):
    passes.append(1)
    if stop:
        time.sleep(0.3)  # processes ask each other about once a second
    if stop and len(passes) == 11 and rank == "1":  # the second of ten in the second epoch
        signal.raise_signal(signal.SIGTERM)
    return backward(*arguments, **keywords)

Evaluator._attack, backward, epoch.backward = counted, epoch.backward, stopped
code = main(["run", *sys.argv[3:], f"output={folder / 'run'}"])
if stop:
    sys.exit(0 if code == 143 else 1)
(folder / f"attacked-{rank}").write_text("\\n".join(sorted(attacked)))
sys.exit(code)
"""


def test_two_processes_share_the_attacks_and_resume_to_the_same_weights(
    two_processes, tmp_path, capsys
):
    script = tmp_path / "counted.py"
    script.write_text(COUNTED)
    launch(2, script, tmp_path, "stop", *RUN)
    (within,) = tmp_path.glob("run/checkpoints/*/within-*")
    _, epoch, taken = within.name.split("-")
    assert int(epoch) == 2 and 0 < int(taken) < 9
    shutil.copytree(tmp_path / "run", tmp_path / "by one")
    launch(2, script, tmp_path, "go", *RUN)
    capsys.readouterr()
    assert main(["run", *map(str, RUN), f"output={tmp_path / 'by one'}"]) == 0
    assert "began in another environment (processes 2, then 1" in capsys.readouterr().err
    environment = json.loads((tmp_path / "by one/environment.json").read_text())
    assert environment["processes"] == "2, then 1"
    for arm in (tmp_path / "by one/checkpoints").iterdir():
        history = json.loads((arm / "epoch-0002/history.json").read_text())
        expected = json.loads(
            (tmp_path / "run/checkpoints" / arm.name / "epoch-0002/history.json").read_text()
        )
        assert history[0]["loss"] == expected[0]["loss"] or arm.name != within.parent.name
        assert history[1]["loss"] == pytest.approx(expected[1]["loss"], rel=0.2)
    shares = [set((tmp_path / f"attacked-{rank}").read_text().splitlines()) for rank in (0, 1)]
    assert shares[0] and shares[1] and not shares[0] & shares[1]
    whole = sorted((two_processes / "two/checkpoints").glob("*/epoch-0002/model.safetensors"))
    assert len(whole) > 1
    for file in whole:
        again = tmp_path / "run" / file.relative_to(two_processes / "two")
        assert again.read_bytes() == file.read_bytes()


BUFFERS = """
import sys, torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import Accelerator
sys.path.insert(0, sys.argv[1])
from cases import images, small_net
from flatreg import SAM, Objective, OffManifoldCurvature, backward

accelerator = Accelerator(cpu=True)
net = small_net(dtype=torch.float64)
model, optimizer = accelerator.prepare(net, SAM(torch.optim.SGD(net.parameters(), lr=0.1), rho=0.1))
x, y = images(4, seed=accelerator.process_index)
x = x.double()
bound = Objective(model, None, [OffManifoldCurvature(eps=0.1)]).bind
for step in range(2):
    backward(optimizer, bound(x, y), accelerator=accelerator)
    optimizer.step()
    optimizer.zero_grad()
net[1].eval()  # frozen: from now on the statistics matter, and these are each process's own
other = small_net(dtype=torch.float64)
other.load_state_dict(net.state_dict())
other[1].eval()
for buffer in other.buffers():
    dist.broadcast(buffer, 0)
def losses(inputs):
    return F.cross_entropy(other(inputs), y, reduction="none")
points = x.clone().requires_grad_()
middle = losses(points)
step = 0.1 * torch.autograd.grad(middle.sum(), points)[0].sign()
expected = (losses(x + step) - 2 * middle + losses(x - step)).abs().mean()
found = backward(optimizer, bound(x, y), accelerator=accelerator).parts["OffManifoldCurvature"]
torch.testing.assert_close(found, expected.detach())
"""


def test_passes_beside_ddp_start_from_the_buffers_that_it_broadcasts(tmp_path):
    script = tmp_path / "buffers.py"
    script.write_text(BUFFERS)
    launch(2, script, ROOT / "tests")


CLUSTERED = """
import json, os, sys
from functools import partial
from pathlib import Path
import torch
from accelerate import PartialState
import flatreg
from flatreg.evaluation.evaluator import Evaluator

state, attacked, attack = PartialState(cpu=True), [], Evaluator._attack

def counted(self, block, threat, number):
    attacked.append([number, *block.indices])
    return attack(self, block, threat, number)

Evaluator._attack = counted
# Every sample whose number is even is far from the boundary: the first of two processes has all.
n = 37
images = torch.where(torch.arange(n) % 2 == 0, 1.0, 0.53)[:, None, None, None].expand(n, 1, 4, 4)
images = images.double() + torch.linspace(-0.01, 0.0, n, dtype=torch.float64)[:, None, None, None]
net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 2)).double()
with torch.no_grad():
    net[1].weight.copy_(torch.tensor([[1.0], [-1.0]]).expand(2, 16))
    net[1].bias.copy_(torch.tensor([-8.0, 8.0]))
data = torch.utils.data.TensorDataset(images, torch.zeros(n, dtype=torch.long))
stages = [partial(flatreg.attacks.pgd, steps=3), partial(flatreg.attacks.square, queries=20)]
result = flatreg.evaluate(
    net, data, eps=0.1, attack=stages, curve=[0.05], progress=False, batch_size=int(sys.argv[2]),
    folder=Path(sys.argv[1], "kept"), save_inputs=True,
)
kept = {"verdicts": result.verdicts, "margins": result.attacked_margins, "passes": result.forwards}
kept["curve"] = result.curve[0].accuracy.count
out = {"result": kept, "last": [i for number, *all in attacked if number == 1 for i in all]}
Path(sys.argv[1], f"{state.process_index}.json").write_text(json.dumps(out))
"""


@pytest.mark.parametrize(("processes", "batch_size"), [(2, 256), (3, 2)])
def test_survivors_are_shared_out_before_each_attack(tmp_path, monkeypatch, processes, batch_size):
    """Also where the shares take several blocks; images and margins are the same to the bit."""
    script, ranks, images = tmp_path / "clustered.py", {}, {}
    script.write_text(CLUSTERED)
    for count in (1, processes):
        folder = tmp_path / str(count)
        folder.mkdir()
        if count == 1:
            monkeypatch.setattr(Evaluator, "_attack", Evaluator._attack)  # the script changes it
            run_here(monkeypatch, script, folder, batch_size)
        else:
            launch(count, script, folder, batch_size)
        ranks[count] = [json.loads((folder / f"{r}.json").read_text()) for r in range(count)]
        images[count] = load_file(folder / "kept/adversarial.safetensors")["inputs"]
    assert all(rank["result"] == ranks[1][0]["result"] for rank in ranks[processes])
    assert torch.equal(images[1], images[processes])
    last = [rank["last"] for rank in ranks[processes]]
    assert sorted(index for share in last for index in share) == list(range(0, 37, 2))
    sizes = [len(share) for share in last]
    assert max(sizes) - min(sizes) <= (1 if batch_size == 256 else 2)  # of two blocks one each


@pytest.mark.parametrize("counts", [(7, 0), (0, 5, 1), (3, 3, 3), (0, 0), (1, 0, 0, 9), (4, 5)])
def test_moves_leave_equal_shares(counts):
    moves = sharing._moves(counts)
    after = list(counts)
    for source, target, rows in moves:
        assert len(rows) > 0
        after[source] -= len(rows)
        after[target] += len(rows)
    assert sum(after) == sum(counts) and max(after) - min(after) <= 1
    for source in {source for source, *_ in moves}:  # the last rows, in order
        rows = [row for s, _, sent in moves if s == source for row in sent]
        assert rows == list(range(counts[source] - len(rows), counts[source]))
