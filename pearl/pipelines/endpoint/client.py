"""Sends requests, repeats those that fail, keeps every reply, and books what it cost.

What fails is told apart: a fault that passes (rate limit, server error, timeout, a reply that is cut off or malformed)
is repeated with growing waits; a fault of the set-up (key, address, model) stops the run; a request that the server
refuses, or fails at again and again while it answers others, is left unanswered, which concerns its sample alone.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, NoReturn

import httpx2 as httpx
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    sleep_using_event,
    stop_after_attempt,
    stop_any,
    stop_when_event_set,
    wait_random_exponential,
)

from pearl.pipelines.endpoint.config import EndpointConfig
from pearl.pipelines.endpoint.ledger import Ledger
from pearl.pipelines.endpoint.replies import MalformedReply, Reply, ReplyCache, Unanswered, content_key, read_reply
from pearl.pipelines.errors import RunError

CONNECT_TIMEOUT = 15.0
MAX_WAIT = 60.0
MAX_ADVISED_WAIT = 300.0
"""Seconds; a server that asks for a longer pause (`Retry-After`) is asked again after this one."""
MAX_REPLY = 16_000_000
"""Bytes."""
MAX_UNANSWERED = 4
"""In a row: with one more, the server is at fault and not the requests."""

_PASSING = {408: "timeout", 409: "conflict", 425: "too early", 429: "rate limit"}
_REFUSED = (400, 413, 422)
_RUN_AT_FAULT = ("rate limit", "connection")


class _Passing(Exception):
    """A fault that may pass; `pause` is how long the server asks to wait, in seconds."""

    def __init__(self, kind: str, detail: str, pause: float = 0.0) -> None:
        super().__init__(detail)
        self.kind, self.detail, self.pause = kind, detail, pause


class _Refused(Exception):
    """The server will not have this request."""


class Client:
    """Asks one endpoint; for any number of threads."""

    def __init__(self, config: EndpointConfig, cache: ReplyCache, ledger: Ledger) -> None:
        self.config, self.cache, self.ledger = config, cache, ledger
        self._key = config.key()
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._doubtful: dict[str, str] = {}
        self._unanswered_in_a_row = 0
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        limits = httpx.Limits(max_connections=config.concurrency, max_keepalive_connections=config.concurrency)
        timeout = httpx.Timeout(config.timeout, connect=min(config.timeout, CONNECT_TIMEOUT))
        self._http = httpx.Client(headers=headers, timeout=timeout, limits=limits)

    def ask(self, body: Mapping[str, Any], number: int) -> Reply:
        """The reply to a request, from the cache if it was ever asked; `number` is that of the try.

        Raises:
            Unanswered: there is none; it is this request's fault.
            BudgetUsedUp: it may not be sent.
            RunError: the endpoint cannot be used, or all of this was stopped.
        """
        key = content_key(body, number)
        try:
            if (kept := self.cache.read(key)) is not None:
                self.ledger.cached()
                return kept
        except Unanswered:
            self.ledger.cached()
            raise
        try:
            reply = self._repeating()(self._send, json.dumps(body).encode())
        except _Refused as error:
            self._leave(key, f"the server refuses the request: {error}")
        except _Passing as fault:
            self._give_up(key, fault)
        with self._lock:
            self.cache.keep(key, reply)
            self._unanswered_in_a_row = 0  # the server does answer, so it was these requests
            self._keep_unanswered()
        self.ledger.answered(reply.tokens)
        return reply

    def settle(self) -> None:
        """Keeps what is left unanswered: what was made without it is finished."""
        with self._lock:
            self._keep_unanswered()

    def _keep_unanswered(self) -> None:
        while self._doubtful:
            self.cache.keep_unanswered(*self._doubtful.popitem())

    def stop(self) -> None:
        """Ends all waiting; requests in flight still get their replies, which are kept."""
        self._stopped.set()

    def _repeating(self) -> Retrying:
        return Retrying(
            retry=retry_if_exception_type(_Passing),
            stop=stop_any(stop_after_attempt(1 + self.config.retries), stop_when_event_set(self._stopped)),
            wait=self._wait,
            sleep=sleep_using_event(self._stopped),
            before=self._admit,
            reraise=True,
        )

    def _wait(self, state: RetryCallState) -> float:
        """A random part of the backoff, so that many clients do not come back at once; at least what is asked for."""
        fault = state.outcome.exception() if state.outcome else None
        asked = fault.pause if isinstance(fault, _Passing) else 0.0
        backoff = wait_random_exponential(multiplier=self.config.backoff, max=MAX_WAIT)(state)
        return min(asked, MAX_ADVISED_WAIT) + backoff

    def _admit(self, state: RetryCallState) -> None:
        if self._stopped.is_set():
            raise RunError("stopped")
        self.ledger.admit(again=state.attempt_number > 1)

    def _send(self, body: bytes) -> Reply:
        try:
            status, headers, content = self._exchange(body)
            if status == 200:
                return self._read(content)
            self._explain(status, headers, content)
        except MalformedReply as error:
            fault = _Passing("malformed reply", str(error))
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.ProxyError) as error:
            fault = _Passing("connection", str(error))
        except httpx.TimeoutException:
            fault = _Passing("timeout", f"no whole reply within {self.config.timeout:g} s")
        except httpx.HTTPError as error:
            fault = _Passing("broken reply", str(error) or type(error).__name__)
        except _Passing as error:
            fault = error
        self.ledger.failed(fault.kind)
        raise fault

    def _read(self, content: bytes) -> Reply:
        try:
            return read_reply(content)
        except MalformedReply as error:
            raise MalformedReply(f"{error}, in {self._excerpt(content)!r}") from error

    def _exchange(self, body: bytes) -> tuple[int, httpx.Headers, bytes]:
        """Status, headers and body of the response, which has to be whole in time."""
        end = time.monotonic() + self.config.timeout
        content = bytearray()
        with self._http.stream("POST", self.config.completions, content=body) as response:
            for part in response.iter_bytes():
                content += part
                if len(content) > MAX_REPLY:
                    raise MalformedReply(f"more than {MAX_REPLY:,} bytes")
                if time.monotonic() > end:
                    raise httpx.ReadTimeout("the reply trickles")
            return response.status_code, response.headers, bytes(content)

    def _explain(self, status: int, headers: httpx.Headers, content: bytes) -> NoReturn:
        message = self._excerpt(content)
        if status in _PASSING and "insufficient_quota" not in message:
            raise _Passing(_PASSING[status], message, _pause(headers.get("retry-after", "")))
        if status >= 500:
            raise _Passing("server error", f"{status}: {message}", _pause(headers.get("retry-after", "")))
        if status in _REFUSED:
            self.ledger.failed("refused request")
            raise _Refused(f"{status}: {message}")
        self.ledger.failed(f"status {status}")
        raise RunError(f"{self.config.completions} answers {status}: {message}; are --endpoint, --model and key right?")

    def _excerpt(self, content: bytes) -> str:
        """The beginning of an error's message, without the key, which a server may repeat."""
        text = " ".join(content.decode("utf-8", "replace").split())
        if self._key:
            text = text.replace(self._key, "…")
        return text[:300]

    def _give_up(self, key: str, fault: _Passing) -> NoReturn:
        if self._stopped.is_set():
            raise RunError("stopped") from None
        if fault.kind in _RUN_AT_FAULT:
            tries = f"tried {1 + self.config.retries} times"
            raise RunError(
                f"{self.config.completions}: {fault.kind}, {tries}: {fault.detail}; --resume goes on"
            ) from None
        self._leave(key, f"{fault.kind}, tried {1 + self.config.retries} times: {fault.detail}")

    def _leave(self, key: str, reason: str) -> NoReturn:
        """Gives a request up. It is remembered as unanswered only once another request succeeds, or at `settle`: until
        then the server may be at fault, not the request.

        Raises:
            Unanswered
            RunError: it is the server.
        """
        with self._lock:
            self._doubtful[key] = reason
            self._unanswered_in_a_row += 1
            if self._unanswered_in_a_row > MAX_UNANSWERED:
                raise RunError(f"{self.config.completions}: nothing is answered any more; the last fault: {reason}")
        self.ledger.unanswered()
        raise Unanswered(reason)


def _pause(advised: str) -> float:
    """Seconds that a `Retry-After` header asks for, which holds a number or a date."""
    try:
        return max(0.0, float(advised))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(advised) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return 0.0
