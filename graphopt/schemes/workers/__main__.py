"""``python -m graphopt.schemes.workers``: one worker. Started by `Pool`, never by hand."""

from __future__ import annotations

import argparse
import os
import socket

import torch

from graphopt.schemes.workers.processor import Processor, follow_main, ignore_interrupts, main_is_gone
from graphopt.schemes.workers.protocol import Channel


def main() -> None:
    """Serve the connection that main left open until main closes it or is gone."""
    parser = argparse.ArgumentParser(prog="python -m graphopt.schemes.workers")
    parser.add_argument("--connection", type=int, required=True, help="descriptor of a socket that main made")
    parser.add_argument("--directory", required=True, help="where main keeps files for its workers")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--processor", type=int, required=True, help="for whoever lists processes")
    given = parser.parse_args()
    ignore_interrupts()
    torch.set_num_threads(given.threads)
    channel = Channel(socket.socket(fileno=given.connection))
    follow_main(channel, given.directory)
    channel.send({"hello": {"torch": str(torch.__version__)}})
    try:
        code = Processor(channel).run()
    except (EOFError, OSError):
        code = 0
        main_is_gone(given.directory)
    os._exit(code)  # without the destructors of connections, which would wait for their other ends


if __name__ == "__main__":
    main()
