"""Wrong labels: how many, which, and what else of the index changes with them."""

import pickle

import numpy as np
import pytest
from image_sets import CATEGORIES, write_annotations, write_folder
from runs import CONFIG

from clis.commands.prepare import prepare_image_level
from clis.config_files import load_config
from clis.data.image_level import build_index, open_index
from clis.data.label_noise import with_wrong_labels
from clis.data.streams import make_index, read_annotations


@pytest.fixture
def index(tmp_path):
    """600 images of two of three classes."""
    for name, count in (("aerosol_can", 400), ("bird", 200)):
        write_folder(tmp_path / "images" / name, *(f"{i}.jpg" for i in range(count)))
    return build_index([tmp_path / "images"], CATEGORIES)


def test_a_share_of_labels_is_another_class_that_has_images(index):
    """240 of 600 on average, with a standard deviation of 12; class 1 has no image and gets none."""
    noisy = with_wrong_labels(index, 0.4, seed=3)
    wrong = noisy.labels != index.labels
    assert 240 - 5 * 12 < wrong.sum() < 240 + 5 * 12
    assert set(noisy.labels.tolist()) == {0, 2}
    assert noisy.image_counts.tolist() == [(noisy.labels == label).sum() for label in range(3)]
    assert noisy.name(5) == index.name(5)
    assert noisy.read(5) == index.read(5)


def test_the_seed_decides_and_a_larger_share_holds_the_smaller(index):
    first, same, other = (with_wrong_labels(index, 0.4, seed) for seed in (3, 3, 4))
    assert (first.labels == same.labels).all()
    assert first.digest == same.digest != other.digest
    assert (first.labels != other.labels).any()
    wrong = first.labels != index.labels
    more = with_wrong_labels(index, 0.6, seed=3)
    assert (more.labels[wrong] == first.labels[wrong]).all()
    assert len({index.digest, first.digest, more.digest}) == 3
    assert (with_wrong_labels(index, 0.0, seed=3).labels == index.labels).all()


def test_all_classes_are_equally_likely(data):
    """The embedded benchmark's 50 classes x 2 images, all of them wrong; none keeps its own."""
    config = load_config(CONFIG, [f"data.root={data}", "data.label_noise=0.9999"])
    annotations = read_annotations(data / "shapes" / "train.json")
    clean = make_index(load_config(CONFIG, [f"data.root={data}"]), annotations)
    shifts = []
    for seed in range(30):
        labels = with_wrong_labels(clean, 1.0, seed).labels
        shifts += ((labels - clean.labels) % 50).tolist()
    counts = np.bincount(shifts, minlength=50)
    assert counts[0] == 0
    assert counts[1:].min() > 30  # 61 expected of 3000 draws, standard deviation 8
    assert (make_index(config, annotations).labels != clean.labels).all()


def test_a_prepared_index_keeps_its_wrong_labels_in_another_process(index, tmp_path):
    """One that is opened from disk is sent as the name of its folder, which has the right ones."""
    annotations = write_annotations(tmp_path / "train.json")
    prepare_image_level([tmp_path / "images"], annotations, tmp_path / "prepared")
    noisy = with_wrong_labels(open_index(tmp_path / "prepared"), 0.4, seed=3)
    assert (pickle.loads(pickle.dumps(noisy)).labels == noisy.labels).all()


def test_one_class_alone_cannot_be_wrong(tmp_path):
    write_folder(tmp_path / "bird", "x.jpg")
    with pytest.raises(ValueError, match="two classes at least"):
        with_wrong_labels(build_index([tmp_path], CATEGORIES), 0.5, seed=0)
