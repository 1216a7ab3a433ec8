"""Test files on web servers with and without range support, and URL schemes whose package is missing."""

from __future__ import annotations

import gzip
import importlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from faulty_proxy import FaultyProxy, Rule

from open_lm import storage
from open_lm.errors import StorageError
from open_lm.storage import paths as storage_files
from open_lm.storage import retries as storage_errors


class NoRangesHandler(SimpleHTTPRequestHandler):
    """Python's standard file server, which does not support ranges, without its log."""

    def log_message(self, *args: object) -> None: ...


class RangesHandler(NoRangesHandler):
    """A handler that answers range requests, with an ETag."""

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        data = path.read_bytes()
        first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
        part = data[int(first) : int(last) + 1]
        self.send_response(206 if part else 416)
        self.send_header("Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(part)))
        self.send_header("ETag", f'W/"{hash(data)}"')
        self.end_headers()
        self.wfile.write(part)


@pytest.fixture(params=[NoRangesHandler, RangesHandler])
def site(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """Serve the folder "www" behind the proxy."""
    monkeypatch.setattr(storage_files, "BLOCK_BYTES", 100_000)
    monkeypatch.setattr(storage_errors, "_pause", lambda seconds: None)
    (tmp_path / "www").mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(request.param, directory=tmp_path / "www"))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    with FaultyProxy(f"http://127.0.0.1:{server.server_address[1]}") as proxy:
        yield proxy
    server.shutdown()
    server.server_close()


def test_web_files_are_read_and_seekable(site: FaultyProxy, tmp_path: Path) -> None:
    data = os.urandom(950_000)
    (tmp_path / "www" / "a b ü.bin").write_bytes(data)
    (tmp_path / "www" / "empty").write_bytes(b"")
    url = f"{site.endpoint}/a b ü.bin"
    assert storage.read_bytes(url) == data and storage.size(url) == len(data) and storage.exists(url)
    with storage.open_file(url) as file:
        file.seek(-10, os.SEEK_END)
        assert file.read() == data[-10:]
        file.seek(500_000)
        assert file.read(7) == data[500_000:500_007]
    storage.download(url, tmp_path / "downloaded")
    assert (tmp_path / "downloaded").read_bytes() == data
    assert storage.read_bytes(f"{site.endpoint}/empty") == b""


@pytest.mark.parametrize("kind", ["500", "503", "reset", "reset_body", "truncate"])
def test_web_server_faults_do_not_truncate_files(site: FaultyProxy, tmp_path: Path, kind: str) -> None:
    text = "Zeile\n" * 200_000
    (tmp_path / "www" / "a.gz").write_bytes(gzip.compress(text.encode(), compresslevel=0))
    site.rules = [Rule(kind, times=3)]
    with storage.open_file(f"{site.endpoint}/a.gz") as file, gzip.open(file, "rt") as lines:
        assert lines.read() == text
    assert site.injected[kind] == 3


def test_web_errors_name_the_url_and_the_reason(site: FaultyProxy) -> None:
    for function in (storage.read_bytes, storage.size):
        with pytest.raises(StorageError, match=r"/absent: no such file"):
            function(f"{site.endpoint}/absent")
    assert not any(storage.exists(f"{prefix}{site.endpoint}/absent") for prefix in ("", storage.FSSPEC_PREFIX))
    site.rules = [Rule("500")]
    with pytest.raises(StorageError, match=r"/absent: HTTPError: HTTP Error 500"):
        storage.exists(f"{site.endpoint}/absent")
    with pytest.raises(StorageError, match="the server cannot be reached"):
        storage.read_bytes("http://127.0.0.1:1/x")
    for prefix in ("", storage.FSSPEC_PREFIX):
        for listing in (storage.glob, storage.list_files):
            with pytest.raises(StorageError, match="a web server cannot be listed"):
                listing(f"{prefix}{site.endpoint}/*.gz")
    with pytest.raises(StorageError, match="a web server cannot be written to"):
        storage.write_text(f"{site.endpoint}/x", "x")
    with pytest.raises(StorageError, match="cannot be removed"):
        storage.remove(f"{site.endpoint}/x")


@pytest.mark.parametrize("site", [RangesHandler], indirect=True)
def test_a_web_file_that_changes_during_a_read_is_an_error(site: FaultyProxy, tmp_path: Path) -> None:
    (tmp_path / "www" / "x").write_bytes(b"a" * 900_000)
    with storage.open_file(f"{site.endpoint}/x") as file:
        file.read(10)
        (tmp_path / "www" / "x").write_bytes(b"b" * 900_000)
        with pytest.raises(StorageError, match="the file changed while it was being read"):
            file.seek(500_000)
            file.read()


def test_fsspec_reads_web_files_and_does_not_report_failures_as_missing(site: FaultyProxy, tmp_path: Path) -> None:
    (tmp_path / "www" / "x").write_bytes(b"0123456789")
    site.rules = [Rule("503", times=4)]  # fsspec's HEAD and GET, twice each
    assert storage.size(f"{storage.FSSPEC_PREFIX}{site.endpoint}/x") == 10
    assert site.injected["503"] == 4


@pytest.mark.parametrize(
    ("url", "package", "message"),
    [
        ("gs://b/x", "gcsfs", "needs a package that is not installed .*gcsfs"),
        ("hf://datasets/a/b/x", "huggingface_hub", r'huggingface-hub is not installed.*pip install "open_lm\[\w+\]"'),
    ],
)
@pytest.mark.parametrize("function", [storage.read_bytes, storage.glob, storage.exists])
def test_errors_name_a_missing_package(
    monkeypatch: pytest.MonkeyPatch, url: str, package: str, message: str, function: Callable[[str], object]
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    importlib.import_module("fsspec")
    registry = sys.modules["fsspec.registry"]._registry  # fsspec.registry itself is a read-only view of it
    monkeypatch.delitem(registry, url.partition(":")[0], raising=False)
    with pytest.raises(StorageError, match=message):
        function(url)
