"""Addresses of this machine, and of others."""

from __future__ import annotations

import ipaddress


def is_loopback(host: object) -> bool:
    """Tell whether a host's name or address is this machine's own, which no other one reaches."""
    text = host.decode("ascii", "replace") if isinstance(host, bytes) else str(host)
    try:
        return text == "localhost" or ipaddress.ip_address(text).is_loopback
    except ValueError:
        return False
