"""The file of `gpu.py` and its clock: rows that are kept as soon as they are there, and seconds that are shared out.

    environment   hardware, date, commit, versions
    parts         by letter: title, state, seconds, and rows by name

A row is a mapping. `finished` says that nothing is missing in it, `not_measured` what this machine lacks for it, and
`failed` what broke. A part that is started again measures only what is not finished.
"""

import contextlib
import sys
import time
import traceback
from collections.abc import Callable, Iterator

from dydit_jax.errors import InputError
from dydit_jax.runtime.files import read_json, write_json

FINISHED, INCOMPLETE, FAILED = "finished", "incomplete", "failed"  # states of a part
UNDER_WAY, NO_TIME = "under way", "no time was left"
SAME = ("device", "commit", "versions", "xla_flags", "dry")  # of a run and of the one that it continues
LEAST_SECONDS = 10  # less than this is not worth starting a process for
LONGEST_REASON = 300
MEMORY_WORDS = ("RESOURCE_EXHAUSTED", "out of memory", "Out of memory")


class Results:
    """A file of results, written whole at every change."""

    def __init__(self, path):
        self._path = path

    def read(self) -> dict:
        """Return what the file holds.

        Raises:
          InputError: a damaged file.
        """
        try:
            return read_json(self._path, remedy="remove it, or name another --out")
        except InputError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return dict(environment={}, parts={})
            raise

    def begin(self, environment: dict) -> None:
        """Note where this run takes place.

        Raises:
          InputError: a file of another device, commit or version, which must not be mixed with this one.
        """
        content = self.read()
        known = content.get("environment") or environment
        changed = [name for name in SAME if known.get(name) != environment.get(name)]
        if changed:
            raise InputError(
                f"{self._path} holds results made otherwise ({', '.join(changed)} differ); name another --out."
            )
        write_json(self._path, dict(content, environment=environment))

    def part(self, letter: str) -> dict:
        """Return what is known of a part."""
        return self.read()["parts"].get(letter, {})

    def update_part(self, letter: str, **fields) -> None:
        """Set fields of a part."""
        content = self.read()
        content["parts"][letter] = content["parts"].get(letter, {}) | fields
        write_json(self._path, content)


class Session:
    """One part under way.

    Attributes:
      rows: what is known, by name.
    """

    def __init__(self, results: Results, letter: str, deadline: float, clock: Callable[[], float]):
        self._results, self._letter, self._deadline, self._clock = results, letter, deadline, clock
        self.rows = {
            name: {key: value for key, value in row.items() if key not in ("not_measured", "failed")}
            for name, row in results.part(letter).get("rows", {}).items()
        }

    @property
    def left(self) -> float:
        """Seconds until this part must end."""
        return self._deadline - self._clock()

    def write(self, name: str, row: dict) -> None:
        """Keep a row as it is now."""
        self.rows[name] = row
        self._results.update_part(self._letter, rows=self.rows)

    def measure(self, name: str, function: Callable[..., bool], *arguments) -> None:
        """Fill a row, unless that is done or the time is over. What goes wrong becomes a line of it.

        Args:
          name: of the row.
          function: of the session, the name, the row as far as an earlier run came, and the arguments; it writes the
            row as it grows and returns whether nothing is missing.
        """
        if self.rows.get(name, {}).get("finished"):
            return
        with self.noting(name):
            if self.left <= 0:
                raise InputError(NO_TIME)
            finished = function(self, name, dict(self.rows.get(name, {})), *arguments)
            self.write(name, self.rows[name] | dict(finished=finished))

    @contextlib.contextmanager
    def noting(self, name: str = "all") -> Iterator[None]:
        """Turn an error within into a line of a row."""
        try:
            yield
        except Exception as error:
            lacking, line = _lacking(error), " ".join(str(error).split())[:LONGEST_REASON]
            if lacking is None:
                traceback.print_exc()
            found = (
                dict(failed=f"{type(error).__name__}: {line}") if lacking is None else dict(not_measured=lacking + line)
            )
            self.write(name, self.rows.get(name, {}) | found)

    @property
    def state(self) -> str:
        """What the part has come to."""
        if any("failed" in row for row in self.rows.values()):
            return FAILED
        return FINISHED if self.rows and all(row.get("finished") for row in self.rows.values()) else INCOMPLETE


def _lacking(error: Exception) -> str | None:
    """Return the beginning of a line about what a machine lacks, or None where an error is a fault."""
    if isinstance(error, MemoryError) or any(word in str(error) for word in MEMORY_WORDS):
        return "too little memory: "
    if isinstance(error, ImportError):
        return "a package is missing: "
    return "" if isinstance(error, InputError) else None


class Budget:
    """Seconds that parts share: what one leaves over goes to those after it, and none takes from them."""

    def __init__(self, seconds: float, weights: dict[str, float], clock: Callable[[], float] = time.monotonic):
        self._clock, self._weights = clock, weights
        self._end = clock() + seconds

    def share(self, letter: str, following: list[str]) -> float:
        """Return the seconds that a part may take, 0 where all that is left would not be worth a start.

        Args:
          letter: of the part.
          following: the parts after it.
        """
        left = self._end - self._clock()
        if left < LEAST_SECONDS:
            return 0.0
        return left * self._weights[letter] / sum(self._weights[one] for one in (letter, *following))


def run_parts(titles: dict[str, str], results: Results, budget: Budget, start: Callable) -> list[str]:
    """Run parts one after the other, each within its share.

    Args:
      titles: of the parts by their letters, in their order.
      results: where they stand; what is finished there is not run again.
      budget: of all.
      start: from a letter and seconds to its exit code, or None where it was ended at its deadline.

    Returns:
      Those that failed.
    """
    todo = [letter for letter in titles if results.part(letter).get("state") != FINISHED]
    failed = []
    for number, letter in enumerate(todo):
        share = budget.share(letter, todo[number + 1 :])
        _say(letter, f"{titles[letter]}, at most {share:.0f} s")
        if not share:
            results.update_part(letter, title=titles[letter], state=NO_TIME)
            continue
        began = time.monotonic()
        results.update_part(letter, title=titles[letter], state=UNDER_WAY, share_seconds=share)
        code = start(letter, share)
        seconds = time.monotonic() - began
        if code is None:
            results.update_part(letter, state=f"ended after {seconds:.0f} s, its share")
        elif code:
            state = results.part(letter)["state"]
            results.update_part(letter, state=f"failed, exit code {code}" if state == UNDER_WAY else state)
            failed.append(letter)
        results.update_part(letter, seconds=seconds)
        part = results.part(letter)
        _say(letter, f"{part['state']}, {seconds:.0f} s")
        for name, row in part.get("rows", {}).items():
            for why in ("not_measured", "failed"):
                if why in row:
                    _say(letter, f"{name}: {row[why]}")
    return failed


def _say(letter: str, what: str) -> None:
    sys.stderr.write(f"{letter}: {what}\n")
