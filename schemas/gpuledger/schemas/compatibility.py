"""Says whether readers of a new version of the contract still understand everything written by the old one.

Topics keep events for ever, so a removed field, a new required one or a narrower type would turn the past into dead
letters. Widening is fine: workers are upgraded before agents.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

__all__ = ["column_breaks", "schema_breaks"]

Schema = Mapping[str, Any]

#: (keyword, whether a greater value is narrower)
_BOUNDS = (
    ("minimum", True),
    ("exclusiveMinimum", True),
    ("maximum", False),
    ("exclusiveMaximum", False),
    ("minLength", True),
    ("maxLength", False),
    ("minItems", True),
    ("maxItems", False),
)


def schema_breaks(old: Schema, new: Schema) -> list[str]:
    """What `new` (a JSON Schema as msgspec writes it) no longer accepts of what `old` does, each with its path.

    An empty list means compatible. Fields that `new` adds as optional, types and bounds that it widens, are no breaks.
    """
    return list(_breaks(old, new, old, new, "", frozenset()))


def _breaks(
    old: Schema, new: Schema, old_top: Schema, new_top: Schema, path: str, seen: frozenset[str]
) -> Iterator[str]:
    reference = str(old.get("$ref", ""))
    if reference and reference in seen:
        return  # a type within itself
    seen = seen | {reference} if reference else seen
    old, new = _resolve(old, old_top), _resolve(new, new_top)
    here = path or "the event"
    accepted = _alternatives(new)
    for alternative in _alternatives(old):
        if accepted == [{}]:
            continue
        matches = [option for option in accepted if _same_kind(alternative, option, old_top, new_top)]
        if not matches:
            yield f"{here}: {_kind(alternative, old_top)} is no longer accepted"
            continue
        attempts = [list(_narrowed(alternative, option, old_top, new_top, path, seen)) for option in matches]
        yield from min(attempts, key=len)


def _resolve(schema: Schema, top: Schema) -> Schema:
    while "$ref" in schema:
        schema = cast(Schema, top["$defs"][str(schema["$ref"]).rpartition("/")[2]])
    return schema


def _alternatives(schema: Schema) -> list[Schema]:
    return list(cast(Sequence[Schema], schema.get("anyOf", [schema])))


def _kind(schema: Schema, top: Schema) -> str:
    schema = _resolve(schema, top)
    if "type" in schema:
        return str(schema["type"])
    values = _values(schema)
    return "null" if values == [None] else "string" if values else "anything"


def _values(schema: Schema) -> list[Any] | None:
    """The values of an enumeration, None where any value of the type is accepted."""
    if "const" in schema:
        return [schema["const"]]
    return list(cast(Sequence[Any], schema["enum"])) if "enum" in schema else None


def _same_kind(old: Schema, new: Schema, old_top: Schema, new_top: Schema) -> bool:
    was, now = _kind(old, old_top), _kind(new, new_top)
    return was == now or now == "anything" or (was == "integer" and now == "number")


def _narrowed(
    old: Schema, new: Schema, old_top: Schema, new_top: Schema, path: str, seen: frozenset[str]
) -> Iterator[str]:
    old, new = _resolve(old, old_top), _resolve(new, new_top)
    here = path or "the event"
    yield from _narrowed_values(old, new, here)
    for keyword, greater_is_narrower in _BOUNDS:
        was, now = old.get(keyword), new.get(keyword)
        if now is not None and (was is None or (now > was if greater_is_narrower else now < was)):
            yield f"{here}: {keyword} was {'not set' if was is None else was}, is {now}: narrower"
    for keyword in ("pattern", "format"):
        if keyword in new and new[keyword] != old.get(keyword):
            yield f"{here}: {keyword} was {old.get(keyword, 'not set')}, is {new[keyword]}"
    yield from _fields(old, new, old_top, new_top, path, seen)
    for keyword, mark in (("items", "[]"), ("additionalProperties", "{}")):
        was, now = old.get(keyword), new.get(keyword)
        if isinstance(was, Mapping) and isinstance(now, Mapping):
            yield from _breaks(cast(Schema, was), cast(Schema, now), old_top, new_top, f"{path}{mark}", seen)
    before, after = (cast(Sequence[Schema], schema.get("prefixItems", [])) for schema in (old, new))
    if len(before) != len(after):
        yield f"{here}: had {len(before)} places, has {len(after)}"
    for n, (was, now) in enumerate(zip(before, after, strict=False)):
        yield from _breaks(was, now, old_top, new_top, f"{path}[{n}]", seen)


def _narrowed_values(old: Schema, new: Schema, here: str) -> Iterator[str]:
    was, now = _values(old), _values(new)
    if now is None:
        return
    if was is None:
        yield f"{here}: any value was accepted, now only {', '.join(map(str, now))}"
        return
    for value in was:
        if value not in now:
            yield f"{here}: the value {value!r} is no longer accepted"


def _fields(
    old: Schema, new: Schema, old_top: Schema, new_top: Schema, path: str, seen: frozenset[str]
) -> Iterator[str]:
    before = cast(Mapping[str, Schema], old.get("properties", {}))
    after = cast(Mapping[str, Schema], new.get("properties", {}))
    for name, was in before.items():
        here = f"{path}.{name}" if path else name
        if name not in after:
            yield f"{here}: the field was removed"
        else:
            yield from _breaks(was, after[name], old_top, new_top, here, seen)
    required_before = cast(Sequence[str], old.get("required", []))
    for name in cast(Sequence[str], new.get("required", [])):
        if name not in required_before:
            yield f"{f'{path}.{name}' if path else name}: is required now; old events may lack it"
    if new.get("additionalProperties") is False and old.get("additionalProperties") is not False:
        yield f"{path or 'the event'}: unknown fields are refused now"


def column_breaks(old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]) -> list[str]:
    """The same for telemetry columns, each a mapping with `name`, `type` and `nullable`.

    A column may be added where it is nullable; it may not be removed, change its type, or stop being nullable.
    """
    after = {str(column["name"]): column for column in new}
    before = {str(column["name"]) for column in old}
    found: list[str] = []
    for column in old:
        name = str(column["name"])
        if name not in after:
            found.append(f"{name}: the column was removed")
            continue
        now = after[name]
        if now["type"] != column["type"]:
            found.append(f"{name}: the type was {column['type']}, is {now['type']}")
        if column["nullable"] and not now["nullable"]:
            found.append(f"{name}: NULL is no longer accepted")
    found += [
        f"{name}: a new column must be nullable; old batches lack it"
        for name, column in after.items()
        if name not in before and not column["nullable"]
    ]
    return found
