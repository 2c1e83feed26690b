"""``python -m graphopt.exploration.worker``: a trainer or a generator. Started by `Child`, never by hand.

=============  ==========================  =====================================================
the master says     to a                   it answers
=============  ==========================  =====================================================
(nothing)      both                        ``ready``, or ``unusable`` with the reason, and ends
``task``       trainer                     ``report`` any number of times, then ``ended``
``decide``     trainer that waits          (the trial goes on or ends)
``rows``       generator                   (nothing)
``ask``        generator                   ``answer``, or ``unusable``
=============  ==========================  =====================================================

The connection closes when the master ends, however it ends: then this process ends too, with all that it started.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import traceback
from multiprocessing.connection import Connection
from select import POLLHUP, poll
from typing import Any

from graphopt.exploration.payload import load

_REPORT = 1 << 14


def main() -> None:
    """Serve the connection that the master left open."""
    parser = argparse.ArgumentParser(prog="python -m graphopt.exploration.worker")
    parser.add_argument("--kind", choices=("trainer", "generator"), required=True)
    parser.add_argument("--connection", type=int, required=True, help="descriptor of a socket that the master made")
    parser.add_argument("--payload", required=True, help="file with what is searched")
    given = parser.parse_args()
    # Ctrl-C reaches the master, who decides what it means. It was blocked until here.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    connection = Connection(given.connection)
    _end_with_master(given.connection)  # before anything is imported that takes long
    code = 0
    try:
        setup = load(given.payload)
        connection.send(("ready",))
        serve = _train if given.kind == "trainer" else _generate
        serve(connection, setup)
    except (EOFError, ConnectionError):
        pass  # the master is gone
    except BaseException:
        code = 1
        try:
            connection.send(("unusable", traceback.format_exc()[-_REPORT:]))
        except OSError:
            pass  # the master is gone
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # without destructors that might wait


def _train(connection: Connection, setup: Any) -> None:
    from graphopt.exploration.trainer import Trainer

    trainer = Trainer(setup)
    while True:
        what, task = connection.recv()
        if what != "task":
            continue  # the answer to a report of the process that this one replaces

        def tell(step: int, value: float, rung: int | None) -> bool:
            connection.send(("report", task.number, step, value, rung))  # noqa: B023 (called within this turn)
            return rung is None or bool(connection.recv()[1])

        connection.send(("ended", task.number, trainer.run(task, tell)))


def _generate(connection: Connection, setup: Any) -> None:
    from graphopt.exploration.generator import Generator

    generator = Generator(setup)
    while True:
        kind, content = connection.recv()
        if kind == "rows":
            generator.feed(content)
        else:
            connection.send(("answer", generator.answer(content)))


def _end_with_master(connection: int) -> None:
    """A thread that ends this session when the other end of the connection closes."""
    parent = os.getppid()

    def look() -> None:
        gone = poll()
        gone.register(connection, POLLHUP)
        # A child that the master forked may hold its end open beyond its death: so the parent is looked at too.
        while not gone.poll(500) and os.getppid() == parent:
            pass
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=look, daemon=True, name="end with the master").start()


if __name__ == "__main__":
    main()
