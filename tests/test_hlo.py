# ruff: noqa: E501
"""What the text of a compiled program says that it launches, moves and multiplies."""

import pytest


@pytest.fixture(scope="module")
def hlo(benchmark):
    return benchmark("hlo")


# A loop of 10 steps: two products of a library, one with a bias, attention, a packing kernel and a fusion that slices.
TEXT = """
HloModule jit_f, is_scheduled=true

%sliced (param_0: f32[10,64,8], param_1: s32[]) -> f32[64,8] {
  %param_0 = f32[10,64,8]{2,1,0} parameter(0)
  %param_1 = s32[] parameter(1)
  ROOT %dynamic-slice = f32[1,64,8]{2,1,0} dynamic-slice(%param_0, %param_1), dynamic_slice_sizes={1,64,8}
}

%updated (param_2: f32[10,64], param_3: f32[1,64], param_4: s32[]) -> f32[10,64] {
  %param_2 = f32[10,64]{1,0} parameter(0)
  %param_3 = f32[1,64]{1,0} parameter(1)
  %param_4 = s32[] parameter(2)
  ROOT %update = f32[10,64]{1,0} dynamic-update-slice(%param_2, %param_3, %param_4)
}

%body (state: (s32[], f32[64,8], f32[10,64])) -> (s32[], f32[64,8], f32[10,64]) {
  %state = (s32[], f32[64,8]{1,0}, /*index=2*/f32[10,64]{1,0}) parameter(0)
  %step = s32[] get-tuple-element(%state), index=0
  %x = f32[64,8]{1,0} get-tuple-element(%state), index=1
  %records = f32[10,64]{1,0} get-tuple-element(%state), index=2
  %slice.1 = f32[1,64,8]{2,1,0} fusion(%x, %step), kind=kLoop, calls=%sliced, metadata={op_name="jit(f)/slice"}
  %kernel.2 = bf16[8,16]{1,0} constant({...})
  %bias.3 = bf16[16]{0} constant({...})
  %gemm.4 = (bf16[64,16]{1,0}, s8[4194304]{0}) custom-call(%x, %kernel.2, %bias.3), custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]},"epilogue":"BIAS"}}
  %query.5 = bf16[4,16,2,8]{3,2,1,0} bitcast(%gemm.4)
  %attention.6 = (bf16[4,2,16,8]{3,1,2,0}, u8[0]{0}) custom-call(%query.5, %query.5, %query.5), custom_call_target="__cudnn$fmhaSoftmax"
  %pallas_call.7 = (s32[64]{0}, bf16[40,8]{1,0}) custom-call(%x, /*index=1*/%records), custom_call_target="__gpu$xla.gpu.triton", metadata={op_name="jit(f)/while/body/jit(pack)/pallas_call"}
  %copy.8 = s32[1]{0} copy(%step)
  %fusion.9 = f32[10,64]{1,0} fusion(%records, %bias.3, %step), kind=kLoop, calls=%updated
  ROOT %tuple.10 = (s32[], f32[64,8]{1,0}, f32[10,64]{1,0}) tuple(%step, %x, %fusion.9)
}

%condition (state.1: (s32[], f32[64,8], f32[10,64])) -> pred[] {
  %state.1 = (s32[], f32[64,8]{1,0}, f32[10,64]{1,0}) parameter(0)
  ROOT %less = pred[] constant(true)
}

ENTRY %main (x.1: f32[64,8]) -> f32[64,8] {
  %x.1 = f32[64,8]{1,0} parameter(0)
  %copy.1 = f32[64,8]{1,0} copy(%x.1)
  %tuple.1 = (s32[], f32[64,8]{1,0}, f32[10,64]{1,0}) tuple(%copy.1)
  %while.1 = (s32[], f32[64,8]{1,0}, f32[10,64]{1,0}) while(%tuple.1), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"10"}}
  ROOT %result = f32[64,8]{1,0} get-tuple-element(%while.1), index=1
}
"""
BYTES = {
    "slice.1": 2 * 64 * 8 * 4 + 4,  # the slice, not the whole; the step's number
    "gemm.4": 64 * 8 * 4 + (8 * 16 + 16 + 64 * 16) * 2,  # without the place to work in
    "attention.6": 4 * (4 * 16 * 2 * 8) * 2,
    "pallas_call.7": 40 * 8 * 4 + 10 * 64 * 4 + 64 * 4 + 40 * 8 * 2,  # as many tokens as are packed
    "copy.8": 4 + 4,
    "fusion.9": 64 * 4 + 16 * 2 + 4,  # in place
}


def test_launches_are_counted_with_their_bytes_and_flops(hlo):
    of_step, once = hlo.split_by_steps(TEXT, 10)
    assert [(each.kind, each.times, each.bytes) for each in once] == [("copy", 1, 2 * 64 * 8 * 4)]
    assert {each.name.split()[0]: each.bytes for each in of_step} == BYTES
    kinds = [each.kind for each in of_step]
    assert kinds == ["fusion", "product", "attention", "kernel", "copy", "fusion"]
    flops = {each.kind: each.flops for each in of_step if each.flops}
    assert flops == dict(product=2 * 64 * 16 * 8, attention=4 * 4 * 2 * 16 * 16 * 8)
    [product] = [each.product for each in of_step if each.product]
    assert product == (64, 16, 8)
    found = hlo.count(hlo.read_launches(TEXT))
    assert found["launches"] == 61 and found["fusion"] == 20 and found["copy"] == 11
    assert found["bytes"] == 10 * sum(BYTES.values()) + 2 * 64 * 8 * 4


def test_a_launch_takes_at_least_the_longer_of_two_times(hlo):
    launch = lambda size, flops, times=1: hlo.Launch("", "product", times, size, flops)
    launches = [launch(100.0, 10.0), launch(10.0, 300.0, times=2)]
    assert hlo.floor_seconds(launches, bandwidth=10.0, peak_flops=20.0) == 10 + 2 * 15
