r"""Text of others, such as names of files and messages of libraries, as a line of ours shows it.

The command line reads recipes by it, so this file imports no torch.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

# Of a terminal: also what reverses the direction of a line. Lone surrogates are no text at all.
CONTROL = re.compile(
    "[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)
_COMPARED = 80  # characters of a name that is looked up


def printable(text: str) -> str:
    r"""The text with control characters spelt out, as what a file holds may steer a terminal.

    Ends of lines and tabs stay.

    >>> print(printable("a\x1b[2Jb"))
    a\x1b[2Jb
    """
    return CONTROL.sub(lambda found: found[0] if found[0] in "\n\t" else _spelt(found), text)


def shown(path: object) -> str:
    r"""A path, or a name in it, as a message shows it: nothing in it ends the line.

    >>> print(shown("a\nb"))
    a\nb
    """
    return CONTROL.sub(_spelt, str(path))


def _spelt(found: re.Match[str]) -> str:
    return ascii(found[0])[1:-1]


def one_line(text: object, most: int | None = 200) -> str:
    r"""The text in one line, without control characters, cut to `most` characters if not None.

    >>> one_line("a\n  b"), one_line("abcdefgh", 4)
    ('a b', 'abcd...')
    """
    line = printable(" ".join(str(text).split()))
    return line if most is None or len(line) <= most else f"{line[:most]}..."


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """The hint `; did you mean eps?`, or nothing where no known name is near.

    >>> did_you_mean("penaltys", ["penalties", "epochs"])
    '; did you mean penalties?'
    """
    by_lower = {one.lower(): one for one in known}
    near = difflib.get_close_matches(str(name).lower()[:_COMPARED], by_lower, 1)
    return f"; did you mean {by_lower[near[0]]}?" if near else ""


def counted(number: int, what: str) -> str:
    """A number of things.

    >>> counted(1, "epoch"), counted(20, "epoch")
    ('1 epoch', '20 epochs')
    """
    return f"{number} {what}{'s' * (number != 1)}"


def natural_key(name: str) -> list[int | str]:
    """Key of the natural order of names, in which 10 comes after 9: that of timm.

    timm's own fails where a name has a digit that is none of a number.

    >>> sorted(["b10", "b9", "b1\u00b2"], key=natural_key)
    ['b1\u00b2', 'b9', 'b10']
    """
    parts = re.split(r"(\d+)", name.lower())
    return [int(part) if part.isdecimal() else part for part in parts]
