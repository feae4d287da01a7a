"""Colour profiles as cameras and phones put them into their files."""

import struct

import numpy as np

_P3 = {  # red, green and blue of Display P3 as X, Y, Z under the light of profiles (D50)
    b"rXYZ": (0.51512, 0.24120, -0.00105),
    b"gXYZ": (0.29198, 0.69225, 0.04189),
    b"bXYZ": (0.15710, 0.06657, 0.78407),
    b"wtpt": (0.96420, 1.0, 0.82491),
}


def display_p3() -> bytes:
    """An ICC profile of Display P3: its primaries, and the tone curve of sRGB."""
    shares = np.linspace(0, 1, 1024)
    linear = np.where(shares <= 0.04045, shares / 12.92, ((shares + 0.055) / 1.055) ** 2.4)
    curve = b"curv" + struct.pack(">II", 0, 1024) + (linear * 65535).round().astype(">u2").tobytes()
    tags = {name: b"XYZ " + struct.pack(">I3i", 0, *(round(v * 65536) for v in xyz)) for name, xyz in _P3.items()}
    tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)
    tags[b"desc"] = b"desc" + struct.pack(">II", 0, 3) + b"P3\0" + bytes(79)
    tags[b"cprt"] = b"text" + struct.pack(">I", 0) + b"none"
    table, body = struct.pack(">I", len(tags)), b""
    first = 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        table += name + struct.pack(">II", first + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    white = struct.pack(">3i", *(round(v * 65536) for v in _P3[b"wtpt"]))
    start = struct.pack(">I4sI4s4s4s", first + len(body), b"none", 0x02100000, b"mntr", b"RGB ", b"XYZ ")
    header = start + struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + white
    return header + bytes(128 - len(header)) + table + body
