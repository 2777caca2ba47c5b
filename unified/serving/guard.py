"""What stands between the network and the page: which hosts, paths and sizes are let in, and how much for each client."""

import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from unified.serving.address import client_of, is_address

BODY_LIMIT = 1 << 18  # bytes of a request that is no upload; the page sends a few thousand
CONNECTION_LIMIT = 200  # requests of one client that are answered at the same time
GRACE = 5.0  # seconds within which a client has to read what it asked for
API = "/gradio_api"
ANSWERS, UPLOADS = f"{API}/queue/data", f"{API}/upload"
# What the page and gradio's client use. Gradio serves more: calls past the queue, recordings, a proxy, monitoring, ...
USED = re.compile(
    r"/|/(config|login|logout|theme\.css|favicon\.ico|manifest\.json|robots\.txt)/?|/(assets|static|svelte)/.+"
    rf"|{API}/(info|user|login_check|app_id|startup-events|theme\.css|reset|cancel)/?"
    rf"|{API}/(queue/join|queue/data|upload|upload_progress)|{API}/heartbeat/[^/]+"
    rf"|{API}/file=(?!https?:).+",
    re.IGNORECASE,
)


class Visitors:
    """Who is answered: the requests of each client, and the sessions whose answers somebody reads.

    A client is an address, because it may choose as many session hashes as it likes. Safe in any thread.

    Args:
        limit: requests of one client that are answered or wait.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.turns: Counter[str] = Counter()  # by client
        self.connections: Counter[str] = Counter()  # by client
        self.readers: Counter[str] = Counter()  # by session
        self._changed = threading.Condition()

    @contextmanager
    def turn(self, address: str, session: str) -> Iterator[None]:
        """While a request is answered; it begins once somebody reads the answers to ``session``.

        Raises:
            ValueError: if the client has as many as it may have, or nobody reads.
        """
        client = client_of(address)
        with self._changed:
            if self.turns[client] >= self.limit:
                raise ValueError(
                    f"requests: {self.turns[client]} of yours are being answered or wait, the limit is {self.limit}; "
                    "stop one, or try again later."
                )
            self.turns[client] += 1
        try:
            with self._changed:
                if not self._changed.wait_for(lambda: self.readers[session], GRACE):
                    raise ValueError("requests: nobody reads the answers to this one; read them while it runs.")
            yield
        finally:
            self._leave(self.turns, client)

    @contextmanager
    def reading(self, session: str) -> Iterator[None]:
        """While somebody reads the answers to ``session``."""
        with self._changed:
            self.readers[session] += 1
            self._changed.notify_all()
        try:
            yield
        finally:
            self._leave(self.readers, session)

    @contextmanager
    def connected(self, address: str) -> Iterator[bool]:
        """While a connection is served; gives whether the client may have it."""
        client = client_of(address)
        with self._changed:
            self.connections[client] += 1
            few = self.connections[client] <= CONNECTION_LIMIT
        try:
            yield few
        finally:
            self._leave(self.connections, client)

    def _leave(self, counted: Counter[str], key: str) -> None:
        with self._changed:
            counted[key] -= 1
            if not counted[key]:
                del counted[key]


class HostCheck(TrustedHostMiddleware):
    """Answers only under known names, so that no page of another site reaches the server under its own (DNS rebinding).

    Args:
        addresses: answer under every IP address: nobody can make that of another server stand for this one.
    """

    def __init__(self, app: ASGIApp, allowed_hosts: list[str], addresses: bool):
        super().__init__(app, allowed_hosts, www_redirect=False)
        self.addresses = addresses

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        known = self.addresses and scope["type"] != "lifespan" and is_address(_host(scope))
        await (self.app if known else super().__call__)(scope, receive, send)


class Entrance:
    """Lets in the paths that are used, with bodies of a bounded size, and notices who reads answers.

    Args:
        upload_limit: bytes of an upload.
    """

    def __init__(self, app: ASGIApp, visitors: Visitors, upload_limit: int):
        self.app, self.visitors = app, visitors
        self.small = RequestBodyLimitMiddleware(app, BODY_LIMIT)
        self.large = RequestBodyLimitMiddleware(app, upload_limit)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] != "http" or not USED.fullmatch(scope["path"]):
            await PlainTextResponse("Not Found", 404)(scope, receive, send)
        else:
            await self._serve(scope, receive, send)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        sessions = parse_qs(scope["query_string"].decode("latin-1")).get("session_hash", [])
        reads = scope["path"] == ANSWERS and sessions
        with self.visitors.connected(address_of(scope)) as allowed:
            if not allowed:
                await PlainTextResponse("Too Many Requests", 429)(scope, receive, send)
                return
            with self.visitors.reading(sessions[-1]) if reads else nullcontext():
                await (self.large if scope["path"] == UPLOADS else self.small)(scope, receive, send)


def _host(scope: Scope) -> str:
    """The ``Host`` header without its port."""
    try:
        return urlsplit(f"//{Headers(scope=scope).get('host', '')}").hostname or ""
    except ValueError:
        return ""


def address_of(scope: Scope) -> str:
    """Address of the client, as a proxy on this machine reports it."""
    return str(scope["client"][0]) if scope.get("client") else ""


def guards(visitors: Visitors, hosts: list[str], addresses: bool, upload_limit: int) -> list[Middleware]:
    """What a server of the page needs around it, the outermost first."""
    return [
        Middleware(HostCheck, allowed_hosts=hosts, addresses=addresses),
        Middleware(Entrance, visitors=visitors, upload_limit=upload_limit),
    ]
