"""What lies on the disk and was damaged there: told in one line, or work to do again."""

import contextlib
import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import trained_net
from matplotlib.figure import Figure
from pydantic import TypeAdapter
from pydantic.dataclasses import dataclass
from safetensors.torch import save_file
from torch.utils.data import TensorDataset

from flatreg import LocalPCAManifold, PCAManifold, evaluate, read_evaluation, read_report
from flatreg.data.files import (
    check_file,
    load_whole,
    read_json,
    save_whole,
    write_digests,
    write_json,
    write_whole,
)
from flatreg.evaluation.resume import CachedWork, ResumeCache
from flatreg.report.card import read_card
from flatreg.report.figures.style import save
from flatreg.run.sweep import read_sweep

NUMBERS = [math.nan, math.inf, -math.inf, 0.5, -0.0]
MANIFOLDS = {"PCAManifold": PCAManifold(rank=3), "LocalPCAManifold": LocalPCAManifold(rank=2)}
READERS = {
    "report.json": read_report,
    "evaluation.json": read_evaluation,
    "sweep.json": read_sweep,
    "card.json": read_card,
}


@dataclass(frozen=True)
class Numbers:
    one: float
    may_lack: float | None
    many: list[float]
    by_name: dict[str, float]


def refuse(constant):
    pytest.fail(f"a bare {constant}, which JSON does not have")


def alike(a, b):
    """Equal as floats: nan is nan, 0.0 is not -0.0."""
    return np.array_equal(np.float64(a).view(np.int64), np.float64(b).view(np.int64))


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("indent", [1, None])
def test_numbers_that_are_not_finite_are_json_and_come_back(tmp_path, number, indent):
    file, adapter = tmp_path / "a.json", TypeAdapter(Numbers)
    stored = Numbers(number, number, [1.0, number], {"a": number})
    for value, how in ((stored, adapter), (adapter.dump_python(stored), None)):
        write_json(file, value, how, indent=indent)
        json.loads(file.read_text(encoding="utf-8"), parse_constant=refuse)
        found = read_json(file, adapter, what="numbers")
        for one in (found.one, found.may_lack, found.many[1], found.by_name["a"]):
            assert alike(one, number)
    older = json.dumps(adapter.dump_python(stored))  # as flatreg once wrote: a bare NaN
    file.write_text(older, encoding="utf-8")
    assert alike(read_json(file, adapter, what="numbers").many[1], number)


def one_line(error, file):
    message = str(error.value)
    assert "\n" not in message and str(file) in message and len(message) < 500
    return message


DAMAGE = {
    "truncated": lambda text: text[: len(text) // 2],
    "empty": lambda text: b"",
    "zeros": lambda text: bytes(len(text)),
    "not UTF-8": lambda text: text.replace(b'"', b"\xff", 1),
    "nested": lambda text: b"[" * 10**5 + b"]" * 10**5,
    "nested objects": lambda text: b'{"a":' * 10**5 + b"1" + b"}" * 10**5,
    "another schema": lambda text: b'{"schema": ["a\\nb"]}',
    "a list": lambda text: b"[1, 2]",
    "a long number": lambda text: b'{"schema": ' + b"9" * 10**4 + b"}",
    "a BOM": lambda text: b"\xef\xbb\xbf" + text,
    "odd keys": lambda text: b'{"a\\n b": {"c\\nd": 1}}',
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_results_are_told_with_their_file(tmp_path, name, damage):
    file = tmp_path / name
    file.write_bytes(DAMAGE[damage](b'{"schema": 4, "name": "some\\u00e9"}'))
    with pytest.raises(ValueError) as error:
        READERS[name](tmp_path)
    assert one_line(error, file).endswith(": delete it, and run what wrote it again")


@contextlib.contextmanager
def in_its_place(file, kind):
    """Something that is no ordinary file."""
    bound = None
    if kind == "folder":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind == "device":
        file.symlink_to("/dev/zero")
    else:
        bound = socket.socket(socket.AF_UNIX)
        before = Path.cwd()
        os.chdir(file.parent)  # the path of a socket has at most 107 bytes
        bound.bind(file.name)
        os.chdir(before)
    yield
    if bound:
        bound.close()


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "socket"])
def test_what_is_no_file_is_not_waited_for(tmp_path, name, kind):
    file = tmp_path / name
    with in_its_place(file, kind), pytest.raises(ValueError, match=f"got a {kind}") as error:
        READERS[name](tmp_path)
    one_line(error, file)


