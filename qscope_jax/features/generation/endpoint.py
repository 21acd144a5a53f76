"""A generator on the network: any endpoint that speaks OpenAI's chat completions, given by its URL."""

import concurrent.futures
import email.utils
import hashlib
import http.client
import json
import os
import random
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Mapping, Sequence
from email.message import Message as Headers
from pathlib import Path
from typing import Any

from qscope_jax.data.record_log import RecordLog
from qscope_jax.errors import ConfigError, InputError
from qscope_jax.features.generation.generators import Message, Reply

LONGEST_WAIT = 60.0
"""Seconds waited at most before a request is tried again, whatever the endpoint asks for."""

FAILURES_IN_A_ROW = 8
"""After so many conversations without an answer, one after the other, the rest of a call is not asked."""

_RETRIED = (408, 409, 425, 429)
_SHOWN = 200
_LARGEST_ANSWER = 2**24


class EndpointGenerator:
    """Answers conversations by an endpoint's chat completions, several at a time.

    A request that is refused for its rate, fails on the server's side, is cut off or answered by something else than a completion is
    tried again, each time after twice the wait, or after what `Retry-After` asks for. What fails for good becomes a `Reply` with its error.
    The key is read from the environment at each call, sent to this endpoint only, and appears in no message and no file.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str,
        key_variable: str = "OPENAI_API_KEY",
        concurrency: int = 4,
        retries: int = 5,
        timeout: float = 60,
        cache: str | Path = "",
        first_wait: float = 1.0,
        extra: Mapping[str, Any] | None = None,
    ):
        """Say where the endpoint is; nothing is sent yet.

        Args:
            url: Base address such as `https://api.openai.com/v1` or `http://localhost:8000/v1`, with or without `/chat/completions`.
            model: Name of the model, as the endpoint knows it.
            key_variable: Environment variable with the key; where it is unset or the name is empty, no key is sent.
            concurrency: Requests under way at a time.
            retries: Times that a failed request is tried again.
            timeout: Seconds to connect, and to wait for the next bytes of an answer.
            cache: JSON-lines file of finished replies. What stands there is not asked again, so that an interruption loses nothing.
            first_wait: Seconds before the first retry.
            extra: Further fields of a request, such as `top_p`; one of None is left out of it.

        Raises:
            InputError: no address of a web server, no model, or a number out of range.
            SourceError: the cache is there and is none.
        """
        _check_address(url)
        if not model:
            raise InputError(f"endpoint {url} needs the name of a model, as the endpoint knows it")
        if concurrency < 1 or retries < 0 or not timeout > 0 or not first_wait >= 0:
            raise InputError(
                f"concurrency {concurrency}, retries {retries}, timeout {timeout}, first_wait {first_wait}: expected 1 or more, 0 or more, "
                "a positive number and 0 or more"
            )
        self.url = url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        self.model, self.key_variable = model, key_variable
        self.concurrency, self.retries, self.timeout, self.first_wait = concurrency, retries, timeout, first_wait
        self.extra = dict(extra or {})
        self._cache = RecordLog(cache, "request", "finished reply") if str(cache) else None

    @property
    def name(self) -> str:
        """The model and the server."""
        return f"{self.model} at {urllib.parse.urlsplit(self.url).netloc}"

    def __call__(self, conversations: Sequence[Sequence[Message]], *, max_tokens: int = 256, temperature: float = 0.0, seed: int = 0) -> list[Reply]:
        """A reply to each conversation, in order; of equal ones, each has a seed of its own.

        Raises:
            ConfigError: the key is not one that can be sent.
        """
        seen: Counter[str] = Counter()
        requests = []
        for conversation in conversations:
            text = json.dumps(list(conversation), sort_keys=True)
            # By how often it was asked before, not by its place: what is asked stays the same when a run resumes with fewer conversations.
            fields = {"model": self.model, "messages": list(conversation), "max_tokens": max_tokens, "temperature": temperature}
            merged = {**fields, "seed": seed + seen[text], **self.extra}
            requests.append({name: value for name, value in merged.items() if value is not None})
            seen[text] += 1
        key, health = self._key(), _Health()
        pool = concurrent.futures.ThreadPoolExecutor(self.concurrency, thread_name_prefix="endpoint")
        try:
            return list(pool.map(lambda request: self._answer(request, health, key), requests))
        finally:
            health.stopped.set()
            pool.shutdown(cancel_futures=True)

    def _key(self) -> str:
        key = os.environ.get(self.key_variable, "").strip() if self.key_variable else ""
        if not (key.isascii() and key.isprintable()):
            raise ConfigError(f"the key in {self.key_variable} has characters that no header can hold; set it again")
        return key

    def _answer(self, request: dict[str, Any], health: "_Health", key: str) -> Reply:
        """The reply to one request: kept from before, or asked for, with retries."""
        digest = hashlib.sha256(json.dumps([self.url, request], sort_keys=True).encode()).hexdigest()
        if self._cache is not None and (kept := self._cache.get(digest)) is not None:
            return Reply(str(kept["text"]))
        if given_up := health.given_up():
            return Reply("", f"not asked, since {FAILURES_IN_A_ROW} conversations before it failed; the last: {given_up}")
        error = ""
        for attempt in range(self.retries + 1):
            text, error, wait = self._ask(request, key)
            if not error:
                if self._cache is not None:
                    self._cache.add(digest, {"text": text})
                health.note("")
                return Reply(text)
            error = error.replace(key, "***") if key else error
            if wait is None or attempt == self.retries:
                break
            # Requests that failed together should not come back together.
            pause = max(wait, self.first_wait * 2**attempt * (1 + random.random() / 4))
            if health.stopped.wait(min(pause, LONGEST_WAIT)):
                return Reply("", "interrupted")
        tries = f" ({attempt + 1} tries)" if attempt else ""
        health.note(error)
        return Reply("", f"{self.name}: {error}{tries}")

    def _ask(self, request: dict[str, Any], key: str) -> tuple[str, str, float | None]:
        """Answer, error, and the least seconds to wait before another try; None where another try is of no use."""
        post = urllib.request.Request(self.url, json.dumps(request).encode(), {"Content-Type": "application/json", "User-Agent": "qscope_jax"})
        if key:
            post.add_header("Authorization", f"Bearer {key}")
        try:
            with _OPENER.open(post, timeout=self.timeout) as answer:
                body = answer.read(_LARGEST_ANSWER)
        except urllib.error.HTTPError as refusal:
            again = refusal.code in _RETRIED or refusal.code >= 500
            return "", f"HTTP {refusal.code}: {_reason(refusal)}", _retry_after(refusal.headers) if again else None
        except (OSError, http.client.HTTPException) as failure:
            cause = failure.reason if isinstance(failure, urllib.error.URLError) else failure
            late = isinstance(cause, TimeoutError)
            return "", f"no answer within {self.timeout:g} s" if late else _line(f"{type(cause).__name__}: {cause}"), 0.0
        try:
            choice = json.loads(body)["choices"][0]
            text = choice["message"]["content"]
        except (ValueError, LookupError, TypeError, RecursionError):
            return "", f"answered with something else than a chat completion: {_line(body.decode(errors='replace'))}", 0.0
        if not isinstance(text, str) or not text.strip():
            return "", f"the answer is empty (it ended by {choice.get('finish_reason') or 'an unnamed reason'})", None
        return text, "", None


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Follows nobody: the key is for the address that was given."""

    def redirect_request(self, *_: Any) -> None:
        """Leave the redirect to be reported as the failure that it is."""
        return None


