"""The events other than telemetry: facts with valid time, each carrying the whole fact.

Every event has an `id`, a `revision` and a claim time set by its producer; the greatest revision of an id is the fact
(ties: smaller node id, then content), so that an end heard before its start is complete and nothing depends on arrival.
Values are JSON objects with the field ``type``; unknown fields are ignored, missing or wrong ones are an error.
"""

from __future__ import annotations

from decimal import Decimal
from typing import Annotated, ClassVar, Literal

import msgspec
from msgspec import Meta

from gpuledger.schemas.exceptions import MessageError

__all__ = [
    "AccountRule",
    "Alert",
    "Allocation",
    "AssetCost",
    "Commitment",
    "DeadLetter",
    "Dirty",
    "EnergyTariff",
    "Event",
    "Fact",
    "Geometry",
    "Instance",
    "Inventory",
    "Job",
    "Placement",
    "PricePoint",
    "RateCard",
    "Tenant",
    "Transfer",
    "decode_event",
    "encode_event",
]

Name = Annotated[str, Meta(min_length=1, max_length=256)]
#: UTC milliseconds since 1970, from 2000-01-01 to 2200-01-01.
TimeMs = Annotated[int, Meta(ge=946_684_800_000, le=7_258_118_400_000)]
Revision = Annotated[int, Meta(ge=0, lt=2**43)]
GpuCount = Annotated[int, Meta(ge=0, le=10_000_000)]
Currency = Annotated[str, Meta(pattern="^[A-Z]{3}$")]

Source = Literal["slurm", "kubernetes", "manual", "process"]


class Event(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True, tag_field="type"):
    """Base of every message. `kind` is the value of the JSON field ``type``."""

    kind: ClassVar[str] = ""


class Fact(Event, frozen=True, kw_only=True):
    """Base of what is remembered. `revision` grows with every correction of the same `id` (milliseconds will do)."""

    id: Name
    revision: Revision
    claimed_at_ms: TimeMs


def _check_interval(start_ms: int, end_ms: int | None) -> None:
    if end_ms is not None and end_ms < start_ms:
        raise ValueError(f"end_ms: {end_ms} is before start_ms {start_ms}; an interval is [start, end)")


class Placement(Fact, frozen=True, kw_only=True, tag="placement"):
    """GPU x node x pool x [start, end). Of two that overlap for a GPU the newer claim wins; a conflict is shown."""

    kind: ClassVar[str] = "placement"
    gpu: Name
    node: Name
    pool: Name
    site: str = ""
    model: str = ""
    index: int | None = None
    pci_bus_id: str | None = None
    serial: str | None = None
    memory_total_bytes: int | None = None
    start_ms: TimeMs
    end_ms: TimeMs | None = None
    void: bool = False

    def __post_init__(self) -> None:
        _check_interval(self.start_ms, self.end_ms)


class Instance(msgspec.Struct, frozen=True, omit_defaults=True):
    """A MIG instance: its number, when it was made (numbers are used again), and how many slices it has."""

    instance: Annotated[int, Meta(ge=1, le=65535)]
    epoch_ms: TimeMs
    slices: Annotated[int, Meta(ge=1, le=64)]
    profile: str = ""


class Geometry(Fact, frozen=True, kw_only=True, tag="geometry"):
    """How a GPU is cut into MIG instances during [start, end). Of several in force the latest start counts; what no
    instance has is unsliced capacity. The interval ends where MIG is switched off."""

    kind: ClassVar[str] = "geometry"
    gpu: Name
    node: Name
    slices: Annotated[int, Meta(ge=1, le=64)] = 7
    instances: list[Instance] = []
    start_ms: TimeMs
    end_ms: TimeMs | None = None
    void: bool = False

    def __post_init__(self) -> None:
        _check_interval(self.start_ms, self.end_ms)
        names = [each.instance for each in self.instances]
        twice = next((name for n, name in enumerate(names) if name in names[:n]), None)
        if twice is not None:
            raise ValueError(f"instances: number {twice} is there twice; a geometry has each number once")
        if self.sliced > self.slices:
            raise ValueError(f"instances: have {self.sliced} slices of the GPU's {self.slices}")

    @property
    def sliced(self) -> int:
        """Slices that belong to instances."""
        return sum(each.slices for each in self.instances)


