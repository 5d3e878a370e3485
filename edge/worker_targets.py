"""The `worker` setting: gRPC targets separated by commas, of which a dns: name stands for all of its addresses."""

import asyncio
import re
import socket

_HOST = r"(\[[0-9A-Fa-f:.]+\]|[^\s/:@?#,\[\]]+)"
# gRPC's own forms of a target, where dns: may name the server to ask.
_TARGET = re.compile(
    rf"(dns:(//[^\s/,]*/)?|ipv4:|ipv6:)?{_HOST}:(?P<port>[0-9]{{1,5}})|unix:[^\s,]+"
)
_NAME = re.compile(rf"dns:(///)?(?P<host>{_HOST}):(?P<port>[0-9]{{1,5}})")
_KINDS = (socket.AF_INET, socket.AF_INET6)


def split_targets(value: str) -> list[str]:
    """The targets of a setting, in order. Raises ValueError for one that is none, or comes twice."""
    targets = [target.strip() for target in value.split(",")]
    for target in targets:
        match = _TARGET.fullmatch(target)
        if match is None or (match["port"] and not 0 < int(match["port"]) < 65536):
            raise ValueError("must be host:port or unix:/path, or several with commas between")
    if len(set(targets)) < len(targets):
        raise ValueError("must not name a worker twice")
    return targets


def is_name(target: str) -> bool:
    """Whether the target stands for all addresses of a name: dns:name:port or dns:///name:port.

    One that says which server to ask (dns://server/name:port) is left to gRPC and is one worker.
    """
    return _NAME.fullmatch(target) is not None


async def resolve(name: str) -> frozenset[str]:
    """Targets of the addresses that a name has now. IPv4 where it has any: those of both kinds may be one worker's.

    Raises: OSError.
    """
    match = _NAME.fullmatch(name)
    assert match is not None  # noqa: S101 - is_name has said so
    loop = asyncio.get_running_loop()
    host = match["host"].strip("[]")
    found = await loop.getaddrinfo(host, int(match["port"]), type=socket.SOCK_STREAM)
    hosts = {
        kind: {str(address[0]) for family, *_, address in found if family == kind}
        for kind in _KINDS
    }
    port = match["port"]
    ipv4 = frozenset(f"ipv4:{host}:{port}" for host in hosts[socket.AF_INET])
    return ipv4 or frozenset(f"ipv6:[{host}]:{port}" for host in hosts[socket.AF_INET6])
