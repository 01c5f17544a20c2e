"""Imports point downward only. The table is the architecture; a new module needs a row here."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "vllm_cosmos3"

LAYERS = [
    {"version", "errors", "progress", "loading"},
    {"kinds"},
    {"config", "plan", "embodiments", "poses", "compat"},
    {"runtime.mesh", "media"},
    {"hints", "sizes", "defaults"},
    {"spec"},
    {"inventory", "request", "prompts", "sampling", "hub", "models.limits", "droid"},
    {"actions", "transfer"},
    {
        "parameters",
        "checkpoint",
        "models.weights",
        "models.kernels",
        "models.reasoner_weights",
        "models.root_config",
        "models.clip",
        "models.normalisation",
        "runtime.agreement",
        "runtime.attention",
        "runtime.graphs",
        "runtime.halo",
        "runtime.offload",
        "runtime.timers",
        "output",
        "questions",
    },
    {"conditions"},
    {"memory"},
    {"models.transformer", "models.vae", "models.sound", "models.patches", "upsample"},
    {"models.texts", "runtime.budget", "records"},
    {
        "models.components",
        "batch",
        "models.processing",
        "models.video_loader",
        "models.config_parser",
        "models.reasoning_parser",
        "models.startup",
    },
    {"models.reasoner", "models.connector", "pipeline", "runtime.worker", "runtime.scheduler"},
    {"runtime.executor"},
    {"runtime.core"},
    {"runtime.client"},
    {"runners"},
    {"engine", "plugin", "reasoner"},
    {"server"},
    {"cli"},
]
# Within one package of the table (sampling, server, cli) modules may import each other downward.
NO_TORCH = {
    "errors",
    "kinds",
    "config",
    "plan",
    "embodiments",
    "poses",
    "actions",
    "hints",
    "sizes",
    "defaults",
    "spec",
    "transfer",
    "conditions",
    "parameters",
    "request",
    "inventory",
    "hub",
    "questions",
    "upsample",
    "records",
    "batch",
    "droid",
    "cli",
}


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name not in ("", "models", "runtime", "server", "cli.__main__"):
            found[name] = path
    return found


def layer(name: str) -> int:
    for index, names in enumerate(LAYERS):
        if name in names or name.split(".")[0] in names:
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


@pytest.mark.parametrize("name", modules())
def test_imports_point_down(name: str) -> None:
    known = modules()
    for dotted in imported(known[name], top_level=False):
        target = dotted.removeprefix("vllm_cosmos3.")
        if target in known and target != name:
            same_package = "." in target and target.split(".")[0] == name.split(".")[0]
            assert layer(target) < layer(name) or (same_package and layer(target) == layer(name)), (
                f"{name} (layer {layer(name)}) imports {target} (layer {layer(target)})"
            )


@pytest.mark.parametrize("name", sorted(NO_TORCH & modules().keys()))
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
