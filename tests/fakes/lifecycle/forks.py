"""Answers well, but has a child that holds its output open."""

import os
import time

from frames import reply, requests

child = os.fork()
if child == 0:
    time.sleep(600)
for request in requests():
    reply(request, {"child": child})
