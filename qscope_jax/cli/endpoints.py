"""Options of an OpenAI-compatible endpoint, and the generator that they describe."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qscope_jax.errors import ConfigError

if TYPE_CHECKING:
    from qscope_jax.features.generation.endpoint import EndpointGenerator


@dataclass(frozen=True, kw_only=True)
class EndpointOptions:
    """How endpoints are asked."""

    key_variable: str = "OPENAI_API_KEY"
    """Environment variable that holds the key of an endpoint; the key itself is never an option."""
    concurrency: int = 4
    """Requests under way at a time."""
    retries: int = 5
    """Times that a failed request is tried again."""
    timeout: float = 60.0
    """Seconds that an endpoint may stay silent."""


def is_address(name: str) -> bool:
    """Whether a generator's name is an endpoint's address."""
    return name.startswith(("http://", "https://"))


def open_endpoint(url: str, model: str, options: EndpointOptions, *, flag: str, cache: str = "") -> "EndpointGenerator":
    """The generator at an address.

    Args:
        url: The address.
        model: Name of the model there.
        options: How it is asked.
        flag: The option that gives the model, for messages.
        cache: File of finished replies.

    Raises:
        QscopeError: no model is named, or the options make no sense.
    """
    from qscope_jax.features.generation.endpoint import EndpointGenerator

    if not is_address(url):
        raise ConfigError(f"endpoint {url!r} is no address; expected one such as http://localhost:8000/v1")
    if not model:
        raise ConfigError(f"endpoint {url} needs {flag}, the name of a model there")
    return EndpointGenerator(
        url,
        model=model,
        key_variable=options.key_variable,
        concurrency=options.concurrency,
        retries=options.retries,
        timeout=options.timeout,
        cache=cache,
    )
