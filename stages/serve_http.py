"""HTTP for `rats serve`, on tornado: authentication, limits, and the queue.

Everything but the model runs in one event loop. A client that is slow or sends nothing does not delay others: it
holds a connection, but no place in the queue.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from tornado.httpserver import HTTPServer
from tornado.httputil import HTTPServerRequest, split_host_and_port
from tornado.netutil import is_valid_ip
from tornado.web import Application, HTTPError, RequestHandler, stream_request_body

from rats.pipeline.rewards.remote_protocol import NEW_TOKEN, SLOWEST
from rats.schemas.errors import CannotCreateError, ConfigError, brief, one_line, plain

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
GRACE = 5.0
"""Seconds in which requests are still answered after the server is told to end."""
ENDPOINTS = (("GET", "/identity"), ("POST", "/score"))


class Refused(HTTPError):
    """A request is refused with this status and text."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(status)
        self.text = text


class Service:
    """Answers requests one after the other. Each takes one of `queue` places once its body has arrived."""

    identity: bytes
    """The reply to GET /identity."""

    def __init__(self, host: str, port: int, queue: int, token: str | None = None) -> None:
        """Listens at once; port 0 takes a free one.

        Raises:
            CannotCreateError: the port is taken, or the address is not of this machine.
            ConfigError: an address that others can reach, and no token.
        """
        self.socket = _listening(host, port, open_to_all=token is None)
        self.server_address = self.socket.getsockname()
        self.names = {"localhost", host.lower(), socket.gethostname().lower()}
        self.queue, self.held = queue, 0
        self.asking: set[object] = set()
        self._token = token
        self._replies: set[asyncio.Task[None]] = set()
        self._is_stuck = False
        self._model = ThreadPoolExecutor(1, "model")
        self._ended: Future[None] = Future()

    def read(self, body: bytes) -> Any:
        """Parses the body of POST /score. Raises ValueError with what is wrong."""
        raise NotImplementedError

    def answer(self, question: Any) -> bytes:
        """The reply's body."""
        raise NotImplementedError

    @property
    def url(self) -> str:
        """The address at which it listens."""
        host, port = self.server_address[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def serve(self) -> None:
        """Runs until `shutdown` or SIGTERM. Requests whose body has arrived are then answered first.

        Raises SystemExit(143) after SIGTERM, if this is the main thread.
        """
        with _sigterm(self.shutdown) as told:
            asyncio.run(self._serve())
        if told and self._is_stuck:  # python would wait for the batch under way, and a judge may never end it
            os._exit(128 + signal.SIGTERM)
        if told:
            raise SystemExit(128 + signal.SIGTERM)

    def shutdown(self) -> None:
        """Ends `serve`; may be called from any thread."""
        if not self._ended.done():
            self._ended.set_result(None)

    async def _serve(self) -> None:
        listener = _Listener(self)
        listener.add_socket(self.socket)
        try:
            await asyncio.wrap_future(self._ended)
        finally:
            listener.stop()
            if self._replies:
                _, late = await asyncio.wait(self._replies, timeout=GRACE)
                self._is_stuck = bool(late)
            self._model.shutdown(wait=False, cancel_futures=True)
            await listener.close_all_connections()

    def refusal(self, request: HTTPServerRequest, length: int | None) -> Refused | None:
        """Why a request is refused by its header; None if it is not."""
        name = split_host_and_port(request.host.lower())[0].strip("[]")
        if "Origin" in request.headers:
            return Refused(403, "a web page may not ask a reward server: there is an Origin header")
        # a web page that resolves its own name to this server (DNS rebinding) sends that name, never an IP address
        if name not in self.names and not is_valid_ip(name):
            return Refused(403, f"foreign Host {brief(name)}: ask the server by its address, or start it with --host")
        if not self._is_known(request.headers.get("Authorization", "")):
            return Refused(401, "there is no token or a wrong one: give the reward a token_file in params.yaml")
        if (request.method, request.path) not in ENDPOINTS:
            return Refused(404, f"no {plain(request.path)}: GET /identity or POST /score")
        if length is None:
            return Refused(411, "say Content-Length")
        if length > MAX_BODY:
            return Refused(413, f"{length} bytes, at most {MAX_BODY}: start the server with a lower --max-batch")
        return None

    def _is_known(self, authorization: str) -> bool:
        if self._token is None:
            return True
        scheme, _, token = authorization.partition(" ")
        return scheme.lower() == "bearer" and hmac.compare_digest(token.strip().encode(), self._token.encode())

    async def reply(self, body: bytes, asking: object) -> bytes:
        """The reply's body, made in threads: requests are read side by side and answered one after the other."""
        if len(self.asking) >= self.queue:
            raise Refused(503, "the queue is full")
        task: Any = asyncio.current_task()
        self._replies.add(task)
        task.add_done_callback(self._replies.discard)  # once it is sent
        self.asking.add(asking)
        try:
            loop = asyncio.get_running_loop()
            question = await loop.run_in_executor(None, self.read, body)
            return await loop.run_in_executor(self._model, self._answered, question)
        except ValueError as error:
            raise Refused(400, plain(str(error))) from error
        finally:
            self.asking.discard(asking)

    def _answered(self, question: Any) -> bytes:
        try:
            return self.answer(question)
        except (Exception, SystemExit) as error:  # the client gets the error, and the server goes on
            log.warning("a request failed: %s", one_line(error))
            raise Refused(500, one_line(error)) from error


class _Listener(HTTPServer):
    """Closes the oldest connection in transfer if there are too many, so that slow clients make room."""

    def initialize(self, service: Service) -> None:  # type: ignore[override]
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

    def initialize(self, service: Service) -> None:
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


def _listening(host: str, port: int, open_to_all: bool) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family, backlog=128)
    except (OSError, OverflowError) as error:
        raise CannotCreateError(f"cannot listen at {host}:{port}: {error}; choose another --port") from error
    if open_to_all and not ipaddress.ip_address(listening.getsockname()[0]).is_loopback:
        listening.close()
        raise ConfigError(
            f"others can reach {host or 'every address'}, so requests must carry a token: write one ({NEW_TOKEN}) and "
            "give --token-file FILE, or listen at 127.0.0.1 and come through an SSH tunnel"
        )
    listening.setblocking(False)
    return listening


@contextmanager
def _sigterm(end: Callable[[], None]) -> Iterator[list[int]]:
    """Calls `end` on SIGTERM and appends it to the list. Only the main thread may set a handler."""
    told: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield told
        return

    def handler(number: int, frame: Any) -> None:
        told.append(number)
        end()

    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield told
    finally:
        signal.signal(signal.SIGTERM, before)
