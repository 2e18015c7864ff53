"""The byte alphabet of GPT-2's byte-level BPE: every byte has one printable character (Radford et al. 2019, encoder.py)."""

from __future__ import annotations


def _alphabet() -> dict[int, str]:
    """Byte -> character: printable Latin-1 stands for itself, the 68 others are U+0100 and up, in order."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = {byte: chr(byte) for byte in plain}
    spare = 0x100
    for byte in range(256):
        if byte not in letters:
            letters[byte] = chr(spare)
            spare += 1
    return letters


CHARACTER_OF_BYTE = _alphabet()
BYTE_OF_CHARACTER = {character: byte for byte, character in CHARACTER_OF_BYTE.items()}


def to_bytes(token: str) -> bytes:
    """The bytes a byte-level token stands for. Characters outside the alphabet (added tokens) stand for their own UTF-8."""
    try:
        return bytes(map(BYTE_OF_CHARACTER.__getitem__, token))
    except KeyError:
        return token.encode("utf-8", "replace")
