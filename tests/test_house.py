"""The imports of the package run one way: from the commands down to the ground floor."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from runs import REPOSITORY

PACKAGE = REPOSITORY / "clis"
GROUND = {
    "atomic", "boxes", "cli", "config", "config_files", "config_rules", "config_scopes", "distributed",
    "losses", "progress", "resize", "text",
}  # fmt: skip
PICTURES = {"pages", "drawing", "figures"}
BELOW = {
    "__main__": {"commands"} | GROUND,
    "commands": {"engine", "metric", "models", "data", "pages", "drawing", "figures", "report", "study"}
    | GROUND,
    "engine": {"metric", "models", "data"} | GROUND,
    "metric": {"data", "atomic", "progress", "text"},
    "models": {"data"} | GROUND,
    "data": GROUND - {"losses", "boxes"},
    **{room: GROUND - {"losses"} for room in GROUND},
    "losses": set(),
    "pages": {"atomic"},
    "report": {"engine", "metric", "data", "pages"} | GROUND,
    "study": {"engine", "metric", "data", "figures"} | GROUND,
    "drawing": set(),
    "figures": {"atomic"},
}
"""What each room may import; `clis` itself stands for its lazy names."""


def imports(path: Path) -> Iterator[str]:
    """Modules of the package that a file imports when it runs, also within functions."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body.clear()  # for the reader of types alone
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "clis":
            if node.module == "clis":
                yield from (f"clis.{alias.name}" for alias in node.names)
            else:
                yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("clis."))


def room_of(module: str) -> str:
    return module.split(".")[1]


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_no_arrow_runs_up_the_house(path):
    place = path.relative_to(PACKAGE)
    if place == Path("__init__.py"):
        return
    room = place.parts[0].removesuffix(".py")
    wrong = {name for name in map(room_of, imports(path)) if name != room and name not in BELOW[room]}
    assert not wrong, f"{place} imports from {wrong}; {room} may use {sorted(BELOW[room])}"


def test_verbs_hardly_know_each_other():
    """A verb may use another's parts only where it says so here."""
    known = {
        ("regions", "region_scan"), ("show", "show_pictures"), ("show", "show_charts"),
        ("export", "export_program"), ("export", "export_onnx"), ("predict", "predict_files"),
        ("check", "check_images"), ("check", "check_report"), ("check_images", "check_report"),
    }  # fmt: skip
    found = set()
    for path in (PACKAGE / "commands").glob("*.py"):
        for module in imports(path):
            parts = module.split(".")
            if parts[1] == "commands" and len(parts) > 2 and parts[2] not in (path.stem, "arguments"):
                found.add((path.stem, parts[2]))
    assert found <= known


def test_models_know_of_data_only_how_an_image_file_is_read():
    found = {name for path in (PACKAGE / "models").glob("*.py") for name in imports(path) if "data" in name}
    assert found == {"clis.data.images"}


def test_losses_know_nothing_of_the_rest():
    for path in (PACKAGE / "losses").glob("*.py"):
        assert {room_of(module) for module in imports(path)} <= {"losses"}, path
