"""How a config section checks its own rules: an error names the dotted key, its value and the rule."""

from __future__ import annotations

import math
from typing import Any


class Rules:
    """The rules of one section; a check that fails raises `ValueError`.

    Conditions state what must hold, so that NaN breaks them too.
    """

    def __init__(self, prefix: str, section: object) -> None:
        """Prepare checks of a section.

        Args:
            prefix: the section's dotted key, e.g. ``model.backbone``.
            section: the section itself.
        """
        self.prefix, self.section = prefix, section

    def require(self, name: str, holds: Any, rule: str) -> None:
        """Check a field: `holds` is the condition, `rule` says it in words, e.g. ``must be even``."""
        if not holds:
            raise ValueError(f"{self.prefix}.{name}={_shown(getattr(self.section, name))}: {rule}")

    def at_least(self, least: int, *names: str, or_null: bool = False) -> None:
        """Check a lower bound; floats must also be finite."""
        for name in names:
            value = getattr(self.section, name)
            finite = " and finite" if isinstance(value, float) else ""
            holds = or_null if value is None else least <= value < math.inf
            self.require(name, holds, f"must be at least {least}{finite}{', or null' * or_null}")

    def positive(self, *names: str, or_null: bool = False) -> None:
        """Check that values are above 0; floats must also be finite."""
        for name in names:
            value = getattr(self.section, name)
            finite = " and finite" if isinstance(value, float) else ""
            holds = or_null if value is None else 0 < value < math.inf
            self.require(name, holds, f"must be above 0{finite}{', or null' * or_null}")

    def between(self, low: int, high: int, *names: str) -> None:
        """Check a range that includes both bounds."""
        for name in names:
            holds = low <= getattr(self.section, name) <= high
            self.require(name, holds, f"must be between {low} and {high}")

    def ranges(self, *names: str, most: float = math.inf) -> None:
        """Check values that are ranges themselves: a lower bound above 0 and an upper one up to `most`."""
        upper = "a finite upper bound" if math.isinf(most) else f"an upper bound of at most {most}"
        for name in names:
            low, high = getattr(self.section, name)
            rule = f"must be a lower bound above 0, then {upper}"
            self.require(name, 0 < low <= high <= most and high < math.inf, rule)


def _shown(value: Any) -> str:
    """Format a value as in YAML."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return str(list(value)) if isinstance(value, tuple) else str(value)
