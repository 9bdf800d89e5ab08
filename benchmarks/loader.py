"""One work item of the loader beside decoding its JPEGs alone, and beside the plain pipeline in Pillow.

    python benchmarks/loader.py [--data ../shared/data] [--items 40] [--repeats 7]

A work item is a COCO photograph at a short side of 800 with sixteen ImageNet photographs as four mosaics of
448 and two pastes. *decode* is torchvision's decoder on the bytes of these seventeen files, at full size and
nothing else; *item* is what training runs, files read and random numbers drawn; *plain* makes the same sample
as one would without much thought: Pillow decodes, torchvision.transforms.v2 resizes and flips Pillow images
and their boxes, and the mosaics are pasted together in Pillow. It is given the random numbers. One process,
one thread; the three take turns item by item. CPU time; each repetition gives one ratio over all items.

    python benchmarks/loader.py --enlarge 2000 3000 4000 [--items 40] [--repeats 7]

measures instead what reduced decoding saves on COCO photographs that are enlarged to these longest sides
(in turn; Lanczos, JPEG quality 90): decoding and resizing for a training image, the region search and a
mosaic, beside the same at full size.
"""

from __future__ import annotations

import argparse
import functools
import io
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode
from torchvision.io import decode_image as torchvision_decode_image
from torchvision.transforms.v2 import functional as v2
from torchvision.tv_tensors import BoundingBoxes

from clis.config_files import config_from_dict
from clis.data.annotations import checked_for_training, load_annotations
from clis.data.image_level import ImageLevelIndex, build_index
from clis.data.images import EncodedImage, open_image, read_bytes
from clis.data.loader import TwoStreamDataset
from clis.data.plan import Plan, plan_sample
from clis.data.region_file import REGION_DTYPE, RegionSource
from clis.data.sampling import JointSampler, UniformSampler, WorkItem
from clis.data.transforms import FILL
from clis.resize import resize_image, shortest_size

S, T = 16, 2
GRAY = (FILL, FILL, FILL)


def make_dataset(root: Path) -> TwoStreamDataset:
    """The paper's sizes; the region of every image is the center of half its area."""
    config = config_from_dict(
        {"clis": {"s": S, "t": T}, "data": {"short_sides": [800]}}, source="benchmarks/loader.py"
    )
    annotations, _ = checked_for_training(
        load_annotations(root / "coco_mini" / "train.json"), drop_invalid=True
    )
    folders, mapping = (root / "imagenet_mini" / name for name in ("folders", "wnid_to_category.tsv"))
    index = build_index([folders], annotations.categories, mapping, strict=False)
    regions = np.zeros(len(index), dtype=REGION_DTYPE)
    regions["source"] = RegionSource.RULE
    for i in range(len(index)):
        height, width = open_image(index.read(i), index.name(i)).size
        margin = 0.5 - 0.125**0.5
        regions["box"][i] = np.array([margin, margin, 1 - margin, 1 - margin]) * [
            width,
            height,
            width,
            height,
        ]
    images = root / "coco_mini" / "images"
    return TwoStreamDataset(config.data, config.clis, annotations, images, index, regions)


def files_of(dataset: TwoStreamDataset, item: WorkItem) -> list[bytes]:
    """The seventeen JPEGs of a work item."""
    image = dataset.image_folder / dataset.annotations.file_names[item.instance]
    return [read_bytes(image), *map(image_level_index(dataset).read, item.image_level)]


def decode(data: bytes) -> Tensor:
    buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return torchvision_decode_image(buffer, mode=ImageReadMode.RGB)


