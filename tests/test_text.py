"""Text files of other encodings: read where that is safe, else named with the line and what to do."""

from __future__ import annotations

import json

import pytest
from conftest import CATEGORIES

from clis.config_files import load_config
from clis.data.image_classes import _read_mapping
from clis.metric.official import official_precision
from clis.text import decode, read_text

WORD = "r\u00e9glages"  # its second letter is one byte in Latin-1, two in UTF-8


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    (tmp_path / "a.txt").write_text(WORD, encoding="utf-8-sig")
    assert read_text(tmp_path / "a.txt") == WORD


@pytest.mark.parametrize(
    ("encoding", "message"),
    [
        ("latin-1", r"^a\.txt, line 2: byte 0xe9 is not UTF-8 \(Latin-1\?\); save the file as UTF-8$"),
        ("utf-16", r"^a\.txt: the text is UTF-16; save it as UTF-8$"),
    ],
)
def test_other_encodings_are_named(encoding, message):
    with pytest.raises(ValueError, match=message):
        decode(f"one\n{WORD}\n".encode(encoding), "a.txt")


def test_a_config_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "mine.yaml").write_text(f"# {WORD}\ntrain: {{steps: 5}}\n", encoding="latin-1")
    with pytest.raises(ValueError, match=r"mine\.yaml, line 1: byte 0xe9"):
        load_config(tmp_path / "mine.yaml")


def test_the_first_line_of_a_mapping_counts_after_a_byte_order_mark(tmp_path):
    (tmp_path / "map.tsv").write_text("n01\tcat\nn02\tdog\n", encoding="utf-8-sig")
    assert _read_mapping(tmp_path / "map.tsv") == {"n01": "cat", "n02": "dog"}


def test_a_mapping_in_utf16_is_named(tmp_path):
    (tmp_path / "map.tsv").write_text("n01\tcat\n", encoding="utf-16")  # "Unicode text" of a spreadsheet
    with pytest.raises(ValueError, match=r"map\.tsv: the text is UTF-16"):
        _read_mapping(tmp_path / "map.tsv")


@pytest.mark.parametrize("federated", [True, False])
def test_the_published_packages_read_what_we_read(federated, tmp_path):
    """Both files with a byte order mark, which the packages themselves cannot read."""
    image = {"id": 1, "width": 40, "height": 40}
    image |= {"neg_category_ids": [], "not_exhaustive_category_ids": []} if federated else {}
    box = {"image_id": 1, "category_id": 1, "bbox": [4, 4, 20, 20]}
    truth = {
        "images": [image],
        "annotations": [{**box, "id": 1, "area": 400, "iscrowd": 0}],
        "categories": [{"id": 1, "name": CATEGORIES[0].name, "frequency": "f"}],
    }
    for name, document in (("truth", truth), ("results", [{**box, "score": 0.5}])):
        (tmp_path / f"{name}.json").write_text(json.dumps(document), encoding="utf-8-sig")
    figures, *_ = official_precision(tmp_path / "truth.json", tmp_path / "results.json")
    assert figures["AP"] == pytest.approx(1)
