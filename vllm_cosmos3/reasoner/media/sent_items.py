"""Cache of processed media that believes the engine to have what was sent to it, and nothing else.

vLLM's front end notes an item as cached when it has processed it. Where the request is refused after
that, for its sampling parameters or its schema, or was only counted (``/tokenize``), the engine never
gets the item, and the next request with the same media fails with status 500.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, ItemsView
from typing import Any

from vllm.multimodal.inputs import MultiModalKwargsItem

from vllm_cosmos3.compat import is_shadow_cache

_lock = threading.Lock()  # items are processed on one thread and sent on another


class SentItem(MultiModalKwargsItem):
    """A processed item that reports when it is put into a message to the engine."""

    def __init__(self, item: MultiModalKwargsItem, sent: Callable[[], object]) -> None:
        super().__init__(item.data)
        self._sent: Callable[[], object] | None = sent

    def items(self) -> ItemsView[str, Any]:
        """What the encoder of messages reads."""
        sent, self._sent = self._sent, None
        if sent is not None:
            sent()
        return ItemsView(self.data)


class SentItemsCache:
    """vLLM's cache of names, which get into it when their items are sent."""

    def __init__(self, names: Any) -> None:
        self._names = names

    @classmethod
    def around(cls, cache: Any) -> Any:
        """A cache of this class where ``cache`` holds names only, else ``cache``."""
        return cls(cache) if is_shadow_cache(cache) else cache

    def is_cached(self, hashes: list[str]) -> list[bool]:
        with _lock:
            return list(self._names.is_cached(hashes))

    def get_and_update_item(self, item: Any, name: str) -> Any:
        """None and the prompt updates of an item that the engine has; ``item`` as it is otherwise."""
        if item is None:
            with _lock:
                return self._names.get_and_update_item(None, name)
        processed, updates = item

        def sent() -> None:
            with _lock:
                self._names.get_and_update_item(item, name)

        return SentItem(processed, sent), updates

    def __getattr__(self, name: str) -> Any:
        return getattr(self._names, name)
