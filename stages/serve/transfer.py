"""Requests in transfer, on tornado: a client that is slow or sends nothing holds a connection, and nothing else."""

from __future__ import annotations

import asyncio
import logging
import sys
from typing import Any, Protocol

from tornado.httpserver import HTTPServer
from tornado.httputil import HTTPServerRequest
from tornado.web import Application, HTTPError, RequestHandler, stream_request_body

from rats.pipeline.rewards.remote_protocol import SLOWEST

log = logging.getLogger(__name__)

MAX_BODY = 1 << 29
"""The most bytes of a request. 32 pictures of 1024 px as float32 are 0.4 GiB."""
MAX_HELD = 8 * MAX_BODY
"""The most bytes of all requests and replies in memory at a time, also of those in transfer."""
CONNECTIONS = 64
"""The most connections in transfer. If there is one more, the oldest of them is closed."""
HEADER_SECONDS, TRANSFER_SECONDS = 10.0, 60.0
"""Seconds for a header, and for a body or a reply in addition to the time of its bytes at SLOWEST."""
CHUNK = 1 << 20


class Refused(HTTPError):
    """A request is refused with this status and text."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(status)
        self.text = text


class Answering(Protocol):
    """What answers: `service.Service`.

    Attributes:
        identity: The reply to GET /identity.
        asking: Connections whose request is being answered.
        held: Bytes of all requests and replies in memory.
    """

    identity: bytes
    asking: set[object]
    held: int

    def refusal(self, request: HTTPServerRequest, length: int | None) -> Refused | None:
        """Why a request is refused by its header; None if it is not."""

    async def reply(self, body: bytes, asking: object) -> bytes:
        """The reply's body. Raises Refused."""


class Listener(HTTPServer):
    """Closes the oldest connection in transfer if there are too many, so that slow clients make room."""

    def initialize(self, service: Answering) -> None:  # type: ignore[override]
        application = Application([(r".*", _Handler, {"service": service})], log_function=lambda handler: None)
        limits: Any = {"idle_connection_timeout": HEADER_SECONDS, "chunk_size": CHUNK}
        super().initialize(application, no_keep_alive=True, **limits)
        self.service = service
        self.open: dict[Any, None] = {}

    def start_request(self, server_conn: Any, request_conn: Any) -> Any:
        self.open[server_conn] = None
        slow = [one for one in self.open if one not in self.service.asking]
        if len(slow) > CONNECTIONS:
            slow[0].stream.close()
        return super().start_request(server_conn, request_conn)

    def on_close(self, server_conn: Any) -> None:
        del self.open[server_conn]
        super().on_close(server_conn)


@stream_request_body
class _Handler(RequestHandler):
    """One request. Each connection has only one."""

    def initialize(self, service: Answering) -> None:
        self.service, self.size = service, 0
        self.refused: Refused | None = None
        self.chunks: list[bytes] = []

    def prepare(self) -> None:
        """Checks the header. The body of a refused request is still read: a client that is cut off sees no reply."""
        text = self.request.headers.get("Content-Length", "0" if self.request.method == "GET" else "")
        length = int(text) if text.isdecimal() else None
        self.refused = self.service.refusal(self.request, length)
        connection: Any = self.request.connection
        connection.set_max_body_size(sys.maxsize)  # `refusal` holds it against MAX_BODY, and says so
        connection.set_body_timeout(TRANSFER_SECONDS + min(length or 0, MAX_BODY) / SLOWEST)

    def data_received(self, chunk: bytes) -> None:
        if self.refused is None and self.service.held + len(chunk) > MAX_HELD:
            self.refused = Refused(503, "too many requests at once")
            self.on_finish()
        if self.refused is None:
            self.chunks.append(chunk)
            self.size += len(chunk)
            self.service.held += len(chunk)

    def get(self) -> None:
        if self.refused:
            raise self.refused
        self.finish(self.service.identity)

    async def post(self) -> None:
        if self.refused:
            raise self.refused
        body, self.chunks = b"".join(self.chunks), []
        reply = await self.service.reply(body, self.request.server_connection)
        await self._send(reply)

    async def _send(self, reply: bytes) -> None:
        connection: Any = self.request.connection
        self.service.held += len(reply)
        try:
            async with asyncio.timeout(TRANSFER_SECONDS + len(reply) / SLOWEST):
                await self.finish(reply)
        except TimeoutError:
            connection.close()
        finally:
            self.service.held -= len(reply)

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        _, error, _ = kwargs.get("exc_info", (None, "the server is ending", None))
        if status_code == 503:
            self.set_header("Retry-After", "1")
        self.set_header("Content-Type", "text/plain; charset=utf-8")
        self.finish(error.text if isinstance(error, Refused) else str(error))

    def log_exception(self, *error: Any) -> None:
        """Does not log refusals and clients that disconnect."""
        log.debug("%s", error[1])

    def on_connection_close(self) -> None:
        super().on_connection_close()
        self.on_finish()

    def on_finish(self) -> None:
        """Frees the body."""
        self.service.held -= self.size
        self.chunks, self.size = [], 0
