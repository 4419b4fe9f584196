"""The text of a compiled program: what is launched, how often, what it reads, writes and multiplies.

A launch is an instruction that runs by itself: a call of a library, a kernel, a fusion or a copy. Loops count as often
as they run, of a conditional the branch with the most bytes. Bytes are those of operands and results: of an operand
that is only sliced the slices, of a result that is written in place what is written, and of rows that are packed as
many as are written. Whether something stays in a cache is not seen.
"""

import collections
import dataclasses
import math
import re

BYTES_OF = dict(pred=1, s4=0.5, u4=0.5, s8=1, u8=1, s16=2, u16=2, bf16=2, f16=2, s32=4, u32=4, f32=4)
BYTES_OF |= dict(s64=8, u64=8, f64=8, c64=8, c128=16)
INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.-]+) = (\([^()]*\)|\S+) ([\w-]+)\((.*)$")
COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{\s*$")
FREE = re.compile(
    r"(parameter|constant|bitcast|get-tuple-element|tuple|iota|after-all|opt-barrier|domain|add-dependency|partition-id"
    r"|replica-id|\w+(-\w+)*-done)$"
)
TARGET = re.compile(r'custom_call_target="([^"]*)"')
# What a launch is, by the first pattern that fits its operation and the library that it calls.
KINDS = (
    ("product", r"cublas|gemm|\bdot\b|convolution"),
    ("attention", r"fmha|attention"),
    ("kernel", r"triton"),
    ("fusion", r"fusion"),
    ("copy", r"copy|transpose|memset|memcpy"),
)
OTHER = "other"
PACKING = re.compile(r"jit\(pack\)/pallas_call")


@dataclasses.dataclass(frozen=True)
class Launch:
    """What runs by itself.

    Attributes:
      name: of the instruction, with what made it.
      kind: one of `KINDS`, or `OTHER`.
      times: how often it runs.
      bytes: that it reads and writes, each time.
      flops: of the products and the attention of libraries, each time; not those of kernels and fusions.
      product: rows, columns and depth of a plain product, else None.
    """

    name: str
    kind: str
    times: int
    bytes: float
    flops: float
    product: tuple[int, int, int] | None = None


def read_launches(text: str) -> list[Launch]:
    """Return what a compiled program launches, in no order that matters."""
    return _Program(text).launches()


def count(launches: list[Launch]) -> dict:
    """Return the launches of each kind, and all bytes and FLOPs."""
    kinds = collections.Counter()
    for launch in launches:
        kinds[launch.kind] += launch.times
    total = lambda field: sum(launch.times * getattr(launch, field) for launch in launches)
    return dict(launches=kinds.total(), **dict(sorted(kinds.items())), bytes=total("bytes"), flops=total("flops"))


def split_by_steps(text: str, steps: int) -> tuple[list[Launch], list[Launch]]:
    """Return what a program with a loop of so many steps launches in each of them, and what once."""
    launches = read_launches(text)
    of_step = [dataclasses.replace(each, times=each.times // steps) for each in launches if each.times >= steps]
    return of_step, [each for each in launches if each.times < steps]


def floor_seconds(launches: list[Launch], bandwidth: float, peak_flops: float) -> float:
    """Return the sum of what each launch takes at least, at so many bytes and FLOPs per second."""
    return sum(each.times * max(each.bytes / bandwidth, each.flops / peak_flops) for each in launches)


def size_of(types: str) -> float:
    """Return the bytes of all arrays of a type."""
    return sum(BYTES_OF.get(kind, 1) * math.prod(sides) for kind, sides in _arrays(types))


def _arrays(types: str) -> list[tuple[str, tuple[int, ...]]]:
    found = re.findall(r"\b([a-z]+\d*)\w*\[([\d,]*)\]", types)
    return [(kind, tuple(int(side) for side in sides.split(",") if side)) for kind, sides in found]


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    types: str
    operation: str
    operands: tuple[str, ...]
    settings: str  # all behind the operands

    def called(self, role: str) -> str | None:
        """Return the computation that it calls as its `role`: "body", "calls", ..."""
        found = re.search(rf"\b{role}=%?([\w.-]+)", self.settings)
        return found and found[1]


class _Program:
    """A module: its computations as lists of instructions."""

    def __init__(self, text: str):
        self.computations, self.entry, current = {}, None, None
        for line in text.splitlines():
            line = re.sub(r"/\*.*?\*/", "", line)
            if head := COMPUTATION.match(line):
                current = self.computations.setdefault(head[2], [])
                self.entry = head[2] if head[1] else self.entry
            elif line.startswith("}"):
                current = None
            elif current is not None and (found := INSTRUCTION.match(line)):
                name, types, operation, rest = found.groups()
                operands, _, settings = rest.partition(")")
                # A parameter has its number there.
                names = (operands,) if operation == "parameter" else tuple(re.findall(r"%([\w.-]+)", operands))
                current.append(_Instruction(name, types, operation, names, settings))

    def launches(self) -> list[Launch]:
        return self._of(self.entry, 1)

    def _of(self, computation: str, times: int) -> list[Launch]:
        types = {instruction.name: instruction.types for instruction in self.computations[computation]}
        found = []
        for instruction in self.computations[computation]:
            if instruction.operation == "while":
                trips = re.search(r'known_trip_count":\{"n":"(\d+)"', instruction.settings)
                found += self._of(instruction.called("body"), times * (int(trips[1]) if trips else 1))
            elif instruction.operation == "conditional":
                listed = re.search(r"branch_computations=\{([^}]*)\}", instruction.settings)
                names = (
                    listed[1].replace("%", "").split(", ")
                    if listed
                    else map(instruction.called, ("true_computation", "false_computation"))
                )
                found += max((self._of(name, times) for name in names), key=lambda branch: count(branch)["bytes"])
            elif instruction.operation == "call":
                found += self._of(instruction.called("to_apply"), times)
            elif not FREE.match(instruction.operation):
                found.append(self._launch(instruction, types, times))
        return found

    def _launch(self, instruction: _Instruction, types: dict, times: int) -> Launch:
        target = TARGET.search(instruction.settings)
        described = f"{instruction.operation} {target[1] if target else ''}"
        kind = next((kind for kind, pattern in KINDS if re.search(pattern, described)), OTHER)
        operands = [types.get(name, "") for name in instruction.operands]
        made = re.search(r'op_name="([^"]*)"', instruction.settings)
        name = f"{instruction.name} {made[1] if made else ''}"
        product = _product(instruction, operands) if kind == "product" else None
        flops = 2.0 * math.prod(product) if product else _attention_flops(operands) if kind == "attention" else 0.0
        return Launch(name, kind, times, self._moved(instruction, operands, kind, name), flops, product)

    def _moved(self, instruction: _Instruction, operands: list[str], kind: str, name: str) -> float:
        result = instruction.types
        if kind in ("product", "attention"):  # what else a library returns is a place to work in
            result = re.sub(r"\b[su]8\[\d*\]", "", result)
        reads, written = list(map(size_of, operands)), size_of(result)
        if called := instruction.called("calls"):
            within = self.computations.get(called, [])
            sliced = _sliced(within)
            reads = [min(read, sliced.get(number, read)) for number, read in enumerate(reads)]
            if within and within[-1].operation == "dynamic-update-slice":
                inner = {row.name: row.types for row in within}
                written = size_of(inner.get(within[-1].operands[1], ""))
        if PACKING.search(name):  # of the tokens only the open ones are read: what is written, in another dtype
            rows = max(sides[0] for _, sides in _arrays(result) if len(sides) == 2)
            [(token_kind, (_, width))] = _arrays(operands[0])
            reads[0] = min(reads[0], BYTES_OF[token_kind] * rows * width)
        return sum(reads) + written


def _product(instruction: _Instruction, operands: list[str]) -> tuple[int, int, int]:
    """Return rows, columns and depth of a product; those of a batch of products as more rows."""
    (_, left), (_, result) = _arrays(operands[0])[0], _arrays(instruction.types)[0]
    contracted = re.search(r'lhs_contracting_dim(?:ension)?s"?[=:]\s*[{\[]([^}\]]*)[}\]]', instruction.settings)
    depth = math.prod(left[int(axis)] for axis in re.findall(r"\d+", contracted[1]))
    return math.prod(result[:-1]), result[-1], depth


def _attention_flops(operands: list[str]) -> float:
    """Return the FLOPs of the two products of attention over queries and keys [B,N,H,K]."""
    (_, (batch, tokens, heads, size)), (_, (_, keys, *_)) = (_arrays(operand)[0] for operand in operands[:2])
    return 4.0 * batch * heads * tokens * keys * size


def _sliced(within: list[_Instruction]) -> dict[int, float]:
    """Return, of operands that a fusion only slices or updates in place, the bytes that it reads."""
    numbers = {row.name: int(row.operands[0]) for row in within if row.operation == "parameter"}
    uses = collections.defaultdict(list)
    for row in within:
        for position, name in enumerate(row.operands):
            if name in numbers and row.operation != "parameter":
                uses[name].append((row.operation, position, row.types))
    read = {}
    for name, users in uses.items():
        if all(operation in ("dynamic-slice", "gather", "slice") for operation, *_ in users):
            read[numbers[name]] = sum(size_of(types) for *_, types in users)
        elif all(operation == "dynamic-update-slice" and position == 0 for operation, position, _ in users):
            read[numbers[name]] = 0.0
    return read
