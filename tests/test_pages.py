"""Pages: values are escaped, mistakes in templates are errors, and nothing is fetched from anywhere."""

from __future__ import annotations

import re
import sys

import pytest
from runs import REPOSITORY

from clis.pages import MissingExtra, check_page, render

TEMPLATES = sorted((REPOSITORY / "clis" / "pages" / "templates").glob("*.j2"))


def test_a_page_without_jinja_is_one_line_that_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MissingExtra, match=r'^pages need Jinja2: pip install -e "\.\[report\]"$'):
        render("base.html.j2")


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.name)
def test_templates_name_no_address_and_switch_no_escaping_off(path):
    text = path.read_text()
    assert not re.findall(r"""(?:https?:)?//[\w.]+\.\w+/|@import|\|\s*safe\b""", text)


def test_the_frame_is_a_whole_document():
    pytest.importorskip("jinja2")
    text = render("base.html.j2")
    assert text.lstrip().startswith("<!doctype html>")
    assert text.count("{") == text.count("}")  # of the style sheet


def test_only_pages_of_ours_are_replaced(tmp_path):
    pytest.importorskip("jinja2")
    check_page(tmp_path / "to" / "be" / "made.html")  # which it does not make yet
    page = tmp_path / "index.html"
    check_page(page)
    page.write_text(render("base.html.j2"))
    check_page(page)
    for text in ("", "<!doctype html><title>mine</title>"):
        page.write_text(text)
        with pytest.raises(ValueError, match=r"index\.html: was not written by this version of clis"):
            check_page(page)
    assert [path.name for path in tmp_path.iterdir()] == ["index.html"]
