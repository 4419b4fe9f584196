"""What XLA's TPU compiler says a program costs, without a TPU: two cost models and the memory.

    pip install "jax[tpu]"

    estimated   the compiler's own `estimated_cycles`, summed over the instructions that run. Good for products; for
                elementwise work it does not see bytes, and some instructions that move data carry none: for those the
                bytes over the bandwidth are taken. Kernels carry none either and count as in the schedule.
    scheduled   per instruction the largest of: VLIW bundles of the final schedule times the trips of its loops, issue
                cycles of the busiest matrix unit, bytes to and from HBM over the bandwidth.

Loops count as often as they run, conditionals with the branch that costs least or most, as asked. Neither model is a
measurement: stalls are not seen, asynchronous copies are taken as hidden, what is predicated off is counted, the
latency of small copies is not, and nothing is said about the host or about several chips waiting for each other.

Import this module before JAX starts: it sets the compiler's flags.
"""

import atexit
import dataclasses
import functools
import math
import os
import re
import shutil
import tempfile
from pathlib import Path

_DUMP = Path(tempfile.mkdtemp(prefix="bundles-"))
atexit.register(shutil.rmtree, _DUMP, ignore_errors=True)
for _name, _value in dict(
    JAX_PLATFORMS="cpu",
    TPU_SKIP_MDS_QUERY="1",
    TPU_WORKER_HOSTNAMES="localhost",
    TPU_ACCELERATOR_TYPE="v5litepod-4",
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",
).items():
    os.environ.setdefault(_name, _value)
os.environ["LIBTPU_INIT_ARGS"] = (
    f"{os.environ.get('LIBTPU_INIT_ARGS', '')} --xla_jf_dump_to={_DUMP} --xla_jf_dump_llo_text=true"
    " --xla_jf_dump_llo_pass_label_regex=.*(final_bundles|dedup).*"
)

import jax  # noqa: E402  after the flags

jax.config.update("jax_enable_compilation_cache", False)  # a program that is not compiled leaves no bundles
import numpy as np  # noqa: E402
from jax.experimental import topologies  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Chip:
    """A TPU core: its smallest topology, dense bfloat16 FLOPs and matmul issue cycles, clock in Hz, HBM bytes/s."""

    topology: str
    flops_per_cycle: int
    matmul_cycles: int
    clock: float
    bandwidth: float

    @property
    def bytes_per_cycle(self) -> float:
        """Bytes to or from HBM in one cycle."""
        return self.bandwidth / self.clock


CHIPS = {
    "v5e": Chip("v5e:2x2", 131072, 16, 1.503e9, 819e9),
    "v6e": Chip("v6e:2x2", 524288, 8, 1.751e9, 1640e9),
    "v5p": Chip("v5p:2x2x1", 262144, 16, 1.751e9, 2765e9),
}


@dataclasses.dataclass(frozen=True)
class Cost:
    """Cycles by both models, bytes of temporaries, and (estimated, scheduled, instruction) of every instruction."""

    estimated: float
    scheduled: float
    temporary_bytes: int
    instructions: tuple
    text: str


@functools.cache
def devices(topology: str) -> tuple:
    """Return the devices of a topology that need not exist."""
    return tuple(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)


def compile_and_cost(function, *arguments, chip: str, branch: str = "least") -> Cost:
    """Compile for one core and add up.

    Args:
      function: to be compiled.
      arguments: trees of `jax.ShapeDtypeStruct`.
      chip: a key of `CHIPS`.
      branch: of a conditional, "least" or "most": the one that costs least or most.
    """
    sharding = jax.sharding.SingleDeviceSharding(devices(CHIPS[chip].topology)[0])
    place = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    _clear_dump()
    compiled = jax.jit(function).lower(*jax.tree.map(place, arguments)).compile()
    text = compiled.as_text()
    program = _Program(text, _read_bundles(CHIPS[chip].matmul_cycles), CHIPS[chip].bytes_per_cycle, branch)
    estimated, scheduled, instructions = program.cost(program.entry)
    memory = compiled.memory_analysis()
    return Cost(estimated, scheduled, memory.temp_size_in_bytes, tuple(instructions), text)


# --- The final schedule --------------------------------------------------------------------------


