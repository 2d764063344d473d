"""A scenario: the fleet, the tenants, what happens when, and what it costs, as a YAML file.

Times are whole seconds from the start of the simulation (`_s`), shares are whole percents (`_pct`), money is decimal;
so a scenario and its seed say exactly what will be published.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from gpuledger.agents.exceptions import ScenarioError
from gpuledger.schemas.exceptions import SchemaError
from gpuledger.schemas.yaml_text import parse_yaml

__all__ = [
    "AssetCostPlan",
    "CommitmentPlan",
    "Demand",
    "Duty",
    "Failure",
    "JobMix",
    "JobSize",
    "PoolPlan",
    "RateCardPlan",
    "Reconfiguration",
    "Scenario",
    "SitePlan",
    "TariffPlan",
    "TenantPlan",
    "TransferPlan",
    "demo_scenario_path",
    "load_scenario",
    "parse_scenario",
]

Id = Annotated[str, Meta(pattern="^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]
Seconds = Annotated[int, Meta(ge=0, le=315_360_000)]
Percent = Annotated[int, Meta(ge=0, le=100)]
Count = Annotated[int, Meta(ge=1, le=1_000_000)]
Money = Annotated[Decimal, Meta()]
Currency = Annotated[str, Meta(pattern="^[A-Z]{3}$")]

#: The whole of a GPU for shared jobs: every weight 1/2 ... 1/8 is a whole number of it.
UNITS_PER_GPU = 840
#: Slices of a GPU in MIG mode.
MIG_SLICES = 7
UNITS_PER_SLICE = UNITS_PER_GPU // MIG_SLICES

Slices = Annotated[list[Annotated[int, Meta(ge=1, le=MIG_SLICES)]], Meta(max_length=MIG_SLICES)]


class _Plan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of every part of a scenario."""


class SitePlan(_Plan, frozen=True, kw_only=True):
    name: Id
    country: Annotated[str, Meta(pattern="^[A-Z]{2}$")] = "NO"
    pue: Money = Decimal(1)


class PoolPlan(_Plan, frozen=True, kw_only=True):
    """`nodes` nodes of `gpus_per_node` GPUs, named ``<pool>-0001`` and on.

    `mig`: the slices of each MIG instance into which every GPU is cut; none: whole GPUs. Only jobs smaller than a GPU
    run on instances, one each.
    """

    name: Id
    site: Id
    model: str
    nodes: Count
    gpus_per_node: Annotated[int, Meta(ge=1, le=64)] = 8
    memory_gib: Annotated[int, Meta(ge=1, le=4096)] = 80
    tdp_w: Annotated[int, Meta(ge=1, le=5000)] = 700
    idle_w: Annotated[int, Meta(ge=0, le=5000)] = 70
    sm_clock_mhz: Annotated[int, Meta(ge=1, le=10_000)] = 1980
    memory_clock_mhz: Annotated[int, Meta(ge=1, le=20_000)] = 2619
    mig: Slices = []

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node


class JobSize(_Plan, frozen=True, kw_only=True):
    """`gpus` a whole number, or a part of one GPU as ``1/2`` to ``1/8`` (several then share it)."""

    gpus: int | str
    weight: Count = 1

    def units(self) -> int:
        """The size in `UNITS_PER_GPU`.

        Raises:
            ValueError: neither a whole number of GPUs nor ``1/2`` to ``1/8``.
        """
        if isinstance(self.gpus, int) and self.gpus >= 1:
            return self.gpus * UNITS_PER_GPU
        match = re.fullmatch(r"1/([2-8])", str(self.gpus))
        if match is None:
            raise ValueError(f'expected a whole number of GPUs or "1/2" to "1/8", got {self.gpus!r}')
        return UNITS_PER_GPU // int(match[1])


class Duty(_Plan, frozen=True, kw_only=True):
    """How a job uses its GPUs: busy for `active_s` at `level_pct` of the SMs, then idle for `idle_s`, again and again.

    `level_pct` 0 is a job that holds its GPUs and does nothing.
    """

    name: Id
    weight: Count = 1
    active_s: Annotated[int, Meta(ge=1, le=864_000)] = 60
    idle_s: Annotated[int, Meta(ge=0, le=864_000)] = 0
    level_pct: Percent = 90
    tensor_pct: Percent = 55
    dram_pct: Percent = 45
    memory_pct: Percent = 80


