"""Configs as files: YAML with one parent each, `key.path=value` overrides, strict keys and types."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import os
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from clis.config import RESUMABLE, Config
from clis.config_scopes import key_of
from clis.text import read_text

SHIPPED = Path(__file__).with_name("configs")
"""The configs that come with the package."""
CLIS_OFF = {
    "task_specialized": False, "objectness": False, "s": 0, "t": 0, "siamese": False, "contrastive": False,
    "detect_mosaics": False,
}  # fmt: skip
"""What `clis: off` (also `clis=off`) sets: plain Faster R-CNN. Other fields of the section are left alone."""


PATHS_IN_FILES = (("regions", "detector"), ("start", "from"))
"""Section and key of what names a file or a run: relative to the config file that it is in, if to any."""

SAME_RECIPE = (*RESUMABLE, "train.seed", "data.image_level", "regions.file")
"""What an override may change without leaving the recipe that the paper's figures in a file are of."""


def load_config(path: str | Path, overrides: Sequence[str] | str = ()) -> Config:
    """Read a YAML config with its parents and apply `key.path=value` overrides, one or a list.

    A relative `base`, `regions.detector` or `start.from` in a file is relative to that file, or the name of a
    shipped config; in an override it is relative to the working folder, as is `data.root` everywhere.
    `data.root` is made absolute, and `output` is filled in.

    Args:
        path: a file, or the name of a shipped config, e.g. ``shapes/clis``.

    Raises:
        FileNotFoundError: there is no such config, or no such base.
        ValueError: not a mapping of sections, an unknown key, a value of the wrong type, or settings that
            contradict each other.
    """
    path = find_config(path)
    overrides = [overrides] if isinstance(overrides, str) else overrides
    values = _read_with_parents(path, ())
    if any(key not in SAME_RECIPE for key in flatten(merge_overrides({}, overrides))):
        values.pop("paper", None)  # another recipe than the file's
    values = merge_overrides(values, overrides)
    values = _with_paths(values, os.path.normpath)  # in one spelling, since runs are known by them
    values.setdefault("output", str(Path("runs") / name_below(path, "configs")))
    return resolve_data_root(config_from_dict(values, source=str(path)))


def find_config(name: str | Path) -> Path:
    """Return the file of a config: a path, or a name below ``configs`` here or in the package.

    A name may lack its suffix. The names of configs that are shipped with the package are their paths below
    ``configs``.

    Raises:
        FileNotFoundError: there is none.
    """
    path = Path(name).expanduser()
    named = [path, path.with_name(f"{path.name}.yaml")]
    below = [] if path.is_absolute() else [Path("configs"), SHIPPED]
    for each in [*named, *(folder / part for folder in below for part in named)]:
        if each.is_file() or (each.exists() and not each.is_dir()):  # also a pipe
            return each
    shipped = sorted(each.relative_to(SHIPPED).with_suffix("").as_posix() for each in SHIPPED.rglob("*.yaml"))
    near = difflib.get_close_matches(path.with_suffix("").as_posix(), shipped, n=3, cutoff=0.6)
    known = f"did you mean {' or '.join(near)}?" if near else f"shipped: {', '.join(shipped[:5])}, ..."
    what = "a folder, not a config" if path.is_dir() else "no such config"
    if (path / "config.yaml").is_file():
        known = f"that of the run is {path / 'config.yaml'}"
    raise FileNotFoundError(f"{path}: {what}; {known}")


def resolve_data_root(config: Config) -> Config:
    """Make `data.root` absolute: the one of the config, else $CLIS_DATA, else ``data``."""
    root = config.data.root or os.environ.get("CLIS_DATA") or "data"
    data = dataclasses.replace(config.data, root=str(Path(root).expanduser().resolve()))
    return dataclasses.replace(config, data=data)


