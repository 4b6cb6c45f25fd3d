"""One process at a time in a folder: a lock that says who holds it, and that no kill leaves behind.

    FOLDER/.ctf.lock  {"host": ..., "pid": ..., "since": ..., "command": ...}

The lock is the kernel's (flock), so it ends with its process, however that ends. Some network file
systems have no such locks, or locks that other machines do not see. So the holder also touches its
file every few seconds, and a file of another machine counts until it has not been touched for a
while. Times are only compared for equality, so no clock has to be right.

filelock, which `ctf reproduce` shares its cells with, neither says who holds a lock nor notices
locks of other machines.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shlex
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ctf.common import storage
from ctf.common.distributed import ALONE, World
from ctf.common.errors import UserError

NAME = ".ctf.lock"
TOUCH_SECONDS = 4.0
WATCH_SECONDS = 20.0  # a file that is not touched for so long was left by a killed process
BUSY = (errno.EAGAIN, errno.EACCES)  # of flock: another process holds the lock
ATTEMPTS = 20
UNWRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM)


@contextlib.contextmanager
def hold(folder: Path, world: World = ALONE) -> Iterator[None]:
    """Keep all other processes out of blocks that hold the same folder, which may be missing.

    A folder that cannot be written is not locked: nothing can be damaged in it.

    Args:
        folder: Created if it is missing; removed again if it is empty at the end.
        world: The first process holds the lock; an error is raised in all processes.

    Raises:
        UserError: Another process holds it; says which one, since when, and what to do.
    """
    held: list[_Lock] = []
    world.on_main(lambda: held.extend(_acquire(folder)))
    try:
        yield
    finally:
        for lock in held:
            lock.release()


def _acquire(folder: Path) -> list[_Lock]:
    """Return the lock of a folder; none if the folder cannot be written."""
    created = not folder.exists()
    try:
        for _ in range(ATTEMPTS):
            # The process that held it may have just removed its file, or the empty folder.
            with contextlib.suppress(FileNotFoundError):
                folder.mkdir(parents=True, exist_ok=True)
                if lock := _try(folder / NAME, created):
                    return [lock]
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise storage.write_error(folder, error) from error
    return []  # where nothing can be written, /proc for example


def _try(path: Path, created: bool) -> _Lock | None:
    """Take the lock; None if its file was just removed, so that it is worth another try."""
    try:
        handle, is_new = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666), True
    except FileExistsError:
        handle, is_new = os.open(path, os.O_RDWR), False
    try:
        has_kernel_lock = _flock(handle)
        if os.fstat(handle).st_nlink == 0:
            return None
        holder = _read(handle)
        if has_kernel_lock is False:
            raise _in_use(path, holder)
        if not is_new and _is_alive(path, holder, bool(has_kernel_lock)):
            raise _in_use(path, holder)
        if has_kernel_lock is None:
            print(f"{path.parent}: no locks on this file system, marked by {NAME}", file=sys.stderr)
            if not is_new:
                _move_away(path, holder)
                return None
        lock = _Lock(path, handle, created)
        handle = -1
        return lock
    finally:
        if handle >= 0:
            os.close(handle)


def _flock(handle: int) -> bool | None:
    """Return whether this process now has the kernel's lock; None if there are none here."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in BUSY else None
    return True


def _is_alive(path: Path, holder: dict[str, Any], has_kernel_lock: bool) -> bool:
    """Return whether the process that wrote the file still touches it."""
    if holder.get("host") == socket.gethostname():
        if has_kernel_lock or not _is_running(holder.get("pid")):
            return False
    elif not holder and has_kernel_lock:  # killed before it wrote who it is
        return False
    print(
        f"{path.parent}: last used by {_describe(holder)}; "
        f"waiting up to {WATCH_SECONDS:g} seconds to see whether it still is",
        file=sys.stderr,
    )
    first, until = _touched(path), time.monotonic() + WATCH_SECONDS
    while time.monotonic() < until:
        time.sleep(TOUCH_SECONDS / 8)
        if (now := _touched(path)) != first:
            return now is not None
    return False


def _is_running(pid: Any) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, TypeError, ValueError):
        return False
    except PermissionError:  # of another user
        return True
    return True


def _touched(path: Path) -> int | None:
    """Return when a file was touched. It is opened, since NFS caches the times of closed files."""
    try:
        with open(path, "rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None


def _move_away(path: Path, holder: dict[str, Any]) -> None:
    """Remove the file of a killed process, without kernel locks; not one that replaced it."""
    moved = path.with_name(f"{NAME}.{os.getpid()}.tmp")
    with contextlib.suppress(FileNotFoundError):
        os.rename(path, moved)
        handle = os.open(moved, os.O_RDONLY)
        is_other = _read(handle) != holder
        os.close(handle)
        if is_other:  # another process was faster
            with contextlib.suppress(FileExistsError):
                os.link(moved, path)
        moved.unlink()


def _read(handle: int) -> dict[str, Any]:
    """Return what the file says about its holder; {} if it is only about to write that."""
    try:
        content = json.loads(os.pread(handle, 1 << 16, 0))
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _in_use(path: Path, holder: dict[str, Any]) -> UserError:
    stop = "stop it"
    if holder.get("host") == socket.gethostname():
        stop += f" (kill {holder.get('pid')})"
    return UserError(
        f"{path.parent}: in use by {_describe(holder)}\n"
        f"wait until it ends, or {stop}, or choose another folder; "
        f"if it runs no longer, delete {path}"
    )


def _describe(holder: dict[str, Any]) -> str:
    if not holder:
        return "another process"
    command = f": {holder['command']}" if holder.get("command") else ""
    return (
        f"process {holder.get('pid')} on {holder.get('host')} since {holder.get('since')}{command}"
    )


class _Lock:
    """A lock that this process holds; a thread touches its file."""

    def __init__(self, path: Path, handle: int, created: bool) -> None:
        self.path, self.handle, self.created = path, handle, created
        program, *arguments = sys.argv or [""]
        holder = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
            "command": shlex.join([os.path.basename(program), *arguments])[:500],
        }
        content = json.dumps(holder, ensure_ascii=True).encode()
        with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
            os.ftruncate(handle, 0)
            os.pwrite(handle, content, 0)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._touch, daemon=True)
        self._thread.start()

    def _touch(self) -> None:
        while not self._ended.wait(TOUCH_SECONDS):
            with contextlib.suppress(OSError):  # of a network that is gone for a while
                os.utime(self.handle)

    def release(self) -> None:
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            if os.path.samestat(os.stat(self.path), os.fstat(self.handle)):
                self.path.unlink()
        os.close(self.handle)
        if self.created:
            with contextlib.suppress(OSError):  # not empty
                self.path.parent.rmdir()
