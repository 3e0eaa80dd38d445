"""Runs that are open in a process of their own, beside that of a replica: `python -m retrikt_ray.serving.answering.process` is that process.

What reads requests and writes answers, and what computes them, would wait for each other in one process: Python code of one thread runs at a
time. Between the two go whole batches over a socket, so the way costs each request little. The process ends with its replica, and the replica
with it (`gone`): whoever starts replicas anew does so then, as after any crash.
"""

from __future__ import annotations

import asyncio
import logging
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from itertools import count
from multiprocessing.connection import Connection
from typing import Any

from retrikt_ray.serving.answering.job import Facts
from retrikt_ray.serving.args import ServeArgs

OPEN, CLOSE = "open", "close"  # of a run; everything else is asked of one that is open
END_S = 5.0  # for the process to end when nobody asks any more
HEAD = 4  # bytes of a length, as `Connection` writes it before a message
logger = logging.getLogger("ray.serve")


class Ended(Exception):
    """The process has ended."""


class Process(asyncio.Protocol):
    """The process, and what it has been asked. Once a loop has taken it over (`join`), it is asked from that loop's thread, and answers there."""

    def __init__(self, gone: Callable[[], None]) -> None:
        """gone: called when the process has ended by itself."""
        self.gone, self.closed, self.ids = gone, False, count()
        self.loop: asyncio.AbstractEventLoop | None = None
        self.joining: asyncio.Task[None] | None = None
        self.opening = threading.Lock()  # whoever has it reads the socket, until a loop does
        self.asked: dict[int, asyncio.Future[Any]] = {}
        self.came = bytearray()  # what was read of messages that are not whole
        self.socket, there = socket.socketpair()
        with there:
            command = [sys.executable, "-m", __name__, str(there.fileno())]
            paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
            env = {**os.environ, "PYTHONPATH": paths}
            self.process = subprocess.Popen(command, pass_fds=[there.fileno()], env=env, stdin=subprocess.DEVNULL)

    async def join(self) -> None:
        """Be asked from this loop from now on."""
        self.joining = self.joining or asyncio.create_task(self.connect())
        await asyncio.shield(self.joining)  # whoever asks first may give up; the others still wait for it

    async def connect(self) -> None:
        loop = asyncio.get_running_loop()
        await asyncio.to_thread(self.opening.acquire)
        self.transport, _ = await loop.create_connection(lambda: self, sock=self.socket)
        self.loop = loop
        self.opening.release()

    def data_received(self, data: bytes) -> None:
        self.came += data
        while len(self.came) >= HEAD:
            end = HEAD + int.from_bytes(self.came[:HEAD], "big")
            if len(self.came) < end:
                break
            number, answer, error = pickle.loads(memoryview(self.came)[HEAD:end])
            del self.came[:end]
            asked = self.asked.pop(number)
            if asked.cancelled():
                continue
            if error is None:
                asked.set_result(answer)
            else:
                asked.set_exception(error)

    def connection_lost(self, _: Exception | None) -> None:
        if not self.closed:
            logger.error(f"the process that answers has ended with {self.process.wait()}")
            self.gone()
        while self.asked:
            asked = self.asked.popitem()[1]
            if not asked.done():
                asked.set_exception(Ended())

    def ask(self, run: int, name: str, *args: Any) -> asyncio.Future[Any]:
        """Ask something of the run of this number. Raises what it raises there, and Ended where the process has ended."""
        asked: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        if self.transport.is_closing():
            asked.set_exception(Ended())
            return asked
        number = next(self.ids)
        self.asked[number] = asked
        data = pickle.dumps((number, run, name, args))
        self.transport.write(len(data).to_bytes(HEAD, "big") + data)
        return asked

    def open(self, run: str, args: ServeArgs, like: Facts | None = None) -> Away:
        """As Opened, there; from another thread than that of the loop. Raises as it does."""
        number = next(self.ids)
        with self.opening:
            if not self.loop:
                line = Connection(os.dup(self.socket.fileno()))
                line.send((number, number, OPEN, (run, args, like)))
                _, facts, error = line.recv()
                if error:
                    raise error
                return Away(self, number, run, facts)
        return Away(self, number, run, self.elsewhere(number, OPEN, run, args, like).result())

    def elsewhere(self, *asked: Any) -> Future[Any]:
        """As `ask`, from another thread than that of the loop."""

        async def ask() -> Any:
            return await self.ask(*asked)

        assert self.loop
        return asyncio.run_coroutine_threadsafe(ask(), self.loop)

    def close(self) -> None:
        """End it."""
        self.closed = True
        with suppress(OSError):  # the other end is closed already
            self.socket.shutdown(socket.SHUT_RDWR)  # which those who read see, here and there
        try:
            self.process.wait(END_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Away:
    """An Opened that is elsewhere."""

    def __init__(self, process: Process, number: int, run: str, facts: Facts) -> None:
        self.process, self.number, self.run, self.facts = process, number, run, facts

    def ask(self, name: str, *args: Any) -> asyncio.Future[Any]:
        if self.process.loop:
            return self.process.ask(self.number, name, *args)
        return asyncio.ensure_future(self.first(name, *args))

    async def first(self, name: str, *args: Any) -> Any:
        await self.process.join()
        return await self.process.ask(self.number, name, *args)

    def close(self) -> None:
        """After what it has been given to do. From another thread than that of the loop."""
        if self.process.loop and not self.process.closed:
            self.process.elsewhere(self.number, CLOSE)


def main(descriptor: int) -> None:
    """Open runs and answer, until the other end is closed."""
    from retrikt_ray.serving.answering.opened import Opened

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: the replica says when it is over
    line, sending = Connection(descriptor), threading.Lock()
    runs: dict[int, Opened] = {}

    def send(number: int, answer: Any, error: BaseException | None) -> None:
        with sending:
            try:
                line.send((number, answer, error))
            except OSError:  # the replica has ended
                pass
            except Exception as unsent:  # it cannot be pickled
                line.send((number, None, RuntimeError(f"{type(error).__name__}: {error}" if error else repr(unsent))))

    def told(number: int) -> Callable[[Future[Any]], None]:
        return lambda done: send(number, None, error) if (error := done.exception()) else send(number, done.result(), None)

    def open_run(number: int, run: int, args: Any) -> None:
        path, settings, like = args
        try:
            runs[run] = Opened(path, settings, like=like)
        except BaseException as error:
            send(number, None, error)
        else:
            send(number, runs[run].facts, None)

    while True:
        try:
            number, run, name, args = line.recv()
        except (EOFError, OSError):
            os._exit(0)  # at once: nobody waits for what is in work
        if name == OPEN:  # it takes its time, in which others answer
            threading.Thread(target=open_run, args=(number, run, args), daemon=True).start()
        elif name == CLOSE:
            runs.pop(run).close()
            send(number, None, None)
        elif run in runs:
            runs[run].call(name, *args).add_done_callback(told(number))
        else:
            send(number, None, RuntimeError("this run is not open any more"))


if __name__ == "__main__":
    main(int(sys.argv[1]))
