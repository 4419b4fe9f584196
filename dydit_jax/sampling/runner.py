"""Running the programs of a schedule one after the other, with compilation and overflow out of the way.

Three steps: *launch* a segment, *commit* its result once it is known that all open tokens had a row, and otherwise
*redo* it densely. Overflow is known only when a segment finishes. Then its result, and any segment already launched
from it, is discarded and the segment is run again with all rows. A check within the program would make a GPU's host
wait at every step, and bring the dense computation into every program.
"""

import collections
import dataclasses
import itertools
from collections.abc import Callable

import jax
import numpy as np

from dydit_jax.diffusion.solvers import SolverTable
from dydit_jax.fast.narrow import NarrowedBlocks
from dydit_jax.runtime.aot import CompileRequest, compiled_ahead, describe_call, shape_of
from dydit_jax.runtime.processes import to_host
from dydit_jax.runtime.progress import result_of
from dydit_jax.sampling.segment import SegmentProgram, SegmentSettings, StepRecord, run_segment, segment_inputs


@dataclasses.dataclass(frozen=True)
class Committed:
    """A segment whose result stands.

    Attributes:
      program: that was run first.
      record: of its steps [passes,steps,...].
      redone: whether its result was void, and all of its steps were run again with all rows.
    """

    program: SegmentProgram
    record: StepRecord
    redone: bool


@dataclasses.dataclass(frozen=True)
class SegmentRunner:
    """What the segments of a run share.

    Attributes:
      blocks: the weights, narrowed for one segment after the other.
      arrays: `params`, `labels`, `keys` and `counted` of `SegmentInputs`.
      table: of all steps.
      settings: of which each program replaces the executions and the evaluations.
      densely: from a program to programs for the same steps in which every token has a row.
      report: called with the number of steps done since its last call, or None.
    """

    blocks: NarrowedBlocks
    arrays: dict
    table: SolverTable
    settings: SegmentSettings
    densely: Callable[[SegmentProgram], list[SegmentProgram]]
    report: Callable[[int], None] | None

    def run(self, programs: list[SegmentProgram], state) -> tuple:
        """Run programs of consecutive segments.

        Args:
          programs: in their order.
          state: of the sampler, before the first.

        Returns:
          The state after the last, and a `Committed` for each program.
        """
        # An accelerator runs one segment while the host launches the next. A CPU would gain nothing by it, and hold
        # the weights of both.
        ahead = 0 if self.settings.model.platform == "cpu" else 1
        executables, launched, committed = [], collections.deque(), []
        with compiled_ahead(self._calls(programs, state)) as compiled:
            executables.append(next(compiled))
            while len(committed) < len(programs):
                following = len(committed) + len(launched)
                if following < len(programs) and len(launched) <= ahead:
                    before, (state, record) = state, self._launch(programs[following], executables[following], state)
                    launched.append((before, record))
                    executables.extend(itertools.islice(compiled, 1))
                    continue
                program = programs[len(committed)]
                before, record = launched.popleft()
                record = to_host(record)
                redone = program.is_void(record.needed, tokens=self.settings.model.config.tokens)
                if redone:
                    launched.clear()
                    state, record = self._redo(program, before)
                committed.append(Committed(program, record, redone))
                if self.report is not None:
                    self.report(len(program.segment))
        return state, committed

    def _launch(self, program: SegmentProgram, executable, state) -> tuple:
        """Start a program on a state; returns the new state and the record, which are there when it is done."""
        blocks = self.blocks.narrow_to(*program.segment.kept)  # the first while its program is compiled
        inputs = segment_inputs(program, table=self.table, blocks=blocks, state=state, **self.arrays)
        return result_of(executable)(inputs)

    def _redo(self, program: SegmentProgram, state) -> tuple:
        """Run the steps of a program with all rows; returns the state after them and their record."""
        programs, records = self.densely(program), []
        with compiled_ahead(self._calls(programs, state)) as compiled:
            for dense, executable in zip(programs, compiled):
                state, record = self._launch(dense, executable, state)
                records.append(to_host(record))
        return state, jax.tree.map(lambda *parts: np.concatenate(parts, axis=1), *records)

    def _calls(self, programs: list[SegmentProgram], state):
        """Describe the calls of programs, for compiling them."""
        shapes = jax.tree.map(shape_of, dict(self.arrays, state=state))
        return (self._call(program, shapes) for program in programs)

    def _call(self, program: SegmentProgram, shapes: dict) -> CompileRequest:
        blocks = self.blocks.shapes(*program.segment.kept)
        inputs = segment_inputs(program, table=self.table, blocks=blocks, **shapes)
        own = dict(executions=program.executions, evaluations=program.segment.evaluations)
        settings = dataclasses.replace(self.settings, **own)
        code = (*settings.model.routers.classes, *map(type, program.executions))
        return describe_call(run_segment, (inputs,), dict(settings=settings), code=code)
