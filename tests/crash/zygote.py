"""A process that has imported the program and forks it: a real `rankopt` process, without the seconds of its imports.

One order a line on stdin, one answer a line on stdout: ``{"start": arguments, "log": file}`` → its process number,
``{"poll": number}`` → its exit status, or null while it runs.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback


def child(arguments: list[str], log: str) -> int:
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where a shell ignores it in the background
    out = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    for number, target in ((0, os.open(os.devnull, os.O_RDONLY)), (1, out), (2, out)):
        os.dup2(target, number)
    from rankopt.cli import main

    try:
        return main(arguments)
    except BaseException:
        traceback.print_exc()
        return 1


def serve() -> None:
    import torch

    import rankopt.iterated
    import rankopt.progress
    import rankopt.running
    import rankopt.search  # noqa: F401

    torch.set_num_threads(1)
    print("ready", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        if "start" in order:
            number = os.fork()
            if number == 0:
                os._exit(child(order["start"], order["log"]))
            print(number, flush=True)
        else:
            ended, status = os.waitpid(order["poll"], os.WNOHANG)
            print(json.dumps(os.waitstatus_to_exitcode(status) if ended else None), flush=True)


if __name__ == "__main__":
    serve()
