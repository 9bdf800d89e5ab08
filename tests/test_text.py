"""Text files of other encodings, read where that is safe, else named; lines that fit a terminal."""

from __future__ import annotations

import dataclasses
import io
import json
import os

import pytest
from conftest import CATEGORIES

from clis.config_files import load_config
from clis.data.annotated_images import image_path
from clis.data.categories import Category, check_same_categories
from clis.data.image_classes import MemberLabels, _read_mapping, class_labels
from clis.metric.detections import Detections
from clis.metric.official import official_precision
from clis.text import decode, markdown_table, read_text, wrapped

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


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_lines_break_between_words_on_a_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    text = "| a-long-name  | 51.7 | 46.8 |\n  - more than twenty letters\n" + "x" * 30
    # what follows hangs below its own line's indent; a word that is longer than the terminal stays whole
    expected = "| a-long-name  |\n  51.7 | 46.8 |\n  - more than twenty\n    letters\n" + "x" * 30
    assert wrapped(text, Terminal()) == expected
    assert wrapped(text, io.StringIO()) == text  # a file or pipe has no width


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


CAFE, COMBINED = "caf\u00e9", "cafe\u0301"  # one letter with its accent, and a letter and its accent


def named(*names: str) -> list[Category]:
    return [dataclasses.replace(category, name=name) for category, name in zip(CATEGORIES, names)]


@pytest.mark.parametrize(
    ("name", "same"),
    [(CAFE, True), (COMBINED, True), ("Caf\u00e9 ", True), ("CAFE\u0301", True), ("cafe", False)],
)
def test_class_folders_are_matched_as_people_mean_them(name, same):
    assert class_labels(named(CAFE, "tea"), None)(name) == (0 if same else None)


def test_mappings_too_and_two_meanings_are_an_error(tmp_path):
    (tmp_path / "map.tsv").write_text(f"{COMBINED}\tTEA\n", encoding="utf-8")
    categories = named("coffee", "tea")
    assert class_labels(categories, tmp_path / "map.tsv")(CAFE) == 1
    (tmp_path / "map.tsv").write_text(f"{COMBINED}\ttea\n{CAFE} \tcoffee\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"map\.tsv, line 2: .* means 'coffee' here and 'tea' above"):
        class_labels(categories, tmp_path / "map.tsv")


def test_a_class_of_two_names_is_an_error_that_names_both():
    label_of = class_labels(named("cat", "Cat "), None)
    assert label_of("cat") == 0
    with pytest.raises(ValueError, match=r"class 'CAT': is category 1 'cat' or 2 'Cat ' meant"):
        label_of("CAT")


def test_splits_of_one_data_set_may_spell_a_name_differently():
    first, second = (dataclasses.replace(CATEGORIES[0], name=name) for name in (CAFE, f"{COMBINED} "))
    check_same_categories([first], "train", [second], "val")
    with pytest.raises(ValueError, match="they must be of one data set"):
        check_same_categories([first], "train", [dataclasses.replace(first, name="tea")], "val")


def test_labels_of_members_whose_accents_are_composed(tmp_path):
    """A label file of a keyboard for a tar of a Mac."""
    (tmp_path / "labels.tsv").write_text(f"a/{CAFE}.jpg\ttea\n", encoding="utf-8")
    labels = MemberLabels(tmp_path / "labels.tsv", lambda name: 3)
    assert labels.take([f"./a/{COMBINED}.jpg".encode()], "x.tar").tolist() == [3]


def test_file_names_of_windows_and_of_the_other_unicode_form(tmp_path):
    (tmp_path / "photos").mkdir()
    for name in (f"{COMBINED}.jpg", "b.jpg", "c\\d.jpg"):
        (tmp_path / "photos" / name).write_bytes(b"x")
    assert image_path(tmp_path, f"photos\\{CAFE}.jpg").exists()
    assert image_path(tmp_path, "photos\\b.jpg") == tmp_path / "photos" / "b.jpg"
    assert image_path(tmp_path / "photos", "c\\d.jpg").exists()  # a name of POSIX may have one
    assert image_path(tmp_path, "photos\\none.jpg") == tmp_path / "photos\\none.jpg"


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(ValueError, match=r"pipe\.yaml: not a regular file, but a pipe"):
        load_config(tmp_path / "pipe.yaml")
    with pytest.raises(ValueError, match=r"pipe\.yaml: not a regular file, but a pipe"):
        Detections.load(tmp_path / "pipe.yaml")


def test_a_bar_in_a_cell_ends_no_column():
    table = markdown_table(["run", "AP"], [["a|b", "1.5"], ["c", "100.0"]])
    assert table.splitlines() == [
        "| run  |    AP |",
        "|:-----|------:|",
        r"| a\|b |   1.5 |",
        "| c    | 100.0 |",
    ]
    assert markdown_table(["a", "b"], [["|", ""]], padded=False) == "| a | b |\n|---|---|\n| \\| |  |"
