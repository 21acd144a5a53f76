"""Converting model folders between Hugging Face and Orbax: peak memory and time of a process that does nothing else.

    python -m benchmarks.convert [--scratch DIR]

Target: peak memory above the interpreter's at its start at most two of the largest tensors plus 1 GB. Models: a Qwen3-1.7B shape and a mixture of
eight experts, random bfloat16 weights. Every conversion is a process of its own; the way back must give the bits that were there.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.load import make_folder
from benchmarks.shapes import QWEN3_1_7B
from benchmarks.timing import header
from qscope_jax.data.hub import open_source
from qscope_jax.models.conversion import StoredModel, differing_tensors

_MIXTURE = {
    **QWEN3_1_7B, "model_type": "qwen3_moe", "num_hidden_layers": 8, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 2048,
    "norm_topk_prob": True, "tie_word_embeddings": False,
}  # fmt: skip
# Not getrusage: its maximum is inherited from the process that started this one.
_CONVERT = """
import re, sys, time
def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
before, start = peak(), time.perf_counter()
from pathlib import Path
from converters.convert_qwen import convert
convert(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
print(peak() - before, time.perf_counter() - start)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--scratch", help="folder for 11 GB of models; default: the system's")
    arguments = parser.parse_args()
    header("convert")
    for name, config in (("Qwen3-1.7B", QWEN3_1_7B), ("mixture of 8 experts", _MIXTURE)):
        with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
            hf, orbax, back = (Path(scratch) / folder for folder in ("hf", "orbax", "back"))
            make_folder(hf, config)
            model = StoredModel(open_source(hf))
            sizes = [tensor.nbytes for tensor in model.tensors]
            print(f"{name}: {len(sizes)} tensors, {sum(sizes) / 1e9:.2f} GB, the largest {max(sizes) / 1e9:.2f} GB")
            for source, destination, to in ((hf, orbax, "orbax"), (orbax, back, "hf"), (hf, Path(scratch) / "copy", "hf")):
                _report(source, destination, to, sizes)
            differing = sum(1 for _ in differing_tensors(model, StoredModel(open_source(back))))
            print(f"  there and back: {differing} of {len(sizes)} tensors differ; target 0")


def _report(source: Path, destination: Path, to: str, sizes: list[int]) -> None:
    command = [sys.executable, "-c", _CONVERT, str(source), str(destination), to]
    peak, seconds = map(float, subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1].split())
    bar = 2 * max(sizes) + 1e9
    print(
        f"  {source.name} -> {to:<5}  peak {peak / 1e9:.2f} GB above the start; target at most {bar / 1e9:.2f}"
        f"   {seconds:.1f} s, {sum(sizes) / 1e9 / seconds:.2f} GB/s"
    )


if __name__ == "__main__":
    main()
