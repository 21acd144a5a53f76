"""One optimiser step of several SAEs at once, on one device or a mesh.

The SAEs (of layers, and of seeds) are one pytree whose arrays have a leading axis. On a mesh that axis lies over `fsdp`, features over
`tensor`, tokens over `data`, and every device works through its own SAEs one after the other with `sae_step`, so that each is what it
would be alone. What crosses devices for an SAE and a batch of N tokens: the k largest pre-activations of each token and shard, sums of
[N, D] over the shards of features, and the gradients' sum over `data`. No array of [N, F] does.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from qscope_jax.errors import ConfigError
from qscope_jax.parallel.rules import replicated, stack_spec
from qscope_jax.parallel.shards import Shards
from qscope_jax.sae.autoencoder import SparseAutoencoder, replace_params
from qscope_jax.training.sae_config import SAEConfig
from qscope_jax.training.sae_gradient import loss_and_gradient

_Tree = TypeVar("_Tree")
_BATCH = PartitionSpec("fsdp", "data", None)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SAEState:
    """Training state of one SAE, or of S of them, every array then with a leading axis.

    Attributes:
        sae: Parameters, of inputs scaled to unit mean squared norm.
        optimizer: Adam's moments and step.
        tokens_since_fired: Tokens since each feature last fired, saturating.
        scale: Root mean squared norm of the layer's stream: inputs are divided by it.
        average: Running average of the parameters, not corrected for its beginning at 0; None where the config keeps none.
    """

    sae: SparseAutoencoder
    optimizer: Any
    tokens_since_fired: Int[Array, "*S F"]
    scale: Float[Array, "*S"]
    average: SparseAutoencoder | None = None


class SAEStep:
    """The optimiser of a config, and the step of S SAEs jitted for a mesh, its state donated.

    On a CPU the gradients stay in the same memory from step to step: the system clears every page of a fresh array, which costs a tenth
    of the step. What that memory holds is never read.
    """

    def __init__(self, config: SAEConfig, aux_k: int, mesh: Mesh | None = None):
        """Describe the program; it compiles when first called.

        Args:
            config: Size and training.
            aux_k: Slots of AuxK's code.
            mesh: Where it runs; without one, on JAX's first device.

        Raises:
            ConfigError: the mesh does not split the features evenly.
        """
        self.config, self.aux_k = config, aux_k
        self.mesh = mesh
        self.optimizer = optax.adam(config.schedule())
        if self.mesh and config.num_features % self.mesh.shape["tensor"]:
            raise ConfigError(f"the mesh has tensor={self.mesh.shape['tensor']}, which does not divide num_features = {config.num_features}")
        self._program = jax.jit(self._run, donate_argnums=(0, 2), keep_unused=True)
        self._memory: SparseAutoencoder | None = None

    def __call__(self, state: SAEState, x_MND: Float[Array, "M N D"]) -> tuple[SAEState, Mapping[str, Float[Array, " S"]]]:
        """One step of S = M * num_seeds SAEs; SAE s reads layer s // num_seeds of the batch. See `sae_step`.

        Raises:
            ConfigError: the batch cannot be split as the mesh and the micro-batches want it.
        """
        self._check(*x_MND.shape[:2])
        memory, self._memory = self._memory, None
        if memory is None and jax.default_backend() == "cpu":
            memory = self._make_memory(state.sae)
        if self.mesh:
            x_MND = jax.device_put(x_MND, NamedSharding(self.mesh, _BATCH))
        state, metrics, self._memory = self._program(state, x_MND, memory)
        return state, metrics

    def new_state(self, sae: SparseAutoencoder, scale: Float[Array, ""]) -> SAEState:
        """The first state of one SAE.

        Args:
            sae: Parameters, of scaled inputs.
            scale: What inputs are divided by.
        """
        counters = jnp.zeros((self.config.num_features,), jnp.int32)
        average = jax.tree.map(jnp.zeros_like, sae) if self.config.ema else None
        return SAEState(sae, self.optimizer.init(sae), counters, scale, average)  # pyright: ignore[reportArgumentType]

    def build(self, make: Callable[..., SAEState], count: int, arguments: tuple[Any, ...]) -> SAEState:
        """A stack of `count` states, one made after the other where it lies: no device ever holds another's.

        Args:
            make: Returns the state at a place, as a function that can be jitted: `make(place, *arguments)`.
            count: States.
            arguments: Arrays that it needs.
        """

        def put(leaves: list[Array], place: Array, arguments: tuple[Any, ...]) -> list[Array]:
            return _put_in(leaves, [leaf[None] for leaf in jax.tree.leaves(make(place, *arguments))], place)

        tree: Any = None

        def describe(place: Array, arguments: tuple[Any, ...]) -> list[Array]:
            nonlocal tree
            state = make(place, *arguments)
            tree = (jax.tree.structure(state), _specs(state))
            return jax.tree.leaves(state)

        described = jax.eval_shape(describe, np.int32(0), arguments)
        structure, specs = tree
        leaves = _zeros([((count, *leaf.shape), leaf.dtype) for leaf in described], self._shardings(specs))
        put = jax.jit(put, donate_argnums=0, out_shardings=self._shardings(specs))
        for place in range(count):
            leaves = put(leaves, np.int32(place), arguments)
        return jax.tree.unflatten(structure, leaves)

    def abstract_state(self, num_saes: int, d_model: int) -> SAEState:
        """Shapes, dtypes and shardings of a state of `num_saes` SAEs `d_model` wide."""
        rows, zeros_F = jnp.zeros((self.config.num_features, d_model)), jnp.zeros((self.config.num_features,))

        def states() -> SAEState:
            sae = new_sae(rows, rows, zeros_F, jnp.zeros((d_model,)), self.config)
            return jax.vmap(lambda _: self.new_state(sae, jnp.float32(1)))(jnp.zeros((num_saes,)))

        leaves, tree = jax.tree.flatten(state := jax.eval_shape(states))
        places = self._shardings(_specs(state)) or [None] * len(leaves)
        described = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place) for leaf, place in zip(leaves, places, strict=True)]
        return jax.tree.unflatten(tree, described)

    def lower(self, num_saes: int, d_model: int, batch_tokens: int, dtype: Any = jnp.float32) -> jax.stages.Lowered:
        """The program for batches of `batch_tokens` tokens, lowered without any array: to look at, or to compile for machines elsewhere."""
        layers = num_saes // self.config.num_seeds
        self._check(layers, batch_tokens)
        sharding = NamedSharding(self.mesh, _BATCH) if self.mesh else None
        batch = jax.ShapeDtypeStruct((layers, batch_tokens, d_model), dtype, sharding=sharding)
        return self._program.lower(self.abstract_state(num_saes, d_model), batch, None)

    def _check(self, layers: int, tokens: int) -> None:
        axes = self.mesh.shape if self.mesh else {"fsdp": 1, "data": 1}
        if layers % axes["fsdp"]:
            raise ConfigError(f"the mesh has fsdp={axes['fsdp']}, which does not divide the {layers} layers; choose another, or other layers")
        parts = axes["data"] * self.config.micro_batches
        if tokens % parts:
            split = f"data={axes['data']} and micro_batches {self.config.micro_batches}"
            raise ConfigError(f"a batch of {tokens} tokens cannot be split by {split}: expected a multiple of {parts}")

    def _run(self, state: SAEState, x_MND: Array, memory: SparseAutoencoder | None) -> tuple[SAEState, dict[str, Array], SparseAutoencoder | None]:
        if not self.mesh:
            return self._each(Shards(), state, x_MND, memory)
        # As flat lists: specs in the place of a state's arrays would be a state of something else.
        (states, state_tree), (memories, memory_tree) = jax.tree.flatten(state), jax.tree.flatten(memory)
        state_specs, memory_specs = _specs(state), _specs(memory)

        def each(states: list[Array], x_MND: Array, memories: list[Array]) -> tuple[list[Array], dict[str, Array], list[Array]]:
            shards = Shards.of(self.mesh) if self.mesh else Shards()
            state, metrics, kept = self._each(shards, jax.tree.unflatten(state_tree, states), x_MND, jax.tree.unflatten(memory_tree, memories))
            return jax.tree.leaves(state), metrics, jax.tree.leaves(kept)

        # The specs of the outputs are claims about sums that every device has made equal, which the checker cannot follow through branches.
        over_mesh = jax.shard_map(
            each,
            mesh=self.mesh,
            in_specs=(state_specs, _BATCH, memory_specs),
            out_specs=(state_specs, PartitionSpec("fsdp"), memory_specs),
            check_vma=False,
        )
        states, metrics, memories = over_mesh(states, x_MND, memories)
        metrics = jax.lax.with_sharding_constraint(metrics, replicated(self.mesh))  # so that each process can read them
        return jax.tree.unflatten(state_tree, states), metrics, jax.tree.unflatten(memory_tree, memories)

    def _each(
        self, shards: Shards, state: SAEState, x_MND: Array, memory: SparseAutoencoder | None
    ) -> tuple[SAEState, dict[str, Array], SparseAutoencoder | None]:
        """This device's SAEs one after the other, in place."""
        step = partial(_step_of_one, self.optimizer, self.config, self.aux_k, shards)
        count, seeds = x_MND.shape[0] * self.config.num_seeds, self.config.num_seeds
        if count == 1:
            state, metrics, gradient = step(state, x_MND[0])
            return state, {name: value[None] for name, value in metrics.items()}, _memory(memory, gradient)

        def turn(place: Array, carry: Any) -> Any:
            state, metrics, memory = carry
            one, measured, gradient = step(_at(state, place), jax.lax.dynamic_index_in_dim(x_MND, place // seeds, keepdims=False))
            metrics = {name: values.at[place].set(measured[name]) for name, values in metrics.items()}
            return _put_in(state, one, place), metrics, _memory(memory, gradient)

        metrics = {name: jnp.zeros((count,), jnp.float32) for name in METRICS}
        return jax.lax.fori_loop(0, count, turn, (state, metrics, memory))

    def _make_memory(self, saes: SparseAutoencoder) -> SparseAutoencoder:
        """Room for one SAE's gradients on each device."""
        leaves, tree = jax.tree.flatten(saes)
        groups = self.mesh.shape["fsdp"] if self.mesh else 1
        return jax.tree.unflatten(tree, _zeros([((groups, *leaf.shape[1:]), leaf.dtype) for leaf in leaves], self._shardings(_specs(saes))))

    def _shardings(self, specs: list[PartitionSpec]) -> list[NamedSharding] | None:
        """Where arrays of these specs lie; None without a mesh."""
        return [NamedSharding(self.mesh, spec) for spec in specs] if self.mesh else None


METRICS = ("fvu", "aux", "l0", "dead", "cut", "sparsity", "gradient_norm", "skipped")


def sae_step(
    optimizer: optax.GradientTransformation,
    config: SAEConfig,
    aux_k: int,
    state: SAEState,
    x_ND: Float[Array, "N D"],
    *,
    shards: Shards | None = None,
) -> tuple[SAEState, dict[str, Float[Array, ""]]]:
    """One optimiser step of one SAE on a batch of residual streams.

    The decoder's gradient loses its part along each direction before clipping, and directions are renormalised after the step. A batch
    whose gradient is not finite counts as one whose gradient is 0, and in the metric `skipped`.
    """
    stacked = jax.tree.map(lambda leaf: leaf[None], state)
    stacked, metrics, _ = _step_of_one(optimizer, config, aux_k, shards or Shards(), stacked, x_ND)
    return _first(stacked), metrics


def _step_of_one(
    optimizer: optax.GradientTransformation, config: SAEConfig, aux_k: int, shards: Shards, state: SAEState, x_ND: Array
) -> tuple[SAEState, dict[str, Array], SparseAutoencoder]:
    """`sae_step` of a stack of one, and the gradient as it was before projection.

    All that is elementwise keeps the stack's axis: where shapes change between Adam's moments and the parameters, XLA's CPU compiler computes
    the moments twice, from copies.
    """
    sae, since_F = _first(state.sae), state.tokens_since_fired[0]
    x = x_ND.astype(jnp.float32) / state.scale[0]
    with jax.numpy_dtype_promotion("standard"):  # optax divides its int32 step, and raises floats to its power
        weight: Any = config.sparsity_schedule()(_count(state.optimizer)[0]) if config.activation == "jumprelu" else 0.0
    found = loss_and_gradient(sae, x, since_F, weight, config=config, aux_k=aux_k, shards=shards)
    grads, norm = _project_and_clip(found.parameters, found.along_F, sae, config.clip, shards)
    # Nothing that is not a number reaches parameters or moments. (Keeping the old ones instead would need copies of all of them.)
    ok = jnp.isfinite(norm)
    grads = jax.tree.map(lambda g: jnp.where(ok, g, jnp.zeros_like(g))[None], grads)
    with jax.numpy_dtype_promotion("standard"):
        updates, opt_state = optimizer.update(grads, state.optimizer, state.sae)  # pyright: ignore[reportArgumentType]
    saes: Any = optax.apply_updates(state.sae, updates)  # pyright: ignore[reportArgumentType]
    # The condition always holds. Without it XLA's CPU compiler makes one call of the update and the sums over its rows, in arrays of their own;
    # with one for both it writes the result to fresh memory, which the system clears.
    always, rows_FD = found.tokens_since_fired[0] >= 0, saes.W_dec[...]
    scale_F = jax.lax.cond(always, _to_unit, lambda rows_FD: rows_FD[..., 0], rows_FD)
    changes = {"W_dec": jax.lax.cond(always, lambda rows_FD: rows_FD * scale_F[..., None], lambda rows_FD: rows_FD, rows_FD)}
    if config.activation == "jumprelu":
        changes["threshold"] = jnp.maximum(saes.threshold[...], 0)
    if config.activation == "batch_topk":
        changes["threshold"] = _follow(saes.threshold[...], found.least_active, ok, config.threshold_decay)
    saes = replace_params(saes, changes)
    average = state.average
    if average is not None:
        average = jax.tree.map(lambda old, new: config.ema * old + (1 - config.ema) * new, average, saes)
    since_F = jnp.where(ok, found.tokens_since_fired, since_F)
    losses = {name: getattr(found.losses, name) for name in METRICS if hasattr(found.losses, name)}
    metrics = losses | {"gradient_norm": norm, "skipped": 1 - ok.astype(jnp.float32)}
    return SAEState(saes, opt_state, since_F[None], state.scale, average), metrics, found.parameters


@cache
def compiled_step(config: SAEConfig, aux_k: int, mesh: Mesh | None = None) -> SAEStep:
    """The step of a config; recipes of one config share the program."""
    return SAEStep(config, aux_k, mesh)


def exported(state: SAEState, config: SAEConfig) -> SparseAutoencoder:
    """The parameters to use, of scaled inputs: the corrected average where one is kept, with directions of unit length."""
    if state.average is None:
        return state.sae
    correction = 1 - config.ema ** _count(state.optimizer).astype(jnp.float32)
    sae = jax.tree.map(lambda leaf: leaf / jnp.maximum(correction, 1e-12), state.average)
    changes = {"W_dec": sae.W_dec[...] * _to_unit(sae.W_dec[...])[..., None]}
    if config.activation == "batch_topk":  # an average already
        changes["threshold"] = state.sae.threshold[...]
    return replace_params(sae, changes)


def new_sae(W_enc: Array, W_dec: Array, b_enc: Array, b_dec: Array, config: SAEConfig) -> SparseAutoencoder:
    """An SAE of the config's variant; thresholds of `batch_topk` begin at 0, which stands for none yet."""
    first = {"batch_topk": 0.0, "jumprelu": config.threshold_init}.get(config.activation)
    threshold = None if first is None else jnp.full_like(b_enc, first)
    return SparseAutoencoder(W_enc, W_dec, b_enc, b_dec, k=config.slots, activation=config.activation, threshold=threshold)


def _project_and_clip(
    grads: SparseAutoencoder, along_F: Array, sae: SparseAutoencoder, clip: float, shards: Shards
) -> tuple[SparseAutoencoder, Array]:
    """The decoder's gradient without its part along each direction, all of it at most `clip` long, and its length before that."""
    # Pythagoras with unit directions, so that the projected gradient is made only where it is used.
    of_b_dec = jnp.sum(jnp.square(grads.b_dec[...]))
    of_features = optax.tree.norm(grads, squared=True) - of_b_dec - jnp.sum(jnp.square(along_F))
    norm = jnp.sqrt(jnp.maximum(shards.sum_features(of_features) + of_b_dec, 0))
    grads = replace_params(grads, {"W_dec": grads.W_dec[...] - along_F[:, None] * sae.W_dec[...]})
    return jax.tree.map(lambda g: g * jnp.minimum(1.0, clip / jnp.maximum(norm, 1e-12)), grads), norm


def _follow(threshold_F: Array, least: Array, ok: Array, decay: float) -> Array:
    """`batch_topk`'s threshold: the first least active value, then a running average of them; batches without one change nothing."""
    moved_F = jnp.where(threshold_F > 0, decay * threshold_F + (1 - decay) * least, least)
    return jnp.where(ok & (least > 0), moved_F, threshold_F)


def _to_unit(rows_FD: Array) -> Array:
    """What each row is multiplied by to become a unit vector."""
    return 1 / (jnp.linalg.norm(rows_FD, axis=-1) + 1e-8)


def _count(optimizer_state: Any) -> Array:
    """Steps taken, as Adam counts them."""
    return optax.tree.get(optimizer_state[0], "count")


def _zeros(shapes: list[tuple[tuple[int, ...], Any]], shardings: list[NamedSharding] | None) -> list[Array]:
    """Zeros of shapes and dtypes, each made where it lies."""
    return jax.jit(lambda: [jnp.zeros(shape, dtype) for shape, dtype in shapes], out_shardings=shardings)()


def _specs(tree: Any) -> list[PartitionSpec]:
    """Specs of a tree's arrays, in the order of its leaves."""
    return [stack_spec(path) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]


def _memory(memory: SparseAutoencoder | None, gradient: SparseAutoencoder) -> SparseAutoencoder | None:
    """The gradient, where there is room to leave it in."""
    return None if memory is None else jax.tree.map(lambda leaf: leaf[None], gradient)


def _first(tree: _Tree) -> _Tree:
    return jax.tree.map(lambda leaf: leaf[0], tree)


def _at(tree: _Tree, place: Array) -> _Tree:
    """A stack of the one at a place."""
    return jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, place, 1), tree)


def _put_in(stacked: _Tree, one: _Tree, place: Array) -> _Tree:
    return jax.tree.map(lambda all_, leaf: jax.lax.dynamic_update_slice_in_dim(all_, leaf, place, 0), stacked, one)
