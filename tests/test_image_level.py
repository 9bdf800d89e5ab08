"""The image-level index: which class is which category, where the bytes lie, and what ties regions to it."""

import contextlib
import dataclasses
import json
import os
import pickle
import shutil
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from image_sets import CATEGORIES, category, found, write_folder, write_tar
from torch.utils.data import DataLoader

from clis.config import RegionsConfig
from clis.data.annotations import load_annotations
from clis.data.image_level import build_index
from clis.data.images import ImageError, decode_image
from clis.data.region_file import REGION_DTYPE, RegionSource, load_regions, region_sidecar

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
MINI = SHARED / "imagenet_mini"
needs_mini = pytest.mark.skipif(not MINI.exists(), reason="sample data is not here")

CENTER = RegionsConfig(rule="center")


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("aerosol_can", 0),
        ("Aerosol Can", 0),
        ("aerosol.n.02", 0),
        ("n02682922", 0),  # aerosol.n.02 in WordNet 3.0
        ("traffic_light", 1),
        ("bird", 2),
        ("n01514668", 2),
        ("n01514859", 2),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_class_names(tmp_path, name, label, packed):
    mapping = tmp_path / "mapping.tsv"
    mapping.write_text("wnid\tcategory\nn01514668\tbird\nn01514859\tBIRD\n# a comment\n\n")
    if packed:
        write_tar(tmp_path / "root" / f"{name}.tar", "x.jpg")
    else:
        write_folder(tmp_path / "root" / name, "x.jpg")
    index = build_index([tmp_path / "root"], CATEGORIES, mapping)
    assert found(index) == [(f"{name}.tar:x.jpg" if packed else f"{name}/x.jpg", label)]
    assert index.read(0) == b"bytes of x.jpg"


def test_mapping_comes_first(tmp_path):
    write_folder(tmp_path / "root" / "bird", "x.jpg")
    (tmp_path / "mapping.tsv").write_text("bird\taerosol_can\n")
    assert build_index([tmp_path / "root"], CATEGORIES, tmp_path / "mapping.tsv").labels.tolist() == [0]


def test_exact_name_before_a_similar_one_and_of_two_none_is_guessed(tmp_path):
    write_folder(tmp_path / "Bat", "x.jpg")
    assert build_index([tmp_path], [category(1, "bat"), category(2, "Bat")]).labels.tolist() == [1]
    with pytest.raises(ValueError, match="class 'Bat': is category 1 'bat' or 2 'BAT' meant"):
        build_index([tmp_path], [category(1, "bat"), category(2, "BAT")])


def test_order_and_what_is_passed_over(tmp_path):
    write_folder(tmp_path / "b" / "bird", "z.JPEG", "a/y.png", "B.gif", "notes.txt", ".hidden.jpg")
    write_tar(tmp_path / "b" / "aerosol_can.tar", "sub/2.webp", "sub/._2.webp", "1.jpeg", "README")
    write_folder(tmp_path / "b", "README.md", ".git/x.jpg")
    write_folder(tmp_path / "a" / "bird", "x.jpg")
    index = build_index([tmp_path / "b", tmp_path / "a"], CATEGORIES)
    assert found(index) == [
        ("aerosol_can.tar:1.jpeg", 0),
        ("aerosol_can.tar:sub/2.webp", 0),
        ("bird/B.gif", 2),
        ("bird/a/y.png", 2),
        ("bird/z.JPEG", 2),
        ("bird/x.jpg", 2),
    ]
    assert index.read(1) == b"bytes of sub/2.webp"
    assert index.read(3) == b"bytes of a/y.png"


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_tar_members_are_read_in_place(tmp_path, kind):
    long = "d" * 90 + "/" + "f" * 90 + ".jpg"  # longer than the 100 bytes of the old header
    names = [long, "../../escape.jpg", "/etc/absolute.jpg", "b.jpg"]
    write_tar(tmp_path / "bird.tar", *names, kind=kind)
    with tarfile.open(tmp_path / "bird.tar", "a") as tar:
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    index = build_index([tmp_path], CATEGORIES)
    assert {index.name(i): index.read(i) for i in range(len(index))} == {
        f"bird.tar:{name}": f"bytes of {name}".encode() for name in names
    }


