"""Addresses of this machine, and of others, which a process can be kept from calling."""

from __future__ import annotations

import ipaddress
import sys
from typing import Any


def is_loopback(host: object) -> bool:
    """Tell whether a host's name or address is this machine's own, which no other one reaches."""
    text = host.decode("ascii", "replace") if isinstance(host, bytes) else str(host)
    try:
        return text == "localhost" or ipaddress.ip_address(text).is_loopback
    except ValueError:
        return False


def stay_local() -> None:
    """Refuse connections to other machines for the rest of the process, whatever a library or a request asks for."""

    def refuse(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("socket.connect", "socket.sendto"):
            address = arguments[1]
            host = address[0] if isinstance(address, tuple) else None  # a Unix socket has a path
        elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
            host = arguments[0]
        else:
            return
        if host is not None and not is_loopback(host):
            raise PermissionError(f"{host}: the page calls no other machine")

    sys.addaudithook(refuse)
