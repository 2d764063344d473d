"""Who may use the embedded ClickHouse, and the two configuration files the engine itself reads.

The engine runs every request as its one user `default`, whose explicit grants close files, URLs and other servers; the
front checks passwords and makes readers read-only. Users with row policies exist inside the engine only, as definers
of views, and cannot log in.
"""

import hashlib
import hmac
import ipaddress
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast
from xml.sax.saxutils import escape

import yaml

from gpuledger.local.exceptions import LocalError

__all__ = ["KEEP_MERGED_S", "User", "Users", "UsersError", "is_loopback", "server_xml", "users_xml"]

# What the engine's user may do: everything with its own tables, nothing with files, URLs, other servers or accounts.
# READ and WRITE on sources, FILE and URL are left out on purpose; so is SYSTEM SHUTDOWN, part of SYSTEM.
_GRANTS = (
    "GRANT SHOW DATABASES, SHOW TABLES, SHOW COLUMNS, SHOW DICTIONARIES, SHOW NAMED COLLECTIONS, SELECT, INSERT, ALTER,"
    " CREATE, DROP, UNDROP TABLE, TRUNCATE, OPTIMIZE, KILL QUERY, dictGet, SYSTEM RELOAD, SYSTEM FLUSH,"
    " SYSTEM DROP CACHE, SYSTEM MERGES, SYSTEM TTL MERGES, SYSTEM MOVES, SYSTEM VIEWS, CREATE FUNCTION, DROP FUNCTION"
    " ON *.*",
    "GRANT SET DEFINER ON *",
)
_ENGINES = (
    "MergeTree",
    "ReplacingMergeTree",
    "SummingMergeTree",
    "AggregatingMergeTree",
    "CollapsingMergeTree",
    "VersionedCollapsingMergeTree",
    "Memory",
    "Null",
    "Set",
    "Join",
    "Log",
    "TinyLog",
    "StripeLog",
    "Buffer",
    "Merge",
    "Dictionary",
    "View",
    "MaterializedView",
    "GenerateRandom",
    "Atomic",
)


# Such a user becomes an XML element of the engine's configuration.
_DEFINER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class UsersError(LocalError):
    """The users file or mapping is wrong; the text names the user and the field."""


@dataclass(frozen=True, slots=True)
class User:
    """One account. `password_sha256` is the hex digest, None for an account without password.

    `row_policies` maps `database.table` to the SQL condition of the rows the account may see.
    """

    name: str
    password_sha256: str | None
    readonly: bool = False
    row_policies: Mapping[str, str] = field(default_factory=dict[str, str])

    def accepts(self, password: str) -> bool:
        given = hashlib.sha256(password.encode()).hexdigest()
        # Compared even where there is no password to compare with: the time taken tells nothing.
        expected = self.password_sha256 if self.password_sha256 is not None else hashlib.sha256(b"").hexdigest()
        return hmac.compare_digest(given, expected)


@dataclass(frozen=True, slots=True)
class Users:
    """All accounts, by name."""

    by_name: Mapping[str, User]

    @classmethod
    def parse(cls, config: Mapping[str, Any] | None) -> "Users":
        """From `{name: {password | password_sha256, readonly, row_policies}}`; None means `default` without password.

        Raises UsersError naming the user and the field that is wrong.
        """
        if config is None:
            return cls({"default": User("default", None)})
        if not config:
            raise UsersError("users: expected at least one user")
        return cls({name: _parse_user(name, fields) for name, fields in config.items()})

    @classmethod
    def load(cls, path: Path) -> "Users":
        """From a JSON or YAML file. Raises UsersError where it cannot be read or is wrong."""
        try:
            text = path.read_text(encoding="utf-8")
            loaded: Any = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise UsersError(f"users: cannot read {path}: {error}") from error
        if not isinstance(loaded, dict):
            raise UsersError(f"users: {path}: expected a mapping of user names to their settings")
        return cls.parse(cast("dict[str, Any]", loaded))

    def check_host(self, host: str) -> None:
        """Raises UsersError where an account without password would be reachable from other machines."""
        if is_loopback(host):
            return
        for user in self.by_name.values():
            if user.password_sha256 is None and not user.row_policies:
                raise UsersError(
                    f"users.{user.name}: an account without password is allowed on loopback only, not on {host}; "
                    "set password_sha256, or listen on 127.0.0.1"
                )

    def login(self, name: str, password: str) -> User | None:
        """The account, or None for a wrong name or password and for accounts that cannot log in."""
        user = self.by_name.get(name)
        if user is None:
            User(name, None).accepts(password)
            return None
        return user if user.accepts(password) and not user.row_policies else None


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _parse_user(name: str, fields: Any) -> User:
    if not name:
        raise UsersError("users: a user name is empty")
    if fields is None:
        fields = {}
    if not isinstance(fields, Mapping):
        raise UsersError(f"users.{name}: expected a mapping such as {{password_sha256: …, readonly: true}}")
    given = dict(cast("Mapping[str, Any]", fields))
    digest = _parse_password(name, given)
    readonly = given.pop("readonly", False)
    if not isinstance(readonly, bool):
        raise UsersError(f"users.{name}.readonly: expected true or false, got {readonly!r}")
    policies = given.pop("row_policies", {})
    if not isinstance(policies, Mapping):
        raise UsersError(f"users.{name}.row_policies: expected a mapping of database.table to a condition")
    if policies and (not _DEFINER.fullmatch(name) or name == "default"):
        raise UsersError(f"users.{name}: a user with row_policies needs a name of letters, digits and _, not default")
    for table, condition in cast("Mapping[Any, Any]", policies).items():
        parts = table.split(".") if isinstance(table, str) else []
        if len(parts) != 2 or not all(map(_DEFINER.fullmatch, parts)) or not isinstance(condition, str):
            raise UsersError(f"users.{name}.row_policies: expected database.table: condition, got {table!r}")
    if given:
        raise UsersError(
            f"users.{name}.{next(iter(given))}: unknown field; known are password, password_sha256, readonly and "
            "row_policies"
        )
    return User(name, digest, readonly, dict(cast("Mapping[str, str]", policies)))


