"""No bad habit: every request is answered with its own args, and with the deadline it came with."""

from frames import reply, requests

for request in requests():
    reply(request, {"args": request["args"], "timeout_ms": request.get("timeout_ms")})
