"""Token batches as the training loop wants them."""

from collections.abc import Callable, Sequence

from qscope_jax.data.batches import BatchConfig, TokenBatch, token_batches
from qscope_jax.training.checkpoint import StreamState


class TokenStream:
    """Token batches as the loop wants them: endless, with their place in the data."""

    def __init__(self, documents: Sequence[str], tokenize: Callable[[str], Sequence[int]], config: BatchConfig):
        """Stand before the first batch of `documents`."""
        self._batches = token_batches(documents, tokenize, config)
        self.shape = (config.batch_size, config.length)

    def __next__(self) -> TokenBatch:
        """The next batch."""
        return next(self._batches)

    def get_state(self) -> StreamState:
        """Place in the data."""
        return StreamState({}, self._batches.get_state())

    def set_state(self, state: StreamState) -> None:
        """Go to a place in the data."""
        self._batches.set_state(dict(state.cursor))