def test_unmatched_classes_are_an_error_unless_left_out(tmp_path):
    write_folder(tmp_path / "bird", "x.jpg")
    write_folder(tmp_path / "n00000001", "x.jpg")
    (tmp_path / "zzz.tar").write_bytes(b"not even a tar: must not be opened")
    with pytest.raises(ValueError, match=r"2 of 3 .* no category: n00000001, zzz; .*drop_unmatched=true"):
        build_index([tmp_path], CATEGORIES)
    index = build_index([tmp_path], CATEGORIES, strict=False)
    assert index.unmatched == ("n00000001", "zzz")
    assert found(index) == [("bird/x.jpg", 2)]


def test_nothing_matches(tmp_path):
    for k in range(12):
        write_folder(tmp_path / f"class{k:02}", "x.jpg")
    message = (
        r"12 of 12 image-level classes match no category: class00, .*class09, \.\.\.; name them by category "
        r"\(aerosol_can, Traffic Light, bird\), WordNet synset or wnid, or give a mapping file "
        r"\(data.mapping\)$"
    )
    with pytest.raises(ValueError, match=message):
        build_index([tmp_path], CATEGORIES, strict=False)


def test_bad_roots(tmp_path):
    with pytest.raises(ValueError, match=r"none: no such folder"):
        build_index([tmp_path / "none"], CATEGORIES)
    with pytest.raises(ValueError, match=r"is empty; images belong"):
        build_index([tmp_path], CATEGORIES)
    (tmp_path / "bird").mkdir()
    with pytest.raises(ValueError, match=r"bird: no \.jpg, .* file"):
        build_index([tmp_path], CATEGORIES)
    (tmp_path / "dog").symlink_to("/mnt/another/dog")
    with pytest.raises(ValueError, match=r"dog: a link to /mnt/another/dog, which does not exist; mount"):
        build_index([tmp_path], CATEGORIES)
    (tmp_path / "dog").unlink()
    (tmp_path / "bird.tar.gz").touch()
    with pytest.raises(ValueError, match=r"bird\.tar\.gz: .*compressed tar; unpack it"):
        build_index([tmp_path], CATEGORIES)


@pytest.mark.parametrize(
    "damage",
    [
        lambda tar: b"",
        lambda tar: b"not a tar" * 100,
        lambda tar: tar[:600],  # in the first member's data: a member takes 512 bytes of header, 512 of data
        lambda tar: tar[:1024],  # before the second member's header
        lambda tar: tar[:1100],  # in it
        lambda tar: tar[:1024] + b"x" + tar[1025:],
        lambda tar: tar[:2048],  # before the end marker
    ],
)
def test_damaged_tars(tmp_path, damage):
    write_tar(tmp_path / "bird.tar", "1.jpg", "2.jpg", kind=tarfile.USTAR_FORMAT)
    tar = (tmp_path / "bird.tar").read_bytes()
    (tmp_path / "bird.tar").write_bytes(damage(tar))
    with pytest.raises(ValueError, match=r"bird\.tar: not a readable uncompressed tar"):
        build_index([tmp_path], CATEGORIES)


def test_files_that_vanish_are_image_errors(tmp_path):
    write_folder(tmp_path / "bird", "x.jpg")
    write_tar(tmp_path / "aerosol_can.tar", "y.jpg")
    write_tar(tmp_path / "Traffic Light.tar", "z.jpg")
    index = build_index([tmp_path], CATEGORIES)
    assert [label for _, label in found(index)] == [1, 0, 2]
    (tmp_path / "Traffic Light.tar").write_bytes(b"short")
    (tmp_path / "aerosol_can.tar").unlink()
    (tmp_path / "bird" / "x.jpg").unlink()
    with pytest.raises(ImageError, match=r"Traffic Light\.tar: the tar has changed: 5 bytes, but 10240 when"):
        index.read(0)
    with pytest.raises(ImageError, match=r"aerosol_can\.tar: No such file"):
        index.read(1)
    with pytest.raises(ImageError, match=r"bird/x\.jpg: No such file"):
        index.read(2)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("n1 bird\n", r"mapping\.tsv, line 1: 'n1 bird' is not two columns"),
        ("n1\tbird\n\nn1\tdog\n", r"mapping\.tsv, line 3: n1 means 'dog' here and 'bird' above"),
    ],
)
def test_bad_mapping(tmp_path, table, message):
    (tmp_path / "mapping.tsv").write_text(table)
    with pytest.raises(ValueError, match=message):
        build_index([tmp_path], CATEGORIES, tmp_path / "mapping.tsv")


