"""The Ray cluster of a mesh over several hosts: where its ranks are placed, and which hosts it has lost.

vLLM's Ray executor starts the ranks and calls them. It would place them anywhere, but rank 0 leaves
results in files of the stage's host; and it keeps their places until the process ends, where new ranks
need them. Batch files on Ray Data have nothing to do with this: each of their actors has a mesh of its own.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from typing import Any

from vllm_cosmos3.errors import WorkerDied

logger = logging.getLogger(__name__)

# Until a cluster that is too small is given up: a host may be starting again.
PLACEMENT_SECONDS = 600.0
# Until a cluster has noticed that a host is gone, whose ranks' neighbours know at once.
NOTICE_SECONDS = 30.0
LOOK_SECONDS = 10.0  # between lines in the log that say what is waited for


def reserve(ranks: int) -> Any:
    """Placement group with a device for each rank, the first of them on this host.

    Joins the cluster of ``RAY_ADDRESS``, or that of this host, or starts one of this host alone.

    Raises:
        WorkerDied: the cluster has had too few free devices for too long.
    """
    import ray
    from ray.util.placement_group import placement_group
    from vllm.platforms import current_platform

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # as with vLLM
    if not ray.is_initialized():
        ray.init()
    kind = current_platform.ray_device_key
    here = {f"node:{ray.util.get_node_ip_address()}": 0.001}  # so much of what only this host has
    group = placement_group([{kind: 1.0} | here, *[{kind: 1.0}] * (ranks - 1)], strategy="PACK")
    for _ in range(round(PLACEMENT_SECONDS / LOOK_SECONDS)):
        if group.wait(LOOK_SECONDS):
            return group
        free = ray.available_resources().get(kind, 0.0)
        logger.warning("waiting for %d of Ray's %ss, one of them here: %g are free", ranks, kind, free)  # fmt: skip
    give_back(group)
    raise WorkerDied(
        f"Ray has not had {ranks} free {kind}s, one of them on this host, for {PLACEMENT_SECONDS:.0f} s; "
        "`ray status` says what the cluster has"
    )


def give_back(group: Any) -> None:
    """End what runs on a placement group, and let others have its devices."""
    from ray.util.placement_group import remove_placement_group

    remove_placement_group(group)


def lost_hosts(workers: Iterable[Any]) -> str:
    """Which hosts of these workers the cluster has lost, as the end of a sentence; empty if none."""
    import ray

    hosts = {node["NodeID"]: node for node in ray.nodes() if not node["Alive"]}
    lost = {
        worker.rank: hosts[worker.node_id]["NodeManagerAddress"]
        for worker in workers
        if worker.node_id in hosts
    }
    return "".join(
        f": the Ray cluster has lost {host}, the host of rank {rank}" for rank, host in lost.items()
    )
