"""Images that cannot be read in training: named, counted, and too many of them end the run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import TypeVar

import torch

from clis.data.batch import OnDevice
from clis.data.images import ImageError
from clis.distributed import from_all
from clis.progress import say

B = TypeVar("B", bound=OnDevice)


def check_bad_images(unreadable: Sequence[str], allowed: int) -> None:
    """Raise `ImageError` if too many of the image-level images of a single look cannot be read.

    Args:
        unreadable: what is wrong with each, by name.
        allowed: `data.max_bad_images`.
    """
    if len(unreadable) > allowed:
        raise ImageError(
            f"unreadable image-level images: {len(unreadable)}, and data.max_bad_images allows {allowed}; "
            f"the last: {unreadable[-1]}"
        )


class BadImages:
    """Loads the batches of a process and keeps count of the images that were replaced in them.

    Whether any process has found something (`new`, `gone`) has to reach all before `verdict` is called.
    """

    def __init__(self, allowed: int) -> None:
        """Start with no image replaced.

        Args:
            allowed: `data.max_bad_images`, over all processes.
        """
        self.allowed = allowed
        self.named: set[str] = set()
        """What is wrong with each image that was replaced, on any process."""
        self.new: list[str] = []
        """Of the last `load`: a message for each image that was not met before."""
        self.gone: ImageError | None = None
        """Why the last `load` has no batches: nothing of a stream can be read."""

    def load(self, batches: Iterator[B], count: int, device: torch.device) -> list[B]:
        """Load the next `count` batches onto the device."""
        loaded: list[B] = []
        self.gone = None
        try:
            loaded = [next(batches).to(device) for _ in range(count)]
        except ImageError as error:
            self.gone = error
        met = dict.fromkeys(message for batch in loaded for message in batch.unreadable)
        self.new = [message for message in met if message not in self.named]
        return loaded

    def verdict(self) -> ImageError | None:
        """Say which images were replaced, on all processes; return the error that ends the run, or None."""
        # from a loader process, whose traceback is in the message
        own = None if self.gone is None else str(self.gone).rstrip().splitlines()[-1]
        found = from_all((self.new, own))
        new = list(dict.fromkeys(chain(*(new for new, _ in found))))
        self.named.update(new)
        for message in new:
            say(f"replaced by the next of its stream: {message}")
        again = "re-run the same command to resume"
        gone = [what.removeprefix("clis.data.images.ImageError: ") for _, what in found if what is not None]
        if gone:
            error = ImageError(f"{gone[0]}; restore the images and {again}")
            error.__cause__ = self.gone
            return error
        if len(self.named) > self.allowed:
            return ImageError(
                f"unreadable images: {len(self.named)}, and data.max_bad_images allows {self.allowed}; "
                f"the last: {new[-1]}; restore them, or raise data.max_bad_images, and {again}"
            )
        return None
