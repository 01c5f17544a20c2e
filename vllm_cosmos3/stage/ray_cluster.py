"""The Ray cluster of meshes over several hosts: where their ranks are placed, and which hosts it has lost.

vLLM's Ray executor starts the ranks and calls them. It would place them anywhere, but the first rank of
a single mesh leaves results in files of the stage's host; and it keeps their places until the process ends,
where new ranks need them. Of several replicas each has places of its own. Batch files on Ray Data have nothing to do with this: each of their actors has a mesh of its own.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from vllm_cosmos3.errors import WorkerDied

logger = logging.getLogger(__name__)

# Until a cluster that is too small is given up: a host may be starting again.
PLACEMENT_SECONDS = 600.0
# Until a cluster has noticed that a host is gone, whose ranks' neighbours know at once.
NOTICE_SECONDS = 30.0
LOOK_SECONDS = 10.0  # between lines in the log that say what is waited for
KNOWN_SECONDS = 0.1  # between looks at what it knows


def reserve(ranks: int, *, here: bool) -> Any:
    """Placement group with a device for each rank, ``here``: the first of them on this host.

    Else all are on one host where one is large enough, and over several only where none has room. Joins
    the cluster of ``RAY_ADDRESS``, or that of this host, or ``here`` starts one of this host alone: that of
    each replica would give out the same devices.

    Raises:
        WorkerDied: there is no cluster, or it has had too few free devices for too long.
    """
    import ray
    from ray.util.placement_group import placement_group
    from vllm.platforms import current_platform

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # as with vLLM
    if not ray.is_initialized():
        try:
            ray.init(None if here else "auto")
        except ConnectionError:
            raise WorkerDied("replicas need a Ray cluster that is there: run ray start --head first") from None  # fmt: skip
    kind = current_platform.ray_device_key
    bundles, where = [{kind: 1.0} for _ in range(ranks)], ""
    if here:  # so much of what only this host has
        bundles[0][f"node:{ray.util.get_node_ip_address()}"] = 0.001
        where = ", one of them on this host"
    devices = [node["Resources"].get(kind, 0.0) for node in ray.nodes() if node["Alive"]]
    strategy = "PACK" if here else strategy_of(ranks, devices)
    group = placement_group(bundles, strategy=strategy)
    for _ in range(round(PLACEMENT_SECONDS / LOOK_SECONDS)):
        if group.wait(LOOK_SECONDS):
            return group
        free = ray.available_resources().get(kind, 0.0)
        logger.warning("waiting for %d of Ray's %ss%s: %g are free", ranks, kind, where, free)
        if strategy == "STRICT_PACK" and free >= ranks:  # but on no host alone
            give_back(group)
            strategy = "PACK"
            group = placement_group(bundles, strategy=strategy)
    give_back(group)
    raise WorkerDied(
        f"Ray has not had {ranks} free {kind}s{where} for {PLACEMENT_SECONDS:.0f} s; "
        "`ray status` says what the cluster has"
    )


def strategy_of(ranks: int, devices: Collection[float]) -> str:
    """Ray's word for how a mesh is placed on hosts with so many devices: on one where one is large enough."""
    return "STRICT_PACK" if ranks <= max(devices, default=0.0) else "PACK"


def places_of(workers: Iterable[Any]) -> tuple[tuple[str, ...], bool]:
    """The names of the nodes that workers are on, by rank, and whether the first of them is another than this one."""
    import ray

    names = {node["NodeID"]: node["NodeName"] for node in ray.nodes()}
    nodes = [worker.node_id for worker in workers]
    here = ray.get_runtime_context().get_node_id()
    return tuple(names[node] for node in nodes), nodes[0] != here


def give_back(group: Any) -> None:
    """End what runs on a placement group, and let others have its devices."""
    from ray.util.placement_group import remove_placement_group

    remove_placement_group(group)


def lost_hosts(workers: Sequence[Any], while_waiting: Callable[[], None]) -> str:
    """Which hosts of these workers the cluster has lost, as the end of a sentence; empty if none.

    Waits until the cluster knows what has become of a worker that cannot be reached, and calls
    ``while_waiting`` again and again meanwhile.
    """
    end = time.monotonic() + NOTICE_SECONDS
    while not (lost := _lost(workers)) and any(map(_out_of_reach, workers)):
        if time.monotonic() > end:
            break
        while_waiting()
        time.sleep(KNOWN_SECONDS)
    return "".join(
        f": the Ray cluster has lost {host}, the host of rank {rank}" for rank, host in lost.items()
    )


def _lost(workers: Iterable[Any]) -> dict[int, str]:
    """The addresses of hosts that are known to be gone, by the rank that was on them."""
    import ray

    hosts = {node["NodeID"]: node for node in ray.nodes() if not node["Alive"]}
    return {
        worker.rank: hosts[worker.node_id]["NodeManagerAddress"]
        for worker in workers
        if worker.node_id in hosts
    }


def _out_of_reach(worker: Any) -> bool:
    """Whether nothing is heard of a worker, and the cluster does not know yet why."""
    import ray

    ended, _ = ray.wait([worker.run_ref], timeout=0)
    try:
        ray.get(ended)
    except ray.exceptions.ActorUnavailableError:
        return True
    except Exception:  # noqa: BLE001 - whatever it has ended with
        return False
    return False
