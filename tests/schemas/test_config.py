"""The configuration: every wrong setting is named with its path, its value and the fix, and no secret is ever shown."""

import json
import re
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from gpuledger.schemas.config import Config, load_config, parse_config, parse_listen
from gpuledger.schemas.exceptions import ConfigError
from gpuledger.schemas.settings import Secret, describe, to_builtins
from gpuledger.schemas.topics import TOPICS
from gpuledger.schemas.yaml_text import parse_yaml

EXAMPLE = Path(__file__).parents[2] / "deploy" / "gpuledger.example.yaml"


def problems(text: str, environ: dict[str, str] | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_config(text, environ or {})
    return str(caught.value).splitlines()


def given_paths(tree: Any, path: str = "") -> set[str]:
    """The paths of all leaves of a tree, as `describe` writes them."""
    if isinstance(tree, dict):
        return {p for key, value in tree.items() for p in given_paths(value, f"{path}.{key}" if path else str(key))}
    if isinstance(tree, list) and tree and isinstance(tree[0], dict):
        return {path} | {p for value in tree for p in given_paths(value, f"{path}[]")}
    return {path}


def test_the_example_is_the_defaults() -> None:
    assert parse_config(EXAMPLE.read_text(encoding="utf-8"), {}) == Config()


def test_the_example_has_every_setting() -> None:
    text = EXAMPLE.read_text(encoding="utf-8").replace("  webhooks: []\n", "")
    uncommented = re.sub(r"^( *)#: ", r"\1", text, flags=re.MULTILINE)
    assert len(parse_config(uncommented, {}).alerts.webhooks) == 1
    partitions = {f"kafka.partitions.{name}" for name in TOPICS}
    known = {s.path for s in describe(Config) if not s.secret} - {"kafka.partitions"} | partitions
    assert given_paths(parse_yaml(uncommented, "example")) == known


def test_every_setting_says_what_it_means() -> None:
    assert [s.path for s in describe(Config) if not s.doc] == []


def test_every_topic_has_partitions() -> None:
    assert set(Config().kafka.partitions) == set(TOPICS)


def test_the_file_and_the_variables_together() -> None:
    text = "kafka:\n  partitions: {dirty: 8}\nagent:\n  pool: h100\n  active_threshold: 0.25\n"
    config = parse_config(
        text,
        {
            "GPULEDGER_KAFKA__BOOTSTRAP": "k1:9092,k2:9092",
            "GPULEDGER_KAFKA__PARTITIONS__TELEMETRY": "64",
            "GPULEDGER_AGENT__COLLECTORS": "nvml, host",
            "GPULEDGER_AGENT__NODE": "0012",
            "GPULEDGER_ALERTS__RESERVED_UNUSED__ENABLED": "false",
            "GPULEDGER_ALERTS__RESERVED_UNUSED__MIN_MONEY_PER_HOUR": "2.50",
            "GPULEDGER_ALERTS__WEBHOOKS": "[{url: 'http://127.0.0.1:9/hook'}]",
            "GPULEDGER_CONFIG": "elsewhere.yaml",
            "HOME": "/nobody",
        },
    )
    assert config.kafka.bootstrap == "k1:9092,k2:9092"
    assert (config.kafka.partitions["telemetry"], config.kafka.partitions["dirty"]) == (64, 8)
    assert config.kafka.partitions["jobs"] == 1
    assert (config.agent.pool, config.agent.node, config.agent.active_threshold) == ("h100", "0012", 0.25)
    assert config.agent.collectors == ("nvml", "host")
    assert config.alerts.reserved_unused.enabled is False
    assert config.alerts.reserved_unused.min_money_per_hour == Decimal("2.50")
    assert config.alerts.webhooks[0].url == "http://127.0.0.1:9/hook"


def test_a_section_without_content_is_its_defaults() -> None:
    assert parse_config("kafka:\nclickhouse:\n", {"GPULEDGER_CLICKHOUSE__USER": "ledger"}).clickhouse.user == "ledger"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "clickhouse: {url: localhost}",
            'clickhouse.url: expected http(s)://host:port, got "localhost"; write "http://127.0.0.1:8123"',
        ),
        (
            "clickhouse: {pasword_file: x}",
            "clickhouse.pasword_file: there is no such setting; did you mean password_file?",
        ),
        ("kafak: {}", "kafak: there is no such setting; did you mean kafka?"),
        (
            "kafka: {partitions: {telemtry: 1}}",
            "kafka.partitions.telemtry: there is no such setting; did you mean telemetry?",
        ),
        (
            "kafka: {partitions: {dirty: 0}}",
            "kafka.partitions.dirty: expected a whole number from 1 to 10000, got 0; write 2",
        ),
        (
            "kafka: {bootstrap: 'broker'}",
            (
                'kafka.bootstrap: expected host:port, several with commas between them, got "broker"; '
                'write "127.0.0.1:9092"'
            ),
        ),
        (
            "kafka: {bootstrap: 'a:99999'}",
            (
                'kafka.bootstrap: expected host:port, several with commas between them, got "a:99999"; '
                'write "127.0.0.1:9092"'
            ),
        ),
        ("kafka: 5", "kafka: expected a mapping of settings, got 5; write one setting per line"),
        ("[1]", "the file: expected a mapping of settings, got [1]; write one setting per line"),
        ("agent: {node: 12}", 'agent.node: expected text, got 12; write "12"'),
        (
            "agent: {period_ms: 1.5}",
            ("agent.period_ms: expected a whole number from 100 to 60000, got 1.5; write 1000"),
        ),
        (
            "agent: {period_ms: true}",
            "agent.period_ms: expected a whole number from 100 to 60000, got true; write 1000",
        ),
        (
            "agent: {flush_ms: 200}",
            "agent.flush_ms: expected at least period_ms, got 200; write 1000 or more",
        ),
        (
            "agent: {collectors: nvml}",
            (
                'agent.collectors: expected a list, each one of host, nvml, processes, got "nvml"; '
                'write ["nvml", "host", "processes"]'
            ),
        ),
        (
            "ledger: {price_interval_minutes: 7}",
            ("ledger.price_interval_minutes: expected a number of minutes that divides a day, got 7; write 15"),
        ),
        (
            "page: {port: 70000}",
            "page.port: expected a whole number from 0 to 65535, got 70000; write 8470",
        ),
        (
            "log: {level: loud}",
            'log.level: expected one of debug, error, info, warning, got "loud"; write "info"',
        ),
        (
            "alerts: {reserved_unused: {min_money_per_hour: '2,50'}}",
            ('alerts.reserved_unused.min_money_per_hour: expected a decimal or null, got "2,50"; write "2.50"'),
        ),
        (
            "alerts: {webhooks: [{url: 'http://a/'}, {}]}",
            ('alerts.webhooks[1].url: is missing; expected text; write "https://alerts.example/hooks/gpuledger"'),
        ),
        ("alerts: {webhooks: {}}", "alerts.webhooks: expected a list, got {}; write [] for none"),
        (
            "kafka: {security: {protocol: SSL, cert_file: a}}",
            "kafka.security.key_file: is missing; cert_file and key_file are set together",
        ),
        (
            "page: {port: 1, port: 2}",
            "configuration:1:17: the key 'port' is written twice; keep one of them",
        ),
        (
            "agent: {active_threshold: .inf}",
            ("configuration:1:27: '.inf' is not a finite decimal number; quote it if it is text"),
        ),
    ],
)
def test_a_wrong_setting_is_named_with_its_value_and_the_fix(text: str, expected: str) -> None:
    assert problems(text) == [expected]


