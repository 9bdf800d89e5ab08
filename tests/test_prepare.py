"""`prepare image-level`: what it covers, goes on from and refuses; and its index, opened again."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import signal
import subprocess
import sys
import tarfile
import time
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from image_sets import CATEGORIES, category, found, tar_of, write_annotations, write_folder, write_tar
from torchvision.io import encode_jpeg

from clis.__main__ import main
from clis.commands.prepare import prepare_image_level
from clis.config_files import load_config
from clis.data import image_level, streams
from clis.data.annotations import load_annotations
from clis.data.categories import Category
from clis.data.image_classes import MemberLabels, coverage, describe_coverage, in_imagenet22k
from clis.data.image_level import ImageLevelIndex, build_index, open_index
from clis.data.image_scan import find_containers, list_images
from clis.data.images import ImageError, decode_image

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
MINI = SHARED / "imagenet_mini"
WNIDS = SHARED / "lvis" / "lvis_wnids.tsv"
needs_mini = pytest.mark.skipif(not MINI.exists(), reason="sample data is not here")
needs_wnids = pytest.mark.skipif(not WNIDS.exists(), reason="sample data is not here")


def prepared(tmp_path: Path, *roots: Path, **options) -> ImageLevelIndex:
    """The index of the roots for `CATEGORIES`, in tmp_path/index."""
    annotations = write_annotations(tmp_path / "annotations.json")
    prepare_image_level(roots, annotations, tmp_path / "index", workers=1, **options)
    return open_index(tmp_path / "index", CATEGORIES)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def spoil(path: Path) -> None:
    """Same size, same time, but no tar any more: whoever reads it again fails."""
    stat = path.stat()
    path.write_bytes(b"x" * stat.st_size)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.fixture
def root(tmp_path) -> Path:
    """Two class folders and two class tars; 7 images."""
    write_folder(tmp_path / "root" / "bird", "b.jpg", "sub/a.jpg")
    write_tar(tmp_path / "root" / "aerosol_can.tar", "z.jpg", "sub/y.jpg", "x.jpg.gz")
    write_tar(tmp_path / "root" / "n00000001.tar", "1.jpg")
    write_tar(tmp_path / "root" / "traffic light.tar", "2.jpg", "1.jpg")
    return tmp_path / "root"


def test_a_prepared_index_is_the_scanned_one(tmp_path, root):
    index, scanned = prepared(tmp_path, root), build_index([root], CATEGORIES, strict=False)
    assert index.digest == scanned.digest  # region files fit either
    assert index.unmatched == scanned.unmatched == ("n00000001",)
    assert found(index) == found(scanned)
    assert found(index) == [
        ("aerosol_can.tar:sub/y.jpg", 0), ("aerosol_can.tar:x.jpg.gz", 0), ("aerosol_can.tar:z.jpg", 0),
        ("bird/b.jpg", 2), ("bird/sub/a.jpg", 2),
        ("traffic light.tar:1.jpg", 1), ("traffic light.tar:2.jpg", 1),
    ]  # fmt: skip
    assert [index.read(i) for i in range(7)] == [scanned.read(i) for i in range(7)]
    assert index.read(0) == b"bytes of sub/y.jpg"
    assert index.image_counts.tolist() == scanned.image_counts.tolist() == [3, 2, 2]
    for name in ("labels", "container", "names", "name_offsets", "positions", "sizes"):
        assert getattr(index, name).dtype == getattr(scanned, name).dtype
        assert not getattr(index, name).flags.owndata  # memory-mapped
    assert image_level.is_intact(index)


def test_an_image_takes_32_bytes_and_its_name(tmp_path):
    write_tar(tmp_path / "root" / "bird.tar", *(f"{k:06}.jpg" for k in range(1000)))
    prepared(tmp_path, tmp_path / "root")
    size = sum(path.stat().st_size for path in (tmp_path / "index").glob("*.npy"))
    # label 4, container 4, end of the name 8, position 8, size 8, name 10; 128 bytes a header; the 0
    assert size == 1000 * (32 + 10) + 6 * 128 + 8


def test_training_opens_it(tmp_path, root):
    index = prepared(tmp_path, root)
    annotations = load_annotations(tmp_path / "annotations.json")
    options = [f"data.root={tmp_path}", "data.mapping=does_not_matter.tsv"]
    config = load_config(REPOSITORY / "configs/lvis_v1/clis_r50.yaml", [*options, "data.image_level=[index]"])
    opened = streams.make_index(config, annotations)
    assert opened.digest == index.digest
    assert opened.folder == tmp_path / "index"
    config = load_config(
        REPOSITORY / "configs/lvis_v1/clis_r50.yaml", [*options, "data.image_level=[index,root]"]
    )
    with pytest.raises(ValueError, match=r"data\.image_level: a prepared index stands alone"):
        streams.make_index(config, annotations)


def test_it_travels_as_the_name_of_its_folder(tmp_path):
    names = [f"{k:06}.jpg" for k in range(5000)]
    write_tar(tmp_path / "root" / "bird.tar", *names)
    index = prepared(tmp_path, tmp_path / "root")
    data = pickle.dumps(index)
    assert len(data) < 1000  # 5000 images are 210,000 bytes
    assert pickle.loads(data).read(4999) == b"bytes of 004999.jpg"
    write_tar(tmp_path / "root" / "bird.tar", *names[1:])
    prepared(tmp_path, tmp_path / "root")
    with pytest.raises(ValueError, match="index: prepared again while it was in use"):
        pickle.loads(data)


# What is covered


def lvis_table(version: str) -> list[dict[str, str]]:
    lines = [line.split("\t") for line in WNIDS.read_text().splitlines()]
    rows = [dict(zip(lines[0], line)) for line in lines[1:]]
    return [row for row in rows if row["version"] == version]


@needs_wnids
@pytest.mark.parametrize(
    ("version", "classes", "in_22k", "groups"),
    [
        ("v1", 1203, 997, {"r": 277, "c": 390, "f": 330}),  # the paper's 997
        ("v0.5", 1230, 1024, {"r": 385, "c": 387, "f": 252}),  # the paper says 1023
    ],
)
def test_all_of_imagenet22k(tmp_path, capsys, version, classes, in_22k, groups):
    other = {"v1": "v0.5", "v0.5": "v1"}[version]
    ours, theirs = (
        {row["wnid"] for row in lvis_table(v) if row["in_imagenet22k"] == "1"} for v in (version, other)
    )
    for wnid in ours | theirs:
        write_folder(tmp_path / "root" / wnid, "x.jpg")
    categories = [
        Category(
            id=int(row["id"]), name=row["name"], synset=row["synset"], frequency=row["frequency"],
            image_count=1,
        )
        for row in lvis_table(version)
    ]  # fmt: skip
    annotations = write_annotations(tmp_path / "lvis.json", categories)
    covered = prepare_image_level([tmp_path / "root"], annotations, tmp_path / "index")
    every = covered["groups"]["all"]
    assert every["classes"] == classes
    assert every["with_images"] == every["in_imagenet22k"] == every["both"] == in_22k
    for group, count in groups.items():
        assert covered["groups"][group]["with_images"] == covered["groups"][group]["in_imagenet22k"] == count
    assert set(covered["unmatched"]) == theirs - ours
    assert len(covered["without_images"]) == classes - in_22k
    parts = ", ".join(f"{count} {group}" for group, count in groups.items())
    text = f"{in_22k} of {classes} classes are in ImageNet-22k ({parts}), you have {in_22k} of them"
    assert text in capsys.readouterr().out
    # The label of every image is the category of its wnid.
    wnid_of = {row["name"]: row["wnid"] for row in lvis_table(version)}
    for name, label in found(open_index(tmp_path / "index")):
        assert wnid_of[categories[label].name] == name.removesuffix("/x.jpg")


def test_coverage_of_a_few_classes():
    categories = [
        category(1, "aerosol_can", "aerosol.n.02", "r"),  # in ImageNet-22k
        category(2, "acorn", "acorn.n.01", "c"),  # as well
        category(3, "bow", "bow.n.00", "c"),
        category(4, "my thing", "", "c"),
        category(5, "other thing", "", "f"),
    ]
    assert in_imagenet22k(categories).tolist() == [True, True, False, False, False]
    covered = coverage(categories, np.array([0, 3, 4, 9, 0]))
    assert covered["images"] == 16
    nothing = {"min": None, "median": None, "max": None}
    assert covered["groups"] == {
        "r": {"classes": 1, "with_images": 0, "in_imagenet22k": 1, "both": 0, **nothing},
        "c": {
            "classes": 3, "with_images": 3, "in_imagenet22k": 1, "both": 1, "min": 3, "median": 4, "max": 9
        },
        "f": {"classes": 1, "with_images": 0, "in_imagenet22k": 0, "both": 0, **nothing},
        "all": {
            "classes": 5, "with_images": 3, "in_imagenet22k": 2, "both": 1, "min": 3, "median": 4, "max": 9
        },
    }  # fmt: skip
    assert covered["fewest"] == [("acorn", 3), ("bow", 4), ("my thing", 9)]
    assert covered["without_images"] == ["aerosol_can", "other thing"]
    text = describe_coverage(covered | {"unmatched": [f"class{k:02}" for k in range(12)], "empty": ["a.tar"]})
    assert "2 of 5 classes are in ImageNet-22k (1 r, 1 c, 0 f), you have 1 of them" in text
    assert "2 categories without images: aerosol_can, other thing\n" in text
    assert "12 classes match no category and are left out: class00, class01," in text
    assert "class09, ..." in text
    assert "class10" not in text
    assert "1 folder or tar without an image: a.tar" in text
    rows = [line.split() for line in text.splitlines()]
    assert ["rare", "1", "0", "-", "-", "-"] in rows
    assert ["common", "3", "3", "3", "4", "9"] in rows


def test_what_matches_nothing_is_told_or_refused(tmp_path, root, capsys):
    (tmp_path / "root" / "BIRD").mkdir()
    prepared(tmp_path, root)
    told = capsys.readouterr().out
    assert "1 class matches no category and is left out: n00000001\n" in told
    assert "1 folder or tar without an image: BIRD" in told
    with pytest.raises(ValueError, match=r"root: 1 of 5 image-level classes match no .*: n00000001; name"):
        prepared(tmp_path, root, strict=True)
    with pytest.raises(ValueError, match=r"root: 5 of 5 image-level classes match no category"):
        prepare_image_level(
            [root], write_annotations(tmp_path / "a.json", [category(1, "dog")]), tmp_path / "other"
        )


@needs_mini
def test_photographs_as_folders_and_as_tars(tmp_path):
    """Folders with the mapping; tars by wnid alone, which LVIS resolves by synset."""
    mapping = dict(line.split("\t") for line in (MINI / "wnid_to_category.tsv").read_text().splitlines()[1:])
    coco, lvis = SHARED / "coco_mini" / "train.json", SHARED / "lvis" / "lvis_v0.5_val_100.json"
    roots = [MINI / "folders", MINI / "tars"]
    main(
        ["prepare", "image-level", *map(str, roots), "--annotations", str(coco),
         "--out", str(tmp_path / "coco"), "--mapping", str(MINI / "wnid_to_category.tsv"), "--strict",
         "--workers", "1"]
    )  # fmt: skip
    categories = load_annotations(coco).categories
    index = open_index(tmp_path / "coco", categories)
    expected = Counter(mapping[file.parent.name] for file in (MINI / "folders").rglob("*.JPEG"))
    listing = Counter(mapping[tar.stem] for tar in (MINI / "tars").iterdir() for _ in range(100))
    assert Counter(categories[label].name for label in index.labels) == expected + listing
    for i in range(0, len(index), 211):
        assert decode_image(index.read(i), index.name(i)).ndim == 3

    covered = prepare_image_level([MINI / "tars"], lvis, tmp_path / "lvis", workers=1)
    of_lvis = {row["wnid"]: row for row in lvis_table("v0.5")}
    tars = {tar.stem for tar in (MINI / "tars").iterdir()}
    assert covered["groups"]["all"]["with_images"] == len(tars & set(of_lvis))
    assert covered["groups"]["all"]["both"] == sum(
        of_lvis[wnid]["in_imagenet22k"] == "1" for wnid in tars & set(of_lvis)
    )
    assert covered["images"] == 100 * len(tars & set(of_lvis))
    assert set(covered["unmatched"]) == tars - set(of_lvis)


# Tars: in tars, gzip'ed members, damage, names


@pytest.mark.parametrize("as_root", [True, False])
def test_a_tar_of_class_tars(tmp_path, as_root):
    inner = {
        "fall11/n02682922.tar": tar_of({"n02682922_1.JPEG": b"an aerosol", "sub/n02682922_2.JPEG": b"two"}),
        "fall11/n00000001.tar": tar_of({"n00000001_1.JPEG": b"no category"}),
        "bird.tar": tar_of({"b.jpg": b"a bird", "a.jpg": b"another"}),
        "readme.txt": b"text",
    }
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "whole.tar").write_bytes(tar_of(inner))
    if not as_root:
        write_tar(tmp_path / "root" / "zebra.tar", "x.jpg")  # no category, and no tar of tars
    index = prepared(tmp_path, tmp_path / "root" / "whole.tar" if as_root else tmp_path / "root")
    assert found(index) == [
        ("whole.tar:bird.tar:a.jpg", 2),
        ("whole.tar:bird.tar:b.jpg", 2),
        ("whole.tar:fall11/n02682922.tar:n02682922_1.JPEG", 0),
        ("whole.tar:fall11/n02682922.tar:sub/n02682922_2.JPEG", 0),
    ]
    assert [index.read(i) for i in range(4)] == [b"another", b"a bird", b"an aerosol", b"two"]
    assert index.unmatched == (("n00000001",) if as_root else ("n00000001", "zebra"))


@pytest.mark.parametrize("cut", [0, 512, 1024, 1536, 5120])
def test_a_tar_in_a_tar_without_its_end_does_not_go_on_into_the_next(tmp_path, cut):
    """A member takes 512 bytes of header and 512 of data here; the end is 1024 zeros or more."""
    short = tar_of({"1.jpg": b"one", "2.jpg": b"two"})[:cut]
    files = {"bird.tar": short, "traffic_light.tar": tar_of({"3.jpg": b"three"})}
    (tmp_path / "whole.tar").write_bytes(tar_of(files))
    if cut == 5120:  # a whole one: two members and zeros
        assert [label for _, label in found(prepared(tmp_path, tmp_path / "whole.tar"))] == [2, 2, 1]
        return
    with pytest.raises(ValueError, match=r"whole\.tar:bird\.tar: not a readable uncompressed tar"):
        prepared(tmp_path, tmp_path / "whole.tar")


def test_compressed_tars_are_refused(tmp_path):
    (tmp_path / "whole.tar").write_bytes(tar_of({"bird.tar.gz": b"?"}))
    with pytest.raises(ValueError, match=r"whole\.tar:bird\.tar\.gz: .* compressed tar; unpack it"):
        prepared(tmp_path, tmp_path / "whole.tar")
    (tmp_path / "bird.tgz").write_bytes(b"?")
    with pytest.raises(ValueError, match=r"bird\.tgz: .* compressed tar; unpack it"):
        prepared(tmp_path, tmp_path / "bird.tgz")
    with pytest.raises(ValueError, match=r"gone\.tar: no such folder or tar"):
        prepared(tmp_path, tmp_path / "gone.tar")


def test_gzipped_members_are_images(tmp_path):
    pixels = torch.arange(3 * 16 * 16, dtype=torch.uint8).reshape(3, 16, 16)
    jpeg = encode_jpeg(pixels).numpy().tobytes()
    (tmp_path / "root").mkdir()
    files = {"a.JPEG": gzip.compress(jpeg), "b.jpg.gz": gzip.compress(jpeg), "c.jpg": jpeg}
    (tmp_path / "root" / "bird.tar").write_bytes(tar_of(files))
    index = prepared(tmp_path, tmp_path / "root")
    decoded = [decode_image(index.read(i), index.name(i)) for i in range(3)]
    assert index.read(0) != jpeg
    assert all(torch.equal(image, decode_image(jpeg, "")) for image in decoded)


def test_damaged_tars_are_named_together_and_the_others_are_kept(tmp_path):
    names = ["1.jpg", "2.jpg"]
    for place, name in enumerate(("bird", "aerosol_can", "traffic_light")):
        write_tar(tmp_path / "root" / f"{name}.tar", *names[: 2 - place % 2])
    whole = {tar: tar.read_bytes() for tar in (tmp_path / "root").iterdir()}
    damaged = [tmp_path / "root" / name for name in ("bird.tar", "traffic_light.tar")]
    for tar in damaged:
        tar.write_bytes(whole[tar][:1100])
    message = (
        r"(?s)^2 of 3 tars cannot be indexed.*/bird\.tar: not a readable.*/traffic_light\.tar: not a readable"
    )
    with pytest.raises(ValueError, match=message):
        prepared(tmp_path, tmp_path / "root")
    with pytest.raises(ValueError, match=r"index: this index is not finished; run `python -m clis prepare"):
        open_index(tmp_path / "index")
    for tar in damaged:
        tar.write_bytes(whole[tar])
    spoil(tmp_path / "root" / "aerosol_can.tar")
    assert len(prepared(tmp_path, tmp_path / "root")) == 5


def header(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE) -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    return member.tobuf(tarfile.GNU_FORMAT)


def pax(key: str, value: str) -> bytes:
    record = f" {key}={value}\n"
    record = f"{len(record) + 2}{record}".encode()
    return header("pax", len(record), tarfile.XHDTYPE) + record.ljust(512, b"\0") + header("x.jpg", 512)


SPARSE = header("x.jpg", 512, tarfile.GNUTYPE_SPARSE)
HOSTILE = [
    *(
        header("x", size, kind)
        for kind in (b"L", b"K", b"x", b"g")
        for size in (2**40, 2**62, 2**63 + 5, -512)
    ),
    header("x.jpg", -512),
    header("x.jpg", 2**63 + 5),
    pax("size", "-512"),
    pax("GNU.sparse.map", "0,a"),
    pax("GNU.sparse.size", "none"),
    header("", 0, b"L") * 2000,  # tarfile calls itself once for each
    SPARSE[:482] + b"\1" + SPARSE[483:],  # its map goes on, but there is no more
]


@pytest.mark.parametrize("place", ["first", "later"])
@pytest.mark.parametrize("hostile", HOSTILE)
def test_hostile_headers(tmp_path, hostile, place):
    """Sizes that are none, numbers that are none: whatever tarfile makes of them, the tar is named."""
    write_tar(tmp_path / "root" / "aerosol_can.tar", "1.jpg")
    start = tar_of({"1.jpg": b"x"})[:1024] if place == "later" else b""
    checksum = 8 * 32 + sum(hostile[:148]) + sum(hostile[156:512])  # for the one that was changed by hand
    hostile = hostile[:148] + b"%06o\0 " % checksum + hostile[156:]
    (tmp_path / "root" / "bird.tar").write_bytes(start + hostile)
    (tmp_path / "root" / "other.tar").write_bytes(start + hostile)  # of no class: looked into for tars
    with pytest.raises(
        ValueError, match=r"(?s)1 of 2 tars .*/bird\.tar: not a readable .*; fetch or pack it"
    ):
        prepared(tmp_path, tmp_path / "root")


def test_what_is_behind_the_end_mark(tmp_path):
    """Zeros are padding (GNU tar writes 10 KiB at once); anything else would be left out without a word."""
    one, two = tar_of({"1.jpg": b"one"}), tar_of({"2.jpg": b"two"})
    tar = tmp_path / "root" / "bird.tar"
    tar.parent.mkdir()
    for padding in (0, 10240, 2**24 + 5):
        tar.write_bytes(one[:2048] + bytes(padding))
        assert len(prepared(tmp_path, tar.parent)) == 1
    for rest in (two, bytes(2**24) + b"x"):
        tar.write_bytes(one + rest)
        with pytest.raises(ValueError, match=r"bird\.tar: .* after the end mark at byte 1024, as of concat"):
            prepared(tmp_path, tar.parent)
    (tmp_path / "whole.tar").write_bytes(tar_of({"bird.tar": one + two}))
    with pytest.raises(ValueError, match=r"whole\.tar:bird\.tar: .* after the end mark at byte 1536"):
        prepared(tmp_path, tmp_path / "whole.tar")


def test_images_that_are_left_out_are_told(tmp_path, capsys):
    """Tar: a hard link, a symbolic one, a sparse file, one above 1 GiB; folder: a pipe, a dead link."""
    images = tmp_path / "root"
    write_folder(images / "bird", "1.jpg", "sub/2.jpg")
    os.mkfifo(images / "bird" / "pipe.jpg")
    (images / "bird" / "dead.jpg").symlink_to("gone.jpg")
    (images / "bird" / "sub" / "link.jpg").symlink_to("2.jpg")
    (images / "bird" / "folder.jpg").mkdir()
    with open(images / "aerosol_can.tar", "wb") as file:
        file.write(tar_of({"1.jpg": b"x"})[:1024] + header("folder.jpg", 0, tarfile.DIRTYPE))
        file.write(header("hard.jpg", 0, tarfile.LNKTYPE) + header("soft.jpg", 0, tarfile.SYMTYPE))
        file.write(header("readme", 0, tarfile.LNKTYPE) + header("sparse.jpg", 0, tarfile.GNUTYPE_SPARSE))
        file.write(header("large.jpg", 2**30 + 512))
        file.seek(2**30 + 512, os.SEEK_CUR)  # a hole
        file.write(header("limit.jpg", 2**30))
        file.seek(2**30, os.SEEK_CUR)
        file.write(bytes(1024))
    line = (
        "6 images are left out, since they are links in a tar, no regular files or larger than 1 GiB: in "
        "aerosol_can.tar, bird\n"
    )
    for _ in range(2):  # scanned, and from the listings
        index = prepared(tmp_path, images)
        assert [name for name, _ in found(index)] == [
            "aerosol_can.tar:1.jpg",
            "aerosol_can.tar:limit.jpg",
            "bird/1.jpg",
            "bird/sub/2.jpg",
            "bird/sub/link.jpg",
        ]
        assert line in capsys.readouterr().out
    labels = labels_file(tmp_path, "1.jpg\tbird\n")
    assert len(prepared(tmp_path, images / "aerosol_can.tar", labels=labels)) == 1
    assert "4 images are left out" in capsys.readouterr().out
    (images / "bird" / "pipe.jpg").unlink()
    (images / "bird" / "dead.jpg").unlink()
    (images / "aerosol_can.tar").unlink()
    prepared(tmp_path, images)
    assert "left out" not in capsys.readouterr().out


def test_tars_in_a_tar_that_are_links(tmp_path):
    link = header("traffic_light.tar", 0, tarfile.LNKTYPE)
    (tmp_path / "whole.tar").write_bytes(link + tar_of({"bird.tar": tar_of({"1.jpg": b"x"})}))
    with pytest.raises(ValueError, match=r"whole\.tar: 1 of the tars in it are links .*; unpack it"):
        prepared(tmp_path, tmp_path / "whole.tar")


def test_hostile_names_are_only_names(tmp_path):
    names = [
        "../../escape.jpg",
        "/etc/passwd.jpg",
        "a\nb\x1b[31m.jpg",
        "\udcff.jpg",
        "c" * 5000 + ".jpg",
        "e/..jpg",
    ]
    before = set(tmp_path.rglob("*"))
    files = {name: name.encode("utf-8", "surrogateescape") for name in names}
    whole = {"bird.tar": tar_of(files), "../../evil\n.tar": tar_of({"x.jpg": b""}), "/abs.tar": tar_of({})}
    (tmp_path / "whole.tar").write_bytes(tar_of(whole))
    index = prepared(tmp_path, tmp_path / "whole.tar")
    # "..jpg" is hidden
    assert {index.read(i) for i in range(len(index))} == {files[name] for name in names[:5]}
    shown = {index.name(i) for i in range(len(index))}
    assert "whole.tar:bird.tar:../../escape.jpg" in shown
    assert "whole.tar:bird.tar:a\\nb\\x1b[31m.jpg" in shown
    assert "whole.tar:bird.tar:\\udcff.jpg" in shown
    assert index.unmatched == ("abs", "evil\n")
    outside = set(tmp_path.rglob("*")) - before - set((tmp_path / "index").rglob("*"))
    assert outside == {tmp_path / "whole.tar", tmp_path / "annotations.json", tmp_path / "index"}


# Interrupted, resumed, changed


@pytest.fixture
def tars(tmp_path) -> Path:
    """Three class tars; listed in the order aerosol_can, bird, traffic_light."""
    for name in ("aerosol_can", "bird", "traffic_light"):
        write_tar(tmp_path / "root" / f"{name}.tar", f"{name}_2.jpg", f"{name}_1.jpg")
    return tmp_path / "root"


def test_killed_between_tars_it_goes_on_where_it_was(tmp_path, tars):
    annotations = write_annotations(tmp_path / "annotations.json")
    last = tars / "traffic_light.tar"
    prepare_image_level([tars], annotations, tmp_path / "whole", workers=1)
    whole = last.read_bytes(), last.stat()
    last.unlink()
    os.mkfifo(last)  # whoever opens it waits
    command = [sys.executable, "-m", "clis", "prepare", "image-level", str(tars), "--workers", "1"]
    command += ["--annotations", str(annotations), "--out", str(tmp_path / "index")]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL)
    until = time.monotonic() + 300
    while len(list((tmp_path / "index").glob("parts/[!.]*"))) < 2:
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    (tmp_path / "index" / ".labels.123.tmp.npy").touch()  # as a kill while arrays are written leaves it
    with pytest.raises(ValueError, match="index: this index is not finished"):
        open_index(tmp_path / "index")

    last.unlink()
    last.write_bytes(whole[0])
    os.utime(last, ns=(whole[1].st_atime_ns, whole[1].st_mtime_ns))
    for name in ("aerosol_can", "bird"):
        spoil(tars / f"{name}.tar")  # they must not be read again
    prepare_image_level([tars], annotations, tmp_path / "index", workers=1)
    assert contents(tmp_path / "index") == contents(tmp_path / "whole")


def test_several_processes_make_the_same(tmp_path, tars):
    annotations = write_annotations(tmp_path / "annotations.json")
    for workers in (1, 2):
        prepare_image_level([tars], annotations, tmp_path / str(workers), workers=workers)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    (tars / "bird.tar").write_bytes(b"no tar")
    (tars / "traffic_light.tar").write_bytes(b"no tar")
    with pytest.raises(
        ValueError, match=r"(?s)2 of 3 tars cannot .*bird\.tar: not .*traffic_light\.tar: not "
    ):
        prepare_image_level([tars], annotations, tmp_path / "2", workers=2)


def test_only_changed_tars_are_scanned_again(tmp_path, tars, capsys):
    prepared(tmp_path, tars)
    before = contents(tmp_path / "index")
    capsys.readouterr()
    for name in ("aerosol_can", "traffic_light"):
        spoil(tars / f"{name}.tar")
    prepared(tmp_path, tars)
    assert contents(tmp_path / "index") == before
    assert "already exists and is up to date" in capsys.readouterr().out

    write_tar(tars / "bird.tar", "new_1.jpg", "new_2.jpg", "new_3.jpg")
    index = prepared(tmp_path, tars)
    assert "2 of 3 tars are listed already" in capsys.readouterr().out
    assert [index.name(i) for i in range(2, 5)] == [f"bird.tar:new_{k}.jpg" for k in (1, 2, 3)]
    assert index.read(4) == b"bytes of new_3.jpg"
    assert len(list((tmp_path / "index" / "parts").iterdir())) == 3  # the old listing is gone

    stat = (tars / "bird.tar").stat()
    write_tar(tars / "bird.tar", "old_1.jpg", "old_2.jpg", "old_3.jpg")  # the same size
    os.utime(tars / "bird.tar", ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**7))  # whatever the clock's ticks
    assert (tars / "bird.tar").stat().st_size == stat.st_size
    assert prepared(tmp_path, tars).name(2) == "bird.tar:old_1.jpg"


def test_a_class_that_is_gone_is_not_reported_again(tmp_path, tars):
    """It matched nothing, so the index is the same without it, but for what it says."""
    write_tar(tars / "zzz.tar", "a.jpg")
    assert prepared(tmp_path, tars).unmatched == ("zzz",)
    (tars / "zzz.tar").unlink()
    assert prepared(tmp_path, tars).unmatched == ()


def test_other_categories_use_the_listings(tmp_path, tars):
    prepared(tmp_path, tars)
    for tar in tars.iterdir():
        spoil(tar)
    annotations = write_annotations(tmp_path / "other.json", [category(1, "dog"), category(2, "bird")])
    prepare_image_level([tars], annotations, tmp_path / "index", workers=1)
    assert found(open_index(tmp_path / "index")) == [("bird.tar:bird_1.jpg", 1), ("bird.tar:bird_2.jpg", 1)]


def test_folders_are_looked_at_again(tmp_path, root):
    assert len(prepared(tmp_path, root)) == 7
    write_folder(root / "bird", "sub/new.jpg")
    assert len(prepared(tmp_path, root)) == 8


def test_stopped_while_the_arrays_are_written(tmp_path, tars, monkeypatch):
    prepared(tmp_path, tars)
    reference = contents(tmp_path / "index")
    write_folder(tars / "BIRD", "x.jpg")

    def stop(folder, header):
        if header["finished"]:
            raise KeyboardInterrupt
        write_header(folder, header)

    write_header = image_level._write_header
    monkeypatch.setattr(image_level, "_write_header", stop)
    with pytest.raises(KeyboardInterrupt):
        prepared(tmp_path, tars)
    with pytest.raises(ValueError, match="index: this index is not finished"):
        open_index(tmp_path / "index")
    monkeypatch.undo()
    (tars / "BIRD" / "x.jpg").unlink()
    (tars / "BIRD").rmdir()
    prepared(tmp_path, tars)
    assert contents(tmp_path / "index") == reference


def test_damaged_listings_are_made_again(tmp_path, tars):
    prepared(tmp_path, tars)
    reference = contents(tmp_path / "index")
    one, two, three = sorted((tmp_path / "index" / "parts").iterdir())
    one.write_bytes(one.read_bytes()[:100])
    two.write_bytes(b"")
    data = bytearray(three.read_bytes())
    data[len(data) // 2] ^= 255
    three.write_bytes(data)
    (tmp_path / "index" / "labels.npy").unlink()
    prepared(tmp_path, tars)
    assert contents(tmp_path / "index") == reference


# What the index refuses


def truncated(path):
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("name", ["labels", "container", "names", "name_offsets", "positions", "sizes"])
@pytest.mark.parametrize("damage", [truncated, Path.unlink, lambda path: path.write_bytes(b"")])
def test_arrays_that_are_cut_short_or_gone(tmp_path, tars, name, damage):
    prepared(tmp_path, tars)
    reference = contents(tmp_path / "index")
    damage(tmp_path / "index" / f"{name}.npy")
    with pytest.raises(ValueError, match=rf"{name}\.npy: .*; run `python -m clis prepare image-level` again"):
        open_index(tmp_path / "index")
    prepared(tmp_path, tars)
    assert contents(tmp_path / "index") == reference


def test_an_array_of_another_index(tmp_path, tars):
    prepared(tmp_path, tars)
    path = tmp_path / "index" / "labels.npy"
    np.save(path, np.load(path).astype(np.int64))
    with pytest.raises(ValueError, match=r"labels\.npy: not the 6 values of index\.json"):
        open_index(tmp_path / "index")
    np.save(path, np.zeros(5, dtype=np.int32))
    with pytest.raises(ValueError, match=r"labels\.npy: not the 6 values of index\.json"):
        open_index(tmp_path / "index")
    prepared(tmp_path, tars)
    offsets = np.load(tmp_path / "index" / "name_offsets.npy")
    np.save(tmp_path / "index" / "name_offsets.npy", offsets - 1)
    with pytest.raises(ValueError, match=r"name_offsets\.npy and names\.npy do not fit"):
        open_index(tmp_path / "index")


def test_preparing_again_mends_flipped_bits(tmp_path, tars):
    prepared(tmp_path, tars)
    reference = contents(tmp_path / "index")
    path = tmp_path / "index" / "labels.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"\x55")
    assert not image_level.is_intact(open_index(tmp_path / "index"))
    prepared(tmp_path, tars)
    assert contents(tmp_path / "index") == reference


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (lambda h: h[: len(h) // 2], r"index\.json: damaged .*; run `python -m clis prepare"),
        (lambda h: "", r"index\.json: damaged"),
        (lambda h: h.replace('"format": 1', '"format": 99'), r"index\.json: format 99, this version reads 1"),
        (lambda h: h.replace('"containers"', '"cont"'), r"index\.json: damaged \(KeyError\('containers'\)\)"),
        (lambda h: h.replace('"finished": true', '"finished": false'), "index: this index is not finished"),
    ],
)
def test_damaged_headers(tmp_path, tars, header, message):
    prepared(tmp_path, tars)
    reference = contents(tmp_path / "index")
    path = tmp_path / "index" / "index.json"
    path.write_text(header(path.read_text()))
    with pytest.raises(ValueError, match=message):
        open_index(tmp_path / "index")
    prepared(tmp_path, tars)
    assert contents(tmp_path / "index") == reference


def test_an_index_of_other_categories(tmp_path, tars):
    prepared(tmp_path, tars)
    others = [CATEGORIES[0], category(2, "traffic cone"), category(7, "bird")]
    message = (
        r"index: this index is of other categories than the annotations: 2 only in the index \(2 Traffic "
        r"Light, 5 bird\), 2 only in the annotations \(2 traffic cone, 7 bird\); run .* --annotations"
    )
    with pytest.raises(ValueError, match=message):
        open_index(tmp_path / "index", others)
    with pytest.raises(ValueError, match=r"1 only in the index \(5 bird\); run"):
        open_index(tmp_path / "index", CATEGORIES[:2])


def test_a_tar_that_was_packed_anew_to_the_same_size(tmp_path, tars):
    """Two members of equal length have changed their places: the one asked for is no more where it was."""
    index = prepared(tmp_path, tars)
    names = ["aerosol_can_1.jpg", "aerosol_can_2.jpg"]
    assert [index.read(i).decode() for i in (0, 1)] == [f"bytes of {name}" for name in names]
    size = (tars / "aerosol_can.tar").stat().st_size
    write_tar(tars / "aerosol_can.tar", *(names if index.positions[0] > index.positions[1] else names[::-1]))
    assert (tars / "aerosol_can.tar").stat().st_size == size
    with pytest.raises(ImageError, match=r"aerosol_can\.tar:aerosol_can_1\.jpg: the tar has changed"):
        open_index(tmp_path / "index", CATEGORIES).read(0)


def test_tars_that_change_after_it_was_prepared(tmp_path, tars):
    index = prepared(tmp_path, tars)
    assert index.read(0) == b"bytes of aerosol_can_1.jpg"
    (tars / "bird.tar").write_bytes((tars / "bird.tar").read_bytes() + bytes(10240))
    (tars / "traffic_light.tar").rename(tmp_path / "moved.tar")
    with open(tars / "aerosol_can.tar", "r+b") as file:  # the one that is open already
        file.truncate(100)
    with pytest.raises(ImageError, match=r"aerosol_can\.tar:aerosol_can_1\.jpg: the tar has changed"):
        index.read(0)
    with pytest.raises(ImageError, match=r"/bird\.tar: the tar has changed: 20480 bytes, but 10240 when it"):
        index.read(2)
    with pytest.raises(ImageError, match=r"/traffic_light\.tar: No such file .* if it was moved"):
        index.read(4)


def test_places_that_are_not_for_an_index(tmp_path, tars):
    annotations = write_annotations(tmp_path / "annotations.json")
    for out in (tars, tars / "index", tmp_path):
        with pytest.raises(ValueError, match="the index must lie outside of"):
            prepare_image_level([tars], annotations, out)
    write_folder(tmp_path / "full", "notes.txt")
    for out in (tmp_path / "full", annotations):
        with pytest.raises(ValueError, match="already exists and is no index; name a new folder"):
            prepare_image_level([tars], annotations, out)
    assert contents(tmp_path / "full") == {"notes.txt": b"bytes of notes.txt"}
    assert len(list(tars.iterdir())) == 3


@pytest.mark.parametrize("text", ['{"title": "my web site"}', "[]"])
def test_an_index_json_of_somebody_else(tmp_path, tars, text):
    """It makes no index of a folder, neither of one to write nor of a root of class folders."""
    site = tmp_path / "site"
    write_folder(site, "labels.npy", ".draft.tmp.txt")
    (site / "index.json").write_text(text)
    before = contents(site)
    with pytest.raises(ValueError, match="already exists and is no index; name a new folder"):
        prepare_image_level([tars], write_annotations(tmp_path / "annotations.json"), site)
    assert contents(site) == before
    write_folder(tmp_path / "mine" / "bird", "1.jpg")
    (tmp_path / "mine" / "index.json").write_text(text)
    config = tiny_config(f"data.root={tmp_path}", "data.image_level=[mine]")
    assert len(streams.make_index(config, load_annotations(tmp_path / "annotations.json"))) == 1


def test_what_a_killed_prepare_left_goes_and_nothing_else(tmp_path, tars):
    index = prepared(tmp_path, tars)
    for name in (".labels.123.tmp.npy", ".index.9.tmp.json", ".draft.1.tmp.txt"):
        (index.folder / name).touch()
    prepared(tmp_path, tars)
    assert [path.name for path in index.folder.glob(".*")] == [".draft.1.tmp.txt"]


def test_a_tar_with_bytes_after_the_end_of_a_name(tmp_path):
    """As old programs wrote them: the name ends at the first NUL of its field."""
    write_tar(tmp_path / "root" / "bird.tar", "1.jpg", kind=tarfile.USTAR_FORMAT)
    tar = bytearray((tmp_path / "root" / "bird.tar").read_bytes())
    tar[50:54] = b"junk"
    tar[148:156] = b"%06o\0 " % (sum(tar[:148]) + 8 * 32 + sum(tar[156:512]))  # the header's checksum
    (tmp_path / "root" / "bird.tar").write_bytes(tar)
    index = prepared(tmp_path, tmp_path / "root")
    assert (index.name(0), index.read(0)) == ("bird.tar:1.jpg", b"bytes of 1.jpg")


def test_wrong_arguments_are_told(tmp_path, tars, capsys):
    for workers in ("0", "-1", "two"):
        with pytest.raises(SystemExit):
            main(
                [
                    "prepare",
                    "image-level",
                    str(tars),
                    "--annotations",
                    "a",
                    "--out",
                    "b",
                    "--workers",
                    workers,
                ]
            )
        assert f"'{workers}' is not a number above 0" in capsys.readouterr().err


# Mixed tars with a label file


@pytest.fixture
def shards(tmp_path) -> Path:
    """Two tars of mixed classes, and a folder."""
    write_tar(tmp_path / "root" / "shard_0.tar", "9.jpg", "3.jpg", "9.json", "7.jpg")
    write_tar(tmp_path / "root" / "shard_1.tar", "./8.jpg", "sub/1.jpg", "2.jpg")
    write_folder(tmp_path / "root" / "shard_2", "6.jpg", "5.jpg")
    return tmp_path / "root"


def labels_file(tmp_path: Path, text: str) -> Path:
    (tmp_path / "labels.tsv").write_text(text)
    return tmp_path / "labels.tsv"


LABELS = """# member, class
9.jpg	bird
3.jpg	n02682922
8.jpg	traffic_light

