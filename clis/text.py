"""Text as people have it: files in UTF-8, names in one form or another, lines for a terminal."""

from __future__ import annotations

import codecs
import contextlib
import os
import shutil
import stat
import textwrap
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TextIO


def check_regular(path: str | Path) -> None:
    """Check that a path, if it exists, is a file that can be read now: a pipe might have to be waited for.

    Pipes that a shell has opened (``<(command)``) pass.

    Raises:
        ValueError: it is a pipe or a device.
    """
    with contextlib.suppress(OSError):  # reading it will say what is wrong
        mode = os.stat(path).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or str(path).startswith(("/dev/fd/", "/proc/"))):
            raise ValueError(f"{path}: not a regular file, but a pipe or device; name a file")


def read_text(path: str | Path) -> str:
    """Read a text file in UTF-8, with or without a byte order mark.

    Raises:
        FileNotFoundError, OSError: it cannot be read.
        ValueError: it is a pipe or not UTF-8; the message names the file and what it looks like.
    """
    check_regular(path)
    return decode(Path(path).read_bytes(), str(path))


def name_key(name: str) -> str:
    """Return the form of a name that is equal for names that people take for the same.

    Composed and decomposed accents, case, spaces or underscores, and spaces at the ends do not matter.
    """
    folded = unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
    return "_".join(folded.replace("_", " ").split())


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """Return a number with its noun: 1 image, 2 images, 2 boxes."""
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


def shortened(names: Sequence[str], limit: int = 10) -> str:
    r"""List the first names, printable; bytes of a file name that are not UTF-8 become \udc80 and so on."""
    return printable(", ".join(names[:limit])) + (", ..." if len(names) > limit else "")


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]], *, padded: bool = True) -> str:
    """Return a Markdown table, in which a ``|`` of a cell is escaped.

    Args:
        padded: align the columns for a terminal, the first to the left and the others to the right; not
            needed in files that are rendered.
    """
    lines = [[cell.replace("|", r"\|") for cell in row] for row in (head, *rows)]
    if padded:
        left, *right = (max(map(len, column)) for column in zip(*lines))
        lines = [
            [f"{first:<{left}}", *(f"{cell:>{width}}" for cell, width in zip(others, right))]
            for first, *others in lines
        ]
        rules = [f":{'-' * (left + 1)}", *(f"{'-' * (width + 1)}:" for width in right)]
    else:
        rules = ["---"] * len(head)
    first, *others = (f"| {' | '.join(line)} |" for line in lines)
    return "\n".join([first, f"|{'|'.join(rules)}|", *others])


def printable(name: str) -> str:
    """Escape control characters and lone surrogates, so that the name can be printed on any terminal."""
    name = name.encode("utf-8", "backslashreplace").decode()
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def wrapped(text: str, stream: TextIO) -> str:
    """Break the lines that are longer than a terminal is wide between words; for other streams, none."""
    if not stream.isatty():
        return text
    width = shutil.get_terminal_size().columns
    wrapper = textwrap.TextWrapper(
        width, expand_tabs=False, replace_whitespace=False, break_long_words=False, break_on_hyphens=False
    )

    def fitted(line: str) -> str:
        wrapper.subsequent_indent = " " * (len(line) - len(line.lstrip(" ")) + 2)
        return wrapper.fill(line) if len(line) > width else line

    return "\n".join(map(fitted, text.split("\n")))


def decode(data: bytes, source: str) -> str:
    """Decode UTF-8 with or without a byte order mark; `source` names it in the error.

    Raises:
        ValueError: it is not UTF-8.
    """
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError(f"{source}: the text is UTF-16; save it as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{source}, line {line}: byte {data[error.start]:#04x} is not UTF-8 (Latin-1?); save the file as "
            "UTF-8"
        ) from None
