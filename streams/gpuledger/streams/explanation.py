"""What can be said of one GPU in one minute: its segments, the facts and fragments they rest on, what superseded what,
and the money. Fields ending in `_ms` are moments in UTC milliseconds, `_us` amounts of GPU-microseconds, `_mj`
millijoules; None is not known.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from decimal import Decimal
from typing import Literal

__all__ = [
    "Change",
    "ChargeShare",
    "Claim",
    "Explanation",
    "FactHistory",
    "Gap",
    "Mark",
    "MinuteVersion",
    "Oddity",
    "Placed",
    "PoolMinute",
    "PoolRow",
    "Revision",
    "Seen",
    "SeenPart",
    "Segment",
    "TenantPart",
]


@dataclass(frozen=True, slots=True)
class Change:
    """One field of a fact before and after a revision; None: the field was not there (its default held)."""

    field: str
    before: str | None
    after: str | None


@dataclass(frozen=True, slots=True)
class Revision:
    """One revision of a fact and where it was learnt first.

    `state`: counts (it is the fact now), superseded, or late: it came when a greater revision was there already, and
    never counted. `changes` are against the revision before it in order of revision; the first one has none.
    """

    revision: int
    claimed_ms: int
    learnt_ms: int
    topic: str
    partition: int
    offset: int
    state: Literal["counts", "superseded", "late"]
    changes: list[Change] = field(default_factory=list[Change])


@dataclass(frozen=True, slots=True)
class FactHistory:
    """Every stored revision of one fact, in order of revision; the last one counts. `about` is it in a few words."""

    kind: str
    id: str
    about: str
    revisions: list[Revision]

    @property
    def current(self) -> Revision:
        """The revision that counts."""
        return self.revisions[-1]


@dataclass(frozen=True, slots=True)
class Placed:
    """A placement of the GPU that touches the minute. `serves` are the stretches of the minute in which it decides."""

    id: str
    node: str
    pool: str
    start_ms: int
    end_ms: int | None
    claimed_ms: int
    serves: list[tuple[int, int]]
    beaten_by: str


@dataclass(frozen=True, slots=True)
class TenantPart:
    """Who pays for an allocation during [start_ms, end_ms) of the minute, and which rule says so."""

    tenant: str
    start_ms: int
    end_ms: int
    because: str


@dataclass(frozen=True, slots=True)
class Claim:
    """An allocation that touches the minute.

    `end_ms` is what its source says; `ends_ms` what counts, with `ended_by` ("its source", "job …", "boot …"; empty: it
    runs on). An open one is confirmed until `confirmed_until_ms`; `named_ms` is the last batch that named it.
    `counts` are the stretches of the minute in which it holds the GPU; `not_counted` says why it does not elsewhere.
    """

    id: str
    job_id: str
    source: str
    user: str
    node: str
    instance: int
    epoch_ms: int
    weight: str
    start_ms: int
    end_ms: int | None
    ends_ms: int | None
    ended_by: str
    named_ms: int | None
    confirmed_until_ms: int | None
    tenants: list[TenantPart]
    counts: list[tuple[int, int]]
    not_counted: str


@dataclass(frozen=True, slots=True)
class SeenPart:
    """A segment of a fragment: [start_ms, end_ms) of one activity, of which `believed` counts; energy counter at both
    ends. `instead` is the run that is believed in the rest."""

    start_ms: int
    end_ms: int
    activity: str
    energy_from_mj: int | None
    energy_to_mj: int | None
    believed: list[tuple[int, int]]
    instead: str


@dataclass(frozen=True, slots=True)
class Seen:
    """A fragment: what batch `seq` of a run saw the GPU (instance 0) or an instance do in the minute."""

    instance: int
    epoch_ms: int
    run_id: str
    run_start_ms: int
    seq: int
    node: str
    appended_ms: int
    samples: int
    parts: list[SeenPart]


@dataclass(frozen=True, slots=True)
class Segment:
    """A row of the GPU's minute. `facts` are ids of allocations; `fragments` are (run id, sequence number)."""

    kind: str
    tenant: str
    job_id: str
    instance: int
    activity: str
    gpu_us: int
    energy_mj: int | None
    facts: list[str]
    fragments: list[tuple[str, int]]


