"""What the verdict of a soak is worth: a leak and a step are seen, single peaks are not taken for one."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.soak.trend import Reading, flatness, medians

TOLERANCE = 0.10
MIB = 1 << 20


def series(rss: Callable[[float], float]) -> list[Reading]:
    return [Reading(5.0 * n, int(rss(5.0 * n) * MIB), 0, 1000, 90_000, 0) for n in range(120)]


def of_rss(reading: Reading) -> int:
    return reading.rss_bytes


def test_a_leak_and_a_step_are_not_flat_and_single_peaks_are() -> None:
    steady = flatness(series(lambda s: 300 + (90 if s % 45 == 0 else 0)), 60, of_rss)
    assert steady.within(TOLERANCE)
    assert steady.middle == 300 * MIB
    leak = flatness(series(lambda s: 300 + s / 12), 60, of_rss)
    assert not leak.within(TOLERANCE)
    assert 0.14 < leak.rises < 0.16, "49.6 MiB on a median of 325"
    step = flatness(series(lambda s: 300 if s < 480 else 340), 60, of_rss)
    assert not step.within(TOLERANCE)
    assert step.strays == pytest.approx(40 / 300)


def test_windows_without_a_value_are_left_out_and_too_few_say_nothing() -> None:
    readings = [Reading(s, 0, 0, None if s < 60 else 7, None, 0) for s in range(0, 180, 5)]
    assert medians(readings, 60, lambda reading: reading.behind_ms) == [(60, 7), (120, 7)]
    with pytest.raises(ValueError, match=r"window_s: 2 windows of 60 s; at least 3"):
        flatness(readings, 60, lambda reading: reading.behind_ms)
