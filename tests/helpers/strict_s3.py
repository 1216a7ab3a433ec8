"""A small S3 server on loopback that refuses checksum fields, as several stores other than Amazon's do.

    with StrictS3("swift") as store:
        ...                             # AWS_ENDPOINT_URL=store.endpoint, any credentials
    assert store.objects["bucket/key"] == data and store.refused["MalformedXML"] == 1

It keeps objects in memory, verifies Content-MD5 and knows the requests that a client needs to read, list and write
files, also in parts. It does not check signatures.
"""

from __future__ import annotations

import datetime
import hashlib
import ipaddress
import os
import re
import ssl
import threading
import uuid
from base64 import b64encode
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

KINDS = {
    "swift": "ignore checksum headers; answer 400 MalformedXML if the parts of a complete upload have checksums",
    "minio": "answer 501 NotImplemented to every request with a checksum header, also to HEAD and GET",
    "ceph": "ignore checksum headers of reads; answer 400 InvalidArgument to those of writes, without storing",
    "silent": "ignore checksum headers and checksum fields",
}
_TIME = "2024-01-01T00:00:00.000Z"
_HTTP_TIME = "Mon, 01 Jan 2024 00:00:00 GMT"
_MIN_PART_BYTES = 5 << 20


class StrictS3:
    """A server of a kind of `KINDS` at `endpoint`.

    Counters: `requests` by method, `refused` by error code, `checksum_headers` by name, `md5_headers`. The server
    changes the first byte of the next `corrupt` uploads after it has checked them, as a faulty disk would, and loses
    the objects of the next `lose_completions` multipart uploads. With a `certificate` (see `write_certificate`) it is
    an https server, for which clients send checksums as trailers; no kind accepts these.
    """

    def __init__(self, kind: str, certificate: str | os.PathLike[str] | None = None) -> None:
        if kind not in KINDS:
            raise ValueError(f"unknown kind of store {kind!r}; expected one of {', '.join(KINDS)}")
        self.kind = kind
        self.objects: dict[str, bytes] = {}
        self.etags: dict[str, str] = {}
        self.uploads: dict[str, dict[int, bytes]] = {}
        self.requests: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.checksum_headers: Counter[str] = Counter()
        self.md5_headers = 0
        self.corrupt = 0
        self.lose_completions = 0
        self.lock = threading.Lock()
        self._server = _Server(self)
        self._scheme = "https" if certificate else "http"
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    @property
    def endpoint(self) -> str:
        return f"{self._scheme}://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def store(self, data: bytes) -> bytes:
        """Return `data` as the server stores it, see `corrupt`."""
        with self.lock:
            if not self.corrupt or not data:
                return data
            self.corrupt -= 1
        return bytes([data[0] ^ 1]) + data[1:]


