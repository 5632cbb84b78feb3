"""How much of what was read is damaged, and when that is too much: `data.damaged: skip`, `data.most_damaged`."""

from __future__ import annotations

from collections.abc import Sequence

from mdnet_dist.errors import InputError


class DamageCount:
    """Counts the damaged images of an epoch, or of a part that is scored.

    All ranks must count alike, so that all of them stop: what is added is of all ranks together. The state follows from
    what was read since the last `begin`; a run that is resumed within an epoch counts from there on.
    """

    def __init__(self, most_damaged: float, what: str = "images read") -> None:
        """Args: most_damaged: `DataConfig.most_damaged`; what: the images, for the message."""
        self.most_damaged, self.what = most_damaged, what
        self._told: set[str] = set()
        self.begin(0)

    def begin(self, expected: int) -> None:
        """Start an epoch or a part. What was told once is not told again.

        Args:
            expected: images in it. The share is that of these, or of the images read where that is more: one damaged
                image among the first few is not yet too much.
        """
        self.expected, self.images, self.damaged = expected, 0, 0
        self._first: str | None = None

    def add(self, images: int, messages: Sequence[str]) -> list[str]:
        """Count some images.

        Args:
            images: read, the damaged ones among them, by all ranks.
            messages: one for each damaged image, of all ranks.

        Returns:
            those of the messages that are new: what is wrong with a whole shard is said once.
        """
        self.images += images
        self.damaged += len(messages)
        if messages and self._first is None:
            self._first = messages[0]
        new = [message for message in dict.fromkeys(messages) if message not in self._told]
        self._told.update(new)
        return new

    def check(self) -> None:
        """Call after `add`, on every rank.

        Raises:
            InputError: more are damaged than may be.
        """
        if self.damaged > self.most_damaged * max(self.images, self.expected):
            raise InputError(
                f"{self.damaged} of {max(self.images, self.expected)} {self.what} are damaged, more than "
                f"data.most_damaged {self.most_damaged:g}; first: {self._first}"
            )
