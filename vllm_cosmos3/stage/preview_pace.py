"""Pace of previews: how often a picture of what is coming may be made while a request is denoised."""

from __future__ import annotations

SHARE = 0.02  # of the time in steps that previews may take
PICTURES = 12  # of one request, at most


class PreviewPace:
    """Pace of the previews of one request of so many steps.

    At any step all previews so far, and the next one, took at most SHARE of the time in steps so far. What
    one takes is known from the last one of any request; only the first of a process is made to learn it.
    """

    def __init__(self, steps: int) -> None:
        self._gap = max(1, steps // PICTURES)
        self._since = 0  # steps without a preview
        self._in_steps = self._in_previews = 0.0  # seconds

    def stepped(self, seconds: float) -> None:
        """A step was made, which took so long."""
        self._since += 1
        self._in_steps += seconds

    def due(self, seconds: float) -> bool:
        """Whether there is time for a preview that takes ``seconds``."""
        affordable = self._in_previews + seconds <= SHARE * self._in_steps
        return self._since >= self._gap and affordable

    def previewed(self, seconds: float) -> None:
        """A preview was made, which took so long."""
        self._since = 0
        self._in_previews += seconds