_OPENER = urllib.request.build_opener(_NoRedirects)


class _Health:
    """Whether an endpoint still answers, as seen by all threads of a call."""

    def __init__(self) -> None:
        self.stopped = threading.Event()
        self._lock = threading.Lock()
        self._failures = 0
        self._last = ""

    def note(self, error: str) -> None:
        """Count a conversation that has ended."""
        with self._lock:
            self._failures = self._failures + 1 if error else 0
            self._last = error

    def given_up(self) -> str:
        """The last error where too many followed each other; empty while there is hope."""
        with self._lock:
            return self._last if self._failures >= FAILURES_IN_A_ROW else ""


def _check_address(url: str) -> None:
    example = "expected one such as http://localhost:8000/v1"
    try:
        parts = urllib.parse.urlsplit(url)
        named = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        raise InputError(f"endpoint {url!r} is no address; {example}") from None
    if not named or not url.isprintable() or " " in url:
        raise InputError(f"endpoint {url!r} is no address; {example}")
    if parts.username is not None or parts.query or parts.fragment:
        raise InputError(f"endpoint at {parts.hostname} has more than a server and a path; {example}, and give the key by key_variable")


def _retry_after(headers: Headers) -> float:
    """Seconds that `Retry-After` asks for, which is a number or a date; 0 without."""
    value = headers.get("retry-after", "")
    if value.isascii() and value.isdigit():
        return float(value)
    try:
        return max(email.utils.parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    except (ValueError, TypeError, OverflowError):
        return 0.0


def _reason(refusal: urllib.error.HTTPError) -> str:
    """What the endpoint says of a failure, in one short line."""
    try:
        body = refusal.read(_LARGEST_ANSWER).decode(errors="replace")
    except (OSError, http.client.HTTPException):
        body = ""
    try:
        error = json.loads(body)["error"]
        return _line(str(error["message"] if isinstance(error, dict) else error))
    except (ValueError, LookupError, TypeError, RecursionError):
        return _line(body) or refusal.reason


def _line(text: str) -> str:
    return " ".join(text.split())[:_SHOWN]
