"""Contestants that take turns piece by piece, so that a machine whose speed changes does so for all of them."""

import concurrent.futures
import math
import threading
import time
from collections.abc import Callable


def side_by_side(contestants: dict[str, Callable]) -> tuple[dict, dict]:
    """Run all contestants once; whoever has done the smallest share goes on next, the others wait.

    Args:
      contestants: functions of `report`, which they call with the share of their work done since the last call, where
        nothing of theirs still runs. One that never does runs as a whole.

    Returns:
      Their results, and the seconds of each one's own turns.
    """
    done, seconds = dict.fromkeys(contestants, 0.0), dict.fromkeys(contestants, 0.0)
    changed = threading.Condition()

    def run(name: str):
        began = 0.0

        def wait_for_a_turn():
            nonlocal began
            with changed:
                changed.wait_for(lambda: name == min(done, key=done.get))
            began = time.perf_counter()

        def end_the_turn(share: float):
            seconds[name] += time.perf_counter() - began
            with changed:
                done[name] += share
                changed.notify_all()

        def report(share: float):
            end_the_turn(share)
            wait_for_a_turn()

        wait_for_a_turn()
        try:
            return contestants[name](report)
        finally:
            end_the_turn(math.inf)

    with concurrent.futures.ThreadPoolExecutor(len(contestants)) as pool:
        running = {name: pool.submit(run, name) for name in contestants}
        return {name: future.result() for name, future in running.items()}, seconds
