"""``python -m clis show``: what a training step sees, before hours are spent on it."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from clis.atomic import atomic_write
from clis.commands.arguments import add_config, class_labels, positive
from clis.commands.show_pictures import (
    Streams,
    class_rows,
    draw_class,
    draw_image,
    draw_mosaics,
    format_score,
)
from clis.config import DETECTOR_RULES, ONLINE_RULES, Config
from clis.config_files import find_config, load_config, name_below
from clis.data.annotations import Annotations
from clis.data.image_classes import GROUP_NAMES, coverage
from clis.data.loader import TwoStreamDataset
from clis.data.region_file import RegionSource, mean_scores
from clis.data.sampling import JointSampler, WorkItem
from clis.data.streams import generate_data, make_streams
from clis.engine.region_search import region_rule, regions_of, search_batches
from clis.engine.run_folder import regions_file
from clis.pages import MissingExtra, check_page, render
from clis.progress import Progress, say
from clis.text import printable, shortened

PAGE = "index.html"
SIZED = 64
"""Instance-level images of the first steps whose boxes and regions are measured."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `clis show`."""
    add_config(parser)
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default: below runs/show")
    parser.add_argument("--steps", type=positive, default=1, metavar="N", help="draw the first N steps (1)")
    parser.add_argument("--batch", type=positive, default=4, metavar="N", help="images of each step (4)")
    parser.add_argument(
        "--regions", type=positive, default=3, metavar="K",
        help="regions of each class: K with the lowest scores, K with the highest, K at random (3)",
    )  # fmt: skip
    parser.add_argument(
        "--limit", type=positive, default=60, metavar="N",
        help="draw regions of N classes, those with the lowest mean score first (60)",
    )  # fmt: skip
    parser.add_argument("--classes", metavar="NAME,NAME,...", help="draw the regions of these classes")


def run(arguments: argparse.Namespace) -> None:
    """Write pictures and a page of what the first steps of a config see."""
    config = load_config(arguments.config, arguments.overrides)
    out = arguments.out or Path("runs/show") / name_below(find_config(arguments.config), "configs")
    check_page(out / PAGE)
    generate_data(config)
    seen = open_streams(config, arguments.config)
    labels = None
    if arguments.classes is not None:
        labels = class_labels(arguments.classes, seen.streams.categories)
    for note in seen.notes:
        say(note)
    steps = draw_steps(seen, out, arguments.steps, arguments.batch)
    classes = draw_classes(seen, out, arguments.regions, arguments.limit, labels)
    sides, dropped = measure_boxes(seen)
    charts = write_charts(seen, out, sides)
    try:
        page = write_page(seen, out, arguments.config, steps, classes, charts, dropped)
        pictures = sum(1 + len(each["mosaics"]) for each in steps) + len(classes) + len(charts)
        say(f"{page}, with {pictures} pictures beside it")
    except MissingExtra as error:
        say(f"no {PAGE}: {error}; the pictures are in {out}")


