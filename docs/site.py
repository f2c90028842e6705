"""Hooks of the site: its pages lie where they lie in the repository, and some are generated.

Links between Markdown files then work on GitHub and on the site alike, and `mkdocs build --strict`
checks them. The reference is made of the public names and of the classes that recipes can name.
"""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import griffe
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
# Groups of flatreg/__init__.pyi, by their comments, on the page "training"; others on "evaluation".
TRAINING = ("a forward pass", "the loss", "the data manifold", "sharpness-aware")
EXAMPLE = re.compile(r"^\[examples/(\w+\.py)\]\(\S+\)$", re.M)


# A formula in a docstring: a block, which ends at an empty line, or within a line.
BLOCK = re.compile(r"^( *)\.\. math:: (.*(?:\n.+)*)", re.M)
INLINE = re.compile(r":math:`([^`]*)`")


class Docstrings(griffe.Extension):
    """Lets griffe read dataclasses of pydantic, and carries formulas past Markdown."""

    def on_class_instance(self, *, cls: griffe.Class, **kwargs: Any) -> None:
        """Name the decorator of the standard library, the one that griffe knows."""
        known = griffe.ExprName("dataclasses.dataclass")
        for decorator in cls.decorators:
            if str(decorator.value) == "configuration":
                named = griffe.ExprKeyword("kw_only", "True")
                decorator.value = griffe.ExprCall(known, [named])
            elif str(decorator.value).startswith("dataclass("):
                decorator.value.function = known

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Hide the formulas."""
        if obj.docstring is not None:
            text = BLOCK.sub(lambda m: f"{m[1]}{hidden('block', m[2])}", obj.docstring.value)
            obj.docstring.value = INLINE.sub(lambda m: hidden("inline", m[1]), text)


def hidden(display: str, formula: str) -> str:
    """A word that Markdown leaves as it is."""
    return f"MATHML{display}{formula.encode().hex()}END"


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Write the formulas as MathML, which browsers draw by themselves."""
    return re.sub(
        "MATHML(block|inline)([0-9a-f]*)END",
        lambda found: convert(bytes.fromhex(found[2]).decode(), display=found[1]),
        html,
    )


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Take every tracked file of a kind that pages link to, and add the reference."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    kinds = (".md", ".css", ".png", ".svg", ".yaml", ".py", ".json", ".cff", "LICENSE")
    rooms = ("docs/", "recipes/", "examples/", "benchmarks/")
    sources = [
        n
        for n in listed.stdout.splitlines()
        if n.endswith(kinds) and ("/" not in n or n.startswith(rooms))
    ]
    theme = [file for file in files if file.src_dir != config.docs_dir]
    pages = [File.generated(config, name, abs_src_path=str(ROOT / name)) for name in sources]
    made = {f"reference/{name}.md": text for name, text in reference().items()}
    pages += [File.generated(config, name, content=text) for name, text in made.items()]
    return Files([*theme, *pages])


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Show the script below a line that is a link to it."""

    def shown(link: re.Match[str]) -> str:
        script = (ROOT / "examples" / link[1]).read_text(encoding="utf-8")
        return f"{link[0]}\n\n```python\n{script}```"

    return EXAMPLE.sub(shown, markdown)


def reference() -> dict[str, str]:
    """Text of the generated pages, by name; an object stands on the first page that names it."""
    pages = {"training": "# Training\n", "evaluation": "# Evaluation and recipes in Python\n"}
    groups = re.split(
        r"^# ", (ROOT / "flatreg/__init__.pyi").read_text(encoding="utf-8"), flags=re.M
    )[2:]
    for group in groups:  # the first one, left out, are the rooms
        title, _, imports = group.partition("\n")
        page = "training" if title.startswith(TRAINING) else "evaluation"
        pages[page] += f"\n## {title[0].upper()}{title[1:]}\n\n{entries('flatreg', imports)}"
    for room in ("attacks", "measures", "data"):
        stub = ROOT / f"flatreg/{room}/__init__.pyi"
        imports = (stub if stub.exists() else stub.with_suffix(".py")).read_text(encoding="utf-8")
        known = "".join(pages.values())
        new = [e for e in entries(f"flatreg.{room}", imports).splitlines() if e and e not in known]
        pages[room] = f"# {room.title()}\n\n" + "\n\n".join(new) + "\n"
    return pages | {"recipes": recipe_reference()}


def entries(package: str, imports: str) -> str:
    """What a package imports from its own files, as entries of the reference."""
    text = ""
    for module, names in re.findall(r"from (\S+) import (\([^)]*\)|.*)", imports):
        path = f"{package}{module}" if module.startswith(".") else module
        for name in re.findall(r"(\w+)(?: as \w+)?", names):
            text += f"::: {path}.{name}\n\n" if path.startswith("flatreg.") else ""
    return text


def recipe_reference() -> str:
    """What a recipe can name, as `flatreg list` has it."""
    text = (
        "# Recipes\n\nWhat a recipe can name, as `flatreg list` prints it. Settings without "
        "`=` are needed; of choices `a|b` after `=` the first is the default. "
        "[Recipes and results](../recipes/README.md) has the settings of the recipe itself.\n"
    )
    catalogue = json.loads((ROOT / "flatreg/run/catalogue.json").read_text(encoding="utf-8"))
    for topic, kinds in catalogue.items():
        text += f"\n## {topic}\n\n| kind | | settings |\n|---|---|---|\n"
        for kind, (first, *settings) in kinds.items():
            said = first.replace("|", "\\|")  # within backticks Markdown takes a bar as it is
            listed = "<br>".join(f"`{one}`" for one in settings if one)
            text += f"| `{kind}` | {said} | {listed} |\n"
    return text
