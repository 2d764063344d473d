"""The published contract is what the code says, and readers of today understand what was written yesterday."""

import copy
import json
from collections.abc import Callable
from decimal import Decimal
from typing import Annotated, Any, Literal

import msgspec
import pytest
from msgspec import Meta

from gpuledger.schemas.compatibility import column_breaks, schema_breaks
from gpuledger.schemas.publish import BASELINE, FOLDER, documents, text

PUBLISH = "python -m gpuledger.schemas.publish"


def test_the_committed_schemas_are_what_the_code_says() -> None:
    made = {name: text(document) for name, document in documents().items()}
    committed = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.glob("*.json")}
    assert committed == made, f"the contract changed; run {PUBLISH} and commit what it writes"


def test_the_contract_is_compatible_with_the_released_one() -> None:
    made = documents()
    found: list[str] = []
    baseline = sorted(BASELINE.glob("*.json"))
    assert baseline, "there is no released contract to compare with"
    for path in baseline:
        old = json.loads(path.read_text(encoding="utf-8"))
        if path.name not in made:
            found.append(f"{path.stem}: the event type was removed")
        elif "columns" in old:
            found += [f"telemetry: {text}" for text in column_breaks(old["columns"], made[path.name]["columns"])]
        else:
            found += [f"{path.stem}: {text}" for text in schema_breaks(old, made[path.name])]
    assert not found, "not readable any more: " + "; ".join(found)


class Leaf(msgspec.Struct):
    at_ms: Annotated[int, Meta(ge=10, le=100)]
    note: str = ""


class Old(msgspec.Struct, tag_field="type", tag="made_up"):
    name: Annotated[str, Meta(min_length=1, max_length=9)]
    state: Literal["on", "off"]
    maybe: int | None = None
    price: Decimal = Decimal(1)
    leaves: list[Leaf] = []
    tags: dict[str, str] = {}
    only: Leaf | None = None


def changed(change: Callable[[dict[str, Any], dict[str, Any]], None]) -> list[str]:
    """The breaks after `change` was made to the properties and the definition of `Old`."""
    old = msgspec.json.schema(Old)
    new = copy.deepcopy(old)
    change(new["$defs"]["Old"]["properties"], new["$defs"])
    return schema_breaks(old, new)


def test_the_same_schema_is_compatible() -> None:
    assert changed(lambda fields, definitions: None) == []


def widen(fields: dict[str, Any], definitions: dict[str, Any]) -> None:
    fields["name"]["maxLength"] = 20
    fields["state"]["enum"].append("unknown")
    fields["extra"] = {"type": "integer", "default": 0}
    fields["name"] = {"anyOf": [fields["name"], {"type": "null"}]}
    definitions["Leaf"]["properties"]["at_ms"] = {"type": "number", "minimum": 5, "maximum": 100}
    definitions["Old"]["required"].remove("state")


def test_what_only_widens_is_compatible() -> None:
    assert changed(widen) == []


def remove_field(fields: dict[str, Any], definitions: dict[str, Any]) -> None:
    del fields["tags"]


def require_new(fields: dict[str, Any], definitions: dict[str, Any]) -> None:
    fields["extra"] = {"type": "integer"}
    definitions["Old"]["required"].append("extra")


def require_optional(fields: dict[str, Any], definitions: dict[str, Any]) -> None:
    definitions["Old"]["required"].append("price")


def change_type(fields: dict[str, Any], definitions: dict[str, Any]) -> None:
    fields["name"] = {"type": "integer"}


def refuse_null(fields: dict[str, Any], definitions: dict[str, Any]) -> None:
    fields["maybe"] = {"type": "integer", "default": None}


def remove_value(fields: dict[str, Any], definitions: dict[str, Any]) -> None:
    fields["state"]["enum"].remove("off")


def shorten(fields: dict[str, Any], definitions: dict[str, Any]) -> None:
    fields["name"]["maxLength"] = 8


def add_bound(fields: dict[str, Any], definitions: dict[str, Any]) -> None:
    definitions["Leaf"]["properties"]["note"]["minLength"] = 1


def raise_minimum(fields: dict[str, Any], definitions: dict[str, Any]) -> None:
    definitions["Leaf"]["properties"]["at_ms"]["minimum"] = 11


def narrow_mapping(fields: dict[str, Any], definitions: dict[str, Any]) -> None:
    fields["tags"]["additionalProperties"] = {"type": "integer"}


def add_pattern(fields: dict[str, Any], definitions: dict[str, Any]) -> None:
    fields["name"]["pattern"] = "^a"


def rename_tag(fields: dict[str, Any], definitions: dict[str, Any]) -> None:
    fields["type"]["enum"] = ["renamed"]


def refuse_unknown(fields: dict[str, Any], definitions: dict[str, Any]) -> None:
    definitions["Old"]["additionalProperties"] = False


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (remove_field, ["tags: the field was removed"]),
        (require_new, ["extra: is required now; old events may lack it"]),
        (require_optional, ["price: is required now; old events may lack it"]),
        (change_type, ["name: string is no longer accepted"]),
        (refuse_null, ["maybe: null is no longer accepted"]),
        (remove_value, ["state: the value 'off' is no longer accepted"]),
        (shorten, ["name: maxLength was 9, is 8: narrower"]),
        (
            add_bound,
            [
                "leaves[].note: minLength was not set, is 1: narrower",
                "only.note: minLength was not set, is 1: narrower",
            ],
        ),
        (
            raise_minimum,
            ["leaves[].at_ms: minimum was 10, is 11: narrower", "only.at_ms: minimum was 10, is 11: narrower"],
        ),
        (narrow_mapping, ["tags{}: string is no longer accepted"]),
        (add_pattern, ["name: pattern was not set, is ^a"]),
        (rename_tag, ["type: the value 'made_up' is no longer accepted"]),
        (refuse_unknown, ["the event: unknown fields are refused now"]),
    ],
)
def test_what_narrows_is_named(change: Callable[[dict[str, Any], dict[str, Any]], None], expected: list[str]) -> None:
    assert changed(change) == expected


COLUMNS = [
    {"name": "ts_ms", "type": "int64", "nullable": False},
    {"name": "power_mw", "type": "int64", "nullable": True},
]


@pytest.mark.parametrize(
    ("new", "expected"),
    [
        (COLUMNS, []),
        ([*COLUMNS, {"name": "fan_pct", "type": "float32", "nullable": True}], []),
        (
            [*COLUMNS, {"name": "fan_pct", "type": "float32", "nullable": False}],
            ["fan_pct: a new column must be nullable; old batches lack it"],
        ),
        (COLUMNS[:1], ["power_mw: the column was removed"]),
        ([COLUMNS[0], {**COLUMNS[1], "type": "float32"}], ["power_mw: the type was int64, is float32"]),
        ([COLUMNS[0], {**COLUMNS[1], "nullable": False}], ["power_mw: NULL is no longer accepted"]),
    ],
)
def test_telemetry_columns_are_only_added(new: list[dict[str, object]], expected: list[str]) -> None:
    assert column_breaks(COLUMNS, new) == expected
