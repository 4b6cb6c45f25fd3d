"""One process at a time in a folder, with kernel locks and without, through kills."""

import errno
import fcntl
import json
import os
import re
import signal
import socket
import threading
from pathlib import Path
from typing import Any

import pytest

from ctf.common import locks
from ctf.common.errors import UserError
from tests.held import end, held_by_another


@pytest.fixture(params=["kernel", "none"])
def kernel_locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the file system has locks: some network mounts have none."""
    monkeypatch.setattr(locks, "TOUCH_SECONDS", 0.05)
    monkeypatch.setattr(locks, "WATCH_SECONDS", 0.5)
    if request.param == "none":

        def no_locks(*_: Any) -> None:
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(fcntl, "flock", no_locks)
    return bool(request.param == "kernel")


def test_the_folder_is_left_as_it_was(tmp_path: Path, kernel_locks: bool) -> None:
    for _ in range(2):
        with locks.hold(tmp_path / "run"):
            assert [path.name for path in (tmp_path / "run").iterdir()] == [locks.NAME]
        assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").touch()
    with locks.hold(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_second_process_is_told_who_holds_the_folder(tmp_path: Path, kernel_locks: bool) -> None:
    with held_by_another(tmp_path / "run") as pid:
        with pytest.raises(UserError) as raised, locks.hold(tmp_path / "run"):
            pass
        first, second = str(raised.value).splitlines()
        who = rf"process {pid} on {socket.gethostname()} since \d+-\d+-\d+ \d+:\d+:\d+: "
        assert re.match(re.escape(f"{tmp_path / 'run'}: in use by ") + who, first)
        assert f"kill {pid}" in second and str(tmp_path / "run" / locks.NAME) in second
        with locks.hold(tmp_path / "other"):
            pass
        end(pid, signal.SIGKILL)
        assert (tmp_path / "run" / locks.NAME).exists()
        with locks.hold(tmp_path / "run"):  # a killed process leaves nothing locked
            pass


def test_the_same_process_cannot_hold_a_folder_twice(tmp_path: Path, kernel_locks: bool) -> None:
    with (
        locks.hold(tmp_path),
        pytest.raises(UserError, match=f"process {os.getpid()} "),
        locks.hold(tmp_path),
    ):
        pass


def leave_file(folder: Path, **changes: Any) -> Path:
    """The file of a process on another machine."""
    path = folder / locks.NAME
    holder = {"host": "elsewhere", "pid": os.getpid(), "since": "2026-01-01", "command": "ctf"}
    path.write_text(json.dumps({**holder, **changes}))
    return path


def test_another_machine_that_touches_its_file_holds_the_folder(
    tmp_path: Path, kernel_locks: bool
) -> None:
    path, ended = leave_file(tmp_path), threading.Event()

    def touch() -> None:
        time = 0
        while not ended.wait(0.05):
            time -= 1_000_000_000
            os.utime(path, ns=(time, time))  # by a clock that is set back

    thread = threading.Thread(target=touch)
    thread.start()
    try:
        with (
            pytest.raises(
                UserError, match=r"in use by process .* on elsewhere since 2026-01-01: ct"
            ),
            locks.hold(tmp_path),
        ):
            pass
    finally:
        ended.set()
        thread.join()
    assert path.exists()


def test_another_machine_that_is_gone_does_not(
    tmp_path: Path, kernel_locks: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    leave_file(tmp_path)
    with locks.hold(tmp_path):
        assert json.loads((tmp_path / locks.NAME).read_text())["host"] == socket.gethostname()
    assert "waiting up to 0.5 seconds" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_a_kill_left_empty_does_not_lock(tmp_path: Path, kernel_locks: bool) -> None:
    (tmp_path / locks.NAME).touch()
    with locks.hold(tmp_path):
        pass


def test_a_reused_process_number_does_not_lock(tmp_path: Path, kernel_locks: bool) -> None:
    leave_file(tmp_path, host=socket.gethostname(), pid=os.getppid())
    with locks.hold(tmp_path):
        pass


def test_the_holder_touches_its_file(tmp_path: Path, kernel_locks: bool) -> None:
    with locks.hold(tmp_path):
        path = tmp_path / locks.NAME
        os.utime(path, ns=(0, 0))
        for _ in range(1000):
            if path.stat().st_mtime_ns:
                break
            threading.Event().wait(0.01)
        else:
            pytest.fail("not touched")


def test_a_folder_that_disappears_is_no_error(tmp_path: Path, kernel_locks: bool) -> None:
    (tmp_path / "run").mkdir()
    with locks.hold(tmp_path / "run"):
        (tmp_path / "run" / locks.NAME).unlink()
        (tmp_path / "run").rmdir()


def test_no_file_system_without_permission_to_write_is_locked() -> None:
    with locks.hold(Path("/proc/1")):  # nothing can be written there, whoever tries
        pass


def test_a_file_in_the_way_is_the_users_to_move(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="choose another folder"), locks.hold(tmp_path / "file"):
        pass
