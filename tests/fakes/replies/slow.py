"""Answers `slow` after args.s seconds and `create_program` after args.wait; keeps programs as ids. Others at once.

With FAKE_FILE, each peer notes its start there, and the second reads nothing past its first ping.
"""

import os
import threading
import time

from frames import reply, requests

starts = 1
if "FAKE_FILE" in os.environ:
    with open(os.environ["FAKE_FILE"], "a+") as file:
        file.write("x")
        starts = file.tell()
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
    if command == "ping" and starts == 2:
        time.sleep(600)
