"""Arguments that several verbs take."""

from __future__ import annotations

import argparse
import difflib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from clis.cli import let_rank_0_speak
from clis.data.categories import Category
from clis.text import name_key

SHORT_FOR = {
    "--seed": "train.seed",
    "--steps": "train.steps",
    "--batch-size": "train.images_per_step",
    "--device": "train.device",
    "--lr": "optim.lr",
    "--workers": "data.workers",
    "--output": "output",
}
"""Options that other programs have, and the field that each sets, for verbs with overrides."""
NOT_NEEDED = ("--resume",)
"""Options that say what happens anyway: the same command resumes."""
INSTEAD = {
    "--eval-only": "a run is evaluated by `python evaluate.py RUN_FOLDER`",
    "--resume": "the same command resumes a run; start.from=CHECKPOINT starts from another run's weights",
    "--epochs": "the length is train.steps=N, of train.images_per_step images each",
    "--gpus": "several GPUs are used by `torchrun --nproc_per_node N train.py ...`",
    "--num-gpus": "several GPUs are used by `torchrun --nproc_per_node N train.py ...`",
    "--amp": "mixed precision is train.precision=bfloat16 or float16",
    "--weights": "weights to start from are start.from=CHECKPOINT or model.backbone.weights=FILE",
}
"""Options that other programs have, and what does the same here."""


class VerbParser(argparse.ArgumentParser):
    """Parse the arguments of a verb and report errors in one line; options are not abbreviated."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse arguments; overrides may follow options, and be options that other programs have.

        Ends the program where an argument is unknown, missing or of another form.
        """
        if self._declares("overrides"):
            self._add_foreign()
        for action in self._actions:
            action.required &= action.nargs != "*"  # or errors would name what may be left out as missing
        arguments = self.parse_intermixed_args(
            [re.sub(r"^(--[\w-]+=)?(~.*)", _at_home, each) for each in argv]
        )
        if self._declares("overrides"):
            arguments.overrides = [*arguments.overrides, *arguments.short]
            if self._declares("config"):
                self._take_config(arguments)
        return arguments

    def error(self, message: str) -> NoReturn:
        """End the program with exit code 2, after one line of what is wrong and what does the same here."""
        let_rank_0_speak()
        hints = [what for option, what in INSTEAD.items() if re.search(rf"{option}(?![-\w])", message)]
        hint = hints[0] if hints else f"{self.prog} --help lists the arguments"
        self.exit(2, f"{self.prog}: error: {message}; {hint}\n")

    def _declares(self, name: str) -> bool:
        return any(action.dest == name for action in self._actions)

    def _add_foreign(self) -> None:
        """Declare the options of `SHORT_FOR` that the verb does not have itself, and of `NOT_NEEDED`."""
        for option, key in SHORT_FOR.items():
            if option not in self._option_string_actions:
                self.add_argument(
                    *dict.fromkeys((option, "--" + option[2:].replace("-", "_"))), dest="short", default=[],
                    action="append", type=f"{key}={{}}".format, metavar="VALUE", help=argparse.SUPPRESS,
                )  # fmt: skip
        for option in NOT_NEEDED:
            self.add_argument(option, action="store_true", help=argparse.SUPPRESS)

    def _take_config(self, arguments: argparse.Namespace) -> None:
        """Move the config from among the overrides to its place."""
        named = [] if arguments.config is None else [arguments.config]
        named += [text for text in arguments.overrides if not _is_override(text)]
        if not named:
            self.error("name a config: a YAML file, or a shipped one like shapes/clis")
        if Path(named[0]).suffix == ".pt":
            self.error(f"{named[0]} is a checkpoint, not a config; {INSTEAD['--resume']}")
        if len(named) > 1:
            self.error(f"{named[1]!r} is neither the config, which is {named[0]}, nor key=value")
        arguments.config = named[0]
        arguments.overrides = [text for text in arguments.overrides if _is_override(text)]


def _is_override(text: str) -> bool:
    """Tell ``key=value``, whose key has no slash, from a path or glob that holds a ``=``."""
    return re.match(r"[\w.]+=", text) is not None and not os.path.exists(text)


