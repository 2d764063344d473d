"""Malformed messages on all topics of a real installation: ``scripts/hostile --messages 100000 --seed 1``."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from gpuledger.local.clickhouse import EmbeddedClickHouse
from gpuledger.local.kafka import EmbeddedKafka
from tests.e2e.load import Load, record
from tests.e2e.pipeline import Digest, installation
from tests.hostile.stand import Stand, stand

_TICKS = 270
#: What the worker may grow by, in MiB: buffers of the largest batch, of fetches, and of letters on their way.
MOST_GROWTH_MIB = 400


def _undisturbed(bootstrap: str, url: str, directory: Path, load: Load) -> Digest:
    """What the ledger says of the load when nobody is hostile."""
    directory.mkdir()
    with installation(bootstrap, url, directory) as quiet:
        sending = quiet.publish(load.ticks, over_s=4)
        quiet.start_worker()
        quiet.settle(load, sending.result())
        return quiet.digest(load)


def main(arguments: list[str]) -> int:
    """Exit status 1 when something is not accounted for, the worker was restarted, or its memory grew."""
    parser = argparse.ArgumentParser(prog="scripts/hostile", description=__doc__)
    parser.add_argument("--messages", type=int, default=100_000, help="malformed messages (default 100000)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--patience", type=float, default=1_800, help="seconds to wait for the last letters")
    chosen = parser.parse_args(arguments)
    load = record(ticks=_TICKS)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        with EmbeddedKafka(directory / "kafka") as kafka, EmbeddedClickHouse(directory / "clickhouse") as clickhouse:
            expected = _undisturbed(kafka.bootstrap, clickhouse.url, directory / "undisturbed", load)
            print("the ledger without attacks is known", flush=True)
            (directory / "hostile").mkdir()
            with installation(kafka.bootstrap, clickhouse.url, directory / "hostile") as besieged:
                seen = stand(besieged, load, expected, chosen.messages, chosen.seed, chosen.patience)
    print(json.dumps({"seed": chosen.seed, **seen.figures()}, indent=1))
    for line in seen.wrong[:50]:
        print(f"wrong: {line}")
    return 0 if _held(seen) else 1


def _held(seen: Stand) -> bool:
    return seen.same_process and not seen.wrong and seen.rss_most - seen.rss_before <= MOST_GROWTH_MIB


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