def _clear_dump() -> None:
    for path in _DUMP.iterdir():
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()


def _read_bundles(matmul_cycles: int) -> dict[str, tuple[float, float]]:
    """Return per instruction the bundles and the cycles of the busiest matrix unit."""
    found, same = {}, {}
    for path in _DUMP.glob("*final_bundles.txt"):
        if "schedule-analysis" not in path.name:
            name = re.sub(r"-\d+-final_bundles\.txt$", "", re.sub(r"^\d+-", "", path.name))
            found[name] = _Bundles(path.read_text(), matmul_cycles).total()
    for path in _DUMP.glob("*dedup*"):  # instructions that share another's code
        owner = None
        for line in path.read_text().splitlines():
            if line.startswith("key:"):
                owner = line[4:].strip()
            elif line.startswith("  ") and owner:
                same[line.strip()] = owner
    return {name: found[owner] for name, owner in same.items() if owner in found} | found


class _Bundles:
    """The VLIW bundles of one instruction, loops marked by their depth."""

    HEAD = re.compile(r"^\s*(?:0x)?[0-9a-f]+\s*(LB|PB|PF|LE|LH|CT|)\s*:\s*((?:> ?)*)\{")
    TRIPS = re.compile(r"scmp\.\w+\.[us]32\.totalorder %(\w+), (\d+) /\* loop exit test")
    MATMUL = re.compile(r"vmatmul\.([\w\.]*?)\.?(mxu\d)")

    def __init__(self, text: str, matmul_cycles: int):
        self.matmul_cycles = matmul_cycles
        self.bundles = []  # [depth, whether a loop begins, text]
        for line in text.splitlines():
            head = self.HEAD.match(line)
            if head:
                depth = head.group(2).count(">")
                if depth == 0 and self.bundles and re.search(r":\s+\{\}", line):
                    depth = self.bundles[-1][0]  # empty bundles carry no mark of depth
                self.bundles.append([depth, head.group(1) == "LB", line])
            elif self.bundles:
                self.bundles[-1][2] += line

    def total(self) -> tuple[float, float]:
        bundles, units = self._span(0, len(self.bundles), 0)
        return bundles, max(units.values(), default=0)

    def _span(self, first: int, last: int, depth: int) -> tuple[float, dict]:
        count, units, at = 0, {}, first
        while at < last:
            if self.bundles[at][0] <= depth:
                count += 1
                for kind, unit in self.MATMUL.findall(self.bundles[at][2]):
                    whole = "bf16" in kind and "lmr" not in kind
                    units[unit] = units.get(unit, 0) + self.matmul_cycles * (1 if whole else 0.5)
                at += 1
                continue
            end = at + 1
            while end < last and self.bundles[end][0] > depth and self.bundles[end][:2] != [depth + 1, True]:
                end += 1
            trips = self._trips(at, end, depth + 1)
            inner, inner_units = self._span(at, end, depth + 1)
            count += trips * inner
            for unit, cycles in inner_units.items():
                units[unit] = units.get(unit, 0) + trips * cycles
            at = end
        return count, units

    def _trips(self, first: int, last: int, depth: int) -> int:
        body = "".join(text for at, _, text in self.bundles[first:last] if at == depth)
        tests = self.TRIPS.findall(body)
        if not tests:
            return 1
        following, rounds = tests[-1][0], int(tests[-1][1])
        number = re.search(rf"%(\w+) = sphi %\w+, %{following}\b", body)
        return self._working_rounds(body, number.group(1), rounds) if number else rounds

    def _working_rounds(self, body: str, number: str, rounds: int) -> int:
        """Count the rounds of a software pipeline whose work is not jumped over.

        The first only fetch, the last may only write back. The jump is taken unless the round's number is at least one
        bound and less than another; where nothing is written back, if it is less than one.
        """
        compared = re.findall(rf"%(\w+) = scmp\.(ge|lt)\.s32\.totalorder %{number}, (\d+)(?! /\* loop exit)", body)
        bounds = {name: (kind, int(bound)) for name, kind, bound in compared}
        for first, second in re.findall(r"= pnand %(\w+), %(\w+)", body):
            found = dict(bounds[name] for name in (first, second) if name in bounds)
            if len(found) == 2:
                return found["lt"] - found["ge"]
        jumps = re.findall(r"= sbr\.rel \(%(\w+)\)", body)
        skipped = [bounds[name][1] for name in jumps if name in bounds and bounds[name][0] == "lt"]
        return rounds - max(skipped, default=0)


