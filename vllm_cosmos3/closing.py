"""`Closing`: what a ``with`` block closes at its end."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Self


class Closing(ABC):
    """Something that holds processes or memory until it is closed."""

    @abstractmethod
    def close(self) -> None:
        """Give them back. A second call does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
