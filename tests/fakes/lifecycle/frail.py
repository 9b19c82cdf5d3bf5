"""Dies as it loads the program `frail`, the times whose numbers are in FAKE_DIES: `2 3` are the second and third.

The times are counted in FAKE_FILE, over all peers. Programs are kept as ids, and loaded when they are created; lazy
ones by their first run. The program that the file FAKE_FILE.holds names is not loaded as long as it does.
"""

import json
import os
import time
from pathlib import Path

from frames import reply, requests, write_raw

programs = []
loaded = set()
holds = Path(os.environ["FAKE_FILE"] + ".holds")


def held(id):
    try:
        return holds.read_text() == id
    except FileNotFoundError:
        return False


def load(id):
    if id == "frail":
        with open(os.environ["FAKE_FILE"], "a+") as file:
            file.write("x")
            count = file.tell()
        if str(count) in os.environ["FAKE_DIES"].split():
            os._exit(6)
    while held(id):
        time.sleep(0.01)
    loaded.add(id)


for request in requests():
    command, args = request["command"], request["args"]
    if command == "create_program":
        if not args.get("lazy"):
            load(args["id"])
        if args["id"] not in programs:
            programs.append(args["id"])
        reply(request, {"program_id": args["id"], "status": "created"})
    elif command == "execute_program" and args["program_id"] not in programs:
        error = {"error": "Program not found: " + args["program_id"], "error_type": "program_not_found"}
        write_raw(json.dumps({"id": request["id"], "success": False, **error}).encode())
    else:
        if command == "execute_program" and args["program_id"] not in loaded:
            load(args["program_id"])
        reply(request, {"programs": programs, "pid": os.getpid()})
