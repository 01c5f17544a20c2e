"""Calls to all ranks between requests: what makes them last, and what undoes them where one rank has failed."""

from __future__ import annotations

ENDING = ("update_weights", "finish_weight_update")  # calls whose failure ends an update
FOLLOWED_BY = {  # calls that can be undone until all ranks have made them, and what makes them last
    "finish_weight_update": "keep_weight_update",
}
UNDO = {  # what every rank calls when one has failed, so that all have the same weights
    "sleep": "wake_up",
    "start_weight_update": "abort_weight_update",
    "update_weights": "abort_weight_update",
    "finish_weight_update": "abort_weight_update",
}
