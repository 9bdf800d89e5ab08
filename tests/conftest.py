"""A small network and batches for it, for any test: `from conftest import ...`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import settings
from runs import CONFIG, SHORT
from torch import Tensor

from clis import boxes as box_ops
from clis.commands import run_verb
from clis.config import Config
from clis.config_files import config_from_dict, merge_overrides
from clis.data.batch import Batch, Sample, collate, count_batches
from clis.data.categories import Category
from clis.data.shapes import ShapesSpec, write_shapes
from clis.distributed import all_reduce_sum
from clis.losses import Rows
from clis.models import CLISDetector, Normalizers, build_model
from clis.models.contrastive import KeyQueue

# other work on the machine is no failure; `--hypothesis-profile=default` draws other examples each time
settings.register_profile("clis", deadline=None, derandomize=True)
settings.load_profile("clis")

CATEGORIES = tuple(
    Category(
        id=label + 1, name=f"class{label}", frequency=frequency, image_count=count, instance_count=3 * count
    )
    for label, (count, frequency) in enumerate([(1, "r"), (10, "r"), (11, "c"), (100, "c"), (1000, "f")])
)
NUM_CLASSES = len(CATEGORIES)

OWN_OBJECTNESS = ("clis.objectness=false",)
LOSSES: dict[str, tuple[str, ...]] = {
    "acsl": (),
    "bags": OWN_OBJECTNESS,
    "bags(objectness=false)": (),
    "balanced_softmax": (),
    "balanced_softmax(counted=true)": (),
    "cross_entropy": (),
    "cross_entropy(pcb=0.4, pcb_start=0)": ("model.roi.refinement_rounds=3",),
    "drop": (),
    "efl": (),
    "eql": (),
    "eqlv2": OWN_OBJECTNESS,
    "eqlv2(objectness=false, pcb=0.2, pcb_start=0)": (),
    "federated(classes=3)": (),
    "focal": (),
    "gumbel": (),
    "loce": (),
    "logit_adjusted": (),
    "logit_adjusted(counted=true)": (),
    "seesaw": OWN_OBJECTNESS,
    "seesaw(objectness=false)": (),
    "seesaw(pcb=0.05, pcb_start=0)": (*OWN_OBJECTNESS, "model.roi.refinement_rounds=3"),
}
"""Every classification loss and its variants, with the overrides that the tiny config needs for them."""
QUICK = {"cross_entropy", "eqlv2", "seesaw(pcb=0.05, pcb_start=0)", "bags(objectness=false)"}
"""One loss of each kind of state; what takes seconds for each has the others marked slow."""
MOSAIC = 64

TINY = {
    "model": {
        "backbone": {
            "name": "resnet10", "width": 16, "norm": "group", "trainable_layers": 5, "fpn_channels": 16,
        },
        "rpn": {
            "anchor_scale": 4, "samples": 32, "pre_nms_train": 60, "pre_nms_test": 60, "proposals": 30,
        },
        "roi": {"samples": 16, "finest_scale": 14, "fc_dim": 24},
    },
    "clis": {"s": 4, "t": 2, "embedding_dim": 8, "queue_size": 10},
    "test": {"short_side": 64, "max_size": 96, "detections": 20},
}  # fmt: skip


def tiny_config(*overrides: str) -> Config:
    """All of CLIS on a four-block network, with `key.path=value` overrides."""
    return config_from_dict(merge_overrides(TINY, overrides), source="tiny")


def make_model(*overrides: str, seed: int = 0) -> CLISDetector:
    """A float64 detector of `CATEGORIES` with the tiny config."""
    torch.manual_seed(seed)
    return build_model(tiny_config(*overrides), CATEGORIES).double()


def fill(queue: KeyQueue) -> None:
    """Push random keys of no class to every place."""
    keys = torch.randn(queue.keys.shape).to(queue.keys)
    queue.push(F.normalize(keys, dim=1), torch.full((len(keys),), -1))


def random_boxes(count: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """float32 [count,4], sides of 0.2 to 0.5 of the image's and inside it."""
    low = 0.5 * torch.rand(count, 2, generator=generator)
    high = low + 0.2 + 0.3 * torch.rand(count, 2, generator=generator)
    return torch.cat([low, high], dim=1) * torch.tensor([width, height, width, height])


