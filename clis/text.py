"""Text files as people have them: UTF-8 with or without a byte order mark, or named where it is not."""

from __future__ import annotations

import codecs
import unicodedata
from pathlib import Path


def read_text(path: str | Path) -> str:
    """Read a text file in UTF-8, with or without a byte order mark.

    Raises:
        FileNotFoundError, OSError: it cannot be read.
        ValueError: it is not UTF-8; the message names the file and what it looks like.
    """
    return decode(Path(path).read_bytes(), str(path))


def loose(name: str) -> str:
    """Return the form of a name that is equal for names that people take for the same.

    Composed and decomposed accents, case, spaces or underscores, and spaces at the ends do not matter.
    """
    folded = unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
    return "_".join(folded.replace("_", " ").split())


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
