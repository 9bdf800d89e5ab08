"""``python -m clis prepare image-level``: folders and tars -> a prepared index, and what it covers."""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from clis.atomic import remove_partial_files
from clis.commands.arguments import positive
from clis.data.categories import Category
from clis.data.image_classes import MemberLabels, class_labels, coverage, describe_coverage, match_classes
from clis.data.image_level import (
    FORMAT,
    ImageLevelIndex,
    is_index,
    is_index_file,
    is_intact,
    mark_unfinished,
    match_containers,
    open_index,
    read_header,
    write_index,
)
from clis.data.image_scan import (
    LISTING_VERSION,
    Container,
    Listing,
    end_with_parent,
    find_containers,
    keep_listing,
    list_images,
    part_file,
    remove_other_parts,
)
from clis.data.streams import read_annotations
from clis.progress import Progress, say
from clis.text import shortened

PARTS = "parts"
"""Folder in the index with the listings of tars; without it they are scanned again, nothing else."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `clis prepare`."""
    parser.add_argument(
        "kind", choices=["image-level"],
        help="image-level: index class folders or tars for data.image_level, and say what they cover",
    )  # fmt: skip
    parser.add_argument(
        "roots", nargs="+", type=Path, metavar="ROOT", help="of folders or tars, or a tar of tars"
    )
    parser.add_argument(
        "--annotations",
        type=Path,
        required=True,
        metavar="FILE",
        help="LVIS or COCO-form file: the categories",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="INDEX", help="folder to write")
    parser.add_argument("--mapping", type=Path, metavar="FILE", help="lines of: name, tab, category")
    parser.add_argument(
        "--labels", type=Path, metavar="FILE", help="of mixed tars, lines of: member name, tab, class"
    )
    parser.add_argument("--strict", action="store_true", help="stop at what matches nothing")
    parser.add_argument("--workers", type=positive, help="scan tars with N processes (default: one per CPU)")


def run(arguments: argparse.Namespace) -> None:
    """Index image-level data and print what the index covers."""
    prepare_image_level(
        arguments.roots,
        arguments.annotations,
        arguments.out,
        mapping=arguments.mapping,
        labels=arguments.labels,
        strict=arguments.strict,
        workers=arguments.workers,
    )


def prepare_image_level(
    roots: Sequence[str | Path],
    annotations: str | Path,
    out: str | Path,
    *,
    mapping: str | Path | None = None,
    labels: str | Path | None = None,
    strict: bool = False,
    workers: int | None = None,
) -> dict[str, Any]:
    """Write the index of the images of `roots` into `out`, for `data.image_level`; print what it covers.

    The listings of finished tars are kept: after an interruption, and where tars have changed, only the
    others are scanned. If nothing has changed, the index stays as it is.

    Args:
        roots: folders with one folder or tar per class, or tars of class tars.
        annotations: file whose categories are the labels.
        out: folder of the index: a new or empty one, or an index to update.
        mapping: see `clis.data.image_classes.class_labels`.
        labels: file of ``member name<TAB>class`` lines: the folders and tars of `roots` are of mixed classes,
            and the index is in the order of the bytes in the tars.
        strict: what matches nothing is an error; by default it is left out and reported.
        workers: processes that scan tars; None is one per CPU.

    Returns:
        What `clis.data.image_classes.coverage` counts, and of what matched nothing: ``empty``, names of
        folders and tars without an image, ``skipped``, images that `Listing.skipped` counts, which are
        ``skipped_in`` these, and ``others``, numbers of files whose suffix is none of an image; with `labels`
        also what `MemberLabels.report` says.

    Raises:
        ValueError: `out` is no place for an index, a root, mapping or label file is wrong, tars are damaged
            (all are named), or no image is left.
    """
    out, root_paths = Path(out), [Path(root) for root in roots]
    _check_out(out, root_paths)
    for name, path in (("mapping", mapping), ("labels", labels)):
        if path is not None and not Path(path).exists():
            raise FileNotFoundError(f"--{name} {path}: no such file")
    categories = read_annotations(annotations).categories
    if not is_index(out):
        mark_unfinished(out)
    parts = out / PARTS
    containers, found, unmatched, members = _matched(root_paths, categories, mapping, labels, strict, parts)
    made_of = _fingerprint(categories, containers, found, unmatched, labels, strict)
    index = None if any(container.is_folder for container in containers) else _unchanged(out, made_of)
    if index is not None:
        say(f"{out} already exists and is up to date")
        report = read_header(out)["report"]
    else:
        _scan(containers, members is None, parts, workers or _cpus())
        report = {"unmatched": unmatched}
        with Progress("index", len(containers)) as progress:
            labeled = _labeled(containers, found, members, parts, strict, report, progress.advance)
            write_index(
                out,
                containers,
                labeled,
                categories,
                mixed=members is not None,
                notes=lambda: {"made_of": made_of, "report": report},
            )
        remove_other_parts(containers, by_name=members is None, parts=parts)
        index = open_index(out, categories)
    covered = coverage(categories, index.image_counts) | report
    say(f"{out}: {len(index)} images in {len(containers)} folders and tars\n{describe_coverage(covered)}")
    return covered


