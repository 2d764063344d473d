"""A seeded siege of one worker: the same as `scripts/hostile`, with fewer messages."""

import pytest

from tests.e2e.load import Load
from tests.e2e.pipeline import Digest, Installation
from tests.hostile.stand import stand

pytestmark = pytest.mark.services

MESSAGES = 3_000


def test_every_malformed_message_is_accounted_for(pipeline: Installation, load: Load, undisturbed: Digest) -> None:
    seen = stand(pipeline, load, undisturbed, MESSAGES, seed=7)
    assert not seen.wrong, "\n".join(seen.wrong[:20])
    figures = seen.figures()
    assert figures["messages"] >= MESSAGES and figures["kinds"] > 100
    assert figures["bombs"] > 0 and figures["refused_by_broker"]["above the broker's limit"] > 0
    assert set(figures["letters_by_topic"]) == set(pipeline.config.kafka.partitions)
    assert seen.same_process
    assert seen.rss_most - seen.rss_before < 400, "MiB"