class JobMix(_Plan, frozen=True, kw_only=True):
    """What jobs of a tenant look like; sizes and duties are drawn by weight, durations between the bounds (log-even).

    `arrivals_per_hour` None: a job comes whenever the tenant holds less than it wants; else jobs come at random at
    that rate and wait for what the tenant wants.
    """

    sizes: Annotated[list[JobSize], Meta(min_length=1)]
    duties: Annotated[list[Duty], Meta(min_length=1)]
    shortest_s: Annotated[int, Meta(ge=1, le=31_536_000)] = 120
    longest_s: Annotated[int, Meta(ge=1, le=31_536_000)] = 3600
    arrivals_per_hour: Annotated[int, Meta(ge=1, le=1_000_000)] | None = None


class Demand(_Plan, frozen=True, kw_only=True):
    """How much of a pool a tenant wants to hold: a share of what it has committed, or a number of GPUs.

    A number may lie above the commitment: the rest is taken from capacity that nobody reserved, while there is some.
    The wish swings by `swing_pct` around it, once in `swing_period_s`.
    """

    pool: Id
    share_pct: Percent | None = None
    gpus: Count | None = None
    swing_pct: Percent = 5
    swing_period_s: Annotated[int, Meta(ge=1, le=31_536_000)] = 300
    ramp_gpus_per_s: Count = 50


class TenantPlan(_Plan, frozen=True, kw_only=True):
    """Its jobs run under its `accounts`, by turns; the account map sends them to it."""

    id: Id
    name: str = ""
    accounts: Annotated[list[Id], Meta(min_length=1)]
    demand: Annotated[list[Demand], Meta(min_length=1)]
    jobs: JobMix


class CommitmentPlan(_Plan, frozen=True, kw_only=True):
    pool: Id
    tenant: Id
    gpus: Count
    from_s: Seconds = 0
    until_s: Seconds | None = None
    contract: str = ""


class TransferPlan(_Plan, frozen=True, kw_only=True):
    """Announced at the start (``planned``), effective at `at_s`; the receiver's jobs grow afterwards."""

    pool: Id
    gpus: Count
    from_tenant: Id
    to_tenant: Id
    at_s: Seconds
    until_s: Seconds | None = None
    by: str = ""
    why: str = ""


class Failure(_Plan, frozen=True, kw_only=True):
    """What breaks on the node of number `node` (from 1) of a pool at `at_s` for `for_s`.

    ``node_reboot``: jobs end, nothing is sent, a new boot comes back. ``gpu_lost``: GPU `gpu` (from 0) says `down` and
    its jobs end. ``agent_gap``: only the agent is away; jobs go on.
    """

    kind: Literal["node_reboot", "gpu_lost", "agent_gap"]
    pool: Id
    node: Count
    gpu: Annotated[int, Meta(ge=0, le=63)] = 0
    at_s: Seconds
    for_s: Annotated[int, Meta(ge=1, le=31_536_000)]


class Reconfiguration(_Plan, frozen=True, kw_only=True):
    """A GPU of a pool with `mig` is cut anew at `at_s`, into instances of these `slices`; its jobs end."""

    pool: Id
    node: Count
    gpu: Annotated[int, Meta(ge=0, le=63)] = 0
    at_s: Seconds
    slices: Slices


class Delivery(_Plan, frozen=True, kw_only=True):
    """Shares of batches, in thousandths, that come late (by `late_by_s`) and that come twice."""

    late_permille: Annotated[int, Meta(ge=0, le=1000)] = 0
    late_by_s: Annotated[int, Meta(ge=1, le=86_400)] = 30
    duplicate_permille: Annotated[int, Meta(ge=0, le=1000)] = 0


class TariffPlan(_Plan, frozen=True, kw_only=True):
    """A price per kWh that moves every `step_minutes` within `swing_pct` of `per_kwh`, as the seed has it."""

    name: Id
    currency: Currency
    per_kwh: Money
    swing_pct: Annotated[int, Meta(ge=0, le=1000)] = 30
    step_minutes: Annotated[int, Meta(ge=1, le=1440)] = 5


class AssetCostPlan(_Plan, frozen=True, kw_only=True):
    """`period_cost` for each period of `period_days`, the first one from the UTC midnight before the start."""

    pool: Id
    currency: Currency
    period_cost: Money
    period_days: Annotated[int, Meta(ge=1, le=3660)] = 30
    node_energy_factor: Money = Decimal(1)
    tariff: str = ""


class RateCardPlan(_Plan, frozen=True, kw_only=True):
    pool: Id
    tenant: str = ""
    currency: Currency
    per_gpu_hour: Money
    reserved_unused_per_gpu_hour: Money | None = None
    reserved_unused_payer: Literal["owner", "operator"] = "owner"


