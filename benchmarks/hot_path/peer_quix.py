"""Quix Streams 3.28 as its documentation has it: a streaming dataframe, one message at a time."""

from __future__ import annotations

import json
import logging
import sys
import tempfile
from typing import Any

from quixstreams import Application
from work import Fold


def main() -> None:
    job = json.loads(sys.argv[1])
    fold = Fold()
    with tempfile.TemporaryDirectory() as state:
        app = Application(
            broker_address=job["bootstrap"],
            consumer_group=job["group"],
            auto_offset_reset="earliest",
            state_dir=state,
            loglevel=logging.WARNING,
        )
        topic = app.topic(job["topic"], key_deserializer="bytes", value_deserializer="bytes")

        def fold_one(value: bytes, key: Any, timestamp: int, headers: Any) -> None:
            fold.add([key], [value])

        app.dataframe(topic).update(fold_one, metadata=True)
        app.run(count=job["messages"])
    print(json.dumps(fold.result()), flush=True)


if __name__ == "__main__":
    main()