def make_sample(
    seed: int = 0, *, size: tuple[int, int] = (64, 64), truths: int = 2, regions: int = 4, pairs: int = 2
) -> Sample:
    """Random pixels: an image with `truths` boxes and `pairs` pasted ones, and one mosaic with `regions`."""
    generator = torch.Generator().manual_seed(seed)
    labels, region_labels = (
        torch.randint(NUM_CLASSES, (count,), generator=generator) for count in (truths, regions)
    )
    pair_boxes = random_boxes(pairs, *size, generator)
    return Sample(
        image=torch.randint(256, (3, *size), generator=generator, dtype=torch.uint8),
        boxes=torch.cat([random_boxes(truths, *size, generator), pair_boxes]),
        labels=torch.cat([labels, region_labels[:pairs]]),
        mosaics=torch.randint(256, (1, 3, MOSAIC, MOSAIC), generator=generator, dtype=torch.uint8),
        regions=random_boxes(regions, MOSAIC, MOSAIC, generator),
        region_labels=region_labels,
        region_mosaics=torch.zeros(regions, dtype=torch.int64),
        pair_boxes=pair_boxes,
        pair_regions=torch.arange(pairs),
        seed=seed,
        image_id=seed,
        unreadable=(),
    )


def make_batch(images: int = 2, *, seed: int = 0, **options) -> Batch:
    """The samples of `make_sample` with the seeds from `seed` on."""
    return collate([make_sample(seed + index, **options) for index in range(images)])


def normalizers_of(batch: Batch) -> Normalizers:
    """Those of one process that takes this batch alone."""
    return Normalizers(len(batch.images), max(1, len(batch.regions)), max(1, len(batch.pair_boxes)))


def rows_of(
    images: Sequence[int], normalizer: float | None = None, first_seed: int = 0, num_images: int | None = None
) -> Rows:
    """Rows of these images, which are numbered from 0; by default of the whole global batch."""
    count = num_images or max(images, default=-1) + 1

    def uniform(numbers: int) -> torch.Tensor:
        drawn = [box_ops.uniform(numbers, first_seed + image, torch.device("cpu")) for image in range(count)]
        return torch.stack([torch.zeros(numbers, dtype=torch.float64), *drawn])[1:]

    return Rows(torch.tensor(images, dtype=torch.int64), count, normalizer or max(1, count), uniform)


def global_counts(batches: list[Batch]) -> list[int]:
    """Regions and pairs of the micro-batches of all processes, as `Feed` counts them."""
    return all_reduce_sum(torch.tensor(count_batches(batches, Batch))).tolist()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As a reference with OMP_NUM_THREADS=1: another number of threads adds in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session", autouse=True)
def annotation_cache(tmp_path_factory) -> Iterator[Path]:
    """No test finds, or leaves, anything in the user's cache; commands that a test starts inherit this."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("CLIS_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """A data root with a very small embedded benchmark."""
    root = tmp_path_factory.mktemp("data")
    spec = ShapesSpec(
        image_size=48, train_images=40, val_images=20, image_level_size=40, image_level_per_class=2
    )
    write_shapes(root / "shapes", spec)
    return root


@pytest.fixture(scope="session")
def finished(data, tmp_path_factory) -> Path:
    """The run folder of the whole recipe, in a few steps."""
    folder = tmp_path_factory.mktemp("runs") / "clis"
    run_verb("train", ["--config", CONFIG, *SHORT, f"data.root={data}", f"output={folder}"])
    return folder