def _at_home(found: re.Match) -> str:
    return (found[1] or "") + os.path.expanduser(found[2])


def add_config(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of a config: its file, also as an option, and the overrides."""
    parser.add_argument("--config", metavar="CONFIG", help="the config, where it is not the first argument")
    parser.add_argument(
        "overrides", nargs="*", metavar="CONFIG key=value",
        help="a YAML file, or the name of a shipped one, e.g. shapes/clis; then changes of its fields, e.g. "
        "train.steps=100 output=runs/short. In `train`, those of the model, the instance-level data and the "
        "training also apply to the runs that it needs first",
    )  # fmt: skip
    parser.epilog = f"Short for fields: {', '.join(f'{each} is {key}=' for each, key in SHORT_FOR.items())}."


def split_overrides(texts: Sequence[str], what: str) -> tuple[list[str], list[str]]:
    """Split arguments into those that name files, and those that are ``key=value`` and name none.

    Args:
        what: what the files are, for the error.

    Raises:
        ValueError: no file is named, or one by an empty text.
    """
    named = [text for text in texts if not _is_override(text)]
    if not named or "" in named:  # as from a variable of the shell that is not set
        raise ValueError(f"no {what}, or an empty one; name at least one before key=value")
    return named, [text for text in texts if _is_override(text)]


def non_negative(text: str) -> int:
    """Read a whole number of at least 0.

    Raises:
        argparse.ArgumentTypeError: the text is not one.
    """
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0")
    return int(text)


def positive(text: str) -> int:
    """Read a whole number above 0.

    Raises:
        argparse.ArgumentTypeError: the text is not one.
    """
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return int(text)


def class_labels(names: str, categories: Sequence[Category]) -> list[int]:
    """Return the labels of comma-separated class names, which may hold commas themselves.

    Raises:
        ValueError: no class has such a name, and the nearest ones are named; or there is none.
    """
    label_of: dict[str, list[int]] = {}
    for label, category in enumerate(categories):
        label_of.setdefault(category.name, []).append(label)
    alike: dict[str, list[int]] = {}
    for name, labels in label_of.items():
        alike.setdefault(_comma_key(name), []).extend(labels)
    pieces = [piece for piece in names.split(",") if piece.strip()]
    if not pieces:
        raise ValueError("--classes: name at least one class")
    wanted: list[int] = []
    while pieces:  # the longest name first, so that a class `tench` does not hide `tench, Tinca tinca`
        for count in range(len(pieces), 0, -1):
            name = ",".join(pieces[:count]).strip()
            if found := label_of.get(name) or alike.get(_comma_key(name)):
                break
        else:
            near = difflib.get_close_matches(name, label_of, n=3, cutoff=0.4)
            known = f"known: {', '.join([*label_of][:10])}, ..."
            meant = f"did you mean {' or '.join(near)}?" if near else known
            raise ValueError(f"--classes: there is no class {name!r}; {meant}")
        wanted += found
        del pieces[:count]
    return wanted


def _comma_key(name: str) -> str:
    """Return `name_key`, in which spaces around commas do not matter either."""
    return ",".join(map(name_key, name.split(",")))


def read_names(pairs: Sequence[str], known: Sequence[str]) -> dict[str, str]:
    """Read A=B of ``--names``: new names B by the known ones, A; of a path, the last part is enough.

    Both may hold ``=``: A is as long as there is something known of that name.

    Raises:
        ValueError: a pair is not of this form, or A is not known.
    """
    names: dict[str, str] = {}
    for pair in pairs:
        for place in reversed([found.start() for found in re.finditer("=", pair)]):
            old, new = pair[:place], pair[place + 1 :]
            meant = [each for each in known if old and old.rstrip("/") in (each, Path(each).name)]
            if new and meant:
                names |= dict.fromkeys(meant, new)
                break
        else:
            raise ValueError(f"--names {pair}: write A=B, where A is one of: {', '.join(known)}")
    return names
