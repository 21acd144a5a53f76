"""Compile a model's forward pass ahead of time for a TPU topology, without the hardware, and print what a chip would hold.

    pip install libtpu
    python -m tpu_scripts.compile_forward --config path/to/config.json --topology v5e:2x2 --mesh tensor=4 --batch 8 --length 1024

Needs only the model's config.json. Prints the compile time and the bytes of arguments, temporaries and output on each chip. A scanned
layer's operations are counted once by XLA, so no FLOPs are printed here.
"""

import argparse
import os
import sys
import time
from pathlib import Path

from qscope_jax.errors import ConfigError, QscopeError


def main() -> int:
    """Run from the command line; exit status 2 is a mistake of the user, said in one line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", type=Path, required=True, help="the model's Hugging Face config.json")
    parser.add_argument("--topology", default="v5e:2x2", help="libtpu's name, such as v5e:2x2, v5p:2x2x2, v6e:4x4")
    parser.add_argument("--mesh", default="tensor=-1", help="mesh over the topology's chips")
    parser.add_argument("--batch", type=int, default=8, help="rows")
    parser.add_argument("--length", type=int, default=1024, help="tokens a row")
    parser.add_argument("--taps", type=int, default=1, help="layers whose residual stream is returned")
    arguments = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    try:
        for line in plan(arguments):
            print(line)
    except QscopeError as error:
        print(f"compile_forward: error: {error}", file=sys.stderr)
        return 2
    return 0


def plan(arguments: argparse.Namespace) -> list[str]:
    """Compile and describe.

    Raises:
        ConfigError: libtpu is missing, or the topology or mesh is not possible.
    """
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies

    from qscope_jax.data.files import read_json
    from qscope_jax.models.config import ModelConfig
    from qscope_jax.models.decoder import Decoder
    from qscope_jax.parallel.mesh import make_mesh
    from qscope_jax.parallel.rules import batch_sharding, leaf_name, parameter_sharding, replicated

    config = ModelConfig.from_hf(read_json(arguments.config))
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=arguments.topology).devices
    except Exception as error:  # libtpu raises plain RuntimeErrors of several kinds
        raise ConfigError(f"topology {arguments.topology}: cannot be described ({_first_line(error)}); is libtpu installed?") from error
    mesh = make_mesh(arguments.mesh, list(devices))
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    if arguments.batch < 1 or arguments.batch % rows or arguments.length < 1 or not 1 <= arguments.taps <= config.num_layers:
        found = f"batch {arguments.batch}, length {arguments.length}, taps {arguments.taps}"
        raise ConfigError(f"{found}: expected a batch that {rows} shards of rows divide, a positive length, and 1 to {config.num_layers} taps")
    abstract = jax.eval_shape(lambda: Decoder(config, jax.random.key(0)))

    def place(path: object, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        sharding = parameter_sharding(leaf_name(path), leaf.shape, mesh)  # pyright: ignore[reportArgumentType]
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    decoder = jax.tree_util.tree_map_with_path(place, abstract)
    tokens = jax.ShapeDtypeStruct((arguments.batch, arguments.length), jnp.int32, sharding=batch_sharding(mesh, 2))
    taps = jax.ShapeDtypeStruct((arguments.taps,), jnp.int32, sharding=replicated(mesh))
    start = time.perf_counter()
    lowered = jax.jit(lambda model, t, p: model(t, taps=p, logits="last")).lower(decoder, tokens, taps)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        raise ConfigError(f"{arguments.topology}: the forward pass does not compile ({_first_line(error)}); try another mesh or batch") from error
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    gib = {name: getattr(memory, f"{name}_size_in_bytes") / 2**30 for name in ("argument", "temp", "output")}
    chips = f"{mesh.size} of {len(devices)} chips, {arguments.mesh}"
    held = f"{gib['argument']:.2f} GiB of arguments, {gib['temp']:.2f} of temporaries, {gib['output']:.2f} of output"
    return [
        f"{config.family}, {config.num_layers} layers, width {config.d_model}, on {arguments.topology} ({chips})",
        f"compiled in {seconds:.1f} s; each chip holds {held}",
    ]


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


if __name__ == "__main__":
    sys.exit(main())
