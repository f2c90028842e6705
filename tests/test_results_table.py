import itertools
import json
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
from cases import refused
from markdown_it import MarkdownIt
from matplotlib.text import Annotation, Text

from flatreg.evaluation.adaptive import AdaptiveAttackCheck, Slice
from flatreg.evaluation.compare import compare
from flatreg.evaluation.findings import Finding
from flatreg.evaluation.geometry.by_outcome import Flatness, FlatnessByOutcome
from flatreg.evaluation.geometry.input_curvature import InputCurvature, Sides
from flatreg.evaluation.results import Evaluation, Stage
from flatreg.measures.estimate import Estimate
from flatreg.report.figures.attacked_against import attacked_against, pareto_front
from flatreg.report.figures.report import draw
from flatreg.report.figures.style import save
from flatreg.report.results_table import insert_table, results_table
from flatreg.report.rows import SCHEMA, Report, Row, read_report, write_report_file
from flatreg.report.sections import keep_results, read_runs, sections
from flatreg.report.text import write_report
from flatreg.run.checkpoints import Epoch
from flatreg.run.cli import main
from flatreg.run.recipe import Recipe

STORED = Path(__file__).parent.parent / "recipes" / "results"
N = 20
STAGES = ("pgd(loss=margin, steps=10)", "square(queries=100)")
FLAG = Finding("unbounded attack wins", 0.4, 0.1, "flagged", N, "the ball is the limit", "Ref 2019")


def mean(value, stderr):
    return Estimate(value, value - 1.959964 * stderr, value + 1.959964 * stderr, N, "mean")


SLICE = Slice(0, 1, [-1.0, 0.0, 1.0], *([[0.5, 0.1, -0.3]] * 3,) * 3)


def checked(slices):
    return AdaptiveAttackCheck(
        eps=8 / 255,
        norm="linf",
        n=10,
        survivors=10,
        steps=9,
        restarts=1,
        seed=0,
        seconds=1.0,
        indices=list(range(10)),
        fooled_by_transfer=[],
        fooled_by_search=[True] + [False] * 9,
        attacked=Estimate.share(9, N),
        findings=[replace(FLAG, name="long search wins")],
        slices=slices,
    )


def accuracy_of(survivors, n=N, eps=8 / 255, stages=STAGES, first=0, digest="a"):
    """An evaluation in which one sample is wrong and `survivors` stand."""
    verdicts = [-1] * survivors + [0] * (n - 1 - survivors) + [-2]
    return Evaluation(
        eps=eps,
        norm="linf",
        n=n,
        clean=Estimate.share(n - 1, n),
        attacked=Estimate.share(survivors, n),
        stages=[Stage(stage, Estimate.share(survivors, n)) for stage in stages],
        curve=[],
        other_threats=[],
        union=None,
        findings=[],
        forwards=9,
        backwards=9,
        seed=0,
        seconds=1.0,
        versions={"torch": "2"},
        indices=list(range(first, first + n)),
        labels=[0] * n,
        verdicts=verdicts,
        predictions=[0] * n,
        margins=[0.123456789] * n,
        kappas=[0.1] * n,
        attacked_predictions=[0] * n,
        attacked_margins=[0.1] * n,
        attacked_kappas=[None] * n,
        samples_digest=digest,
    )


def row_of(name, survivors, twin, *, time=1.0, model="resnet", flags=(), **settings):
    evaluation = accuracy_of(survivors, **settings)
    evaluation = replace(evaluation, findings=list(flags))
    estimate = mean(1 + survivors, 0.5)
    some = Flatness(N, estimate, None)
    sides = Sides(mean(100.0 + survivors, 25.0), estimate)
    return Row(
        name=name,
        model={"name": model},
        criterion={},
        penalties=[],
        wrapper=None,
        evaluation=evaluation,
        comparison=compare(twin.evaluation, evaluation) if twin else None,
        adaptive_check=None,
        model_info={},
        relative_flatness=FlatnessByOutcome(some, some, some, some, None, 0.9),
        input_curvature=InputCurvature(sides, None, None, 32, 3072, 0.9, 8),
        seconds_per_epoch=time,
        training_seconds=30 * time,
        time_ratio=time,
        history=[Epoch(i, 0.1, time, 0.5, {"CrossEntropy": 0.5}) for i in range(3)],
        path={},
        path_samples=0,
    )