def test_a_huge_file_is_not_read(tmp_path):
    with open(tmp_path / "report.json", "wb") as file:
        file.truncate(2**31)  # takes no room
    with pytest.raises(ValueError, match=r"report\.json: not a report: it has 2.0 GiB"):
        read_report(tmp_path)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    model, x, y = trained_net(n=24)
    folder = tmp_path_factory.mktemp("evaluated")
    options = dict(eps=0.03, attack="fast", progress=False, diagnose=False)
    evaluate(model, TensorDataset(x, y), **options, folder=folder, other_threats={"l2": 0.2})
    return json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: e.__setitem__("n", 0), "expected n from 1, got 0"),
        (lambda e: e["labels"].pop(), "expected 24 labels, one a sample, got 23"),
        (lambda e: e["attacked_kappas"].append(1.0), "expected 24 attacked_kappas"),
        (lambda e: e["other_threats"][0]["verdicts"].pop(), "verdicts under l2, one a sample"),
        (lambda e: e["verdicts"].__setitem__(0, 99), r"expected verdicts from -2 to \d"),
        (lambda e: e["attacked"].__setitem__("value", 0.123), "not that of its verdicts"),
        (lambda e: e["indices"].__setitem__(0, e["indices"][1]), "an index stands twice"),
    ],
)
def test_columns_that_contradict_each_other_are_refused(tmp_path, evaluated, change, message):
    stored = json.loads(json.dumps(evaluated))
    file = tmp_path / "evaluation.json"
    file.write_text(json.dumps(stored), encoding="utf-8")
    assert read_evaluation(tmp_path).n == 24
    change(stored)
    file.write_text(json.dumps(stored), encoding="utf-8")
    with pytest.raises(ValueError, match=f"not an evaluation: .*{message}") as error:
        read_evaluation(tmp_path)
    one_line(error, file)


def record(folder):
    cache = ResumeCache(folder, {"a": 1})
    columns = {"value": torch.tensor([2.0, 4.0, 8.0]), "fooled": torch.tensor([True, False, True])}
    cache.rows("some work", [5, 3, 8], CachedWork(columns, 7, 4))
    (file,) = cache.folder.glob("*.safetensors")
    return file


def taken_from(folder):
    """Which of the samples a new cache knows, and the passes it counts."""
    cache = ResumeCache(folder, {"a": 1})
    missing = cache.missing("some work", [5, 3, 8])
    if not missing:
        found = cache.rows("some work", [5, 3, 8])
        assert found["value"].tolist() == [2.0, 4.0, 8.0]
        assert found["fooled"].tolist() == [True, False, True]
    return missing, cache.read_forwards, cache.read_backwards


def test_a_record_with_any_other_byte_is_work_to_do_again(tmp_path):
    file = record(tmp_path)
    whole = file.read_bytes()
    assert taken_from(tmp_path) == ([], 7, 4)
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 1 << place % 8
        file.write_bytes(changed)
        # Padding of the header says nothing: the record is whole all the same.
        assert taken_from(tmp_path) in (([0, 1, 2], 0, 0), ([], 7, 4)), place
    for length in range(0, len(whole), 7):
        file.write_bytes(whole[:length])
        assert taken_from(tmp_path) == ([0, 1, 2], 0, 0), length
    file.write_bytes(whole)
    assert taken_from(tmp_path) == ([], 7, 4)


