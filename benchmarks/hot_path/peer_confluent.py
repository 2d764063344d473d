"""A plain confluent-kafka loop in batches: no framework, offsets committed after each batch."""

from __future__ import annotations

import json
import sys

from confluent_kafka import Consumer, KafkaException
from work import Fold

_BATCH = 1_000


def main() -> None:
    job = json.loads(sys.argv[1])
    fold = Fold()
    consumer = Consumer(
        {
            "bootstrap.servers": job["bootstrap"],
            "group.id": job["group"],
            "auto.offset.reset": "earliest",
            "enable.auto.commit": False,
        }
    )
    consumer.subscribe([job["topic"]])
    try:
        while fold.messages < job["messages"]:
            batch = consumer.consume(_BATCH, timeout=0.2)
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
