"""Loading a Qwen3-1.7B-shaped folder (bfloat16, random weights): memory and time beside reading the files.

    python -m benchmarks.load [--folder DIR]

Targets: peak memory at most the folder's size plus 1 GB; time at most 1.5 times reading the files. Each measurement is a process of its
own; the files are in the page cache for both (one is read first to make sure). The same model as an Orbax folder stands beside it.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.shapes import QWEN3_1_7B
from benchmarks.timing import header

_READ = """
import resource, sys, time, pathlib
import jax
jax.devices()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.perf_counter()
kept = [path.read_bytes() for path in sorted(pathlib.Path(sys.argv[1]).glob("*.safetensors"))]
print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""
_LOAD = """
import resource, sys, time
import jax
from qscope_jax.models.language_model import load_model
jax.devices()
start = time.perf_counter()
model = load_model(sys.argv[1])
jax.block_until_ready(jax.tree.leaves(model.decoder))
print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", help="a folder to load; default: one is made")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    header("load")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(arguments.folder or make_folder(Path(scratch) / "model", QWEN3_1_7B))
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 2**30
        orbax = Path(scratch) / "orbax"
        subprocess.run([sys.executable, "-m", "converters.convert_qwen", str(folder), str(orbax), "--to", "orbax"], capture_output=True, check=True)
        runs: dict[str, list[tuple[float, float]]] = {"read": [], "load": [], "orbax": []}
        for round_ in range(arguments.rounds + 1):
            for name, code, source in (("read", _READ, folder), ("load", _LOAD, folder), ("orbax", _LOAD, orbax)):
                out = subprocess.run([sys.executable, "-c", code, str(source)], capture_output=True, text=True, check=True).stdout.split()
                if round_:
                    runs[name].append((float(out[0]), float(out[1])))
        ratio = statistics.median(load[0] / read[0] for load, read in zip(runs["load"], runs["read"], strict=True))
        peak = max(memory for _, memory in runs["load"])
        print(
            f"folder {size:.2f} GiB; read {statistics.median(t for t, _ in runs['read']):.2f} s, "
            f"load {statistics.median(t for t, _ in runs['load']):.2f} s"
        )
        print(f"load / read: median {ratio:.2f}; target at most 1.5")
        print(f"peak memory of the loading process {peak:.2f} GiB, {peak - size:.2f} GiB above the folder's size; target at most 1 above")
        seconds, peaks = zip(*runs["orbax"], strict=True)
        print(f"from an Orbax folder: load {statistics.median(seconds):.2f} s, peak memory {max(peaks):.2f} GiB")


def make_folder(folder: Path, hf_config: dict[str, Any]) -> Path:
    """Write a Hugging Face folder of random bfloat16 weights, tensor by tensor."""
    import jax
    import ml_dtypes

    from qscope_jax.models.config import ModelConfig
    from qscope_jax.models.decoder import Decoder
    from qscope_jax.models.safetensors_file import write_file
    from qscope_jax.models.weights import placement

    config = ModelConfig.from_hf(hf_config).unrolled()
    abstract = jax.eval_shape(lambda: Decoder(config, jax.random.key(0)))
    leaves, _ = jax.tree_util.tree_flatten_with_path(abstract)
    rng = np.random.default_rng(0)
    places = [placement(path, leaf.shape, config) for path, leaf in leaves]
    plan = [(name, place.shape) for place in places for name in place.names]
    folder.mkdir(parents=True)
    bf16 = np.dtype(ml_dtypes.bfloat16)
    half = len(plan) // 2
    files = {"model-00001-of-00002.safetensors": plan[:half], "model-00002-of-00002.safetensors": plan[half:]}
    for file, part in files.items():
        data = ((rng.standard_normal(shape, np.float32) * 0.02).astype(bf16) for _, shape in part)
        write_file(folder / file, [(name, tuple(shape), bf16) for name, shape in part], data)
    weight_map = {name: file for file, part in files.items() for name, _ in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(hf_config))
    return folder


if __name__ == "__main__":
    main()