def _matched(
    roots: Sequence[Path],
    categories: Sequence[Category],
    mapping: str | Path | None,
    labels: str | Path | None,
    strict: bool,
    parts: Path,
) -> tuple[list[Container], Sequence[int | None], tuple[str, ...], MemberLabels | None]:
    """Return the containers to index, a label of each, the classes that match nothing, and None.

    Of mixed tars: all containers, a label of each class of the label file, the classes that match nothing,
    and the members' labels.
    """
    if labels is None:
        return *match_containers(roots, categories, mapping, strict=strict, parts=parts, say=say), None
    containers = find_containers(roots, lambda name: True, say=say)
    if not containers:
        raise ValueError(f"{', '.join(map(str, roots))}: no folder or tar in it")
    say(f"{labels}: reading the labels")
    label_of = class_labels(categories, mapping)
    members = MemberLabels(labels, label_of)
    found, unmatched = match_classes(
        members.class_names, label_of, categories, strict=strict, where=str(labels)
    )
    return containers, found, unmatched, members


def _check_out(out: Path, roots: Sequence[Path]) -> None:
    """Raise unless `out` is new, empty or an index, and apart from the roots; remove what a crash left."""
    place = out.resolve()
    for root in map(Path.resolve, roots):
        if root.is_dir() and (place.is_relative_to(root) or root.is_relative_to(place)):
            raise ValueError(f"{out}: the index must lie outside of {root}, whose folders are classes")
    others = out.exists() and (
        not out.is_dir() or any(not path.name.startswith(".") for path in out.iterdir())
    )
    if others and not is_index(out):
        raise ValueError(f"{out}: already exists and is no index; name a new folder")
    remove_partial_files(out, is_index_file)


def _fingerprint(
    categories: Sequence[Category],
    containers: Sequence[Container],
    found: Sequence[int | None],
    unmatched: Sequence[str],
    labels: str | Path | None,
    strict: bool,
) -> str:
    """Return a hash that changes with whatever changes the index."""
    digest = hashlib.sha256(
        json.dumps(
            [
                (FORMAT, LISTING_VERSION),
                [(category.id, category.name) for category in categories],
                *(containers, found, unmatched, strict),
            ]
        ).encode()
    )
    if labels is not None:
        with open(labels, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _unchanged(out: Path, made_of: str) -> ImageLevelIndex | None:
    """Return the existing index, if it was made of the same and is whole."""
    try:
        index = open_index(out)
    except ValueError:
        return None
    return index if read_header(out).get("made_of") == made_of and is_intact(index) else None


def _cpus() -> int:
    """Return the number of CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _scan(containers: Sequence[Container], by_name: bool, parts: Path, workers: int) -> None:
    """List the tars that have no listing yet; a damaged one does not keep the others from it."""
    tars = [container for container in containers if not container.is_folder]
    waiting = [tar for tar in tars if not part_file(tar, by_name=by_name, parts=parts).exists()]
    if len(waiting) < len(tars):
        say(f"{len(tars) - len(waiting)} of {len(tars)} tars are listed already")
    faults = []
    with Progress("tars", len(waiting)) as progress:
        for fault in _outcomes(partial(keep_listing, by_name=by_name, parts=parts), waiting, workers):
            if fault is not None:
                faults.append(fault)
            progress.advance()
    if faults:
        raise ValueError(
            f"{len(faults)} of {len(tars)} tars cannot be indexed (the others are listed, and will not be "
            "scanned again):\n" + "\n".join(sorted(faults))
        )


def _outcomes(
    task: Callable[[Container], str | None], tars: Sequence[Container], workers: int
) -> Iterator[str | None]:
    """Yield what the task returns of each tar, in any order, from at most `workers` processes."""
    workers = min(workers, len(tars))
    if workers <= 1:
        yield from map(task, tars)
        return
    # Spawned: a process that has threads, as torch's, must not fork. They import no torch.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=end_with_parent) as pool:
        try:
            for future in as_completed([pool.submit(task, tar) for tar in tars]):
                yield future.result()
        except BrokenProcessPool as error:
            raise OSError(
                "a process that scans tars was killed, perhaps for lack of memory; re-run the same command "
                "to resume, with fewer --workers if memory is short"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _labeled(
    containers: Sequence[Container],
    found: Sequence[int | None],
    members: MemberLabels | None,
    parts: Path,
    strict: bool,
    report: dict[str, Any],
    advance: Callable[[], None],
) -> Iterator[tuple[int | np.ndarray, Listing]]:
    """Yield labels and images of each container; at the end, complete the report on what matched nothing."""
    report |= {"empty": [], "skipped": 0, "skipped_in": []}
    others: Counter[str] = Counter()
    for place, container in enumerate(containers):
        listing = list_images(container, by_name=members is None, parts=parts)
        if not len(listing.lengths):
            report["empty"].append(container.name)
        if listing.skipped:
            report["skipped"] += listing.skipped
            report["skipped_in"].append(container.name)
        others.update(listing.others)
        if members is None:
            label = found[place]
            assert label is not None  # `_matched` leaves out the others
            yield label, listing
        else:
            labels = members.take(listing.split_names(), container.name)
            yield labels[labels >= 0], listing.select(labels >= 0)
        advance()
    report["others"] = dict(others)
    if members is not None:
        report |= members.report()
        if members.without_label and not members.any_used:
            raise ValueError(
                f"{members.path}: none of its members is in the tars, whose images are "
                f"{shortened(members.without_label_names, 3)}; name them as there, without the tar's name"
            )
        if strict and (members.without_label or len(members.without_member)):
            raise ValueError(
                f"{members.path}: {members.without_label} members of the tars have no label"
                + f" ({shortened(members.without_label_names)})" * bool(members.without_label)
                + f", {len(members.without_member)} labels have no member; correct it, or leave out --strict"
            )