def _parse_password(name: str, given: dict[str, Any]) -> str | None:
    password = given.pop("password", None)
    digest = given.pop("password_sha256", None)
    if password is not None and digest is not None:
        raise UsersError(f"users.{name}: give password or password_sha256, not both")
    if password is not None:
        # The value is a secret: it is not repeated in the error.
        if not isinstance(password, str) or not password:
            raise UsersError(f"users.{name}.password: expected a text that is not empty; put it in quotes")
        return hashlib.sha256(password.encode()).hexdigest()
    if digest is None:
        return None
    if not isinstance(digest, str) or len(digest) != 64 or not all(c in "0123456789abcdef" for c in digest.lower()):
        raise UsersError(f"users.{name}.password_sha256: expected 64 hexadecimal digits")
    return digest.lower()


#: How long parts stay after they were merged; chDB's default is until its next cleaning. See `parts`.
KEEP_MERGED_S = 120


def server_xml(users_file: Path, server_memory_bytes: int, min_free_bytes: int) -> str:
    """The engine's server configuration. `min_free_bytes`: left free by what it writes, merges included.

    fsync is on: without it a power cut lost half of the acknowledged blocks. The explicit engine grants keep Kafka
    tables out, after which the directory would not open again.
    """
    return f"""<clickhouse>
  <max_server_memory_usage>{server_memory_bytes}</max_server_memory_usage>
  <mark_cache_size>{min(268435456, server_memory_bytes // 8)}</mark_cache_size>
  <uncompressed_cache_size>0</uncompressed_cache_size>
  <storage_configuration>
    <disks><default><keep_free_space_bytes>{min_free_bytes}</keep_free_space_bytes></default></disks>
  </storage_configuration>
  <background_pool_size>4</background_pool_size>
  <merge_tree>
    <fsync_after_insert>1</fsync_after_insert>
    <fsync_part_directory>1</fsync_part_directory>
    <old_parts_lifetime>{KEEP_MERGED_S}</old_parts_lifetime>
    <number_of_free_entries_in_pool_to_lower_max_size_of_merge>2</number_of_free_entries_in_pool_to_lower_max_size_of_merge>
    <number_of_free_entries_in_pool_to_execute_mutation>2</number_of_free_entries_in_pool_to_execute_mutation>
    <number_of_free_entries_in_pool_to_execute_optimize_entire_partition>2</number_of_free_entries_in_pool_to_execute_optimize_entire_partition>
  </merge_tree>
  <access_control_improvements>
    <table_engines_require_grant>true</table_engines_require_grant>
  </access_control_improvements>
  <users_config>{escape(str(users_file))}</users_config>
</clickhouse>
"""


def users_xml(users: Users, query_memory_bytes: int) -> str:
    """The engine's users: `default` with its grants, and the definers with their row policies."""
    grants = [*_GRANTS, "GRANT " + ", ".join(f"TABLE ENGINE ON {engine}" for engine in _ENGINES)]
    grant_lines = "".join(f"<query>{escape(grant)}</query>" for grant in grants)
    definers = "".join(_definer_xml(user) for user in users.by_name.values() if user.row_policies)
    return f"""<clickhouse>
  <profiles><default><max_memory_usage>{query_memory_bytes}</max_memory_usage></default></profiles>
  <quotas><default></default></quotas>
  <users>
    <default>
      <password></password><networks><ip>127.0.0.1</ip></networks><profile>default</profile><quota>default</quota>
      <grants>{grant_lines}</grants>
    </default>
{definers}  </users>
</clickhouse>
"""


def _definer_xml(user: User) -> str:
    # Nobody can log in to the engine itself; the grants and filters are all that counts.
    databases = ""
    for table, condition in user.row_policies.items():
        database, name = table.split(".")
        databases += f"<{database}><{name}><filter>{escape(condition)}</filter></{name}></{database}>"
    return (
        f"    <{user.name}><password_sha256_hex>{user.password_sha256 or ''}</password_sha256_hex>"
        "<networks><ip>127.0.0.1</ip></networks><profile>default</profile><quota>default</quota>"
        f"<grants><query>GRANT SELECT ON *.*</query></grants><databases>{databases}</databases></{user.name}>\n"
    )
