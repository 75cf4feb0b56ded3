"""Inputs at an address: read as the same file on disk, or refused with code 3; never less of it in silence."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from data_samples import RunCommand

from megatrain.data import open_dataset

LINES = b"".join(b'{"text": "line %d <a href=\'b.jsonl\'>of</a> %s"}\n' % (n, b"many words " * 9) for n in range(3000))
FILES = {"a.jsonl": LINES, "a.jsonl.gz": gzip.compress(LINES)}


class Handler(BaseHTTPRequestHandler):
    """Serves FILES below a folder whose name says what is odd about this server."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        folder, _, name = self.path.partition("?")[0].strip("/").partition("/")
        if name not in FILES:
            self.send_error(404)
            return
        data, wanted = FILES[name], self.headers.get("Range")
        self.send_response(206 if wanted and folder != "whole" else 200)
        if wanted and folder != "whole":
            first, last = (int(place) for place in wanted.removeprefix("bytes=").split("-"))
            self.send_header("Content-Range", f"bytes {first}-{min(last, len(data) - 1)}/{len(data)}")
            data = data[first : last + 1]
        self.send_header("Content-Type", "text/html" if folder == "page" else "application/octet-stream")
        self.send_header("Accept-Ranges", "none" if folder == "whole" else "bytes")
        if folder == "endless":
            self.send_header("Transfer-Encoding", "chunked")
            data = b"%x\r\n%s\r\n0\r\n\r\n" % (len(data), data)
        else:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data[: len(data) // 2] if folder == "torn" else data)
        self.close_connection = folder == "torn"

    def log_message(self, *arguments: object) -> None:
        """Nothing."""


class Server(ThreadingHTTPServer):
    """Says nothing of readers that go away."""

    def handle_error(self, request: object, client_address: object) -> None:
        """Nothing."""


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize(
    "address",
    [
        "ranges/a.jsonl",
        "ranges/a.jsonl.gz?download=true&at=x/y",
        "ranges/a.jsonl?download=true",
        "page/a.jsonl",
        "whole/a.jsonl",
        "whole/a.jsonl.gz",
        "endless/a.jsonl.gz",
    ],
)
def test_every_server_kind_delivers_every_line(
    address: str, url: str, tmp_path: Path, tokenizer_path: Path, run_command: RunCommand
) -> None:
    arguments = ("--tokenizer", tokenizer_path, "--out", tmp_path / "out", "--workers", 1)
    assert run_command("tokenize", f"{url}/{address}", *arguments)[0] == 0
    assert open_dataset(tmp_path / "out").num_documents == 3000


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("endless/a.jsonl", "does not say how large it is"),
        ("torn/a.jsonl", "a.jsonl cannot be read: "),
        ("ranges/none.jsonl", "none.jsonl cannot be listed: 404"),
    ],
)
def test_a_failing_server_exits_3(
    address: str, message: str, url: str, tmp_path: Path, tokenizer_path: Path, run_command: RunCommand
) -> None:
    good = f"{url}/ranges/a.jsonl"
    arguments = ("--tokenizer", tokenizer_path, "--out", tmp_path / "out", "--workers", 1)
    code, _, err = run_command("tokenize", good, f"{url}/{address}", *arguments)
    assert code == 3
    assert message in err
    assert "Traceback" not in err


def test_reports_of_cleaned_folders_are_no_remote_input(
    tmp_path: Path, tokenizer_path: Path, run_command: RunCommand
) -> None:
    import fsspec

    store = fsspec.filesystem("memory")
    store.pipe({"/.mine/clean/a.jsonl": b'{"text": "a"}\n', "/.mine/clean/.report/report.txt": b"no document"})
    arguments = ("--tokenizer", tokenizer_path, "--out", tmp_path / "out", "--workers", 1)
    assert run_command("tokenize", "memory://.mine/clean", *arguments)[0] == 0
    assert open_dataset(tmp_path / "out").num_documents == 1
