"""What a field of the config is for: its scope, written beside its default.

Code that needs to know, for instance which fields a resumed run may change, looks up the scope and keeps no
list of names. A field without a scope is an error at import.
"""

from __future__ import annotations

import dataclasses
import enum
from typing import TypeVar

T = TypeVar("T")


class Scope(enum.Flag):
    """What a field is for: exactly one of the first three, and all of the others that hold."""

    SHARED = enum.auto()
    """Belongs to this run and to those that it needs first: an override applies to all."""
    OWN = enum.auto()
    """Belongs to this run only."""
    IMAGE_LEVEL = enum.auto()
    """Belongs to this run only and has no effect without its image-level stream. Where the run has none, but
    one that it needs has, an override applies to that one, as do overrides of `REGIONS`."""
    MACHINE = enum.auto()
    """Changes speed, memory, places, reports or what ends a run, but no result of it (but for rounding, and
    what group norm sees of the padding of images that share a batch); a resumed run may change it."""
    INFERENCE = enum.auto()
    """A field of the model that may change after training."""
    PRETRAINING = enum.auto()
    """The pre-trained backbone depends on it; another value is another pre-training."""
    REGIONS = enum.auto()
    """The region file depends on it; another value is another file."""


def scoped(scope: Scope) -> dict[str, Scope]:
    """Make a field's metadata. On the field of a section it holds for all fields of that section."""
    return {"scope": scope}


def setting(default: T, scope: Scope) -> T:
    """Declare a field by its default value and its scope.

    Example: ``width: int = setting(64, SHARED | PRETRAINING)``.
    """
    return dataclasses.field(default=default, metadata=scoped(scope))


def key_of(name: str) -> str:
    """Return a field name's key in a file; the name ends with ``_`` where the key is a Python keyword."""
    return name.removesuffix("_")


def scopes_of(config: type, prefix: str = "", outer: Scope | None = None) -> dict[str, Scope]:
    """Collect the scope of every field of a config class and its sections, by dotted key.

    Args:
        prefix: prefix of the keys, e.g. ``model.``.
        outer: the scope on the section's own field, if it has one.

    Raises:
        TypeError: a field has no scope, one in addition to that of its section, or a contradictory one.
    """
    found: dict[str, Scope] = {}
    for field in dataclasses.fields(config):
        key, inner = f"{prefix}{key_of(field.name)}", field.metadata.get("scope")
        if inner is not None and outer is not None:
            raise TypeError(f"{key}: its section has a scope already; remove one of the two")
        scope = outer if inner is None else inner
        section: object = field.default_factory
        if isinstance(section, type) and dataclasses.is_dataclass(section):
            found |= scopes_of(section, f"{key}.", scope)
        elif scope is None:
            raise TypeError(f"{key}: has no scope; declare it as setting(default, scope)")
        else:
            _check(key, scope)
            found[key] = scope
    return found


def _check(key: str, scope: Scope) -> None:
    """Raise `TypeError` for a scope that contradicts itself."""
    owners = (Scope.SHARED, Scope.OWN, Scope.IMAGE_LEVEL)
    if sum(owner in scope for owner in owners) != 1:
        raise TypeError(f"{key}: {scope} must have exactly one of SHARED, OWN and IMAGE_LEVEL")
    results = Scope.INFERENCE | Scope.PRETRAINING | Scope.REGIONS
    if Scope.MACHINE in scope and scope & results:
        raise TypeError(f"{key}: {scope} changes a result, so it cannot be MACHINE")