def test_digest_follows_what_is_indexed_and_not_where(tmp_path):
    write_folder(tmp_path / "a" / "bird", "1.jpg", "2.jpg")
    write_tar(tmp_path / "a" / "aerosol_can.tar", "3.jpg")
    digest = build_index([tmp_path / "a"], CATEGORIES).digest
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert build_index([tmp_path / "b"], CATEGORIES).digest == digest
    write_folder(tmp_path / "b" / "unknown", "1.jpg")
    assert build_index([tmp_path / "b"], CATEGORIES, strict=False).digest == digest  # its images are the same
    assert build_index([tmp_path / "a"], CATEGORIES[::-1]).digest != digest
    (tmp_path / "a" / "bird" / "2.jpg").rename(tmp_path / "a" / "bird" / "4.jpg")
    assert build_index([tmp_path / "a"], CATEGORIES).digest != digest
    # A pin: region files of one machine must fit the index of another.
    assert digest == "bef062d5c0959e54b7baeb7aedb5f23c96f13d7768829d3412d80d6fef8b0392"


class Read:
    """What a loader process does."""

    def __init__(self, index):
        self.index = index

    def __len__(self):
        return len(self.index)

    def __getitem__(self, i):
        return self.index.name(i), self.index.read(i)


def test_loader_processes_read_one_open_tar(tmp_path):
    names = [f"{k:03}.jpg" for k in range(200)]
    write_tar(tmp_path / "bird.tar", *names)
    index = build_index([tmp_path], CATEGORIES)
    index.read(0)  # opened before the fork: a position shared by the processes would mix their bytes up
    loader = DataLoader(Read(index), batch_size=None, num_workers=2)
    assert list(loader) == [[f"bird.tar:{name}", f"bytes of {name}".encode()] for name in names]
    assert pickle.loads(pickle.dumps(index)).read(7) == b"bytes of 007.jpg"


@pytest.fixture
def regions(tmp_path):
    """An index of two images and a region file for it."""
    write_folder(tmp_path / "bird", "1.jpg", "2.jpg")
    index = build_index([tmp_path], CATEGORIES)
    table = np.zeros(2, dtype=REGION_DTYPE)
    table[0] = ((1, 2, 3, 4), 0.5, RegionSource.RULE)
    table[1] = ((0, 0, 0, 0), 0, RegionSource.UNREADABLE)
    np.save(tmp_path / "regions.npy", table)
    (tmp_path / "regions.json").write_text(json.dumps(region_sidecar(index, CENTER, None)))
    return tmp_path / "regions.npy", index, table


def test_regions_of_an_index(regions):
    path, index, table = regions
    np.testing.assert_array_equal(load_regions(path, index, CENTER), table)


def test_regions_of_another_index(regions):
    path, index, _ = regions
    with pytest.raises(ValueError, match=r"regions\.npy: made for other image-level images than the 2"):
        load_regions(path, dataclasses.replace(index, digest="other"), CENTER)


def test_damaged_regions(regions):
    path, index, _ = regions
    whole = path.read_bytes()
    for damage in (b"", whole[:70], whole[:-1]):
        path.write_bytes(damage)
        with pytest.raises(ValueError, match=r"regions\.npy: damaged .*; remove it to have it made again"):
            load_regions(path, index, CENTER)
    path.write_bytes(whole)
    path.with_suffix(".json").write_text("[]")
    with pytest.raises(ValueError, match=r"regions\.npy: (damaged|made for other)"):
        load_regions(path, index, CENTER)


