"""From a profile of JAX to milliseconds by class of kernel: where the time of a GPU goes.

A profile is Chrome's trace format: events with a thread, a start and a duration in microseconds. On a GPU what runs are
the events of its streams; on a CPU, for trying this out, those that name an instruction of a program. A program's own
text says of every instruction what it reads and writes, and by which function it was made. A kernel of XLA's own has
its instruction's name; one of a library, or of Triton, names it only where it is launched by itself: XLA launches many
together, as a CUDA graph, and then such a kernel is classed by its own name.

Bytes are those of operands and results as wholes: more than is moved where a kernel reads a part of an operand, and
where something stays in the cache. A kernel whose instruction is not known has none.
"""

import contextlib
import dataclasses
import gzip
import json
import math
import pathlib
import re
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from unittest import mock

import jax
from jax.experimental import serialize_executable

GIB = 2**30
SHOWN_KERNELS = 80
GAPS = "gaps"
# The first that fits the kernel's name, its instruction's, its operation or the function of this package that made it.
CLASSES = (
    ("copies by the driver", r"^memcpy|^memset"),
    ("attention", r"fmha|flash|softmax|dot_product_attention|sdpa"),
    ("routing", r"router|routing|route"),
    ("weights cut apart", r"narrow|with_gates"),
    ("products", r"nvjet|gemm|gemv|cutlass|xmma|cublas|splitk|dot_general|\bdot\b|convolution"),
    ("packing and unpacking", r"pack|gather|scatter|cumsum|devicescan|spread|one_hot|open_tokens|places"),
    ("attention", r"attend|attention"),
    ("norms and residuals", r"norm\b|layer_norm|_adding_|modulat|rsqrt|residual|block"),
    ("activations", r"gelu|silu|tanh|erf|mlp"),
    ("noise and sampler", r"threefry|random|normal|noise|sampler|guided|ddpm|ddim"),
    ("copies of layout", r"copy|transpose|reshape"),
    ("graphs of kernels", r"graph"),
)
OTHER = "other"
CONTROL = ("while", "call", "conditional", "tuple", "get-tuple-element", "parameter")  # move nothing themselves
CONTROL_EVENT = re.compile(r"^(while|call|cond)")  # of a CPU; as long as what they contain
BYTES_OF = dict(pred=1, s4=0.5, u4=0.5, s8=1, u8=1, s16=2, u16=2, bf16=2, f16=2, s32=4, u32=4, f32=4)
BYTES_OF |= dict(s64=8, u64=8, f64=8, c64=8, c128=16)
PACKAGE = "dydit_jax"
TABLES = ("FileNames", "FunctionNames", "FileLocations", "StackFrames")
INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.-]+) = (.*?) ([\w-]+)\((.*)$")
# Of an operation what is not the loop that it is in.
OPERATION = re.compile(r'op_name="(?:jit\(run_segment\)/|while/|body/|cond/|closed_call/|shard_map/)*([^"]*)"')
FRAME = re.compile(r"stack_frame_id=(\d+)")
SOURCE = re.compile(r'source_file="[^"]*?([\w.]+)"')


@dataclasses.dataclass(frozen=True)
class Instruction:
    """What a program's text says of an instruction.

    Attributes:
      bytes: of operands and results.
      names: the operation, and the function that made it.
    """

    bytes: float
    names: str


@dataclasses.dataclass
class Program:
    """A program that was compiled, or read from a cache, while `captured_programs` looked on.

    Attributes:
      seconds: that it took.
      compiled: it, a `jax.stages.Compiled`.
    """

    seconds: float
    compiled: object

    def text(self) -> str:
        """Return what XLA made of it."""
        return self.compiled.as_text()

    def cost(self) -> dict:
        """Return what XLA counts and reserves, as far as this backend says; of loops one round each."""
        found = dict(seconds=self.seconds)
        with contextlib.suppress(Exception):  # which of these a backend lacks, and how it says so, differs
            cost = self.compiled.cost_analysis()
            cost = cost[0] if isinstance(cost, list) else cost
            found |= dict(gib_accessed=cost["bytes accessed"] / GIB, giga_flops=cost["flops"] / 1e9)
        with contextlib.suppress(Exception):
            memory = self.compiled.memory_analysis()
            found |= dict(
                arguments_gib=memory.argument_size_in_bytes / GIB, temporary_gib=memory.temp_size_in_bytes / GIB
            )
        return found


@contextlib.contextmanager
def captured_programs() -> Iterator[list[Program]]:
    """Collect the programs that are compiled ahead of their call or read from a cache, whoever asks for them."""
    programs, lock = [], threading.Lock()

    def seen(function):
        def call(*arguments, **settings):
            began = time.perf_counter()
            compiled = function(*arguments, **settings)
            with lock:
                programs.append(Program(time.perf_counter() - began, compiled))
            return compiled

        return call

    read = serialize_executable.deserialize_and_load
    with (
        mock.patch.object(jax.stages.Lowered, "compile", seen(jax.stages.Lowered.compile)),
        mock.patch.object(serialize_executable, "deserialize_and_load", seen(read)),
    ):
        yield programs


@contextlib.contextmanager
def profiled(folder) -> Iterator[None]:
    """Write a profile of what runs within into a folder: of devices, and of the host only what launches."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level, options.host_tracer_level = 0, 1 if jax.default_backend() != "cpu" else 2
    with jax.profiler.trace(str(folder), profiler_options=options):
        yield


def find_trace(folder) -> pathlib.Path:
    """Return the newest trace below a folder.

    Raises:
      FileNotFoundError: none; the profiler wrote nothing.
    """
    found = sorted(pathlib.Path(folder).rglob("*.trace.json.gz"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise FileNotFoundError(f"The profiler wrote no *.trace.json.gz below {folder}.")
    return found[-1]


def read_kernels(path) -> list[dict]:
    """Return the events of a trace that occupied a device.

    Each with name, ts and dur; and with the instruction `op` and the operation `path`, which may be "".
    """
    with gzip.open(path) as file:
        events = json.load(file)["traceEvents"]
    labels = {
        (event["name"], event["pid"], event.get("tid")): event["args"]["name"]
        for event in events
        if event.get("ph") == "M" and event["name"] in ("process_name", "thread_name")
    }
    on_gpu = any("/device:GPU" in name for (kind, *_), name in labels.items() if kind == "process_name")

    def runs(event) -> bool:
        if on_gpu:  # streams alone: other lines of a device repeat what they have
            process = labels.get(("process_name", event["pid"], None), "")
            thread = labels.get(("thread_name", event["pid"], event["tid"]), "")
            return "/device:GPU" in process and thread.startswith("Stream")
        return not CONTROL_EVENT.match(event.get("args", {}).get("hlo_op", "while"))

    def kernel(event) -> dict:
        arguments = event.get("args", {})
        found = dict(name=event["name"], ts=event["ts"], dur=event["dur"])
        return found | dict(op=arguments.get("hlo_op", ""), path=arguments.get("name", ""))

    return [kernel(event) for event in events if event.get("ph") == "X" and runs(event)]


def class_of(names: str) -> str:
    """Return the class of a kernel by all names that are known of it."""
    return next((label for label, words in CLASSES if re.search(words, names, re.IGNORECASE)), OTHER)


def summed(kernels: list[dict], instructions: dict[str, Instruction], steps: int) -> dict:
    """Sum a trace by class and by kernel.

    Args:
      kernels: from `read_kernels`, of `steps` steps.
      instructions: of the programs that ran, from `read_instructions`.
      steps: that the trace is of.

    Returns:
      milliseconds per step from the first kernel's start to the last one's end; by class, the gaps among them,
      milliseconds, calls and GiB per step; and the dearest kernels with their classes.
    """
    by_class, by_kernel = defaultdict(lambda: [0.0, 0, 0.0]), defaultdict(lambda: [0.0, 0, 0.0])
    for kernel in kernels:
        known = instructions.get(_plain(kernel["op"])) or instructions.get(_plain(kernel["name"]))
        made_by = known.names if known else kernel["path"]
        label = class_of(" ".join((kernel["name"], kernel["op"], made_by)))
        for sums in (by_class[label], by_kernel[kernel["name"], made_by, label]):
            sums[0] += kernel["dur"]
            sums[1] += 1
            sums[2] += known.bytes if known else 0.0
    wall = _wall(kernels)
    by_class[GAPS] = [wall - _busy(kernels), 0, 0.0]

    def row(sums) -> dict:
        microseconds, calls, size = sums
        return dict(ms=microseconds / 1e3 / steps, calls=calls / steps, gib=size / GIB / steps)

    dearest = sorted(by_kernel.items(), key=lambda item: -item[1][0])[:SHOWN_KERNELS]
    return dict(
        ms_per_step=wall / 1e3 / steps,
        classes={label: row(sums) for label, sums in sorted(by_class.items(), key=lambda item: -item[1][0])},
        kernels=[
            dict(kernel=name, made_by=made_by, **{"class": label}, **row(sums))
            for (name, made_by, label), sums in dearest
        ],
    )


def _wall(kernels: list[dict]) -> float:
    if not kernels:
        return 0.0
    return max(kernel["ts"] + kernel["dur"] for kernel in kernels) - min(kernel["ts"] for kernel in kernels)


def _busy(kernels: list[dict]) -> float:
    """Return the microseconds in which at least one kernel ran, on whatever stream."""
    busy, until = 0.0, -math.inf
    for kernel in sorted(kernels, key=lambda kernel: kernel["ts"]):
        end = kernel["ts"] + kernel["dur"]
        busy += max(0.0, end - max(until, kernel["ts"]))
        until = max(until, end)
    return busy


def lost(complete: dict, fast: dict, ideal_speedup: float) -> dict[str, float]:
    """Return by class the milliseconds per step that `fast` takes beyond its share of those of `complete`.

    Args:
      complete, fast: from `summed`.
      ideal_speedup: MACs of the one over those of the other.
    """
    of_class = lambda sums, label: sums["classes"].get(label, {}).get("ms", 0.0)
    labels = {*complete["classes"], *fast["classes"]}
    beyond = {label: of_class(fast, label) - of_class(complete, label) / ideal_speedup for label in labels}
    return dict(sorted(beyond.items(), key=lambda item: -item[1]))


# --- The text of a program -----------------------------------------------------------------------


def read_instructions(text: str) -> dict[str, Instruction]:
    """Return what the text of a compiled program says of its instructions, by their names as kernels write them."""
    functions = _functions_of_frames(text)
    sizes, found = {}, {}
    for line in text.splitlines():
        match = INSTRUCTION.match(line)
        if not match:
            continue
        name, made, kind, rest = match.groups()
        operands, _, settings = rest.partition(")")
        sizes[name] = _size_of(made)
        if kind in CONTROL:
            continue
        size = sizes[name] + sum(sizes.get(operand, 0.0) for operand in re.findall(r"%([\w.-]+)", operands))
        operation, frame, source = (re.search(pattern, settings) for pattern in (OPERATION, FRAME, SOURCE))
        names = [operation and operation[1], frame and functions.get(frame[1]), source and source[1]]
        found[_plain(name)] = Instruction(size, " ".join(filter(None, names)))
    return found


def _plain(name: str) -> str:
    """Return an instruction's name as the kernel made of it is called."""
    return re.sub(r"[^\w]", "_", name)


def _size_of(made: str) -> float:
    arrays = re.findall(r"\b([a-z]+\d*)\w*\[([\d,]*)\]", made)
    return sum(BYTES_OF.get(kind, 1) * math.prod(int(n) for n in sides.split(",") if n) for kind, sides in arrays)


def _functions_of_frames(text: str) -> dict[str, str]:
    """Return of each stack frame the innermost function of this package on it."""
    files, functions, locations, frames = (_table(text, title) for title in TABLES)
    number = lambda line, field: (re.search(rf"{field}=(\d+)", line) or ["", ""])[1]

    def innermost(frame: str) -> str:
        location, parent = (number(frames[frame], field) for field in ("file_location_id", "parent_frame_id"))
        place = locations.get(location, "")
        if PACKAGE in files.get(number(place, "file_name_id"), ""):
            return functions.get(number(place, "function_name_id"), "").strip('"').replace(".<locals>", "")
        return innermost(parent) if parent in frames and parent != frame else ""

    return {frame: innermost(frame) for frame in frames}


def _table(text: str, title: str) -> dict[str, str]:
    """Return the lines of one of the tables at the head of a program by their numbers."""
    match = re.search(rf"^{title}\n(.*?)(?:\n\n|\Z)", text, re.MULTILINE | re.DOTALL)
    return dict(re.findall(r"^(\d+) (.*)$", match[1], re.MULTILINE)) if match else {}