class Inventory(Event, frozen=True, kw_only=True, tag="inventory"):
    """A node as it is: sent at start, on change and hourly, keyed by node (compacted), with all its placements and the
    geometries of its GPUs in MIG mode."""

    kind: ClassVar[str] = "inventory"
    node: Name
    claimed_at_ms: TimeMs
    boot_id: str = ""
    agent_version: str = ""
    driver_version: str | None = None
    cuda_version: str | None = None
    config_hash: str = ""
    health: str = "ok"
    placements: list[Placement] = []
    geometries: list[Geometry] = []


class Allocation(Fact, frozen=True, kw_only=True, tag="allocation"):
    """Job x GPU (or MIG instance) x weight_num/weight_den x [start, end), as one source knows it.

    `end_ms` None means it runs. `epoch_ms` is that of the MIG instance, 0 where the source does not know it. `tenant`
    is set only where the source knows it; else the account map decides by `source`, `account`, `user` and `namespace`.
    A `void` allocation never happened.
    """

    kind: ClassVar[str] = "allocation"
    node: Name
    boot_id: str = ""
    gpu: Name
    instance: Annotated[int, Meta(ge=0, le=65535)] = 0
    epoch_ms: Annotated[int, Meta(ge=0, le=7_258_118_400_000)] = 0
    job_id: Name
    source: Source
    account: str = ""
    user: str = ""
    namespace: str = ""
    tenant: str = ""
    weight_num: Annotated[int, Meta(ge=0, le=1_000_000)] = 1
    weight_den: Annotated[int, Meta(ge=1, le=1_000_000)] = 1
    start_ms: TimeMs
    end_ms: TimeMs | None = None
    confidence_pct: Annotated[int, Meta(ge=0, le=100)] = 100
    void: bool = False

    def __post_init__(self) -> None:
        _check_interval(self.start_ms, self.end_ms)
        if self.weight_num > self.weight_den:
            raise ValueError(
                f"weight_num: {self.weight_num} of weight_den {self.weight_den} is more than the whole GPU"
            )


class Job(Fact, frozen=True, kw_only=True, tag="job"):
    """A job as its scheduler knows it; `id` is the job id that allocations name. Its end ends those of its allocations
    whose own end was never told (an epilog that was lost)."""

    kind: ClassVar[str] = "job"
    source: Source
    cluster: str = ""
    name: str = ""
    account: str = ""
    user: str = ""
    tenant: str = ""
    queue: str = ""
    gpus: GpuCount | None = None
    submitted_ms: TimeMs | None = None
    started_ms: TimeMs | None = None
    ended_ms: TimeMs | None = None
    state: str = ""
    tags: dict[str, str] = {}


class Commitment(Fact, frozen=True, kw_only=True, tag="commitment"):
    """Tenant x pool x number of GPUs x [start, end). Only those in state ``active`` count or bill."""

    kind: ClassVar[str] = "commitment"
    pool: Name
    tenant: Name
    gpus: GpuCount
    start_ms: TimeMs
    end_ms: TimeMs | None = None
    state: Literal["proposed", "contracted", "active", "ended", "cancelled"] = "active"
    contract: str = ""
    by: str = ""
    why: str = ""

    def __post_init__(self) -> None:
        _check_interval(self.start_ms, self.end_ms)


class Transfer(Fact, frozen=True, kw_only=True, tag="transfer"):
    """A dated move of `gpus` GPUs of a pool from one tenant's commitment to another's, for good or until `end_ms`."""

    kind: ClassVar[str] = "transfer"
    pool: Name
    gpus: Annotated[int, Meta(ge=1, le=10_000_000)]
    from_tenant: Name
    to_tenant: Name
    start_ms: TimeMs
    end_ms: TimeMs | None = None
    state: Literal["planned", "active", "cancelled"] = "active"
    by: str = ""
    why: str = ""

    def __post_init__(self) -> None:
        _check_interval(self.start_ms, self.end_ms)
        if self.from_tenant == self.to_tenant:
            raise ValueError(f"to_tenant: is from_tenant ({self.to_tenant}); a transfer moves between two tenants")


