"""What a check has found."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

from clis.progress import say
from clis.text import counted

SHOWN = 5
"""Files named for each kind of finding; `listing` gets all."""


@dataclass
class Report:
    """What was found; a run may start if there is no error."""

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    listing: list[str] = field(default_factory=list)
    """A line for every single file that something was found in: kind, tab, what."""

    @contextlib.contextmanager
    def catching(self) -> Iterator[None]:
        """Record an error that would end the run as a finding, so that the check continues."""
        try:
            yield
        except (ValueError, OSError) as error:
            self.errors.append(str(error))

    def say(self) -> None:
        """Print notes, warnings and errors, then their number and whether the run may start."""
        for word, lines in (("", self.notes), ("WARNING: ", self.warnings), ("ERROR: ", self.errors)):
            for line in lines:
                say(f"{word}{line}")
        say(f"{counted(len(self.errors), 'error')}, {counted(len(self.warnings), 'warning')}")
        say("The run cannot start; fix the errors above." if self.errors else "The run may start.")