def test_regions_without_their_sidecar(regions):
    """Copied without the .json, which says which images they are of."""
    path, index, _ = regions
    path.with_suffix(".json").unlink()
    with pytest.raises(ValueError, match=r"regions\.npy: regions\.json is missing, .*; copy both files"):
        load_regions(path, index, CENTER)


def test_regions_of_another_rule(regions):
    path, index, _ = regions
    with pytest.raises(ValueError, match=r"regions\.npy: made with regions\.rule=center, this run has full"):
        load_regions(path, index, RegionsConfig(rule="full"))


@pytest.mark.parametrize(
    "row",
    [
        ((0, 0, 0, 0), 0, RegionSource.PENDING),
        ((3, 2, 1, 4), 0.5, RegionSource.RULE),
        ((np.nan, 2, 1, 4), 0.5, RegionSource.FALLBACK),
    ],
)
def test_unusable_regions(regions, row):
    path, index, table = regions
    table[1] = row
    np.save(path, table)
    with pytest.raises(ValueError, match=r"regions\.npy: row 1 \(bird/2\.jpg\) is unfinished or has no area"):
        load_regions(path, index, CENTER)


@needs_mini
def test_sample_folders_and_tars():
    categories = load_annotations(SHARED / "coco_mini" / "train.json").categories
    mapping = dict(line.split("\t") for line in (MINI / "wnid_to_category.tsv").read_text().splitlines()[1:])
    index = build_index([MINI / "folders"], categories, MINI / "wnid_to_category.tsv")
    expected = Counter(mapping[file.parent.name] for file in (MINI / "folders").rglob("*.JPEG"))
    assert Counter(categories[label].name for label in index.labels) == expected

    tars = build_index([MINI / "tars"], categories, MINI / "wnid_to_category.tsv", strict=False)
    for i in range(0, len(tars), 97):
        tar, member = tars.name(i).split(":")
        with tarfile.open(MINI / "tars" / tar) as whole:
            assert tars.read(i) == whole.extractfile(member).read()
        assert decode_image(tars.read(i), tars.name(i)).ndim == 3
        assert categories[tars.labels[i]].name == mapping[Path(tar).stem]


@needs_mini
def test_sample_tars_by_wnid_alone():
    """LVIS names its categories by synset; aerosol.n.02 and its like are resolved without a mapping."""
    categories = load_annotations(SHARED / "lvis" / "lvis_v0.5_val_100.json").categories
    rows = [line.split("\t") for line in (SHARED / "lvis" / "lvis_wnids.tsv").read_text().splitlines()[1:]]
    name_of = {row[7]: row[2] for row in rows if row[0] == "v0.5"}
    index = build_index([MINI / "tars"], categories, strict=False)
    names = {index.containers[k].class_name for k in index.container}
    assert names == {tar.stem for tar in (MINI / "tars").iterdir() if tar.stem in name_of}
    assert set(index.unmatched) == {tar.stem for tar in (MINI / "tars").iterdir()} - names
    for i in range(0, len(index), 53):
        assert categories[index.labels[i]].name == name_of[Path(index.name(i).split(":")[0]).stem]


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize(
    "name",
    ["x.jpg", "./a/x.jpg", "d" * 90 + "/x.jpg", "d" * 60 + "/" + "e" * 60 + "/x.jpg", "bildchen-ü.jpg"],
)
def test_members_of_any_name_are_known_by_their_header(tmp_path, kind, name):
    """Long names are in a prefix, in a header before, or cut off: none of them is taken for a changed tar."""
    write_tar(tmp_path / "bird.tar", name, kind=kind)
    assert build_index([tmp_path], CATEGORIES).read(0) == f"bytes of {name}".encode()


# --- what lies in class folders beside images ---


