"""Members of .zip files, read in place: nothing is unpacked."""

from __future__ import annotations

import contextlib
import os
import stat
import struct
import zipfile
import zlib
from pathlib import Path
from typing import BinaryIO

from ctf.data.decode import UnreadableImageError
from ctf.data.sources.members import Members, Span

LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature; lengths of the name and of the extra field
MAX_LINK_BYTES = 4096
ENCRYPTED, UTF8 = 0x1, 0x800  # bits of a member's flags


def list_zip(path: Path) -> Members:
    """List the files of a .zip file; it has no members if it is damaged, which is noted.

    Raises:
        OSError: the file cannot be read.
    """
    members = Members()
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, ValueError, EOFError, NotImplementedError, struct.error) as error:
        members.damage = f"damaged, truncated, or not a .zip file ({error})"
        return members
    with open(path, "rb") as file:
        for info in infos:
            name = _name(info)
            span = Span(
                info.header_offset, info.compress_size, info.file_size, info.compress_type, info.CRC
            )
            if info.flag_bits & ENCRYPTED:
                members.left_out["encrypted"].append(name)
            elif stat.S_ISLNK(info.external_attr >> 16):
                _add_link(members, name, file, span)
            elif not name.endswith("/"):
                members.add(name, span)
    return members


def read_zip(file: BinaryIO, span: Span, limit: int) -> bytes:
    """Read at most `limit` bytes of a file in the archive; thread-safe.

    Raises:
        UnreadableImageError: it is damaged, or compressed by another method than DEFLATE.
    """
    header = os.pread(file.fileno(), LOCAL_HEADER.size, span.start)
    if len(header) < LOCAL_HEADER.size or not header.startswith(b"PK\3\4"):
        raise UnreadableImageError("damaged header in the .zip file")
    _, name_length, extra_length = LOCAL_HEADER.unpack(header)
    start = span.start + LOCAL_HEADER.size + name_length + extra_length
    whole = limit >= span.size
    # Deflate never makes data so much larger; a header may say anything.
    data = os.pread(file.fileno(), min(span.stored, 2 * limit + 1024), start)
    if span.method == zipfile.ZIP_DEFLATED:
        try:
            data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, min(limit, span.size) + 1)
        except zlib.error:
            raise UnreadableImageError("damaged in the .zip file") from None
    elif span.method != zipfile.ZIP_STORED:
        raise UnreadableImageError(
            f"compressed by method {span.method}, expected stored or deflate"
        )
    if whole and (len(data) != span.size or zlib.crc32(data) != span.crc):
        raise UnreadableImageError("damaged in the .zip file")
    return data[:limit]


def _name(info: zipfile.ZipInfo) -> str:
    """Return the path of a member, as the program meant it that wrote the file."""
    name = info.filename
    if not info.flag_bits & UTF8:
        with contextlib.suppress(UnicodeError):  # macOS writes UTF-8 without saying so
            name = name.encode("cp437").decode()
    return name if "/" in name else name.replace("\\", "/")  # some programs on Windows


def _add_link(members: Members, name: str, file: BinaryIO, span: Span) -> None:
    try:
        target = read_zip(file, span, span.size) if span.size <= MAX_LINK_BYTES else b""
    except UnreadableImageError:
        target = b""
    members.add_link(name, os.fsdecode(target), symbolic=True)
