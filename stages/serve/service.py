"""Who is answered, in which order: authentication and the queue.

Requests arrive in one event loop (`transfer`), and the model runs in a thread of its own.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import os
import signal
import socket
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from tornado.httputil import HTTPServerRequest, split_host_and_port
from tornado.netutil import is_valid_ip

from rats.schemas.errors import brief, one_line, plain
from rats.stages.serve import transfer
from rats.stages.serve.listening import listening_at, on_sigterm
from rats.stages.serve.transfer import Listener, Refused

log = logging.getLogger(__name__)

GRACE = 5.0
"""Seconds in which requests are still answered after the server is told to end."""
ENDPOINTS = (("GET", "/identity"), ("POST", "/score"))


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
        self.socket = listening_at(host, port, open_to_all=token is None)
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
        with on_sigterm(self.shutdown) as told:
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
        listener = Listener(self)
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
        if length > transfer.MAX_BODY:
            return Refused(
                413, f"{length} bytes, at most {transfer.MAX_BODY}: start the server with a lower --max-batch"
            )
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