class AccountRule(msgspec.Struct, frozen=True, omit_defaults=True):
    """One line of the account map: what matches belongs to the tenant during [start, end). Patterns are exact."""

    match: Literal["account", "user", "namespace"]
    value: Name
    source: Source | None = None
    start_ms: TimeMs | None = None
    end_ms: TimeMs | None = None


class Tenant(Fact, frozen=True, kw_only=True, tag="tenant"):
    """Who pays, and what of the schedulers' names is theirs. `id` is the tenant; rules of all tenants make the map."""

    kind: ClassVar[str] = "tenant"
    name: str = ""
    contact: str = ""
    rules: list[AccountRule] = []


def _check_minute(field: str, value: int | None) -> None:
    if value is not None and value % 60_000:
        raise ValueError(f"{field}: {value} is not on a UTC minute; rates change on minute boundaries only")


#: Beyond it a number is a slip, and "1e999999" would keep a process busy for hours.
_DECIMAL_DIGITS = 20


def _check_decimal(field: str, value: Decimal | None, places: int) -> None:
    """Refuses what cannot be added up exactly; here, so that it never reaches a computation."""
    if value is None:
        return
    if not value.is_finite():
        raise ValueError(f"{field}: {value} is not a number")
    exponent = value.as_tuple().exponent
    if value.adjusted() >= _DECIMAL_DIGITS:  # comparing could overflow
        raise ValueError(f"{field}: {value} is too large; check the decimal point and the unit")
    if isinstance(exponent, int) and exponent < -places:
        raise ValueError(f"{field}: {value} has more than {places} decimals; round it")


class AssetCost(Fact, frozen=True, kw_only=True, tag="asset_cost"):
    """What the operator pays for a pool over one period, spread evenly over its minutes, and its energy terms.

    The fixed cost of minute k of N is floor(T(k+1)/N) - floor(Tk/N) nano-units, T = `period_cost`.
    Energy cost = GPU energy x `node_energy_factor` x `pue` x the tariff's price; no tariff, no energy cost.
    """

    kind: ClassVar[str] = "asset_cost"
    pool: Name
    currency: Currency
    period_cost: Decimal
    start_ms: TimeMs
    end_ms: TimeMs
    pue: Decimal = Decimal(1)
    node_energy_factor: Decimal = Decimal(1)
    tariff: str = ""

    def __post_init__(self) -> None:
        _check_interval(self.start_ms, self.end_ms)
        _check_minute("start_ms", self.start_ms)
        _check_minute("end_ms", self.end_ms)
        if self.end_ms == self.start_ms:
            raise ValueError("end_ms: the period has no minutes")
        _check_decimal("period_cost", self.period_cost, 9)
        _check_decimal("pue", self.pue, 18)
        _check_decimal("node_energy_factor", self.node_energy_factor, 18)
        if self.pue < 1:
            raise ValueError(f"pue: expected 1 or more, got {self.pue}")
        if self.node_energy_factor <= 0:
            raise ValueError(f"node_energy_factor: expected more than 0, got {self.node_energy_factor}")


class PricePoint(msgspec.Struct, frozen=True):
    """The price per kWh from `start_ms` to the next point's start (or the tariff's end)."""

    start_ms: TimeMs
    per_kwh: Decimal

    def __post_init__(self) -> None:
        _check_decimal("per_kwh", self.per_kwh, 18)


class EnergyTariff(Fact, frozen=True, kw_only=True, tag="energy_tariff"):
    """Prices of electricity over [first point, end): contiguous UTC intervals on minutes, negative prices included."""

    kind: ClassVar[str] = "energy_tariff"
    currency: Currency
    prices: Annotated[list[PricePoint], Meta(min_length=1)]
    end_ms: TimeMs

    def __post_init__(self) -> None:
        last = None
        for n, point in enumerate(self.prices):
            _check_minute(f"prices[{n}].start_ms", point.start_ms)
            if last is not None and point.start_ms <= last:
                raise ValueError(f"prices[{n}].start_ms: {point.start_ms} is not after {last}; sort the intervals")
            last = point.start_ms
        if last is not None and self.end_ms <= last:
            raise ValueError(f"end_ms: {self.end_ms} is not after the last price's start {last}")
        _check_minute("end_ms", self.end_ms)


