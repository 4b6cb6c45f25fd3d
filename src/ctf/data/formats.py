"""Image formats, told by the first bytes of a file."""

from __future__ import annotations

import re

HEAD = 512  # bytes of a file that tell whether it is an image

# How files of each supported format begin, by Pillow's name of it; stricter than Pillow where that
# accepts nearly anything. Left out: programs (EPS), formats without a decoder (HDF5, GRIB, WMF),
# and those of measurements, whose pixels have no known range (FITS, SPIDER).
SIGNATURES = {
    name: re.compile(pattern, re.DOTALL)
    for name, pattern in {
        "PNG": rb"\x89PNG\r\n\x1a\n",
        "JPEG": rb"\xff\xd8\xff",
        "WEBP": rb"RIFF.{4}WEBP",
        "GIF": rb"GIF8[79]a",
        "TIFF": rb"(II|MM)(\*\0|\0\*)|II\+\0|MM\0\+",
        "AVIF": rb".{4}ftyp(avi[fs]|m[is]f1.{4}(.{4}){0,12}?avi[fs])",
        "JPEG2000": rb"\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51",
        "BMP": rb"BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0",
        "DIB": rb"[\x28\x34\x38\x6c\x7c]\0\0\0.{8}\x01\0[\x01\x04\x08\x10\x18\x20]\0",
        "PPM": rb"P[1-6f]\s(\s|#[^\n]*\n)*\d",
        "QOI": rb"qoif",
        "TGA": (
            rb".(\x01[\x01\x09].{4}[\x0f\x10\x18\x20]|\0[\x02\x03\x0a\x0b]\0{5})"
            rb".{8}[\x01\x08\x10\x18\x20][\0-\x3f]"
        ),
        "ICO": rb"\0\0\x01\0[^\0]\0.{3}\0",
        "CUR": rb"\0\0\x02\0[^\0]\0.{3}\0",
        "ICNS": rb"icns",
        "PSD": rb"8BPS\0\x01",
        "DDS": rb"DDS \x7c\0\0\0",
        "SGI": rb"\x01\xda[\0\x01][\x01\x02]\0[\x01-\x03]",
        "SUN": rb"\x59\xa6\x6a\x95",
        "PCX": rb"\n[\0\x02\x03\5]\x01[\x01\x02\4\x08]",
        "DCX": rb"\xb1\x68\xde\x3a",
        "FLI": rb".{4}[\x11\x12]\xaf.{8}[\0\x03]\0",
        "BLP": rb"BLP[12]",
        "FTEX": rb"FTEX",
        "MSP": rb"DanM|LinS",
        "XBM": rb"\s*(/\*.*\*/\s*)?#define[ \t]+\w*_width[ \t]+\d+\s+#define[ \t]+\w*_height[ \t]",
        "XPM": rb"/\* XPM \*/",
    }.items()
}
# Files that are often named or taken for images; they are told from damaged ones.
OTHERS = {
    "HEIC": re.compile(rb".{4}ftyp(he[iv][cxms]|mif1|msf1)", re.DOTALL),
    "JPEG XL": re.compile(rb"\xff\x0a|\0\0\0\x0cJXL "),
    "SVG": re.compile(rb"\s*(<\?xml.*?\?>\s*)?(<!--.*?-->\s*)?<svg", re.DOTALL),
    "HTML": re.compile(rb"\s*<(!doctype\s+)?html", re.IGNORECASE),
    "PDF": re.compile(rb"%PDF-"),
    "EPS": re.compile(rb"%!PS"),
}


def image_format(head: bytes) -> str | None:
    """Return Pillow's name of an image's format by its first bytes; None if unknown.

    Args:
        head: the first `HEAD` bytes of the file, or all if it is shorter.
    """
    return next((name for name, begin in SIGNATURES.items() if begin.match(head)), None)


def is_image(head: bytes) -> bool:
    """Whether the first `HEAD` bytes of a file are those of an image of a supported format."""
    return image_format(head) is not None


def unsupported_format(head: bytes) -> str | None:
    """Return the name of a format in OTHERS by a file's first bytes; None if it is none of them."""
    return next((name for name, begin in OTHERS.items() if begin.match(head)), None)