def test_all_wrong_settings_are_named_at_once() -> None:
    text = "page: {port: x, host: ''}\nlog: {format: xml}"
    assert [line.split(":")[0] for line in problems(text)] == ["page.host", "page.port", "log.format"]


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        (
            "GPULEDGER_PAGE__PORT",
            "x",
            ('page.port: expected a whole number from 0 to 65535, got "x" (from GPULEDGER_PAGE__PORT); write 8470'),
        ),
        (
            "GPULEDGER_PAGE__PROT",
            "1",
            "GPULEDGER_PAGE__PROT: there is no such setting; did you mean port?",
        ),
        (
            "GPULEDGER_PAGE",
            "1",
            ("GPULEDGER_PAGE: names a section; write one variable per setting, GPULEDGER_PAGE__<SETTING>"),
        ),
        (
            "GPULEDGER_LOG__LEVEL__X",
            "1",
            ('log.level: expected one of debug, error, info, warning, got {"x": "1"}; write "info"'),
        ),
    ],
)
def test_a_wrong_variable_is_named(name: str, value: str, expected: str) -> None:
    found = problems("", {name: value})
    assert len(found) == 1
    assert found[0].startswith(expected.split(", got {")[0])


def test_a_secret_in_the_file_is_refused_and_not_shown() -> None:
    found = problems("clickhouse: {password: hush-hush}")
    assert found[0].startswith("clickhouse.password: a secret is not read from here")
    assert "hush" not in found[0]