def config_from_dict(values: Mapping[str, Any], source: str = "config") -> Config:
    """Build a checked `Config` from nested mappings; `source` names them in errors (all `ValueError`)."""
    try:
        return _build(Config, values, prefix="")
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def config_to_dict(config: Config, folder: Path = Path()) -> dict[str, Any]:
    """Return the whole configuration as nested plain dicts, lists and scalars.

    Args:
        folder: that paths are relative to, as in a config file there; by default the working folder.
    """

    def seen(path: str) -> str:
        as_it_is = folder == Path() or os.path.isabs(path) or _is_shipped(path)
        return path if as_it_is else os.path.relpath(path, folder)

    return _with_paths(_plain(dataclasses.asdict(config)), seen)


def config_to_yaml(config: Config, folder: Path = Path()) -> str:
    """Return the whole configuration as YAML that `load_config` can read from a file in `folder`."""
    return yaml.safe_dump(config_to_dict(config, folder), sort_keys=False)


def read_full_config(path: Path) -> Config:
    """Read a file that `config_to_yaml` has written: it inherits nothing, and `data.root` stays as it is."""
    return config_from_dict(from_here(read_yaml(path), path.parent), source=str(path))


def from_here(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the values of a config in `folder` with its paths as they are seen from the working folder.

    A name that is none of a file there is left alone where it is that of a shipped config, or of a file as
    seen from the working folder (as earlier versions wrote them into run folders).
    """

    def seen(path: str) -> str:
        elsewhere = not (folder / path).exists() and (_is_shipped(path) or os.path.exists(path))
        return path if os.path.isabs(path) or elsewhere else os.path.relpath(folder / path)

    return _with_paths(values, seen)


def _with_paths(values: dict[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    """Return nested values in which the paths of `PATHS_IN_FILES` that are given are changed."""
    changed = dict(values)
    for name, key in PATHS_IN_FILES:
        section = values.get(name)
        if isinstance(section, dict) and isinstance(section.get(key), str):
            changed[name] = section | {key: change(section[key])}
    return changed


def _is_shipped(name: str) -> bool:
    """Return whether a name is that of a shipped config, and of no file as seen from the working folder."""
    return not os.path.exists(name) and any(Path(folder, name).exists() for folder in ("configs", SHIPPED))


def config_differences(a: Config, b: Config, within: Collection[str] | None = None) -> list[str]:
    """List the dotted keys, with both values, in which two configs differ beyond what resuming may change.

    Args:
        within: sections and keys that are compared; None is all of them.
    """
    flat_a, flat_b = flatten(config_to_dict(a)), flatten(config_to_dict(b))
    return [
        f"{key}: {flat_a[key]} != {flat_b[key]}"
        for key in flat_a
        if key not in RESUMABLE
        and (within is None or any(f"{key}.".startswith(f"{each}.") for each in within))
        and flat_a[key] != flat_b[key]
    ]


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings to one with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        dotted = f"{prefix}{key}"
        flat |= flatten(value, f"{dotted}.") if isinstance(value, Mapping) else {dotted: value}
    return flat


def merge_overrides(values: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Apply `key.path=value` overrides to nested values; the overriding values are read as YAML.

    A mapping (`data={workers: 0}`) changes the keys that it names and leaves the section's others alone.

    Raises:
        ValueError: an override of another form, or one that leads through a value.
    """
    merged = dict(values)
    for override in overrides:
        merged = _merge(merged, _read_override(override, merged))
    return copy.deepcopy(merged)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read the mapping in one YAML file, without its parents; an empty file is an empty mapping."""
    try:
        values = yaml.load(read_text(path), Loader=_StrictLoader)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such config") from None
    except yaml.MarkedYAMLError as error:
        raise ValueError(_describe_yaml(path, error)) from None
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ValueError(f"{path}: not valid YAML: brackets nested too deeply") from None
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ValueError(
            f"{path}: a config is a mapping of sections, e.g. `train: {{steps: 100}}`, "
            f"not a {type(values).__name__}"
        )
    return values


def _describe_yaml(path: Path, error: yaml.MarkedYAMLError) -> str:
    """Say what is wrong in which line."""
    where = "" if error.problem_mark is None else f", line {error.problem_mark.line + 1}"
    problem = " ".join(filter(None, (error.context, error.problem)))
    if "'\\t'" in problem:
        problem = "a tab; indent with spaces"
    return f"{path}{where}: not valid YAML: {problem}"


class _StrictLoader(yaml.SafeLoader):
    """Reject a key that occurs twice, of which YAML readers silently keep the last."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Read a mapping as it is written: merge keys (``<<``) add to it later what they may replace."""
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                problem = f"{key.value} is there twice; join them"
                raise yaml.constructor.ConstructorError(problem=problem, problem_mark=key.start_mark)
            seen.add(key.value)
        return node


def _read_with_parents(path: Path, children: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in children:
        raise ValueError(f"{children[-1]}: `base: {path.name}` leads back to itself")
    values = from_here(_at_home(read_yaml(path)), path.parent)
    base = values.pop("base", None)
    if base is None:
        return _merge({}, values)
    if not isinstance(base, str):
        raise ValueError(f"{path}: `base:` names one file, not {base!r}")
    named = [path.parent / base, SHIPPED / base, SHIPPED / f"{base}.yaml"]
    parent = next((each for each in named if each.is_file()), None)
    if parent is None:
        raise FileNotFoundError(
            f"{path}: `base: {base}` names {named[0]}, which does not exist; name a file, relative to this "
            "one, or a shipped config, e.g. shapes/clis"
        )
    inherited = _read_with_parents(parent, (*children, path.resolve()))
    inherited.pop("paper", None)
    own, theirs = values.get("data"), inherited.get("data")
    if isinstance(own, dict) and isinstance(theirs, dict) and "train" in own:
        theirs.pop("source", None)  # of other data
    return _merge(inherited, values)


def _merge(parent: dict[str, Any], child: dict[str, Any]) -> dict[str, Any]:
    merged = dict(parent)
    for key, value in child.items():
        if key == "clis" and value is False:
            value = CLIS_OFF
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _read_override(override: str, values: dict[str, Any]) -> dict[str, Any]:
    """Return what an override says as nested values; `values` are those that it will change."""
    key, equals, text = override.partition("=")
    names = key.strip().split(".")
    if not (equals and all(names)):
        raise ValueError(f"override {override!r}: write it as key.path=value, e.g. train.steps=100")
    for section in names[:-1]:
        values = values.get(section, {})
        if not isinstance(values, dict):
            raise ValueError(f"override {override!r}: {section} is a value, not a section")
    value = _at_home(_read_value(text, _KINDS.get(key.strip())))
    for name in reversed(names):
        value = {name: value}
    return value


def _at_home(value: Any) -> Any:
    """Expand ``~`` in all texts of nested values; only paths begin with it."""
    if isinstance(value, dict):
        return {key: _at_home(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_at_home(item) for item in value]
    return os.path.expanduser(value) if isinstance(value, str) else value


def _read_value(text: str, kind: str | None) -> Any:
    """Read the value of an override as YAML; for fields of text, take it as it is.

    In YAML `#`, `: `, `~`, digits and words like `on` mean something, and in paths and names they do not.
    Quotes, `null` and, in fields of several texts, `[a, b]` keep their meaning.
    """
    try:
        value = yaml.load(text, Loader=_StrictLoader)
    except (yaml.YAMLError, ValueError):  # what looks like a date, or a number, and is none
        return text
    plain = text.strip()
    if plain == "~" and kind is not None:  # the home folder, and null in YAML
        return plain
    if (
        kind is None
        or value is None
        or plain[:1] in ("'", '"')
        or (kind == "texts" and isinstance(value, list))
    ):
        return value
    return plain


def name_below(path: Path, folder: str) -> Path:
    """Return a file's path below the innermost folder of a name, or its own name; without the suffix."""
    parts = Path(os.path.abspath(path)).with_suffix("").parts  # of a link its own name
    return Path(*(parts[len(parts) - parts[::-1].index(folder) :] if folder in parts else parts[-1:]))


def _build(cls: type, values: Any, prefix: str) -> Any:
    if not isinstance(values, Mapping):
        found = "nothing" if values is None else repr(values)
        raise ValueError(f"{prefix.rstrip('.') or 'config'}: a section of keys is needed, not {found}")
    hints = typing.get_type_hints(cls)
    names = {key_of(name): name for name in hints}
    arguments = {}
    for key, value in values.items():
        if key not in names:
            raise ValueError(f"unknown key {prefix}{key}; {_nearest(str(key), prefix, names)}")
        arguments[names[key]] = _convert(value, hints[names[key]], f"{prefix}{key}")
    return cls(**arguments)


FOREIGN_KEYS = {
    **dict.fromkeys(("extends", "inherits", "_base_", "_BASE_"), "a config names its parent by base: FILE"),
    **dict.fromkeys(("seeds", "rows", "like"), "this is a study: python -m clis study FILE"),
}
"""Keys that other programs or studies use, and what to write or run instead."""


def _nearest(key: str, prefix: str, siblings: Mapping[str, Any]) -> str:
    """Suggest what was meant: the key in another section, a similar one in this section, or list them all."""
    elsewhere = [dotted for dotted in _known_keys(Config) if dotted.split(".")[-1] == key]
    if not prefix and key in FOREIGN_KEYS:
        return FOREIGN_KEYS[key]
    like = difflib.get_close_matches(key, siblings, n=1, cutoff=0.6)
    meant = elsewhere or [f"{prefix}{name}" for name in like]
    return f"did you mean {' or '.join(meant)}?" if meant else f"known: {', '.join(siblings)}"


def _known_keys(cls: type, prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of all sections and keys."""
    for name, hint in typing.get_type_hints(cls).items():
        key = key_of(name)
        yield f"{prefix}{key}"
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            yield from _known_keys(hint, f"{prefix}{key}.")


def _text_fields(cls: type, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the dotted names of the fields of text, with ``text``, or ``texts`` for several."""
    for name, hint in typing.get_type_hints(cls).items():
        key = f"{prefix}{key_of(name)}"
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            yield from _text_fields(hint, f"{key}.")
        elif str in (hint, *typing.get_args(hint)):
            yield key, "texts" if typing.get_origin(hint) is tuple else "text"


_KINDS = dict(_text_fields(Config))

LARGEST = 2**48
"""Of whole numbers in a config."""
_TYPE_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}


def _convert(value: Any, hint: Any, where: str) -> Any:
    """Convert `value` to the annotated type, or raise a `ValueError` that names the key."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return _build(hint, value, f"{where}.")
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        (some,) = (option for option in options if option is not type(None))
        return None if value is None else _convert(value, some, where)
    if origin is Literal:
        if value not in options:
            raise ValueError(f"{where}: {value!r} is not one of {', '.join(map(repr, options))}")
        return value
    if origin is tuple:
        return _convert_tuple(value, options, where)
    if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:  # YAML 1.1 reads 1e-4 as a string
            return float(value)
        except (ValueError, OverflowError):
            pass
    elif hint is int and isinstance(value, int) and not -LARGEST <= value <= LARGEST:
        raise ValueError(f"{where}: {value} is beyond 2^48")
    elif isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise ValueError(f"{where}: {_TYPE_NAMES[hint]} is needed, not {value!r}")


def _convert_tuple(value: Any, options: tuple[Any, ...], where: str) -> tuple[Any, ...]:
    if isinstance(value, (str, int, float)):
        value = (value,)
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{where}: a list is needed, e.g. [a, b], not {value!r}")
    if options[-1] is not Ellipsis and len(value) != len(options):
        raise ValueError(f"{where}: {len(options)} values are needed, not {list(value)!r}")
    return tuple(_convert(item, options[0], where) for item in value)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key_of(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
