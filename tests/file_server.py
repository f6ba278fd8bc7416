"""A real HTTP server for files, on a free port."""

from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class FileServer(ThreadingHTTPServer):
    """Serves a directory; `requests` are the paths that were asked for."""

    def __init__(self, directory: Path) -> None:
        requests: list[str] = []

        class Handler(SimpleHTTPRequestHandler):
            def __init__(self, *args: Any) -> None:
                super().__init__(*args, directory=str(directory))

            def log_request(self, *_: object) -> None:
                requests.append(self.path)

            def log_message(self, *_: object) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        self.requests = requests
        self.url = f"http://127.0.0.1:{self.server_port}"
