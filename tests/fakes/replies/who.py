"""Answers with its pid, and keeps programs as ids with their signatures. `hold` is never answered; `die` ends the peer.

A program with the signature `one -> only` is accepted by the peer that creates FAKE_FILE; the others refuse it.
"""

import json
import os

from frames import reply, requests, write_raw

programs = {}
halfway = 0


def refuse(request, text, error_type, **more):
    error = {"id": request["id"], "success": False, "error": text, "error_type": error_type, **more}
    write_raw(json.dumps(error).encode())


def only_one():
    try:
        os.close(os.open(os.environ["FAKE_FILE"], os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


for request in requests():
    command, args = request["command"], request["args"]
    if command == "die":
        os._exit(4)
    elif command == "hold":
        pass
    elif command == "overloaded":
        refuse(request, "too much to do", "overloaded", meta={"wait_ms": 1.5})
    elif command == "overloaded_halfway":
        halfway += 1
        refuse(request, "too much to go on", "overloaded", retryable=False)
    elif command == "halfway":
        reply(request, {"count": halfway})
    elif command == "create_program":
        if args["signature"] == "one -> only" and not only_one():
            refuse(request, "signature: not here", "invalid_args")
        else:
            programs[args["id"]] = args["signature"]
            reply(request, {"program_id": args["id"], "status": "created"})
    elif command == "execute_program":
        if args["program_id"] in programs:
            reply(request, {"signature": programs[args["program_id"]], "pid": os.getpid()})
        else:
            refuse(request, "Program not found: " + args["program_id"], "program_not_found")
    elif command == "list_programs":
        reply(request, {"programs": programs})
    elif command == "cleanup":
        ids = args.get("program_ids", list(programs))
        for program_id in ids:
            programs.pop(program_id, None)
        reply(request, {"status": "cleaned"})
    else:
        reply(request, {"pid": os.getpid()})
