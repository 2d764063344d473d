"""Decimals that could not be computed with are refused when a message is read, not when money is made."""

from __future__ import annotations

import pytest

from gpuledger.schemas.events import decode_event
from gpuledger.schemas.exceptions import MessageError

BASE = '"id":"x","revision":1,"claimed_at_ms":1767225600000,"currency":"EUR"'
COST = (
    f'{{"type":"asset_cost",{BASE},"pool":"p","period_cost":"10","pue":"1.1","node_energy_factor":"1.2",'
    '"start_ms":1767225600000,"end_ms":1767312000000}'
)
CARD = (
    f'{{"type":"rate_card",{BASE},"pool":"p","per_gpu_hour":"2.5","reserved_unused_per_gpu_hour":"1.5",'
    '"start_ms":1767225600000}'
)
TARIFF = (
    f'{{"type":"energy_tariff",{BASE},"prices":[{{"start_ms":1767225600000,"per_kwh":"0.1"}}],"end_ms":1767312000000}}'
)


@pytest.mark.parametrize(
    ("text", "number", "field"),
    [
        (COST, '"10"', "period_cost"),
        (COST, '"1.1"', "pue"),
        (COST, '"1.2"', "node_energy_factor"),
        (CARD, '"2.5"', "per_gpu_hour"),
        (CARD, '"1.5"', "reserved_unused_per_gpu_hour"),
        (TARIFF, '"0.1"', "per_kwh"),
    ],
)
def test_no_decimal_slips_through(text: str, number: str, field: str) -> None:
    decode_event(text.encode())
    assert text.count(number) == 1
    for value, message in (
        ('"NaN"', "is not a number"),
        ('"sNaN"', "is not a number"),
        ('"Infinity"', "is not a number"),
        ('"1e999999"', "is too large"),
        ('"1.0000000000000000001"', "decimals; round it"),
        ('"1e-999999"', "decimals; round it"),
    ):
        with pytest.raises(MessageError, match=f"{field}: .*{message}"):
            decode_event(text.replace(number, value).encode())
