"""Has the real watchdog, and a child in a session of its own, whose pid it writes to FAKE_FILE. Answers all."""

import os
import subprocess

from frames import reply, requests

from dspy_bridge.port import watchdog

watchdog.start(0, 1)
null = subprocess.DEVNULL
child = subprocess.Popen(["sleep", "600"], start_new_session=True, stdin=null, stdout=null)
with open(os.environ["FAKE_FILE"], "w") as file:
    file.write(str(child.pid))
for request in requests():
    reply(request)
