"""A hub on the loopback that serves one repository, as the real one does or with a fault."""

import base64
import hashlib
import itertools
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

NAME, SHA = "someone/tiny", "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_for_the_loopback"
"""Allows to write."""
HANGS_S = 3
"""Seconds of an answer that hangs: past the limits that the tests give the client."""
LARGE = 4096
"""Bytes from which a file is named by its SHA-256, as the hub does with large files."""


def blob_digest(content: bytes) -> str:
    """Return a file's ETag as the hub computes it."""
    if len(content) >= LARGE:
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


@contextmanager
def serving(folder: Path, fault: str, file: str, times: int | None = None) -> Iterator[str]:
    """Serve a folder as NAME at SHA; its address.

    Args:
        folder: the repository's files.
        fault: none, hang, drop, garbage (not what was asked for), rot (a changed byte) or error (500).
        file: where the fault is: a file's name, or "" for the list of files.
        times: how many answers have the fault; None: all of them.
    """
    over = threading.Event()
    left = itertools.repeat(True) if times is None else iter([True] * times)

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def do_GET(self) -> None:
            self.answer(with_body=True)

        def do_POST(self) -> None:
            """Take a commit as the hub does: whole files, in lines of JSON."""
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                self.send_error(401)
                return
            answer: dict[str, Any] = {}
            if self.path == "/api/repos/create":
                asked = json.loads(body)
                (folder / "created.json").write_text(json.dumps(asked))
                answer = {"url": f"http://{self.headers['Host']}/{NAME}"}
            elif "/preupload/" in self.path:
                files = json.loads(body)["files"]
                modes = {"uploadMode": "regular", "shouldIgnore": False}
                answer = {"files": [{"path": one["path"], **modes} for one in files]}
            elif "/commit/" in self.path:
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        content = base64.b64decode(line["value"]["content"])
                        (folder / line["value"]["path"]).write_bytes(content)
                answer = {
                    "commitUrl": f"http://{self.headers['Host']}/{NAME}/commit/{SHA}", "commitOid": SHA
                }  # fmt: skip
            sent = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(sent)))
            self.end_headers()
            self.wfile.write(sent)

        def answer(self, *, with_body: bool) -> None:
            path = self.path.split("?")[0]
            is_list = path.startswith("/api/models/")
            name = "" if is_list else path.rsplit("/", 1)[-1]
            if is_list:
                body, headers = self.listing(path), {"Content-Type": "application/json"}
            elif not (folder / name).is_file():
                self.send_error(404)
                return
            else:
                body = (folder / name).read_bytes()
                headers = {"ETag": f'"{blob_digest(body)}"', "X-Repo-Commit": SHA}
            at_fault = fault != "none" and name == file
            if at_fault and (is_list or with_body or fault != "rot") and next(left, False):
                if fault == "hang":
                    over.wait(HANGS_S)
                    return
                if fault == "error":
                    self.send_error(500)
                    return
                if fault == "garbage":
                    body = b"<html>an inn's page to log in</html>"
                if fault == "rot":
                    body = bytes([body[0] ^ 1]) + body[1:]
            self.send_response(200)
            for key, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            if with_body:
                is_dropped = fault == "drop" and at_fault
                self.wfile.write(body[: len(body) // 2] if is_dropped else body)

        def listing(self, path: str) -> bytes:
            files = {item.name: item.read_bytes() for item in sorted(folder.iterdir())}
            if "/tree/" in path:
                tree = []
                for name, content in files.items():
                    entry: dict[str, Any] = {"type": "file", "path": name, "size": len(content)}
                    entry["oid"] = blob_digest(content)[:40]
                    if len(content) >= LARGE:
                        digest = blob_digest(content)
                        entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 130}
                    tree.append(entry)
                return json.dumps(tree).encode()
            siblings = [{"rfilename": name} for name in files]
            return json.dumps({"id": NAME, "sha": SHA, "siblings": siblings}).encode()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        over.set()
        server.shutdown()
        thread.join()
        server.server_close()
