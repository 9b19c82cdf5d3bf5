"""What the doctor wants to see of a peer, at once and without DSPy; it logs each request.

The checks look for `class DSPyBridge`, `def handle_command` and `def main():`.
"""

import json

from frames import reply, requests, write_raw

for request in requests():
    log = {"level": "warning", "logger": "bridge", "message": f"the bridge got {request['command']}"}
    write_raw(json.dumps({"log": log}).encode())
    reply(request, {"answer": "well"} if request["command"] == "execute_program" else None)
