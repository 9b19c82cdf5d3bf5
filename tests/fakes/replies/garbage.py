"""Sends, before each reply but the first, frames that are not replies; `broken` gets a cut one."""

import random

from frames import reply, requests, write_raw

noise = random.Random(1)
for count, request in enumerate(requests()):
    if count > 0:
        write_raw(b"")
        write_raw(b"Traceback (most recent call last):")
        write_raw(b'{"id":null,"success":false,"error":"x","error_type":"invalid_json"}')
        write_raw(noise.randbytes(200))
    if request["command"] == "broken":
        write_raw(b'{"id":%d,"success":tr' % request["id"])
    else:
        reply(request)