def write(
    folder,
    arms,
    *,
    seed=0,
    epochs=3,
    environment=None,
    data=None,
    network="resnet",
    recipe=None,
    **settings,
):
    """A run of a plain twin with 2 survivors and of `arms`: name to (survivors, time)."""
    plain = row_of("plain", 2, None, **settings)
    rows = [plain, *(row_of(n, s, plain, time=t, **settings) for n, (s, t) in arms.items())]
    recipe = Recipe.model_validate(
        {
            "seed": seed,
            "data": data or {"kind": "digits"},
            "model": {"name": network},
            "optimizer": {"lr": 0.1},
            "epochs": epochs,
            "evaluation": {"eps": "8/255"},
        }
        | (recipe or {})
    )
    folder.mkdir(parents=True)
    write_report_file(Report(SCHEMA, recipe.model_dump(mode="json"), rows), folder)
    if environment:
        (folder / "environment.json").write_text(json.dumps(environment))
    return folder


def table_rows(text):
    """Cells of the table rows, one list a row, without the head."""
    lines = [line for line in text.split("\n") if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in cells if row[0] != "arm" and not set(row[0]) <= {"-", ":"}]


def test_every_arm_is_there_plain_first_then_by_attacked_accuracy(tmp_path):
    run = write(tmp_path / "one", {"loser": (0, 3.0), "best": (15, 2.5), "middle": (9, 1.1)})
    text = results_table([run])
    assert text.startswith("### digits, resnet, linf eps 8/255, n = 20\n")
    rows = table_rows(text)
    assert [row[0] for row in rows] == ["plain", "best", "middle", "loser"]
    best = read_report(run).rows[2]
    assert best.name == "best"
    interval, paired = best.evaluation.attacked, best.comparison.attacked
    assert rows[1] == [
        "best",
        "0",
        "95.0 [76.4, 99.1]",
        f"75.0 [{100 * interval.low:.1f}, {100 * interval.high:.1f}]",
        f"+65.0 [{100 * paired.low:+.1f}, {100 * paired.high:+.1f}]",
        "16.00 ± 0.50",
        "-",
        "115 ± 25",
        "-",
        "2.50x, 75 s",
        "none",
    ]
    assert rows[0][4] == "-" and rows[3][4].startswith("-10.0 [")
    assert "Cascade: `pgd(loss=margin, steps=10)`, then `square(queries=100)`." in text
    assert "3040 of 3072 directions are off the first 32 principal components" in text
    assert "| kappa | kappa\\* | Gauss-Newton trace | Gauss-Newton trace\\* |" in text
    assert "- kappa\\*: kappa at matched confidence: " in text


def test_seeds_have_their_own_rows_and_a_mean(tmp_path):
    arms = [{"a": (10, 2.0), "b": (12, 4.0)}, {"a": (18, 2.5), "b": (11, 4.0)}]
    folders = [write(tmp_path / f"mine-seed{s}", arms[s], seed=s) for s in (1, 0)]
    rows = table_rows(results_table(folders))
    assert [row[:2] for row in rows] == [
        ["plain", "0"],
        ["plain", "1"],
        ["**plain**", "**mean of 2 seeds**"],
        ["a", "0"],
        ["a", "1"],
        ["**a**", "**mean of 2 seeds**"],
        ["b", "0"],
        ["b", "1"],
        ["**b**", "**mean of 2 seeds**"],
    ]
    assert rows[5][2:] == [
        "95.0 (95.0 to 95.0)",
        "70.0 (50.0 to 90.0)",
        "+60.0 (+40.0 to +80.0)",
        "15 (11 to 19)",
        "-",
        "114 (110 to 118)",
        "-",
        "2.25x (2.00x to 2.50x)",
        "",
    ]
    other = write(tmp_path / "other", {"a": (1, 1.0)}, epochs=9)
    names = [row[0] for row in table_rows(results_table([*folders, other]))]
    assert names.count("mine / a") == 2 and "**mine / a**" in names and "other / a" in names
    assert names[:4] == ["mine / plain", "mine / plain", "**mine / plain**", "other / plain"]


