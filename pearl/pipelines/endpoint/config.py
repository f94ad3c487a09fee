"""Where the model is, and what may be spent on it. None of it changes the data: a run may go on elsewhere, with more."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from importlib.util import find_spec
from urllib.parse import urlsplit

from pearl.pipelines.errors import ConfigError, RunError

DEFAULT_KEY = "OPENAI_API_KEY"
_PACKAGES = ("httpx2", "tenacity")


@dataclass(frozen=True)
class Budget:
    """What a run may spend; None is no limit.

    Attributes:
        requests: HTTP requests, repeated ones included.
        tokens: Tokens in and out together, as the server counts them.
        cost: Money, in the currency of the prices.
        price_in: Of a million tokens in.
        price_out: Of a million tokens out.
    """

    requests: int | None = None
    tokens: int | None = None
    cost: float | None = None
    price_in: float = 0.0
    price_out: float = 0.0

    def __post_init__(self) -> None:
        limits = [limit for limit in (self.requests, self.tokens, self.cost) if limit is not None]
        if any(not limit > 0 for limit in limits):
            raise ConfigError("a budget must be above 0")
        if not (0 <= self.price_in < float("inf") and 0 <= self.price_out < float("inf")):
            raise ConfigError("prices must not be negative")
        if self.cost is not None and not self.price_in + self.price_out:
            raise ConfigError("--max-cost needs --price-in and --price-out, per million tokens")


@dataclass(frozen=True)
class EndpointConfig:
    """A server that speaks `/v1/chat/completions`, and how it is asked.

    Attributes:
        url: Up to and with `/v1`.
        key_variable: The environment variable that holds the API key. Without a key no `Authorization` is sent; a
            variable other than the default one must be set.
        concurrency: Requests in flight at once, of each worker.
        timeout: Seconds for a whole reply.
        retries: How often a request that failed is repeated.
        backoff: Seconds before the first repetition, at most; doubled with each, to at most a minute.
        cache: The folder that keeps the replies; the run's own when None.
    """

    url: str
    key_variable: str = DEFAULT_KEY
    concurrency: int = 8
    timeout: float = 120.0
    retries: int = 8
    backoff: float = 1.0
    cache: str | None = None
    budget: Budget = field(default_factory=Budget)

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:
            usable = False
        if not usable:
            raise ConfigError("--endpoint: expected a URL such as http://localhost:8000/v1")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ConfigError(
                "--endpoint: only a plain URL; a key belongs into an environment variable (--api-key-env)"
            )
        if self.concurrency < 1 or self.retries < 0 or not self.timeout > 0 or self.backoff < 0:
            raise ConfigError("an endpoint needs a concurrency of at least 1, retries of at least 0, a timeout above 0")

    @property
    def completions(self) -> str:
        return self.url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"

    def key(self) -> str | None:
        """The API key, None where none is needed.

        Raises:
            RunError: the variable that was named is not set.
        """
        key = os.environ.get(self.key_variable, "").strip()
        if not key and self.key_variable != DEFAULT_KEY:
            raise RunError(f"the environment variable {self.key_variable}, which shall hold the API key, is not set")
        if not key.isascii() or not key.isprintable():
            raise RunError(f"what {self.key_variable} holds cannot be an API key: it has characters that no header can")
        return key or None

    def check(self) -> None:
        """Finds out before any work whether requests could be sent.

        Raises:
            RunError: a package or the key is missing.
        """
        if missing := [package for package in _PACKAGES if find_spec(package) is None]:
            raise RunError(f"planner experts need {' and '.join(missing)}: pip install -e '.[planner]'")
        self.key()