COLUMNS = {
    "other length": {"value": torch.ones(2)},
    "nan": {"value": torch.full((3,), torch.nan)},
    "other dtype": {"value": torch.tensor([1, 2, 3])},
    "other names": {"values": torch.ones(3)},
    "0-d": {"value": torch.tensor(1.0)},
    "index of floats": {"value": torch.ones(3), "index": torch.tensor([5.0, 3.0, 8.0])},
    "index of two axes": {"value": torch.ones(3), "index": torch.tensor([[5, 3, 8]])},
    "index twice": {"value": torch.ones(3), "index": torch.tensor([5, 5, 8])},
}


@pytest.mark.parametrize("name", COLUMNS)
@pytest.mark.parametrize("forwards", ["3", "many", "-1"])
def test_a_record_of_other_columns_is_work_to_do_again(tmp_path, name, forwards):
    file = record(tmp_path)
    columns = {"index": torch.tensor([5, 3, 8])} | COLUMNS[name]
    save_file(columns, str(file), {"key": "some work", "forwards": forwards, "backwards": "0"})
    assert taken_from(tmp_path) == ([0, 1, 2], 0, 0)


@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "socket"])
def test_a_record_that_is_no_file_is_not_waited_for(tmp_path, kind):
    file = record(tmp_path)
    file.unlink()
    with in_its_place(file, kind):
        assert taken_from(tmp_path) == ([0, 1, 2], 0, 0)


def fitted(kind):
    generator = torch.Generator().manual_seed(0)
    return MANIFOLDS[kind].fit(torch.rand(24, 1, 3, 3, generator=generator))


@pytest.mark.parametrize("kind", MANIFOLDS)
def test_a_manifold_with_any_other_byte_is_refused(tmp_path, kind):
    manifold, file = fitted(kind), tmp_path / "m.safetensors"
    manifold.save(file)
    whole = file.read_bytes()
    x = torch.rand(2, 1, 3, 3)
    expected = manifold.split(x, x - 0.5)[0]
    for place in range(0, len(whole), 5):
        changed = bytearray(whole)
        changed[place] ^= 1 << place % 8
        file.write_bytes(changed)
        try:
            same = type(manifold).load(file).split(x, x - 0.5)[0]
        except ValueError as error:
            assert "\n" not in str(error) and str(file) in str(error), place
        else:  # padding
            assert torch.equal(same, expected), place
    for content in (b"", whole[:20], whole[:-1], bytes(len(whole))):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"m\.safetensors: damaged: .*delete it") as error:
            type(manifold).load(file)
        one_line(error, file)


@pytest.mark.parametrize("kind", MANIFOLDS)
@pytest.mark.parametrize("change", ["lacks one", "nan", "cut", "wide", "bytes", "settings", "none"])
def test_a_manifold_of_other_tensors_is_refused(tmp_path, kind, change):
    """Under a digest that is theirs; without one nothing is read."""
    manifold, file = fitted(kind), tmp_path / "m.safetensors"
    manifold.save(file)
    tensors, about = load_whole(file)
    save_file(tensors, str(file), about)
    with pytest.raises(ValueError, match="other bytes than flatreg wrote"):
        type(manifold).load(file)
    last, first = ("basis", "mean") if kind == "PCAManifold" else ("neighbours", "images")
    if change == "lacks one":
        del tensors[last]
    elif change == "nan":
        tensors[first] = torch.full_like(tensors[first], torch.nan)
    elif change == "cut":
        tensors[last] = tensors[last][:-1].contiguous()
    elif change == "wide":
        tensors[last] = torch.cat([tensors[last]] * 2, 1)
    elif change == "bytes":
        tensors[last] = torch.full(tensors[last].shape, 200, dtype=torch.uint8)
    else:
        config = json.loads(about["manifold"]) | {"rank": -1, "odd\nkey": 1}
        about["manifold"] = json.dumps(config) if change == "settings" else "[" * 10**5
    save_whole(file, tensors, about)
    with pytest.raises(ValueError, match=r"damaged: .*delete it, and run") as error:
        type(manifold).load(file)
    one_line(error, file)