def write_certificate(path: Path) -> None:
    """Write a key and a certificate for 127.0.0.1 that is its own authority."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.timezone.utc)
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now - datetime.timedelta(1)).not_valid_after(now + datetime.timedelta(1))
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    certificate = builder.add_extension(address, critical=False).sign(key, hashes.SHA256())
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain)
    path.write_bytes(private + certificate.public_bytes(pem))


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, store: StrictS3) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.store = store

    def handle_error(self, request: object, client_address: object) -> None:
        """Do not print a traceback when a client closes its connection."""


class _Refusal(Exception):
    def __init__(self, status: int, code: str) -> None:
        super().__init__(code)
        self.status, self.code = status, code


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def _handle(self) -> None:
        self.store = self.server.store
        url = urlsplit(self.path)
        self.name, self.query = unquote(url.path).strip("/"), parse_qs(url.query, keep_blank_values=True)
        body = self._read_body()
        with self.store.lock:
            self.store.requests[self.command] += 1
        try:
            self._check_headers(body)
            getattr(self, f"_{self.command.lower()}")(body)
        except _Refusal as refusal:
            with self.store.lock:
                self.store.refused[refusal.code] += 1
            text = f"<Error><Code>{refusal.code}</Code><Message>refused</Message></Error>"
            self._answer(refusal.status, text.encode())

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _handle

    def _read_body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            while size := int(self.rfile.readline().split(b";")[0], 16):
                self.rfile.read(size + 2)
            self.rfile.readline()
            return b""  # no kind accepts the trailers that come with this encoding
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _check_headers(self, body: bytes) -> None:
        """Refuse what the kind of store refuses, and a body that does not have its Content-MD5."""
        is_write = self.command in ("PUT", "POST")
        if "x-amz-trailer" in self.headers or "aws-chunked" in self.headers.get("Content-Encoding", ""):
            raise _Refusal(501, "NotImplemented")
        names = [name.lower() for name in self.headers if re.match("x-amz-(sdk-)?checksum-", name.lower())]
        with self.store.lock:
            self.store.checksum_headers.update(names)
            self.store.md5_headers += "Content-MD5" in self.headers
        if names and self.store.kind == "minio":
            raise _Refusal(501, "NotImplemented")
        if names and self.store.kind == "ceph" and is_write:
            raise _Refusal(400, "InvalidArgument")
        if self.headers.get("Content-MD5", md5 := b64encode(hashlib.md5(body).digest()).decode()) != md5:
            raise _Refusal(400, "BadDigest")

    # ------------------------------------------------------------------------------------------ operations
    def _put(self, body: bytes) -> None:
        if "/" not in self.name:
            self._answer(200)  # create a bucket
            return
        data = self.store.store(body)
        etag = hashlib.md5(data).hexdigest()
        if "uploadId" in self.query:
            parts = self.store.uploads.get(self.query["uploadId"][0])
            if parts is None:
                raise _Refusal(404, "NoSuchUpload")
            parts[int(self.query["partNumber"][0])] = data
        else:
            self.store.objects[self.name], self.store.etags[self.name] = data, etag
        self._answer(200, headers={"ETag": f'"{etag}"'})

    def _post(self, body: bytes) -> None:
        if "uploads" in self.query:
            upload = uuid.uuid4().hex
            self.store.uploads[upload] = {}
            self._answer(200, f"<InitiateMultipartUploadResult><UploadId>{upload}</UploadId>"
                              "</InitiateMultipartUploadResult>".encode())  # fmt: skip
            return
        upload = self.query["uploadId"][0]
        parts = self.store.uploads.get(upload)
        if parts is None:
            raise _Refusal(404, "NoSuchUpload")
        text = body.decode()
        if "<Checksum" in text and self.store.kind != "silent":
            raise _Refusal(400, "MalformedXML")
        digests = {number: hashlib.md5(data) for number, data in sorted(parts.items())}
        listed = re.findall(r"<Part>.*?</Part>", text.replace("&quot;", ""), re.DOTALL)
        numbers, etags = (re.findall(f'<{tag}>"?(\\w+)"?<', "".join(listed)) for tag in ("PartNumber", "ETag"))
        found = dict(zip(map(int, numbers), etags, strict=True))
        if found != {number: digest.hexdigest() for number, digest in digests.items()}:
            raise _Refusal(400, "InvalidPart")
        if any(len(parts[number]) < _MIN_PART_BYTES for number in list(digests)[:-1]):
            raise _Refusal(400, "EntityTooSmall")
        etag = f"{hashlib.md5(b''.join(digest.digest() for digest in digests.values())).hexdigest()}-{len(digests)}"
        del self.store.uploads[upload]
        if self.store.lose_completions:
            self.store.lose_completions -= 1
            self._answer(200)
            return
        self.store.objects[self.name], self.store.etags[self.name] = b"".join(map(parts.get, digests)), etag  # type: ignore[arg-type]
        self._answer(200, f'<CompleteMultipartUploadResult><ETag>"{etag}"</ETag>'
                          "</CompleteMultipartUploadResult>".encode())  # fmt: skip

    def _delete(self, body: bytes) -> None:
        if "uploadId" in self.query:
            self.store.uploads.pop(self.query["uploadId"][0], None)
        else:
            self.store.objects.pop(self.name, None)
        self._answer(204)

    def _get(self, body: bytes) -> None:
        if "/" not in self.name:
            self._list()
            return
        data = self.store.objects.get(self.name)
        if data is None:
            raise _Refusal(404, "NoSuchKey")
        headers = {"ETag": f'"{self.store.etags[self.name]}"', "Last-Modified": _HTTP_TIME}
        if match := re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(match[1]), min(int(match[2] or len(data)), len(data) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
            self._answer(206, data[start : end + 1], headers)
        else:
            self._answer(200, data, headers)

    _head = _get

    def _list(self) -> None:
        prefix, delimiter = (self.query.get(key, [""])[0] for key in ("prefix", "delimiter"))
        names = sorted(name.partition("/")[2] for name in list(self.store.objects) if name.startswith(f"{self.name}/"))
        rows, folders = [], set()
        for name in names:
            rest = name.removeprefix(prefix)
            if not name.startswith(prefix):
                continue
            if delimiter and delimiter in rest:
                folders.add(prefix + rest.partition(delimiter)[0] + delimiter)
                continue
            full = f"{self.name}/{name}"
            rows.append(
                f"<Contents><Key>{escape(name)}</Key><Size>{len(self.store.objects[full])}</Size>"
                f"<LastModified>{_TIME}</LastModified><ETag>&quot;{self.store.etags[full]}&quot;</ETag></Contents>"
            )
        rows += [f"<CommonPrefixes><Prefix>{escape(folder)}</Prefix></CommonPrefixes>" for folder in sorted(folders)]
        text = f"<ListBucketResult><IsTruncated>false</IsTruncated>{''.join(rows)}</ListBucketResult>"
        self._answer(200, text.encode())

    def _answer(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response_only(status)
        for name, value in {"Content-Type": "application/xml", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Disable logging; tests use the counters."""
