import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from sparsekern.paper.download import download

CONTENT = bytes(range(256)) * 2000
CHECKSUM = hashlib.md5(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves CONTENT at every path; ``breaks`` holds the number of bytes after which to hang up, a request each."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.breaks = []
        self.ranges = True
        self.content = CONTENT
        self.asked = []

    def url(self, path="file"):
        return f"http://127.0.0.1:{self.server_port}/{path}"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server, wanted = self.server, self.headers.get("Range")
        server.asked.append(wanted)
        if self.path == "/missing":
            self.send_error(404)
            return
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and server.ranges else 0
        if start >= len(server.content):
            self.send_error(416)
            return
        body = server.content[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: server.breaks.pop(0)] if server.breaks else body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def left(folder):
    return sorted(path.name for path in folder.iterdir())


def test_whole_file(server, tmp_path):
    sizes = []
    download([server.url()], tmp_path / "new" / "file", CHECKSUM, lambda *done: sizes.append(done))
    assert (tmp_path / "new" / "file").read_bytes() == CONTENT
    assert left(tmp_path / "new") == ["file"]
    assert sizes[-1] == (len(CONTENT), len(CONTENT))


def test_a_broken_off_transfer_goes_on_where_it_stopped(server, tmp_path):
    server.breaks = [100_000, 50_000]
    download([server.url()], tmp_path / "file", CHECKSUM)
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert server.asked == [None, "bytes=100000-", "bytes=150000-"]


def test_a_part_of_an_earlier_attempt_is_used(server, tmp_path):
    (tmp_path / "file.part").write_bytes(CONTENT[:300_000])
    download([server.url()], tmp_path / "file", CHECKSUM)
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert server.asked == ["bytes=300000-"]


def test_a_whole_part_needs_no_more(server, tmp_path):
    (tmp_path / "file.part").write_bytes(CONTENT)
    download([server.url()], tmp_path / "file", CHECKSUM)
    assert left(tmp_path) == ["file"]


def test_a_server_without_ranges_sends_all_again(server, tmp_path):
    server.ranges, server.breaks = False, [100_000]
    download([server.url()], tmp_path / "file", CHECKSUM)
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_a_wrong_part_is_dropped_and_the_next_mirror_asked(server, tmp_path):
    (tmp_path / "file.part").write_bytes(b"x" * 1000)
    download([server.url("a"), server.url("b")], tmp_path / "file", CHECKSUM)
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_a_missing_file_goes_to_the_next_mirror(server, tmp_path):
    download([server.url("missing"), server.url()], tmp_path / "file", CHECKSUM)
    assert len(server.asked) == 2


def test_what_never_comes_whole_stays_as_a_part(server, tmp_path):
    server.breaks = [1000] + [0] * 20
    with pytest.raises(OSError, match="no mirror had it") as error:
        download([server.url()], tmp_path / "file", CHECKSUM)
    assert f"broke off after 1000 of {len(CONTENT)} bytes" in str(error.value)
    assert left(tmp_path) == ["file.part"]
    assert len(server.asked) == 4


def test_wrong_content_never_takes_the_name(server, tmp_path):
    server.content = b"something else"
    with pytest.raises(OSError, match=f"wants MD5 {CHECKSUM}, got"):
        download([server.url()], tmp_path / "file", CHECKSUM)
    assert left(tmp_path) == []
