"""The cache of annotation files: the same arrays with and without it, stale and damaged ones, processes."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import pickle
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from lvis_cases import random_case
from runs import REPOSITORY, spawn

from clis.config_files import load_config
from clis.data import annotation_cache, annotations, json_lists
from clis.data.annotation_cache import cache_folder
from clis.data.annotations import (
    Annotations,
    checked_for_training,
    load_annotations,
    load_training_annotations,
)
from clis.data.streams import make_streams, read_annotations
from clis.engine.run_folder import regions_file

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
SAMPLES = ["coco_mini/train.json", "lvis/lvis_v0.5_val_100.json"]


def document(seed: int = 0, federated: bool = True) -> dict:
    """Some images and boxes, also crowds; the first box has no area, the second leaves its image by far."""
    content, _ = random_case(np.random.default_rng(seed), federated)
    content["annotations"][0]["bbox"] = [3, 3, 0, 5]
    content["annotations"][1] |= {"bbox": [-30, 3, 50, 5], "area": 250, "iscrowd": 0}
    return content


@pytest.fixture
def path(tmp_path, monkeypatch) -> Path:
    """An annotation file that counts as a big one, with a cache folder of its own."""
    monkeypatch.setenv("CLIS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(annotations, "CACHED_BYTES", 1)
    path = tmp_path / "train.json"
    path.write_text(json.dumps(document()))
    return path


def caches(path: Path) -> list[str]:
    """Return the forms of a file's caches, one for each file that was there, sorted; no temporary ones."""
    return sorted(folder.name.rpartition("-")[0] for folder in cache_folder(path).glob("[!.]*"))


def mapped_file(array: np.ndarray) -> Path:
    return Path(array.base.filename)


def test_what_killed_writers_left_goes_with_the_next(path):
    """A folder of an hour ago; one of this minute may be somebody's at work."""
    load_annotations(path)
    old, new = (cache_folder(path) / f".file.{number}.x.tmp" for number in (1, 2))
    for left in (old, new):
        left.mkdir()
    os.utime(old, (0, 0))
    path.write_text(path.read_text() + " ")
    load_annotations(path)
    assert [folder.name for folder in cache_folder(path).glob(".*")] == [new.name]


def test_caches_of_earlier_files_go_when_nobody_has_used_them_for_long(path):
    """Three files of a name; a week after the last use of the first, a fourth."""
    for _ in range(3):
        path.write_text(path.read_text() + " ")
        load_annotations(path)
    assert caches(path) == ["file"] * 3
    oldest = min(cache_folder(path).iterdir(), key=lambda folder: (folder / "index.json").stat().st_mtime_ns)
    os.utime(oldest / "index.json", (0, 0))
    path.write_text(path.read_text() + " ")
    load_annotations(path)
    assert caches(path) == ["file"] * 3
    assert not oldest.exists()
    used = mapped_file(load_annotations(path).bboxes).with_name("index.json")
    os.utime(used, (0, 0))
    load_annotations(path)
    assert used.stat().st_mtime > 0


def test_two_machines_with_files_of_their_own_share_a_cache_folder(path, reads, tmp_path):
    """One path, with the disk of one machine or the other below it: neither removes what the other maps."""
    texts = path.read_text(), path.read_text().replace('"height": 400', '"height": 401')
    for number, text in enumerate(texts):
        (tmp_path / f"disk{number}").mkdir()
        (tmp_path / f"disk{number}" / "train.json").write_text(text)
    mapped = None
    for visit in range(6):
        disk = (tmp_path / f"disk{visit % 2}").rename(tmp_path / "disk")
        found = load_annotations(disk / "train.json")
        assert set(found.image_sizes[:, 0]) == {400 + visit % 2}
        mapped = mapped or mapped_file(found.bboxes)
        assert mapped.exists()
        disk.rename(tmp_path / f"disk{visit % 2}")
    assert len(reads) == 2


