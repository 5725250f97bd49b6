"""Small HTTP servers in the place of large ones: they run in a thread, and answer in JSON."""

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class JsonHandler(BaseHTTPRequestHandler):
    """To be given do_GET, do_POST and the like."""

    def body(self):
        """The bytes of the request."""
        return self.rfile.read(int(self.headers["Content-Length"] or 0))

    def answer(self, value, status=200, headers=None):
        """Send a value as JSON, or bytes as they are; `headers` take the place of those that are sent without."""
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        usual = {"Content-Type": "application/json", "Content-Length": str(len(content))}
        for name, text in {**usual, **(headers or {})}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def serving(handler, port=0):
    """A server as long as the block lasts, at `.url`; its handlers have it as self.server."""
    server = ThreadingHTTPServer(("127.0.0.1", port), handler)
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
