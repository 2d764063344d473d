"""A plain confluent-kafka loop in batches: no framework, offsets committed after each batch.

Once as a first program would have it, and once tuned: a full queue is looked at again after 10 ms and not a second
(librdkafka's default, under which it stands idle most of the time), and batches fit a processor's cache.
"""

from __future__ import annotations

import json
import sys

from confluent_kafka import Consumer, KafkaException
from work import Fold

_BATCH, _TUNED_BATCH = 1_000, 64


def main() -> None:
    job = json.loads(sys.argv[1])
    tuned = job["mode"] == "tuned"
    fold = Fold()
    consumer = Consumer(
        {
            "bootstrap.servers": job["bootstrap"],
            "group.id": job["group"],
            "auto.offset.reset": "earliest",
            "enable.auto.commit": False,
            "fetch.queue.backoff.ms": 10 if tuned else 1_000,
        }
    )
    consumer.subscribe([job["topic"]])
    try:
        while fold.messages < job["messages"]:
            batch = consumer.consume(_TUNED_BATCH if tuned else _BATCH, timeout=0.2)
            for message in batch:
                if message.error():
                    raise KafkaException(message.error())
            if batch:
                fold.add([message.key() for message in batch], [message.value() for message in batch])
                consumer.commit(asynchronous=True)
    finally:
        consumer.close()
    print(json.dumps(fold.result()), flush=True)


if __name__ == "__main__":
    main()