class Scenario(_Plan, frozen=True, kw_only=True):
    """Everything; `start_back_s` and `speed` make a past that is published faster than it happened."""

    name: Id
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] = 1
    period_ms: Annotated[int, Meta(ge=100, le=60_000)] = 1000
    flush_ms: Annotated[int, Meta(ge=100, le=600_000)] = 5000
    speed: Annotated[int, Meta(ge=1, le=100_000)] = 1
    start_back_s: Seconds = 0
    sites: Annotated[list[SitePlan], Meta(min_length=1)]
    pools: Annotated[list[PoolPlan], Meta(min_length=1)]
    tenants: list[TenantPlan] = []
    commitments: list[CommitmentPlan] = []
    transfers: list[TransferPlan] = []
    failures: list[Failure] = []
    reconfigurations: list[Reconfiguration] = []
    delivery: Delivery = Delivery()
    tariffs: list[TariffPlan] = []
    asset_costs: list[AssetCostPlan] = []
    rate_cards: list[RateCardPlan] = []

    def site(self, name: str) -> SitePlan:
        return next(site for site in self.sites if site.name == name)

    def pool(self, name: str) -> PoolPlan:
        return next(pool for pool in self.pools if pool.name == name)

    @property
    def gpus(self) -> int:
        return sum(pool.gpus for pool in self.pools)


def _known(value: str, names: set[str], what: str) -> str | None:
    if value in names:
        return None
    return f"there is no {what} {value!r}; expected one of {', '.join(sorted(names)) or '(none defined)'}"


def _reference_problems(scenario: Scenario) -> Iterator[tuple[str, str | None]]:
    sites = {site.name for site in scenario.sites}
    pools = {pool.name for pool in scenario.pools}
    tenants = {tenant.id for tenant in scenario.tenants}
    tariffs = {tariff.name for tariff in scenario.tariffs}
    for n, pool in enumerate(scenario.pools):
        yield f"pools[{n}].site", _known(pool.site, sites, "site")
    for n, tenant in enumerate(scenario.tenants):
        for m, demand in enumerate(tenant.demand):
            yield f"tenants[{n}].demand[{m}].pool", _known(demand.pool, pools, "pool")
    for n, plan in enumerate(scenario.commitments):
        yield f"commitments[{n}].pool", _known(plan.pool, pools, "pool")
        yield f"commitments[{n}].tenant", _known(plan.tenant, tenants, "tenant")
    for n, move in enumerate(scenario.transfers):
        yield f"transfers[{n}].pool", _known(move.pool, pools, "pool")
        yield f"transfers[{n}].from_tenant", _known(move.from_tenant, tenants, "tenant")
        yield f"transfers[{n}].to_tenant", _known(move.to_tenant, tenants, "tenant")
    for n, failure in enumerate(scenario.failures):
        yield f"failures[{n}].pool", _known(failure.pool, pools, "pool")
    for n, change in enumerate(scenario.reconfigurations):
        yield f"reconfigurations[{n}].pool", _known(change.pool, pools, "pool")
    for n, cost in enumerate(scenario.asset_costs):
        yield f"asset_costs[{n}].pool", _known(cost.pool, pools, "pool")
        if cost.tariff:
            yield f"asset_costs[{n}].tariff", _known(cost.tariff, tariffs, "tariff")
    for n, card in enumerate(scenario.rate_cards):
        yield f"rate_cards[{n}].pool", _known(card.pool, pools, "pool")
        if card.tenant:
            yield f"rate_cards[{n}].tenant", _known(card.tenant, tenants, "tenant")


def _value_problems(scenario: Scenario) -> Iterator[tuple[str, str | None]]:
    for field, names in (
        ("sites", [site.name for site in scenario.sites]),
        ("pools", [pool.name for pool in scenario.pools]),
        ("tenants", [tenant.id for tenant in scenario.tenants]),
        ("tariffs", [tariff.name for tariff in scenario.tariffs]),
    ):
        twice = next((name for n, name in enumerate(names) if name in names[:n]), None)
        yield field, f"{twice!r} is there twice; give each its own name" if twice is not None else None
    if scenario.flush_ms % scenario.period_ms:
        yield "flush_ms", f"expected a multiple of period_ms {scenario.period_ms}, got {scenario.flush_ms}"
    for n, site in enumerate(scenario.sites):
        yield f"sites[{n}].pue", None if site.pue >= 1 else f"expected 1 or more, got {site.pue}"
    for n, pool in enumerate(scenario.pools):
        low = pool.idle_w > pool.tdp_w
        yield f"pools[{n}].idle_w", f"{pool.idle_w} is more than tdp_w {pool.tdp_w}" if low else None
        yield f"pools[{n}].mig", _too_many_slices(pool.mig)
    for n, tenant in enumerate(scenario.tenants):
        yield from _tenant_problems(f"tenants[{n}]", tenant)
    for field, places in (("failures", scenario.failures), ("reconfigurations", scenario.reconfigurations)):
        for n, place in enumerate(places):
            yield from _place_problems(f"{field}[{n}]", place, scenario)
    for n, move in enumerate(scenario.transfers):
        if move.from_tenant == move.to_tenant:
            yield f"transfers[{n}].to_tenant", f"is from_tenant ({move.to_tenant}); a transfer needs two tenants"
        held = _committed(scenario, move)
        if held < move.gpus:
            yield (
                f"transfers[{n}].gpus",
                f"{move.from_tenant} has {held} GPUs of {move.pool} at {move.at_s} s, got {move.gpus}",
            )


