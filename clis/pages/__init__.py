"""HTML pages, each one file without network or server: templates of Jinja2 (the extra ``[report]``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from clis.atomic import check_writable

MARK = b'<meta name="generator" content="clis">'
"""Of every page, in its first lines."""


class MissingExtra(ValueError):
    """The packages of the extra ``[report]`` are not installed; the message says how to install them."""


def check_page(path: Path) -> None:
    """Raise an error now if a page could not be written after the work for it, or would replace another file.

    Raises:
        IsADirectoryError, OSError: see `check_writable`.
        ValueError: there is a file that is no page of ours.
    """
    check_writable(path)
    if path.exists():
        with open(path, "rb") as file:
            if MARK not in file.read(1024):
                raise ValueError(
                    f"{path}: was not written by this version of clis, which would replace it; remove it, or "
                    "name another --out"
                )


def render(template_name: str, **values: Any) -> str:
    """Fill in a template of ``clis/pages/templates``; values are escaped, and an undefined name is an error.

    Args:
        template_name: a file there, e.g. ``predict.html.j2``; pages extend ``base.html.j2``.
        values: what the template names.

    Raises:
        MissingExtra: Jinja2 is not installed.
    """
    try:
        import jinja2
    except ImportError:
        raise MissingExtra('pages need Jinja2: pip install -e ".[report]"') from None
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("clis.pages"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template_name).render(values)
