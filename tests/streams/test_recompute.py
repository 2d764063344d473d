"""The ledger by worked examples: these facts and these fragments make exactly these rows.

A GPU-second is 1,000,000 GPU-us. A cell is (GPU-us, millijoules, GPU-us of which the energy is not known). A GPU that
draws 1 W uses 1 mJ in a millisecond.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gpuledger.streams.recompute import Amounts, Ledger, Window, kinds, recompute
from tests.streams.small_pool import (
    HOUR,
    MINUTE,
    H,
    Pool,
    S,
    by_gpu_hour,
    by_gpu_minute,
    by_job,
    by_minute,
    fragment,
    stored,
    window,
)

SECOND = 1_000_000
WHOLE = 60 * SECOND


def ledger(pool: Pool, *fragments: dict[str, Any], **bounds: Any) -> Ledger:
    """Of the first minute, unless other bounds are given."""
    bounds = {"from_ms": 0, "to_ms": MINUTE} | bounds
    return recompute(pool.facts, stored(*fragments), window(**bounds))


def unseen(us: int) -> tuple[int, int, int]:
    """A cell of time whose energy nobody knows."""
    return us, 0, us


# ------------------------------------------------------------------------------------------------- what nobody saw


def test_without_telemetry_a_complete_minute_is_unobserved_and_an_open_one_pending() -> None:
    found = ledger(Pool().gpu().held("acme", 10 * S, 80 * S), to_ms=2 * MINUTE, complete=MINUTE)
    assert by_minute(found) == {
        (0, "acme", "held", "unobserved"): unseen(50 * SECOND),
        (0, "unallocated", "unobserved"): unseen(10 * SECOND),
        (1, "acme", "held", "pending"): unseen(20 * SECOND),
        (1, "unallocated", "pending"): unseen(40 * SECOND),
    }
    assert found.service_us.tolist() == [WHOLE, WHOLE]
    assert by_gpu_minute(found) == {}
    assert found.unallocated_mj.tolist() == [0, 0]
    assert found.unallocated_blind_us.tolist() == [10 * SECOND, 40 * SECOND]


def test_a_minute_is_complete_as_a_whole_or_not() -> None:
    # The frontier is 30 s into minute 1.
    found = ledger(Pool().gpu(), to_ms=2 * MINUTE, complete=90 * S)
    assert by_minute(found) == {
        (0, "unallocated", "unobserved"): unseen(WHOLE),
        (1, "unallocated", "pending"): unseen(WHOLE),
    }
    assert by_gpu_hour(found) == {
        (0, "g", "unallocated", "unobserved"): unseen(WHOLE),
        (0, "g", "unallocated", "pending"): unseen(WHOLE),
    }


def test_what_was_seen_of_an_open_minute_is_not_pending() -> None:
    found = ledger(Pool().gpu(), fragment(0, (0, 20 * S, "idle", None, None)), complete=0)
    assert by_minute(found) == {
        (0, "unallocated", "idle"): unseen(20 * SECOND),
        (0, "unallocated", "pending"): unseen(40 * SECOND),
    }


# ------------------------------------------------------------------------------------------------- time


def test_segments_split_what_intervals_hold() -> None:
    # Held from 10 s to 50 s; active until 30 s at 1 W, then idle at 2 W. All energy is known, so nothing is blind.
    pool = Pool().gpu().held("acme", 10 * S, 50 * S)
    sight = fragment(0, (0, 30 * S, "active", 0, 30_000), (30 * S, MINUTE, "idle", 30_000, 90_000))
    found = ledger(pool, sight)
    assert by_minute(found) == {
        (0, "acme", "held", "active"): (20 * SECOND, 20_000, 0),
        (0, "acme", "held", "idle"): (20 * SECOND, 40_000, 0),
        (0, "unallocated", "active"): (10 * SECOND, 10_000, 0),
        (0, "unallocated", "idle"): (10 * SECOND, 20_000, 0),
    }
    assert by_gpu_minute(found) == {
        (0, "g", "acme", "job", 0, "held", "active"): (20 * SECOND, 20_000, 0),
        (0, "g", "acme", "job", 0, "held", "idle"): (20 * SECOND, 40_000, 0),
        (0, "g", "unallocated", "active"): (10 * SECOND, 10_000, 0),
        (0, "g", "unallocated", "idle"): (10 * SECOND, 20_000, 0),
    }
    assert found.unallocated_mj.tolist() == [30_000]
    assert found.unallocated_blind_us.tolist() == [0]
    assert by_gpu_hour(found) == by_gpu_minute(found)
    assert by_job(found) == {
        (0, "acme", "job", "", "held", "active"): (20 * SECOND, 20_000, 0),
        (0, "acme", "job", "", "held", "idle"): (20 * SECOND, 40_000, 0),
        (0, "unallocated", "active"): (10 * SECOND, 10_000, 0),
        (0, "unallocated", "idle"): (10 * SECOND, 20_000, 0),
    }


def test_what_no_segment_covers_stays_unobserved() -> None:
    # Seen from 20 s to 40 s, with a hole of 5 s.
    sight = fragment(0, (20 * S, 25 * S, "active", None, None), (30 * S, 40 * S, "active", None, None))
    found = ledger(Pool().gpu().held("acme", 0, MINUTE), sight)
    assert by_minute(found) == {
        (0, "acme", "held", "active"): unseen(15 * SECOND),
        (0, "acme", "held", "unobserved"): unseen(45 * SECOND),
    }


def test_what_a_batch_says_is_unobserved_is_seen_as_unobserved() -> None:
    # Its energy is known, that of the rest is not.
    found = ledger(Pool().gpu(), fragment(0, (0, 10 * S, "unobserved", 0, 700)))
    assert by_minute(found) == {(0, "unallocated", "unobserved"): (WHOLE, 700, 50 * SECOND)}
    assert found.unallocated_blind_us.tolist() == [50 * SECOND]
    # Also where it is known that it used none.
    found = ledger(Pool().gpu(), fragment(0, (0, 10 * S, "unobserved", 5, 5)))
    assert by_minute(found) == {(0, "unallocated", "unobserved"): (WHOLE, 0, 50 * SECOND)}
    assert found.by_minute.energy_known.tolist() == [True]


def test_a_device_that_is_down_is_down() -> None:
    found = ledger(Pool().gpu().held("acme", 0, MINUTE), fragment(0, (0, MINUTE, "down", None, None)))
    assert by_minute(found) == {(0, "acme", "held", "down"): unseen(WHOLE)}


def test_a_shared_interval_is_divided_to_the_microsecond() -> None:
    # 7 ms are 7,000 us; thirds of them 2,333 1/3: the one that is missing goes to the first. Active for 2 of the 7 ms:
    # floor(2,334 x 2 / 7) = 666 and floor(2,333 x 2 / 7) = 666; idle is the rest. 10 mJ by weight are 4, 3, 3, and 20
    # are 7, 7, 6.
    pool = Pool().gpu(end=7)
    pool.held("acme", 0, 7, weight_den=3).held("nord", 0, 7, job="other", weight_den=3)
    found = ledger(pool, fragment(0, (0, 2, "active", 100, 110), (2, 7, "idle", 110, 130)))
    assert by_minute(found) == {
        (0, "acme", "held", "active"): (666, 4, 0),
        (0, "acme", "held", "idle"): (1_668, 7, 0),
        (0, "nord", "held", "active"): (666, 3, 0),
        (0, "nord", "held", "idle"): (1_667, 7, 0),
        (0, "unallocated", "active"): (666, 3, 0),
        (0, "unallocated", "idle"): (1_667, 6, 0),
    }
    assert found.service_us.tolist() == [7_000]


def test_each_shared_gpu_is_divided_by_itself() -> None:
    # Three GPUs, each half acme's and half nord's, seen active, not at all, and idle; 20 mJ and 60 mJ by halves.
    pool = Pool()
    for gpu in ("a", "b", "c"):
        pool.gpu(gpu).held("acme", 0, MINUTE, gpu, weight_den=2).held("nord", 0, MINUTE, gpu, job="n", weight_den=2)
    sights = [fragment(0, (0, 20 * S, "active", 0, 20), gpu="a"), fragment(0, (0, MINUTE, "idle", 0, 60), gpu="c")]
    found = ledger(pool, *sights)
    half = {"active": (10 * SECOND, 10, 0), "idle": (30 * SECOND, 30, 0), "unobserved": unseen(50 * SECOND)}
    assert by_minute(found) == {
        (0, tenant, "held", activity): cell for tenant in ("acme", "nord") for activity, cell in half.items()
    }
    assert {key[1] for key in by_gpu_minute(found)} == {"a", "c"}


def test_time_in_the_middle_of_a_piece_is_a_difference_of_floors() -> None:
    # 2,334 us over 7 ms, seen from 3 ms to 5 ms: floor(2,334 x 5 / 7) - floor(2,334 x 3 / 7) = 1,667 - 1,000.
    pool = Pool().gpu(end=7)
    pool.held("acme", 0, 7, weight_den=3).held("nord", 0, 7, weight_num=2, weight_den=3)
    found = ledger(pool, fragment(0, (3, 5, "active", None, None)))
    assert by_minute(found) == {
        (0, "acme", "held", "active"): unseen(667),
        (0, "acme", "held", "unobserved"): unseen(2_333 - 667),
        (0, "nord", "held", "active"): unseen(1_333),  # floor(4,667 x 5 / 7) - floor(4,667 x 3 / 7) = 3,333 - 2,000
        (0, "nord", "held", "unobserved"): unseen(4_667 - 1_333),
    }


def test_segments_count_only_while_the_gpu_serves() -> None:
    # In service from 20 s to 50 s, and seen from 10 s to 30 s at 1 W and from 40 s on at 2 W.
    pool = Pool().gpu(start=20 * S, end=50 * S)
    sight = fragment(0, (10 * S, 30 * S, "active", 0, 20_000), (40 * S, MINUTE, "idle", 20_000, 60_000))
    found = ledger(pool, sight)
    assert by_minute(found) == {
        (0, "unallocated", "active"): (10 * SECOND, 10_000, 0),
        (0, "unallocated", "idle"): (10 * SECOND, 20_000, 0),
        (0, "unallocated", "unobserved"): unseen(10 * SECOND),
    }
    assert found.service_us.tolist() == [30 * SECOND]


def test_each_gpu_is_seen_by_its_own_segments() -> None:
    pool = Pool().gpu("a").gpu("b").gpu("c").held("acme", 0, 2 * MINUTE, "b")
    sights = [
        fragment(MINUTE, (0, 10 * S, "active", 0, 10_000), gpu="a"),
        fragment(0, (50 * S, MINUTE, "active", 0, 20_000), gpu="b"),
        fragment(MINUTE, (0, 30 * S, "idle", 20_000, 50_000), gpu="b"),
        fragment(MINUTE, (0, MINUTE, "active", 0, 99), gpu="of another pool"),
    ]
    found = ledger(pool, *sights, to_ms=2 * MINUTE)
    assert by_gpu_minute(found) == {
        (0, "b", "acme", "job", 0, "held", "active"): (10 * SECOND, 20_000, 0),
        (0, "b", "acme", "job", 0, "held", "unobserved"): unseen(50 * SECOND),
        (1, "a", "unallocated", "active"): (10 * SECOND, 10_000, 0),
        (1, "a", "unallocated", "unobserved"): unseen(50 * SECOND),
        (1, "b", "acme", "job", 0, "held", "idle"): (30 * SECOND, 30_000, 0),
        (1, "b", "acme", "job", 0, "held", "unobserved"): unseen(30 * SECOND),
    }
    assert by_gpu_hour(found) == {
        (0, "a", "unallocated", "active"): (10 * SECOND, 10_000, 0),
        (0, "a", "unallocated", "unobserved"): unseen(110 * SECOND),
        (0, "b", "acme", "job", 0, "held", "active"): (10 * SECOND, 20_000, 0),
        (0, "b", "acme", "job", 0, "held", "idle"): (30 * SECOND, 30_000, 0),
        (0, "b", "acme", "job", 0, "held", "unobserved"): unseen(80 * SECOND),
        (0, "c", "unallocated", "unobserved"): unseen(120 * SECOND),
    }
    assert found.service_us.tolist() == [3 * WHOLE, 3 * WHOLE]


def test_a_gpu_that_joins_later_has_no_minutes_before() -> None:
    # b is in service from minute 2 on; its fragments of minute 0, when it served another pool, count for nobody.
    pool = Pool().gpu("a").gpu("b", start=2 * MINUTE)
    sights = [fragment(at, (0, MINUTE, "idle", 0, 60), gpu="b") for at in (0, 2 * MINUTE)]
    found = ledger(pool, *sights, to_ms=3 * MINUTE)
    assert by_gpu_minute(found) == {(2, "b", "unallocated", "idle"): (WHOLE, 60, 0)}
    assert found.service_us.tolist() == [WHOLE, WHOLE, 2 * WHOLE]


def test_a_pool_without_gpus_has_an_empty_ledger() -> None:
    found = ledger(Pool(), fragment(0, (0, MINUTE, "active", 0, 1)))
    assert (by_minute(found), by_gpu_minute(found), by_gpu_hour(found), by_job(found)) == ({}, {}, {}, {})
    assert found.service_us.tolist() == [0]


# ------------------------------------------------------------------------------------------------- energy


def test_energy_is_cut_where_the_holder_changes() -> None:
    # 100 mJ over 30 s; at 10 s the counter stands at 1,000 + floor(100 / 3): 33 for the first, 67 for the second.
    pool = Pool().gpu().held("acme", 0, 10 * S).held("nord", 10 * S, 30 * S)
    found = ledger(pool, fragment(0, (0, 30 * S, "active", 1_000, 1_100)))
    assert by_minute(found) == {
        (0, "acme", "held", "active"): (10 * SECOND, 33, 0),
        (0, "nord", "held", "active"): (20 * SECOND, 67, 0),
        (0, "unallocated", "unobserved"): unseen(30 * SECOND),
    }


def test_energy_of_zero_is_known() -> None:
    found = ledger(Pool().gpu(), fragment(0, (0, MINUTE, "idle", 0, 0)))
    assert by_minute(found) == {(0, "unallocated", "idle"): (WHOLE, 0, 0)}
    assert found.by_minute.energy_known.tolist() == [True]


def test_energy_is_given_to_who_held_too_little_for_a_microsecond() -> None:
    # 1/3000 of 1,000 us is nothing, of 9,000 mJ it is 3.
    pool = Pool().gpu(end=1).held("acme", 0, 1, weight_den=3_000)
    found = ledger(pool, fragment(0, (0, 1, "active", 0, 9_000)))
    assert by_minute(found) == {
        (0, "acme", "held", "active"): (0, 3, 0),
        (0, "unallocated", "active"): (1_000, 8_997, 0),
    }
    assert found.by_minute.energy_known.tolist() == [True, True]


def test_weights_above_the_whole_share_it_in_proportion() -> None:
    # 2/3 and 2/3: half each of 60 s and of 7 mJ, the odd one to the first.
    pool = Pool().gpu()
    for tenant in ("acme", "nord"):
        pool.held(tenant, 0, MINUTE, job=tenant, weight_num=2, weight_den=3)
    found = ledger(pool, fragment(0, (0, MINUTE, "active", 0, 7)))
    assert by_minute(found) == {
        (0, "acme", "held", "active"): (30 * SECOND, 4, 0),
        (0, "nord", "held", "active"): (30 * SECOND, 3, 0),
    }
    assert [conflict.kind for conflict in found.conflicts] == ["overweight"]


# ------------------------------------------------------------------------------------------------- MIG


EPOCH = H - 5_000


def mig() -> Pool:
    """Of 7 slices 3 are instance 1, which acme holds, 2 are another that nobody holds, and 2 belong to none."""
    pool = Pool().gpu().geometry(7, 5)
    return pool.held("acme", 0, MINUTE, instance=1, epoch_ms=EPOCH, weight_num=3, weight_den=7)


def of_acme(found: Ledger) -> dict[str, tuple[int, int, int]]:
    return {key[-1]: cell for key, cell in by_minute(found).items() if key[1] == "acme"}


#: The whole GPU: idle, 7,000 mJ in the minute.
WHOLE_GPU = fragment(0, (0, MINUTE, "idle", 0, 7_000))


def test_a_mig_gpu_is_divided_by_slices() -> None:
    # 60,000,000 us by 3 : 2 : 2 of 7, and the one that is missing to the largest remainder; 7,000 mJ likewise.
    found = ledger(mig(), WHOLE_GPU)
    assert by_gpu_minute(found) == {
        (0, "g", "acme", "job", 1, "held", "unobserved"): (25_714_286, 3_000, 25_714_286),
        (0, "g", "unallocated", "idle"): (17_142_857, 2_000, 0),
        (0, "g", "unsliced", "idle"): (17_142_857, 2_000, 0),
    }
    assert found.unallocated_mj.tolist() == [4_000]
    assert found.unallocated_blind_us.tolist() == [0]


def test_an_instance_has_its_own_activity_and_its_part_of_the_gpus_energy() -> None:
    # Seen active for a third of the minute and idle for another: floors of thirds of 25,714,286 us, and of 3,000 mJ.
    # Which part of the energy it used is known, how much its time used by itself is not.
    sight = fragment(
        0, (0, 20 * S, "active", None, None), (20 * S, 40 * S, "idle", None, None), instance=1, epoch=EPOCH
    )
    assert of_acme(ledger(mig(), WHOLE_GPU, sight)) == {
        "active": (8_571_428, 1_000, 8_571_428),
        "idle": (8_571_429, 1_000, 8_571_429),
        "unobserved": (8_571_429, 1_000, 8_571_429),
    }


def test_the_energy_of_an_open_minute_that_an_instance_was_not_seen_in_is_pending() -> None:
    sight = fragment(0, (0, 20 * S, "active", None, None), instance=1, epoch=EPOCH)
    assert of_acme(ledger(mig(), WHOLE_GPU, sight, complete=0)) == {
        "active": (8_571_428, 1_000, 8_571_428),
        "pending": (17_142_858, 2_000, 17_142_858),
    }


def test_energy_of_an_instance_is_cut_where_either_is_cut() -> None:
    # The GPU is seen from 10 s to 40 s in two readings of 700 mJ, at 10-30 s and 30-40 s; 300 each are acme's. The
    # instance is active from 15 s to 35 s: of the first 300 its 15 of 20 s, floor(225) - floor(0.25 x 300 = 75) and
    # so on.
    gpu = fragment(0, (10 * S, 30 * S, "idle", 0, 700), (30 * S, 40 * S, "active", 700, 1_400))
    part = fragment(0, (15 * S, 35 * S, "active", None, None), instance=1, epoch=EPOCH)
    found = of_acme(ledger(mig(), gpu, part))
    # 10-15 s: 75 unobserved; 15-30 s: 225 active; 30-35 s: 150 active; 35-40 s: 150 unobserved.
    assert found["active"] == (8_571_429, 375, 8_571_429)
    assert found["unobserved"] == (25_714_286 - 8_571_429, 225, 25_714_286 - 8_571_429)


def test_each_instance_has_its_own_activity() -> None:
    # Two GPUs of two halves. The instances of each are seen in different thirds of the minute, so each half's 30 s
    # and half of 6,000 mJ are active for a third of it, idle for another, and unobserved for the rest.
    pool = Pool()
    whens = {("a", 1): 0, ("a", 2): 20, ("b", 1): 20, ("b", 2): 0}
    sights: list[dict[str, Any]] = []
    for (gpu, instance), at in whens.items():
        tenant = f"{gpu}{instance}"
        pool.held(tenant, 0, MINUTE, gpu, job=tenant, instance=instance, weight_den=2)
        first, second = (at * S, (at + 20) * S, "active"), ((at + 20) * S, (at + 40) * S, "idle")
        sights.append(fragment(0, (*first, None, None), (*second, None, None), gpu=gpu, instance=instance))
    for gpu in ("a", "b"):
        pool.gpu(gpu)
        sights.append(fragment(0, (0, MINUTE, "down", 0, 6_000), gpu=gpu))
    assert by_minute(ledger(pool, *sights)) == {
        (0, f"{gpu}{instance}", "held", activity): (10 * SECOND, 1_000, 10 * SECOND)
        for gpu, instance in whens
        for activity in ("active", "idle", "unobserved")
    }


@pytest.mark.parametrize(("held", "seen", "same"), [(5, 5, True), (0, 5, True), (5, 0, True), (5, 6, False)])
def test_an_observation_is_of_the_holders_instance_if_their_epochs_agree(held: int, seen: int, same: bool) -> None:
    pool = Pool().gpu().geometry(2, 1).held("acme", 0, MINUTE, instance=1, epoch_ms=held, weight_den=2)
    sight = fragment(0, (0, MINUTE, "active", None, None), instance=1, epoch=seen)
    found = of_acme(ledger(pool, WHOLE_GPU, sight))
    activity = "active" if same else "unobserved"
    assert found == {activity: (30 * SECOND, 3_500, 30 * SECOND)}


def test_an_instance_is_not_seen_by_the_segments_of_another() -> None:
    # Instance 2 of the same GPU, instance 1 of another: neither says what acme's did.
    pool = mig().gpu("f").gpu("h")
    for gpu in ("f", "h"):
        pool.held("nord", 0, MINUTE, gpu, instance=1, epoch_ms=EPOCH, weight_num=3, weight_den=7)
    sights = [
        fragment(0, (0, MINUTE, "active", None, None), instance=2, epoch=EPOCH),
        fragment(0, (0, MINUTE, "active", None, None), gpu="h", instance=1, epoch=EPOCH),
        fragment(0, (0, MINUTE, "idle", 0, 7_000), gpu="h"),
        fragment(0, (0, MINUTE, "idle", 0, 7_000), gpu="f"),
    ]
    found = ledger(pool, WHOLE_GPU, *sights)
    assert of_acme(found) == {"unobserved": (25_714_286, 3_000, 25_714_286)}
    nord = {key[1:]: cell[:2] for key, cell in by_gpu_minute(found).items() if "nord" in key}
    assert nord == {
        ("f", "nord", "job", 1, "held", "unobserved"): (25_714_286, 3_000),
        ("h", "nord", "job", 1, "held", "active"): (25_714_286, 3_000),
    }


def test_an_instance_that_was_seen_without_its_gpu_has_no_energy() -> None:
    sight = fragment(0, (0, MINUTE, "active", None, None), instance=1, epoch=EPOCH)
    found = ledger(mig(), sight)
    assert of_acme(found) == {"active": unseen(25_714_286)}
    assert found.by_minute.energy_known.tolist() == [False, False, False]


def test_a_holder_of_the_whole_gpu_is_not_seen_by_its_instances() -> None:
    sight = fragment(0, (0, MINUTE, "active", None, None), instance=1)
    found = ledger(Pool().gpu().held("acme", 0, MINUTE), sight)
    assert by_minute(found) == {(0, "acme", "held", "unobserved"): unseen(WHOLE)}


# ------------------------------------------------------------------------------------------------- keys


def test_holders_of_one_tenant_are_one_account_and_several_jobs() -> None:
    pool = Pool().gpu().held("acme", 0, 20 * S, job="x", user="ann").held("acme", 20 * S, 30 * S, job="x", user="bob")
    pool.held("acme", 30 * S, 60 * S, job="y", user="ann")
    found = ledger(pool, fragment(0, (0, MINUTE, "active", 0, 60)))
    assert by_minute(found) == {(0, "acme", "held", "active"): (WHOLE, 60, 0)}
    assert by_job(found) == {
        (0, "acme", "x", "ann", "held", "active"): (20 * SECOND, 20, 0),
        (0, "acme", "x", "bob", "held", "active"): (10 * SECOND, 10, 0),
        (0, "acme", "y", "ann", "held", "active"): (30 * SECOND, 30, 0),
    }
    # GPU rows know no user.
    assert by_gpu_minute(found) == {
        (0, "g", "acme", "x", 0, "held", "active"): (30 * SECOND, 30, 0),
        (0, "g", "acme", "y", 0, "held", "active"): (30 * SECOND, 30, 0),
    }


def test_an_allocation_that_is_no_longer_named_is_a_kind_of_its_own() -> None:
    # It has no end and was named last 9.5 minutes before: 10 minutes after that nobody confirms it.
    pool = Pool().gpu().held("acme", -20 * MINUTE, None, named_ms=H - 570 * S)
    found = ledger(pool)
    assert by_minute(found) == {
        (0, "acme", "held", "unobserved"): unseen(30 * SECOND),
        (0, "acme", "unconfirmed", "unobserved"): unseen(30 * SECOND),
    }
    assert found.accounts == [("acme", False), ("acme", True)]
    assert kinds(found.accounts) == ["held", "unconfirmed", "unallocated", "unsliced"]
    assert by_job(found) == {
        (0, "acme", "job", "", "held", "unobserved"): unseen(30 * SECOND),
        (0, "acme", "job", "", "unconfirmed", "unobserved"): unseen(30 * SECOND),
    }
    assert by_gpu_hour(found) == {
        (0, "g", "acme", "job", 0, "held", "unobserved"): unseen(30 * SECOND),
        (0, "g", "acme", "job", 0, "unconfirmed", "unobserved"): unseen(30 * SECOND),
    }


def test_hours_and_buckets_are_cut_where_they_begin() -> None:
    # From 10 minutes before an hour to 20 after it; price intervals begin at the hour and 15 minutes later. Held from
    # 5 minutes before the hour to 17 after it; seen, at 1 W, in the minutes before the hour and at it.
    pool = Pool().gpu().held("acme", -5 * MINUTE, 17 * MINUTE)
    sights = [fragment(at, (0, MINUTE, "active", 0, MINUTE)) for at in (-MINUTE, 0, 15 * MINUTE)]
    found = ledger(pool, *sights, from_ms=-10 * MINUTE, to_ms=20 * MINUTE, buckets=(0, 15 * MINUTE))
    assert by_gpu_hour(found) == {
        (0, "g", "acme", "job", 0, "held", "active"): (WHOLE, 60_000, 0),
        (0, "g", "acme", "job", 0, "held", "unobserved"): unseen(4 * WHOLE),
        (0, "g", "unallocated", "unobserved"): unseen(5 * WHOLE),
        (1, "g", "acme", "job", 0, "held", "active"): (2 * WHOLE, 120_000, 0),
        (1, "g", "acme", "job", 0, "held", "unobserved"): unseen(15 * WHOLE),
        (1, "g", "unallocated", "unobserved"): unseen(3 * WHOLE),
    }
    assert by_job(found) == {
        (0, "acme", "job", "", "held", "active"): (WHOLE, 60_000, 0),
        (0, "acme", "job", "", "held", "unobserved"): unseen(4 * WHOLE),
        (0, "unallocated", "unobserved"): unseen(5 * WHOLE),
        (1, "acme", "job", "", "held", "active"): (WHOLE, 60_000, 0),
        (1, "acme", "job", "", "held", "unobserved"): unseen(14 * WHOLE),
        (2, "acme", "job", "", "held", "active"): (WHOLE, 60_000, 0),
        (2, "acme", "job", "", "held", "unobserved"): unseen(WHOLE),
        (2, "unallocated", "unobserved"): unseen(3 * WHOLE),
    }
    minutes = by_minute(found)
    assert [m for m, *rest in minutes if rest[-1] == "active"] == [9, 10, 25]
    assert sum(us for us, *_ in minutes.values()) == 30 * WHOLE
    assert found.service_us.tolist() == [WHOLE] * 30


def test_a_window_that_begins_with_an_hour_has_no_empty_hour_before() -> None:
    found = ledger(Pool().gpu(), from_ms=-HOUR, to_ms=MINUTE, buckets=(-HOUR // 2, 0))
    assert by_gpu_hour(found) == {
        (0, "g", "unallocated", "unobserved"): unseen(60 * WHOLE),
        (1, "g", "unallocated", "unobserved"): unseen(WHOLE),
    }
    assert {key[0]: cell for key, cell in by_job(found).items()} == {
        0: unseen(30 * WHOLE),
        1: unseen(30 * WHOLE),
        2: unseen(WHOLE),
    }
    found = ledger(Pool().gpu(), from_ms=-HOUR, to_ms=0)
    assert by_gpu_hour(found) == {(0, "g", "unallocated", "unobserved"): unseen(60 * WHOLE)}


# ------------------------------------------------------------------------------------------------- parts and pools


def test_fragments_may_come_in_parts() -> None:
    pool = mig().gpu("h").held("nord", 30 * S, 150 * S, "h", job="n", weight_den=3)
    sights = [
        [
            WHOLE_GPU,
            fragment(0, (0, 20 * S, "active", None, None), instance=1),
            fragment(0, (0, 9, "idle", 0, 9), seq=1),
        ],
        [],
        [fragment(MINUTE, (0, MINUTE, "active", 0, 100), gpu="h")],
        [
            fragment(2 * MINUTE, (0, MINUTE, "idle", 0, 200), gpu="h"),
            fragment(2 * MINUTE, (0, 1, "active", 0, 1), seq=1),
        ],
    ]
    bounds = window(0, 3 * MINUTE, complete=MINUTE, buckets=(2 * MINUTE,))
    whole = recompute(pool.facts, stored(*(row for part in sights for row in part)), bounds)
    parts = recompute(pool.facts, iter([stored(*part) for part in sights]), bounds)
    for rows in (by_minute, by_gpu_minute, by_gpu_hour, by_job):
        assert rows(parts) == rows(whole)
    assert recompute(pool.facts, iter([]), bounds).service_us.tolist() == whole.service_us.tolist()


def test_what_nobody_holds_is_divided_among_promises() -> None:
    # Two GPUs, one held by acme for half the minute; acme has three promised, so 2.5 are wanted of 1.5 there are.
    pool = Pool().gpu("a").gpu("b").held("acme", 0, 30 * S, "a").committed("acme", 3)
    found = ledger(pool)
    assert found.pool == "p"
    assert found.unheld.tenants == ["acme"]
    assert found.unheld.reserved_us.tolist() == [[90 * SECOND]]
    assert found.unheld.overcommitted_us.tolist() == [[60 * SECOND]]
    assert found.unheld.free_us.tolist() == [0]


# ------------------------------------------------------------------------------------------------- windows, amounts


@pytest.mark.parametrize(("from_ms", "to_ms"), [(1, MINUTE), (0, MINUTE + 1), (MINUTE, MINUTE), (MINUTE, 0)])
def test_a_window_is_of_whole_minutes(from_ms: int, to_ms: int) -> None:
    with pytest.raises(ValueError, match="whole minutes in order"):
        Window(H + from_ms, H + to_ms, H, MINUTE, np.array([H + from_ms, H + to_ms]))
    assert window(0, 3 * MINUTE).minutes == 3


def test_amounts_of_some_rows() -> None:
    numbers = np.arange(3)
    amounts = Amounts((numbers, numbers * 2), numbers + 10, numbers + 20, numbers + 30)
    some = amounts.take(np.array([2, 0]))
    assert len(amounts) == 3
    assert len(some) == 2
    assert [key.tolist() for key in some.keys] == [[2, 0], [4, 0]]
    assert [column.tolist() for column in (some.us, some.energy_mj, some.blind_us)] == [[12, 10], [22, 20], [32, 30]]


def test_energy_is_known_where_some_time_is_not_blind_or_some_energy_is_there() -> None:
    us, energy, blind = np.array([5, 5, 5, 0]), np.array([0, 0, 7, 1]), np.array([5, 4, 5, 0])
    amounts = Amounts((np.arange(4),), us, energy, blind)
    assert amounts.energy_known.tolist() == [False, True, True, True]
