"""Optimizes without DSPy: scores each example of the trainset by the client's metric, and reports as the peer does.

`optimize.options` may have
  "die"       [[before, times], …]: the end of the peer before that example, so many times; needs FAKE_FILE
  "hold"      waits for the cancel after the first candidate
  "refuse"    the type of an error, in place of the first example
  "tool"      a tool that is called first
  "chunks"    chunks that are sent first, whatever they are
  "result"    the result, whatever it is
  "forget"    how many times the program is missing; needs FAKE_FILE
The state that comes out has the definition's own one under "from". `heard` is answered with the programs that were
created and removed, and the cancels.
"""

import json
import os

from frames import read, reply, write_raw

programs = {}
heard = []
waiting = []


def write(message):
    write_raw(json.dumps(message).encode())


def fail(request, type, text="no"):
    retryable = type == "overloaded"
    write({"id": request["id"], "success": False, "error": text, "error_type": type, "retryable": retryable})


def times(what):
    """How often this was asked, over all peers."""
    with open(os.environ["FAKE_FILE"] + what, "a+") as file:
        file.write("x")
        return file.tell()


def serve(message):
    """Answers what is not an optimization."""
    if "cancel" in message:
        heard.append(["cancel"])
        return
    command, args = message.get("command"), message.get("args", {})
    if command == "create_program":
        heard.append(["create", args["id"]])
        programs[args["id"]] = args
        reply(message, {"program_id": args["id"], "status": "created"})
    elif command == "cleanup":
        heard.append(["cleanup", *args["program_ids"]])
        for id in args["program_ids"]:
            programs.pop(id, None)
        reply(message, {"status": "cleaned", "programs_removed": 1})
    elif command == "list_programs":
        reply(message, {"programs": sorted(programs)})
    elif command == "heard":
        reply(message, heard)
    elif command == "execute_program" and "optimize" in args:
        waiting.append(message)
    elif command is not None:
        reply(message)


def ask(call, number, args):
    """The metric's result; None if the run was cancelled."""
    write({"id": call, "tool_call": {"call_id": number, "name": args["name"], "args": args["args"]}})
    while True:
        message = read()
        if message.get("tool_result", {}).get("call_id") == number:
            return message["tool_result"]
        serve(message)
        if message.get("cancel") == call:
            return None


def optimize(request):
    call, args = request["id"], request["args"]
    options = args["optimize"].get("options", {})
    if times("forget") <= options["forget"] if "forget" in options else args["program_id"] not in programs:
        programs.pop(args["program_id"], None)
        return fail(request, "program_not_found", "Program not found: " + args["program_id"])
    program = programs[args["program_id"]]
    if "refuse" in options:
        return fail(request, options["refuse"])
    if "tool" in options:
        ask(call, "tool", {"name": options["tool"], "args": {}})
    for chunk in options.get("chunks", []):
        write({"id": call, "stream": chunk})
    scores = []
    candidates = 0
    for index, inputs in enumerate(args["inputs"]):
        for before, most in options.get("die", []):
            if index == before and times(f"die{before}") <= most:
                os._exit(5)
        example = {**inputs, **args["expected"][index]} if "expected" in args else inputs
        asked = {"example": example, "prediction": {"answer": "a"}, "purpose": "score"}
        answer = ask(call, index, {"name": args["metric"]["tool"], "args": asked})
        if answer is None:
            return fail(request, "cancelled")
        if not answer["success"]:
            return fail(request, "tool_error", answer["error"])
        scores.append(answer["result"])
        done = len(scores)
        progress = {"step": "fake", "done": done, "total": len(args["inputs"]), "lm_calls": done, "best": None}
        write({"id": call, "stream": {"progress": progress}})
        if done % 2 == 0:
            best = candidates == 0 or scores[-1] > max(scores[:-1])
            candidates += 1
            state = {"n": candidates, "from": program.get("state")}
            candidate = {"number": candidates, "score": scores[-1], "of": 1, "best": best}
            write({"id": call, "stream": {"candidate": {**candidate, "state": state} if best else candidate}})
            while options.get("hold"):
                message = read()
                serve(message)
                if message.get("cancel") == call:
                    return fail(request, "cancelled")
    result = {
        "state": {"n": candidates, "from": program.get("state"), "optimize": args["optimize"]},
        "score": sum(scores) / len(scores),
        "baseline": 0,
        "candidates": candidates,
        "stopped": None,
        "lm_calls": len(scores),
        "metric_calls": len(scores),
    }
    result = options.get("result", result)
    meta = {"lm_calls": len(scores), "cache_hits": 0, "lm_usage": {}}
    write({"id": call, "success": True, "result": result, "meta": meta})


while True:
    serve(read())
    while waiting:
        optimize(waiting.pop(0))
