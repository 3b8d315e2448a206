"""The bytes that a program reads of its chip's memory, counted by hand in a program's text."""

from tpu.reads import bytes_read

# A step of a loop: a lookup of 4 rows in a table, a product whose matrix is a view made in its own fusion,
# a matrix of which half is copied to fast memory ahead of its use, a cache written in place and read.
TEXT = """HloModule step

%view (p.0: bf16[64,32]) -> bf16[32,64] {
  %p.0 = bf16[64,32]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %bitcast.0 = bf16[32,64]{0,1:T(8,128)(2,1)} bitcast(%p.0)
}

%lookup (p.1: bf16[1000,64], p.2: s32[4]) -> bf16[4,64] {
  %p.2 = s32[4]{0:T(128)S(1)} parameter(1)
  %p.1 = bf16[1000,64]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %gather.0 = bf16[4,64]{1,0:T(4,128)(2,1)} gather(%p.1, %p.2), offset_dims={1}, slice_sizes={1,64}
}

%product (p.3: bf16[64,32], p.4: bf16[4,32]) -> f32[4,64] {
  %p.3 = bf16[64,32]{1,0:T(8,128)(2,1)} parameter(0)
  %p.4 = bf16[4,32]{1,0:T(4,128)(2,1)S(1)} parameter(1)
  %fusion.0 = bf16[32,64]{0,1:T(8,128)(2,1)} fusion(%p.3), kind=kLoop, calls=%view
  ROOT %convolution.0 = f32[4,64]{1,0:T(4,128)S(1)} convolution(%p.4, %fusion.0), dim_labels=bf_io->bf
}

%write (p.5: bf16[4,96,8], p.6: s32[4], p.7: bf16[4,8]) -> bf16[4,96,8] {
  %p.5 = bf16[4,96,8]{2,1,0:T(8,128)(2,1)} parameter(0)
  %p.6 = s32[4]{0:T(128)} parameter(1)
  %p.7 = bf16[4,8]{1,0:T(4,128)(2,1)S(1)} parameter(2)
  ROOT %scatter.0 = bf16[4,96,8]{2,1,0:T(8,128)(2,1)} scatter(%p.5, %p.6, %p.7), to_apply=%unused
}

%body (s: (s32[], bf16[1000,64], bf16[64,32], bf16[32,16], bf16[4,96,8])) -> (s32[]) {
  %s = (s32[], bf16[1000,64]{1,0:T(8,128)(2,1)}, /*index=2*/bf16[64,32]{1,0}) parameter(0)
  %ids = s32[4]{0:T(128)S(1)} get-tuple-element(%s), index=0
  %table = bf16[1000,64]{1,0:T(8,128)(2,1)} get-tuple-element(%s), index=1
  %matrix = bf16[64,32]{1,0:T(8,128)(2,1)} get-tuple-element(%s), index=2
  %other = bf16[32,16]{1,0:T(8,128)(2,1)} get-tuple-element(%s), index=3
  %cache = bf16[4,96,8]{2,1,0:T(8,128)(2,1)} get-tuple-element(%s), index=4
  %new = bf16[4,8]{1,0:T(4,128)(2,1)S(1)} get-tuple-element(%s), index=5
  %start = ((bf16[32,16]{1,0}), bf16[16,16]{1,0:T(8,128)(2,1)S(1)}, s32[]{:S(2)}) slice-start(%other)
  %rows = bf16[4,64]{1,0:T(4,128)(2,1)} fusion(%table, %ids), kind=kCustom, calls=%lookup
  %done = bf16[16,16]{1,0:T(8,128)(2,1)S(1)} slice-done(%start)
  %small = bf16[4,32]{1,0:T(4,128)(2,1)S(1)} get-tuple-element(%s), index=6
  %scores = f32[4,64]{1,0:T(4,128)S(1)} fusion(%matrix, %small), kind=kOutput, calls=%product
  %half = f32[4,16]{1,0:T(4,128)S(1)} dot(%small, %done), lhs_contracting_dims={1}
  %at = s32[4]{0:T(128)} get-tuple-element(%s), index=7
  %written = bf16[4,96,8]{2,1,0:T(8,128)(2,1)} fusion(%cache, %at, %new), kind=kCustom, calls=%write
  %read = f32[4,8]{1,0:T(4,128)S(1)} reduce(%written, %start), dimensions={1}, to_apply=%unused
  ROOT %end = (s32[]{:T(128)}) tuple(%ids)
}

%condition (c: (s32[])) -> pred[] {
  %c = (s32[]{:T(128)}) parameter(0)
  ROOT %true = pred[]{:T(512)S(6)} constant(true)
}

ENTRY %main (a: s32[]) -> (s32[]) {
  %a = s32[]{:T(128)} parameter(0)
  %first = (s32[]{:T(128)}) tuple(%a)
  ROOT %loop = (s32[]{:T(128)}) while(%first), condition=%condition, body=%body
}
"""


def test_each_read_of_the_chips_memory_counts_once():
    rows = 2 * 4 * 64  # four of the table's thousand
    matrix = 2 * 64 * 32  # through the view
    half = 2 * 16 * 16  # copied ahead; the dot reads it from fast memory
    cache = 2 * 4 * 96 * 8  # read whole; the write in place reads only its four positions
    assert bytes_read(TEXT) == rows + matrix + half + cache + 4 * 4


def test_arrays_in_fast_memory_are_not_read_from_the_chips():
    before = bytes_read(TEXT)
    moved = TEXT.replace(
        "%matrix = bf16[64,32]{1,0:T(8,128)(2,1)}", "%matrix = bf16[64,32]{1,0:T(8,128)(2,1)S(1)}"
    )
    assert before - bytes_read(moved) == 2 * 64 * 32