def decode_pillow(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def decode_pillow_tensor(data: bytes) -> Tensor:
    return v2.pil_to_tensor(decode_pillow(data))


def image_level_index(dataset: TwoStreamDataset) -> ImageLevelIndex:
    """The index, which a dataset of both streams has."""
    if dataset.index is None:
        raise ValueError("the dataset has no image-level stream")
    return dataset.index


def region_boxes(dataset: TwoStreamDataset) -> np.ndarray:
    """The regions [n,4] of the image-level images, which a dataset of both streams has."""
    if dataset.regions is None:
        raise ValueError("the dataset has no regions")
    return dataset.regions["box"]


def decode_draft(data: bytes, denominator: int) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.draft("RGB", (image.width // denominator, image.height // denominator))
    return image.convert("RGB")


def plan_of(dataset: TwoStreamDataset, item: WorkItem) -> Plan:
    """The random choices of the item."""
    sizes = [open_image(data, "").size for data in files_of(dataset, item)]
    return plan_sample(
        dataset.data,
        dataset.clis.t,
        sizes[0],
        torch.from_numpy(dataset.annotations.boxes_of(item.instance)),
        sizes[1:],
        torch.from_numpy(region_boxes(dataset)[list(item.image_level)]),
        np.random.default_rng(item.seed),
    )


def with_boxes(image: Image.Image, boxes: np.ndarray) -> tuple[Image.Image, BoundingBoxes]:
    return image, BoundingBoxes(boxes, format="XYXY", canvas_size=(image.height, image.width))


def plain_sample(
    dataset: TwoStreamDataset, item: WorkItem, plan: Plan
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Image with pastes, its boxes, mosaics and regions: Pillow and v2 at full size, by the plan's draws."""
    data, annotations = dataset.data, dataset.annotations
    image, *sources = (decode_pillow(file) for file in files_of(dataset, item))
    image, boxes = with_boxes(image, annotations.boxes_of(item.instance))
    image, boxes = (v2.resize(x, list(plan.size)) for x in (image, boxes))
    if plan.flipped:
        image, boxes = v2.horizontal_flip(image), v2.horizontal_flip(boxes)
    pasted = [torch.tensor([paste.box]) for _, paste in plan.pastes]
    for place, paste in plan.pastes:
        x1, y1, x2, y2 = paste.crop
        left, top, right, bottom = paste.box
        crop = v2.resized_crop(sources[place], y1, x1, y2 - y1, x2 - x1, [bottom - top, right - left])
        image.paste(v2.horizontal_flip(crop) if paste.flipped else crop, (left, top))

    tile = data.mosaic_size // 2
    canvases = [Image.new("RGB", (2 * tile, 2 * tile), GRAY) for _ in range(len(sources) // 4)]
    regions = []
    for place, (source, placement) in enumerate(zip(sources, plan.placements)):
        source, region = with_boxes(source, region_boxes(dataset)[item.image_level[place]])
        source, region = (v2.resize(x, list(placement.size)) for x in (source, region))
        if placement.flipped:
            source, region = v2.horizontal_flip(source), v2.horizontal_flip(region)
        if placement.cutout:
            source.paste(GRAY, placement.cutout)
        view = Image.new("RGB", (tile, tile), GRAY)
        view.paste(source, (placement.left, placement.top))
        left, top = tile * (place % 2), tile * (place % 4 // 2)
        canvases[place // 4].paste(view, (left, top))
        moved = region + torch.tensor([placement.left, placement.top]).repeat(2)
        regions.append(moved.clamp(0, tile) + torch.tensor([left, top]).repeat(2))
    return (
        v2.pil_to_tensor(image),
        torch.cat([boxes, *pasted]),
        torch.stack([v2.pil_to_tensor(canvas) for canvas in canvases]),
        torch.cat(regions)[plan.kept],
    )


def timed(function: Callable[[], object]) -> float:
    """CPU seconds of this process."""
    start = time.process_time()
    function()
    return time.process_time() - start


def compare_decoders(files: Sequence[bytes], repeats: int) -> None:
    """Milliseconds an image, median over the repetitions of the mean over the files."""
    decoders: dict[str, Callable[[bytes], object]] = {
        "torchvision.io.decode_image": decode,
        "Pillow, to a tensor": decode_pillow_tensor,
        "Pillow": decode_pillow,
        "Pillow at 1/2": lambda data: decode_draft(data, 2),
        "Pillow at 1/4": lambda data: decode_draft(data, 4),
        "Pillow at 1/8": lambda data: decode_draft(data, 8),
    }
    seconds: dict[str, list[float]] = {name: [] for name in decoders}
    for _ in range(repeats):
        spent = dict.fromkeys(decoders, 0.0)
        for data in files:
            for name, decoder in decoders.items():
                spent[name] += timed(functools.partial(decoder, data))
        for name, total in spent.items():
            seconds[name].append(total)
    first = seconds["torchvision.io.decode_image"]
    for name, totals in seconds.items():
        milliseconds = statistics.median(totals) / len(files) * 1000
        ratio = spread([b / a for a, b in zip(first, totals)])
        print(f"    {name:30} {milliseconds:7.2f} ms, {ratio} of the first")


def enlarge(data: bytes, side: int) -> bytes:
    """The photograph with a longest side of `side` pixels, as JPEG."""
    image = decode_pillow(data)
    height, width = shortest_size((image.height, image.width), np.inf, side)
    file = io.BytesIO()
    image.resize((width, height), Image.Resampling.LANCZOS).save(file, "JPEG", quality=90)
    return file.getvalue()


def compare_reduced(files: Sequence[bytes], repeats: int) -> None:
    """Milliseconds of decoding and resizing an image, at full and at reduced size."""
    images = [open_image(data, "") for data in files]
    for name, limits in (
        ("training, short side 800", (800, 1333)),
        ("region search, short side 400", (400, 667)),
        ("mosaic, a tile of 224", (np.inf, 224)),
    ):
        whole, reduced = [], []
        for _ in range(repeats):
            spent = [0.0, 0.0]
            for image in images:
                size = shortest_size(image.size, *limits)
                spent[0] += timed(functools.partial(_decode_whole, image, size))
                spent[1] += timed(functools.partial(image.decode_resized, size))
            whole.append(spent[0])
            reduced.append(spent[1])
        milliseconds = (statistics.median(each) / len(images) * 1000 for each in (whole, reduced))
        print(
            f"    {name:30} full {next(milliseconds):6.2f} ms, reduced {next(milliseconds):6.2f} ms, "
            f"{spread([b / a for a, b in zip(whole, reduced)])} of it"
        )


def _decode_whole(image: EncodedImage, size: tuple[int, int]) -> Tensor:
    return resize_image(image.decode(), size)


def spread(ratios: Sequence[float]) -> str:
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def compare_items(dataset: TwoStreamDataset, items: Sequence[WorkItem], repeats: int) -> None:
    files = [files_of(dataset, item) for item in items]
    plans = [plan_of(dataset, item) for item in items]
    seconds: dict[str, list[float]] = {"decode": [], "item": [], "plain": []}
    for _ in range(repeats):
        spent = dict.fromkeys(seconds, 0.0)
        for item, encoded, plan in zip(items, files, plans):
            spent["decode"] += timed(functools.partial(list, map(decode, encoded)))
            spent["item"] += timed(functools.partial(dataset.__getitem__, item))
            spent["plain"] += timed(functools.partial(plain_sample, dataset, item, plan))
        for name, total in spent.items():
            seconds[name].append(total)
    for name, totals in seconds.items():
        milliseconds = [1000 * total / len(items) for total in totals]
        print(f"    {name:7} {statistics.median(milliseconds):7.2f} ms an item")
    whole, alone, plain = (seconds[name] for name in ("item", "decode", "plain"))
    print(f"    item / decode: {spread([a / b for a, b in zip(whole, alone)])}; at most 1.5 is asked for")
    print(f"    plain / item:  {spread([a / b for a, b in zip(plain, whole)])}; at least 2 is asked for")


def check_same(dataset: TwoStreamDataset, items: Sequence[WorkItem]) -> None:
    """That the two pipelines make the same: equal boxes, and how far their pixels are apart."""
    differences = []
    for item in items:
        sample, plain = dataset[item], plain_sample(dataset, item, plan_of(dataset, item))
        image, boxes, mosaics, regions = plain
        torch.testing.assert_close(sample.boxes, boxes.as_subclass(Tensor), rtol=1e-5, atol=1e-3)
        torch.testing.assert_close(sample.regions, regions.as_subclass(Tensor), rtol=1e-5, atol=1e-3)
        pairs = ((sample.image, image), (sample.mosaics, mosaics))
        differences.append([(a.int() - b.int()).abs().float().mean().item() for a, b in pairs])
    image, mosaics = np.mean(differences, axis=0)
    print(
        f"item and plain have the same boxes and differ by {image:.2f} levels of 255 on the images, by "
        f"{mosaics:.2f} on the mosaics"
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path(__file__).resolve().parents[2] / "shared" / "data")
    parser.add_argument("--items", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--enlarge", type=int, nargs="+", metavar="SIDE", help="measure reduced decoding of large photographs"
    )
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    dataset = make_dataset(arguments.data)
    index = image_level_index(dataset)
    streams = UniformSampler(len(dataset.annotations), 1), UniformSampler(len(index), 2)
    items = JointSampler(*streams, arguments.items, S, seed=3).items(0)
    instances = [files_of(dataset, item)[0] for item in items]
    if arguments.enlarge:
        large = [enlarge(data, side) for data, side in zip(instances, itertools.cycle(arguments.enlarge))]
        print(f"{len(large)} photographs enlarged to {arguments.enlarge}, {arguments.repeats} repetitions:")
        compare_reduced(large, arguments.repeats)
        return
    check_same(dataset, items[:8])

    image_level = [index.read(i) for i in range(len(index))]
    large = [data for data in image_level if max(open_image(data, "").size) > 900]
    for name, files in (
        ("COCO", instances),
        ("ImageNet", image_level[: arguments.items]),
        ("ImageNet, a side above 900 pixels", large),
    ):
        pixels = np.mean([np.prod(open_image(data, "").size) for data in files]) / 1e6
        print(f"{len(files)} of {name}, {pixels:.2f} Mpixels on the average:")
        compare_decoders(files, arguments.repeats)
    print(f"{len(items)} work items, {arguments.repeats} repetitions, median (least to most) of the ratios:")
    compare_items(dataset, items, arguments.repeats)


if __name__ == "__main__":
    main()
