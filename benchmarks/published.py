"""Published seconds of whole requests on H100 SXM and H200 SXM, bfloat16, to stand beside ours.

From NVIDIA/cosmos, inference_benchmarks.md of June 2026, unless a source says otherwise: 189 frames at
24 a second, and pictures; 4 and 8 GPUs are tensor parallel there. What is counted differs: PyTorch (the
Cosmos Framework) is sampling alone, vLLM-Omni its whole pipeline without writing an MP4 and without
HTTP, Diffusers a whole call. Lengths of the prompts are not published.
"""

from __future__ import annotations

from dataclasses import dataclass

NVIDIA = "NVIDIA/cosmos inference_benchmarks.md"
COLUMNS = [f"{size}/{gpus}" for size in ("256p", "480p", "720p") for gpus in (1, 4, 8)]
TABLE = """
nano   t2v  H100  PyTorch    7.61  3.50  3.17  59.83 21.23 14.37  207.78  66.94  41.81
nano   t2v  H100  vLLM-Omni  6.97  3.45  3.49  58.17 19.95 13.46  202.29  62.82  37.80
nano   t2v  H100  Diffusers  9.00  -     -     68.00 -     -      240.00  -      -
nano   t2v  H200  PyTorch    7.53  3.34  3.19  60.18 20.84 13.97  214.28  67.48  41.26
nano   t2v  H200  vLLM-Omni  6.79  3.25  3.42  58.14 19.77 12.97  208.36  63.27  37.49
nano   t2v  H200  Diffusers  9.00  -     -     67.00 -     -      239.60  -      -
nano   i2v  H100  PyTorch    7.64  3.47  3.21  59.95 21.40 14.43  207.87  67.52  41.66
nano   i2v  H100  vLLM-Omni  7.37  3.81  3.97  59.77 21.68 15.12  205.97  66.52  41.51
nano   i2v  H100  Diffusers  9.00  -     -     68.00 -     -      239.80  -      -
nano   i2v  H200  PyTorch    7.65  3.37  3.17  60.51 21.01 14.07  214.80  67.14  41.00
nano   i2v  H200  vLLM-Omni  7.28  3.63  3.83  59.64 21.35 14.67  209.65  66.65  40.77
nano   i2v  H200  Diffusers  9.00  -     -     67.20 -     -      240.00  -      -
nano   t2i  H100  PyTorch    3.01  2.66  2.56  3.01  2.59  2.75   3.45    2.73   2.77
nano   t2i  H100  vLLM-Omni  1.61  2.45  3.18  1.53  2.35  7.02   2.61    2.45   3.03
nano   t2i  H100  Diffusers  3.00  -     -     3.00  -     -      4.00    -      -
nano   t2i  H200  PyTorch    2.96  2.59  2.70  3.04  2.78  2.77   3.28    2.84   2.77
nano   t2i  H200  vLLM-Omni  1.57  2.38  3.16  1.52  2.37  7.05   2.60    2.33   3.20
nano   t2i  H200  Diffusers  3.00  -     -     3.00  -     -      4.00    -      -
super  t2v  H200  PyTorch    -     14.82 11.82 -     70.27 41.78  -       224.43 123.49
super  t2v  H200  vLLM-Omni  25.61 -     5.87  219.11 -    35.26  769.63  212.30 111.94
super  t2v  H200  Diffusers  31.00 -     -     251.60 -    -      886.20  -      -
super  i2v  H200  PyTorch    -     14.87 11.80 -     70.45 42.10  -       224.36 123.57
super  i2v  H200  vLLM-Omni  25.47 -     6.32  220.70 -    36.90  766.33  215.03 117.52
super  i2v  H200  Diffusers  31.00 -     -     249.20 -    -      879.20  -      -
super  t2i  H200  PyTorch    -     13.62 13.48 -     13.33 13.53  -       13.78  13.50
super  t2i  H200  vLLM-Omni  2.83  -     4.50  5.70  -     7.16   10.24   4.23   4.43
super  t2i  H200  Diffusers  5.00  -     -     8.00  -     -      11.00   -      -
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """Seconds of one whole request. ``row`` is a row of latency.py, ``gpu`` the kind of each GPU."""

    model: str
    row: str
    gpus: int
    gpu: str
    engine: str
    seconds: float
    source: str = NVIDIA


ELSEWHERE = [
    Record(
        model="nano", row="t2v-720p", gpus=4, gpu="H200", engine="SGLang", seconds=57.8,
        source="sgl-project/sglang#27037",
    ),
    Record(
        model="super", row="t2v-720p", gpus=8, gpu="H200", engine="PyTorch, wall clock",
        seconds=189.8, source="tenstorrent/tt-metal#50458",
    ),
    Record(
        model="super", row="t2v-720p", gpus=8, gpu="H200", engine="vLLM-Omni", seconds=121,
        source="vllm-project/vllm-omni#5909",
    ),
]  # fmt: skip


def records() -> list[Record]:
    """All of them."""
    found = []
    for line in TABLE.strip().splitlines():
        model, mode, gpu, engine, *cells = line.split()
        for column, cell in zip(COLUMNS, cells, strict=True):
            size, gpus = column.split("/")
            if cell != "-":
                found.append(
                    Record(
                        model=model,
                        row=f"{mode}-{size}",
                        gpus=int(gpus),
                        gpu=gpu,
                        engine=engine,
                        seconds=float(cell),
                    )
                )
    return found + ELSEWHERE
