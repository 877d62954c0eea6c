"""Two runs in one folder."""

import argparse
import errno
import fcntl
import json
import os
import signal
import socket
import threading
import time

import pytest

from dereflect.util.errors import UserError
from dereflect.util.run import folder, lock
from dereflect.util.run.lock import Lock
from tests.faults.small import train_small


@pytest.fixture
def hasty(monkeypatch):
    """Signs of life every tenth of a second, gone after half a second without one."""
    monkeypatch.setattr(lock, "_BEAT", 0.1)
    monkeypatch.setattr(lock, "_PATIENCE", 5)


@pytest.fixture
def without_flock(monkeypatch):
    """A file system that doesn't know it."""

    def flock(file, operation):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(fcntl, "flock", flock)


def forget(line: str) -> None:
    """A log that nobody reads."""


def leave(folder, host: str = socket.gethostname(), pid: int = 2**22 + 1) -> None:
    """The lock of a process that doesn't run here: pids end at 2**22."""
    (folder / "lock").write_text(json.dumps({"host": host, "pid": pid, "since": time.time() - 3600}))


def test_a_second_one_is_told_who_has_it(tmp_path):
    with Lock(tmp_path) as first:
        first.acquire(forget)
        first.confirm()
        with Lock(tmp_path) as second, pytest.raises(UserError) as error:
            second.acquire(forget)
        for told in (f"process {os.getpid()}", socket.gethostname(), "there for 0:00:0", "--name", str(tmp_path)):
            assert told in str(error.value)
        first.confirm()
    assert not (tmp_path / "lock").exists()


def test_it_is_free_after_a_kill_and_the_next_one_says_so(tmp_path):
    ready, told = os.pipe()
    pid = os.fork()
    if not pid:
        Lock(tmp_path).acquire(forget)
        os.write(told, b".")
        time.sleep(60)
        os._exit(0)
    os.read(ready, 1)
    with Lock(tmp_path) as other, pytest.raises(UserError, match=f"process {pid} "):
        other.acquire(forget)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    lines = []
    with Lock(tmp_path) as other:
        other.acquire(lines.append)
    assert len(lines) == 1 and f"process {pid} on {socket.gethostname()}" in lines[0]


def test_without_flock_a_process_of_this_machine_is_looked_up(tmp_path, without_flock, hasty):
    leave(tmp_path)
    lines = []
    with Lock(tmp_path) as first:
        first.acquire(lines.append)
        assert "taken over" in lines[0]
        with Lock(tmp_path) as second, pytest.raises(UserError, match=f"process {os.getpid()}"):
            second.acquire(forget)


@pytest.mark.parametrize("ahead", [-86400, 86400])
def test_one_of_another_machine_counts_while_it_shows_signs_of_life(tmp_path, hasty, ahead):
    """Whatever its clock says."""
    leave(tmp_path, "elsewhere", 1)
    path, over = tmp_path / "lock", threading.Event()

    def live() -> None:
        now = time.time() + ahead
        while not over.wait(0.1):
            now += 0.1
            os.utime(path, (now, now))

    thread = threading.Thread(target=live)
    thread.start()
    with Lock(tmp_path) as ours, pytest.raises(UserError, match="process 1 on elsewhere, there for 1:00:00"):
        ours.acquire(forget)
    over.set()
    thread.join()
    lines = []
    with Lock(tmp_path) as ours:
        ours.acquire(lines.append)
        assert len(lines) == 1 and "elsewhere" in lines[0]


def test_it_waits_again_when_it_was_itself_suspended(tmp_path, hasty, monkeypatch):
    """A job on two machines is suspended as a whole for longer than the patience, and goes on."""
    leave(tmp_path, "elsewhere", 1)
    path, naps = tmp_path / "lock", []

    def sleep(seconds: float) -> None:
        naps.append(seconds)
        pause(0.7 if len(naps) == 1 else seconds)
        if len(naps) == 5:
            os.utime(path)

    pause = time.sleep
    monkeypatch.setattr(lock.time, "sleep", sleep)
    with Lock(tmp_path) as ours, pytest.raises(UserError, match="process 1 on elsewhere"):
        ours.acquire(forget)


