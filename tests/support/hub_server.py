"""A model hub on the loopback address: the part of the Hugging Face hub's HTTP interface that downloads use."""

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextlib.contextmanager
def hub_server(repository: str, files: Mapping[str, bytes]) -> Iterator[tuple[str, list[str]]]:
    """Serve `files` as the one revision `main` of `repository`; yields the address and the files downloaded."""
    downloaded: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, *, body: bool) -> None:
            path = self.path.split("?")[0]
            revisions = (COMMIT, "main")
            about = [f"/api/models/{repository}", *(f"/api/models/{repository}/revision/{r}" for r in revisions)]
            if path in about:
                siblings = [{"rfilename": name} for name in files]
                self._send(200, json.dumps({"id": repository, "sha": COMMIT, "siblings": siblings}).encode())
            elif path in [f"/api/models/{repository}/tree/{revision}" for revision in revisions]:
                self._send(200, json.dumps([_entry(name, data) for name, data in files.items()]).encode())
            elif path.startswith(f"/{repository}/resolve/{COMMIT}/"):
                name = path.removeprefix(f"/{repository}/resolve/{COMMIT}/")
                if name not in files:
                    self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
                    return
                if body:
                    downloaded.append(name)
                self._send(200, files[name], {"ETag": f'"{_blob(files[name])}"', "X-Repo-Commit": COMMIT}, body=body)
            else:
                known = path.startswith((f"/api/models/{repository}/", f"/{repository}/"))
                self._send(404, b"", {"X-Error-Code": "RevisionNotFound" if known else "RepoNotFound"})

        def _send(self, status: int, data: bytes, headers: Mapping[str, str] = {}, *, body: bool = True) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if body:
                self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            """Stay silent."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", downloaded
        finally:
            server.shutdown()
            thread.join()


def _entry(name: str, data: bytes) -> dict[str, object]:
    return {"type": "file", "oid": _blob(data), "size": len(data), "path": name}


def _blob(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
