"""A judged claim on disk and in the terminal."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

from pydantic import TypeAdapter

from flatreg.claims.result import SCHEMA, ClaimResult
from flatreg.data.files import write_whole

_RESULT = TypeAdapter(ClaimResult)


def claim_text(result: ClaimResult) -> str:
    """Verdict and every condition, at most 100 columns wide."""
    lines = [
        f"claim     {result.kind}: {result.verdict}",
        *_wrapped(result.statement),
        *_wrapped(result.setting),
    ]
    for subject, holds in result.subjects().items():
        lines.append(f"  {'yes' if holds else 'NO':<4}{subject}")
        for check in result.checks:
            if check.subject == subject:
                mark = "+" if check.holds else "-"
                lines += _wrapped(f"{mark} {check.criterion}: {check.found}", 6)
    return "\n".join(lines)


def write_claim(result: ClaimResult, folder: Path, caption: str) -> None:
    """Write `claim.json` and `claim.md`, which shows `figures/claim.png`."""
    raw = _RESULT.dump_python(result, mode="json") | {"verdict": result.verdict}
    write_whole(folder / "claim.json", json.dumps(raw, indent=1))
    quantities = list(dict.fromkeys(name for one in result.numbers.values() for name in one))
    lines = [["", *result.numbers]] + [
        [name, *(_cell(numbers.get(name)) for numbers in result.numbers.values())]
        for name in quantities
    ]
    head, *rows = (f"| {' | '.join(line)} |" for line in lines)
    head += "\n|---" + "|---:" * len(result.numbers) + "|"
    write_whole(
        folder / "claim.md",
        f"# {result.kind}: {result.verdict}\n\n{result.statement} ({result.paper})\n\n"
        f"```\n{claim_text(result)}\n```\n\n![{caption}](figures/claim.png)\n\n{caption}\n\n"
        f"{head}\n" + "\n".join(rows) + "\n\n95% intervals in brackets. Larger kappa = sharper.\n",
    )


def read_claim(folder: Path) -> ClaimResult:
    """Read `claim.json` back.

    Raises:
        ValueError: it has another schema.
    """
    raw = json.loads((folder / "claim.json").read_text())
    if raw.get("schema") != SCHEMA:
        raise ValueError(f"{folder}/claim.json: expected schema {SCHEMA}, got {raw.get('schema')}")
    raw.pop("verdict")
    return _RESULT.validate_python(raw)


def _wrapped(text: str, indent: int = 10) -> list[str]:
    return textwrap.wrap(
        text, 100, initial_indent=" " * indent, subsequent_indent=" " * (indent + 2)
    )


def _cell(measured: object) -> str:
    return "" if measured is None else str(measured)
