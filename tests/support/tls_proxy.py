"""A proxy that ends TLS itself, so that what peers send to the providers' own hosts is seen here and goes nowhere."""

from __future__ import annotations

import json
import ssl
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

# A certificate for the hosts of some providers, signed by itself, with its key.
_CERTIFICATE = str(Path(__file__).parents[1] / "fakes" / "any_host.pem")


class Sent(NamedTuple):
    """A request: its host, and all of its headers and body as one text."""

    host: str
    text: str


class TLSProxy:
    """Answers each request with 401. `sent`: all requests."""

    def __init__(self) -> None:
        self.sent: list[Sent] = []
        owner = self
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(_CERTIFICATE)

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            host = ""

            def do_CONNECT(self) -> None:
                self.host = self.path.partition(":")[0]
                self.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
                # What ends TLS without a certificate for its host ends here.
                self.connection = context.wrap_socket(self.connection, server_side=True)
                self.rfile, self.wfile = self.connection.makefile("rb"), self.connection.makefile("wb", 0)
                self.close_connection = False

            def do_GET(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                host = self.host or urlsplit(self.path).hostname or ""
                owner.sent.append(Sent(host, f"{self.path}\n{self.headers}{body.decode()}"))
                data = json.dumps({"error": {"message": "refused", "type": "authentication_error"}}).encode()
                kind = f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n"
                self.wfile.write(f"HTTP/1.1 401 Unauthorized\r\n{kind}\r\n".encode() + data)

            do_POST = do_PUT = do_GET

            def finish(self) -> None:
                super().finish()
                self.connection.close()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # type: ignore[method-assign]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()
        url = f"http://127.0.0.1:{self._server.server_port}"
        proxies = dict.fromkeys(("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy"), url)
        # The environment of a peer behind it.
        self.env = {**proxies, "NO_PROXY": "", "no_proxy": "", "SSL_CERT_FILE": _CERTIFICATE}

    def stop(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
