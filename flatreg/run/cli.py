"""Train with penalties on curvature, attack the models and measure them, from a recipe.

Help, `list` and misspelt arguments are answered from here and from what this file imports, without
torch: a command imports what it needs once its arguments are known to be right.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import signal
import sys
import textwrap
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn, TextIO

from flatreg.data.text import did_you_mean, one_line
from flatreg.run.catalogue import TOPICS, kinds, listing
from flatreg.run.help import EXIT_CODES, WIDTH, settings_text
from flatreg.run.interrupt import handled, raise_interrupted
from flatreg.run.places import DATA_FORMS, arm_folder
from flatreg.run.settings import RecipeError, parse_over, parse_settings, read_settings, told

COMMANDS = {  # each with an example
    "run": "flatreg run recipes/quickstart.yaml",
    "sweep": "flatreg sweep recipes/quickstart.yaml --over penalties.0.strength=0.3,1",
    "check": "flatreg check recipes/quickstart.yaml",
    "evaluate": "flatreg evaluate runs/quickstart eps=0.1",
    "measure": "flatreg measure runs/quickstart/margin-bound",
    "table": "flatreg table runs/quickstart",
    "compare": "flatreg compare runs/quickstart runs/weaker output=page.html",
    "export": "flatreg export runs/quickstart/margin-bound",
    "card": "flatreg card runs/quickstart/margin-bound license=apache-2.0",
    "push": "flatreg push runs/quickstart/export/margin-bound OWNER/NAME dry_run=true",
    "list": "flatreg list penalties",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; 0 on success, 2 with one line a mistake on stderr, 128 + N on signal N."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a report has "±", and not every locale does
            stream.reconfigure(errors="backslashreplace")
    options = _options(arguments)
    try:
        if options.command == "list":
            print(json.dumps(kinds(options.topic)) if options.json else listing(options.topic))
        else:
            _check_arguments(options)
            with handled(raise_interrupted):
                _run(options)
    except BrokenPipeError:  # of `flatreg list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except Exception as error:
        if options.traceback:
            raise
        prefix = "" if isinstance(error, RecipeError) else "flatreg: "
        _tell_mistake(told(error), error, as_json=options.json, prefix=prefix)
        return 2
    except KeyboardInterrupt as error:
        resumes = options.command in ("run", "sweep", "evaluate")
        again = "; the same command continues from there" if resumes else ""
        text = f"{str(error) or 'interrupted'}{again}"
        _tell_mistake(text, error, as_json=options.json, prefix="flatreg: ")
        return 128 + getattr(error, "number", signal.SIGINT)
    return 0


def _run(options: argparse.Namespace) -> None:
    """Run a command that needs torch; with --json its result is one document on stdout."""
    from flatreg.data.progress import silent

    aside: TextIO = io.StringIO() if options.quiet else sys.stderr
    with (
        silent() if options.quiet else nullcontext(),
        redirect_stdout(aside) if options.json else nullcontext(),
    ):
        document = _call(options)
    if options.json and _speaks():
        print(json.dumps(document))


def _speaks() -> bool:
    return os.environ.get("RANK", "0") == "0"


def program() -> int:
    """`main`, as a program: one of several processes leaves at once, whatever it ends by."""
    if not _one_of_several():
        return main()
    from flatreg.run.processes import leave

    leave(main)


def _one_of_several() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def _tell_mistake(text: str, error: BaseException, *, as_json: bool, prefix: str = "") -> None:
    """Print why a command ends, with --json as its one document too; of several processes one."""
    said: str | None = f"{prefix}{text}"
    if _one_of_several():
        from flatreg.run.processes import one_voice

        said = one_voice(f"{prefix}{text}", error)
    if said is not None:
        print(said, file=sys.stderr)
    if as_json and _speaks():
        print(json.dumps({"error": text}))


def _check_arguments(options: argparse.Namespace) -> None:
    """Refuse, before torch is imported, files and overrides that cannot be read."""
    if options.output == "":
        raise ValueError("output=: expected a folder or a file, got nothing")
    if options.command in ("run", "sweep", "check"):
        if not Path(options.recipe).exists():
            raise RecipeError(f"{one_line(options.recipe)}: {_no_recipe(options.recipe)}")
        read_settings(options.recipe, options.overrides)
    elif options.command in ("evaluate", "measure"):
        _check_model(options)
    elif options.command in ("export", "card", "push"):
        parse_settings(options.overrides)
    elif options.command in ("table", "compare"):
        for path in map(Path, options.overrides):
            if not (path / "report.json" if path.is_dir() else path).exists():
                raise FileNotFoundError(
                    f"{path}: no such run or report.json: give folders that `flatreg run` or "
                    "`flatreg evaluate` has finished"
                )
            if not path.is_dir() and path.suffix != ".json":
                raise ValueError(f"{path}: expected the folder of a run or a report.json")
    if options.command == "sweep":
        parse_over(options.over)


def _no_recipe(name: str) -> str:
    path = Path(name)
    with_suffix, recipes = f"{path.name}.yaml", Path("recipes")
    tried = (path.with_name(with_suffix), recipes / path.name, recipes / with_suffix)
    near = next((f"; did you mean {one_line(one)}?" for one in tried if one.exists()), "")
    return f"No such file: expected a recipe, such as recipes/quickstart.yaml{near}"


def _check_model(options: argparse.Namespace) -> None:
    """Refuse what is no model; `RUN/ARM` becomes `RUN/checkpoints/ARM`."""
    given, place = parse_settings(options.overrides), Path(options.model)
    takes_runs = options.command == "evaluate"
    if takes_runs and (place / "recipe.yaml").is_file():
        return
    try:
        options.model = str(arm_folder(place, or_run=takes_runs))
    except ValueError as error:
        if place.is_dir():
            raise
        if options.data is None and "data.kind" not in given:
            needs = f"a timm model needs --data DATA and eps=8/255; DATA is {DATA_FORMS}"
            raise ValueError(f"{error}; {needs}") from None


def _call(options: argparse.Namespace) -> dict[str, Any]:
    """Run a command; what --json prints."""
    from flatreg.report import summary
    from flatreg.run import commands, evaluation
    from flatreg.run.recipe import load_recipe

    overrides, output = options.overrides, options.output and Path(options.output)
    if options.command == "check":
        recipe = load_recipe(options.recipe, overrides)
        return commands.check(recipe, one_line(options.recipe), _run_folder(options))
    if options.command == "run":
        folder = _run_folder(options)
        report = commands.run_recipe(load_recipe(options.recipe, overrides), folder)
        return {"folder": str(folder)} | summary.of_report(report)
    if options.command == "sweep":
        folder = output or Path("runs") / f"{Path(options.recipe).stem}-sweep"
        recipe = load_recipe(options.recipe, overrides)
        result = commands.sweep(recipe, *parse_over(options.over), folder)
        return {"folder": str(folder)} | summary.of_sweep(result)
    if options.command == "table":
        kept = options.results and Path(options.results)
        return summary.of_sections(commands.tabulate(overrides, output, kept))
    if options.command == "compare":
        return {"file": str(commands.compare_runs(overrides, output or Path("comparison.html")))}
    if options.command == "measure":
        folder = evaluation.measure(options.model, options.data, overrides, output)
        speaks = options.json and _speaks()  # the other processes may look before it is written
        card = (folder / "card.json").read_text(encoding="utf-8") if speaks else "{}"
        return {"folder": str(folder), **json.loads(card)}
    if options.command == "export":
        if overrides:
            raise ValueError(f"export takes output=DIR alone, got {one_line(overrides[0])}")
        return {"folder": str(commands.export_arm(options.arm, output))}
    if options.command == "card":
        return {"file": str(commands.card(options.arm, overrides, output))}
    if options.command == "push":
        return commands.push_folder(Path(options.folder), options.repo, overrides)
    report, folder = evaluation.evaluate(options.model, options.data, overrides, output)
    return {"folder": str(folder)} | summary.of_report(report)


def _run_folder(options: argparse.Namespace) -> Path:
    return Path(options.output or Path("runs") / Path(options.recipe).stem)


class _Parser(argparse.ArgumentParser):
    """Says a mistake in one line, and what to write; its help ends with the settings."""

    def error(self, message: str) -> NoReturn:
        command = self.prog.partition(" ")[2]
        wrong = re.search(r"invalid choice: '(.*?)' ", message)
        if wrong and not command:
            near = did_you_mean(wrong[1], COMMANDS)
            message = f"invalid choice: there is no command {one_line(wrong[1], 80)!r}{near}"
        example = COMMANDS.get(command, "flatreg run recipes/quickstart.yaml")
        self.exit(2, f"{self.prog}: {one_line(message, 300)}; write {example}, or {self.prog} -h\n")

    def format_help(self) -> str:
        command = self.prog.partition(" ")[2]
        codes = textwrap.fill(EXIT_CODES, WIDTH)
        parts = (super().format_help().rstrip(), settings_text(command), codes)
        return "\n\n".join(part for part in parts if part) + "\n"


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse; overrides may stand on both sides of an option, which argparse alone refuses."""
    parser = _parser()
    written = io.StringIO()
    try:
        with redirect_stderr(written):
            options, rest = parser.parse_known_args(arguments)
            unknown = [a for a in rest if a.startswith("-") or options.command == "list"]
            if unknown:
                key = unknown[0].lstrip("-").partition("=")[0]
                hint = f" (settings are written {key}=VALUE)" if unknown[0][:2] == "--" else ""
                command = _Parser(prog=f"flatreg {options.command}")
                command.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    except SystemExit as end:
        if text := written.getvalue().rstrip():
            typed = sys.argv[1:] if arguments is None else arguments
            _tell_mistake(text, end, as_json="--json" in typed)
        raise
    given = options.overrides + rest
    options.overrides = [text for text in given if not text.startswith("output=")]
    outputs = [text.partition("=")[2] for text in given if text.startswith("output=")]
    options.output = outputs[-1] if outputs else None
    return options


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="flatreg", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--version", action="version", version=f"flatreg {version('flatreg')}")
    _add_common(parser, False)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, explanation: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=explanation, description=explanation)
        _add_common(added, argparse.SUPPRESS)  # what stands before the command counts as well
        return added

    places = "settings below; output=DIR for the folder to write"
    for name, explanation in (
        ("run", "train the arms of a recipe and report them side by side"),
        ("sweep", "try several values of one setting, compared on validation images"),
        ("check", "name every mistake of a recipe, without training"),
        ("evaluate", "attack the models of a run again, or any model, and report it"),
        ("measure", "measure the geometry of a timm model or an arm of a run"),
    ):
        added = command(name, explanation)
        if name in ("evaluate", "measure"):
            arm = "RUN/ARM" if name == "measure" else "RUN, RUN/ARM"
            added.add_argument(
                "model",
                help=f"{arm}, or a timm model: its name, hf-hub:OWNER/NAME, local-dir:FOLDER",
            )
            default = f"{DATA_FORMS}; by default the data of the run"
            added.add_argument("--data", metavar="DATA", help=default)
        else:
            added.add_argument("recipe", help="a YAML file")
        added.add_argument("overrides", nargs="*", default=[], metavar="key=value", help=places)
        if name == "sweep":
            values = "what to change and its values, as the inside of a YAML list"
            added.add_argument("--over", required=True, metavar="key=value,...", help=values)
    _add_tools(command)
    topics = command("list", "list the kinds that a recipe can name, with their settings")
    topics.add_argument("topic", nargs="?", help=f"one of {', '.join(TOPICS)}; none for all")
    topics.set_defaults(overrides=[])
    return parser


