"""Dies at its start unless the file FAKE_FILE is there; answers well if it is."""

import os
import sys

from frames import reply, requests

if not os.path.exists(os.environ["FAKE_FILE"]):
    sys.exit(4)
for request in requests():
    if request["command"] == "die":
        os._exit(5)
    reply(request)
