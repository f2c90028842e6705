"""How numbers and tables read: cells, columns, wrapped lines and legends.

A table is its heads and rows of cells, all strings; `terminal` and `markdown` turn it into text.
Names come from data, recipes, folders and the files of others: what they hold is shown, and means
nothing to a terminal, to Markdown and HTML, or to matplotlib.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from urllib.parse import quote

from flatreg.data.text import printable
from flatreg.evaluation.compare import PairedDifference
from flatreg.evaluation.findings import Finding
from flatreg.evaluation.geometry.by_outcome import CONFIDENCE
from flatreg.measures.estimate import Estimate, Quartiles

Cells = tuple[Sequence[str], list[list[str]]]
"""A table: its heads, and its rows of as many cells."""

WIDTH = 100
_INDENT = 10  # of what follows a label: a legend, a list of findings

NORM_NAMES = {"linf": "Linf", "l2": "L2", "l1": "L1"}
LEGENDS = {
    "[..]": "Wilson's 95% interval of the accuracy",
    "attacked": "accuracy under the cascade of attacks: an upper bound on robust accuracy",
    "expected": "expected robustness: mean attacked accuracy over all radii from 0 to eps, by the "
    "trapezoid rule over the radii that were attacked",
    "kappa": "mean relative flatness of the last layer; larger = sharper",
    "kappa*": "kappa at matched confidence: logits and head are scaled by one factor, at which the "
    f"median confidence of the clean images is {CONFIDENCE}",
    "time": "median time of an epoch, divided by that of the plain arm in the same run",
}


def terminal(
    heads: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    left: int = 1,
    cut: int = 26,
    indent: int = 0,
) -> list[str]:
    """Lines of a table, each column as wide as its widest cell, after `indent` spaces.

    The first `left` columns are aligned left and cut to `cut` characters, the others aligned right.
    The last cell of a row that has fewer cells than there are heads is written in full; a line of
    heads that are all empty is omitted.
    """
    lines = [list(heads)] if any(heads) else []
    lines += [list(map(flat, cells)) for cells in rows]
    for cells in lines:
        for place in range(min(left, len(cells) - 1)):
            cells[place] = cells[place][:cut]
    whole = [cells for cells in lines if len(cells) == len(heads)]
    widths = [max(map(len, column)) for column in zip(*whole, strict=True)]
    texts = []
    for cells in lines:
        padded = [
            f"{cell:{'<' if place < left else '>'}{width}}"
            for place, (cell, width) in enumerate(zip(cells, widths, strict=False))
        ]
        if len(cells) < len(heads):
            padded[-1] = cells[-1]
        texts.append((" " * indent + "  ".join(padded)).rstrip()[:WIDTH])
    return texts


def flat(text: str) -> str:
    r"""The text in one line, with control characters spelt out.

    >>> flat("a\nb")
    'a b'
    """
    return printable(" ".join(text.splitlines()) if not text.isprintable() else text)


class Markup(str):
    """Text that is Markdown already."""

    __slots__ = ()


# A bracket that closes the text of a link; what opens a tag or an entity; what is special anywhere.
_SPECIAL = re.compile(
    r"[\\`*|$~]|(?<!\w)_|_(?!\w)|\](?=[(\[])|<(?=[A-Za-z/!?])|&(?=#?\w+;)|^[#>+=-](?=[#>+=-]*\s)"
)


def escaped(text: str) -> Markup:
    r"""The text as Markdown prints it.

    >>> print(escaped("kappa* of <b>a|b</b>"), escaped("[x](javascript:y)"))
    kappa\* of \<b>a\|b\</b> [x\](javascript:y)
    """
    return text if isinstance(text, Markup) else Markup(_SPECIAL.sub(r"\\\g<0>", flat(text)))


def strong(text: str) -> Markup:
    """The text in bold type."""
    return Markup(f"**{escaped(text)}**")


def code(text: str) -> Markup:
    """The text as code, in a line."""
    return Markup(f"`{flat(text).replace('`', chr(39))}`")


def fenced(text: str, language: str = "") -> str:
    """Lines of text as code; nothing in them ends it."""
    runs = [len(run) for run in re.findall("`+", text)]
    fence = "`" * max([3, *(run + 1 for run in runs)])
    return f"{fence}{language}\n{printable(text)}\n{fence}"


def figure_text(text: str, most: int = 120) -> str:
    r"""The text as matplotlib prints it, which takes what is between two dollars for a formula.

    It is cut to `most` characters, as no panel is left beside an endless name.

    >>> print(figure_text("$x$"), figure_text("abcdef", 4))
    \$x\$ abcd...
    """
    line = flat(text)
    return (line if len(line) <= most else f"{line[:most]}...").replace("$", r"\$")


def markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    r"""A table in Markdown.

    >>> print(markdown(["arm", "kappa*"], [["plain", "3.2"]]))
    | arm | kappa\* |
    |---|---:|
    | plain | 3.2 |
    """
    head, *rest = (f"| {' | '.join(map(escaped, cells))} |" for cells in (heads, *rows))
    return "\n".join([head, f"|---|{'---:|' * (len(heads) - 1)}", *rest])


def wrapped(label: str, text: str) -> list[str]:
    """Lines of `text` after `label`, at most 100 columns wide, the later ones indented.

    >>> wrapped("note", "short")
    ['note      short']
    """
    line = flat(f"{label:<{_INDENT - 1}} {text}")
    return textwrap.wrap(line, WIDTH, subsequent_indent=" " * _INDENT)


def fitted(line: str) -> str:
    """The line, or several of at most 100 columns, the later ones indented."""
    line = flat(line)
    if len(line) <= WIDTH:
        return line
    return "\n".join(textwrap.wrap(line, WIDTH, subsequent_indent=" " * _INDENT))


def legend(*names: str) -> list[str]:
    """Lines that say what `names` of `LEGENDS` mean, for the terminal."""
    return [line for name in names for line in wrapped(name, LEGENDS[name])]


def bullets(meanings: Mapping[str, str]) -> str:
    """A list in Markdown, name to meaning."""
    return "\n".join(f"- {escaped(f'{name}: {text}')}." for name, text in meanings.items())


def pictures(figures: Mapping[str, str]) -> str:
    """Markdown of figures, given as file name to caption."""
    return "\n\n".join(
        f"{picture(name, caption)}\n\n{escaped(caption)}" for name, caption in figures.items()
    )


def picture(name: str, caption: str) -> str:
    """Markdown of one figure, without its caption below it."""
    return f"![{escaped(caption)}]({quote(name)})"


def percent(share: Estimate | None) -> str:
    """A share in percent and its interval; a mean of shares and its standard error.

    >>> percent(Estimate.share(50, 100))
    '50.0 [40.4, 59.6]'
    >>> percent(Estimate(0.839, 0.8194, 0.8586, 300, "mean"))
    '83.9 ± 1.0'
    """
    if share is None:
        return "-"
    if share.kind == "mean":
        error = "" if math.isnan(share.stderr) else f" ± {100 * share.stderr:.1f}"
        return f"{100 * share.value:.1f}{error}"
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


def quartiles(spread: Quartiles) -> str:
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
