"""What `qscope cover` and `qscope synthesize` read: data, targets and a pool, from texts by the model or from feature stores without it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qscope_jax.cli.options import Integers, check_at_least
from qscope_jax.cli.sources import SAEOptions, check_texts, open_model, open_saes, read_documents, sae_groups
from qscope_jax.errors import ConfigError

if TYPE_CHECKING:
    from qscope_jax.features.store.feature_store import FeatureStore
    from qscope_jax.features.synthesis.coverage import Coverage
    from qscope_jax.features.synthesis.targets import Target
    from qscope_jax.features.text_features import TextFeatures
    from qscope_jax.models.language_model import LanguageModel
    from qscope_jax.sae.layer_sae import LayerSAE, SAECollection


@dataclass(frozen=True, kw_only=True)
class CoverageOptions(SAEOptions):
    """Which data should cover which features."""

    data: str = "tiny:en"
    """File, folder or hub dataset of texts, a feature store, or `tiny:en` for the embedded corpus's English sentences."""
    column: str = "text"
    """Column or key that holds the text."""
    split: str = "train"
    """Split of a hub dataset."""
    limit: int | None = None
    """Read at most so many texts of the data."""
    targets: str = ""
    """Table of targets: columns layer and feature, and if known explanation, score, harmful and threshold. By default what fires in the pool."""
    tau: float = 0.5
    """Least score of a target whose explanation was judged."""
    layers: Integers | None = None
    """Layers: all, 3 or 2,4-5; by default all that have targets or an SAE."""
    pool: str = "tiny"
    """Texts or feature store that show what is reachable: targets where no table is given, contexts, and the natural baseline.
    Empty for none."""
    pool_limit: int | None = None
    """Read at most so many texts of the pool."""
    least: int = 3
    """Without a table: texts of the pool that must fire a target."""
    highest_rate: float = 1.0
    """Without a table: leave out features that a larger share of the pool fires."""
    strength: float = 0.0
    """Without a table: a target counts as fired above this share of its largest activation in the pool."""
    threshold: float = 0.0
    """Activation that firing must exceed, besides a target's own threshold."""
    keep_first: bool = False
    """Count the first token of a text too."""
    max_norm_multiple: float = 10.0
    """Leave tokens out whose residual norm exceeds this multiple of the median; 0 counts all."""


