"""HTML pages, each one file without network or server: templates of Jinja2 (the extra ``[report]``)."""

from __future__ import annotations

from typing import Any


class MissingExtra(ValueError):
    """The packages of the extra ``[report]`` are not installed; the message says how to install them."""


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