def _too_many_slices(slices: list[int]) -> str | None:
    return f"{sum(slices)} slices are more than the {MIG_SLICES} of a GPU" if sum(slices) > MIG_SLICES else None


def _place_problems(
    path: str, place: Failure | Reconfiguration, scenario: Scenario
) -> Iterator[tuple[str, str | None]]:
    pool = next((pool for pool in scenario.pools if pool.name == place.pool), None)
    if pool is None:
        return
    if place.node > pool.nodes:
        yield f"{path}.node", f"pool {pool.name} has {pool.nodes} nodes, got {place.node}"
    if place.gpu >= pool.gpus_per_node:
        yield f"{path}.gpu", f"expected 0 to {pool.gpus_per_node - 1}, got {place.gpu}"
    if isinstance(place, Reconfiguration):
        yield f"{path}.slices", _too_many_slices(place.slices)
        yield f"{path}.pool", None if pool.mig else f"pool {pool.name} has no mig: its GPUs are not in MIG mode"


def _committed(scenario: Scenario, move: TransferPlan) -> int:
    """What the giver of a transfer holds just before it."""

    def runs(start_s: int, end_s: int | None) -> bool:
        return start_s <= move.at_s and (end_s is None or move.at_s < end_s)

    held = sum(
        plan.gpus
        for plan in scenario.commitments
        if (plan.pool, plan.tenant) == (move.pool, move.from_tenant) and runs(plan.from_s, plan.until_s)
    )
    for other in scenario.transfers:
        if other is not move and other.pool == move.pool and runs(other.at_s, other.until_s):
            held += other.gpus * ((other.to_tenant == move.from_tenant) - (other.from_tenant == move.from_tenant))
    return held


def _tenant_problems(path: str, tenant: TenantPlan) -> Iterator[tuple[str, str | None]]:
    pools = [demand.pool for demand in tenant.demand]
    for m, demand in enumerate(tenant.demand):
        if demand.pool in pools[:m]:
            yield f"{path}.demand[{m}].pool", f"{demand.pool!r} is there twice; a tenant has one demand per pool"
        if (demand.share_pct is None) == (demand.gpus is None):
            yield f"{path}.demand[{m}]", "expected either share_pct or gpus"
    for m, size in enumerate(tenant.jobs.sizes):
        try:
            size.units()
        except ValueError as error:
            yield f"{path}.jobs.sizes[{m}].gpus", str(error)
    if tenant.jobs.longest_s < tenant.jobs.shortest_s:
        yield f"{path}.jobs.longest_s", f"{tenant.jobs.longest_s} is less than shortest_s {tenant.jobs.shortest_s}"


def parse_scenario(text: str, name: str) -> Scenario:
    """The scenario of a YAML text; `name` (the file) starts every error.

    Raises:
        ScenarioError: one line per problem: file, path, what was found and what was expected.
    """
    try:
        scenario = msgspec.convert(parse_yaml(text, name), Scenario)
    except SchemaError as error:
        raise ScenarioError(str(error)) from error
    except msgspec.ValidationError as error:
        complaint, _, path = str(error).partition(" - at `$")
        raise ScenarioError(f"{name}: {path.rstrip('`').lstrip('.') or 'the file'}: {complaint}") from error
    problems = [*_reference_problems(scenario), *_value_problems(scenario)]
    lines = [f"{name}: {path}: {complaint}" for path, complaint in problems if complaint is not None]
    if lines:
        raise ScenarioError("\n".join(lines))
    return scenario


def load_scenario(path: Path) -> Scenario:
    """The scenario of a file.

    Raises:
        ScenarioError: it cannot be read, or is wrong (see `parse_scenario`).
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ScenarioError(f"{path}: cannot be read: {error}; write the path of a scenario file") from error
    return parse_scenario(text, str(path))


def demo_scenario_path() -> Path:
    """The scenario that `gpuledger up` runs when none is named."""
    return Path(__file__).with_name("demo.yaml")