@dataclass(frozen=True, slots=True)
class Mark:
    """A dirty mark that covers the minute: what made it, and when the broker had it."""

    offset: int
    appended_ms: int
    why: str


@dataclass(frozen=True, slots=True)
class MinuteVersion:
    """A computation of the (pool, minute) that is still stored, wholly or in rows that no later one replaced.

    `service_us`, `complete` and `fragments` are of its marker, None where that is gone. `gpu_rows` are the rows of this
    GPU that it wrote and that are still there. `marks` led to it, oldest first; None: nobody could be asked.
    """

    epoch: int
    offset: int
    random: int
    counts: bool
    complete: bool | None
    service_us: int | None
    fragments: int | None
    gpu_rows: list[Segment]
    marks: list[Mark] | None = None


@dataclass(frozen=True, slots=True)
class PoolRow:
    """What the pool's minute says of time that nobody held: kind, and the tenant that reserved it ("" for none)."""

    kind: str
    tenant: str
    gpu_us: int
    energy_mj: int | None


@dataclass(frozen=True, slots=True)
class ChargeShare:
    """A row of the price interval's money, and the minute's share of it for this GPU.

    The row is booked; the share is not: cost follows per interval. It divides the row's fixed cost and charge by GPU
    time and its energy cost by energy. The GPU's time that nobody held is divided over the pool's rows of such time.
    """

    interval_start_ms: int
    interval_end_ms: int
    tenant: str
    job_id: str
    kind: str
    activity: str
    payer: str
    row_us: int
    row_asset_cost: Decimal | None
    row_charge: Decimal | None
    asset_currency: str
    charge_currency: str
    rate_card: str
    estimate: bool
    incomplete: bool
    share_us: int
    share_asset_cost: Decimal | None
    share_charge: Decimal | None


@dataclass(frozen=True, slots=True)
class PoolMinute:
    """The GPU's part of one pool's minute.

    `stored`: `segments` are the rows that are stored (else they were computed for this answer, because of `why_not`).
    `agrees`: whether computing them again from what is stored now gives the same; None where nothing is stored.
    """

    pool: str
    complete: bool
    service_us: int
    segments: list[Segment]
    stored: bool
    why_not: str
    agrees: bool | None
    versions: list[MinuteVersion]
    unheld: list[PoolRow]
    money: list[ChargeShare]

    @property
    def segments_us(self) -> int:
        """What the segments sum to; `service_us` where the ledger is right."""
        return sum(segment.gpu_us for segment in self.segments)


@dataclass(frozen=True, slots=True)
class Gap:
    """Batches that a node's spool dropped, as its agent states."""

    node: str
    run_id: str
    first_seq: int
    last_seq: int
    from_ms: int
    to_ms: int
    batches: int
    reason: str


@dataclass(frozen=True, slots=True)
class Oddity:
    """A conflict row that touches the GPU and the minute."""

    pool: str
    kind: str
    subject: str
    other: str
    from_ms: int
    to_ms: int
    detail: str


@dataclass(frozen=True, slots=True)
class Explanation:
    """Everything about one GPU and the minute from `minute_ms`. `notes` say plainly what is not known, and why.

    Minutes that end before `complete_until_ms` are complete; `held_back_by` names the partition that decides it.
    """

    gpu: str
    minute_ms: int
    complete_until_ms: int
    held_back_by: str
    notes: list[str]
    pools: list[PoolMinute]
    placements: list[Placed]
    claims: list[Claim]
    fragments: list[Seen]
    gaps: list[Gap]
    conflicts: list[Oddity]
    facts: list[FactHistory]
