"""How numbers and tables read: cells, columns, wrapped lines and legends.

A table is a list of `Column` and rows of cells, which are strings; `terminal` and `markdown` turn
it into text.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from flatreg.evaluation.compare import PairedDifference
from flatreg.evaluation.findings import Finding
from flatreg.evaluation.geometry.by_outcome import CONFIDENCE
from flatreg.evaluation.geometry.card import Spread
from flatreg.measures.estimate import Estimate

WIDTH = 100
_INDENT = 10  # of what follows a label: a legend, a list of findings

LEGENDS = {
    "[..]": "Wilson's 95% interval of the accuracy",
    "attacked": "accuracy under the cascade of attacks: an upper bound on robust accuracy",
    "kappa": "mean relative flatness of the last layer; larger = sharper",
    "kappa*": "kappa at matched confidence: logits and head are scaled by one factor, at which the "
    f"median confidence of the clean images is {CONFIDENCE}",
    "time": "median time of an epoch, divided by that of the plain arm in the same run",
}


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Attributes:
        head: what stands above it.
        width: characters in the terminal; Markdown needs none.
        left: aligned left, and in the terminal cut to the width; the others are aligned right.
    """

    head: str
    width: int = 0
    left: bool = False


def terminal(
    columns: Sequence[Column], rows: Iterable[Sequence[str]], *, indent: int = 0
) -> list[str]:
    """Lines of a table; the line of heads is left out where all are empty.

    The last cell of a row with fewer cells than columns is written in full, after two spaces.
    """
    heads = [column.head for column in columns]
    lines = []
    for cells in [*([heads] if any(heads) else []), *rows]:
        text = " " * indent
        for place, (column, cell) in enumerate(zip(columns, cells, strict=False), start=1):
            if place == len(cells) < len(columns):
                text += f"  {cell}" if place > 1 else cell
            elif column.left:
                text += f"{cell[: column.width - 1]:<{column.width}}"
            else:
                text += f"{cell:>{column.width}}"
        lines.append(text.rstrip()[:WIDTH])
    return lines


def markdown(columns: Sequence[Column], rows: Iterable[Sequence[str]]) -> str:
    r"""A table in Markdown; stars in heads are escaped, those in cells are not.

    >>> print(markdown([Column("arm", left=True), Column("kappa*")], [["plain", "3.2"]]))
    | arm | kappa\* |
    |---|---:|
    | plain | 3.2 |
    """
    heads = [_escaped(column.head) for column in columns]
    rule = "|".join("---" if column.left else "---:" for column in columns)
    return "\n".join(
        [f"| {' | '.join(heads)} |", f"|{rule}|", *(f"| {' | '.join(cells)} |" for cells in rows)]
    )


def wrapped(label: str, text: str) -> list[str]:
    """Lines of `text` after `label`, at most 100 columns wide, the later ones indented.

    >>> wrapped("note", "short")
    ['note      short']
    """
    line = f"{label:<{_INDENT - 1}} {text}"
    return textwrap.wrap(line, WIDTH, subsequent_indent=" " * _INDENT)


def legend(*names: str) -> list[str]:
    """Lines that say what `names` of `LEGENDS` mean, for the terminal."""
    return [line for name in names for line in wrapped(name, LEGENDS[name])]


def bullets(meanings: Mapping[str, str]) -> list[str]:
    """A list in Markdown, name to meaning."""
    return [f"- {_escaped(f'{name}: {text}')}." for name, text in meanings.items()]


def _escaped(text: str) -> str:
    """Stars as Markdown prints them."""
    return text.replace("*", "\\*")


def pictures(figures: Mapping[str, str]) -> str:
    """Markdown of figures, given as file name to caption."""
    return "\n\n".join(f"![{caption}]({name})\n\n{caption}" for name, caption in figures.items())


def percent(share: Estimate) -> str:
    """A share in percent and its interval.

    >>> percent(Estimate.share(50, 100))
    '50.0 [40.4, 59.6]'
    """
    return f"{100 * share.value:.1f} [{100 * share.low:.1f}, {100 * share.high:.1f}]"


def points(difference: PairedDifference | None) -> str:
    """A difference of accuracies in percentage points and its interval."""
    if difference is None:
        return "-"
    value, low, high = (100 * x for x in (difference.value, difference.low, difference.high))
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"


def number(value: Estimate | float | None) -> str:
    """Three digits; of an estimate without its error."""
    if value is None:
        return "-"
    return f"{value.value if isinstance(value, Estimate) else value:.3g}"


def ratio(value: float | None) -> str:
    """How many times as large."""
    return "-" if value is None else f"{value:.2f}x"


def quartiles(spread: Spread) -> str:
    """Median and quartiles."""
    return f"{spread.median:.3g} [{spread.lower:.3g}, {spread.upper:.3g}]"


def plus_minus(value: Estimate | None) -> str:
    """Value and standard error to the digits that the error leaves.

    >>> def _mean(value, error):
    ...     return Estimate(value, value - 1.96 * error, value + 1.96 * error, 8, "mean")
    >>> plus_minus(_mean(72.93, 19.2)), plus_minus(_mean(3.349, 0.0532))
    ('73 ± 19', '3.349 ± 0.053')
    >>> plus_minus(_mean(0.0000234, 0.000009))
    '2.3e-05 ± 9e-06'
    """
    return "-" if value is None else with_error(value.value, value.stderr)


def with_error(value: float, stderr: float) -> str:
    """`plus_minus` of a value and its standard error; the value alone where the error is nan."""
    size = max(abs(value), stderr)
    if not (stderr > 0 and math.isfinite(size)):
        return f"{value:.3g}"
    if not 1e-3 <= size < 1e6:
        digits = max(0, math.floor(math.log10(size)) - math.floor(math.log10(stderr)))
        return f"{value:.{digits}e} ± {stderr:.0e}"
    decimals = max(0, 1 - math.floor(math.log10(stderr)))
    return f"{value:.{decimals}f} ± {stderr:.{decimals}f}"


def flags(findings: Iterable[Finding]) -> list[str]:
    """Each finding with its value and threshold."""
    return [f"{f.name} {f.value:.2f} > {f.threshold:.2f}" for f in findings]