@dataclass(frozen=True)
class Seen:
    """The streams of a config, opened as training opens them."""

    config: Config
    annotations: Annotations
    dataset: TwoStreamDataset
    sampler: JointSampler
    streams: Streams
    fill: Callable[[Sequence[int]], None] | None
    """Finds the regions of rows of the index, where there is no file of them; None where there is."""
    notes: tuple[str, ...]
    """What to know before the run."""

    def items(self, images: int) -> list[WorkItem]:
        """Return the first work items of the run."""
        steps = range(-(-images // self.config.train.images_per_step))
        return [item for step in steps for item in self.sampler.items(step)][:images]

    def fill_items(self, items: Sequence[WorkItem]) -> None:
        """Find the regions that the items need, if they are not known."""
        if self.fill is not None:
            self.fill([row for item in items for row in item.image_level])

    @property
    def instance_images(self) -> np.ndarray:
        """Instance-level images of each class, int64 [C]."""
        return self.annotations.images_per_class()


def open_streams(config: Config, name: str) -> Seen:
    """Open both streams of a config; without a region file, regions are found on the way where a rule can.

    Where the rule needs a detector, mosaics are made without knowing their regions, and nothing is pasted.

    Args:
        name: of the config, for messages.
    """
    path, notes = regions_file(config), []
    exists, by_detector = path.exists(), config.regions.rule in DETECTOR_RULES
    as_drawn = replace(config, clis=replace(config.clis, detect_mosaics=False))
    if config.clis.detect_mosaics:
        notes.append(
            "detection is trained on the mosaics and their regions, and not on the images beside them"
        )
    if config.clis.s > 0 and config.regions.rule in ONLINE_RULES:
        rule = config.regions.rule
        notes.append(f"regions.rule={rule} chooses a part of each image in training; all of it is shown here")
    if config.has_teacher:
        notes.append("a teacher finds boxes in the mosaics in training; whole images are shown here")
    if config.clis.s > 0 and not exists:
        if by_detector:
            notes.append(
                f"{path} does not exist yet: mosaics are shown without regions, and nothing is pasted; "
                f"`python -m clis regions {name}` makes it"
            )
            unpasted = replace(as_drawn.clis, t=0, contrastive=False)
            as_drawn = replace(config, clis=unpasted, regions=replace(config.regions, rule="full"))
        else:
            notes.append(f"{path} does not exist yet: regions are found here by {config.regions.file_rule}")
    annotations, dataset, sampler = make_streams(as_drawn, path if exists else None)
    index = dataset.index
    fill = None if index is None or exists else _filler(as_drawn, dataset)
    known = index is not None and (exists or not by_detector)
    streams = Streams(
        annotations.categories,
        index,
        dataset.regions if known else None,
        scored=exists and by_detector,
        max_pixels=config.data.max_pixels,
    )
    seen = Seen(config, annotations, dataset, sampler, streams, fill, ())
    return replace(seen, notes=(*notes, *_coverage_notes(seen), *_region_notes(seen)))


def draw_steps(seen: Seen, out: Path, steps: int, batch: int) -> list[dict[str, Any]]:
    """Draw images and mosaics of the first steps; return the files and facts of each image."""
    shown = [(step, place, item) for step in range(steps)
             for place, item in enumerate(seen.sampler.items(step)[:batch])]  # fmt: skip
    seen.fill_items([item for *_, item in shown])
    drawn = []
    with Progress("steps", len(shown)) as progress:
        for step, place, item in shown:
            explained = seen.dataset.explain(item)
            stem = f"step_{step + 1}_image_{place + 1}"
            image = _save(draw_image(explained, seen.streams), out / f"{stem}.png")
            mosaics = [
                _save(picture, out / f"{stem}_mosaic_{number}.png")
                for number, picture in enumerate(draw_mosaics(explained, seen.streams), 1)
            ]
            index, annotations = seen.streams.index, seen.annotations
            sources = [] if index is None else [index.name(row) for row in explained.source_rows.tolist()]
            drawn.append({
                "step": step + 1,
                "place": place + 1,
                "image": image,
                "mosaics": mosaics,
                "name": printable(str(annotations.file_names[explained.row])),
                "id": explained.sample.image_id,
                "size": tuple(explained.sample.image.shape[-2:]),
                "flipped": explained.plan.flipped,
                "boxes": len(explained.sample.boxes) - len(explained.sample.pair_boxes),
                "pasted": len(explained.sample.pair_boxes),
                "sources": sources,
                "unreadable": explained.sample.unreadable,
            })  # fmt: skip
            progress.advance()
    return drawn


def draw_classes(
    seen: Seen, out: Path, count: int, limit: int, labels: Sequence[int] | None
) -> list[dict[str, Any]]:
    """Draw rows of regions, a class each, those with the lowest mean scores first; return their facts.

    Args:
        count: regions with the lowest scores, with the highest and at random, of each.
        limit: the most classes.
        labels: these classes alone; None is all that have images.
    """
    index, regions = seen.streams.index, seen.streams.regions
    if index is None or regions is None:
        if labels is not None:
            say("--classes: there are no regions to show")
        return []
    by_label = np.argsort(index.labels, kind="stable")
    bounds = np.searchsorted(index.labels[by_label], np.arange(len(seen.streams.categories) + 1))
    mean, _ = mean_scores(index.labels, regions, len(seen.streams.categories))
    order = np.argsort(mean, kind="stable") if labels is None else np.array(labels)
    has_images = np.diff(bounds) > 0
    if labels is not None and (missing := [label for label in labels if not has_images[label]]):
        names = ", ".join(seen.streams.categories[label].name for label in missing)
        say(f"--classes: no image-level images of {names}")
    chosen = order[has_images[order]][:limit].tolist()
    drawn = []
    with Progress("regions", len(chosen)) as progress:
        for label in chosen:
            own = by_label[bounds[label] : bounds[label + 1]]
            generator = np.random.default_rng([seen.config.train.seed, label])
            if seen.streams.scored:
                rows = class_rows(own, regions["score"][own], count, generator)
            else:
                rows = {"": generator.permutation(own)[: 3 * count].tolist()}
            if seen.fill is not None:
                seen.fill([row for each in rows.values() for row in each])
            picture = draw_class(rows, seen.streams)
            sources = regions["source"][own]
            drawn.append({
                "category": seen.streams.categories[label],
                "images": len(own),
                "mean": format_score(mean[label]) if seen.streams.scored and mean[label] >= 0 else None,
                "fallback": 100 * float((sources == RegionSource.FALLBACK).mean()),
                "picture": _save(picture, out / f"class_{label + 1:04d}.png"),
                "width": picture.width,
                "names": [index.name(row) for each in rows.values() for row in each],
            })  # fmt: skip
            progress.advance()
    return drawn


def measure_boxes(seen: Seen) -> tuple[dict[str, np.ndarray], float]:
    """Measure the boxes of the first `SIZED` images and of their mosaics, without decoding pixels.

    Returns:
        The square roots of the areas in pixels as the network sees them, by kind; and the share of the
        regions that are left out since too little of them is on their tile.
    """
    items = seen.items(SIZED)
    seen.fill_items(items)
    sides: dict[str, list[np.ndarray]] = {"objects": [], "pasted": [], "regions in mosaics": []}
    kept = []
    with Progress("sizes", len(items)) as progress:
        for item in items:
            plan = seen.dataset.plan(item)
            sides["objects"].append(_root_areas(plan.boxes.numpy()))
            sides["pasted"].append(_root_areas(np.array([paste.box for _, paste in plan.pastes])))
            if seen.streams.regions is not None:
                sides["regions in mosaics"].append(_root_areas(plan.regions[plan.kept].numpy()))
                kept.append(plan.kept.numpy())
            progress.advance()
    joined = {name: np.concatenate(values) if values else np.zeros(0) for name, values in sides.items()}
    share = 1 - float(np.concatenate(kept).mean()) if kept else 0.0
    return joined, share


def write_charts(seen: Seen, out: Path, sides: Mapping[str, np.ndarray]) -> dict[str, str]:
    """Write the charts, and return their files by name; without matplotlib say so and return none."""
    try:
        from clis.commands import show_charts
    except ValueError as error:
        say(str(error))
        return {}
    index = seen.streams.index
    figures = {
        "long_tail": show_charts.long_tail(
            seen.streams.categories, seen.instance_images, None if index is None else index.image_counts
        ),
        "sizes": show_charts.box_sizes(sides),
    }
    for name, figure in figures.items():
        with atomic_write(out / f"{name}.png") as temporary:
            figure.savefig(temporary, dpi=110)
    return {name: f"{name}.png" for name in figures}


def write_page(
    seen: Seen,
    out: Path,
    name: str,
    steps: Sequence[Mapping[str, Any]],
    classes: Sequence[Mapping[str, Any]],
    charts: Mapping[str, str],
    dropped: float,
) -> Path:
    """Write index.html with all pictures, and return its path."""
    index, config = seen.streams.index, seen.config
    covered = None if index is None else coverage(seen.streams.categories, index.image_counts)
    text = render(
        "show.html.j2",
        name=name,
        config=config,
        notes=seen.notes,
        images=len(seen.annotations),
        boxes=len(seen.annotations.labels),
        image_level=0 if index is None else len(index),
        num_classes=len(seen.streams.categories),
        steps=steps,
        classes=classes,
        with_images=0 if index is None else int((index.image_counts > 0).sum()),
        scored=seen.streams.scored,
        charts=charts,
        dropped=dropped,
        sized=SIZED,
        known=seen.streams.regions is not None,
        without=classes_without_images(seen),
        groups=None
        if covered is None
        else [(GROUP_NAMES[key], row) for key, row in covered["groups"].items()],
    )
    with atomic_write(out / PAGE) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return out / PAGE


def _filler(config: Config, dataset: TwoStreamDataset) -> Callable[[Sequence[int]], None]:
    """Make the function that finds regions of rows of the index by a rule without a detector."""
    index, table = dataset.index, dataset.regions
    assert index is not None
    assert table is not None
    rule = region_rule(config, index, None)
    config = replace(config, data=replace(config.data, workers=0))  # a few images at a time

    def fill(rows: Sequence[int]) -> None:
        missing = sorted({row for row in rows if table["source"][row] == RegionSource.PENDING})
        for places, images in search_batches(config, index, missing, None):
            table[places] = regions_of(places, images, rule)

    return fill


def classes_without_images(seen: Seen) -> dict[str, list[str]]:
    """Return the names of the classes that a stream has no image of, by stream."""
    counts = {"instance-level": seen.instance_images}
    if seen.streams.index is not None:
        counts["image-level"] = seen.streams.index.image_counts
    categories = seen.streams.categories
    return {
        stream: [category.name for category, count in zip(categories, of_stream) if count == 0]
        for stream, of_stream in counts.items()
    }


def _coverage_notes(seen: Seen) -> Iterator[str]:
    num_classes = len(seen.streams.categories)
    for stream, names in classes_without_images(seen).items():
        if names:
            yield f"{len(names)} of {num_classes} classes have no {stream} images: {shortened(names)}"


def _region_notes(seen: Seen) -> Iterator[str]:
    regions = seen.streams.regions
    if regions is None or seen.fill is not None:
        return
    for source, what in (
        (RegionSource.FALLBACK, "are fallbacks, the center of the image: the rule found nothing"),
        (RegionSource.UNREADABLE, "are of images that cannot be read"),
    ):
        count = int((regions["source"] == source).sum())
        if count:
            yield f"{count} of {len(regions)} regions ({100 * count / len(regions):.1f} %) {what}"


def _root_areas(boxes: np.ndarray) -> np.ndarray:
    """Return the square roots of the areas of boxes [n,4], xyxy."""
    boxes = boxes.reshape(-1, 4).astype(np.float64)
    return np.sqrt((boxes[:, 2:] - boxes[:, :2]).clip(min=0).prod(axis=1))


def _save(picture: Image.Image, path: Path) -> str:
    """Write a picture, and return its name."""
    with atomic_write(path) as temporary:
        picture.save(temporary)
    return path.name