class RateCard(Fact, frozen=True, kw_only=True, tag="rate_card"):
    """What a tenant pays for a pool: a flat price per GPU-hour held; `tenant` "" is everybody without an own card.

    `reserved_unused_per_gpu_hour` prices the GPU-hours a tenant reserved and did not use; None: not charged.
    `reserved_unused_payer` says who bears their asset cost.
    """

    kind: ClassVar[str] = "rate_card"
    pool: Name
    tenant: str = ""
    currency: Currency
    per_gpu_hour: Decimal
    reserved_unused_per_gpu_hour: Decimal | None = None
    reserved_unused_payer: Literal["owner", "operator"] = "owner"
    start_ms: TimeMs
    end_ms: TimeMs | None = None

    def __post_init__(self) -> None:
        _check_interval(self.start_ms, self.end_ms)
        _check_minute("start_ms", self.start_ms)
        _check_minute("end_ms", self.end_ms)
        _check_decimal("per_gpu_hour", self.per_gpu_hour, 9)
        _check_decimal("reserved_unused_per_gpu_hour", self.reserved_unused_per_gpu_hour, 9)


class Dirty(Event, frozen=True, kw_only=True, tag="dirty"):
    """Minutes [from_ms, to_ms) of a pool to compute again, and why. Bounds are widened to whole minutes."""

    kind: ClassVar[str] = "dirty"
    pool: Name
    from_ms: TimeMs
    to_ms: TimeMs
    why: str = ""


class Alert(Fact, frozen=True, kw_only=True, tag="alert"):
    """An alert with the money at stake, or its end. `id` is the fingerprint: the same trouble has the same id."""

    kind: ClassVar[str] = "alert"
    rule: Name
    status: Literal["firing", "resolved"]
    severity: Literal["info", "warning", "critical"] = "warning"
    pool: str = ""
    tenant: str = ""
    started_at_ms: TimeMs
    ended_at_ms: TimeMs | None = None
    money_per_hour: Decimal | None = None
    currency: str = ""
    summary: str = ""
    action: str = ""
    evidence: dict[str, str] = {}

    def __post_init__(self) -> None:
        if self.ended_at_ms is not None and self.ended_at_ms < self.started_at_ms:
            raise ValueError(f"ended_at_ms: {self.ended_at_ms} is before started_at_ms {self.started_at_ms}")
        _check_decimal("money_per_hour", self.money_per_hour, 9)


class DeadLetter(Event, frozen=True, kw_only=True, tag="dead_letter"):
    """A message that could not be read: where it was, why, and its bytes (base64 in JSON) up to a limit.

    `last_offset` is set where the letter stands for a whole batch of records that could not be unpacked. `complete`
    letters hold the whole message: key (None: it had none), value (`no_value`: it had none) and headers.
    """

    kind: ClassVar[str] = "dead_letter"
    topic: Name
    partition: int
    offset: int
    last_offset: int | None = None
    appended_at_ms: int
    reason: str
    key: bytes | None = None
    value: bytes = b""
    value_bytes: int = 0
    no_value: bool = False
    headers: list[tuple[str, bytes | None]] = []
    complete: bool = False


AnyEvent = (
    Placement
    | Geometry
    | Inventory
    | Allocation
    | Job
    | Commitment
    | Transfer
    | Tenant
    | AssetCost
    | EnergyTariff
    | RateCard
    | Dirty
    | Alert
    | DeadLetter
)
_decoder: msgspec.json.Decoder[AnyEvent] = msgspec.json.Decoder(AnyEvent)
_encoder = msgspec.json.Encoder(decimal_format="string")


def encode_event(event: Event) -> bytes:
    """The event as JSON; decimals as strings."""
    return _encoder.encode(event)


def decode_event(data: bytes) -> AnyEvent:
    """One event from its JSON.

    Raises:
        MessageError: not JSON, an unknown ``type``, or a field that is missing or wrong (its path is in the text).
    """
    try:
        return _decoder.decode(data)
    except RecursionError as error:
        raise MessageError("JSON is nested too deeply; no event has more than a few levels") from error
    except (msgspec.DecodeError, ValueError, OverflowError) as error:
        raise MessageError(str(error)) from error
