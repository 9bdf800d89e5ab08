"""What every detection and every ground truth is at IoU 0.5, one by one, for pictures and tables.

`Matches` has only the judged detections, and says of a ground truth that it is taken but not by which of
them. Here every row of the detections and of the annotations has its answer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from clis.data.annotations import Annotations
from clis.metric.analysis import FOREGROUND_IOU, Errors
from clis.metric.detections import Detections
from clis.metric.matching import BoxIoU, Matches

VERDICTS = ("right", "class", "location", "duplicate", "nothing", "not judged")
"""``nothing`` is background and ``both`` of `clis.metric.analysis.ERRORS`: no object of its class at 0.1 or
more, and none of any class at 0.5 or more. ``not judged`` is no mistake: its class is not verified in the
image (LVIS's federated annotation), the metric ignores it, or it is beyond the image's limit of detections.
"""
RIGHT, CLASS, LOCATION, DUPLICATE, NOTHING, NOT_JUDGED = range(len(VERDICTS))
_OF_ERROR = np.array([CLASS, LOCATION, NOTHING, DUPLICATE, NOTHING])  # in the order of `ERRORS`


@dataclass(frozen=True, kw_only=True)
class Verdicts:
    """Answers for all D detections and all A annotations, in the rows of their own files."""

    verdicts: np.ndarray
    """uint8 [D], place in `VERDICTS`."""
    truths: np.ndarray
    """int64 [D], row of the annotation that it takes, repeats or names wrongly; -1 where there is none."""
    required: np.ndarray
    """bool [A], whether the annotation has to be found: not ignored, no crowd, with an area."""
    found: np.ndarray
    """float64 [A], score of the detection that takes it; -1 where nothing does."""
    other: np.ndarray
    """float64 [A], highest score of a detection of the wrong class on it; -1 where there is none."""
    other_labels: np.ndarray
    """int64 [A], the class of that detection; -1 where there is none."""
    off: np.ndarray
    """float64 [A], highest score of a poorly located detection of its class; -1 where there is none."""

    def missed(self, score: float) -> np.ndarray:
        """Return the objects on which no detection of at least this score is right, of another class or off.

        Returns:
            bool [A].
        """
        return self.required & (np.maximum.reduce((self.found, self.other, self.off)) < score)


def verdicts_of(
    annotations: Annotations, detections: Detections, matches: Matches, errors: Errors
) -> Verdicts:
    """Say of every detection and annotation what it is; `errors` are those of the matches (`find_errors`)."""
    verdicts = np.full(len(detections), NOT_JUDGED, np.uint8)
    truths = np.full(len(detections), -1)
    hits, taken = _taken_truths(annotations, detections, matches)
    verdicts[matches.rows[hits]] = RIGHT
    truths[matches.rows[hits]] = matches.truth_places[taken]
    kinds = _OF_ERROR[errors.kinds]
    verdicts[matches.rows[errors.places]] = kinds
    about = errors.truths >= 0
    truths[matches.rows[errors.places[about]]] = matches.truth_places[errors.truths[about]]

    count = len(annotations.labels)
    required = np.zeros(count, bool)
    required[matches.truth_places[matches.truth_counts[:, 0]]] = True
    found, other, off = np.full((3, count), -1.0)
    other_labels = np.full(count, -1)
    found[matches.truth_places[taken]] = matches.scores[hits]
    for column, kind in ((other, CLASS), (off, LOCATION)):
        chosen = np.flatnonzero(kinds == kind)
        chosen = chosen[np.argsort(matches.scores[errors.places[chosen]], kind="stable")]
        places = matches.truth_places[errors.truths[chosen]]
        column[places] = matches.scores[errors.places[chosen]]  # the last assignment stays: the highest
        if kind == CLASS:
            other_labels[places] = matches.labels[errors.places[chosen]]
    return Verdicts(
        verdicts=verdicts, truths=truths, required=required, found=found, other=other,
        other_labels=other_labels, off=off,
    )  # fmt: skip


def _taken_truths(
    annotations: Annotations, detections: Detections, matches: Matches
) -> tuple[np.ndarray, np.ndarray]:
    """Return the true positives at IoU 0.5, and the ground truth that each takes, as places in the matches.

    Only they take ground truth that counts and has an id other than 0, so the choice of `match` can be
    repeated with these alone: the higher score first, then the higher IoU, then the later ground truth.
    """
    hits = np.flatnonzero(matches.true_positive & 1)
    num_classes = matches.num_classes
    has_id = annotations.annotation_ids[matches.truth_places] != 0
    counted = np.flatnonzero(matches.truth_counts[:, 0] & has_id)
    keys = matches.truth_images[counted] * num_classes + matches.truth_labels[counted]
    counted, keys = counted[np.argsort(keys, kind="stable")], np.sort(keys)
    wanted = matches.images[hits].astype(np.int64) * num_classes + matches.labels[hits]
    first, last = np.searchsorted(keys, wanted, "left"), np.searchsorted(keys, wanted, "right")
    hit = np.repeat(np.arange(len(hits)), last - first)
    within = np.arange(len(hit)) - np.repeat(np.cumsum(last - first) - (last - first), last - first)
    truth = counted[np.repeat(first, last - first) + within]
    truth_boxes = annotations.bboxes[matches.truth_places]
    iou = BoxIoU(detections.bbox[matches.rows], truth_boxes, np.zeros(len(truth_boxes), bool))
    overlap = iou(hits[hit], truth)
    close = overlap >= FOREGROUND_IOU
    hit, truth, overlap = hit[close], truth[close], overlap[close]
    # The matches are sorted by score within a class, so that a hit's place is its rank in its pair.
    order = np.lexsort((-truth, -overlap, hit))
    chosen = np.full(len(hits), -1)
    free = np.ones(len(matches.truth_labels), bool)
    for place, candidate in zip(hit[order].tolist(), truth[order].tolist()):
        if chosen[place] < 0 and free[candidate]:
            chosen[place], free[candidate] = candidate, False
    taken = chosen >= 0  # all of them; a mask's match need not overlap as a box
    return hits[taken], chosen[taken]
