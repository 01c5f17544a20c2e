"""Imports point downward only. The table is the architecture; a new module needs a row here."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "vllm_cosmos3"

# Layers, from the bottom up. A name is a folder with all that is in it, or one module; the longest
# name that fits counts. Within a row imports may go both ways, but never in a circle.
LAYERS = [
    {
        "version",
        "imports",
        "errors",
        "progress",
        "bars",
        "closing",
        "compat",
        "devices",
        "media_budget",
        "files",
    },
    {"media", "fetching", "poses", "checkpoint"},
    {"request", "engine_options", "parallel", "robots"},
    {"batch", "generator.formats", "generator.output", "generator.sampling"},
    {"generator.models", "reasoner"},
    {"generator.memory"},
    {"generator", "plugin"},
    {"stage"},
    {"session"},
    {"engine", "compare"},
    {"server.options", "server.storage", "server.engine_heartbeat", "server.frame_check"},
    {"server.http"},
    {"server.guardrails", "server.memory_split"},
    {"server.jobs"},
    {"server.openapi"},
    {"server.routes"},
    {"server"},
    {"cli"},
]
NO_TORCH = {
    "errors",
    "files",
    "poses",
    "checkpoint.config",
    "checkpoint.derived",
    "checkpoint.hub",
    "checkpoint.latents",
    "checkpoint.kinds",
    "checkpoint.tensors",
    "request",
    "batch",
    "robots",
    "cli",
    "engine_options",
}


def modules(package: str = PACKAGE) -> dict[str, Path]:
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT / package).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name and not name.endswith("__main__"):
            found[name] = path
    return found


def layer(name: str) -> int:
    """The row of the longest name in the table that is this module or a folder around it."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        for index, names in enumerate(LAYERS):
            if ".".join(parts[:length]) in names:
                return index
    raise AssertionError(f"{name} has no row in LAYERS")


def imported(path: Path, *, top_level: bool) -> set[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level else list(ast.walk(tree))
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def targets(name: str, package: str = PACKAGE) -> set[str]:
    """The modules of the package that a module of it imports, wherever in it."""
    known = modules(package)
    found = set()
    for dotted in imported(known[name], top_level=False):
        target = dotted.removeprefix(f"{package}.")
        if target in known and target != name:
            found.add(target)
    return found


@pytest.mark.parametrize("name", modules())
def test_imports_point_down(name: str) -> None:
    for target in targets(name):
        assert layer(target) <= layer(name), (
            f"{name} (layer {layer(name)}) imports {target} (layer {layer(target)})"
        )


@pytest.mark.parametrize("package", [PACKAGE, "training"])
def test_no_imports_in_a_circle(package: str) -> None:
    TopologicalSorter({name: targets(name, package) for name in modules(package)}).prepare()


@pytest.mark.parametrize(
    "name",
    sorted(m for m in modules() if any(m == n or m.startswith(f"{n}.") for n in NO_TORCH)),
)
def test_light_modules_import_no_torch(name: str) -> None:
    heavy = {"torch", "vllm", "transformers", "diffusers"}
    assert (
        not {target.split(".")[0] for target in imported(modules()[name], top_level=True)} & heavy
    )


def test_references_are_not_imported() -> None:
    for name, path in modules().items():
        assert not {t.split(".")[0] for t in imported(path, top_level=False)} & {
            "diffusers",
            "vllm_omni",
        }, name