def test_an_arm_that_another_recipe_trains_alike_is_a_seed_of_it(tmp_path):
    weak, strong = ({"criterion": {"kind": "NFGSM", "eps": eps}} for eps in ("4/255", "8/255"))
    arms = {"nfgsm": (10, 2.0), "trades": (9, 2.0)}
    variants = {"nfgsm": strong, "trades": {"criterion": {"kind": "TRADES", "eps": "8/255"}}}
    first = write(tmp_path / "all", arms, recipe={"variants": variants})
    second, again, weaker = (
        write(tmp_path / name, {"nfgsm": (14, 2.0)}, seed=seed, recipe=own | {"arm": "nfgsm"})
        for name, seed, own in (("more-1", 1, strong), ("again", 0, strong), ("weak-1", 1, weak))
    )
    rows = [row[:2] for row in table_rows(results_table([first, second]))]
    assert [row for row in rows if "nfgsm" in row[0]] == [
        ["all / nfgsm", "0"],
        ["all / nfgsm", "1"],
        ["**all / nfgsm**", "**mean of 2 seeds**"],
    ]
    for other in (again, weaker):  # of the same seed, of another eps
        assert "mean of" not in results_table([first, other])


def test_a_recipe_is_the_same_one_before_and_after_a_setting_came(tmp_path):
    """A report holds the settings of its version, with the defaults that they had."""
    folders = [write(tmp_path / f"mine-seed{s}", {"a": (10, 2.0)}, seed=s) for s in (0, 1)]
    file = folders[0] / "report.json"
    report = json.loads(file.read_text())
    assert report["recipe"].pop("skip_nonfinite") == 0
    assert report["recipe"]["model"].pop("weights_key") is None
    report["recipe"]["checkpoint_minutes"] = 3.0
    file.write_text(json.dumps(report))
    assert "**a** | **mean of 2 seeds**" in results_table(folders)
    report["recipe"]["ema"] = 0.9
    file.write_text(json.dumps(report))
    assert "mean of" not in results_table(folders)