def test_annotations_sent_to_a_process_are_never_another_files(path):
    """The file changes while they are on their way, then the cache does."""
    first = load_annotations(path)
    sent = pickle.dumps(first)
    path.write_text(path.read_text().replace('"height": 400', '"height": 401'))
    load_annotations(path)
    assert_same(pickle.loads(sent), first)
    file = mapped_file(first.image_sizes)
    sizes = np.load(file) + 1
    file.unlink()
    np.save(file, sizes)
    with pytest.raises(ValueError, match=r"image_sizes\.npy: has changed since it was opened"):
        pickle.loads(sent)
    shutil.rmtree(cache_folder(path))
    with pytest.raises(ValueError, match=r"\.npy: gone or damaged"):
        pickle.loads(sent)


@pytest.fixture
def reads(monkeypatch) -> list[Path]:
    """The files that were parsed, one entry each time."""
    parse, files = annotations.document_parts, []

    def noted(path, advance):
        files.append(path)
        return parse(path, advance)

    monkeypatch.setattr(annotations, "document_parts", noted)
    return files


def assert_same(first: Annotations, second: Annotations) -> None:
    """Every array, category and value."""
    for field in dataclasses.fields(Annotations):
        ours, expected = getattr(first, field.name), getattr(second, field.name)
        if isinstance(expected, np.ndarray):
            np.testing.assert_array_equal(ours, expected, strict=True)
        elif field.name in ("negatives", "not_exhaustive"):
            for a, b in zip(ours, expected, strict=True):
                np.testing.assert_array_equal(a, b, strict=True)
        else:
            assert ours == expected, field.name


def is_mapped(found: Annotations) -> bool:
    return all(isinstance(array.base, np.memmap) for array in (found.bboxes, found.negatives[1]))


@pytest.mark.parametrize("federated", [True, False])
def test_the_cache_gives_what_the_file_gives(path, reads, monkeypatch, federated):
    path.write_text(json.dumps(document(3, federated)))
    first, second = load_annotations(path), load_annotations(path)
    assert len(reads) == 1
    assert is_mapped(first)
    assert is_mapped(second)
    training, counts = zip(*(load_training_annotations(path, drop_invalid=True) for _ in range(2)))
    assert len(reads) == 1  # made of the cached arrays
    monkeypatch.setattr(annotations, "CACHED_BYTES", 1 << 40)
    plain = load_annotations(path)
    assert len(reads) == 2
    assert not is_mapped(plain)
    expected, expected_counts = checked_for_training(plain, drop_invalid=True)
    assert min(expected_counts["dropped boxes"], expected_counts["clipped boxes"]) >= 1
    for found in (first, second):
        assert_same(found, plain)
    for found, found_counts in zip(training, counts):
        assert is_mapped(found)
        assert_same(found, expected)
        assert found_counts == expected_counts


@pytest.mark.parametrize("sample", SAMPLES)
def test_real_files_in_small_parts_and_from_the_cache(path, monkeypatch, sample):
    if not (SHARED / sample).exists():
        pytest.skip("sample data is not here")
    path.write_bytes((SHARED / sample).read_bytes())
    monkeypatch.setattr(annotations, "CACHED_BYTES", 1 << 40)
    plain = load_annotations(path)
    monkeypatch.setattr(annotations, "CACHED_BYTES", 1)
    monkeypatch.setattr(json_lists, "CHUNK", 2000)
    assert_same(load_annotations(path), plain)
    assert_same(load_annotations(path), plain)


def test_lists_in_any_order_and_what_lies_between(path, monkeypatch):
    content = document()
    expected = load_annotations(path)
    monkeypatch.setattr(json_lists, "CHUNK", 50)
    for order in itertools.permutations(["images", "annotations", "categories"]):
        between = {"info": {"year": 2020}} | {key: content[key] for key in order} | {"licenses": [{}, [], 5]}
        path.write_text(json.dumps(between))
        assert_same(load_annotations(path), expected)


def test_a_fault_far_into_the_file_is_named(path, monkeypatch):
    content = document()
    monkeypatch.setattr(json_lists, "CHUNK", 100)
    last = content["annotations"][-1]
    kept = last.pop("bbox")
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"annotation {last['id']} \(image \d+\): key 'bbox' is missing"):
        load_annotations(path)
    last["bbox"] = kept
    del last["id"]
    path.write_text(json.dumps(content))
    number = len(content["annotations"]) - 1
    with pytest.raises(ValueError, match=f"annotation number {number} in the file: key 'id' is missing"):
        load_annotations(path)
    assert not cache_folder(path).exists()


