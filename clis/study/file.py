"""Study files: the rows of a table, each with what it changes in a config."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clis.config import FIGURES, RESUMABLE, Config
from clis.config_files import flatten, merge_overrides, name_below, read_yaml
from clis.study.runs import StudyRun

SECTIONS = {field.name for field in dataclasses.fields(Config)}
"""Names of the sections of a config."""
OWN = ("train.seed", "output", "regions.file")
"""What a study sets itself, for each row and seed."""
STUDY_KEYS = {"base", "seeds", "axis", "rows"}
"""Of a study file."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    overrides: tuple[str, ...]
    """`key.path=value`, on the study's base config."""
    paper: tuple[float, ...] | None
    """The paper's AP, APr, APc, APf in percent, where it has the row."""
    paper_seconds: float | None = None
    """The paper's seconds a step on a V100, where it has them."""
    seeds: tuple[int, ...] | None = None
    """Of this row alone; None is the study's."""
    config: Path | None = None
    """In place of the study's base."""
    at: float | None = None
    """The row's place on the study's axis, for the figure alone."""


@dataclass(frozen=True)
class Study:
    """A study file: the base config, the seeds and the rows."""

    name: str
    """Of its folder below `--out`: the file's path below a folder ``studies``, or its own name."""
    base: Path
    seeds: tuple[int, ...]
    rows: tuple[Row, ...]
    axis: str | None = None
    """What is varied, as a label of the figure's axis, on which rows have their places `at`."""

    @classmethod
    def load(cls, path: Path) -> Study:
        """Read a study file: `base` (relative to it), `seeds`, `axis`, and `rows` with the fields of `Row`.

        A study `like` another takes from that one the keys, and of `rows` the whole rows, that it does not
        give itself.

        Raises:
            FileNotFoundError, ValueError: it is missing, or a key is unknown, missing or ill-typed.
        """
        values = _read_keys(path)
        _check_keys(values, STUDY_KEYS, {"base", "seeds", "rows"}, str(path))
        seeds = _read_seeds(values["seeds"], str(path))
        rows = tuple(_read_row(name, row or {}, path) for name, row in values["rows"].items())
        axis = values.get("axis")
        if axis is None and any(row.at is not None for row in rows):
            raise ValueError(f"{path}: rows have places `at`, and no `axis` says on what; add its label")
        return cls(name_below(path, "studies").as_posix(), values["base"], seeds, rows, axis)

    def run(self, row: Row, seed: int, overrides: Sequence[str]) -> StudyRun:
        """Load the run of a row and seed, with `overrides` that hold for all rows; a row's own come last."""
        every = [*overrides, *row.overrides, f"train.seed={seed}"]
        return StudyRun.load(row.config or self.base, every)


def check_overrides(overrides: Sequence[str]) -> None:
    """Check that none of the overrides for all rows sets what the study itself sets.

    Raises:
        ValueError: one does.
    """
    if refused := _keys_among(overrides, OWN):
        raise ValueError(
            f"{refused[0]} cannot be overridden on the command line: each row and seed has its own; choose "
            "seeds by --seeds N ... and the folder of all studies by --out FOLDER"
        )


def overruled(rows: Sequence[Row], overrides: Sequence[str]) -> dict[str, list[str]]:
    """Return which keys of the overrides for all rows have another value in some, with these rows' names."""
    wanted = flatten(merge_overrides({}, overrides))
    found: dict[str, list[str]] = {}
    for row in rows:
        own = flatten(merge_overrides({}, row.overrides))
        for key in (key for key in wanted if key in own and own[key] != wanted[key]):
            found.setdefault(key, []).append(row.name)
    return found


def _keys_among(overrides: Sequence[str], keys: Sequence[str]) -> list[str]:
    return [key for key in flatten(merge_overrides({}, overrides)) if key in keys]


def _read_keys(path: Path, below: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Read the keys of a study file and of the one that it is like; paths become those of their files."""
    if path.resolve() in below:
        raise ValueError(f"{path}: like itself, directly or by others; name another study")
    values = read_yaml(path)
    _check_keys(values, STUDY_KEYS | {"like"}, set(), str(path))
    if "base" in values:
        values["base"] = _beside(path, values["base"])
    if not isinstance(values.get("rows", {}), Mapping):
        raise ValueError(f"{path}: rows is {values['rows']!r}; give a mapping of names to rows")
    if "rows" in values:
        values["rows"] = {str(name): row for name, row in values["rows"].items()}
    for row in values.get("rows", {}).values():
        if isinstance(row, dict) and "config" in row:
            row["config"] = _beside(path, row["config"])
    if "like" not in values:
        return values
    like = _read_keys(_beside(path, values.pop("like")), (*below, path.resolve()))
    if "rows" in values:
        values["rows"] = {**like.get("rows", {}), **values["rows"]}
    return {**like, **values}


def _read_row(name: str, values: Any, path: Path) -> Row:
    where = f"{path}: row {name}"
    _check_keys(values, {"at", "config", "overrides", "paper", "paper_seconds", "seeds"}, set(), where)
    seeds = _read_seeds(values["seeds"], where) if "seeds" in values else None
    overrides, paper = values.get("overrides", []), values.get("paper")
    if not isinstance(overrides, list) or not all(isinstance(each, str) for each in overrides):
        raise ValueError(f"{where}: overrides is {overrides!r}; give a list of key=value")
    if refused := _keys_among(overrides, (*RESUMABLE, *OWN)):
        raise ValueError(
            f"{where}: a row cannot override {refused[0]}: it changes no result, or all rows share it"
        )
    if paper is not None:
        numbers = isinstance(paper, list) and all(map(_is_number, paper))
        if not numbers or len(paper) != len(FIGURES):
            raise ValueError(f"{where}: paper is {paper}; give {', '.join(FIGURES)}")
        paper = tuple(paper)
    for key in ("at", "paper_seconds"):
        if values.get(key) is not None and not _is_number(values[key]):
            raise ValueError(f"{where}: {key} is {values[key]!r}; give a number")
    return Row(
        name, tuple(overrides), paper, paper_seconds=values.get("paper_seconds"), seeds=seeds,
        config=values.get("config"), at=values.get("at"),
    )  # fmt: skip


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _beside(path: Path, name: Any) -> Path:
    """Return the path of a file that a study names, relative to the working folder."""
    if not isinstance(name, str):
        raise ValueError(f"{path}: {name!r} is no path; base, like and config name files")
    return Path(os.path.relpath(path.parent / name))


def _read_seeds(seeds: Any, where: str) -> tuple[int, ...]:
    if not isinstance(seeds, list) or not seeds or not all(isinstance(seed, int) for seed in seeds):
        raise ValueError(f"{where}: seeds is {seeds!r}; give a list of whole numbers, at least one")
    return tuple(seeds)


def _check_keys(values: Any, known: set[str], needed: set[str], where: str) -> None:
    if not isinstance(values, Mapping):
        raise ValueError(f"{where}: a mapping of {', '.join(sorted(known))} is needed, not {values!r}")
    for key in values:
        if key not in known:
            is_config = known >= STUDY_KEYS and key in SECTIONS
            hint = "this is a config: python train.py --config FILE" * is_config
            raise ValueError(f"{where}: unknown key {key}; {hint or 'known: ' + ', '.join(sorted(known))}")
    for key in sorted(needed - set(values)):
        raise ValueError(f"{where}: {key} is missing")
