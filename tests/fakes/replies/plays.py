"""Plays the script in a run's args, each in a thread: chunks, tool calls, replies, in any order.

args.play, or args.config.play, is a list of steps:
  ["stream", map]              a chunk
  ["count", n]                 n chunks of the field `n`, with their numbers as strings
  ["raw", text]                a frame of these bytes, ID in it being the call's id
  ["long", kind, n]            a chunk ("stream") or a reply with a text of n characters
  ["tool", call_id, name, args]   a call of a tool, not waited for
  ["result", call_id]          waits for that tool's result
  ["go", name]                 waits for a `go` with this name in its args
  ["reply", result, meta]      the reply; without a result, all results of tools that have come, by call_id
  ["sizes"]                    a reply with the length of each result of a tool, or its error, by call_id
  ["asked"]                    a reply whose result is what the request asks for: of ASKED
  ["fail", error_type, meta]   an error reply; meta may be left out
  ["die"]                      the end of the peer
  ["journal", entry]           an entry of the run's journal; without one, a reply with the journal of the request
  ["first", steps, others]     steps in the first peer, others in its successors; needs FAKE_FILE

`heard` is answered with all control frames that have come, in their order. Everything else is answered at once.
"""

import json
import os
import threading

from frames import read, reply, write_raw

ASKED = ("stream", "meta", "history", "lm_events")

starts = 1
if "FAKE_FILE" in os.environ:
    with open(os.environ["FAKE_FILE"], "a+") as file:
        file.write("x")
        starts = file.tell()

changed = threading.Condition()
heard = []
results = {}
gone = set()
writing = threading.Lock()


def write(message):
    write_text(json.dumps(message))


def write_text(text):
    with writing:
        write_raw(text.encode())


def wait(key, where):
    with changed:
        changed.wait_for(lambda: key in where)


def asked(request):
    return [key for key in ASKED if key in request]


def play(request, steps):
    call = request["id"]
    for kind, *step in steps:
        if kind == "stream":
            write({"id": call, "stream": step[0]})
        elif kind == "count":
            for n in range(step[0]):
                write({"id": call, "stream": {"field": "n", "chunk": str(n)}})
        elif kind == "raw":
            write_text(step[0].replace("ID", str(call)))
        elif kind == "long":
            text = "x" * step[1]
            if step[0] == "stream":
                write({"id": call, "stream": {"field": "a", "chunk": text}})
            else:
                write({"id": call, "success": True, "result": text})
        elif kind == "tool":
            call_id, name, args = step
            write({"id": call, "tool_call": {"call_id": call_id, "name": name, "args": args}})
        elif kind == "result":
            wait(step[0], results)
        elif kind == "go":
            wait(step[0], gone)
        elif kind == "reply":
            result = step[0] if step else {str(call_id): results[call_id] for call_id in sorted(results)}
            meta = step[1] if len(step) > 1 else {"asked": asked(request)}
            write({"id": call, "success": True, "result": result, "meta": meta})
        elif kind == "sizes":
            sizes = {n: len(result.get("result", "")) or result["error"] for n, result in results.items()}
            write({"id": call, "success": True, "result": sizes})
        elif kind == "asked":
            write({"id": call, "success": True, "result": asked(request)})
        elif kind == "fail":
            meta = {"meta": step[1]} if len(step) > 1 else {}
            write({"id": call, "success": False, "error": "no", "error_type": step[0], **meta})
        elif kind == "journal" and step:
            write({"id": call, "journal": step[0]})
        elif kind == "journal":
            write({"id": call, "success": True, "result": request["journal"]})
        elif kind == "die":
            os._exit(5)
        elif kind == "first":
            play(request, step[0] if starts == 1 else step[1])


while True:
    message = read()
    with changed:
        if "id" not in message:
            heard.append(message)
            if "tool_result" in message:
                results[message["tool_result"]["call_id"]] = message["tool_result"]
        elif message["command"] == "go":
            gone.add(message["args"]["name"])
        changed.notify_all()
    if "id" not in message:
        continue
    if message["command"] == "execute_program":
        args = message["args"]
        steps = args["play"] if "play" in args else args["config"]["play"]
        threading.Thread(target=play, args=(message, steps), daemon=True).start()
    else:
        with writing:
            reply(message, {"heard": heard, "id": message["id"], "starts": starts})
