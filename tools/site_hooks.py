"""Hooks of mkdocs.yml: pages made from the code, and links that leave the documents.

The reference of flags comes from the parsers, that of HTTP from the OpenAPI description of the app.
A link to a file outside docs/ leads to the repository.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(\]\()([^)#\s]+)")
METHODS = ("get", "post", "put", "patch", "delete")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made here."""
    for name, text in (("flags", flags_page()), ("http", http_page(openapi()))):
        files.append(File.generated(config, f"reference/{name}.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links to files outside the documents to the repository."""
    folder = Path("docs", page.file.src_uri).parent

    def led(found: re.Match[str]) -> str:
        target = found[2]
        if re.match(r"[a-z]+:", target):
            return found[0]
        path = os.path.normpath(folder / target)
        if path.startswith("docs/"):
            return found[0]
        kind = "tree" if (ROOT / path).is_dir() else "blob"
        return f"{found[1]}{repository()}/{kind}/main/{path}"

    return LINK.sub(led, markdown)


def repository() -> str:
    """Where the sources are."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return str(project["urls"]["Repository"])


# Flags.


def flags_page() -> str:
    """Every subcommand with its flags in their groups, then the options of the engine."""
    from vllm_cosmos3.cli import COMMANDS, serve_generator, subparser, whole_parser
    from vllm_cosmos3.engine_options import DEFAULTS, OPTIONS

    parser = whole_parser(COMMANDS)
    lines = ["# Flags and options", ""]
    for command, summary in COMMANDS.items():
        lines += [f"## vllm-cosmos3 {command}", "", f"{summary[0].upper()}{summary[1:]}.", ""]
        groups = subparser(parser, command)._action_groups
        if command == "serve":
            groups = [*groups, *serve_generator.web_parser()._action_groups]
        for group in groups:
            lines += _group(group)
    lines += ["## Engine options", "", "Arguments of `Cosmos3`.", ""]
    rows = ((f"`{name}`", option.spec.sentence(DEFAULTS[name])) for name, option in OPTIONS.items())
    return "\n".join([*lines, *_table(("option", ""), rows)])


def _group(group: argparse._ArgumentGroup) -> Iterator[str]:
    rows = []
    for action in group._group_actions:
        if isinstance(action, argparse._HelpAction | argparse._SubParsersAction):
            continue
        names = ", ".join(f"`{name}`" for name in action.option_strings) or f"`{action.metavar}`"
        kind = f" `{action.metavar}`" if action.option_strings and action.metavar else ""
        rows.append((names + kind, (action.help or "").replace("%%", "%") % vars(action)))
    if rows:
        title = (group.title or "").replace("positional arguments", "arguments")
        yield from (f"### {title}", "", *_table(("flag", ""), rows), "")


def _table(head: tuple[str, ...], rows: Any) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for row in rows:
        cells = (str(cell).replace("|", "\\|").replace("\n", " ") for cell in row)
        yield f"| {' | '.join(cells)} |"


# HTTP.


def openapi() -> dict[str, Any]:
    """The OpenAPI description of the generator's app."""
    from vllm_cosmos3.server.app import Listen, make_app

    def no_service() -> Any:
        raise AssertionError("nothing is served here")

    return make_app(no_service, Listen()).openapi()


def http_page(api: dict[str, Any]) -> str:
    """Every route with its parameters, the fields of its body, and its answers."""
    lines = [
        "# HTTP",
        "",
        "Routes of the generator. Beside them `vllm serve` has those of vLLM, such as",
        "`/v1/chat/completions`. A running server has this description at `/openapi.json`.",
        "",
    ]
    for path, operations in api["paths"].items():
        for method in METHODS:
            if method in operations:
                lines += _operation(api, f"{method.upper()} {path}", operations[method])
    return "\n".join(lines)


def _operation(api: dict[str, Any], title: str, operation: dict[str, Any]) -> Iterator[str]:
    yield from (f"## {title}", "")
    words = operation.get("description") or operation.get("summary", "")
    yield from (words.partition("\n\nRaises:")[0], "")
    parameters = operation.get("parameters", [])
    if parameters:
        rows = ((f"`{p['name']}`", p["in"], p.get("description", "")) for p in parameters)
        yield from (*_table(("parameter", "in", ""), rows), "")
    content = operation.get("requestBody", {}).get("content", {})
    if content:
        yield from (f"Body: {', '.join(f'`{kind}`' for kind in content)}", "")
        schema = _resolved(api, next(iter(content.values())).get("schema", {}))
        rows = ((f"`{n}`", _kind(api, s), s.get("description", "")) for n, s in schema.get("properties", {}).items())  # fmt: skip
        yield from (*_table(("field", "type", ""), rows), "")
    rows = (
        (code, ", ".join(f"`{kind}`" for kind in answer.get("content", {})), answer["description"])
        for code, answer in operation.get("responses", {}).items()
    )
    yield from (*_table(("status", "content", ""), rows), "")


def _resolved(api: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    while "$ref" in schema:
        schema = api["components"]["schemas"][schema["$ref"].rsplit("/", 1)[1]]
    return schema


def _kind(api: dict[str, Any], schema: dict[str, Any]) -> str:
    """The type of a field in words."""
    if "$ref" in schema:
        return schema["$ref"].rsplit("/", 1)[1]
    if "enum" in schema:
        return ", ".join(f"`{json.dumps(value)}`" for value in schema["enum"])
    for key in ("anyOf", "oneOf"):
        if key in schema:
            kinds = dict.fromkeys(_kind(api, each) for each in schema[key])
            return " or ".join(kind for kind in kinds if kind)
    kind = schema.get("type", "")
    return " or ".join(kind) if isinstance(kind, list) else str(kind)
