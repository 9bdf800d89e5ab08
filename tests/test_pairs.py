"""benchmarks/pairs.py: how alike a detector finds a region and its pasted copy."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from conftest import CATEGORIES, make_batch, tiny_config
from runs import REPOSITORY

from clis.models import build_model

sys.path.insert(0, str(REPOSITORY / "benchmarks"))
import pairs


def test_what_is_measured_of_known_features(monkeypatch):
    """Copies equal to their regions: similarity 1, all retrieved; with two copies exchanged, two are not."""
    batch, detector = make_batch(), build_model(tiny_config(), CATEGORIES).eval()
    count = len(batch.pair_boxes)
    assert count > 2
    regions = torch.eye(count, detector.classification.fc_cls.in_features)
    order = torch.arange(count)
    monkeypatch.setattr(pairs, "features_of", lambda *_: (regions[order], regions))
    number, pair, others, retrieval, *_ = pairs.measure(detector, batch)
    assert (number, retrieval) == (count, 1)
    assert pair == pytest.approx(1)
    assert others == pytest.approx(-1 / (count - 1))  # corners of a simplex around its center
    order = order[[1, 0, *range(2, count)]]
    monkeypatch.setattr(pairs, "features_of", lambda *_: (regions[order], regions))
    assert pairs.measure(detector, batch)[3] == pytest.approx(1 - 2 / count)


def test_a_region_and_its_copy_of_the_same_pixels():
    """The first mosaic as the image, and the regions' own boxes as those of the copies: the same features."""
    batch, detector = make_batch(), build_model(tiny_config(), CATEGORIES).eval()
    own = batch.region_mosaics == 0
    same = replace(
        batch,
        images=[batch.mosaics[0]] * len(batch.images),
        pair_boxes=batch.regions[own],
        pair_images=torch.zeros(int(own.sum()), dtype=torch.int64),
        pair_regions=own.nonzero()[:, 0],
    )
    copies, regions = pairs.features_of(detector, same)
    torch.testing.assert_close(copies, regions)


def test_a_run(finished, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pairs.py", str(finished), "--batches=2"])
    pairs.main()
    row = capsys.readouterr().out.splitlines()[-1].split(" | ")
    assert row[0] == f"| {finished}"
    monkeypatch.setattr(sys, "argv", ["pairs.py", str(finished / "detector"), "--batches=2"])
    with pytest.raises(ValueError, match=r"detector: no pairs are pasted in its training \(clis\.t=0\)"):
        pairs.main()
