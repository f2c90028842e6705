"""The tests with the oldest and the newest of what flatreg runs on: `nox`, or `nox -s oldest`.

`nox -- tests/test_objective.py` runs some of the tests.
"""

from pathlib import Path

import nox

nox.options.default_venv_backend = "uv|virtualenv"
PROJECT = nox.project.load_toml(Path(__file__).parent / "pyproject.toml")["project"]


@nox.session(python="3.10", venv_backend="uv")  # pip knows no lowest version
def oldest(session: nox.Session) -> None:
    """The least version of every dependency that pyproject.toml allows and the others take."""
    tools = ("pytest", "hypothesis", "markdown-it-py", "webdataset")
    test = [one for one in PROJECT["optional-dependencies"]["test"] if one.startswith(tools)]
    session.install("--resolution", "lowest-direct", "-r", "pyproject.toml", *test)
    session.install("--no-deps", ".")
    # An old release may use what the newest one of its own dependencies deprecates.
    check(session, "-W", "default::DeprecationWarning")


@nox.session(python=["3.10", "3.13"])
def newest(session: nox.Session) -> None:
    """The newest version of everything."""
    session.install(".[test]")
    check(session)


@nox.session(python="3.11")
def docs(session: nox.Session) -> None:
    """The site, with every link checked."""
    session.install("-e", ".[docs]")
    session.run("mkdocs", "build")


def check(session: nox.Session, *options: str) -> None:
    """Every public name is imported, one epoch of the quickstart, the tests."""
    session.run("python", "-c", "import flatreg; [getattr(flatreg, n) for n in flatreg.__all__]")
    quick = ["epochs=1", "optimizer.warmup_epochs=0", "evaluation.attack=fast"]
    folder = f"output={session.create_tmp()}/quickstart"
    session.run("flatreg", "run", "recipes/quickstart.yaml", *quick, folder)
    session.run("pytest", "-q", *options, *session.posargs)
