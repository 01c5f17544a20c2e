"""Results of the yardstick for people: a Markdown table, and one HTML page with clips side by side."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from math import inf

from vllm_cosmos3.compare.measuring import Measured
from vllm_cosmos3.compare.modes import EXACT

HEAD = (
    "mode",
    "s",
    "speed-up",
    "steps computed",
    "PSNR dB",
    "SSIM",
    "LPIPS",
    "latent error, last step",
    "largest of a step",
    "peak GiB",
    "shown",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A mode over all prompts: medians of seconds and errors, means of PSNR, SSIM, LPIPS and computed steps.

    ``psnr`` is that of the clips that differ from the exact ones, infinite if none does. ``lpips`` is None
    where its weights are not installed. ``shown`` are how many clips show what was asked, and of how
    many; None without a judge.
    """

    mode: str
    seconds: float
    speed_up: float
    computed: float
    psnr: float
    ssim: float
    lpips: float | None
    last_error: float
    largest_error: float
    peak: int
    shown: tuple[int, int] | None

    @property
    def cells(self) -> tuple[str, ...]:
        return (
            self.mode,
            f"{self.seconds:.2f}",
            f"{self.speed_up:.2f}",
            f"{self.computed:.1f}",
            "equal" if self.psnr == inf else f"{self.psnr:.1f}",
            f"{self.ssim:.4f}",
            "" if self.lpips is None else f"{self.lpips:.4f}",
            f"{self.last_error:.2e}",
            f"{self.largest_error:.2e}",
            f"{self.peak / 2**30:.1f}",
            "" if self.shown is None else f"{self.shown[0]} of {self.shown[1]}",
        )


def rows(found: Sequence[Measured]) -> list[Row]:
    """A row for each mode, in the order in which they were measured."""
    modes = list(dict.fromkeys(each.mode for each in found))
    exact = statistics.median(each.seconds for each in found if each.mode == EXACT)
    return [_row(mode, [each for each in found if each.mode == mode], exact) for mode in modes]


def _row(mode: str, found: Sequence[Measured], exact: float) -> Row:
    seconds = statistics.median(each.seconds for each in found)
    words = [each.shown for each in found if each.shown is not None]
    distances = [each.lpips for each in found if each.lpips is not None]
    different = [each.psnr for each in found if each.psnr != inf]
    return Row(
        mode=mode,
        seconds=seconds,
        speed_up=exact / seconds,
        computed=statistics.mean(each.steps - each.reused for each in found),
        psnr=statistics.mean(different) if different else inf,
        ssim=statistics.mean(each.ssim for each in found),
        lpips=statistics.mean(distances) if distances else None,
        last_error=statistics.median(each.errors[-1] for each in found),
        largest_error=statistics.median(max(each.errors) for each in found),
        peak=max(each.peak for each in found),
        shown=(sum(words), len(words)) if words else None,
    )


def table(found: Sequence[Measured]) -> str:
    """The rows in Markdown."""
    lines = [HEAD, ["---"] * len(HEAD), *(row.cells for row in rows(found))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def page(found: Sequence[Measured], title: str) -> str:
    """One HTML page: the table, then a row of clips for each prompt. Files are beside the page."""
    cells = "".join(_tr("td", row.cells) for row in rows(found))
    parts = [_START.format(title=escape(title)), f"<table>{_tr('th', HEAD)}{cells}</table>"]
    for prompt in dict.fromkeys(each.prompt for each in found):
        figures = "".join(_figure(each) for each in found if each.prompt == prompt)
        parts.append(f"<h2>{escape(prompt)}</h2><div>{figures}</div>")
    return "\n".join([*parts, ""])


def _tr(tag: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"


def _figure(each: Measured) -> str:
    name = escape(each.file.name, quote=True)
    shown = f'<img src="{name}" alt="">'
    if each.file.suffix == ".mp4":
        shown = f'<video src="{name}" controls autoplay loop muted playsinline></video>'
    likeness = "equal" if each.psnr == inf else f"{each.psnr:.1f} dB, SSIM {each.ssim:.4f}"
    words = f"{each.mode}: {each.seconds:.2f} s, {each.steps - each.reused} of {each.steps} steps, "
    return f"<figure>{shown}<figcaption>{escape(words + likeness)}</figcaption></figure>"


_START = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 15px/1.4 system-ui, sans-serif; margin: 2rem; }}
table {{ border-collapse: collapse; }} td, th {{ padding: .2rem .8rem; text-align: right; }}
td:first-child, th:first-child {{ text-align: left; }} tr + tr {{ border-top: 1px solid #ccc; }}
div {{ display: flex; flex-wrap: wrap; gap: 1rem; }} figure {{ margin: 0; max-width: 100%; }}
h2 {{ font-size: 1rem; font-weight: 600; }} video, img {{ display: block; max-width: 100%; }}
</style>
<h1>{title}</h1>"""
