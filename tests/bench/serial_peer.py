"""A port program as most projects write one: everything imported at the top, one command at a time."""

import json
import struct
import sys
import time

import dspy

programs = {}


def handle(command: str, args: dict) -> dict:
    if command == "ping":
        return {"status": "ok", "timestamp": time.time()}
    if command == "create_program":
        programs[args["id"]] = dspy.Predict(args["signature"])
        return {"program_id": args["id"], "status": "created"}
    if command == "execute_program":
        return programs[args["program_id"]](**args["inputs"]).toDict()
    raise ValueError(f"Unknown command: {command}")


while header := sys.stdin.buffer.read(4):
    request = json.loads(sys.stdin.buffer.read(struct.unpack(">I", header)[0]).decode("utf-8"))
    try:
        reply = {"id": request["id"], "success": True, "result": handle(request["command"], request.get("args", {}))}
    except Exception as error:
        reply = {"id": request["id"], "success": False, "error": str(error)}
    payload = json.dumps(reply).encode("utf-8")
    sys.stdout.buffer.write(struct.pack(">I", len(payload)) + payload)
    sys.stdout.buffer.flush()
