"""What the benchmark for GPUs makes of a trace: time, calls and bytes by class of kernel."""

import gzip
import json

import jax
import jax.numpy as jnp
import pytest


@pytest.fixture(scope="module")
def trace(benchmark):
    return benchmark("gpu_trace")


TEXT = """
FileNames
1 "/somewhere/site-packages/jax/numpy.py"
2 "/somewhere/dydit_jax/models/layers.py"

FunctionNames
1 "layer_norm"
2 "TokenRouter.__call__"
3 "var"

FileLocations
1 {file_name_id=2 function_name_id=1 line=3 end_line=3 column=59 end_column=66}
2 {file_name_id=2 function_name_id=2 line=3 end_line=3 column=54 end_column=57}
3 {file_name_id=1 function_name_id=3 line=3 end_line=3 column=54 end_column=57}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}
3 {file_location_id=3 parent_frame_id=1}

ENTRY %main.5 (x.1: f32[256,256]) -> f32[256,256] {
  %x.1 = f32[256,1024]{1,0} parameter(0), metadata={op_name="x"}
  %loop_fusion.3 = bf16[256,1024]{1,0} fusion(%x.1), kind=kLoop, metadata={op_name="jit(f)/var" stack_frame_id=3}
  %gemm.7 = (bf16[256,512]{1,0}, s8[1024]{0}) custom-call(%loop_fusion.3), metadata={op_name="dot" stack_frame_id=2}
  %call.4 = bf16[256,512]{1,0} call(%loop_fusion.3), to_apply=%command_buffer
  ROOT %wrapped_add = f32[] add(%x.1, %x.1)
}
"""


def event(name, ts, dur, *, tid=1, pid=1, **args):
    return dict(ph="X", pid=pid, tid=tid, ts=ts, dur=dur, name=name, args=args)


def write_trace(path, events, *, process="/device:GPU:0", threads=("Stream #20(Compute)", "XLA Ops")):
    names = [dict(ph="M", pid=1, name="process_name", args=dict(name=process))]
    names += [dict(ph="M", pid=2, name="process_name", args=dict(name="/host:CPU"))]
    for tid, thread in enumerate(threads, start=1):
        names.append(dict(ph="M", pid=1, tid=tid, name="thread_name", args=dict(name=thread)))
    with gzip.open(path, "wt") as file:
        json.dump(dict(traceEvents=[*names, *events]), file)


def test_a_trace_is_summed_by_class(trace, tmp_path):
    path = tmp_path / "plugins" / "profile" / "today" / "host.trace.json.gz"
    path.parent.mkdir(parents=True)
    events = [
        event("nvjet_hsh_128x64", 0, 100, hlo_op="gemm.9"),
        event("nvjet_hsh_128x64", 100, 100, hlo_op="gemm.7"),  # the router's, which its function tells
        event("loop_fusion_3", 300, 50),  # a norm; its own name is that of the instruction
        event("cudnn_generated_fort_native_sdpa_sm90_flash_fprop", 400, 150, hlo_op="custom-call.2"),
        event("_packing_kernel", 550, 50, hlo_op="call.4"),  # which launches several together
        event("MemcpyD2H", 590, 20),  # beside it
        event("gemm.9", 0, 100, tid=2, hlo_op="gemm.9"),  # the same again, on a line that is no stream
        event("cuLaunchKernel", 0, 5, pid=2),
    ]
    write_trace(path, events)
    kernels = trace.read_kernels(trace.find_trace(tmp_path))
    assert len(kernels) == 6
    found = trace.summed(kernels, trace.read_instructions(TEXT), steps=2)
    milliseconds = {label: row["ms"] * 2e3 for label, row in found["classes"].items()}
    expected = {
        "attention": 150,
        "gaps": 150,
        "products": 100,
        "routing": 100,
        "norms and residuals": 50,
        "packing and unpacking": 50,
        "copies by the driver": 20,
    }
    assert milliseconds == pytest.approx(expected)
    assert found["ms_per_step"] == pytest.approx(0.305)
    assert found["classes"]["attention"]["calls"] == 0.5
    # Read as float32, written as bfloat16; the product reads that and writes half as much and a workspace.
    size = 256 * 1024
    assert found["classes"]["norms and residuals"]["gib"] * 2**31 == pytest.approx(6 * size)
    assert found["classes"]["routing"]["gib"] * 2**31 == pytest.approx(3 * size + 1024)
    assert found["classes"]["packing and unpacking"]["gib"] == 0
    dearest = found["kernels"][0]
    assert (dearest["kernel"][:5], dearest["class"]) == ("cudnn", "attention")


def test_a_profile_of_this_device_is_read(trace, tmp_path):
    function = jax.jit(lambda x: jax.lax.scan(lambda c, _: (jnp.sin(c @ c), None), x, None, length=5)[0])
    x = jnp.ones((64, 64))
    with trace.captured_programs() as programs:
        run = function.lower(x).compile()
    jax.block_until_ready(run(x))
    with trace.profiled(tmp_path):
        jax.block_until_ready(run(x))
    kernels = trace.read_kernels(trace.find_trace(tmp_path))
    [program] = programs
    found = trace.summed(kernels, trace.read_instructions(program.text()), steps=5)
    assert found["classes"]["products"]["calls"] == 1
    assert found["classes"]["products"]["gib"] * 2**30 >= 2 * 64 * 64 * 4
    assert program.cost()["gib_accessed"] > 0 and program.cost()["seconds"] > 0
    assert "while" not in {kernel["name"].split(".")[0] for kernel in kernels}


def test_what_fast_loses_adds_up(trace):
    sums = lambda **classes: dict(classes={name: dict(ms=ms) for name, ms in classes.items()})
    lost = trace.lost(sums(products=20.0, gaps=1.0), sums(products=11.0, packing=2.0, gaps=1.5), 2.0)
    assert lost == dict(packing=2.0, products=1.0, gaps=1.0)
