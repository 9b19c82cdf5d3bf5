"""In the place of Deno, for DSPy's PythonInterpreter: after the check of its health, whatever it gets runs for ever.

With an argument it does not even answer that.
"""

import json
import sys
import time

for number, line in enumerate(sys.stdin):
    if number or len(sys.argv) > 1:
        time.sleep(3600)
    reply = {"jsonrpc": "2.0", "result": {"output": "2\n"}, "id": json.loads(line)["id"]}
    sys.stdout.write(json.dumps(reply) + "\n")
    sys.stdout.flush()
