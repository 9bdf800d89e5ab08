"""JSON read in parts, against json.loads of the whole: odd values, any chunk, broken text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from clis.data import json_lists
from clis.data.json_lists import NotJSON, read_list, read_lists

# What misleads a search for brackets: in strings, escaped, as keys; and numbers that a chunk may cut.
TEXT = st.text(
    st.sampled_from('}{][,:"\\ \n\u00e9\u2603\U0001f600a0') | st.characters(codec="utf-8"), max_size=8
)
INTEGER = st.integers(-(2**63), 2**64 - 1)  # orjson takes larger ones for floats
SCALAR = st.none() | st.booleans() | INTEGER | st.floats(allow_nan=False) | TEXT
VALUE = st.recursive(SCALAR, lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner), max_leaves=12)
ITEMS = st.lists(VALUE | st.dictionaries(TEXT, VALUE, max_size=3), max_size=8)
KEYS = ("images", "annotations", "categories")
DOCUMENT = st.dictionaries(st.sampled_from([*KEYS, "info", "licenses"]), ITEMS | VALUE)
FORM = {
    "indent": st.none() | st.integers(0, 3),
    "ensure_ascii": st.booleans(),
    "encoding": st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32"]),
    "chunk": st.integers(1, 40) | st.just(json_lists.CHUNK),
}


@pytest.fixture(
    scope="module", autouse=True, params=["the one", pytest.param("the other", marks=pytest.mark.slow)]
)
def parser(request):
    """The parser that the package takes here, and where that is orjson, the standard library's too."""
    if request.param == "the other" and json_lists.loads is json.loads:
        pytest.skip("orjson is not installed")
    loads = json_lists.loads if request.param == "the one" else json.loads
    with mock.patch.object(json_lists, "loads", loads):
        yield


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("json") / "file.json"


def lists_of(path: Path, chunk: int) -> dict[str, list[Any]]:
    """The lists that `read_lists` gives, put together."""
    lists: dict[str, list[Any]] = {}
    with mock.patch.object(json_lists, "CHUNK", chunk):
        for key, part in read_lists(path, KEYS):
            lists.setdefault(key, []).extend(part)
    return lists


def expected_lists(document: Any) -> dict[str, list[Any]]:
    if not isinstance(document, dict):
        return {}
    return {key: value for key, value in document.items() if key in KEYS and isinstance(value, list)}


@settings(max_examples=200)
@given(document=DOCUMENT | VALUE, **FORM)
@example({"images": [{"a": [{"b": 1}, {"c": 2}]}] * 3, "annotations": []}, None, True, "utf-8", 5)
@example({"info": -12.5e-7, "images": [1, -1.5, 2e300, 10**30]}, 0, True, "utf-8", 1)
@example({"images": [{}], "categories": [{}, {}]}, None, True, "utf-8", 60)  # a cut behind the list's end
def test_lists_in_parts_are_those_of_json_load(path, document, indent, ensure_ascii, encoding, chunk):
    text = json.dumps(document, indent=indent, ensure_ascii=ensure_ascii)
    path.write_text(text, encoding=encoding, errors="surrogatepass")
    # as text, since 1 == 1.0 == True
    assert json.dumps(lists_of(path, chunk)) == json.dumps(expected_lists(document))
    with mock.patch.object(json_lists, "CHUNK", chunk):
        if isinstance(document, list):
            assert json.dumps([item for part in read_list(path) for item in part]) == json.dumps(document)
        else:
            with pytest.raises(ValueError, match="a list of objects is needed"):
                list(read_list(path))


@settings(max_examples=200)
@given(document=DOCUMENT, data=st.data(), chunk=FORM["chunk"])
def test_broken_text_is_refused_where_json_load_refuses_it(path, document, data, chunk):
    text = json.dumps(document, ensure_ascii=False)
    at = data.draw(st.integers(0, len(text)), label="at")
    end = data.draw(st.sampled_from([at, at + 1, at + 5, len(text)]), label="end")
    insert = data.draw(
        st.sampled_from(["", ",", "]", "}", "[", "{", '"', "1", ".", "e", "\\", "\u00a0", "NaN"])
    )
    broken = text[:at] + insert + text[end:]
    path.write_text(broken, encoding="utf-8")
    try:
        pairs = json.loads(broken, object_pairs_hook=lambda pairs: pairs)
        expected = json.loads(broken)
    except ValueError:
        with pytest.raises(NotJSON, match="at character"):
            lists_of(path, chunk)
    else:
        wanted = [key for key, _ in pairs if key in KEYS] if isinstance(expected, dict) else []
        if len(set(wanted)) < len(wanted):
            with pytest.raises(NotJSON, match="a second"):
                lists_of(path, chunk)
        else:
            assert json.dumps(lists_of(path, chunk)) == json.dumps(expected_lists(expected))


@pytest.mark.parametrize("chunk", [1, 16, 1 << 22])
def test_every_cut_of_a_file_is_noticed(path, chunk):
    images = [{"id": 1, "name": "\u00e9}, {"}, {"id": 25}]
    document = {"info": {"year": 2020}, "images": images, "categories": []}
    content = json.dumps(document, ensure_ascii=False).encode()
    for length in range(len(content)):  # also in the middle of the letter of two bytes
        path.write_bytes(content[:length])
        with pytest.raises(NotJSON):
            lists_of(path, chunk)
    path.write_bytes(content)
    assert lists_of(path, chunk) == {"images": images, "categories": []}


def test_an_error_names_its_place_in_the_file(path):
    text = json.dumps({"images": [{"id": number} for number in range(100)]})
    at = text.index('{"id": 90}')
    path.write_text(text[:at] + "?" + text[at:])
    with pytest.raises(NotJSON, match=f"Expecting value at character {at}$"):
        lists_of(path, 64)


@pytest.mark.parametrize(
    ("value", "message"),
    [("[" * 200_000, "too many lists in lists"), ("1" * 5000 + "]}", "limit .* digits")],
)
def test_what_python_cannot_hold(path, value, message):
    path.write_text('{"images": [' + value)
    with pytest.raises(NotJSON, match=message):
        lists_of(path, 1 << 22)


def test_no_part_is_much_more_than_a_chunk(path):
    """That is what bounds the memory: of 400 records of 32 characters never more than two chunks at once."""
    records = [{"id": number, "name": "abcdefgh"} for number in range(1000, 1400)]
    told = []
    for nested in (False, True):  # nested: the cut is in vain, so item by item
        items = [{"list": [record, record]} if nested else record for record in records]
        path.write_text(json.dumps({"images": items}))
        told.clear()
        with mock.patch.object(json_lists, "CHUNK", 320):
            parts = [part for _, part in read_lists(path, KEYS, told.append)]
        assert [item for part in parts for item in part] == items
        assert max(map(len, parts)) <= 20
        assert sum(told) == path.stat().st_size