def test_every_cut_of_an_annotation_file_is_refused(path, monkeypatch):
    monkeypatch.setattr(json_lists, "CHUNK", 300)
    content = path.read_bytes()
    for length in range(0, len(content), 23):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"train\.json: not valid JSON, perhaps truncated"):
            load_annotations(path)


def test_invalid_boxes_are_refused_at_every_start(path):
    for _ in range(2):
        with pytest.raises(ValueError, match=r"train\.json: annotation .* has no area"):
            load_training_annotations(path, drop_invalid=False)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("what", ["size", "time", "format"])
def test_a_stale_cache_is_made_again_in_silence(path, reads, monkeypatch, what):
    load_annotations(path)
    if what == "format":
        monkeypatch.setattr(annotation_cache, "FORMAT", annotation_cache.FORMAT + 1)
    else:
        status = path.stat()
        text = path.read_text().replace('"height": 400', '"height": 401')
        path.write_text(text + " " * (what == "size"))
        later = status.st_mtime_ns + (what == "time")
        os.utime(path, ns=(later, later))
    found = load_annotations(path)
    assert set(found.image_sizes[:, 0]) == {400 if what == "format" else 401}
    assert_same(load_annotations(path), found)
    assert len(reads) == 2
    assert caches(path) == ["file", "file"]


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-8])


def rename_category(file: Path) -> None:
    """Still JSON, and of the same length."""
    text = file.read_text()
    assert '"frequency": "r"' in text
    file.write_text(text.replace('"frequency": "r"', '"frequency": "c"', 1))


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("bboxes.npy", Path.unlink),
        ("bboxes.npy", cut),
        ("bboxes.npy", flip),
        ("labels.npy", lambda file: file.write_bytes(b"")),
        ("labels.npy", lambda file: np.save(file, np.load(file) * 0)),
        ("index.json", Path.unlink),
        ("index.json", cut),
        ("index.json", rename_category),
        ("index.json", lambda file: file.write_text("[]")),
        ("index.json", lambda file: file.write_bytes(b"\xff")),
    ],
)
def test_a_damaged_cache_is_named_and_made_again(path, reads, name, damage):
    expected = load_annotations(path)
    expected = dataclasses.replace(expected, bboxes=expected.bboxes.copy(), labels=expected.labels.copy())
    (folder,) = cache_folder(path).iterdir()
    damage(folder / name)
    with pytest.warns(UserWarning, match="the annotation cache is damaged") as said:
        assert_same(load_annotations(path), expected)
    assert len(said) == 1
    assert "\n" not in str(said[0].message)
    assert len(reads) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(load_annotations(path), expected)
    assert len(reads) == 2


def test_a_folder_that_cannot_be_written_is_named_once(path, tmp_path, monkeypatch):
    expected = load_annotations(path)
    (tmp_path / "a_file").write_text("")
    monkeypatch.setenv("CLIS_CACHE", str(tmp_path / "a_file" / "cache"))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        assert_same(load_annotations(path), expected)
        load_training_annotations(path, drop_invalid=True)
    assert [str(one.message).count("set CLIS_CACHE to a folder that can be written") for one in said] == [1]


def test_a_full_disk_leaves_nothing_behind(path, monkeypatch):
    def full(file, array):
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(annotation_cache.np, "save", full)
    with pytest.warns(UserWarning, match="No space left on device"):
        load_annotations(path)
    assert list(cache_folder(path).iterdir()) == []


def test_small_files_are_not_cached(path, monkeypatch):
    monkeypatch.setattr(annotations, "CACHED_BYTES", path.stat().st_size + 1)
    load_training_annotations(path, drop_invalid=True)
    assert not cache_folder(path).exists()


