"""A real HTTP server for files, on a free port, that can be made to fail."""

import contextlib
import re
import threading
from http import HTTPStatus
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any


class FileServer(ThreadingHTTPServer):
    """Serves a directory in a thread of its own, from `with` on.

    Attributes:
        requests: the paths that were asked for.
        ranges: where those requests were to begin, if they said so.
        faults: what becomes of the next requests, one after the other: "drop" ends the connection in the middle, "cut"
            announces and sends half, "unannounced" sends half without a length, "hang" sends half and then nothing,
            "silent" answers nothing, a number is an error's status, "" is an answer as it should be. From "dies" on
            the server takes no connection.
        knows_ranges: whether it heeds Range.
        authorization: the header that it asks for, if not empty.
    """

    def __init__(self, directory: Path, port: int = 0) -> None:
        self.requests: list[str] = []
        self.ranges: list[int | None] = []
        self.faults: list[str | int] = []
        self.knows_ranges, self.authorization = True, ""
        self.closing = threading.Event()

        class Handler(_Handler):
            def __init__(self, *args: Any) -> None:
                super().__init__(*args, directory=str(directory))

        super().__init__(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"

    def __enter__(self) -> "FileServer":
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Take no further connection."""
        self.closing.set()
        self.shutdown()
        self.server_close()


class _Handler(SimpleHTTPRequestHandler):
    server: FileServer

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        self.server.requests.append(self.path)
        self.server.ranges.append(int(asked[1]) if asked else None)
        fault = self.server.faults.pop(0) if self.server.faults else ""
        path = Path(self.translate_path(self.path))
        if fault == "dies":
            self.server.close()
        elif isinstance(fault, int):
            self.send_error(fault)
        elif self.server.authorization and self.headers.get("Authorization") != self.server.authorization:
            self.send_error(HTTPStatus.UNAUTHORIZED)
        elif not path.is_file():
            self.send_error(HTTPStatus.NOT_FOUND)
        elif fault == "silent":
            self.server.closing.wait()
        else:
            self._send(path, int(asked[1]) if asked and self.server.knows_ranges else None, fault)

    def _send(self, path: Path, begin: int | None, fault: str) -> None:
        content = path.read_bytes()
        body = content[begin or 0 :]
        half = body[: len(body) // 2]
        self.send_response(HTTPStatus.OK if begin is None else HTTPStatus.PARTIAL_CONTENT)
        if begin is not None:
            self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
        self.send_header("Last-Modified", self.date_time_string(int(path.stat().st_mtime)))
        if fault != "unannounced":
            self.send_header("Content-Length", str(len(half if fault == "cut" else body)))
        self.end_headers()
        with contextlib.suppress(OSError):  # the reader has gone
            self.wfile.write(half if fault else body)
        if fault == "hang":
            self.wfile.flush()
            self.server.closing.wait()
