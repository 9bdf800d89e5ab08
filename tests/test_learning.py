"""A training teaches its detector something: the whole chain from data to AP."""

from __future__ import annotations

import pytest
from runs import BASELINE, CONFIG

from clis.commands import run_verb
from clis.data.shapes import ShapesSpec, write_shapes
from clis.engine.run_folder import RunFolder

SPEC = ShapesSpec(train_images=40, val_images=20, image_level_per_class=2, seed=3)
RECIPE = (
    "data.generate=null", "data.val=shapes/train.json", "data.val_images=shapes", "data.workers=0",
    "train.steps=200", "optim.decay_steps=[140, 180]", "optim.warmup_steps=30",
)  # fmt: skip
GIVEN = ("regions.rule=given", "regions.boxes=shapes/image_level_boxes.json", "regions.detector=null")


@pytest.mark.slow
@pytest.mark.parametrize(("config", "more"), [(BASELINE, ()), (CONFIG, GIVEN)], ids=["baseline", "clis"])
def test_forty_images_are_learned(config, more, tmp_path):
    """200 steps of 8, tested on the same images: AP50 was .28 and .23 when this was written."""
    write_shapes(tmp_path / "data" / "shapes", SPEC)
    words = [f"data.root={tmp_path / 'data'}", f"output={tmp_path / 'run'}", *RECIPE, *more]
    run_verb("train", ["--config", config, *words])
    assert RunFolder(tmp_path / "run").read_result()["AP50"] > 0.1
