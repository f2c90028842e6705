"""`report.html` and the page of several runs: whole, alone, escaped, and readable."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pages import CHROMIUM, Page, measured, sent_alone
from safetensors.torch import load_file

from flatreg.attacks.spot_check import SpotChecked
from flatreg.evaluation.adaptive import AdaptiveAttackCheck, Slice
from flatreg.evaluation.compare import compare
from flatreg.evaluation.findings import Finding
from flatreg.report.comparison import write_comparison
from flatreg.report.gallery import Attacked, Example, data_uri, gallery, shown
from flatreg.report.page import run_page, write_page
from flatreg.report.rows import read_report, write_report_file
from flatreg.report.sections import read_runs
from flatreg.report.summary import of_report
from flatreg.report.text import table
from flatreg.run.build import load_model
from flatreg.run.cli import main
from flatreg.run.recipe import load_recipe

STORED = Path(__file__).parent.parent / "recipes" / "results"
SECTIONS = "result eps cost training curvature path images cascade recipe reproduce".split()
FLAG = Finding("black box wins", 0.4, 0.1, "flagged", 20, "gradients do not lead there", "Ref 2019")
BAD = "<script>x</script><img src=//a onerror=b>&lt;'\"{{ 7*7 }}\x1b[31m\u202e\ud800"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of a small recipe, of three arms, with everything that a page can show."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "small.yaml").write_text(
        "data: {kind: digits, limit: 600, test_limit: 60}\n"
        "model: {name: test_convnext3, args: {kernel_sizes: 3}, mean: [0.5], std: [0.5]}\n"
        "penalties: [{kind: MarginBound, strength: 1, eps: 0.03}]\n"
        "optimizer: {lr: 5.0e-3}\nepochs: 2\nbatch_size: 30\nbaseline: true\n"
        "variants: {nfgsm: {criterion: {kind: NFGSM, eps: 0.05}}}\n"
        "evaluation: {eps: 0.06, samples: 20, attack: fast, curve: [0.01], save_inputs: true,"
        " other_threats: {l2: 0.3}}\n"
    )
    assert main(["run", str(folder / "small.yaml"), f"output={folder / 'run'}"]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def compared(run, tmp_path_factory):
    """The page of that run and of stored ones, of other sections and of several seeds."""
    file = tmp_path_factory.mktemp("compared") / "new" / "page.html"
    runs = [run, *(STORED / name for name in ("fashion_mnist-0", "fashion_mnist-1", "quickstart"))]
    assert main(["compare", *map(str, runs), f"output={file}"]) == 0
    return file


def test_a_run_writes_one_page_with_every_section(run):
    text = (run / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert not page.mistakes and not sent_alone(text)
    ids = [attributes["id"] for attributes in page.of("section")]
    assert ids == SECTIONS
    assert text.count("<section") == len(re.findall(r"<section[^>]*><h2>[^<]*</h2>\s*<p", text))
    for row in read_report(run).rows:
        assert page.text.count(row.name) > 5
        assert f"{100 * row.evaluation.attacked.value:.1f} [" in page.text
    for said in ("l2 eps 0.3", "threads 1", "kind: MarginBound", "No check flags"):
        assert said in page.text, said
    policy = {attributes.get("content", "") for attributes in page.of("meta")}
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in policy
    assert len(text) < 1_500_000


def test_every_image_says_what_it_shows(run, compared):
    for file in (run / "report.html", compared):
        page = Page(file.read_text(encoding="utf-8"))
        assert all(len(image["alt"]) > 9 for image in page.of("img"))
        figures = [svg for svg in page.of("svg") if svg.get("aria-hidden") != "true"]
        assert figures and all(svg["role"] == "img" and svg["aria-label"] for svg in figures)
    images = Page((run / "report.html").read_text(encoding="utf-8")).of("img")
    assert len(images) == 6 * (1 + 2 * 3) and all(image["class"] == "small" for image in images)


def test_the_gallery_repeats_the_images_of_the_evaluation(run):
    recipe, report = load_recipe(run / "recipe.yaml"), read_report(run)
    splits = recipe.data.load()
    models = {row.name: load_model(run / "checkpoints" / row.name) for row in report.rows}
    examples = gallery(report, splits.test, models, recipe.evaluation.attack)
    assert len({example.index for example in examples}) == 6
    fooled = 0
    for row in report.rows:
        kept, result = (
            load_file(run / f"evaluations/{row.name}/adversarial.safetensors"),
            row.evaluation,
        )
        for example in examples:
            at, one = result.indices.index(example.index), example.arms[row.name]
            assert result.verdicts[at] > -2 and one.survived == (result.verdicts[at] == -1)
            assert (example.label, one.prediction) == (result.labels[at], result.predictions[at])
            assert one.margin == pytest.approx(result.margins[at], abs=1e-3)
            assert float((one.image - example.image).abs().max()) <= 0.06 + 1e-6
            assert torch.equal(example.image, splits.test.images[example.index] / 255)
            if not one.survived:
                fooled += 1
                assert torch.allclose(one.image, kept["inputs"][at], atol=1e-6)
                assert one.attacked_prediction == result.attacked_predictions[at] != example.label
                assert one.attack == result.stages[result.verdicts[at]].attack
    assert fooled


def test_where_few_images_are_right_others_fill_the_gallery(run):
    recipe, report = load_recipe(run / "recipe.yaml"), read_report(run)
    splits, row = recipe.data.load(), report.rows[0]
    verdicts = [-2] * 17 + [v if v > -2 else -1 for v in row.evaluation.verdicts[17:]]
    rows = [replace(row, evaluation=replace(row.evaluation, verdicts=verdicts))]
    model = load_model(run / "checkpoints" / row.name)
    examples = gallery(replace(report, rows=rows), splits.test, {row.name: model}, "fast")
    assert len(examples) == 6
    assert [one.arms["plain"].attack is None for one in examples] == [True] * 3 + [False] * 3
    wrong = examples[0].arms["plain"]
    assert torch.equal(wrong.image, examples[0].image) and not wrong.survived


def test_a_difference_is_grey_where_nothing_changed_and_states_its_scale():
    image = torch.full((1, 4, 4), 0.5)
    changed = image.clone()
    changed[0, 0, 0], changed[0, 0, 1] = 0.7, 0.3
    one = Attacked(3, 1.0, 4, -1.0, "pgd()", False, changed)
    (found,) = shown([Example(0, 3, image, {"a": one})])
    assert found.small and found.reach == pytest.approx(0.2)
    expected = torch.full((1, 4, 4), 0.5)
    expected[0, 0, :2] = torch.tensor([1.0, 0.0])
    assert found.arms["a"][2] == data_uri(expected) and found.clean == data_uri(image)
    still = replace(one, image=image)
    (found,) = shown([Example(0, 3, image, {"a": still})])
    assert found.reach == 0 and found.arms["a"][2] == data_uri(image)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [1, 32, 224])
def test_images_of_any_shape_are_shown(channels, size):
    uri = data_uri(torch.rand(channels, size, size + 1))
    assert uri.startswith("data:image/jpeg" if size > 64 else "data:image/png")


def test_five_arms_of_large_images_can_be_sent(run):
    (read,) = read_runs([run])
    rows = [replace(read.report.rows[0], name=name) for name in ("plain", *"abcd")]
    read = replace(read, report=replace(read.report, rows=rows))
    image = torch.rand(3, 224, 224)
    arms = {
        row.name: Attacked(0, 1.0, 0, 1.0, "pgd()", True, torch.rand(3, 224, 224)) for row in rows
    }
    text = run_page(read, [Example(i, 0, image, arms) for i in range(6)])
    assert 1 <= text.count('class="alone"') <= 6
    assert len(text.encode()) < 5_000_000 and not Page(text).mistakes


def test_an_adaptive_check_is_shown_with_its_figure(run):
    (read,) = read_runs([run])
    row = read.report.rows[1]
    found = replace(row.evaluation, findings=[])
    line = [-1.0, 0.0, 1.0]
    drawn = Slice(0, 1, line, [[0.5, 0.1, -0.3]] * 3, [line] * 3, [line] * 3)
    settings = {"eps": 0.06, "norm": "linf", "n": 9, "survivors": 9, "steps": 5, "restarts": 1}
    settings |= {"indices": [], "fooled_by_transfer": [], "fooled_by_search": []}
    settings |= {"seed": 0, "seconds": 1.0, "attacked": found.attacked, "findings": [FLAG]}
    check = AdaptiveAttackCheck(**settings, slices=[drawn])
    rows = [replace(row, evaluation=found, adaptive_check=check)]
    page = Page(run_page(replace(read, report=replace(read.report, rows=rows))))
    assert not page.mistakes and "adaptive check of the survivors" in page.text
    assert any("margin around survivors" in svg.get("aria-label", "") for svg in page.of("svg"))


def test_findings_come_first(run):
    (read,) = read_runs([run])
    rows = [
        replace(row, evaluation=replace(row.evaluation, findings=[FLAG]))
        for row in read.report.rows
    ]
    text = run_page(replace(read, report=replace(read.report, rows=rows)))
    ids = [attributes["id"] for attributes in Page(text).of("section")]
    assert ids == ["findings", *SECTIONS]
    assert "black box wins" in Page(text).text and "No check flags" not in text
    assert "No check flags" in (run / "report.html").read_text(encoding="utf-8")


def test_a_page_says_so_where_nothing_survives(run):
    (read,) = read_runs([run])
    row = read.report.rows[1]
    none = replace(row.evaluation, attacked=replace(row.evaluation.attacked, value=0.0))
    read = replace(read, report=replace(read.report, rows=[replace(row, evaluation=none)]))
    text = Page(run_page(read)).text
    assert "no arm keeps one of the 20 test images right" in text and "nfgsm keeps" not in text


def test_the_bound_of_a_spot_check_is_said_under_every_threat(run):
    (read,) = read_runs([run])
    check = SpotChecked(survivors=312, attacked=64, at_most=12)
    sentence = "attacked 64 of 312 survivors, fooled none: it would fool at most 3.8%"
    assert "spot check" not in Page(run_page(read)).text

    def checked(threat):
        *before, last = threat.stages
        return replace(threat, stages=[*before, replace(last, spot_check=check)])

    row = read.report.rows[0]
    others = [checked(other) for other in row.evaluation.other_threats]
    result = checked(replace(row.evaluation, other_threats=others))
    report = replace(read.report, rows=[replace(row, evaluation=result)])
    page = Page(run_page(replace(read, report=report)))
    assert page.text.count(sentence) == 2 and not page.mistakes
    assert "a spot check on some of these, drawn at random" in page.text
    assert str(result).count(sentence) == 2
    printed = table(report)
    assert " ".join(printed.split()).count(sentence) == 2 and f"{row.name}, l2 eps 0.3" in printed
    assert max(map(len, printed.splitlines())) <= 100
    (arm,) = of_report(report)["arms"]
    assert [found["norm"] for found in arm["spot_checks"]] == ["linf", "l2"]
    counts = {"survivors": 312, "attacked": 64, "at_most": 12}
    assert all(counts.items() <= found.items() for found in arm["spot_checks"])
    assert arm["union"]["value"] == result.union.value
    assert arm["expected"]["value"] == result.expected.value


def test_expected_robustness_is_a_mean_with_its_standard_error(run):
    (read,) = read_runs([run])
    text = Page(run_page(read)).text
    for row in read.report.rows:
        mean = row.evaluation.expected
        assert f"{100 * mean.value:.1f} ± {100 * mean.stderr:.1f}" in text
    assert "± is one standard error over the images" in text


def test_arms_that_lack_things_have_a_page_too(run):
    (read,) = read_runs([run])
    bare = replace(
        read.report.rows[1],
        comparison=None,
        adaptive_check=None,
        relative_flatness=None,
        input_curvature=None,
        time_ratio=None,
        path={},
        path_by_step={},
    )
    result = replace(bare.evaluation, curve=[], other_threats=[], union=None)
    rows = [replace(bare, evaluation=result)]
    alone = replace(read, report=replace(read.report, rows=rows), environment=None)
    page = Page(run_page(alone))
    assert not page.mistakes and "kappa could not be measured" in page.text
    assert "without the images" in page.text and "the most of" not in page.text
    assert "against plain" not in page.text.partition("What the columns mean")[0]


@pytest.mark.parametrize("name", ["digits_penalties_resnet", "finetune_efficientnet"])
def test_a_stored_report_has_a_page(name):
    text = run_page(read_runs([STORED / name])[0])
    assert not Page(text).mistakes and not sent_alone(text)


def test_names_do_nothing_on_a_page(run, tmp_path):
    """Names of arms, attacks, models, classes, versions and folders are shown as they are spelt."""
    report = read_report(run)
    recipe = json.loads(json.dumps(report.recipe))
    recipe["model"]["name"] = BAD
    rows = []
    for row in report.rows:
        stages = [replace(stage, attack=stage.attack + BAD) for stage in row.evaluation.stages]
        findings = [replace(FLAG, name=BAD, meaning=BAD, reference=BAD)]
        result = replace(row.evaluation, stages=stages, findings=findings)
        name = row.name if row.name == "plain" else row.name + BAD
        history = [replace(epoch, parts={BAD: 1.0}) for epoch in row.history]
        named = {"name": name, "model": {"name": BAD}, "history": history}
        rows.append(replace(row, evaluation=result, **named))
    folder = tmp_path / "a<b>&$x$"
    folder.mkdir()
    write_report_file(replace(report, recipe=recipe, rows=rows), folder)
    (folder / "environment.json").write_text(json.dumps({"flatreg": BAD, BAD: BAD}))
    image = torch.rand(1, 8, 8)
    arms = {row.name: Attacked(0, 1.0, 0, 1.0, BAD, True, image) for row in rows}
    file = write_page(folder, [Example(0, 0, image, arms)], [BAD])
    assert main(["compare", str(folder), f"output={tmp_path / 'c.html'}"]) == 0
    for text in (path.read_text(encoding="utf-8") for path in (file, tmp_path / "c.html")):
        page = Page(text)
        assert not page.mistakes and not sent_alone(text)
        assert "<script>x</script>" in page.text and "{{ 7*7 }}" in page.text
        assert "\\x1b[31m\\u202e\\ud800" in page.text and not {"\x1b", "\u202e", "\ud800"} & set(
            text
        )


def test_a_comparison_has_every_arm_and_paired_differences(compared):
    text = compared.read_text(encoding="utf-8")
    page = Page(text)
    assert not page.mistakes and not sent_alone(text) and len(text) < 1_500_000
    titles = [one["id"] for one in page.of("section")]
    assert titles == ["section-1", "section-2", "section-3", "runs"]
    of_seed = [read_report(STORED / f"fashion_mnist-{seed}").rows for seed in (0, 1)]
    assert "mean of 2 seeds" in page.text
    assert "could not be checked for fashion_mnist-0, fashion_mnist-1:" in page.text
    best = max(range(1, 4), key=lambda at: sum(r[at].evaluation.attacked.value for r in of_seed))
    for seed, rows in enumerate(of_seed):
        for row in rows:
            found = compare(rows[best].evaluation, row.evaluation).attacked
            if row is not rows[best]:
                said = (
                    f"{row.method} {seed} {seed} {100 * found.value:+.1f} [{100 * found.low:+.1f}"
                )
                assert said in page.text, said


def test_a_report_is_compared_with_a_small_copy_that_has_no_labels(run, tmp_path):
    """The copies that a repository keeps: `flatreg table --results`."""
    assert main(["table", str(run), "--results", str(tmp_path / "kept")]) == 0
    kept = tmp_path / "kept" / "run"
    report = read_report(kept)
    write_report_file(replace(report, recipe=report.recipe | {"seed": 1}), kept)
    kept = kept.rename(tmp_path / "kept" / "run-1")
    write_comparison([run, kept], tmp_path / "c.html")
    text = Page((tmp_path / "c.html").read_text(encoding="utf-8")).text
    assert "mean of 2 seeds" in text and "could not be checked" not in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{run}", "output={tmp}/c.md"], "output: expected a file FILE.html, got "),
        (["{tmp}/none", "output={tmp}/c.html"], "none: no such run or report.json"),
        (["{run}", "{run}", "output={tmp}/c.html"], "the same recipe with the same seed"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_one_line(run, tmp_path, capsys, arguments, message):
    filled = [text.format(run=run, tmp=tmp_path) for text in arguments]
    assert main(["compare", *filled]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error and not (tmp_path / "c.html").exists()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("which", ["run", "comparison"])
def test_a_browser_shows_it_on_a_phone_and_on_a_desk(run, compared, tmp_path, which, dark):
    file = compared if which == "comparison" else run / "report.html"
    found = measured(file.read_text(encoding="utf-8"), tmp_path, dark=dark)
    assert set(found) == {"400", "1400"}
    for width, page in found.items():
        assert not page["bad"], (width, page["bad"])
        assert page["texts"] > 100
        assert (page["paper"] == "rgb(255, 255, 255)") is not dark
