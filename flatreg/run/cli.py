"""Command line: flatreg run | sweep | evaluate | measure | table | list | check."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from flatreg.run.catalogue import TOPICS, listing
from flatreg.run.commands import check, evaluate_run, measure, run, sweep, tabulate
from flatreg.run.recipe import RecipeError, load_recipe, parse_over


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; 0 on success, 2 with one line a mistake on stderr, 130 when interrupted."""
    options = _options(arguments)
    overrides = [o for o in options.overrides if not o.startswith("output=")]
    output = next(
        (o.removeprefix("output=") for o in options.overrides if o.startswith("output=")), None
    )
    try:
        if options.command == "check":
            check(load_recipe(options.recipe, overrides), options.recipe)
        elif options.command == "run":
            folder = Path(output or Path("runs") / Path(options.recipe).stem)
            run(load_recipe(options.recipe, overrides), folder)
        elif options.command == "sweep":
            folder = Path(output or Path("runs") / f"{Path(options.recipe).stem}-sweep")
            sweep(load_recipe(options.recipe, overrides), *parse_over(options.over), folder)
        elif options.command == "list":
            print(listing(options.topic))
        elif options.command == "table":
            kept = options.results and Path(options.results)
            tabulate(overrides, output and Path(output), kept)
        elif options.command == "measure":
            measure(options.model, options.data, overrides, output and Path(output))
        else:
            source = Path(options.folder)
            evaluate_run(source, overrides, Path(output or source / "evaluation"))
    except (ValueError, OSError, FloatingPointError) as error:
        if options.traceback:
            raise
        prefix = "" if isinstance(error, RecipeError) else "flatreg: "
        print(f"{prefix}{error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        resumes = options.command in ("run", "sweep", "evaluate")
        again = "; the same command goes on from there" if resumes else ""
        print(f"flatreg: interrupted{again}", file=sys.stderr)
        return 130
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse; overrides may stand on both sides of an option, which argparse alone refuses."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    unknown = [argument for argument in rest if argument.startswith("-")]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    options.overrides += rest
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="flatreg", description=__doc__)
    parser.add_argument("--traceback", action="store_true", help="show where a mistake came from")
    commands = parser.add_subparsers(dest="command", required=True)
    places = "key.path=value to change the recipe, output=DIR for the folder to write"
    for name, target, explanation in (
        ("run", "recipe", "train the arms of a recipe and report them side by side"),
        ("sweep", "recipe", "train a recipe once a value, and judge each on what is held back"),
        ("check", "recipe", "say every mistake of a recipe, or that there is none"),
        ("evaluate", "folder", "judge the models of a run again"),
        ("measure", "model", "measure the geometry of a timm model or an arm of a run"),
    ):
        command = commands.add_parser(name, help=explanation, description=explanation)
        command.add_argument(target)
        command.add_argument("overrides", nargs="*", metavar="key=value", help=places)
        if name == "measure":
            command.add_argument(
                "--data", metavar="digits|FILE.npz", help="left out, the data of the run"
            )
        if name == "sweep":
            command.add_argument(
                "--over",
                required=True,
                metavar="key=value,...",
                help="what to change and its values, as the inside of a YAML list",
            )
    explanation = "set the arms of finished runs side by side, in Markdown"
    results = commands.add_parser("table", help=explanation, description=explanation)
    results.add_argument(
        "overrides",
        nargs="+",
        metavar="RUN",
        help="folders of runs, or report.json files; output=FILE.md to write the table into, "
        "between <!-- table --> and <!-- /table --> where the file exists, and FILE.png",
    )
    results.add_argument(
        "--results", metavar="DIR", help="keep there, small, the reports the table is made of"
    )
    topics = commands.add_parser("list", help="what a recipe can name", description=listing.__doc__)
    topics.add_argument("topic", nargs="?", help=f"one of {', '.join(TOPICS)}; none for all")
    topics.set_defaults(overrides=[])
    return parser
