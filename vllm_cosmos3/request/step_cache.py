"""Step cache of a request: how much may change until a denoising step is computed again."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCache:
    """SeaCache (arXiv 2602.18993) with the defaults of the models' own framework.

    A step is computed once the relative change of the filtered latents since the last computed one
    adds up to ``threshold``, or ``max_reused`` steps in a row were not. A reused step takes what the
    layers added in the steps before: of the last one (``order`` 0), or of the last two, continued
    linearly (1).
    """

    threshold: float = 0.25
    max_reused: int = 2
    order: int = 1

    @property
    def kept(self) -> int:
        """Computed steps that each branch of guidance remembers."""
        return self.order + 1
