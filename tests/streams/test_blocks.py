"""Which offset may be committed, decided without a broker; and that another Faust is refused."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import faust
import pytest
from faust.types import TP
from hypothesis import given
from hypothesis import strategies as st

from gpuledger.streams.blocks import (
    BlockConsumer,
    BlockTransport,
    OutstandingBlocks,
    Record,
    RecordBlock,
    block_topic,
    faust_settings,
)
from gpuledger.streams.exceptions import IntakeSetupError, StreamsError, UnsupportedFaustError


@dataclass(eq=True)
class Block:
    """Stands for a Faust message: `offset` is the last record's."""

    offset: int
    acked: bool = False


def delivered(*ends: int) -> tuple[OutstandingBlocks, list[Block]]:
    outstanding = OutstandingBlocks()
    blocks = [Block(end) for end in ends]
    for block in blocks:
        outstanding.deliver(block, 10)
    return outstanding, blocks


def test_nothing_is_committed_before_the_first_acknowledgement() -> None:
    outstanding, _ = delivered(99)
    assert outstanding.committable() is None


def test_the_offset_after_the_last_acknowledged_block_is_committed() -> None:
    outstanding, blocks = delivered(99, 149, 150)
    blocks[0].acked = blocks[1].acked = True
    assert outstanding.committable() == 150
    assert outstanding.committable() == 150, "asking must not use it up"
    assert (outstanding.count_held(), outstanding.held_bytes, outstanding.expected) == (1, 10, 151)


def test_an_unacknowledged_block_holds_the_later_ones_back() -> None:
    outstanding, blocks = delivered(99, 100, 105)
    blocks[0].acked = blocks[2].acked = True  # stock Faust commits 106 here
    assert outstanding.committable() == 100
    blocks[1].acked = True
    assert outstanding.committable() == 106


def test_a_block_of_an_earlier_assignment_is_not_its_redelivered_twin() -> None:
    _, before = delivered(99)
    again, after = delivered(99)
    assert before[0] == after[0]
    assert not again.holds(before[0])
    assert again.holds(after[0])
    before[0].acked = True
    assert again.committable() is None


def test_what_was_let_go_holds_nothing_back_and_is_committed_in_its_turn() -> None:
    outstanding, blocks = delivered(99, 149, 150)
    for block in (*blocks[:2], blocks[0], Block(99)):
        outstanding.let_go(block)
    assert (outstanding.count_held(), outstanding.held_bytes) == (1, 10)
    assert outstanding.holds(blocks[0]) and outstanding.committable() is None
    blocks[0].acked = blocks[2].acked = True
    assert outstanding.committable() == 100
    blocks[1].acked = True
    assert outstanding.committable() == 151
    assert (outstanding.count_held(), outstanding.held_bytes) == (0, 0)


@given(st.lists(st.integers(1, 50), min_size=1), st.data())
def test_whatever_the_order_of_acknowledgements_only_prefixes_are_committed(sizes: list[int], data: st.DataObject):
    ends = [sum(sizes[: n + 1]) - 1 for n in range(len(sizes))]
    outstanding, blocks = delivered(*ends)
    acknowledged: set[int] = set()
    for position in data.draw(st.permutations(range(len(blocks)))):
        blocks[position].acked = True
        acknowledged.add(position)
        prefix = next((n for n in range(len(blocks)) if n not in acknowledged), len(blocks))
        assert outstanding.committable() == (ends[prefix - 1] + 1 if prefix else None)
        assert outstanding.count_held() == len(blocks) - prefix
        assert outstanding.held_bytes == 10 * (len(blocks) - prefix)


def test_another_faust_is_refused_with_the_fix() -> None:
    pretend = "import importlib.metadata as m; m.version = lambda name: '0.15.4'; import gpuledger.streams.blocks"
    result = subprocess.run([sys.executable, "-c", pretend], capture_output=True, text=True)
    assert result.returncode != 0
    assert "faust-streaming 0.15.4 is installed" in result.stderr
    assert "install faust-streaming==0.15.3" in result.stderr
    assert issubclass(UnsupportedFaustError, StreamsError)


def make_app(tmp_path: Path) -> faust.App:
    return faust.App(**faust_settings("blocks", ["127.0.0.1:9", "[::1]:9"], tmp_path))


def test_block_topics_are_known_to_the_transport(tmp_path: Path) -> None:
    app = make_app(tmp_path)
    block_topic(app, "telemetry")
    block_topic(app, "dirty")
    assert isinstance(app.transport, BlockTransport)
    assert app.transport.block_topics == {"telemetry", "dirty"}
    consumer = app.consumer
    assert isinstance(consumer, BlockConsumer)
    assert consumer.is_block_topic("dirty")
    assert not consumer.is_block_topic("other")


def test_a_block_topic_after_the_stock_consumer_was_made_is_refused(tmp_path: Path) -> None:
    app = make_app(tmp_path)
    assert app.consumer
    with pytest.raises(IntakeSetupError, match="'telemetry': the app's consumer exists already"):
        block_topic(app, "telemetry")


def test_the_settings_that_safety_depends_on(tmp_path: Path) -> None:
    app = make_app(tmp_path)
    assert app.conf.stream_wait_empty is False
    assert app.conf.agent_supervisor.__name__ == "CrashingSupervisor"
    assert app.conf.consumer_auto_offset_reset == "earliest"
    assert [str(url) for url in app.conf.broker] == ["kafka://127.0.0.1:9", "kafka://[::1]:9"]
    assert make_app(tmp_path).conf.broker_commit_interval == 1


def test_the_size_of_a_record_counts_what_it_carries() -> None:
    small = Record("t", 0, 0, 0, None, None)
    assert Record("t", 0, 0, 0, b"key", b"value").size_bytes == small.size_bytes + 8


def test_a_partition_whose_records_were_let_go_is_fetched_again(tmp_path: Path) -> None:
    """Marks of the open hour are acknowledged with it: counted, they kept newer marks from the worker for minutes."""
    app = make_app(tmp_path)
    block_topic(app, "dirty")
    consumer = app.consumer
    assert isinstance(consumer, BlockConsumer)
    tp = TP("dirty", 0)
    consumer._outstanding[tp] = OutstandingBlocks()
    messages: list[Any] = []
    for offset in range(consumer.partition_held_blocks):
        assert consumer._held_back({tp}) == set()
        record = Record("dirty", 0, offset, 0, b"k", b"v" * 100)
        messages.append(SimpleNamespace(tp=tp, offset=offset, acked=False, value=RecordBlock([record])))
        consumer._outstanding[tp].deliver(messages[-1], messages[-1].value.size_bytes)
    assert consumer._held_back({tp}) == {tp}
    for message in messages:
        consumer.let_go(message)
        assert consumer._held_back({tp}) == set() and not message.value
    assert consumer.held_bytes("dirty") == 0
    assert all(consumer.holds(message) for message in messages)