def test_where_the_cache_is(path, tmp_path, monkeypatch):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "train.json").write_text(path.read_text())
    (tmp_path / "link.json").symlink_to(path)
    assert cache_folder(path).parent == tmp_path / "cache"
    assert cache_folder(path) != cache_folder(tmp_path / "other" / "train.json")
    assert cache_folder(path) == cache_folder(tmp_path / "link.json")
    monkeypatch.delenv("CLIS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder(path).parent == tmp_path / "xdg" / "clis"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder(path).parent == tmp_path / "home" / ".cache" / "clis"


def test_mapped_arrays_are_sent_as_the_names_of_their_files(path):
    found = load_annotations(path)
    sent = pickle.dumps(found)
    again = pickle.loads(sent)
    assert is_mapped(again)
    assert_same(again, found)
    assert found.bboxes.tobytes() not in sent
    # what is not a whole file's is sent itself
    part = dataclasses.replace(found, bboxes=found.bboxes[1:3], areas=found.areas * 2)
    assert_same(pickle.loads(pickle.dumps(part)), part)


@pytest.mark.filterwarnings("error")
def test_nobody_writes_to_the_cache(path):
    found = load_annotations(path)
    with pytest.raises(ValueError, match="read-only"):
        found.bboxes[0] = 0
    for mine in (found.boxes_of(0), found.labels_of(0)):
        torch.from_numpy(mine)[:] = -1  # a copy, which torch takes without a warning
    assert_same(load_annotations(path), found)
    assert (found.labels >= 0).all()


def test_another_process_was_faster(path, monkeypatch):
    """It puts its cache there between our taking away the stale one and our putting ours."""
    expected = load_annotations(path)
    rename, racing = Path.rename, []

    def raced(self, target):
        if self.suffix == ".tmp" and not racing:
            racing.append(self)
            load_annotations(path)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", raced)
    os.utime(path, ns=(1, 1))
    assert_same(load_annotations(path), expected)
    assert racing
    assert caches(path) == ["file", "file"]


LOAD = """
import sys, zlib
from clis.data import annotations
annotations.CACHED_BYTES = 1
sys.stdin.read()  # all go at once
for _ in range(20):
    found = annotations.load_training_annotations(sys.argv[1], drop_invalid=True)[0]
    annotations.load_annotations(sys.argv[1])
    with open(sys.argv[1], "a") as file:  # stale for all
        file.write(" ")
print(found.annotation_ids.tolist(), zlib.crc32(found.bboxes.tobytes()))
"""


def test_processes_that_build_at_once_do_no_harm(path):
    expected, _ = load_training_annotations(path, drop_invalid=True)
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", LOAD, str(path)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for _ in range(3)
    ]  # fmt: skip
    time.sleep(1)
    for process in processes:
        process.stdin.close()
        process.stdin = None
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [error for _, error in outputs] == [""] * 3
    assert {out.rpartition(" ")[0] for out, _ in outputs} == {str(expected.annotation_ids.tolist())}
    assert len({out for out, _ in outputs}) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(load_training_annotations(path, drop_invalid=True)[0], expected)
    assert set(caches(path)) == {"file", "training-drop-invalid"}


def read_slowly(rank: int, folder: Path) -> None:
    """The first reads slowly, and notes when it has; so would the other, if it had to read."""
    os.environ |= {"LOCAL_RANK": str(rank), "CLIS_CACHE": f"{folder}/cache"}
    annotations.CACHED_BYTES = 1
    parse = annotations.document_parts

    def slow(path, advance):
        time.sleep(1)
        yield from parse(path, advance)
        (folder / f"read_by_{rank}").touch()

    annotations.document_parts = slow
    assert is_mapped(read_annotations(folder / "train.json"))
    with pytest.raises(
        FileNotFoundError, match="no such annotation file"
    ):  # on both, and none waits for ever
        read_annotations(folder / "none.json")


@pytest.mark.slow
def test_one_process_of_a_machine_reads_for_all(path, tmp_path):
    spawn(tmp_path, read_slowly, tmp_path)
    assert [file.name for file in tmp_path.glob("read_by_*")] == ["read_by_0"]


def test_the_streams_of_a_run_are_mapped(path, reads, capsys):
    config = load_config(
        str(REPOSITORY / "configs" / "lvis_v1" / "baseline_r50.yaml"),
        [f"data.root={path.parent}", "data.train=train.json"],
    )
    for _ in range(2):
        found, dataset, _ = make_streams(config, regions_file(config))
        assert is_mapped(found)
        assert dataset.annotations is found
    assert len(reads) == 1
    said = capsys.readouterr().out
    assert said.count(" dropped boxes, 1 clipped box") == 2
