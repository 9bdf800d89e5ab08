"""Big JSON files in parts: a whole one as Python objects would take six times the size of the file."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Collection, Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any

from clis.text import check_regular


def _fastest_loads() -> Callable[[str], Any]:
    """Return orjson's `loads`, of the extra [fast] (half the time), else the standard library's."""
    try:
        from orjson import loads
    except ImportError:
        return json.loads
    return loads


loads = _fastest_loads()

CHUNK = 1 << 22
"""Bytes of a file that are read, and parsed, at once."""

_SPACE = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()


class NotJSON(ValueError):
    """The file is not JSON, or is truncated; the message gives the character."""


def read_list(path: str | Path) -> Iterator[list[Any]]:
    """Yield the items of the list that a JSON file holds, some thousands at a time; equal to `json.load`'s.

    The exception: with orjson installed, an integer of more than 64 bits may become a float.

    Raises:
        FileNotFoundError: there is no such file.
        NotJSON: it is not JSON, or is truncated.
        ValueError: the file is JSON, but not a list.
    """
    with open(path, "rb") as file:
        text = _Text(file)
        if text.next() not in ("[", ""):
            raise ValueError(f"a list of objects is needed, found {text.ahead()!r}")
        text.take("[")
        yield from text.items()
        text.end()


def read_lists(
    path: str | Path, keys: Collection[str], advance: Callable[[int], object] = lambda count: None
) -> Iterator[tuple[str, list[Any]]]:
    """Yield the lists of the object in a JSON file: pairs of a key and some thousands of its list's items.

    They come in the order of the file, an empty list as one empty part. Other keys are skipped, and so are
    values that are not lists; a file that is not an object has no keys.

    Args:
        keys: of the wanted lists.
        advance: called with the number of bytes after each part of the file that was read.

    Raises:
        FileNotFoundError: there is no such file.
        NotJSON: it is not JSON, or is truncated, or has one of the keys twice.
    """
    check_regular(path)
    with open(path, "rb") as file:
        text, seen = _Text(file, advance), set()
        if text.next() != "{":
            text.skip()
        else:
            for key in text.members():
                if key in keys and key in seen:
                    raise text.error(f"a second {key!r}")
                seen.add(key)
                if key in keys and text.next() == "[":
                    text.take("[")
                    for part in text.items():
                        yield key, part
                else:
                    text.skip()
        text.end()


class _Text:
    """The text of a JSON file, of which only the part that is being parsed is held."""

    def __init__(self, file: BufferedReader, advance: Callable[[int], object] = lambda count: None) -> None:
        self.file, self.advance = file, advance
        encoding = json.detect_encoding(file.peek(4)[:4])  # this and the next as json.loads does
        self.decoder = codecs.getincrementaldecoder(encoding)("surrogatepass")
        self.text, self.at, self.passed = "", 0, 0

    def more(self) -> bool:
        """Drop what has been parsed and read more; return False, unchanged, at the end of the file."""
        data = self.file.read(max(CHUNK, len(self.text) - self.at))  # one long value: twice as much each time
        try:
            new = self.decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            raise NotJSON(f"{error.encoding}: {error.reason}, before byte {self.file.tell()}") from None
        if not data:
            return False
        self.text, self.at, self.passed = self.text[self.at :] + new, 0, self.passed + self.at
        self.advance(len(data))
        return True

    def next(self) -> str:
        """Return the next character that is not white space; empty at the end."""
        while True:
            space = _SPACE.match(self.text, self.at)
            assert space is not None  # it also matches no character
            self.at = space.end()
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.more():
                return ""

    def take(self, characters: str) -> str:
        """Consume and return one of these characters."""
        found = self.next()
        if not found or found not in characters:
            raise self.error(f"{' or '.join(characters)} is expected")
        self.at += 1
        return found

    def value(self) -> Any:
        """Parse and return one value of any kind."""
        self.next()
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, self.at)
            except RecursionError:
                raise self.error("too many lists in lists") from None
            except ValueError as error:  # JSONDecodeError, or of a number with too many digits
                if not self.more():
                    place = getattr(error, "pos", self.at)
                    raise self.error(getattr(error, "msg", str(error)), place) from None
            else:
                # A number may go on: 1, 1. and 1e- are three beginnings of which the first is a value.
                if end + 2 < len(self.text) or not self.more():
                    self.at = end
                    return value

    def skip(self) -> None:
        """Skip one value; a list item by item."""
        if self.next() == "[":
            self.take("[")
            for _ in self.items():
                pass
        else:
            self.value()

    def members(self) -> Iterator[str]:
        """Yield the keys of an object; the caller consumes the value of each."""
        self.take("{")
        if self.next() == "}":
            self.take("}")
            return
        while True:
            if self.next() != '"':
                raise self.error('" is expected')
            key = self.value()
            self.take(":")
            yield key
            if self.take(",}") == "}":
                return

    def items(self) -> Iterator[list[Any]]:
        """Yield the items of a list after its opening bracket, in parts; an empty list as one empty part."""
        if self.next() == "]":
            self.take("]")
            yield []
            return
        last = False
        while not last:
            if len(self.text) - self.at < CHUNK:
                self.more()
            items = self._fast_items()
            if items is None:
                items, last = self._slow_items()
            yield items

    def _fast_items(self) -> list[Any] | None:
        """Parse all items up to the last place between two objects.

        That place may also be in a nested value or after the end of the list, but then the text before it is
        not the inside of a list.
        """
        cut = self._last_comma()
        if cut < 0:
            return None
        try:
            items = loads(f"[{self.text[self.at : cut]}]")
        except (ValueError, RecursionError):
            return None
        self.at = cut + 1
        return items

    def _slow_items(self) -> tuple[list[Any], bool]:
        """Parse items singly until more text is read or the list ends; return them and whether it ended."""
        items, passed = [], self.passed
        while self.passed == passed:
            items.append(self.value())
            if self.take(",]") == "]":
                return items, True
        return items, False

    def _last_comma(self) -> int:
        """Return the place of the last comma between an end and a start of objects, -1 if there is none."""
        end = len(self.text)
        while (brace := self.text.rfind("{", self.at, end)) > 0:
            start = max(brace - 64, self.at)
            before = self.text[start:brace].rstrip()
            if before.endswith(",") and before[:-1].rstrip().endswith("}"):
                return start + len(before) - 1
            end = brace
        return -1

    def end(self) -> None:
        """Check that nothing follows."""
        if self.next():
            raise self.error("the end of the file is expected")

    def ahead(self) -> str:
        """Return the beginning of the unparsed text, for messages."""
        return self.text[self.at : self.at + 60]

    def error(self, what: str, at: int | None = None) -> NotJSON:
        """Make the error for a fault at a position of the unparsed text."""
        at = self.at if at is None else at
        return NotJSON(f"{what} at character {self.passed + at}")
