"""Tables of whole requests on several GPUs: a row of figures each, and beside published records."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kernel_profile import Profile
from published import Record, records

Json = dict[str, Any]
REPLICAS = "replicas"  # the layout in which each device makes a request of its own

HEAD = (
    "| request | layout | steps | total s | text | denoise | step p50 ms | encode | decode | tail "
    "| GPU-s | floor s | peak GiB by rank | latents | MP4: noise s | smooth | to the caller s |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|"
)


def line(found: Json) -> str:
    """A row of the first table. Figures that were not measured in full are marked with a tilde."""
    row, about = found["row"], mark(found)
    warm = row["warm"]
    measured = f" ({row['measured_steps']} measured)" if row["measured_steps"] else ""
    cells = [
        row["name"],
        layout_of(found),
        f"{row['steps']}{measured}",
        f"{about}{found['seconds']:.2f}",
        f"{warm['text']:.3f}",
        f"{about}{warm['denoise']:.2f}",
        f"{1000 * row['step_p50']:.1f}",
        f"{warm['vae_encode']:.3f}",
        f"{warm['vae_decode']:.2f}",
        f"{warm['tail']:.3f}",
        f"{about}{found['gpu_seconds']:.1f}",
        f"{found['floor']:.3g}",
        ", ".join(f"{peak / 2**30:.1f}" for peak in found["peaks"]),
        f"{compared(found['apart'])} after {found['check']['steps']} steps",
        *("" if value is None else f"{value:.2f}" for value in beside_it(found)),
    ]
    return f"| {' | '.join(cells)} |"


def mark(found: Json) -> str:
    """A tilde before figures that were not measured in full."""
    return "~" if found["row"]["measured_steps"] or "communication" in found else ""


def layout_of(found: Json) -> str:
    """``4 replicas`` or ``2x2x1``, and whether graphs were recorded or only allowed."""
    name = f"{found['devices']} {REPLICAS}" if found["layout"] == REPLICAS else found["layout"]
    name = f"one rank of {name}" if "communication" in found else name
    if found["recordings"]:
        return f"{name}, graphs"
    return f"{name}, graphs allowed" if found["graphs"] else name


def compared(apart: float | None) -> str:
    if apart is None:
        return "not compared"
    return f"{apart:.1e} apart" if apart else "equal"


def beside_it(found: Json) -> tuple[float | None, ...]:
    """Seconds after the total, where they were measured."""
    return found["row"]["save"], found.get("smooth"), found.get("hand_over")


def print_tables(rows: Sequence[Json]) -> None:
    print(HEAD, *map(line, rows), sep="\n")
    if projected := [row for row in rows if "communication" in row]:
        print("", *communication(projected), sep="\n")
    if compared_rows := beside(rows):
        print("", *compared_rows, sep="\n")
    for found in rows:
        for each in found.get("profiles", ()):
            print(Profile(**each).table())


def communication(rows: Sequence[Json]) -> list[str]:
    """Compute of one rank, and its projected communication with the others."""
    lines = [
        "| request | layout | compute s | sent GB | calls | communication s | total s |",
        "|---|---|---|---|---|---|---|",
    ]
    for found in rows:
        sent = found["communication"]
        compute = found["seconds"] - sent["seconds"]
        lines.append(
            f"| {found['row']['name']} | {layout_of(found)} | {compute:.2f} | {sent['sent'] / 1e9:.2f} "
            f"| {sent['count']} | {sent['seconds']:.2f} | ~{found['seconds']:.2f} |"
        )
    return lines


def beside(rows: Sequence[Json]) -> list[str]:
    """The fastest of our layouts on so many GPUs, and all published records of the same request."""
    ours: dict[tuple[str, str, int], Json] = {}
    for found in (row for row in rows if row["as_published"]):
        gpus = 1 if found["layout"] == REPLICAS else found["devices"]
        key = found["model"], found["row"]["name"], gpus
        if key not in ours or found["seconds"] < ours[key]["seconds"]:
            ours[key] = found
    lines = []
    for (model, name, gpus), found in ours.items():
        same = [
            each for each in records() if (each.model, each.row, each.gpus) == (model, name, gpus)
        ]
        lines += [record_line(each, found) for each in sorted(same, key=lambda each: each.seconds)]
    head = (
        "| model | request | GPUs | ours s | layout | published s | times ours | engine | GPU | source |",
        "|---|---|---|---|---|---|---|---|---|---|",
    )
    return [*head, *lines] if lines else []


def record_line(record: Record, found: Json) -> str:
    about = mark(found)
    cells = [
        record.model,
        record.row,
        str(record.gpus),
        f"{about}{found['seconds']:.2f}",
        layout_of(found),
        f"{record.seconds:g}",
        f"{about}{record.seconds / found['seconds']:.2f}",
        record.engine,
        record.gpu,
        record.source,
    ]
    return f"| {' | '.join(cells)} |"
