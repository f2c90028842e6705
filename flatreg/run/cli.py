"""Train with penalties on curvature, attack the models and measure them, from a recipe.

Help, `list` and misspelt arguments are answered from here and from what this file imports, without
torch: a command imports what it needs once its arguments are known to be right.
"""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr
from importlib.metadata import version
from pathlib import Path

from flatreg.data.text import one_line
from flatreg.run.catalogue import TOPICS, listing
from flatreg.run.interrupt import handled, raise_interrupted
from flatreg.run.settings import RecipeError, parse_over, parse_settings, read_settings, told


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; 0 on success, 2 with one line a mistake on stderr, 128 + N on signal N."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a report has "±", and not every locale does
            stream.reconfigure(errors="backslashreplace")
    options = _options(arguments)
    try:
        if options.command == "list":
            print(listing(options.topic))
        else:
            _check_arguments(options)
            with handled(raise_interrupted):
                _call(options)
    except BrokenPipeError:  # of `flatreg list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except Exception as error:
        if options.traceback:
            raise
        prefix = "" if isinstance(error, RecipeError) else "flatreg: "
        _say(f"{prefix}{told(error)}", error)
        return 2
    except KeyboardInterrupt as error:
        resumes = options.command in ("run", "sweep", "evaluate")
        again = "; the same command continues from there" if resumes else ""
        _say(f"flatreg: {str(error) or 'interrupted'}{again}", error)
        return 128 + getattr(error, "number", signal.SIGINT)
    return 0


def program() -> int:
    """`main`, as a program: one of several processes leaves at once, whatever it ends by."""
    if not _one_of_several():
        return main()
    from flatreg.run.processes import leave

    leave(main)


def _one_of_several() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def _say(text: str, error: BaseException) -> None:
    """Print why a command ends; of several processes one does."""
    if _one_of_several():
        from flatreg.run.processes import one_voice

        said = one_voice(text, error)
        if said is None:
            return
        text = said
    print(text, file=sys.stderr)


def _check_arguments(options: argparse.Namespace) -> None:
    """Refuse, before torch is imported, files and overrides that cannot be read."""
    if options.command in ("run", "sweep", "check"):
        read_settings(options.recipe, options.overrides)
    elif options.command == "evaluate":
        read_settings(Path(options.folder) / "recipe.yaml", options.overrides)
    elif options.command in ("measure", "export", "card", "push"):
        parse_settings(options.overrides)
    else:
        for path in map(Path, options.overrides):
            if not (path / "report.json" if path.is_dir() else path).exists():
                raise FileNotFoundError(f"{path}: no such run or report.json")
            if not path.is_dir() and path.suffix != ".json":
                raise ValueError(f"{path}: expected the folder of a run or a report.json")
    if options.command == "sweep":
        parse_over(options.over)


def _call(options: argparse.Namespace) -> None:
    from flatreg.run import commands
    from flatreg.run.recipe import load_recipe

    overrides, output = options.overrides, options.output
    if options.command == "check":
        recipe = load_recipe(options.recipe, overrides)
        commands.check(recipe, one_line(options.recipe), _run_folder(options))
    elif options.command == "run":
        commands.run_recipe(load_recipe(options.recipe, overrides), _run_folder(options))
    elif options.command == "sweep":
        folder = Path(output or Path("runs") / f"{Path(options.recipe).stem}-sweep")
        commands.sweep(load_recipe(options.recipe, overrides), *parse_over(options.over), folder)
    elif options.command == "table":
        kept = options.results and Path(options.results)
        commands.tabulate(overrides, output and Path(output), kept)
    elif options.command == "compare":
        commands.compare_runs(overrides, Path(output or "comparison.html"))
    elif options.command == "measure":
        commands.measure(options.model, options.data, overrides, output and Path(output))
    elif options.command == "export":
        if overrides:
            raise ValueError(f"export takes output=DIR alone, got {one_line(overrides[0])}")
        commands.export_arm(options.arm, output and Path(output))
    elif options.command == "card":
        commands.card(options.arm, overrides, output and Path(output))
    elif options.command == "push":
        commands.push_folder(Path(options.folder), options.repo, overrides)
    else:
        source = Path(options.folder)
        commands.evaluate_run(source, overrides, Path(output or source / "evaluation"))


