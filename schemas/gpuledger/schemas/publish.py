"""Writes the contract as JSON Schemas for those who do not read Python: ``python -m gpuledger.schemas.publish``.

`jsonschema/` is what the code says now. `jsonschema/baseline/` is the last released contract, which every change is
held against; ``--release`` makes the one the other, when a version is released and never to silence a test.
"""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path
from typing import Any, get_args

import msgspec

from gpuledger.schemas import events, telemetry
from gpuledger.schemas.topics import TOPICS

__all__ = ["BASELINE", "FOLDER", "documents", "text"]

FOLDER = Path(__file__).parent / "jsonschema"
BASELINE = FOLDER / "baseline"

_DIALECT = "https://json-schema.org/draft/2020-12/schema"


def documents() -> dict[str, dict[str, Any]]:
    """File name to document: one JSON Schema for each event type, one for the telemetry header, and the columns."""
    made: dict[str, dict[str, Any]] = {}
    for kind in get_args(events.AnyEvent):
        name = str(kind.kind)
        topics = [topic.name for topic in TOPICS.values() if name in topic.types]
        made[f"{name}.json"] = {"$schema": _DIALECT, "x-topics": topics, **_schema(kind)}
    made["telemetry_header.json"] = {
        "$schema": _DIALECT,
        "x-topics": ["telemetry"],
        **_schema(telemetry.BatchHeader),
    }
    made["telemetry_columns.json"] = {
        "version": telemetry.TELEMETRY_VERSION,
        "columns": [
            {"name": column.name, "type": column.type, "nullable": column.nullable, "description": column.doc}
            for column in telemetry.COLUMNS
        ],
    }
    return made


def _schema(kind: type[msgspec.Struct]) -> dict[str, Any]:
    """msgspec takes docstrings as they are, with the indentation of the source."""
    schema = msgspec.json.schema(kind)
    for definition in schema["$defs"].values():
        if "description" in definition:
            definition["description"] = inspect.cleandoc(definition["description"])
    return schema


def text(document: dict[str, Any]) -> str:
    """As it is committed: stable from run to run."""
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def _write(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    made = documents()
    for path in folder.glob("*.json"):
        if path.name not in made:
            path.unlink()
    for name, document in made.items():
        (folder / name).write_text(text(document), encoding="utf-8")


if __name__ == "__main__":
    _write(FOLDER)
    if "--release" in sys.argv[1:]:
        _write(BASELINE)