class CoverageSources:
    """Data, pool and targets, each read when it is first asked for."""

    def __init__(self, options: CoverageOptions, *, unjudged: bool = False):
        """Check what needs no model: numbers, and the table of targets.

        Args:
            options: Which data and which targets.
            unjudged: List all features of the table, to have those judged that have no score.

        Raises:
            QscopeError: a number is out of range, or the table is no table of targets.
        """
        check_at_least(options, 1, "limit", "pool_limit", "least")
        if not options.threshold >= 0:
            raise ConfigError(f"threshold is {options.threshold}, expected 0 or more")
        if not options.targets and not options.pool:
            raise ConfigError("give --targets, a table of them, or --pool, texts of which the features that fire are targets")
        self.options = options
        self.listed = self._listed(unjudged) if options.targets else None

    @cached_property
    def model(self) -> "LanguageModel":
        """The model."""
        return open_model(self.options.model, self.options.dtype, self.options.mesh)

    @cached_property
    def saes(self) -> "SAECollection":
        """Its SAEs."""
        return open_saes(self.options.sae, self.model)

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """Layers of the targets."""
        if self.listed is not None:
            return tuple(sorted({target.layer for target in self.listed}))
        if self.options.layers is not None:
            return self.options.layers
        stores = [store for name in (self.options.pool, self.options.data) if (store := _store(name)) is not None]
        return stores[0].layers if stores else tuple(self.saes.layers)

    @cached_property
    def data_texts(self) -> list[str]:
        """Texts of the data."""
        store = _store(self.options.data)
        return store.texts[: self.options.limit] if store is not None else _texts(self.options.data, self.options, self.options.limit)

    @cached_property
    def pool_texts(self) -> list[str]:
        """Texts of the pool."""
        store = _store(self.options.pool)
        return store.texts[: self.options.pool_limit] if store is not None else _texts(self.options.pool, self.options, self.options.pool_limit)

    @cached_property
    def pool(self) -> "dict[int, TextFeatures]":
        """Tables of the pool, by layer."""
        store = _store(self.options.pool)
        if store is None:
            return self.read(self.pool_texts)
        tables = {layer: store.text_features(layer) for layer in self.layers}
        limit = self.options.pool_limit
        return tables if limit is None else {layer: table.select(range(min(limit, len(table)))) for layer, table in tables.items()}

    @cached_property
    def targets(self) -> "list[Target]":
        """Those of the table, or what fires in the pool."""
        from qscope_jax.features.synthesis.targets import alive_targets

        if self.listed is not None:
            return self.listed
        return alive_targets(self.pool, least=self.options.least, highest_rate=self.options.highest_rate, strength=self.options.strength)

    def coverage(self, targets: "Sequence[Target]") -> "Coverage":
        """How the data covers targets."""
        from qscope_jax.features.synthesis.coverage import coverage, store_coverage

        store = _store(self.options.data)
        if store is not None:
            some = None if self.options.limit is None else range(min(self.options.limit, store.num_texts))
            return store_coverage(targets, store, threshold=self.options.threshold, texts=some)
        return coverage(targets, self.read(self.data_texts), threshold=self.options.threshold)

    def read(self, texts: Sequence[str]) -> "dict[int, TextFeatures]":
        """Read texts with the model: the firing check."""
        from qscope_jax.features.synthesis.feature_reader import feature_reader

        settings: dict[str, Any] = {"drop_first": not self.options.keep_first, "max_norm_multiple": self.options.max_norm_multiple}
        found = {}
        for group in sae_groups(self.saes, self.layers, self.model):
            for sae in group:
                self._check_stores(sae)
            found |= feature_reader(self.model, group, **settings)(texts)
        return found

    def _check_stores(self, sae: "LayerSAE") -> None:
        """Texts that are read anew must not be set against a store of other features."""
        for name in (self.options.data, self.options.pool):
            store = _store(name)
            if store is not None and sae.layer in store.layers:
                there, here = (store.num_features[sae.layer], store.k[sae.layer]), (sae.num_features, sae.k)
                if there != here:
                    raise ConfigError(
                        f"{name}: layer {sae.layer} was stored with {there[0]} features of which {there[1]} are active; {self.saes.source} has "
                        f"{here[0]} and {here[1]}; give the --model and --sae of the store ({store.model}, {store.sae})"
                    )

    def _listed(self, unjudged: bool) -> "list[Target]":
        from qscope_jax.features.synthesis.targets import load_targets

        tau = 0.0 if unjudged else self.options.tau
        return load_targets(self.options.targets, tau=tau, layers=self.options.layers, unjudged=unjudged)


def _texts(source: str, options: CoverageOptions, limit: int | None) -> list[str]:
    name, _, language = source.partition(":")
    if name != "tiny":
        return check_texts(read_documents(source, limit, column=options.column, split=options.split))
    from qscope_jax.demo.corpus import LANGUAGES, sentences

    if language and language not in LANGUAGES:
        raise ConfigError(f"{source}: the embedded corpus has {', '.join(f'tiny:{code}' for code in LANGUAGES)}")
    return [line for code in ([language] if language else LANGUAGES) for line in sentences(code)][:limit]


def _store(name: str) -> "FeatureStore | None":
    """The feature store of that name, if it is one."""
    from qscope_jax.features.store.feature_store import holds_store, read_store

    path = Path(name).expanduser()
    return read_store(path) if path.is_dir() and holds_store(path) else None
