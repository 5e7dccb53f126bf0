"""A Julia package server on 127.0.0.1, of the packages that the Julia environment of this machine has by their paths.

package_server.jl makes the registry; here it is served, by a server that can be told to die or to stall.
"""

from __future__ import annotations

import io
import ssl
import subprocess
import tarfile
import threading
from collections.abc import Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

from conftest import read_toml


def make_index(julia: str, target: Path, manifest: Path, folders: Iterable[Path]) -> dict[str, Path]:
    """The folder of each path that a client asks for: a registry in ``target``, and the packages of it."""
    command = [julia, "--startup-file=no", Path(__file__).with_suffix(".jl"), target, manifest, *folders]
    subprocess.run(command, check=True)
    return {path: Path(folder) for path, folder in read_toml(target / "index.toml").items()}


def pack(folder: Path) -> bytes:
    """A folder as the archive that Julia unpacks."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1) as archive:
        for path in sorted(folder.iterdir()):
            if path.name != ".git":
                archive.add(path, path.name)
    return buffer.getvalue()


class PackageServer(ThreadingHTTPServer):
    """Serves an index in threads of its own, from the start of its ``with`` block to the end.

    ``packages`` counts the packages that were asked for. After ``healthy`` of them, if that is a number, the server "dies",
    which is to say that nobody listens any more, or "stalls": it takes every request and answers none. With a ``certificate``,
    the file of it and that of its key, it speaks HTTPS.
    """

    daemon_threads = True

    def __init__(
        self,
        index: dict[str, Path],
        healthy: int | None = None,
        then: str = "dies",
        certificate: tuple[Path, Path] | None = None,
    ) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.index, self.healthy, self.then = index, healthy, then
        self.scheme = "http" if certificate is None else "https"
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*certificate)
            self.socket = context.wrap_socket(self.socket, server_side=True)
        self.packages = 0
        self.lock, self.over = threading.Lock(), threading.Event()

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> PackageServer:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *reason: object) -> None:
        self.over.set()
        self.stop()

    def stop(self) -> None:
        self.shutdown()
        self.server_close()

    def is_healthy(self, path: str) -> bool:
        """Note a request for that path; whether it is to be answered."""
        with self.lock:
            self.packages += "/package/" in path
            return self.healthy is None or self.packages <= self.healthy


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: PackageServer

    def do_GET(self) -> None:
        if self.server.is_healthy(self.path):
            self.answer()
        elif self.server.then == "dies":
            self.close_connection = True
            self.server.stop()
        else:
            self.server.over.wait()

    def answer(self) -> None:
        path, content = urlsplit(self.path).path, None  # all of an address comes where this is the proxy
        if path in ("/registries", "/registries.eager", "/registries.conservative"):
            content = "\n".join(path for path in self.server.index if path.startswith("/registry/")).encode()
        elif folder := self.server.index.get(path):
            content = pack(folder)
        self.send_response(404 if content is None else 200)
        self.send_header("Content-Length", str(len(content or b"")))
        self.end_headers()
        self.wfile.write(content or b"")

    def log_message(self, *arguments: object) -> None:
        pass