def test_another_threat_dataset_network_or_n_is_another_section(tmp_path):
    root = {"kind": "torchvision", "name": "MNIST", "root": "here"}
    runs = [
        write(tmp_path / "a", {"x": (3, 1.0)}),
        write(tmp_path / "b", {"x": (3, 1.0)}, eps=0.1, stages=STAGES[:1]),
        write(tmp_path / "c", {"x": (3, 1.0)}, data=root, n=30),
        write(tmp_path / "d", {"x": (3, 1.0)}, network="vit"),
        write(tmp_path / "e", {"x": (3, 1.0)}, stages=STAGES[:1], n=19),
    ]
    titles = [line for line in results_table(runs).split("\n") if line.startswith("### ")]
    assert titles == [
        "### MNIST, resnet, linf eps 8/255, n = 30",
        "### digits, resnet, linf eps 8/255, n = 19",
        "### digits, resnet, linf eps 8/255, n = 20",
        "### digits, resnet, linf eps 0.1, n = 20",
        "### digits, vit, linf eps 8/255, n = 20",
    ]
    moved = write(
        tmp_path / "c-seed1", {"x": (3, 1.0)}, data=root | {"root": "there"}, n=30, seed=1
    )
    assert "mean of 2 seeds" in results_table([runs[2], moved])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stages": STAGES[:1]}, "evaluated by different cascades, pgd"),
        ({"first": 5}, "evaluated on different samples"),
        ({"digest": "b"}, "evaluated on different images under the same indices"),
        ({"epochs": 3}, "same recipe with the same seed: expected every seed once"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_one_line(tmp_path, capsys, change, message):
    settings = {"epochs": 4} | change
    folders = [
        str(write(tmp_path / "a", {"x": (3, 1.0)})),
        str(write(tmp_path / "b", {"x": (3, 1.0)}, **settings)),
    ]
    with pytest.raises(ValueError, match=message):
        results_table(folders)
    assert main(["table", *folders, f"output={tmp_path / 'T.md'}"]) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("\n") == 1 and not printed.out
    assert not (tmp_path / "T.md").exists() and not (tmp_path / "T.png").exists()


def test_other_files_are_refused_in_one_line(tmp_path, capsys):
    run = write(tmp_path / "a", {"x": (3, 1.0)})
    (tmp_path / "old.json").write_text('{"schema": 3}')
    (tmp_path / "torn.json").write_text('{"schema": 4, "rows"')
    (tmp_path / "empty.json").write_text('{"schema": 4, "recipe": {}}')
    for name, message in (
        ("old.json", "expected schema 4, got 3"),
        ("torn.json", "not JSON"),
        ("empty.json", "not a report: rows: Field required"),
        ("none", "no such run or report.json"),
    ):
        assert main(["table", str(run), str(tmp_path / name)]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    twin = write(tmp_path / "elsewhere/a", {"x": (3, 1.0)}, epochs=4)
    with pytest.raises(ValueError, match="two recipes of digits, resnet are called a"):
        results_table([run, twin])
    assert main(["table", str(run), "output=T.txt"]) == 2
    assert "expected a file FILE.md, got T.txt" in capsys.readouterr().err


def test_findings_environment_and_adaptive_check_are_shown(tmp_path):
    run = write(tmp_path / "a", {"x": (10, 1.0)}, environment={"torch": "2.9", "device": "cpu"})
    assert "seed 0; torch 2.9, device cpu\n" in results_table([run])
    report = read_report(run)
    adaptive_check = checked([])
    early = Epoch(0, 0.1, 1.0, 0.5, {}, findings=[replace(FLAG, name="catastrophic overfitting")])
    row = report.rows[1]
    quiet = replace(FLAG, name="quiet", verdict="ok")
    evaluation = replace(row.evaluation, findings=[FLAG, quiet])
    row = replace(
        row, evaluation=evaluation, adaptive_check=adaptive_check, history=[early, *row.history[1:]]
    )
    write_report_file(replace(report, rows=[report.rows[0], row]), run)
    text = results_table([run])
    assert table_rows(text)[1][-1] == (
        "catastrophic overfitting 0.40 > 0.10; unbounded attack wins 0.40 > 0.10; "
        "long search wins 0.40 > 0.10; adaptive check leaves 45.0% attacked"
    )
    assert "- unbounded attack wins: the ball is the limit (Ref 2019)." in text
    assert "- adaptive check leaves: " in text and "quiet" not in text
    (run / "environment.json").unlink()
    assert "seed 0\n" in results_table([run])
    keep_results(read_runs([run]), tmp_path / "kept")
    assert results_table([tmp_path / "kept/a"]) == results_table([run])


def test_kept_results_make_the_same_table_and_are_small(tmp_path):
    arms = {f"arm-{i}": (i, 1.0 + i) for i in range(12)}
    machine = {"torch": "2.9"}
    runs = [write(tmp_path / f"r-{s}", arms, seed=s, environment=machine) for s in (0, 1)]
    keep_results(read_runs(runs), tmp_path / "kept")
    kept = [tmp_path / "kept" / run.name for run in runs]
    assert results_table(kept) == results_table(runs)
    for one, other in zip(runs, kept, strict=True):
        assert (other / "report.json").stat().st_size < 0.8 * (one / "report.json").stat().st_size
        verdicts = [[r.evaluation.verdicts for r in read_report(f).rows] for f in (one, other)]
        assert verdicts[0] == verdicts[1]
    copy = write(tmp_path / "copy/r-0", arms, epochs=5)
    with pytest.raises(ValueError, match="two runs are called r-0"):
        keep_results(read_runs([runs[0], copy]), tmp_path / "kept")


def test_only_what_lies_between_the_markers_is_replaced(tmp_path):
    file = tmp_path / "README.md"
    file.write_text("# Mine\n\n<!-- table -->\nold\n<!-- /table -->\n\nmore | prose\n")
    for text in ("| a |\n", "| b |"):
        insert_table(file, text)
        assert file.read_text() == (
            f"# Mine\n\n<!-- table -->\n\n{text.strip()}\n\n<!-- /table -->\n\nmore | prose\n"
        )
    insert_table(tmp_path / "new/T.md", "| a |")
    insert_table(tmp_path / "new/T.md", "| c |")
    assert (tmp_path / "new/T.md").read_text() == ("<!-- table -->\n\n| c |\n\n<!-- /table -->\n")


@pytest.mark.parametrize(
    "text",
    [
        "prose",
        "<!-- table -->\n",
        "<!-- /table -->\n<!-- table -->\n",
        "<!-- table --><!-- /table --><!-- table --><!-- /table -->",
    ],
)
def test_a_file_without_one_place_for_a_table_is_left_alone(tmp_path, text):
    file = tmp_path / "README.md"
    file.write_text(text)
    with pytest.raises(ValueError, match="expected one <!-- table --> and then one"):
        insert_table(file, "| a |")
    assert file.read_text() == text and [p.name for p in tmp_path.iterdir()] == ["README.md"]


def test_the_front_is_what_no_other_beats():
    generator = random.Random(0)
    for _ in range(200):
        points = [(generator.randint(1, 6), generator.randint(0, 6)) for _ in range(7)]
        beaten = [any(o != p and o[0] <= p[0] and o[1] >= p[1] for o in points) for p in points]
        expected = {p for p, is_beaten in zip(points, beaten, strict=True) if not is_beaten}
        front = [points[i] for i in pareto_front(points)]
        assert front == sorted(expected) and len(front) == len(set(front))
    assert pareto_front([]) == []


def test_the_figure_names_every_arm_once_without_overlap(tmp_path):
    arms = {
        "nfgsm": (14, 1.9),
        "pgd-at": (17, 6.0),
        "margin-bound": (15, 2.0),
        "chord": (14, 2.1),
        "relative-flatness": (1, 1.02),
        "off-manifold-confidence": (0, 1.8),
        "fisher": (5, 2.6),
    }
    run = write(tmp_path / "a", arms)
    report = read_report(run)
    rows = [*report.rows, replace(report.rows[1], name="alone", time_ratio=None, comparison=None)]
    write_report_file(replace(report, rows=rows), run)
    found = sections(read_runs([run]))
    figure = attacked_against(found)
    (axes,) = figure.axes
    names = [text for text in axes.texts if isinstance(text, Annotation)]
    assert sorted(text.get_text() for text in names) == sorted(arms)
    figure.canvas.draw()
    boxes = [Text.get_window_extent(text) for text in names]
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    assert "alone" in axes.get_xlabel() and axes.get_xscale() == "log"
    costs = {g.name: g.cost for g in found[0].groups if g.cost}  # write() has 30 epochs of training
    assert costs == pytest.approx(
        {"plain": 30} | {name: 30 * time for name, (_, time) in arms.items()}
    )
    save(figure, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_the_figure_of_runs_without_a_twin_is_empty_and_says_so(tmp_path):
    run = write(tmp_path / "a", {"x": (3, 1.0)})
    report = read_report(run)
    write_report_file(replace(report, rows=[replace(report.rows[1], time_ratio=None)]), run)
    save(attacked_against(sections(read_runs([run]))), tmp_path / "p.png")
    assert (tmp_path / "p.png").exists()


def test_trained_runs_become_a_table_in_a_file(tmp_path, capsys):
    recipe = tmp_path / "small.yaml"
    recipe.write_text(
        "data: {kind: digits, limit: 400, test_limit: 60}\n"
        "model: {name: test_vit, args: {img_size: 32, embed_dim: 32, depth: 1}, "
        "mean: [0.5], std: [0.5]}\n"
        "penalties: [{kind: MarginBound, strength: 1, eps: 0.05}]\n"
        "optimizer: {lr: 3.0e-3}\nepochs: 1\nbaseline: true\n"
        "evaluation: {eps: 0.05, samples: 20, attack: fast}\n"
    )
    runs = [tmp_path / "runs/small", tmp_path / "runs/small-seed1"]
    for seed, folder in enumerate(runs):
        assert main(["run", str(recipe), f"output={folder}", f"seed={seed}"]) == 0
    capsys.readouterr()
    (tmp_path / "README.md").write_text("prose\n\n<!-- table -->\n<!-- /table -->\n")
    command = ["table", *map(str, runs), f"output={tmp_path / 'README.md'}"]
    assert main([*command, "--results", str(tmp_path / "results")]) == 0
    text = (tmp_path / "README.md").read_text()
    printed = capsys.readouterr().out
    assert text.startswith(
        "prose\n\n<!-- table -->\n\n### digits, test_vit, linf eps 0.05, n = 20\n"
    )
    assert printed.strip() in text and "![" not in printed and "(README.png)" in text
    assert (tmp_path / "README.png").read_bytes().startswith(b"\x89PNG")
    rows = table_rows(printed)
    assert [row[0].strip("*") for row in rows] == ["plain"] * 3 + ["MarginBound"] * 3
    for row in rows[:2] + rows[3:5]:
        curvature = [float(cell.split(" ± ")[0]) for cell in row[7:9]]
        assert all(value > 0 for value in curvature)
    assert re.search(r"- small-seed1: test_vit, 1 epoch, .*, seed 1; python 3", printed)
    assert main(["table", *(str(tmp_path / "results" / run.name) for run in runs)]) == 0
    assert capsys.readouterr().out == printed


def test_an_altered_report_is_refused_in_one_line_or_read(tmp_path):
    kept = Path(__file__).parent.parent / "recipes/results/cifar10_small/report.json"
    raw = json.loads(kept.read_text())
    raw["rows"] = raw["rows"][1:2]  # one that has a comparison
    raw["rows"][0]["relative_flatness"]["clean"]["raw"] = {"value": 1.0, "stderr": 0.1, "n": 9}
    assert refused(raw, tmp_path / "report.json", read_report) > 500


def test_a_hostile_report_is_shown_and_does_nothing(tmp_path, capsys):
    """Names of a stored report reach the terminal, a page and a figure, as they are spelt."""
    bad = "<script>x</script>|`$\\frac$ [a](javascript:b)\x1b[31m"
    raw = json.loads((STORED / "quickstart" / "report.json").read_text(encoding="utf-8"))
    raw["recipe"]["data"] = {"kind": "array", "path": f"{bad}.npz"}
    raw["recipe"]["model"]["name"] = bad
    for row in raw["rows"]:
        row["model"]["name"] = bad
        if row["name"] != "plain":
            row["name"] += bad
        for stage in row["evaluation"]["stages"]:
            stage["attack"] += bad
    folder = tmp_path / "a$b$|c"
    folder.mkdir()
    (folder / "report.json").write_text(json.dumps(raw), encoding="utf-8")
    (folder / "environment.json").write_text(json.dumps({"device": bad}), encoding="utf-8")
    page = tmp_path / "page.md"
    assert main(["table", str(folder), f"output={page}"]) == 0
    printed = capsys.readouterr()
    text = page.read_text(encoding="utf-8")
    assert printed.err == "" and page.with_suffix(".png").stat().st_size > 10_000
    report = read_report(folder)
    last = report.rows[-1]
    outside = replace(last, name="../../../out", adaptive_check=checked([SLICE]))
    report = replace(report, rows=[*report.rows[:-1], outside])
    drawn = tmp_path / "a" / "b"
    assert "figures/slice-_out.png" in draw(report, drawn) and not list(tmp_path.rglob("out*"))
    report = replace(report, rows=[*report.rows[:-1], last])
    write_report(report, tmp_path, draw(report, tmp_path))
    whole = (tmp_path / "report.md").read_text(encoding="utf-8")
    for shown in (printed.out, text, whole):
        assert "\x1b" not in shown and "script>" in shown
        html = MarkdownIt("commonmark", {"html": True}).enable("table").render(shown)
        assert "<script" not in html and "href" not in html
        for table in re.findall("<table>.*?</table>", html, re.S):
            rows = re.findall("<tr>.*?</tr>", table, re.S)
            assert len({len(re.findall("<t[hd]", row)) for row in rows}) == 1 < len(rows)


@pytest.mark.parametrize("value", [None, "x", [], {}, "gone"])
@pytest.mark.parametrize(
    "place", ["data", "model", "seed", "epochs", "batch_size", "rows", "0.model", "0.penalties"]
)
def test_a_report_without_what_a_table_shows_is_refused_by_name(tmp_path, capsys, place, value):
    raw = json.loads((STORED / "quickstart" / "report.json").read_text(encoding="utf-8"))
    at, key = raw["recipe"], place
    if place == "rows":
        at = raw
    elif place[0] == "0":
        at, key = raw["rows"][0], place[2:]
    if value == "gone":
        del at[key]
    elif key == "penalties":
        at[key] = [value]
    else:
        at[key] = value
    (tmp_path / "report.json").write_text(json.dumps(raw), encoding="utf-8")
    assert main(["table", str(tmp_path)]) == 2
    error = capsys.readouterr().err.strip()
    assert f"{tmp_path / 'report.json'}: not a report: " in error and "\n" not in error
