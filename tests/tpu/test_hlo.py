from tpu.hlo import Collective, collectives

# Lines as the compiler writes them, shortened: layouts in braces, asynchronous pairs, tuples, a use by name.
TEXT = """
HloModule jit_update, is_scheduled=true
%body (p: (f32[8])) -> (f32[8]) {
  %all-reduce.3 = f32[8]{0:T(128)} all-reduce(%p), replica_groups={{0,1}}, to_apply=%add
  ROOT %tuple = (f32[8]{0}) tuple(%all-reduce.3)
}
ENTRY %main (a: bf16[4,16]) -> bf16[64,16] {
  %all-gather-start.1 = (bf16[4,16]{1,0}, bf16[64,16]{1,0:T(8,128)(2,1)}) all-gather-start(%a), dimensions={0}
  %all-gather-done.1 = bf16[64,16]{1,0:T(8,128)(2,1)} all-gather-done(%all-gather-start.1)
  %fusion = bf16[64,16]{1,0} fusion(%all-gather-done.1), kind=kLoop, calls=%computation
  %all-to-all.7 = (s32[1,5]{1,0}, s32[1,5]{1,0}) all-to-all(%x, %y), replica_groups={{0,1}}
  ROOT %collective-permute.2 = u32[] collective-permute(%n), source_target_pairs={{0,1}}
}
"""


def test_every_collective_is_found_once_with_its_largest_array():
    assert collectives(TEXT) == [
        Collective("all-reduce", "f32", (8,)),
        Collective("all-gather", "bf16", (64, 16)),
        Collective("all-to-all", "s32", (1, 5)),
        Collective("collective-permute", "u32", ()),
    ]
    assert [one.bytes for one in collectives(TEXT)] == [32, 2048, 20, 4]
