"""Cache of the keys and values of recent texts, for the next request with the same words.

The negative prompt is the same for most requests, and a prompt for several seeds or sizes.
"""

from __future__ import annotations

from collections import OrderedDict

from vllm_cosmos3.generator.models.transformer import Past

TokenIds = tuple[int, ...]


class TextKVCache:
    """The texts used last, up to ``limit`` bytes on the device.

    Ranks read a text together, so all must agree on whether they still have it. Therefore looking
    a text up changes nothing, and what a request has read is kept only once all ranks have got
    past reading.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._texts: OrderedDict[TokenIds, Past] = OrderedDict()

    def find(self, ids: TokenIds) -> Past | None:
        return self._texts.get(ids)

    def keep(self, ids: TokenIds, text: Past) -> None:
        """Make this the latest text, at the cost of the oldest ones."""
        self._texts[ids] = text
        self._texts.move_to_end(ids)
        while self.nbytes > self._limit:
            self._texts.popitem(last=False)

    @property
    def nbytes(self) -> int:
        return sum(kept.nbytes for kept in self._texts.values())

    def clear(self) -> None:
        """Give all of them up. All ranks must."""
        self._texts.clear()
