"""Handle SIGTERM, SIGINT and SIGHUP at once, also while the main thread is inside a library.

Python runs a signal handler in the main thread, between two bytecodes. While ranks wait for each other, the main thread
is inside a library's C code and runs no handler. Python therefore also writes the signal to a socket, and a separate
thread reads it. Before the watchdog starts there is nothing to save, so the process prints one line and ends. Later
`Watchdog.join` replaces the handler. If ranks are threads, `handling_signals` replaces it.

Ranks start with these signals blocked, because children inherit the mask. A signal that arrives while the interpreter
starts stays pending until the rank handles signals. Otherwise it would end the rank with a traceback or without a
message.
"""

import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType

from ncclbench.errors import Exit
from ncclbench.launch.launcher_detection import ends_with_failed_rank, ends_with_first_rank

# Preemption by a scheduler, Ctrl-C, and a closed terminal or ssh connection, which nohup ignores.
SIGNALS = (signal.SIGTERM, signal.SIGINT) + (
    () if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else (signal.SIGHUP,)
)

_RANK_0_PRINT_SECONDS = 2.0
# Used if rank 0 certainly prints the same error and the job ends with it.
RANK_0_REPORT_SECONDS = 5.0

OnSignal = Callable[[signal.Signals], object]

# Set once the exit code of this process is certain. A later signal changes nothing and is not reported.
outcome_known = threading.Event()

# Signals that this process received and forwarded while it waited for ranks. It starts no rank after the first.
forwarded: list[int] = []


class SignalThread:
    """A thread that receives this process's signals.

    Args:
        on_signal: called in that thread for each signal.
    """

    def __init__(self, on_signal: OnSignal) -> None:
        """Start the thread; it receives signals after `install`."""
        self._on_signal = on_signal
        self._read, self._write = socket.socketpair()
        self._write.setblocking(False)
        threading.Thread(target=self._listen, name="signals", daemon=True).start()

    def install(self) -> None:
        """Send all signals to this thread from now on. Only the main thread may call this.

        The signals stay blocked in the main thread and in the threads that it starts later. Otherwise a signal could
        interrupt a library's system call, which then fails with an error of its own.
        """
        for number in SIGNALS:
            signal.signal(number, lambda *_: None)  # the wake-up descriptor below wakes the thread
        signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)

    def close(self) -> None:
        """Stop listening; another handler must be installed."""
        self._write.close()

    def _listen(self) -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        while numbers := self._read.recv(64):
            for number in numbers:
                if number in SIGNALS and not outcome_known.is_set():
                    self._on_signal(signal.Signals(number))
        self._read.close()


@contextmanager
def handling_signals(on_signal: OnSignal) -> Iterator[None]:
    """Call `on_signal` in a separate thread for each signal that arrives inside the block."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield
        return
    outcome_known.clear()
    receiver = SignalThread(on_signal)
    with _restoring():
        receiver.install()
        yield
    receiver.close()


@contextmanager
def forwarding_signals(forward: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Call `forward` in the main thread for each signal that arrives inside the block.

    The main thread only waits for ranks here, so it runs handlers. If a program calls the API from another thread, the
    program handles signals itself.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def record_and_forward(number: int, frame: FrameType | None) -> None:
        forwarded.append(number)
        forward(number, frame)

    with _restoring():
        signal.set_wakeup_fd(-1)
        for number in SIGNALS:
            signal.signal(number, record_and_forward)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        yield


@contextmanager
def blocked() -> Iterator[None]:
    """Block these signals inside the block, also in the processes that are started there."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _restoring() -> Iterator[None]:
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    descriptor = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(descriptor, warn_on_full_buffer=False)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(descriptor, warn_on_full_buffer=False)


def wait_for_rank_0(seconds: float = _RANK_0_PRINT_SECONDS) -> None:
    """Let rank 0 print first, because mpiexec and torchrun end the whole job with the first rank that ends."""
    if ends_with_first_rank(os.environ):
        time.sleep(seconds)


def rank_0_still_runs() -> bool:
    """Whether rank 0 is known to run still, after `wait_for_rank_0`.

    If rank 0 had failed, torchrun and mpiexec would have ended this rank too. With other launchers it is unknown, and
    the result is False.
    """
    return ends_with_failed_rank(os.environ)


def wants_json(arguments: Sequence[str]) -> bool:
    """Whether the last line of stdout must be JSON, by ``--json`` or by the request that a rank received."""
    if "--request" not in arguments[:-1]:
        return "--json" in arguments
    with suppress(ValueError, AttributeError):
        return bool(json.loads(arguments[arguments.index("--request") + 1]).get("results") == "json")
    return False


def interruption(number: int) -> str:
    """The reason that a run interrupted by this signal records."""
    return f"interrupted by {signal.Signals(number).name}"


def report_interruption(number: signal.Signals) -> None:
    """Report, like any other error, that a run was interrupted before it stored anything."""
    message = interruption(number)
    _write(2, f"ncclbench: error: {message}")
    if wants_json(sys.argv[1:]):
        _write(1, json.dumps({"run": None, "exit_code": int(Exit.ENVIRONMENT), "error": message, "records": []}))


def _write(descriptor: int, line: str) -> None:
    """Write without Python's buffers, because another thread may hold their lock."""
    with suppress(OSError):
        os.write(descriptor, f"{line}\n".encode())
