"""Bars: what they say in a terminal, and in a file."""

import io
import re
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from cases import trained_net
from torch.utils.data import TensorDataset

from flatreg import evaluate
from flatreg.attacks import apgd, pgd, race, spot_check, square
from flatreg.attacks.eot import eot
from flatreg.data import progress
from flatreg.evaluation.progress import cost


class Terminal(io.StringIO):
    """What a terminal was sent."""

    def isatty(self):
        return True

    def frames(self):
        return [frame for frame in re.split(r"[\r\n]+", self.getvalue()) if frame.strip()]


@pytest.fixture
def terminal(monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=screen))
    monkeypatch.setattr("tqdm.std.tqdm.monitor_interval", 0)
    monkeypatch.setenv("COLUMNS", "200")
    return screen


@pytest.fixture
def pipe(monkeypatch):
    """A file, and a clock that is moved by hand."""
    file, now = io.StringIO(), [0.0]
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=file))
    monkeypatch.setattr("tqdm.std.tqdm.monitor_interval", 0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return file, now


@pytest.mark.parametrize("columns", ["40", "80", "200"])
def test_a_bar_fits_80_columns_and_the_terminal(terminal, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    with progress.about("an-arm-of-the-longest-name-here 12/34"):
        with progress.progress_bar("adaptive attack check", 10**7) as bar:
            bar.set_postfix_str("loss 0.123, attacked 12.3% (45% of the time), skipped steps")
            bar.update(10**6)
    assert terminal.frames() and max(map(len, terminal.frames())) < min(80, int(columns))


def test_without_a_terminal_there_is_a_line_every_30_seconds(pipe):
    file, now = pipe
    with progress.about("plain 1/4"):
        bar = progress.progress_bar("train", 600, unit="batches")
    for second in range(100):
        now[0] = float(second)
        bar.update(6)
        bar.set_postfix_str(f"loss {second}")
    bar.close()
    lines = file.getvalue().split("\n")
    assert len(lines) == 4 and lines[3] == "" and "\r" not in file.getvalue()
    pattern = r"train plain 1/4: 31%, 186/600 batches, \S+ so far, about \S+ to go, loss \d+"
    assert re.fullmatch(pattern, lines[0])


def test_a_short_task_writes_nothing_into_a_file(pipe):
    file, _ = pipe
    for _ in progress.progress_bar("decode", 1000, over=range(1000)):
        pass
    assert file.getvalue() == ""


def test_nothing_is_shown_where_bars_are_silent(terminal):
    with progress.silent(), progress.progress_bar("train", 10) as bar:
        bar.update(10)
    progress.progress_bar("train", 10, shown=False).close()
    assert terminal.getvalue() == ""


def test_an_attack_on_less_than_a_batch_moves_the_bar(terminal, monkeypatch):
    """One batch holds all images: no verdict is final before the last attack ends."""
    model, x, y = trained_net()
    monkeypatch.setattr("flatreg.evaluation.progress._EVERY", 0.0)
    attack = [partial(pgd, steps=10), partial(apgd, steps=20), partial(square, queries=50)]
    options = dict(eps=0.01, attack=attack, curve=[0.02], other_threats={"l2": 0.1})
    result = evaluate(model, TensorDataset(x[:20], y[:20]), diagnose=False, **options)
    survivors = result.verdicts.count(-1)
    assert survivors > 2
    seen = [re.search(r"(\d+)%.* (\d+)/20 decided, <= ([\d.]+)%", f) for f in terminal.frames()]
    found = [[float(g) for g in s.groups()] for s in seen if s]
    percents, decided, bounds = zip(*found, strict=True)
    assert len(set(percents)) > 20 and list(decided) == sorted(decided)
    assert max(percents) <= 100 and percents[-1] > 90
    assert decided[-1] == 20 - survivors and bounds[-1] >= 100 * result.attacked.value - 0.05


@pytest.mark.parametrize(
    ("attack", "expected"),
    [
        (partial(pgd, steps=10), 30),
        (partial(apgd, loss="dlr", targets=9, steps=50), 1350),
        (partial(square, queries=2500), 2500),
        (partial(eot, attack=partial(pgd, steps=10), draws=20), 600),
        (race, 3 * (2 * 50 + 4 * 100)),
        (partial(spot_check, attack=partial(square, queries=2500)), 2500),
        (lambda model, inputs, labels, *, eps, **options: None, 30),
        (partial(apgd, steps=torch.arange(3), start=torch.rand(2, 2)), 30),
    ],
)
def test_the_cost_of_an_attack_is_read_from_its_settings(attack, expected):
    assert cost(attack) == expected


def test_a_spot_check_says_the_bound_of_all_images(terminal, monkeypatch):
    """It comes after the verdicts of all blocks, whose images are not counted again."""
    model, x, y = trained_net()
    monkeypatch.setattr("flatreg.evaluation.progress._EVERY", 0.0)
    attack = [partial(pgd, steps=2), partial(spot_check, attack=partial(square, queries=5))]
    result = evaluate(model, TensorDataset(x, y), eps=0.001, attack=attack, diagnose=False)
    assert result.stages[0].accuracy == result.stages[1].accuracy
    bounds = [re.search(r"<= ([\d.]+)%, spot_check 2/2", frame) for frame in terminal.frames()]
    found = {float(bound[1]) for bound in bounds if bound}
    assert found == {round(100 * result.attacked.value, 1)}


def test_the_masking_checks_move_the_bar(terminal, monkeypatch):
    """They are most of what a quick evaluation does."""
    model, x, y = trained_net()
    monkeypatch.setattr("flatreg.evaluation.progress._EVERY", 0.0)
    quick = dict(eps=0.001, attack=partial(pgd, steps=2), batch_size=4)
    data = TensorDataset(x[:24], y[:24])
    once = evaluate(model, data, **quick)
    frames = re.split(r"[\r\n]+", terminal.getvalue())
    percents = [int(re.search(r"(\d+)%", f)[1]) for f in frames if "masking checks" in f]
    assert len(set(percents)) > 20 and percents == sorted(percents)
    assert percents[0] < 50 and percents[-1] > 80
    silent = evaluate(model, data, progress=False, **quick)
    assert replace(once, seconds=silent.seconds, waiting_seconds=silent.waiting_seconds) == silent


def test_an_evaluation_of_several_blocks_ends_near_the_end(terminal, monkeypatch):
    model, x, y = trained_net()
    monkeypatch.setattr("flatreg.evaluation.progress._EVERY", 0.0)
    torch.manual_seed(0)
    evaluate(
        model,
        TensorDataset(x[:60], y[:60]),
        eps=0.02,
        attack=[partial(pgd, steps=5), partial(apgd, steps=10)],
        batch_size=4,
        diagnose=False,
    )
    percents = [int(p) for p in re.findall(r"(\d+)%\|", terminal.getvalue())]
    assert percents[-1] > 90 and max(percents) <= 100
