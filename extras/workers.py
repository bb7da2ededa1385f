"""Processes that do the runs of the study, each one job at a time: one that dies says in which."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import wait

from script import in_one_line

from data import InputError


class Worker:
    """A process. `prepare`, called with `arguments`, is the first that it does."""

    def __init__(self, prepare: Callable, arguments: tuple):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        options = {"args": (theirs, prepare, arguments), "daemon": True}
        self.process = context.Process(target=serve, **options)
        self.process.start()
        theirs.close()  # so that its end is seen here
        self.name = None  # of its job

    def begin(self, work: Callable, name: str, job: tuple) -> None:
        self.name = name
        with contextlib.suppress(OSError):  # it is dead: `result` says so
            self.pipe.send((work, job))

    def result(self):
        """What work(job) returned; InputError where it failed, or the process died."""
        try:
            result, problem = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            result = None
            problem = f"its process ended with code {self.process.exitcode}"
            if self.process.exitcode == -signal.SIGKILL:
                problem += ", killed, as when memory runs out (lower --workers)"
        if problem is not None:
            kept = "what is recorded stays, and the same command goes on"
            raise InputError(f"{self.name}: {problem}; {kept}")
        return result


def serve(pipe, prepare: Callable, arguments: tuple) -> None:
    """Do what comes through the pipe, until this process is ended."""
    threading.Thread(target=end_with_the_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this
    prepare(*arguments)
    while True:
        try:
            work, job = pipe.recv()
        except EOFError:  # no more will come
            return
        try:
            answer = (work(job), None)
        except Exception as error:
            answer = (None, in_one_line(error))
        pipe.send(answer)


def end_with_the_parent() -> None:
    """However that ends: what went on would write into the folders of the next study."""
    multiprocessing.parent_process().join()
    os._exit(1)


def done(work: Callable, jobs: dict[str, tuple], workers: list[Worker]) -> Iterator:
    """Results of work(job), as they come; InputError names a job that failed.

    After a failure no other is begun, but those in progress end, and their results come first.
    """
    waiting = list(jobs.items())
    idle = list(workers)
    busy = {}  # the worker of each pipe
    failure = None
    while waiting or busy:
        while waiting and idle:
            worker = idle.pop()
            worker.begin(work, *waiting.pop(0))
            busy[worker.pipe] = worker
        for pipe in wait(busy):
            worker = busy.pop(pipe)
            idle.append(worker)
            try:
                result = worker.result()
            except InputError as error:
                failure = error
                waiting.clear()
            else:
                yield result
    if failure is not None:
        raise failure
