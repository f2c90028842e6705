"""Every block of the README and of the pages under docs/ runs."""

import re
import shlex
from pathlib import Path

import pytest
import timm
import torch

from flatreg.models import pretrained
from flatreg.run.cli import main

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "recipes/README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCES = [
    (page.name, language, text)
    for page in PAGES
    for language, text in re.findall(r"```(\w*)\n(.*?)```", page.read_text(), re.S)
]
# A block without imports goes on from the one before it.
CHAINS: list[tuple[str, list[str]]] = []
for _page, _language, _text in FENCES:
    if _language == "python" and re.search("^(import|from) ", _text, re.M):
        CHAINS.append((_page, [_text]))
    elif _language == "python":
        CHAINS[-1][1].append(_text)
SHELL = "\n".join(text for _, language, text in FENCES if language == "")
COMMANDS = re.findall(r"^(?:flatreg (?:run|check|evaluate)|accelerate launch) .*$", SHELL, re.M)


@pytest.fixture(autouse=True)
def _fresh(monkeypatch, tmp_path):
    create_model = timm.create_model
    # Weights come from the network, which tests do not use; everything else of a block runs.
    monkeypatch.setattr(
        timm, "create_model", lambda name, pretrained=False, **kw: create_model(name, **kw)
    )
    monkeypatch.setattr(pretrained, "_check_reachable", lambda *_: None)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


@pytest.mark.parametrize(("page", "blocks"), CHAINS, ids=[f"{page}-" for page, _ in CHAINS])
def test_blocks(page, blocks):
    names = {"__name__": "readme"}
    for extra in re.findall("^(?:from|import) (peft|transformers)", "\n".join(blocks), re.M):
        pytest.importorskip(extra)
    for number, block in enumerate(blocks):
        exec(compile(block, f"{page}, block {number}", "exec"), names)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse_and_their_recipes_stand(command, capsys, monkeypatch):
    """`run` trains for minutes, so the recipe is checked in its stead; CI runs the quickstart."""
    words = shlex.split(command.split("#")[0])
    verb, *arguments = words[words.index("flatreg") + 1 :]
    monkeypatch.chdir(ROOT)
    if verb in ("run", "check"):
        if any("=/" in argument for argument in arguments):
            pytest.skip("needs data that is not in the repository")
        assert main(["check", *arguments]) == 0
        assert ": ok: " in capsys.readouterr().out


def test_there_is_something_to_run():
    assert len(CHAINS) >= 3 and len(COMMANDS) >= 3


def test_links_lead_somewhere():
    for page in PAGES:
        prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
        for target in re.findall(r"\]\(([^)#]+)\)", prose):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"
