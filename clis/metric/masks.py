"""Masks in the metric: ground truth as compressed RLE, and its overlap with detected ones, by pycocotools."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as rle

from clis.data.annotations import Annotations, pack_annotations
from clis.data.records import read_document

RLE = dict[str, Any]


def ground_truth_masks(source: str | Path | Mapping[str, Any]) -> tuple[Annotations, list[RLE]]:
    """Load the annotations of a file or of loaded JSON, and the mask of each in their order.

    Raises:
        ValueError: as `load_annotations`, or a mask that pycocotools cannot read; the annotation is named.
    """
    path = "ground truth" if isinstance(source, Mapping) else os.path.expanduser(source)
    document = source if isinstance(source, Mapping) else read_document(path)
    annotations = pack_annotations(document, path)
    records = {record["id"]: record for record in document["annotations"]}
    sizes = np.repeat(annotations.image_sizes, np.diff(annotations.offsets), axis=0).tolist()
    masks = []
    for annotation_id, (height, width) in zip(annotations.annotation_ids.tolist(), sizes):
        segmentation = records[annotation_id].get("segmentation")
        masks.append(compressed(segmentation, height, width, f"{path}: annotation {annotation_id}"))
    return annotations, masks


def compressed(segmentation: Any, height: int, width: int, where: str) -> RLE:
    """Convert polygons, an uncompressed or a compressed RLE to a compressed RLE of this image size.

    Raises:
        ValueError: it is none of them, or has another size; the message begins with `where`.
    """
    try:
        if isinstance(segmentation, list):
            return rle.merge(rle.frPyObjects(segmentation, height, width))
        size, counts = segmentation["size"], segmentation["counts"]
        if list(size) != [height, width]:
            problem = f"of size {size}, the image is {[height, width]}"
        elif isinstance(counts, str | bytes):
            return segmentation
        elif sum(counts) != height * width:  # pycocotools would compare it forever
            problem = f"an RLE whose counts add up to {sum(counts)}, the image has {height * width} pixels"
        else:
            return rle.frPyObjects({"size": size, "counts": counts}, height, width)
    except Exception as error:  # pycocotools has one for every kind of mistake
        problem = f"no polygons and no RLE ({error!r})"
    raise ValueError(f"{where}: the segmentation is {problem}")


class MaskIoU:
    """IoU of detected and ground-truth masks, taken by place: (int64 [n], int64 [n]) -> float64 [n].

    Args:
        masks: segmentation of every row of the detections; `rows` are the judged ones, which the places refer
            to, and `sizes` int [D, 2] the height and width of their images.
        truth: RLE of every annotation; `annotations` are the judged ones.
        crowd: bool of the judged annotations; with a crowd, the intersection over the detection's own area.
    """

    def __init__(
        self, masks: Sequence[Any], rows: np.ndarray, sizes: np.ndarray, truth: Sequence[RLE],
        annotations: np.ndarray, crowd: np.ndarray,
    ) -> None:  # fmt: skip
        self.masks, self.rows, self.sizes = masks, rows, sizes
        self.truth, self.annotations, self.crowd = truth, annotations, crowd

    def __call__(self, detections: np.ndarray, truths: np.ndarray) -> np.ndarray:
        """Compute the IoU of each pair; the pairs of one detection must be adjacent."""
        overlap = np.empty(len(detections))
        firsts = np.flatnonzero(np.diff(detections, prepend=-1))
        counts = np.diff(firsts, append=len(detections))
        for first, count in zip(firsts.tolist(), counts.tolist()):
            places = truths[first : first + count]
            mask = self._mask(detections[first])
            candidates = [self.truth[place] for place in self.annotations[places].tolist()]
            overlap[first : first + count] = rle.iou([mask], candidates, self.crowd[places].tolist())[0]
        return overlap

    def _mask(self, detection: int) -> RLE:
        row = int(self.rows[detection])
        height, width = self.sizes[detection].tolist()
        return compressed(self.masks[row], height, width, f"detection in row {row}")
