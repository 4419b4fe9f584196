"""One for all: whatever ends a process ends the others, with its reason or its name."""

import contextlib
import logging
import queue
import signal
import socket
import threading
import time
import types

import jax
import pytest

from dydit_jax.errors import InputError, StopError
from dydit_jax.runtime import peers, processes
from dydit_jax.runtime.processes import PreemptionNotice

PATIENCE_SECONDS = 20.0


@pytest.fixture
def ends(monkeypatch) -> queue.Queue:
    """Get the exit codes of the processes that end; each of them is a few threads here."""
    codes = queue.Queue()

    def leave(code):
        codes.put(code)
        if threading.current_thread() is threading.main_thread():
            raise SystemExit(code)
        threading.Event().wait()  # a process that has ended does nothing more

    monkeypatch.setattr(peers, "os", types.SimpleNamespace(_exit=leave))
    monkeypatch.setattr(peers, "GRACE_SECONDS", 0.0)
    return codes


def listening(count: int = 1) -> tuple[list[peers.Line], dict]:
    """Make the ends of a line between so many processes; return them and where process 0 is found."""
    lines = [peers.Line() for _ in range(count)]
    place = dict(lines[0].listen(["localhost"]), hosts=["localhost"])
    for number, line in enumerate(lines[1:], 1):
        line.connect(number, place)
    return lines, place


def knock(place: dict, words: str) -> socket.socket:
    """Connect as a process would, or a stranger."""
    peer = socket.create_connection(("localhost", place["port"]), timeout=PATIENCE_SECONDS)
    peer.sendall(f"{words}\n".encode())
    return peer


def test_last_words_of_one_process_end_all_with_its_message_and_code(ends, caplog):
    lines, _ = listening(3)
    threading.Thread(target=lines[2].end, args=("Process 2: the disk is full.", 7), daemon=True).start()
    assert [ends.get(timeout=PATIENCE_SECONDS) for _ in lines] == [7, 7, 7]
    assert [record.message for record in caplog.records] == ["Process 2: the disk is full."] * 3


@pytest.mark.parametrize("silent", [False, True])
def test_lost_process_is_named_with_the_newest_checkpoint(ends, caplog, monkeypatch, silent):
    monkeypatch.setattr(peers, "SILENT_SECONDS", 0.2 if silent else PATIENCE_SECONDS)
    [line], place = listening()
    with line.one_for_all(0, lambda: "The newest whole checkpoint is of step 5."):
        peer = knock(place, f"{place['token']} 3")
        assert peer.recv(100).decode().strip() == place["token"]
        if not silent:
            peer.close()
        assert ends.get(timeout=PATIENCE_SECONDS) == peers.RESTART_CODE
    [said] = [record.message for record in caplog.records]
    assert said.startswith("Process 3 has not been heard" if silent else "Process 3 has ended without a word")
    assert said.endswith("The newest whole checkpoint is of step 5.")


def test_process_that_says_goodbye_may_go(ends):
    _, place = listening()
    peer = knock(place, f"{place['token']} 1")
    peer.sendall(b"\n\ngoodbye\n")
    peer.close()
    with pytest.raises(queue.Empty):
        ends.get(timeout=0.3)


@pytest.mark.parametrize(
    "words", ["GET / HTTP/1.1", "0" * 32 + " 1", '["Process 1: ended by a stranger", 0]', "x" * 20_000]
)
def test_strangers_are_left_outside(ends, words):
    _, place = listening(2)
    with knock(place, words) as stranger, contextlib.suppress(ConnectionResetError):
        assert stranger.recv(100) == b""
    with pytest.raises(queue.Empty):
        ends.get(timeout=0.1)


def test_process_that_finds_nobody_says_so(caplog):
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    peers.Line().connect(1, dict(hosts=["localhost"], port=port, token="x"))
    assert "Process 1 can't reach process 0" in caplog.text


@pytest.mark.parametrize(
    "error, code, said",
    [
        (InputError("No such folder."), 2, "Process 1: No such folder."),
        (StopError("Stopped.", 75), 75, "Process 1: Stopped."),
        (StopError("Too many bad batches."), 1, "Process 1: Too many bad batches."),
        (KeyboardInterrupt(), 130, "Process 1: Stopped by Ctrl-C. Newest: 5."),
        (OSError(28, "No space left on device"), 1, "Process 1: [Errno 28] No space left on device. Newest: 5."),
        (RuntimeError("out of\npatience"), 1, "Process 1: RuntimeError: out of patience. Newest: 5."),
    ],
)
def test_errors_end_with_their_own_code_in_one_line(ends, caplog, error, code, said):
    with pytest.raises(SystemExit), peers.Line().one_for_all(1, lambda: "Newest: 5."):
        raise error
    assert ends.get_nowait() == code
    assert caplog.records[-1].message == said and caplog.records[-1].levelno == logging.ERROR


def test_checkpoint_that_can_not_be_found_out_keeps_no_process_from_ending(ends, caplog):
    def newest():
        raise OSError("stale file handle")

    with pytest.raises(SystemExit), peers.Line().one_for_all(0, newest):
        raise KeyboardInterrupt
    assert caplog.records[-1].message == "Process 0: Stopped by Ctrl-C."


def test_process_that_waits_for_others_in_vain_says_so(monkeypatch, caplog):
    ended = queue.Queue()
    waiting = threading.Event()

    def leave(code):
        ended.put(code)
        waiting.set()

    monkeypatch.setattr(processes, "os", types.SimpleNamespace(_exit=leave, environ={}))
    monkeypatch.setattr(processes, "START_SECONDS", 0.05)
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **__: waiting.wait(PATIENCE_SECONDS))
    with processes.joined_processes("localhost:1", 2, 0):
        assert ended.get_nowait() == 2
    assert "did not come together: not all were there after" in caplog.text


def test_interrupt_of_one_of_several_processes_is_a_notice_to_all(monkeypatch):
    """JAX's own service hears SIGTERM and makes all agree on a step; Ctrl-C goes the same way, once."""
    heard = []
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append("SIGTERM"))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    try:
        with pytest.raises(KeyboardInterrupt), PreemptionNotice():
            signal.raise_signal(signal.SIGINT)
            time.sleep(0)  # signals are handled between two instructions
            assert heard == ["SIGTERM"]
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == ["SIGTERM"]
