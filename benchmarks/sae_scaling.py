"""What a device holds, computes and sends in one SAE step on meshes of virtual devices: counted in the compiled program, not timed.

    python -m benchmarks.sae_scaling

State and temporary bytes are XLA's, collectives are read from the program's text (with the branch that has AuxK in it), products are counted
by formula. Sixteen SAEs of D=512, F=8192, K=32 on 4,096 tokens each. Target: state and products fall as 1 / devices, and what is sent stays
below an array of [N, F].
"""

import argparse
import os
from typing import Any

MESHES = ("", "fsdp=8", "tensor=8", "data=8", "data=2,fsdp=2,tensor=2", "fsdp=2,tensor=4")
SAES, WIDTH, FEATURES, K, TOKENS = 16, 512, 8192, 32, 4096


def main() -> None:
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    os.environ["JAX_NUM_CPU_DEVICES"] = "8"
    from benchmarks.timing import header
    from qscope_jax.parallel.mesh import make_mesh
    from qscope_jax.training.sae_config import SAEConfig
    from qscope_jax.training.sae_step import SAEStep
    from tpu_scripts.collectives import collectives
    from tpu_scripts.flops import sae_flops

    header("sae_scaling")
    print(
        f"{SAES} SAEs, D={WIDTH} F={FEATURES} K={K}, {TOKENS} tokens; MiB and GFLOP a device; an array of [N, F]: {TOKENS * FEATURES * 4 >> 20} MiB"
    )
    print(f"  {'mesh':<26}{'state':>9}{'temporary':>11}{'products':>10}{'sent':>9}   collectives")
    for axes in MESHES:
        mesh = make_mesh(axes)
        step = SAEStep(SAEConfig(FEATURES, K, 10), WIDTH // 2, mesh)
        compiled = step.lower(SAES, WIDTH, TOKENS).compile()
        memory: Any = compiled.memory_analysis()
        found = collectives(compiled.as_text() or "")
        products = SAES * TOKENS * sae_flops(FEATURES, WIDTH, K, dense=False) / mesh.size / 1e9
        kinds = ", ".join(f"{one.count} {one.kind}" for one in found) or "none"
        sent = sum(one.bytes for one in found) / 2**20
        print(
            f"  {axes or 'one device':<26}{memory.argument_size_in_bytes / 2**20:9.1f}{memory.temp_size_in_bytes / 2**20:11.1f}"
            f"{products:10.1f}{sent:9.1f}   {kinds}"
        )


if __name__ == "__main__":
    main()
