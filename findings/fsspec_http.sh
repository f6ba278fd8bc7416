#!/usr/bin/env bash
# fsspec 2026.9.0, over HTTP: wrong bytes of a server without Range, half files, and forked processes that stand still.
#
# The guess: cat_file(url, 100, 200) gives 100 bytes or an error, as reading by open() does; a download that fails leaves
# no file; a file system belongs to the process that made it, and a forked one has nothing to do with it. Seen: a server
# that answers 200 with everything, as HTTP lets it, makes cat_file give everything; get_file leaves what had come; and
# the forked process's garbage collector comes upon the parent's file systems (each is a cycle, and fork clears their
# cache), closes them by an event loop whose thread it lacks, and waits a second for each. Output, 2026-11-28:
#
#     100 bytes of 1,000,000 asked for    cat_file: 1,000,000   open and seek: ValueError
#     the connection lost at half         get_file: ClientPayloadError   left behind: 500,000
#     a forked process collects garbage   1 s or more for each file system: True
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check fsspec==2026.9.0 aiohttp==3.14.5
cd "$work"
"$work/venv/bin/python" - <<'PY'
import gc
import os
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import fsspec

SIZE = 1_000_000


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.send_response(200)
        self.send_header("Content-Length", str(SIZE))
        self.end_headers()

    def do_GET(self):
        self.do_HEAD()
        try:
            self.wfile.write(bytes(SIZE // 2 if self.path == "/half" else SIZE))
        except ConnectionError:
            pass  # the reader has gone


def tried(function):
    try:
        return f"{function():,}"
    except Exception as error:
        return type(error).__name__


def by_seeking(url):
    with fsspec.open(url, block_size=1000) as file:
        file.seek(5000)
        return len(file.read(100))


server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
url = f"http://127.0.0.1:{server.server_port}"
part = tried(lambda: len(fsspec.filesystem("http").cat_file(f"{url}/whole", 5000, 5100)))
sought = tried(lambda: by_seeking(f"{url}/whole"))
print(f"100 bytes of 1,000,000 asked for    cat_file: {part}   open and seek: {sought}")
lost = tried(lambda: fsspec.filesystem("http").get_file(f"{url}/half", "half"))
print(f"the connection lost at half         get_file: {lost}   left behind: {os.path.getsize('half'):,}")
child = os.fork()
if child == 0:
    begin = time.monotonic()
    gc.collect()
    os._exit(time.monotonic() - begin >= 1)
slow = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
print(f"a forked process collects garbage   1 s or more for each file system: {slow}")
assert (part, sought, lost, slow) == ("1,000,000", "ValueError", "ClientPayloadError", True), "the behaviour has changed"
assert os.path.getsize("half") == SIZE // 2, "the behaviour has changed"
PY
