"""A name with options as in a call, e.g. `bags(ratio=4)`: how a config describes a loss or a calibration."""

from __future__ import annotations

import ast
import contextlib
import difflib
import inspect
import typing
from collections.abc import Iterable
from typing import Any

_WHOLE_NUMBERS = tuple[int, ...]
_KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a string",
    _WHOLE_NUMBERS: "whole numbers, e.g. (10, 100)",
}


def read_call(text: str, where: str) -> tuple[str, dict[str, Any]]:
    """Read ``name`` or ``name(option=literal, ...)``; `true` and `false` may be written as in YAML.

    Args:
        where: the field and its value, the start of error messages.

    Raises:
        ValueError: not of this form, or a value that is no Python literal.
    """
    name, parenthesis, _ = text.partition("(")
    options = _read_options(text[len(name) :].strip(), where) if parenthesis else {}
    return name.strip(), options


def check_options(options: dict[str, Any], built: type, where: str) -> None:
    """Check names and types of options against the parameters of a constructor after the categories.

    Whole numbers become floats and lists tuples, in place, where these are expected. Annotations that name
    what is imported for type checkers alone are not looked at.

    Raises:
        ValueError: an unknown option, which names the nearest, or a value of another type.
    """
    constructor = inspect.getattr_static(built, "__init__")
    parameters = list(inspect.signature(constructor).parameters.values())[2:]  # after self and categories
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    known = [each.name for each in parameters if each.kind in by_name]
    hints: dict[str, Any] = {}
    with contextlib.suppress(NameError):
        hints = typing.get_type_hints(constructor) if options else {}
    for name, value in options.items():
        if name not in known:
            raise ValueError(f"{where}: it has no option {name}; {nearest(name, known)}")
        kind = hints.get(name)
        if kind is float and type(value) is int:
            options[name] = float(value)
        elif kind == _WHOLE_NUMBERS and type(value) in (tuple, list) and {int}.issuperset(map(type, value)):
            options[name] = tuple(value)
        elif kind in _KINDS and type(value) is not kind:
            raise ValueError(f"{where}: {name} is {value!r}; expected {_KINDS[kind]}")


def nearest(name: str, known: Iterable[str]) -> str:
    """Name the nearest of the known names, or all of them where none is near."""
    known = list(known)
    like = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {like[0]}?" if like else f"known: {', '.join(known) or 'none'}."


def _read_options(call: str, where: str) -> dict[str, Any]:
    form = f"{where}: write options as in a call, e.g. eqlv2(gamma=10)"
    try:
        node = ast.parse(f"f{call}", mode="eval").body
    except SyntaxError:
        raise ValueError(form) from None
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.args:
        raise ValueError(form)
    if len({keyword.arg for keyword in node.keywords} - {None}) < len(node.keywords):
        raise ValueError(form)  # an option twice, or **options
    options: dict[str, Any] = {}
    for keyword in node.keywords:
        value = keyword.value
        if isinstance(value, ast.Name) and value.id in ("true", "false", "null"):
            options[str(keyword.arg)] = {"true": True, "false": False, "null": None}[value.id]
            continue
        try:
            options[str(keyword.arg)] = ast.literal_eval(value)
        except ValueError:
            raise ValueError(f"{where}: {keyword.arg} is not a plain value; {form}") from None
    return options
