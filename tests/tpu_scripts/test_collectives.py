import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from qscope_jax.parallel.mesh import make_mesh
from tpu_scripts.collectives import Collectives, array_bytes, collectives


@pytest.fixture(scope="module")
def place():
    """Description of an array on a mesh of two times four devices."""
    mesh = make_mesh("data=2,tensor=4")

    def make(shape: tuple[int, ...], *axes, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes)))

    return make


def read(function, *arguments, out=None) -> list[Collectives]:
    return collectives(jax.jit(function, out_shardings=out).lower(*arguments).compile().as_text())


def test_a_product_over_a_sharded_dimension_is_one_all_reduce_of_its_result(place):
    x, w = place((16, 64), "data", "tensor"), place((64, 32), "tensor", None)
    assert read(jnp.matmul, x, w, out=place((16, 32), "data").sharding) == [Collectives("all-reduce", 1, 8 * 32 * 4, False)]


def test_a_gather_counts_what_every_device_then_has(place):
    whole = place(()).sharding
    assert read(lambda x: x * 2, place((64, 32), "tensor"), out=whole) == [Collectives("all-gather", 1, 64 * 32 * 4, False)]


def test_a_loop_counts_as_often_as_it_turns(place):
    def layers(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    found = read(layers, place((16, 64), "data", "tensor"), place((7, 64, 64), None, "tensor", None), out=place((16, 64), "data", "tensor").sharding)
    assert found and all(kind.count % 7 == 0 and kind.bytes % kind.count == 0 and not kind.unknown_loops for kind in found)


def test_a_loop_of_unknown_length_counts_one_turn_and_says_so(place):
    def shrink(x, w):
        return jax.lax.while_loop(lambda x: jnp.max(jnp.abs(x)) > 1, lambda x: x @ w, x)

    found = read(shrink, place((16, 64), "data", "tensor"), place((64, 64), "tensor", None))
    assert found and all(kind.unknown_loops for kind in found)


def test_a_program_of_one_device_sends_nothing():
    assert read(lambda x: x @ x, jax.ShapeDtypeStruct((8, 8), jnp.float32)) == []


@pytest.mark.parametrize(
    ("shapes", "size"),
    [
        ("f32[8,128]{1,0}", 4096),
        ("bf16[3,5]{1,0:T(8,128)(2,1)S(1)}", 30),
        ("(f32[2], (pred[3], s4[3]))", 8 + 3 + 2),
        ("f8e4m3fn[7]", 7),
        ("f32[]", 4),
        ("u32[0,9]", 0),
        ("token[]", 0),
    ],
)
def test_bytes_follow_shape_and_type(shapes, size):
    assert array_bytes(shapes) == size


# As XLA writes for a TPU: the loop's length stands in its condition, groups are named by mesh axes, transfers have a start and an end.
TPU_TEXT = """HloModule jit_f, is_scheduled=true

%body.1 (p.1: (s32[], f32[32,256])) -> (s32[], f32[32,256]) {
  %p.1 = (s32[]{:T(128)}, f32[32,256]{1,0:T(8,128)}) parameter(0)
  %g.1 = f32[32,256]{1,0:T(8,128)} get-tuple-element(%p.1), index=1
  %ag = (bf16[32,256]{1,0}, bf16[32,1024]{1,0:T(8,128)(2,1)S(1)}) all-gather-start(%g.1), replica_groups=mesh['x'=1,'y'=4] {'y'}, dimensions={1}
  %agd = bf16[32,1024]{1,0} all-gather-done(%ag)
  %rs = f32[8,256]{1,0} reduce-scatter(%g.1), replica_groups=mesh['x'=2,'y'=4] {'y'}, dimensions={0}, to_apply=%add
}

%condition.1 (p.2: (s32[], f32[32,256])) -> pred[] {
  %limit = s32[]{:T(128)} constant(28)
  %p.2 = (s32[]{:T(128)}, f32[32,256]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p.2), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%wrapped (q: f32[16,16]) -> f32[16,16] {
  %q = f32[16,16]{1,0} parameter(0)
  ROOT %cp = (f32[16,16]{1,0}, f32[16,16]{1,0}, u32[], u32[]) collective-permute-start(%q), source_target_pairs={{0,1},{1,0}}
}

ENTRY %main (a: f32[32,256]) -> f32[32,256] {
  %a = f32[32,256]{1,0:T(8,128)} parameter(0)
  %w = (s32[]{:T(128)}, f32[32,256]{1,0:T(8,128)}) while(%t), condition=%condition.1, body=%body.1
  %s = ((f32[16,16]{1,0}), f32[16,16]{1,0}, u32[]) async-start(%a), calls=%wrapped
  %d = f32[16,16]{1,0} async-done(%s), calls=%wrapped
  ROOT %out = f32[32,256]{1,0:T(8,128)} all-reduce(%a), replica_groups={{0,1},{2,3}}, to_apply=%add
}
"""


def test_text_for_a_tpu_is_read():
    assert collectives(TPU_TEXT) == [
        Collectives("all-gather", 28, 28 * 32 * 1024 * 2, False),
        Collectives("all-reduce", 1, 32 * 256 * 4, False),
        Collectives("reduce-scatter", 28, 28 * 4 * 8 * 256 * 4, False),
        Collectives("collective-permute", 1, 16 * 16 * 4, False),
    ]


@pytest.mark.parametrize("groups", ["{{0,1,2,3},{4,5,6,7}}", "[2,4]<=[8]", "[2,4]<=[2,2,2]T(1,0,2)", "mesh['x'=2,'y'=4] {'y'}"])
def test_groups_are_read_in_every_notation(groups):
    text = f"ENTRY %main (a: f32[8]) -> f32[2] {{\n  ROOT %r = f32[2]{{0}} reduce-scatter(%a), replica_groups={groups}, dimensions={{0}}\n}}\n"
    assert collectives(text) == [Collectives("reduce-scatter", 1, 4 * 2 * 4, False)]


def test_of_the_branches_of_a_condition_the_one_that_sends_most_counts():
    branch = "%{0} (p: f32[{1}]) -> f32[{1}] {{\n  ROOT %r.{0} = f32[{1}]{{0}} all-reduce(%p), to_apply=%add\n}}\n"
    entry = "ENTRY %main (a: f32[8]) -> f32[8] {\n  ROOT %c = f32[8]{0} conditional(%i, %a, %a), branch_computations={%one, %two}\n}\n"
    assert collectives(branch.format("one", 8) + branch.format("two", 16) + entry) == [Collectives("all-reduce", 1, 64, False)]