# --- The compiled program ------------------------------------------------------------------------

BYTES = dict(bf16=2, f32=4, s32=4, u32=4, pred=1, s8=1, u8=1, f16=2, s64=8, u64=8, f64=8, u16=2, s16=2)
ARRAY = re.compile(rf"\b({'|'.join(BYTES)})\[([\d,]*)\](?:\{{([^}}]*)\}})?")
# Free, or asynchronous and taken as hidden.
FREE = re.compile(
    r"(parameter|constant|bitcast|get-tuple-element|tuple|iota|broadcast|after-all|opt-barrier|domain|add-dependency"
    r"|get-dimension-size|partition-id|replica-id|(copy|slice|async|dynamic-slice|dynamic-update-slice)-(start|done)"
    r"|async-update)$"
)
FREE_CALLS = (
    "ConcatBitcast",
    "AllocateBuffer",
    "AssumeGatherIndicesInBound",
    "SliceBitcast",
    "Sharding",
    "GatherBuffer",
)


def _array_bytes(types: str, trips: int = 0) -> int:
    """Return the bytes of all arrays of an HLO type that lie in HBM, padded to the tiles of their layout.

    An operand stacked over the trips of a loop is read one slice at a time.
    """
    total = 0
    for kind, sizes, layout in ARRAY.findall(types):
        if "S(" in layout:  # in on-chip memory
            continue
        shape = [int(size) for size in sizes.split(",") if size]
        order = [int(axis) for axis in layout.split(":")[0].split(",") if axis.strip().isdigit()]
        if len(shape) >= 2:
            minor, second = order[:2] if len(order) == len(shape) else (len(shape) - 1, len(shape) - 2)
            shape[minor], shape[second] = -(-shape[minor] // 128) * 128, -(-shape[second] // 8) * 8
            if trips > 1 and shape[0] == trips:
                shape[0] = 1
        total += BYTES[kind] * math.prod(shape)
    return total


class _Program:
    """An HLO module: its computations as lists of (name, type, operation, rest of the line)."""

    def __init__(self, text: str, bundles: dict, bytes_per_cycle: float, branch: str):
        self.bundles, self.bytes_per_cycle = bundles, bytes_per_cycle
        self.choose = {"least": min, "most": max}[branch]
        self.computations, self.entry, self.costs = {}, None, {}
        current = None
        for line in text.splitlines():
            head = re.match(r"^(ENTRY )?%?([\w\.\-]+) \(.*\{\s*$", line)
            if head:
                current = self.computations.setdefault(head.group(2), [])
                self.entry = head.group(2) if head.group(1) else self.entry
            elif line.startswith("}"):
                current = None
            elif current is not None and (found := re.match(r"^\s+(?:ROOT )?%?([\w\.\-]+) = (.*)$", line)):
                current.append((found.group(1), *_split_type(found.group(2))))
        self.types = {name: {row[0]: row[1] for row in rows} for name, rows in self.computations.items()}

    def cost(self, computation: str, trips: int = 0) -> tuple[float, float, list]:
        """Return the estimated and the scheduled cycles of one run of a computation, and its instructions."""
        if computation in self.costs:
            return self.costs[computation]
        estimated, scheduled, rows = 0.0, 0.0, []

        def add(part, times=1):
            nonlocal estimated, scheduled
            estimated += times * part[0]
            scheduled += times * part[1]
            rows.extend((times * a, times * b, text) for a, b, text in part[2])

        for name, types, operation, rest in self.computations[computation]:
            if operation == "while":
                condition, body = (re.search(rf"{part}=%?([\w\.\-]+)", rest).group(1) for part in ("condition", "body"))
                count = self._trip_count(condition, rest)
                add(self.cost(body, count), count)
            elif operation == "conditional":
                branches = [self.cost(called, trips) for called in self._branches(rest)]
                add(self.choose(branches, key=lambda part: part[1]))
            elif operation == "call":
                add(self.cost(re.search(r"to_apply=%?([\w\.\-]+)", rest).group(1)))
            elif not (FREE.match(operation) or (operation == "custom-call" and any(c in rest for c in FREE_CALLS))):
                add(self._instruction(computation, name, types, operation, rest, trips))
        self.costs[computation] = estimated, scheduled, rows
        return self.costs[computation]

    def _instruction(self, computation, name, types, operation, rest, trips):
        moving = self._moved_bytes(computation, types, rest, trips) / self.bytes_per_cycle
        match = re.search(r'"estimated_cycles":"?(\d+)', rest)
        scheduled = max(moving, *self.bundles.get(name, (0,)))
        estimated = float(match.group(1)) if match else scheduled if "tpu_custom_call" in rest else moving
        where = re.search(r'op_name="([^"]*)"', rest)
        return estimated, scheduled, [(estimated, scheduled, f"{operation} {name} {types} {where and where.group(1)}")]

    def _trip_count(self, condition: str, rest: str) -> int:
        match = re.search(r'known_trip_count":\{"n":"(\d+)"', rest)
        if match:
            return int(match.group(1))
        # The TPU compiler drops the count: a scan counts from 0 to the largest constant of its condition.
        rows = list(self.computations[condition])
        for _, _, _, called in self.computations[condition]:
            if inner := re.search(r"calls=%?([\w\.\-]+)", called):
                rows += self.computations[inner.group(1)]
        return max((int(n) for *_, text in rows for n in re.findall(r"constant\((\d+)\)", text)), default=1)

    @staticmethod
    def _branches(rest: str) -> list[str]:
        if listed := re.search(r"branch_computations=\{([^}]*)\}", rest):
            return [name.strip().lstrip("%") for name in listed.group(1).split(",")]
        return [re.search(rf"{which}_computation=%?([\w\.\-]+)", rest).group(1) for which in ("true", "false")]

    def _moved_bytes(self, computation: str, types: str, rest: str, trips: int) -> float:
        """Return the bytes between HBM and the core; of operands that are only sliced inside, the slices."""
        total = _array_bytes(types, trips)
        called = re.search(r"calls=%?([\w\.\-]+)", rest)
        rows = self.computations.get(called.group(1), []) if called else []
        sliced = _sliced_operands(rows)
        if rows and rows[-1][2] == "dynamic-update-slice":  # written in place
            update = re.findall(r"%([\w\.\-]+)", rows[-1][3])[1]
            total = min(total, _array_bytes({row[0]: row[1] for row in rows}.get(update, "")))
        operands = re.match(r"[\w\-]+\(([^)]*)\)", rest)
        for index, operand in enumerate(operands.group(1).split(",") if operands else []):
            name = re.sub(r"/\*.*?\*/", "", operand).strip().split(" ")[-1].lstrip("%")
            whole = _array_bytes(self.types[computation].get(name, ""), trips)
            total += min(whole, sliced.get(index, whole))
        return total


def _split_type(text: str) -> tuple[str, str, str]:
    """Split 'TYPE operation(operands), attributes' into the type, the operation, and all but the type."""
    end = text.index(" ")
    if text[0] == "(":
        depth = np.cumsum([(char == "(") - (char == ")") for char in text])
        end = int(np.flatnonzero(depth == 0)[0]) + 1
    rest = text[end:].strip()
    return text[:end], re.match(r"[\w\-]*", rest).group(0), rest


def _sliced_operands(rows) -> dict[int, int]:
    """Return, for operands of a fusion that it only slices or updates in place, the bytes that it reads."""
    numbers = {
        name: int(re.match(r"parameter\((\d+)", rest).group(1)) for name, _, op, rest in rows if op == "parameter"
    }
    uses = {}
    for _, types, operation, rest in rows:
        for name in set(re.findall(r"%([\w\.\-]+)", rest.split("), ")[0])) & numbers.keys():
            uses.setdefault(name, []).append((operation, types))
    read = {}
    for name, users in uses.items():
        if all(operation in ("dynamic-slice", "gather", "slice") for operation, _ in users):
            read[numbers[name]] = sum(_array_bytes(types) for _, types in users)
        elif all(operation == "dynamic-update-slice" for operation, _ in users):
            read[numbers[name]] = 0
    return read