sub/1.jpg	dog
2.jpg	aerosol.n.02
5.jpg	Bird
gone.jpg	bird
away.jpg	dog
"""


def test_mixed_tars_in_the_order_of_their_bytes(tmp_path, shards, capsys):
    index = prepared(tmp_path, shards, labels=labels_file(tmp_path, LABELS))
    assert found(index) == [
        ("shard_0.tar:9.jpg", 2),
        ("shard_0.tar:3.jpg", 0),
        ("shard_1.tar:./8.jpg", 1),
        ("shard_1.tar:2.jpg", 0),
        ("shard_2/5.jpg", 2),
    ]
    assert [index.read(i) for i in range(5)] == [
        f"bytes of {name}.jpg".encode() for name in ("9", "3", "./8", "2", "5")
    ]
    assert (np.diff(index.positions)[[0, 2]] > 0).all()
    assert index.unmatched == ("dog",)
    report = json.loads((tmp_path / "index" / "index.json").read_text())["report"]
    assert report["members_without_label"] == 2
    assert report["first_members_without_label"] == ["shard_0.tar:7.jpg", "shard_2:6.jpg"]
    assert report["labels_without_member"] == 2
    assert report["first_lines_without_member"] == [9, 10]
    told = capsys.readouterr().out
    assert "2 images of the tars have no label: shard_0.tar:7.jpg, shard_2:6.jpg\n" in told
    assert "2 lines of the label file have no image in the tars: lines 9, 10\n" in told


def test_mixed_tars_with_a_mapping_and_other_labels(tmp_path, shards):
    labels = labels_file(tmp_path, "9.jpg\tx\n")
    (tmp_path / "mapping.tsv").write_text("x\tbird\n")
    options = {"labels": labels, "mapping": tmp_path / "mapping.tsv"}
    assert found(prepared(tmp_path, shards, **options)) == [("shard_0.tar:9.jpg", 2)]
    (tmp_path / "mapping.tsv").write_text("x\taerosol_can\n")
    assert found(prepared(tmp_path, shards, **options)) == [("shard_0.tar:9.jpg", 0)]
    labels.write_text("3.jpg\tx\n")
    assert found(prepared(tmp_path, shards, **options)) == [("shard_0.tar:3.jpg", 0)]


ALL = [f"{k}.jpg" for k in (9, 3, 7, 8, 2, 6, 5)] + ["sub/1.jpg"]


def test_strict_labels(tmp_path, shards):
    complete = "".join(f"{name}\tbird\n" for name in ALL)
    assert len(prepared(tmp_path, shards, labels=labels_file(tmp_path, complete), strict=True)) == 8
    with pytest.raises(ValueError, match=r"labels\.tsv: 0 members of the tars .*, 1 labels have no member"):
        prepared(tmp_path, shards, labels=labels_file(tmp_path, complete + "gone.jpg\tbird\n"), strict=True)
    less = complete.replace("7.jpg\tbird\n", "")
    with pytest.raises(ValueError, match=r"1 members of the tars have no label \(shard_0\.tar:7\.jpg\), 0"):
        prepared(tmp_path, shards, labels=labels_file(tmp_path, less), strict=True)
    with pytest.raises(ValueError, match=r"labels\.tsv: 1 of 2 image-level classes match no category: dog;"):
        prepared(tmp_path, shards, labels=labels_file(tmp_path, complete + "gone.jpg\tdog\n"), strict=True)


def test_an_index_survives_a_prepare_that_fails(tmp_path, shards):
    """What is wrong may show when all tars are listed: runs that use the index must not suffer."""
    labels = labels_file(tmp_path, "".join(f"{name}\tbird\n" for name in ALL))
    prepared(tmp_path, shards, labels=labels, strict=True)
    before = contents(tmp_path / "index")
    write_tar(shards / "shard_3.tar", "new.jpg")
    with pytest.raises(ValueError, match="1 members of the tars have no label"):
        prepared(tmp_path, shards, labels=labels, strict=True)
    after = contents(tmp_path / "index")
    assert {name: after[name] for name in before} == before
    assert len(open_index(tmp_path / "index", CATEGORIES)) == len(ALL)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("9.jpg bird\n", r"labels\.tsv, line 1: '9\.jpg bird' is not two columns"),
        ("9.jpg\tbird\n3.jpg\t\n", r"labels\.tsv, line 2: '3\.jpg\\t' is not two columns"),
        ("9.jpg\tbird\n3.jpg\tbird\n9.jpg\tbird\n", r"labels\.tsv, line 3: the member of line 1 again"),
        ("9.jpg\tbird\n./9.jpg\tdog\n", r"labels\.tsv, line 2: the member of line 1 again"),
        ("# nothing\n", r"labels\.tsv: no line of member name, tab, class"),
        ("9.jpg\tdog\n", r"labels\.tsv: 1 of 1 image-level classes match no category: dog"),
        (
            "shard_0.tar/9.jpg\tbird\n",
            r"none of its members .* images are shard_0\.tar:9\.jpg, shard_0\.tar:3",
        ),
    ],
)
def test_bad_label_files(tmp_path, shards, text, message):
    with pytest.raises(ValueError, match=message):
        prepared(tmp_path, shards, labels=labels_file(tmp_path, text))


def test_mixed_tars_one_level_below(tmp_path, shards):
    """Tars below a folder of the root are no images of that folder: there is none to name."""
    shards.rename(tmp_path / "part")
    (tmp_path / "root").mkdir()
    (tmp_path / "part").rename(tmp_path / "root" / "part")
    for shard in (tmp_path / "root" / "part").glob("shard_2/*"):
        shard.unlink()
    with pytest.raises(ValueError, match=r"root/part: no \.jpg, .* in it, or in any other folder or tar"):
        prepared(tmp_path, tmp_path / "root", labels=labels_file(tmp_path, LABELS))


def test_a_label_of_two_members_is_refused(tmp_path, shards):
    labels = labels_file(tmp_path, LABELS)
    write_tar(shards / "shard_3.tar", "new.jpg", "9.jpg")
    with pytest.raises(ValueError, match=r"shard_3\.tar: member 9\.jpg is there twice, or in an earlier tar"):
        prepared(tmp_path, shards, labels=labels)
    once = tar_of({"gone.jpg": b"x"})
    (shards / "shard_3.tar").write_bytes(once[:1024] + once)  # header and data once more
    with pytest.raises(ValueError, match=r"shard_3\.tar: member gone\.jpg is there twice"):
        prepared(tmp_path, shards, labels=labels)


NAMES = st.text(
    st.characters(exclude_characters="\t\n\r\x0b\x0c\x1c\x1d\x1e\x1f\x85 ", codec="utf-8"), min_size=1
).filter(
    lambda name: (
        not name.startswith(("#", ".", "\ufeff"))
        and name == name.strip() == unicodedata.normalize("NFC", name)
    )
)


@settings(max_examples=60)
@given(
    labels=st.dictionaries(NAMES, st.integers(-1, 3), min_size=1, max_size=30),
    members=st.sets(NAMES),
    data=st.data(),
)
def test_labels_are_those_of_a_dictionary(tmp_path_factory, labels, members, data):
    path = tmp_path_factory.mktemp("labels") / "labels.tsv"
    path.write_bytes("".join(f"{name}\t{label}\n" for name, label in labels.items()).encode())
    table = MemberLabels(path, lambda name: None if name == "-1" else int(name))
    names = data.draw(
        st.permutations(sorted(members | set(data.draw(st.sets(st.sampled_from(sorted(labels)))))))
    )
    half = len(names) // 2
    taken = [
        *table.take([n.encode() for n in names[:half]], "a"),
        *table.take([n.encode() for n in names[half:]], "b"),
    ]
    assert taken == [labels.get(name, -1) for name in names]
    assert table.without_label == sum(name not in labels for name in names)
    numbers = {name: number for number, name in enumerate(labels, start=1)}
    assert table.without_member.tolist() == sorted(numbers[name] for name in set(labels) - set(names))


@settings(max_examples=60)
@given(
    names=st.lists(NAMES.map(lambda name: name.replace("/", "_").replace("\0", "_") + ".jpg"), unique=True),
    data=st.data(),
)
def test_listings_and_their_selection(tmp_path_factory, names, data):
    path = tmp_path_factory.mktemp("tars") / "bird.tar"
    path.write_bytes(tar_of({name: name.encode() for name in names}))
    (container,) = find_containers([path], lambda name: True)
    listing = list_images(container, by_name=False)
    assert listing.split_names() == [name.encode() for name in names]
    keep = np.array(data.draw(st.lists(st.booleans(), min_size=len(names), max_size=len(names))), dtype=bool)
    chosen = listing.select(keep)
    tar = path.read_bytes()
    assert chosen.split_names() == [name.encode() for name, kept in zip(names, keep) if kept]
    assert chosen.split_names() == [tar[p : p + s] for p, s in zip(chosen.positions, chosen.sizes)]
