"""Where a server listens, under which names it answers, and which addresses are one client."""

import errno
import re
import socket
from collections.abc import Sequence
from ipaddress import ip_address, ip_network

_NAME = re.compile(r"\*|(\*\.)?[\w-]+(\.[\w-]+)*")


def free_port(host: str, port: int) -> int:
    """The port to listen on at ``host``: ``port``, or any free one for 0.

    Raises:
        ValueError: if the host does not resolve, is not this machine, or the port is taken or reserved.
    """
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise ValueError(f"host: {host!r} does not resolve; give a name or an address of this machine.") from error
    with socket.socket(family, kind, protocol) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one that was closed a moment ago is free
        try:
            listening.bind(place)
            listening.listen()
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                raise ValueError(f"host: {host!r} is not this machine; give a name or an address of it.") from error
            raise ValueError(
                f"port: {port} of {host!r} cannot be used ({error.strerror}); give another one."
            ) from error
        return int(listening.getsockname()[1])


def is_everywhere(host: str) -> bool:
    """Whether a server at ``host`` listens on all addresses of its machine."""
    return host in ("0.0.0.0", "::")


def answered_hosts(host: str, more: Sequence[str] = ()) -> list[str]:
    """Names and addresses in the ``Host`` header that a server at ``host`` answers, IPv6 addresses in brackets.

    Args:
        host: where it listens; if that is everywhere, it answers under its machine's names as well.
        more: other names, such as that of a proxy; ``*.example.com`` stands for all below, ``*`` for all there are.

    Raises:
        ValueError: for what cannot be such a name.
    """
    for name in more:
        if not (_NAME.fullmatch(name) or is_address(name)):
            raise ValueError(f"allow_host: {name!r} is no host name; give one without scheme, port and path.")
    machine = (socket.gethostname(), socket.getfqdn()) if is_everywhere(host) else ()
    names = dict.fromkeys(["localhost", "127.0.0.1", "::1", host, *machine, *more])
    return [bracketed(name) for name in names]


def is_address(text: str) -> bool:
    """Whether a text is an IP address, in brackets or not."""
    try:
        ip_address(text.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    return True


def bracketed(host: str) -> str:
    """A host as it stands in a URL: an IPv6 address in brackets."""
    return f"[{host}]" if ":" in host else host


def client_of(address: str) -> str:
    """Whom an address belongs to: itself, but the /64 of an IPv6 address, which is handed out as a whole."""
    if ":" not in address:
        return address
    return str(ip_network((address.partition("%")[0], 64), strict=False))
