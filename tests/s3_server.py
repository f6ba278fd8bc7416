"""A real S3-compatible server (moto's), on a free port, that can be made to fail."""

import threading
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import boto3
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

BUCKET = "shards"
KEY = {"AWS_ACCESS_KEY_ID": "mykey", "AWS_SECRET_ACCESS_KEY": "nottobetold"}


class S3Server:
    """Serves what was uploaded, from `with` on; `env` is what leads a client to it.

    Attributes:
        faults: what becomes of the next requests for objects' bytes, one after the other: "drop" ends the connection in
            the middle, "hang" answers nothing, a number is an error's status, "" is an answer as it should be.
        asked: the ranges that were asked for.
    """

    def __init__(self) -> None:
        self.faults: list[str | int] = []
        self.asked: list[str] = []
        self._application = DomainDispatcherApplication(create_backend_app)
        self._closing = threading.Event()
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True)
        self.env = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._server.server_port}", **KEY}

    def __enter__(self) -> "S3Server":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self._client().create_bucket(Bucket=BUCKET)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()

    def upload(self, path: Path, key: str) -> str:
        """Upload a file; returns its URL."""
        self._client().upload_file(str(path), BUCKET, key)
        return f"s3://{BUCKET}/{key}"

    def _client(self) -> Any:
        names = {"aws_access_key_id": "AWS_ACCESS_KEY_ID", "aws_secret_access_key": "AWS_SECRET_ACCESS_KEY"}
        keys = {name: KEY[variable] for name, variable in names.items()}
        return boto3.client("s3", endpoint_url=self.env["AWS_ENDPOINT_URL"], region_name="us-east-1", **keys)

    def _answer(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        asked = environ.get("HTTP_RANGE")
        if environ["REQUEST_METHOD"] != "GET" or asked is None:
            return self._application(environ, start_response)  # type: ignore[no-any-return]
        self.asked.append(asked.removeprefix("bytes="))
        fault = self.faults.pop(0) if self.faults else ""
        if isinstance(fault, int):
            start_response(f"{fault} Failed", [("Content-Length", "0")])
            return []
        if fault == "hang":
            self._closing.wait()
        body = b"".join(self._application(environ, start_response))
        return [body[: len(body) // 2] if fault == "drop" else body]
