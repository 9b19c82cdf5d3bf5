"""Answers `slow` after args.s seconds and `create_program` after args.wait; keeps programs as ids. Others at once."""

import os
import threading

from frames import reply, requests

programs = []
lock = threading.Lock()


def later(seconds, request, result):
    def answer():
        with lock:
            reply(request, result)

    threading.Timer(seconds, answer).start()


for request in requests():
    command, args = request["command"], request["args"]
    if command == "slow":
        later(args["s"], request, {})
    elif command == "create_program":
        programs.append(args["id"])
        later(args.get("wait", 0), request, {})
    else:
        with lock:
            reply(request, {"programs": programs, "pid": os.getpid()})
