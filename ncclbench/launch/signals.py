"""SIGTERM, SIGINT and SIGHUP before and beside the watchdog: handled at once, whatever the main thread is doing.

Python runs a signal's handler in the main thread, between two bytecodes. A main thread in a library's C code, where
ranks wait for each other, does not get there. Python therefore also writes the signal to a socket, which a thread of
its own reads. Until ranks are watched there is nothing to save, so the process prints one line and ends.
`Watchdog.join` then takes the signals over, and so does `heeding` where ranks are threads.

Ranks are started with these signals blocked, which children inherit. One that arrives while an interpreter is still
starting waits until that rank handles signals, instead of ending it with a traceback or without a message.
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

# A scheduler's pre-emption, Ctrl-C, and a terminal or an ssh connection that is gone; but not under nohup.
SIGNALS = (signal.SIGTERM, signal.SIGINT) + (
    () if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else (signal.SIGHUP,)
)

_RANK_0_SPEAKS_SECONDS = 2.0
# Where rank 0 is certain to say the same, and the job ends with it.
RANK_0_SAYS_IT_SECONDS = 5.0

OnSignal = Callable[[signal.Signals], object]

# Set once the outcome of this process is certain: a signal after that changes nothing, and must not seem to.
settled = threading.Event()

# The signals that this process was sent while it waited for ranks, and has told them: none is started after that.
passed_on: list[int] = []


class Guard:
    """A thread that receives this process's signals.

    Args:
        on_signal: is called in that thread for each.
    """

    def __init__(self, on_signal: OnSignal) -> None:
        """Start the thread; it receives nothing yet."""
        self._on_signal = on_signal
        self._read, self._write = socket.socketpair()
        self._write.setblocking(False)
        threading.Thread(target=self._listen, name="signals", daemon=True).start()

    def take(self) -> None:
        """From now on signals come here. Only the main thread may call this.

        They stay blocked in it, and in every thread that it starts from here on, so that no library's system call is
        interrupted by one and fails in a way of its own.
        """
        for number in SIGNALS:
            signal.signal(number, lambda *_: None)  # the descriptor tells the thread, at once
        signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)

    def close(self) -> None:
        """Stop listening; another handler must have taken the signals."""
        self._write.close()

    def _listen(self) -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        while numbers := self._read.recv(64):
            for number in numbers:
                if number in SIGNALS and not settled.is_set():
                    self._on_signal(signal.Signals(number))
        self._read.close()


@contextmanager
def heeding(on_signal: OnSignal) -> Iterator[None]:
    """Inside, each of these signals calls `on_signal` in a thread of its own."""
    if threading.current_thread() is not threading.main_thread():  # which alone may set handlers
        yield
        return
    settled.clear()
    guard = Guard(on_signal)
    with _restoring():
        guard.take()
        yield
    guard.close()


@contextmanager
def passing_on(pass_on: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Inside, the main thread, which only waits for ranks, calls `pass_on` for each of these signals.

    In any other thread of a program that calls the API, signals are that program's own affair.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def noted(number: int, frame: FrameType | None) -> None:
        passed_on.append(number)
        pass_on(number, frame)

    with _restoring():
        signal.set_wakeup_fd(-1)
        for number in SIGNALS:
            signal.signal(number, noted)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        yield


@contextmanager
def blocked() -> Iterator[None]:
    """None of these signals is delivered inside, and all stay blocked in processes that are started inside."""
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


def wait_for_rank_0(seconds: float = _RANK_0_SPEAKS_SECONDS) -> None:
    """Let rank 0 print first: an mpiexec, and torchrun as well, ends the whole job with the first rank that ends."""
    if ends_with_first_rank(os.environ):
        time.sleep(seconds)


def rank_0_is_still_there() -> bool:
    """Whether it goes on, after waiting for it: torchrun and mpiexec would have ended this rank with it.

    With other launchers this is unknown, and the answer is no.
    """
    return ends_with_failed_rank(os.environ)


def wants_json(arguments: Sequence[str]) -> bool:
    """Whether the last line of stdout must be JSON: by the option, or by the request of a rank."""
    if "--request" not in arguments[:-1]:
        return "--json" in arguments
    with suppress(ValueError, AttributeError):
        return bool(json.loads(arguments[arguments.index("--request") + 1]).get("results") == "json")
    return False


def in_words(number: int) -> str:
    """What such a signal does to a run."""
    return f"interrupted by {signal.Signals(number).name}"


def announce(number: signal.Signals) -> None:
    """Report that a run was interrupted before there was anything to keep, as every other error of a run."""
    message = in_words(number)
    _write(2, f"ncclbench: error: {message}")
    if wants_json(sys.argv[1:]):
        _write(1, json.dumps({"run": None, "exit_code": int(Exit.ENVIRONMENT), "error": message, "records": []}))


def _write(descriptor: int, line: str) -> None:
    """Past Python's own buffers, which another thread may be holding."""
    with suppress(OSError):
        os.write(descriptor, f"{line}\n".encode())