def _run_folder(options: argparse.Namespace) -> Path:
    return Path(options.output or Path("runs") / Path(options.recipe).stem)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse; overrides may stand on both sides of an option, which argparse alone refuses."""
    parser = _parser()
    written = io.StringIO()
    try:
        with redirect_stderr(written):
            options, rest = parser.parse_known_args(arguments)
            unknown = [argument for argument in rest if argument.startswith("-")]
            if unknown:
                parser.error(f"unrecognized arguments: {one_line(' '.join(unknown), 200)}")
    except SystemExit as end:
        if written.getvalue():
            _say(written.getvalue().rstrip(), end)
        raise
    given = options.overrides + rest
    options.overrides = [text for text in given if not text.startswith("output=")]
    outputs = [text.partition("=")[2] for text in given if text.startswith("output=")]
    options.output = outputs[-1] if outputs else None
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="flatreg", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--version", action="version", version=f"flatreg {version('flatreg')}")
    parser.add_argument("--traceback", action="store_true", help="show where a mistake came from")
    commands = parser.add_subparsers(dest="command", required=True)
    places = "key.path=value to change the recipe, output=DIR for the folder to write"
    for name, target, explanation in (
        ("run", "recipe", "train the arms of a recipe and report them side by side"),
        ("sweep", "recipe", "try several values of one setting, compared on validation images"),
        ("check", "recipe", "name every mistake of a recipe, without training"),
        ("evaluate", "folder", "evaluate the models of a run again, under other settings"),
        ("measure", "model", "measure the geometry of a timm model or an arm of a run"),
    ):
        command = commands.add_parser(name, help=explanation, description=explanation)
        command.add_argument(target)
        command.add_argument("overrides", nargs="*", default=[], metavar="key=value", help=places)
        if name == "measure":
            default = "by default the data of the run"
            command.add_argument("--data", metavar="digits|FILE.npz", help=default)
        if name == "sweep":
            values = "what to change and its values, as the inside of a YAML list"
            command.add_argument("--over", required=True, metavar="key=value,...", help=values)
    for name, targets, explanation, settings in (
        ("export", ["arm"], "write the model of RUN/ARM as a folder that timm loads", "output=DIR"),
        (
            "card",
            ["arm"],
            "export RUN/ARM with a model card for the Hugging Face Hub",
            "license=, name=, datasets=[..], report=FOLDER, output=DIR",
        ),
        (
            "push",
            ["folder", "repo"],
            "upload an exported folder to OWNER/NAME on the Hugging Face Hub",
            "private=false, dry_run=true, message=",
        ),
    ):
        command = commands.add_parser(name, help=explanation, description=explanation)
        for target in targets:
            command.add_argument(target)
        command.add_argument("overrides", nargs="*", default=[], metavar="key=value", help=settings)
    explanation = "print one table of the arms of finished runs, in Markdown"
    results = commands.add_parser("table", help=explanation, description=explanation)
    results.add_argument(
        "overrides",
        nargs="+",
        metavar="RUN",
        help="folders of runs, or report.json files; output=FILE.md to write the table into, "
        "between <!-- table --> and <!-- /table --> where the file exists, and FILE.png",
    )
    results.add_argument("--results", metavar="DIR", help="write small copies of the reports there")
    explanation = "write one page that compares finished runs"
    comparison = commands.add_parser("compare", help=explanation, description=explanation)
    places = "folders of runs, or report.json files; output=FILE.html (comparison.html)"
    comparison.add_argument("overrides", nargs="+", metavar="RUN", help=places)
    explanation = "list the kinds that a recipe can name, with their settings"
    topics = commands.add_parser("list", help=explanation, description=explanation)
    topics.add_argument("topic", nargs="?", help=f"one of {', '.join(TOPICS)}; none for all")
    topics.set_defaults(overrides=[])
    return parser
