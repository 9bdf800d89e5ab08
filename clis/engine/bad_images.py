"""Images that cannot be read in training: named, counted, and too many of them end the run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch

from clis.data.batch import OnDevice
from clis.data.images import ImageError

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

    What one process finds (`new`, `gone`) has to reach all processes before `verdict` is called.
    """

    def __init__(self, allowed: int) -> None:
        """Start with no image replaced.

        Args:
            allowed: `data.max_bad_images`, over all processes.
        """
        self.allowed, self.total = allowed, 0
        self.named: set[str] = set()
        self.new: list[str] = []
        """Of the last `load`: a message for each image that was not met before."""
        self.gone: ImageError | None = None
        """Why the last `load` has no batches: nothing of a stream can be read."""

    def load(self, batches: Iterator[B], count: int, device: torch.device) -> list[B]:
        """Load the next `count` batches onto the device; print each replaced image when it is first met."""
        loaded: list[B] = []
        self.gone = None
        try:
            loaded = [next(batches).to(device) for _ in range(count)]
        except ImageError as error:
            self.gone = error
        met = dict.fromkeys(message for batch in loaded for message in batch.unreadable)
        self.new = [message for message in met if message not in self.named]
        self.named.update(self.new)
        for message in self.new:
            print(f"replaced by the next of its stream: {message}", flush=True)
        return loaded

    def verdict(self, new: int, gone: int) -> ImageError | None:
        """Return the error that ends the run before this step, or None.

        Args:
            new: images in `new`, of all processes.
            gone: processes that have no batches.
        """
        self.total += new
        again = "re-run the same command to resume"
        if self.gone is not None:  # from a loader process, whose traceback is in the message
            what = str(self.gone).rstrip().splitlines()[-1].removeprefix("clis.data.images.ImageError: ")
            error = ImageError(f"{what}; restore the images and {again}")
            error.__cause__ = self.gone
            return error
        if gone:
            return ImageError(f"another process could not read its images; restore them and {again}")
        if self.total > self.allowed:
            last = self.new[-1] if self.new else "named by another process"
            return ImageError(
                f"unreadable images: {self.total}, and data.max_bad_images allows {self.allowed}; "
                f"the last: {last}; {again}"
            )
        return None
