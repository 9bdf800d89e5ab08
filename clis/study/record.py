"""What a study has measured: ``study.json``, and its tables and figure."""

from __future__ import annotations

import functools
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clis.atomic import atomic_write, exclusive
from clis.config import FIGURES, RESUMABLE, data_path
from clis.config_files import flatten, merge_overrides
from clis.data.streams import read_annotations
from clis.engine.describe import format_metrics
from clis.engine.evaluate import load_validation
from clis.engine.run_folder import RunFolder
from clis.metric.analysis import ap_by_image_count
from clis.metric.detections import Detections
from clis.metric.lvis_eval import accumulate
from clis.metric.matching import match
from clis.progress import say
from clis.study.file import Row, Study
from clis.text import markdown_table

ABOUT = (
    "AP in percent, mean ± standard deviation over the seeds; seconds a step are of shared machines and do "
    "not compare. The paper's figures are of LVIS.\n"
)
"""The first line of table.md."""
RUN_FIELDS = (*FIGURES, "key", "by_images")
"""What study.json has of every run, beside the seconds per step."""


class Record:
    """``study.json``: the figures of every run of a study, which later calls and other machines add to."""

    def __init__(self, study: Study, folder: Path, overrides: Sequence[str]) -> None:
        """Read what an earlier call has recorded; runs of other settings than the row's are dropped.

        Raises:
            ValueError: the existing file is damaged, or was made with other overrides.
        """
        self.study, self.path = study, folder / "study.json"
        self.overrides = list(overrides)
        self.rows: dict[str, dict[str, dict[str, Any]]] = {}
        self.classes: dict[str, int] = {}
        """Classes by the bins of training images; empty where no run has said it."""
        self._keys: dict[tuple[str, int], str] = {}
        recorded = self._read()
        kept = {run["key"] for runs in self.rows.values() for run in runs.values()}
        self.outdated = [
            f"{name}, seed {seed}"
            for name, runs in recorded.items()
            for seed, run in runs.items()
            if run["key"] not in kept
        ]
        """Recorded runs that are of no row with its present settings, and so left out."""

    def _read(self) -> Mapping[str, Mapping[str, dict[str, Any]]]:
        """Add what the file has and this record lacks; return all runs of the file, by row and seed.

        Kept are runs that are a row's now; it may have another name since.
        """
        if not self.path.exists():
            return {}
        document = read_record(self.path)
        if _changing_results(document["overrides"]) != _changing_results(self.overrides):
            raise ValueError(
                f"{self.path} was made with the overrides {document['overrides']}, now they are "
                f"{self.overrides}; name another --out"
            )
        self.classes = self.classes or document.get("classes", {})
        recorded = {name: row["runs"] for name, row in document["rows"].items()}
        by_key = {run["key"]: run for runs in recorded.values() for run in runs.values()}
        for row in self.study.rows:
            for seed in sorted({seed for runs in recorded.values() for seed in runs}, key=int):
                key, own = self._key(row, int(seed)), recorded.get(row.name, {}).get(seed)
                run = own if own is not None and own["key"] == key else by_key.get(key)
                if run is not None:
                    self.rows.setdefault(row.name, {}).setdefault(seed, run)
        return recorded

    def has(self, row: Row, seed: int) -> bool:
        """Return whether this run is recorded."""
        return str(seed) in self.rows.get(row.name, {})

    def take(self, row: Row, seed: int) -> bool:
        """Copy this run from the study.json of another study beside this one; return whether one has it.

        Its seconds per step are left out: they may be of another day and machine.
        """
        run, classes = self._others.get(self._key(row, seed), (None, {}))
        if run is not None:
            self.rows.setdefault(row.name, {})[str(seed)] = run
            self.classes = self.classes or classes
        return run is not None

    @functools.cached_property
    def _others(self) -> dict[str, tuple[dict[str, Any], dict[str, int]]]:
        """Return the runs of the other studies in this folder, by their key, each with its `classes`."""
        runs = {}
        for path in sorted(self.path.parent.parent.glob("*/study.json")):
            try:
                document = read_record(path)
                for run in (run for row in document["rows"].values() for run in row["runs"].values()):
                    runs[run["key"]] = {name: run[name] for name in RUN_FIELDS}, document.get("classes", {})
            except ValueError as error:
                say(f"{path}: left aside, no record of a study ({error})")
        return runs

    def add(self, name: str, seed: int, folder: RunFolder) -> str:
        """Record a finished run, in the file too; return its figures in one line."""
        row = next(row for row in self.study.rows if row.name == name)
        metrics = folder.read_result()
        run: dict[str, Any] = {name: round(100 * metrics[name], 2) for name in FIGURES}
        records = [record for record in folder.read_metrics() if "compute_time" in record]
        times = [record["data_time"] + record["compute_time"] for record in records]
        run |= {"key": self._key(row, seed), "step_seconds": round(statistics.median(times), 3)}
        run["by_images"], self.classes = _ap_by_images(folder)
        self.rows.setdefault(name, {})[str(seed)] = run
        self.write()
        return format_metrics(metrics)

    def write(self) -> None:
        """Write ``study.json`` and ``table.md``, with the rows in the order of the study file.

        What another process has recorded there since is kept.
        """
        with exclusive(self.path.with_name("study.lock")):
            self._read()
            self._write()

    def _write(self) -> None:
        rows = {
            row.name: {
                "overrides": list(row.overrides),
                "at": row.at,
                "paper": row.paper,
                "paper_seconds": row.paper_seconds,
                "runs": dict(sorted(self.rows.get(row.name, {}).items())),
            }
            for row in self.study.rows
        }
        document = {
            "base": str(self.study.base),
            "overrides": self.overrides,
            "axis": self.study.axis,
            "classes": self.classes,
            "rows": rows,
        }
        with atomic_write(self.path) as temporary:
            temporary.write_text(json.dumps(document, indent=1) + "\n")
        with atomic_write(self.path.with_name("table.md")) as temporary:
            temporary.write_text("\n".join([ABOUT, table(rows), table_by_images(rows)]))

    def draw(self) -> Path:
        """Draw ``figure.png`` and return its path; without matplotlib say so, and return the table's."""
        path = self.path.with_name("figure.png")
        try:
            from clis.figures import save
            from clis.study.figure import study_figure
        except ValueError as error:
            say(f"no figure: {error}")
            return self.path.with_name("table.md")
        save(study_figure(json.loads(self.path.read_text()), self.study.name), path)
        return path

    def _key(self, row: Row, seed: int) -> str:
        if (row.name, seed) not in self._keys:
            self._keys[row.name, seed] = self.study.run(row, seed, self.overrides).key
        return self._keys[row.name, seed]


