"""The line between the processes of one program: where one fails, all end, at once and with the reason.

A collective waits for a process that does not come, for minutes or for ever. So process 0 listens, and every other
process keeps one connection to it. Three things travel there, a line of text each:

* a beat, every `BEAT_SECONDS`;
* last words, the message and exit code of a process that fails: process 0 passes them on, and all end with them;
* a goodbye, from a process that is done.

A connection that closes without last words belongs to a process that was killed; one that is silent for
`SILENT_SECONDS` to a process that was stopped, or to a machine or network that is gone. The others name it and end with
`RESTART_CODE`. They end by `os._exit`: the usual way out waits for the others as well.

JAX's own service stays below as a net, for a line that could not be made: it aborts every process (SIGABRT) 100 s after
one is lost. It does so within milliseconds where that one is process 0, in which it runs; the line is faster.
"""

import contextlib
import hmac
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable

from dydit_jax.errors import InputError, StopError
from dydit_jax.runtime.last_words import ending_of

logger = logging.getLogger(__name__)

RESTART_CODE = 75  # EX_TEMPFAIL of sysexits.h: "try again later"
BEAT_SECONDS = 5.0
SILENT_SECONDS = 60.0
CONNECT_SECONDS = 10.0
GRACE_SECONDS = 5.0  # an error may be what another's death does to a collective: the line then names the dead one
GOODBYE = "goodbye"
MESSAGE_LENGTH = 1000
LINE_LENGTH = 10 * MESSAGE_LENGTH  # in JSON a character may take six
# Nothing is sent to these addresses of documentation: they tell which of its own this machine would use.
FAR_AWAY = ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1"))


class Line:
    """One process's end of the line; make it with `listen` in process 0, with `connect` in the others."""

    def __init__(self):
        self._peers: dict[int, socket.socket] = {}
        self._ending = threading.Lock()
        self._newest = lambda: ""

    def listen(self, hosts: list[str]) -> dict:
        """Wait in the background for the other processes; returns where they find this one, for `connect`.

        Args:
          hosts: names of this machine that others are known to reach it by; its addresses are added.
        """
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        server = socket.create_server(("", 0), family=family, dualstack_ipv6=dual)
        token = secrets.token_hex(16)
        _start(self._accept, server, token)
        _start(self._beat)
        return dict(hosts=list(dict.fromkeys([*hosts, *_own_addresses()])), port=server.getsockname()[1], token=token)

    def connect(self, process: int, place: dict) -> None:
        """Connect process `process` to process 0; where that fails, a warning says what is missing now."""
        for host in place["hosts"]:
            with contextlib.suppress(OSError):
                peer = socket.create_connection((host, place["port"]), timeout=CONNECT_SECONDS)
                reader = peer.makefile(encoding="utf-8", errors="replace")
                peer.sendall(f"{place['token']} {process}\n".encode())
                said = iter(lambda reader=reader: reader.readline(LINE_LENGTH), "")
                if next(filter(str.strip, said), "").strip() == place["token"]:  # not another program at the same port
                    self._peers[0] = peer
                    _start(self._hear, 0, peer, reader)
                    _start(self._beat)
                    return
                peer.close()
        logger.warning(
            "Process %d can't reach process 0 (port %d of %s): where a process fails, the others now learn it from "
            "JAX's own service, after 100 s and without its message.",
            *(process, place["port"], ", ".join(place["hosts"])),
        )

    def _accept(self, server: socket.socket, token: str) -> None:
        while True:
            peer, _ = server.accept()
            _start(self._greet, peer, token)

    def _greet(self, peer: socket.socket, token: str) -> None:
        """Let a process in that knows the token; whoever else knocks is left outside."""
        peer.settimeout(CONNECT_SECONDS)
        with contextlib.suppress(OSError, ValueError):
            reader = peer.makefile(encoding="utf-8", errors="replace")
            shown, process = reader.readline(LINE_LENGTH).split()
            if hmac.compare_digest(shown.encode(), token.encode()):
                self._peers[int(process)] = peer
                peer.sendall(f"{token}\n".encode())
                _start(self._hear, int(process), peer, reader)
                return
        peer.close()

    def _beat(self) -> None:
        while True:
            self._send("")
            time.sleep(BEAT_SECONDS)

    def _send(self, text: str) -> None:
        for peer in list(self._peers.values()):
            with contextlib.suppress(OSError):  # whoever hears it says who is lost
                peer.sendall(f"{text}\n".encode())

    def _hear(self, process: int, peer: socket.socket, reader) -> None:
        """Listen to a process until its goodbye; end this one where the other fails or is lost."""
        peer.settimeout(SILENT_SECONDS)
        how = "has ended without a word: it was killed, or its machine is gone"
        try:
            while line := reader.readline(LINE_LENGTH):
                words = line.strip()
                if words == GOODBYE:
                    return
                if words:
                    self.end(*json.loads(words))
        except TimeoutError:
            how = f"has not been heard for {SILENT_SECONDS:.0f} s: it was stopped, or its machine or network is gone"
        except OSError:
            pass  # a connection that breaks is one that closes
        self.end(f"Process {process} {how}.{self._about_newest()}", RESTART_CODE)

    def end(self, message: str, code: int) -> None:
        """End this process, and the others with the same message and code. The first reason counts."""
        with self._ending:
            self._send(json.dumps([message[:MESSAGE_LENGTH], code]))
            logger.error("%s", message)
            os._exit(code)

    def goodbye(self) -> None:
        """Say that this process is done and may end."""
        self._send(GOODBYE)

    @contextlib.contextmanager
    def one_for_all(self, process: int, newest: Callable[[], str] | None):
        """End all processes where the code inside raises.

        Args:
          process: number of this one.
          newest: returns a sentence about the newest checkpoint, for reasons that do not name it; None keeps what there
            is.
        """
        before, self._newest = self._newest, newest or self._newest
        try:
            yield
        except BaseException as error:  # noqa: BLE001 (whatever ends this process must end all)
            self.end(*self._last_words(process, error))
        self._newest = before

    def _last_words(self, process: int, error: BaseException) -> tuple[str, int]:
        """Return the message and the exit code for an error."""
        message, code = ending_of(error) or (f"{type(error).__name__}: {' '.join(str(error).split())[:500]}.", 1)
        if code == 1:
            time.sleep(GRACE_SECONDS)
        if ending_of(error) is None:
            logger.error("Process %d failed.", process, exc_info=error)
        named = isinstance(error, (InputError, StopError))
        return f"Process {process}: {message}{'' if named else self._about_newest()}", code

    def _about_newest(self) -> str:
        """Return the sentence about the newest checkpoint, "" where there is none; a disk that is gone hides it."""
        with contextlib.suppress(Exception):
            sentence = self._newest()
            return f" {sentence}" if sentence else ""
        return ""


def _start(target: Callable, *arguments) -> None:
    threading.Thread(target=target, args=arguments, daemon=True).start()


def _own_addresses() -> list[str]:
    """Return the addresses and the name that other machines may find this one by."""
    found = []
    for family, far in FAR_AWAY:
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((far, 9))
            found.append(probe.getsockname()[0])
    return [*found, socket.gethostname()]