def test_tools_own_folders_are_no_images(tmp_path):
    """In folders and in tars; `./` and `..` at the start of a member's name hide nothing."""
    for name in (
        "1.jpg",
        ".ipynb_checkpoints/1-checkpoint.jpg",
        ".thumbnails/1.jpg",
        "@eaDir/1.jpg",
        "sub/2.jpg",
    ):
        path = tmp_path / "folders" / "bird" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    index = build_index([tmp_path / "folders"], CATEGORIES)
    assert [index.name(row).rpartition("bird/")[2] for row in range(len(index))] == ["1.jpg", "sub/2.jpg"]
    (tmp_path / "tars").mkdir()
    members = ("./1.jpg", "./.thumbnails/1.jpg", "__MACOSX/._1.jpg", "__MACOSX/2.jpg", "./sub/2.jpg")
    write_tar(tmp_path / "tars" / "bird.tar", *members)
    assert len(build_index([tmp_path / "tars"], CATEGORIES)) == 2


def test_linked_folders_are_read_once(tmp_path, monkeypatch):
    """Also where a link leads back to a folder above, or two links to the same folder."""
    bird, elsewhere = tmp_path / "root" / "bird", tmp_path / "elsewhere"
    for folder in (bird, elsewhere):
        folder.mkdir(parents=True)
        (folder / "1.jpg").touch()
    (bird / "more").symlink_to(elsewhere)
    (bird / "again").symlink_to(elsewhere)
    (elsewhere / "loop").symlink_to(bird)
    listed = os.scandir
    for backwards in (False, True):  # a disk lists in any order, and the digest has to be the same on all

        @contextlib.contextmanager
        def scandir(folder, backwards=backwards):
            with listed(folder) as entries:
                yield sorted(entries, key=lambda entry: entry.name, reverse=backwards)

        monkeypatch.setattr(os, "scandir", scandir)
        index = build_index([tmp_path / "root"], CATEGORIES)
        assert [index.location(row) for row in range(len(index))] == ["bird/1.jpg", "bird/again/1.jpg"]


def test_roots_that_are_named_twice_or_not_at_all(tmp_path):
    """Also a tar beside the folder that it is in; two folders of one class are no mistake."""
    write_tar(tmp_path / "a" / "bird.tar", "1.jpg")
    write_folder(tmp_path / "b" / "bird", "1.jpg")
    assert len(build_index([tmp_path / "a", tmp_path / "b"], CATEGORIES)) == 2
    for again in (tmp_path / "a", tmp_path / "a" / "bird.tar", tmp_path / "b" / ".." / "a"):
        with pytest.raises(ValueError, match=r"a/bird\.tar: is named twice, .* name it, or the folder"):
            build_index([tmp_path / "a", again], CATEGORIES)
    with pytest.raises(ValueError, match=r"no folder .* is named; set data\.image_level, or clis\.s=0"):
        build_index([], CATEGORIES)


def test_what_is_left_out_is_said(tmp_path, capsys):
    """Files of other suffixes, files beside the class folders, and links to nothing."""
    write_folder(
        tmp_path / "root" / "bird", "1.jpg", "2.JFIF", "3.tif", "4.heic", "5.heic", "notes", "Thumbs.db"
    )
    (tmp_path / "root" / "bird" / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (tmp_path / "root" / "photos.zip").touch()
    (tmp_path / "root" / "6.jpg").touch()
    assert len(build_index([tmp_path / "root"], CATEGORIES)) == 3
    said = capsys.readouterr().out
    assert "2 files that are neither folders nor tars are left out: 6.jpg, photos.zip" in said
    assert "3 files are left out, since their suffix is none of an image: .heic 2, none 1" in said
    assert "1 images are left out, since they are links" in said


def test_folders_one_level_too_high_or_too_low(tmp_path):
    write_folder(tmp_path / "sets" / "train" / "bird", "x.jpg")
    write_folder(tmp_path / "sets" / "val" / "bird", "x.jpg")
    with pytest.raises(ValueError, match=r"sets/train has folders that do match \(bird\): name it"):
        build_index([tmp_path / "sets"], CATEGORIES)
    with pytest.raises(ValueError, match=r"train/bird: no class folder and no tar in it, but 1 image;"):
        build_index([tmp_path / "sets" / "train" / "bird"], CATEGORIES)


def test_the_repr_is_one_line(tmp_path):
    write_folder(tmp_path / "bird", "x.jpg", "y.jpg")
    assert repr(build_index([tmp_path], CATEGORIES)) == (
        "<ImageLevelIndex: 2 images of 1 classes in 1 folders and tars>"
    )