def read_record(path: Path) -> dict[str, Any]:
    """Read a study.json.

    Raises:
        ValueError: it is none, or damaged.
    """
    try:
        document = json.loads(path.read_text())
        _changing_results(document["overrides"])  # fails where they are none
        runs = [each for row in document["rows"].values() for each in row["runs"].items()]
        if not all(seed.isdecimal() and run.keys() >= set(RUN_FIELDS) for seed, run in runs):
            raise ValueError(f"a run without its seed, or one of {', '.join(RUN_FIELDS)}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else error
        raise ValueError(
            f"{path}: no record of a study, or damaged ({what}); restore it, or remove it and run the "
            "study again, which records the finished runs beside it without repeating them"
        ) from None
    return document


def _changing_results(overrides: Sequence[str]) -> dict[str, Any]:
    """Return what overrides set, by key, but for places, speed and the like."""
    values = flatten(merge_overrides({}, overrides))
    return {key: value for key, value in values.items() if key not in RESUMABLE}


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the results as a Markdown table, one line per row of the study.

    It has mean ± standard deviation over the seeds; the mean difference to the first row of the seeds that
    both have; and the paper's figures.
    """
    head = [
        "row",
        "seeds",
        *FIGURES,
        "delta AP vs first row",
        "seconds a step",
        "paper's " + " / ".join(FIGURES),
    ]
    lines = []
    first = next(iter(rows.values()))["runs"] if rows else {}
    for number, (name, row) in enumerate(rows.items()):
        runs = list(row["runs"].values())
        cells = [name, str(len(runs))]
        for figure in FIGURES:
            cells.append(_mean_and_deviation([run[figure] for run in runs]))
        gains = [run["AP"] - first[seed]["AP"] for seed, run in row["runs"].items() if seed in first]
        cells.append(f"{statistics.mean(gains):+.1f}" if number > 0 and gains else "")
        cells.append(_mean_and_deviation([run["step_seconds"] for run in runs if "step_seconds" in run], 2))
        paper = "" if row["paper"] is None else " / ".join(f"{value:.1f}" for value in row["paper"])
        seconds = row.get("paper_seconds")
        cells.append(paper if seconds is None else f"{paper}; {seconds:.3f} s")
        lines.append(cells)
    return markdown_table(head, lines, padded=False) + "\n"


def table_by_images(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a Markdown table of AP by the number of training images of a class.

    It has mean ± standard deviation over the seeds.
    """
    bins = sorted(
        {name for row in rows.values() for run in row["runs"].values() for name in run["by_images"]},
        key=lambda name: int(name.partition("-")[0]),
    )
    lines = []
    for name, row in rows.items():
        cells = [
            _mean_and_deviation(
                [run["by_images"][each] for run in row["runs"].values() if each in run["by_images"]]
            )
            for each in bins
        ]
        lines.append([name, *cells])
    return markdown_table(["AP by training images", *bins], lines, padded=False) + "\n"


def _ap_by_images(folder: RunFolder) -> tuple[dict[str, float], dict[str, int]]:
    """Return AP in percent, and classes, by the first and last count of `ap_by_image_count`'s bins."""
    config = folder.read_config()
    train = read_annotations(data_path(config, config.data.train))
    val = load_validation(config, train.categories, train.path)
    detections = Detections.load(folder.detections)
    curves = accumulate(match(val, detections, config.test.detections))
    bins = {f"{first}-{last}": (n, ap) for first, last, n, ap in ap_by_image_count(curves, val.categories)}
    return (
        {name: round(100 * ap, 2) for name, (_, ap) in bins.items()},
        {name: count for name, (count, _) in bins.items()},
    )


def _mean_and_deviation(values: Sequence[float], digits: int = 1) -> str:
    values = [value for value in values if value >= 0]
    if not values:
        return ""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"