def test_a_suspended_process_keeps_it(tmp_path, hasty):
    """However long it shows no sign of life."""
    ready, held = os.pipe()
    pid = os.fork()
    if not pid:
        Lock(tmp_path).acquire(forget)
        os.write(held, b".")
        time.sleep(60)
        os._exit(0)
    os.read(ready, 1)
    try:
        os.kill(pid, signal.SIGSTOP)
        time.sleep(0.7)
        with Lock(tmp_path) as other, pytest.raises(UserError, match=f"process {pid} "):
            other.acquire(forget)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_the_last_of_two_machines_without_a_common_flock_has_it(tmp_path, without_flock):
    with Lock(tmp_path) as first:
        first.acquire(forget)
        leave(tmp_path, "elsewhere", 1)  # written at the same moment
        with pytest.raises(UserError, match="elsewhere"):
            first.confirm()
    assert json.loads((tmp_path / "lock").read_text())["host"] == "elsewhere", "what is another's is not removed"


def test_a_lock_file_that_says_nothing_is_taken(tmp_path):
    (tmp_path / "lock").write_text("{nonsense")
    with Lock(tmp_path) as ours:
        ours.acquire(forget)
        ours.confirm()
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()


def test_one_that_is_released_just_before_it_would_be_held_is_made_anew(tmp_path, monkeypatch):
    plain, released = lock._hold, []

    def hold(file):
        if not released:
            released.append((tmp_path / "lock").unlink())
        return plain(file)

    monkeypatch.setattr(lock, "_hold", hold)
    with Lock(tmp_path) as first:
        first.acquire(forget)
        with Lock(tmp_path) as second, pytest.raises(UserError, match="is at work"):
            second.acquire(forget)


def test_of_many_that_start_at_once_one_gets_it(tmp_path):
    """Twenty rounds of eight processes; from the second on they find the lock of one that is gone."""
    for _ in range(20):
        children = []
        begin, go = os.pipe()
        for _ in range(8):
            if not (pid := os.fork()):
                os.close(go)
                os.read(begin, 1)
                try:
                    ours = Lock(tmp_path)
                    ours.acquire(forget)
                    time.sleep(0.2)
                    os._exit(0)
                except UserError:
                    os._exit(7)
            children.append(pid)
        os.close(begin)
        os.close(go)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
        assert sorted(codes) == [0] + [7] * 7


@pytest.mark.parametrize("ends", [True, False])
def test_a_run_that_runs_is_not_resumed(tiny_data, tmp_path, small_network, ends):
    status, folder = train_small(tiny_data, tmp_path, "--name", "one")
    assert status == 0 and not (folder / "lock").exists()
    before = (folder / "last.pt").stat()
    with Lock(folder) as other:
        other.acquire(forget)
        with pytest.raises(UserError, match="is at work in it"):
            train_small(tiny_data, tmp_path, "--name", "one", "--nEpochs", "3", "--resume", *["auto"] * ends)
        assert (folder / "last.pt").stat() == before
        assert train_small(tiny_data, tmp_path, "--name", "one", "--nEpochs", "1")[0] == 0, "a new run has its own"
    assert (tmp_path / "one-2/last.pt").exists()


def test_new_runs_that_start_at_once_get_folders_of_their_own(tmp_path):
    options = argparse.Namespace(checkpoints_dir=tmp_path, name="x", resume=None)
    read, write = os.pipe()
    for _ in range(16):
        if not os.fork():
            os.write(write, folder._make(options).name.encode() + b"\n")
            os._exit(0)
    os.close(write)
    for _ in range(16):
        os.wait()
    names = os.read(read, 4096).decode().split()
    assert sorted(names) == sorted(["x", *(f"x-{number}" for number in range(2, 17))])


def test_a_run_that_fails_before_it_begins_leaves_no_folder(tiny_data, tmp_path, small_network, monkeypatch):
    def fail(*_):
        raise UserError("no weights")

    monkeypatch.setattr("dereflect.models.build_model", fail)
    with pytest.raises(UserError, match="no weights"):
        train_small(tiny_data, tmp_path / "runs", "--name", "x")
    assert not list((tmp_path / "runs").iterdir())
