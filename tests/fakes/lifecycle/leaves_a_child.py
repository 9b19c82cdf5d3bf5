"""Leaves at the end of its input, as it should, but not so its child."""

import os
import time

from frames import reply, requests

child = os.fork()
if child == 0:
    os.closerange(0, 3)
    time.sleep(600)
for request in requests():
    reply(request, {"child": child})
