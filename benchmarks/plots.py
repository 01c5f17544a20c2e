"""Draw the plots of docs/numbers.md from its own tables: python benchmarks/plots.py

Needs the extra `docs` (matplotlib). The same tables give the same files.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib import pyplot as plt

DOCS = Path(__file__).resolve().parents[1] / "docs"
OURS, OTHER = "#2b6cb0", "#a0aec0"


def table(heading: str) -> list[dict[str, str]]:
    """The rows of the first table under a heading; an empty first cell is that of the row before."""
    text = (DOCS / "numbers.md").read_text().partition(f"{heading}\n")[2]
    lines = [line for line in text.partition("\n#")[0].splitlines() if line.startswith("|")]
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    found: list[dict[str, str]] = []
    for cells in rows:
        if len(cells) != len(head):
            break  # of the next table
        row = dict(zip(head, cells, strict=True))
        row[head[0]] = row[head[0]] or found[-1][head[0]]
        found.append(row)
    return found


def number(text: str) -> float:
    return float(text.strip("~").replace(",", ""))


def bars(
    file: str, title: str, names: Sequence[str], series: dict[str, Sequence[float]], label: str
) -> None:
    """Horizontal bars, a group for each name, with their numbers."""
    height = 0.8 / len(series)
    figure, axes = plt.subplots(figsize=(7, 0.6 + 0.35 * len(names) * len(series)))
    for index, (name, values) in enumerate(series.items()):
        places = [place + index * height for place in range(len(names))]
        drawn = axes.barh(places, values, height, label=name, color=(OURS, OTHER)[index])
        axes.bar_label(drawn, fmt="{:g}", padding=3)
    middle = [place + height * (len(series) - 1) / 2 for place in range(len(names))]
    axes.set_yticks(middle, names)
    axes.invert_yaxis()
    axes.set_xlabel(label)
    axes.set_title(title, loc="left")
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    if len(series) > 1:
        axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
    figure.savefig(DOCS / "plots" / file, bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    mpl.rcParams["svg.hashsalt"] = "vllm-cosmos3"
    rows = [row for row in table("### Against diffusers") if row["pairing"] == "as they come"]
    short = [row for row in rows if number(row["diffusers s"]) < 20]
    for file, chosen in (("diffusers-small.svg", short), ("diffusers-large.svg", [r for r in rows if r not in short])):  # fmt: skip
        series = {
            "this package": [number(row["ours s"]) for row in chosen],
            "diffusers": [number(row["diffusers s"]) for row in chosen],
        }
        names = [row["request"] for row in chosen]
        bars(file, "One H100, Nano size", names, series, "seconds per request")
    rows = [row for row in table("## Generator, Nano size, several GPUs") if row["size"] == "1280x720"]  # fmt: skip
    names = [row["mesh (cfg x ulysses x tp)"] for row in rows]
    speed = {"speed-up": [number(row["speed-up"]) for row in rows]}
    bars(
        "meshes.svg",
        "H200, 1280x720, 189 frames: cfg x ulysses x tp",
        names,
        speed,
        "speed-up of a step over one GPU",
    )


if __name__ == "__main__":
    main()
