"""Run as a process by test_clickhouse.py: the engine with the rights and the profile that the deployment's users file
gives one user, as a server would hold them; the engine allows one such configuration per process.

`python -m tests.deploy.clickhouse_as_user DIR USER` reads statements, one JSON text a line, and answers each with a
line: "ok" or the error.
"""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import chdb

from tests.deploy.conftest import DEPLOY


def write_configuration(directory: Path, user: str) -> Path:
    """The deployment's file, its `user` as the one that the engine logs in: `default`."""
    root = ElementTree.parse(DEPLOY / "clickhouse" / "users.d" / "gpuledger.xml").getroot()
    users = root.find("users")
    assert users is not None
    chosen = users.find(user)
    assert chosen is not None
    for other in list(users):
        users.remove(other)
    chosen.tag = "default"
    password = chosen.find("password_sha256_hex")
    assert password is not None
    chosen.remove(password)
    ElementTree.SubElement(chosen, "password")
    users.append(chosen)
    # A server's own users file, which the deployment's is merged into, has these.
    profiles = root.find("profiles")
    assert profiles is not None
    ElementTree.SubElement(profiles, "default")
    quotas = ElementTree.SubElement(root, "quotas")
    ElementTree.SubElement(quotas, "default")
    users_file = directory / f"users-{user}.xml"
    users_file.write_text(ElementTree.tostring(root, encoding="unicode"), encoding="utf-8")
    server = ElementTree.parse(DEPLOY / "clickhouse" / "config.d" / "gpuledger.xml").getroot()
    access = ElementTree.SubElement(server, "access_control_improvements")
    # As a server's own configuration has it: its tables about itself need a grant, but for the harmless ones.
    ElementTree.SubElement(access, "select_from_system_db_requires_grant").text = "true"
    ElementTree.SubElement(server, "users_config").text = str(users_file)
    server_file = directory / f"server-{user}.xml"
    server_file.write_text(ElementTree.tostring(server, encoding="unicode"), encoding="utf-8")
    return server_file


def main(directory: Path, user: str) -> None:
    server_file = write_configuration(directory, user)
    connection = chdb.connect(f"{directory / 'data'}?config-file={server_file}")
    for line in sys.stdin:
        request = json.loads(line)
        try:
            connection.query(request["sql"], "Null", params=request["parameters"])
            answer = "ok"
        except Exception as error:
            answer = str(error).splitlines()[0]
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
