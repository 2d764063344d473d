"""The files that people apply: rates, capacity and tenants in YAML become events.

Ids are made of what an entry is about (pool, tenant, start), so that applying a file twice changes nothing and a
corrected entry replaces itself. What a file no longer mentions stays as it is: history is ended, never deleted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal, TypeVar, cast
from zoneinfo import ZoneInfo

import msgspec

from gpuledger.finance.document_fields import Field, Reader
from gpuledger.finance.price_series import SeriesFormat, parse_series
from gpuledger.schemas.events import (
    AccountRule,
    AssetCost,
    Commitment,
    EnergyTariff,
    Fact,
    PricePoint,
    RateCard,
    Tenant,
    Transfer,
)
from gpuledger.schemas.exceptions import DocumentError, SchemaError
from gpuledger.schemas.yaml_text import parse_yaml

__all__ = ["Change", "Document", "diff", "parse_capacity", "parse_rates", "parse_tenants"]

F = TypeVar("F", bound=Fact)
ReadText = Callable[[str], str]

_TEXT, _TEXT_REQUIRED = Field("text"), Field("text", required=True)
_DECIMAL, _DECIMAL_REQUIRED = Field("decimal"), Field("decimal", required=True)
_TIME, _TIME_REQUIRED = Field("time"), Field("time", required=True)
_COUNT, _COUNT_REQUIRED = Field("count"), Field("count", required=True)

_ASSET_COST = {
    "id": _TEXT,
    "pool": _TEXT_REQUIRED,
    "currency": _TEXT_REQUIRED,
    "period_cost": _DECIMAL_REQUIRED,
    "start": _TIME_REQUIRED,
    "end": _TIME_REQUIRED,
    "pue": _DECIMAL,
    "node_energy_factor": _DECIMAL,
    "tariff": _TEXT,
}
_RATE_CARD = {
    "id": _TEXT,
    "pool": _TEXT_REQUIRED,
    "tenant": _TEXT,
    "currency": _TEXT_REQUIRED,
    "per_gpu_hour": _DECIMAL_REQUIRED,
    "reserved_unused_per_gpu_hour": _DECIMAL,
    "reserved_unused_payer": _TEXT,
    "start": _TIME_REQUIRED,
    "end": _TIME,
}
_TARIFF = {"id": _TEXT_REQUIRED, "currency": _TEXT_REQUIRED, "end": _TIME}
_TARIFF_CSV = {
    "prices_csv": _TEXT,
    "time_column": _TEXT,
    "price_column": _TEXT,
    "unit": _TEXT,
    "resolution_minutes": _COUNT,
}
_PRICE = {"start": _TIME_REQUIRED, "per_kwh": _DECIMAL_REQUIRED}
_COMMITMENT = {
    "id": _TEXT,
    "pool": _TEXT_REQUIRED,
    "tenant": _TEXT_REQUIRED,
    "gpus": _COUNT_REQUIRED,
    "start": _TIME_REQUIRED,
    "end": _TIME,
    "state": _TEXT,
    "contract": _TEXT,
    "by": _TEXT,
    "why": _TEXT,
}
_TRANSFER = {
    "id": _TEXT,
    "pool": _TEXT_REQUIRED,
    "gpus": _COUNT_REQUIRED,
    "from": _TEXT_REQUIRED,
    "to": _TEXT_REQUIRED,
    "start": _TIME_REQUIRED,
    "end": _TIME,
    "state": _TEXT,
    "by": _TEXT,
    "why": _TEXT,
}
_TENANT = {"id": _TEXT_REQUIRED, "name": _TEXT, "contact": _TEXT}
_RULE = {"account": _TEXT, "user": _TEXT, "namespace": _TEXT, "source": _TEXT, "start": _TIME, "end": _TIME}
_MATCHES = ("account", "user", "namespace")
_UNITS = ("per_kwh", "per_mwh", "cents_per_kwh")
_IN_EVENTS = {"start": "start_ms", "end": "end_ms", "from": "from_tenant", "to": "to_tenant"}


@dataclass(frozen=True, slots=True)
class Document:
    """The events of one file, and where each (kind, id) stands in it (``rates.yaml: asset_costs[0]``)."""

    events: list[Fact] = field(default_factory=list)
    positions: dict[tuple[str, str], str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Change:
    """One fact that a file adds or changes. `fields`: (name, before, after) of what differs; empty for a new one."""

    event: Fact
    action: str
    fields: tuple[tuple[str, Any, Any], ...] = ()


def parse_rates(text: str, name: str, now_ms: int, read_text: ReadText) -> Document:
    """Asset costs, energy tariffs and rate cards of a rates file.

    Args:
        name: what the file is called in errors.
        now_ms: the claim time and revision of the events.
        read_text: gives the text of a file named by ``prices_csv``; may raise OSError.

    Raises:
        DocumentError: one line for each problem: file, path, what was expected, what was found, what to write.
    """
    return _Parser(name, now_ms).run(
        text,
        {
            "energy_tariffs": lambda parser, value, path: parser.tariff(value, path, read_text),
            "asset_costs": lambda parser, value, path: parser.by_content(AssetCost, value, path, _ASSET_COST),
            "rate_cards": lambda parser, value, path: parser.by_content(RateCard, value, path, _RATE_CARD),
        },
    )


def parse_capacity(text: str, name: str, now_ms: int) -> Document:
    """Commitments and transfers of a capacity file. As `parse_rates`."""
    return _Parser(name, now_ms).run(
        text,
        {
            "commitments": lambda parser, value, path: parser.by_content(Commitment, value, path, _COMMITMENT),
            "transfers": lambda parser, value, path: parser.by_content(Transfer, value, path, _TRANSFER),
        },
    )


def parse_tenants(text: str, name: str, now_ms: int) -> Document:
    """Tenants and their account rules of a tenants file. As `parse_rates`."""
    return _Parser(name, now_ms).run(text, {"tenants": lambda parser, value, path: parser.tenant(value, path)})


def diff(current: Mapping[tuple[str, str], Fact], new: Document) -> list[Change]:
    """What the document changes, in its order; facts whose content is the same are left out.

    `current` holds the facts known by (kind, id). A change gets a revision above the one it replaces, also where clocks
    disagree.
    """
    changes: list[Change] = []
    for event in new.events:
        before = current.get((event.kind, event.id))
        if before is None:
            changes.append(Change(event, "new"))
            continue
        fields = tuple(
            (name, getattr(before, name), getattr(event, name))
            for name in event.__struct_fields__
            if name not in ("revision", "claimed_at_ms") and getattr(before, name) != getattr(event, name)
        )
        if fields:
            revision = max(event.revision, before.revision + 1)
            changes.append(Change(msgspec.structs.replace(event, revision=revision), "changed", fields))
    return changes


Entry = Callable[["_Parser", Any, str], None]


class _Parser:
    """Reads one file; `run` returns its events or raises all its problems."""

    def __init__(self, name: str, now_ms: int) -> None:
        self.reader = Reader(name)
        self.base: dict[str, Any] = {"revision": now_ms, "claimed_at_ms": now_ms}
        self.document = Document()

    def run(self, text: str, sections: Mapping[str, Entry]) -> Document:
        reader = self.reader
        try:
            tree = parse_yaml(text, reader.name)
        except SchemaError as error:
            raise DocumentError(str(error)) from error
        top = reader.mapping(tree, "", {"timezone": None, **sections})
        if top.get("timezone") is not None:
            reader.zone = reader.set_zone(top["timezone"], "timezone")
        for section, entry in sections.items():
            for path, value in reader.items(top, section):
                entry(self, value, path)
        if not reader.problems and not self.document.events:
            reader.problem("", f"there is nothing in it; write one of {', '.join(sections)}")
        if reader.problems:
            raise DocumentError("\n".join(reader.problems))
        return self.document

    def by_content(self, kind: type[F], value: Any, path: str, known: Mapping[str, Field]) -> None:
        """An entry whose id, where none is given, is made of pool, tenants and start."""
        before = len(self.reader.problems)
        given = self.reader.fields(value, path, known)
        if len(self.reader.problems) > before:
            return
        given.setdefault("id", _content_id(kind, given))
        self.add(kind, path, {_IN_EVENTS.get(key, key): entry for key, entry in given.items()})

    def add(self, kind: type[F], path: str, terms: Mapping[str, Any]) -> None:
        event = self.reader.build(kind, path, {**self.base, **terms})
        if event is None:
            return
        key = (event.kind, event.id)
        if key in self.document.positions:
            other = self.document.positions[key]
            self.reader.problem(path, f"is about the same as {other} ({event.id}); give one of them an `id` of its own")
            return
        self.document.positions[key] = f"{self.reader.name}: {path}"
        self.document.events.append(event)

    def tenant(self, value: Any, path: str) -> None:
        reader = self.reader
        before = len(reader.problems)
        given = reader.fields(value, path, _TENANT, also=("rules",))
        rules = [self._rule(entry, where) for where, entry in (reader.items(value, "rules", path) if given else ())]
        if len(reader.problems) == before:
            self.add(Tenant, path, {**given, "rules": rules})

    def _rule(self, value: Any, path: str) -> AccountRule | None:
        given = self.reader.fields(value, path, _RULE)
        matches = [key for key in _MATCHES if key in given]
        if len(matches) != 1:
            self.reader.problem(path, f"expected one of {', '.join(_MATCHES)}, got {' and '.join(matches) or 'none'}")
            return None
        terms = {_IN_EVENTS.get(key, key): entry for key, entry in given.items() if key not in _MATCHES}
        match = cast(Literal["account", "user", "namespace"], matches[0])
        return AccountRule(match=match, value=given[match], **terms)

    def tariff(self, value: Any, path: str, read_text: ReadText) -> None:
        reader = self.reader
        before = len(reader.problems)
        given = reader.fields(value, path, _TARIFF | _TARIFF_CSV, also=("prices", "timezone"))
        if len(reader.problems) > before:
            return
        if ("prices_csv" in given) == (value.get("prices") is not None):
            reader.problem(path, "expected either `prices` or `prices_csv`")
            return
        if "prices_csv" in given:
            series = self._csv(given, value, path, read_text)
            prices, end_ms = series if series else ([], 0)
        else:
            prices, end_ms = self._prices(value, path), given.get("end")
            if end_ms is None:
                reader.problem(f"{path}.end", "is missing: the last price holds until then")
        if len(reader.problems) == before:
            terms = {"id": given["id"], "currency": given["currency"], "prices": prices, "end_ms": end_ms}
            self.add(EnergyTariff, path, terms)

    def _prices(self, value: Mapping[str, Any], path: str) -> list[PricePoint]:
        points: list[PricePoint] = []
        for where, entry in self.reader.items(value, "prices", path):
            given = self.reader.fields(entry, where, _PRICE)
            if len(given) == len(_PRICE):
                points.append(PricePoint(given["start"], given["per_kwh"]))
        return points

    def _csv(
        self, given: Mapping[str, Any], value: Mapping[str, Any], path: str, read_text: ReadText
    ) -> tuple[list[PricePoint], int] | None:
        reader, file = self.reader, given["prices_csv"]
        zone: ZoneInfo | None = reader.zone
        if value.get("timezone") is not None:
            zone = reader.set_zone(value["timezone"], f"{path}.timezone")
        unit = given.get("unit", "per_kwh")
        if unit not in _UNITS:
            reader.problem(f"{path}.unit", f"expected one of {', '.join(_UNITS)}, got {unit}")
            return None
        if "end" in given:
            reader.problem(f"{path}.end", "is known from the last price of the CSV; remove it")
            return None
        names = {key: given[key] for key in ("time_column", "price_column", "resolution_minutes") if key in given}
        try:
            return parse_series(read_text(file), SeriesFormat(unit=unit, zone=zone, **names))
        except OSError as error:
            reader.problem(f"{path}.prices_csv", f"cannot read {file}: {error.strerror or error}")
        except ValueError as error:
            reader.problem(f"{path}.prices_csv", f"{file}, {error}")
        return None


def _content_id(kind: type[Fact], given: Mapping[str, Any]) -> str:
    start = datetime.fromtimestamp(given["start"] / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    if kind is AssetCost:
        return f"{given['pool']}/{start}"
    if kind is Transfer:
        return f"{given['pool']}/{given['from']}>{given['to']}/{start}"
    return f"{given['pool']}/{given.get('tenant') or '*'}/{start}"
