"""Many visitors at once, who come, look and go while others' photographs are cleared up."""

import io
import random
import socket
import threading
import time

import pytest
from PIL import Image

pytest.importorskip("uvicorn")

from tests.page import Server

VISITORS = 12


def visit(server: Server, photograph: bytes, rng: random.Random) -> str | None:
    """Separate a photograph and leave in one of several ways; what was wrong."""
    while (sent := server.post(photograph))[0] == 503:
        time.sleep(rng.uniform(0.02, 0.1))
    if sent[0] != 202:
        return f"sending: {sent}"
    address = f"/result/{sent[1]['token']}"
    if rng.random() < 0.3:  # leaves at once
        time.sleep(rng.uniform(0, 0.05))
        status = server.get(address, "DELETE")[0]
        return None if status == 204 else f"leaving: {status}"
    while (about := server.status(sent[1]["token"])).get("state") in {"waiting", "working"}:
        time.sleep(0.02)
    if about.get("state") != "done":
        return str(about)
    target = f"{address}/transmission.png?strength=0.5"
    if rng.random() < 0.5:  # leaves while it takes the result
        with socket.create_connection(("127.0.0.1", server.port)) as half:
            half.sendall(f"GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    elif (status := server.get(target)[0]) != 200:
        return f"taking: {status}"
    status = server.get(address, "DELETE")[0]
    return None if status == 204 else f"leaving: {status}"


@pytest.mark.parametrize("visits", [60, pytest.param(600, marks=pytest.mark.slow)])
def test_nobody_loses_a_photograph_as_others_leave(tmp_path, visits):
    file = io.BytesIO()
    Image.new("RGB", (16, 12), "teal").save(file, "PNG")
    server, wrong, done = Server(tmp_path), [], []

    def visitor(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(visits // VISITORS):
            trouble = visit(server, file.getvalue(), rng)
            (wrong if trouble else done).append(trouble)

    threads = [threading.Thread(target=visitor, args=(seed,)) for seed in range(VISITORS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(done), wrong) == (visits, [])
    assert not server.photographs()
    status, told = server.stop()
    assert (status, told) == (143, "stopped by SIGTERM\n") and not list(server.temporary.iterdir())
