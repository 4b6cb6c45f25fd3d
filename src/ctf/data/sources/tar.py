"""Members of .tar files, read in place: nothing is unpacked."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path
from typing import BinaryIO

from ctf.data.sources.members import Members, Span

# What a compressed file begins with, and the program that decompresses it.
COMPRESSED = {
    b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd",
}  # fmt: skip


def list_tar(path: Path) -> Members:
    """List the files of a .tar file; damage ends the list and is noted.

    Raises:
        OSError: the file cannot be read.
    """
    members = Members()
    start: int | None = 0
    with open(path, "rb") as file:
        try:
            while start is not None:
                file.seek(start)
                # The same names everywhere, whatever this machine's encoding is.
                with tarfile.open(
                    fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape"
                ) as archive:
                    last = -1
                    while (member := archive.next()) is not None:
                        archive.members.clear()  # type: ignore[attr-defined]  # saves memory
                        if archive.offset <= last:  # a negative size would loop forever
                            raise tarfile.ReadError("negative size")
                        last = archive.offset
                        _add(members, member)
                    start = _next_archive(file, archive.offset)
        except (tarfile.TarError, ValueError, EOFError, OverflowError) as error:
            members.damage = _compression(path, file) or str(error)
    if members.damage:
        members.damage = f"damaged, truncated, or not an uncompressed .tar file ({members.damage})"
    return members


def read_tar(file: BinaryIO, span: Span, limit: int) -> bytes:
    """Read at most `limit` bytes of a file in the archive; thread-safe."""
    return os.pread(file.fileno(), min(span.size, limit), span.start)


def _add(members: Members, member: tarfile.TarInfo) -> None:
    if member.islnk() or member.issym():
        members.add_link(member.name, member.linkname, symbolic=member.issym())
    elif member.isreg() and not member.issparse():
        members.add(member.name, Span(member.offset_data, member.size, member.size))
    elif not member.isdir():
        reason = "sparse file" if member.issparse() else "device or pipe"
        members.left_out[reason].append(member.name)


def _compression(path: Path, file: BinaryIO) -> str:
    head = os.pread(file.fileno(), 8, 0)
    program = next((program for start, program in COMPRESSED.items() if head.startswith(start)), "")
    return program and f"{program}; decompress it first: {program} -d {path}"


def _next_archive(file: BinaryIO, offset: int) -> int | None:
    """Return where another archive begins after the end of one: `cat a.tar b.tar > both.tar`.

    Args:
        file: the file.
        offset: where the blocks of zeros are that end the archive.

    Raises:
        ReadError: other data follows; tarfile ends at a damaged header, too.
    """
    file.seek(offset)
    while chunk := file.read(1 << 20):
        if content := chunk.lstrip(b"\0"):
            at = file.tell() - len(content)
            at -= at % tarfile.BLOCKSIZE
            header = os.pread(file.fileno(), tarfile.BLOCKSIZE, at)
            try:
                if at - offset < 2 * tarfile.BLOCKSIZE:
                    raise tarfile.ReadError("no end")
                tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
            except tarfile.TarError:
                raise tarfile.ReadError(f"invalid header at byte {offset}") from None
            return at
    return None
