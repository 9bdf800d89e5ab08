"""Arguments that several verbs take."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from pathlib import Path

from clis.data.categories import Category


def add_config(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of a config: its file and the overrides."""
    parser.add_argument("config", help="a YAML file, e.g. configs/lvis_v1/clis_r50.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="change the config")


def split_overrides(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split arguments into those that name files, and those that are ``key=value`` and name none."""
    overrides = [text for text in texts if "=" in text and not Path(text).exists()]
    return [text for text in texts if text not in overrides], overrides


def positive(text: str) -> int:
    """Read a whole number above 0.

    Raises:
        argparse.ArgumentTypeError: the text is not one.
    """
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return int(text)


def class_labels(names: str, categories: Sequence[Category]) -> list[int]:
    """Return the labels of comma-separated class names.

    Raises:
        ValueError: no class has such a name, and the nearest ones are named; or there is none.
    """
    label_of = {category.name: label for label, category in enumerate(categories)}
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    for name in wanted:
        if name not in label_of:
            near = difflib.get_close_matches(name, label_of, n=3, cutoff=0.4)
            known = f"known: {', '.join([*label_of][:10])}, ..."
            meant = f"did you mean {' or '.join(near)}?" if near else known
            raise ValueError(f"--classes: there is no class {name!r}; {meant}")
    if not wanted:
        raise ValueError("--classes: name at least one class")
    return [label_of[name] for name in wanted]


def read_names(pairs: Sequence[str], known: Sequence[str]) -> dict[str, str]:
    """Read A=B of ``--names``: new names B by the known ones, A; of a path, the last part is enough.

    Raises:
        ValueError: a pair is not of this form, or A is not known.
    """
    names: dict[str, str] = {}
    for pair in pairs:
        old, _, new = pair.rpartition("=")
        meant = [each for each in known if old and old.rstrip("/") in (each, Path(each).name)]
        if not (new and meant):
            raise ValueError(f"--names {pair}: write A=B, where A is one of: {', '.join(known)}")
        names |= dict.fromkeys(meant, new)
    return names
