"""The ClickHouse engine itself, served over ClickHouse's own HTTP protocol, for a machine that has only wheels.

Clients see a server: a URL, users, sessions, streamed results, ClickHouse's own errors.
"""

from gpuledger.local.clickhouse.embedded import EmbeddedClickHouse
from gpuledger.local.clickhouse.errors import EngineError
from gpuledger.local.clickhouse.users import User, Users, UsersError

__all__ = ["EmbeddedClickHouse", "EngineError", "User", "Users", "UsersError"]
