"""The page's doors: names that a request makes up, files of others, other names, other pages, addresses."""

import asyncio

import pytest

from tools.page.guard import guarded
from tools.page.visits import Visits, own


def test_a_visit_may_have_any_name_and_touches_only_its_own_files(tmp_path):
    """A request chooses the name of its visit."""
    victim = tmp_path / "photographs"
    victim.mkdir()
    (victim / "one.jpg").touch()
    (tmp_path / "app").mkdir()
    visits = Visits(tmp_path / "app" / "results")
    for name in (str(victim), "../../photographs", "..", ".", "", "a/../../..", "\0", "x" * 5000, "~"):
        folder = visits.results(name)
        assert folder.parent == visits.folder and folder.is_dir()
        visits.end(name)
        assert not folder.exists()
    visits.end_old(-1)
    assert (victim / "one.jpg").exists() and visits.folder.is_dir()


def test_uploads_that_were_broken_off_are_swept_and_count(tmp_path):
    visits = Visits(tmp_path / "results")
    (tmp_path / "0a1b").mkdir()
    (tmp_path / "0a1b" / "part.png").write_bytes(b"x" * 1000)
    (tmp_path / "example.png").write_bytes(b"x" * 10)
    assert visits.bytes() == 1010
    visits.end_old(3600)
    assert visits.bytes() == 1010
    visits.end_old(-1)
    assert visits.bytes() == 10 and visits.folder.is_dir()


def test_only_files_of_the_app_are_read(tmp_path):
    gradio = pytest.importorskip("gradio")
    folder, secret = tmp_path / "app", tmp_path / "secret.png"
    folder.mkdir()
    secret.touch()
    (folder / "upload.png").touch()
    (folder / "link.png").symlink_to(secret)
    assert own(str(folder / "upload.png"), folder) == (folder / "upload.png").resolve()
    for path in (secret, folder / "../secret.png", folder / "link.png", "/etc/passwd", folder, "a\0b", "x" * 5000, ""):
        with pytest.raises(gradio.Error):
            own(str(path), folder)


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("GET", "/", {"host": "127.0.0.1:7860"}, 200),
        ("GET", "/", {"host": "localhost:7860"}, 200),
        ("GET", "/", {"host": "[::1]:7860"}, 200),
        ("POST", "/x", {"host": "localhost:7860", "origin": "http://localhost:7860"}, 200),
        ("POST", "/x", {"host": "localhost:7860"}, 200),  # no browser
        ("GET", "/", {"host": "evil.example:7860"}, 421),
        ("GET", "/", {"host": "127.0.0.1.evil.example"}, 421),
        ("GET", "/", {}, 421),
        ("POST", "/x", {"host": "localhost:7860", "origin": "http://evil.example"}, 403),
        ("POST", "/x", {"host": "localhost:7860", "origin": "http://localhost:8000"}, 403),
        ("POST", "/x", {"host": "localhost:7860", "origin": "null"}, 403),
        ("PUT", "/x", {"host": "localhost:7860", "sec-fetch-site": "cross-site"}, 403),
        ("GET", "/gradio_api/file=http://evil.example/x", {"host": "localhost"}, 403),
        ("GET", "/gradio_api/file/http://evil.example/x", {"host": "localhost"}, 403),
        ("GET", "/gradio_api/file/HTTPS%3A//evil.example/x", {"host": "localhost"}, 403),
        ("GET", "/gradio_api/proxy=evil.example", {"host": "localhost"}, 403),
        ("POST", "/gradio_api/upload", {"host": "localhost"}, 507),
    ],
)
def test_the_page_is_guarded(method, path, headers, status):
    sent = []

    async def page(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": method, "path": path, "query_string": b""}
    scope["headers"] = [(key.encode(), value.encode()) for key, value in headers.items()]
    asyncio.run(guarded(page, "127.0.0.1", has_room=lambda: False)(scope, None, send))
    assert sent[0]["status"] == status and sum(message["type"] == "http.response.start" for message in sent) == 1
    given = dict(sent[0]["headers"])
    assert (
        given[b"x-content-type-options"] == b"nosniff"
        and b"frame-ancestors 'none'" in given[b"content-security-policy"]
    )


def test_seen_by_all_it_answers_to_addresses_but_to_no_names():
    async def page(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})

    for host, status in (("192.0.2.7:7860", 200), ("evil.example", 421)):
        sent = []

        async def send(message, sent=sent):
            sent.append(message)

        scope = {"type": "http", "method": "GET", "path": "/", "headers": [(b"host", host.encode())]}
        asyncio.run(guarded(page, "::")(scope, None, send))
        assert sent[0]["status"] == status
