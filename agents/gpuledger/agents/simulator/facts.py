"""The facts of a scenario as events: tenants, commitments, transfers, prices and costs.

Pure functions of the scenario and its start: published again they are the same facts with the same revisions, and a
longer simulation only adds price points and cost periods.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from decimal import Decimal

from gpuledger.agents.simulator.scenario import Scenario, TariffPlan, TransferPlan
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

__all__ = ["DAY_MS", "capacity_facts", "entitlements", "rate_facts", "transfer_fact"]

DAY_MS = 86_400_000
_MINUTE_MS = 60_000
#: Prices reach this far ahead, so that every open minute has one; they are extended when half of it is used.
_HORIZON_MS = DAY_MS


def _end(start_ms: int, until_s: int | None) -> int | None:
    return None if until_s is None else start_ms + until_s * 1000


def rate_facts(scenario: Scenario, start_ms: int, now_ms: int) -> Iterator[Fact]:
    """Tenants, tariffs, asset costs and rate cards as they are published at `now_ms` of a simulation of `start_ms`."""
    first_day = start_ms - start_ms % DAY_MS
    # The books open with the site: a day's cost before its first GPU would only be the operator's.
    opened = start_ms - start_ms % _MINUTE_MS
    for tenant in scenario.tenants:
        rules = [AccountRule(match="account", value=account) for account in tenant.accounts]
        yield Tenant(id=tenant.id, revision=start_ms, claimed_at_ms=start_ms, name=tenant.name, rules=rules)
    for tariff in scenario.tariffs:
        yield _tariff(tariff, scenario.seed, first_day, now_ms)
    for plan in scenario.asset_costs:
        site = scenario.site(scenario.pool(plan.pool).site)
        length = plan.period_days * DAY_MS
        for n in range((now_ms + _HORIZON_MS - opened) // length + 1):
            yield AssetCost(
                id=f"{scenario.name}:cost:{plan.pool}:{n}",
                revision=start_ms,
                claimed_at_ms=start_ms,
                pool=plan.pool,
                currency=plan.currency,
                period_cost=plan.period_cost,
                start_ms=opened + n * length,
                end_ms=opened + (n + 1) * length,
                pue=site.pue,
                node_energy_factor=plan.node_energy_factor,
                tariff=plan.tariff,
            )
    for card in scenario.rate_cards:
        yield RateCard(
            id=f"{scenario.name}:card:{card.pool}:{card.tenant or 'everybody'}",
            revision=start_ms,
            claimed_at_ms=start_ms,
            pool=card.pool,
            tenant=card.tenant,
            currency=card.currency,
            per_gpu_hour=card.per_gpu_hour,
            reserved_unused_per_gpu_hour=card.reserved_unused_per_gpu_hour,
            reserved_unused_payer=card.reserved_unused_payer,
            start_ms=opened,
        )


def _tariff(plan: TariffPlan, seed: int, first_ms: int, now_ms: int) -> EnergyTariff:
    """All prices from the first midnight to the end of the horizon; each depends on the seed and its number alone."""
    step = plan.step_minutes * _MINUTE_MS
    # A revision per half horizon: the same simulation publishes the same bytes whenever it is asked.
    half = _HORIZON_MS // 2
    revision_ms = first_ms + (now_ms - first_ms) // half * half
    count = (revision_ms + half + _HORIZON_MS - first_ms) // step
    quantum = plan.per_kwh / 1000
    prices: list[PricePoint] = []
    for n in range(count):
        swing = random.Random(f"{seed}/{plan.name}/{n}").randint(-1000, 1000) * plan.swing_pct
        price = (plan.per_kwh + quantum * swing / 100).quantize(Decimal("0.00001"))
        prices.append(PricePoint(first_ms + n * step, price))
    return EnergyTariff(
        id=plan.name,
        revision=revision_ms,
        claimed_at_ms=revision_ms,
        currency=plan.currency,
        prices=prices,
        end_ms=first_ms + count * step,
    )


def transfer_fact(scenario: Scenario, number: int, start_ms: int, now_ms: int) -> Transfer:
    """Transfer `number` as it stands at `now_ms`: planned from the start, active from its own time."""
    plan: TransferPlan = scenario.transfers[number]
    at_ms = start_ms + plan.at_s * 1000
    active = now_ms >= at_ms
    return Transfer(
        id=f"{scenario.name}:transfer:{plan.pool}:{number}",
        revision=at_ms + 1 if active else start_ms,
        claimed_at_ms=at_ms if active else start_ms,
        pool=plan.pool,
        gpus=plan.gpus,
        from_tenant=plan.from_tenant,
        to_tenant=plan.to_tenant,
        start_ms=at_ms,
        end_ms=_end(start_ms, plan.until_s),
        state="active" if active else "planned",
        by=plan.by,
        why=plan.why,
    )


def capacity_facts(scenario: Scenario, start_ms: int, now_ms: int) -> Iterator[Fact]:
    """Commitments and transfers as they stand at `now_ms`."""
    for n, plan in enumerate(scenario.commitments):
        yield Commitment(
            id=f"{scenario.name}:commitment:{plan.pool}:{plan.tenant}:{n}",
            revision=start_ms,
            claimed_at_ms=start_ms,
            pool=plan.pool,
            tenant=plan.tenant,
            gpus=plan.gpus,
            start_ms=start_ms + plan.from_s * 1000,
            end_ms=_end(start_ms, plan.until_s),
            contract=plan.contract,
        )
    for n in range(len(scenario.transfers)):
        yield transfer_fact(scenario, n, start_ms, now_ms)


def entitlements(scenario: Scenario, offset_ms: int) -> dict[tuple[str, str], int]:
    """(pool, tenant) → GPUs committed to it at `offset_ms` after the start, transfers counted."""
    held: dict[tuple[str, str], int] = {}

    def add(pool: str, tenant: str, gpus: int, from_s: int, until_s: int | None) -> None:
        if from_s * 1000 <= offset_ms and (until_s is None or offset_ms < until_s * 1000):
            held[pool, tenant] = held.get((pool, tenant), 0) + gpus

    for plan in scenario.commitments:
        add(plan.pool, plan.tenant, plan.gpus, plan.from_s, plan.until_s)
    for move in scenario.transfers:
        add(move.pool, move.from_tenant, -move.gpus, move.at_s, move.until_s)
        add(move.pool, move.to_tenant, move.gpus, move.at_s, move.until_s)
    return held
