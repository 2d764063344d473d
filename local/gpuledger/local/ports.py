"""Ports on loopback, where every embedded service listens."""

import socket
from contextlib import closing

from gpuledger.local.exceptions import PortTaken

__all__ = ["LOOPBACK", "check_port", "free_port"]

LOOPBACK = "127.0.0.1"


def check_port(port: int, what: str) -> None:
    """Raises PortTaken, in the name of the service `what`, unless `port` can be listened on now."""
    with closing(socket.socket(socket.AF_INET, socket.SOCK_STREAM)) as probe:
        # As servers do: connections of a former one that are still closing do not matter.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
            probe.listen(1)
        except OSError as error:
            raise PortTaken(LOOPBACK, port, what, (error.strerror or str(error)).lower()) from error
        except OverflowError as error:
            raise PortTaken(LOOPBACK, port, what, "ports are 1 to 65535") from error


def free_port() -> int:
    """One that nobody listens on now; another program can take it before it is used."""
    with closing(socket.socket(socket.AF_INET, socket.SOCK_STREAM)) as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])
