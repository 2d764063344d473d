"""Makes our topics on a broker, with the settings of the contract; what is there already is left as it is."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from gpuledger.agents.exceptions import BrokerUnavailable, PublishError
from gpuledger.agents.publisher import client_options
from gpuledger.schemas.config import Kafka
from gpuledger.schemas.topics import TOPICS, topic_configs, topic_name

__all__ = ["create_topics"]


async def create_topics(settings: Kafka, names: Iterable[str] = TOPICS) -> list[str]:
    """Makes those of the topics that are missing; their names on the broker.

    Raises:
        BrokerUnavailable: no broker answered.
        PublishError: the broker refuses a topic (its reason is in the text).
    """
    from aiokafka.admin import AIOKafkaAdminClient, NewTopic
    from aiokafka.errors import KafkaError, TopicAlreadyExistsError, for_code

    wanted = {topic_name(settings.topic_prefix, name): name for name in names}
    # Untyped: what answers look like is the protocol's matter.
    admin: Any = AIOKafkaAdminClient(**client_options(settings))
    try:
        await admin.start()
        missing = sorted(set(wanted) - set(await admin.list_topics()))
        if not missing:
            return []
        answer = await admin.create_topics(
            [
                NewTopic(
                    name=name,
                    num_partitions=settings.partitions[wanted[name]],
                    replication_factor=settings.replication_factor,
                    topic_configs=topic_configs(wanted[name]),
                )
                for name in missing
            ]
        )
    except (KafkaError, OSError) as error:
        raise BrokerUnavailable(
            f"kafka.bootstrap: no broker answered at {settings.bootstrap} ({error}); check that Kafka runs there"
        ) from error
    finally:
        await admin.close()
    for name, code, *reason in answer.topic_errors:
        if code and for_code(code) is not TopicAlreadyExistsError:
            raise PublishError(f"topic {name}: not made: {for_code(code).__name__} {' '.join(map(str, reason))}")
    return missing
