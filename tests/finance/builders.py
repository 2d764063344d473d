"""Rates as tests write them: short, with the times in UTC."""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

from gpuledger.schemas.events import AssetCost, EnergyTariff, PricePoint, RateCard


def ms(text: str) -> int:
    """`2026-01-01T00:15` (UTC) in milliseconds."""
    return int(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()) * 1000


BASE: dict[str, Any] = {"revision": 1, "claimed_at_ms": ms("2026-01-01")}


def asset_cost(**given: Any) -> AssetCost:
    terms: dict[str, Any] = {
        "id": "cost",
        "pool": "p",
        "currency": "EUR",
        "period_cost": Decimal(960),
        "start_ms": ms("2026-01-01"),
        "end_ms": ms("2026-01-02"),
    }
    return AssetCost(**(BASE | terms | given))


def rate_card(**given: Any) -> RateCard:
    terms: dict[str, Any] = {
        "id": "card",
        "pool": "p",
        "currency": "EUR",
        "per_gpu_hour": Decimal(2),
        "start_ms": ms("2026-01-01"),
    }
    return RateCard(**(BASE | terms | given))


def tariff(prices: dict[str, str], end: str, **given: Any) -> EnergyTariff:
    points = [PricePoint(ms(start), Decimal(price)) for start, price in prices.items()]
    terms: dict[str, Any] = {"id": "power", "currency": "EUR", "prices": points, "end_ms": ms(end)}
    return EnergyTariff(**(BASE | terms | given))