def test_a_manifold_that_is_no_file_is_not_waited_for(tmp_path):
    file = tmp_path / "m.safetensors"
    for kind in ("folder", "pipe"):
        with in_its_place(file, kind), pytest.raises(ValueError, match=f"got a {kind}"):
            PCAManifold.load(file)
        os.rmdir(file) if kind == "folder" else file.unlink()
    with pytest.raises(OSError, match=r"m\.safetensors"):
        PCAManifold.load(file)


def test_files_are_utf8_in_every_locale(tmp_path):
    """A run in the POSIX locale trained, and failed on a sign of its report."""
    code = (
        "from flatreg.data.files import *; from pathlib import Path; import sys\n"
        "file = Path(sys.argv[1]); write_whole(file, 'a \\u00b1 b'); write_json(file, ['\\u00b1'])"
        "; assert read_json(file, TypeAdapter(list[str]), what='words') == ['\\u00b1']"
        "; write_whole(file, '\\u00b1')"
    )
    posix = {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    command = [sys.executable, "-c", code, str(tmp_path / "a")]
    environment = os.environ | posix | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    subprocess.run(command, check=True, env=environment, timeout=120)
    assert (tmp_path / "a").read_bytes() == "±".encode()


def test_saved_tensors_come_back_with_their_words(tmp_path):
    stored = {"a": torch.tensor([True, False]), "b": torch.tensor(1.5, dtype=torch.bfloat16)}
    stored["c"] = torch.empty(0, 3)
    save_whole(tmp_path / "a", stored, {"odd": "é\n"})
    found, about = load_whole(tmp_path / "a")
    assert about == {"odd": "é\n"} and found.keys() == stored.keys()
    for name, values in stored.items():
        assert found[name].dtype == values.dtype and torch.equal(found[name], values)
    save_file(stored, str(tmp_path / "b"))
    with pytest.raises(ValueError, match="other bytes than flatreg wrote"):
        load_whole(tmp_path / "b")


def test_a_text_that_cannot_be_written_is_named_and_leaves_the_old_one(tmp_path, monkeypatch):
    file = tmp_path / "report.md"
    write_whole(file, "half a pair: \udcff")  # a recipe can have such a name
    assert file.read_text(encoding="utf-8") == "half a pair: \\udcff"

    def full(path, *_, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match=r"report\.md: could not be written: .*No space left"):
        write_whole(file, "more")
    assert os.listdir(tmp_path) == ["report.md"] and file.stat().st_size == 19


def test_a_figure_is_there_whole_or_as_it_was(tmp_path, monkeypatch):
    def full(figure, file, **_):
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    (tmp_path / "a.png").write_bytes(b"before")
    monkeypatch.setattr(Figure, "savefig", full)
    with pytest.raises(OSError, match=r"a\.png: could not be written: .*No space left"):
        save(Figure(), tmp_path / "a.png")
    assert os.listdir(tmp_path) == ["a.png"] and (tmp_path / "a.png").read_bytes() == b"before"


def test_a_file_of_a_folder_with_digests_is_the_one_that_was_written(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(bytes(50))
    check_file(tmp_path / "a")  # of an older release, which wrote no digests
    write_digests(tmp_path)
    for place in range(50):
        changed = bytearray(50)
        changed[place] ^= 1 << place % 8
        (tmp_path / "a").write_bytes(changed)
        with pytest.raises(ValueError, match="a: damaged: other bytes than flatreg wrote"):
            check_file(tmp_path / "a")
        check_file(tmp_path / "b")
    named = (tmp_path / "digests.json").read_text()
    (tmp_path / "digests.json").write_text("{}")
    with pytest.raises(ValueError, match=r"digests\.json: damaged: expected the digest of b,"):
        check_file(tmp_path / "b")
    (tmp_path / "digests.json").write_text(named)
    (tmp_path / "a").unlink()
    with pytest.raises(ValueError, match="expected the file a too, found none"):
        check_file(tmp_path / "b")
    os.mkfifo(tmp_path / "a")
    with pytest.raises(ValueError, match="got a pipe"):
        check_file(tmp_path / "a")