def test_a_user_in_an_address_is_refused() -> None:
    found = problems("clickhouse: {url: 'http://me:pw@127.0.0.1:8123'}")
    assert "without a user" in found[0]


def test_secrets_are_never_shown(tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text("hush-from-file\n")
    config_file = tmp_path / "gpuledger.yaml"
    config_file.write_text(
        "kafka: {security: {protocol: SASL_SSL, username: me}}\n"
        f"clickhouse: {{password_file: {file}}}\n"
        f"alerts: {{webhooks: [{{url: 'http://127.0.0.1/', secret_file: {file}}}]}}\n"
    )
    config = load_config(config_file, {"GPULEDGER_KAFKA__SECURITY__PASSWORD": "hush-from-variable"})
    assert config.kafka.security.password == Secret("hush-from-variable")
    assert config.clickhouse.client_arguments()["password"] == "hush-from-file"
    assert config.alerts.webhooks[0].secret == Secret("hush-from-file")
    for shown in (repr(config), str(config), json.dumps(to_builtins(config)), f"{config.clickhouse.password}"):
        assert "hush" not in shown
        assert "***" in shown


def test_the_variable_wins_over_the_file_of_a_secret(tmp_path: Path) -> None:
    environ = {
        "GPULEDGER_CLICKHOUSE__PASSWORD": "from-variable",
        "GPULEDGER_CLICKHOUSE__PASSWORD_FILE": str(tmp_path / "absent"),
    }
    assert load_config(None, environ).clickhouse.password == Secret("from-variable")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r'^--config: cannot read ".*absent.yaml": No such file'):
        load_config(tmp_path / "absent.yaml", {})
    with pytest.raises(ConfigError, match=r'^clickhouse.password_file: cannot read ".*absent": No such file'):
        load_config(None, {"GPULEDGER_CLICKHOUSE__PASSWORD_FILE": str(tmp_path / "absent")})


def test_an_empty_secret_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(ConfigError, match=r"^clickhouse.password_file: .* is empty"):
        load_config(None, {"GPULEDGER_CLICKHOUSE__PASSWORD_FILE": str(tmp_path / "empty")})


def test_sasl_needs_a_user_and_a_password() -> None:
    found = problems("kafka: {security: {protocol: SASL_SSL}}")
    assert [line.split(":")[0] for line in found] == ["kafka.security.username", "kafka.security.password_file"]


def test_money_is_read_exactly() -> None:
    text = "alerts: {reserved_unused: {min_money_per_hour: 0.1}}"
    money = parse_config(text, {}).alerts.reserved_unused.min_money_per_hour
    assert money == Decimal("0.1")


@pytest.mark.parametrize(("listen", "expected"), [("127.0.0.1:9464", ("127.0.0.1", 9464)), ("[::1]:0", ("::1", 0))])
def test_listen_is_host_and_port(listen: str, expected: tuple[str, int]) -> None:
    assert parse_config(f"agent: {{listen: '{listen}'}}", {}).agent.listen == listen
    assert parse_listen(listen) == expected