def _add_tools(command: Callable[[str, str], argparse.ArgumentParser]) -> None:
    """Commands on what runs have left."""
    for name, targets, explanation, settings in (
        (
            "export",
            {"arm": "RUN/ARM, an arm of a finished run"},
            "write the model of RUN/ARM as a folder that timm loads",
            "output=DIR for the folder to write; RUN/export/ARM by default",
        ),
        (
            "card",
            {"arm": "RUN/ARM, an arm of a finished run"},
            "export RUN/ARM with a model card for the Hugging Face Hub",
            "license=, name=, datasets=[..], report=FOLDER, output=DIR",
        ),
        (
            "push",
            {"folder": "as `flatreg card` wrote it", "repo": "OWNER/NAME on the Hub"},
            "upload an exported folder to OWNER/NAME on the Hugging Face Hub",
            "private=false, dry_run=true to list the files only, message=",
        ),
    ):
        added = command(name, explanation)
        for target, meaning in targets.items():
            added.add_argument(target, help=meaning)
        added.add_argument("overrides", nargs="*", default=[], metavar="key=value", help=settings)
    results = command("table", "print one table of the arms of finished runs, in Markdown")
    results.add_argument(
        "overrides",
        nargs="+",
        metavar="RUN",
        help="folders of runs, or report.json files; output=FILE.md to write the table into, "
        "between <!-- table --> and <!-- /table --> where the file exists, and FILE.png",
    )
    results.add_argument("--results", metavar="DIR", help="write small copies of the reports there")
    comparison = command("compare", "write one page that compares finished runs")
    places = "folders of runs, or report.json files; output=FILE.html (comparison.html)"
    comparison.add_argument("overrides", nargs="+", metavar="RUN", help=places)


def _add_common(parser: argparse.ArgumentParser, default: Any) -> None:
    for name, explanation in (
        ("json", "print the result as one JSON document on stdout, and nothing else there"),
        ("quiet", "print the result alone: no bars, and not what is done"),
        ("traceback", "show where a mistake came from"),
    ):
        parser.add_argument(f"--{name}", action="store_true", default=default, help=explanation)
