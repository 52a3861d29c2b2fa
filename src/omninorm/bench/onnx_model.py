"""Writes an ONNX model with one operator byte by byte, so that the package `onnx` is not needed.

ONNX files are protocol buffers: a message is a sequence of fields, and a field is a key (number · 8 + wire type) and a
value. The field numbers are those of onnx.proto3.
"""

from __future__ import annotations

import struct

_FLOAT, _HALF = 1, 10
_ATTRIBUTE_FLOAT, _ATTRIBUTE_INT = 1, 2
# SimplifiedLayerNormalization is onnxruntime's name for RMSNorm, for which it has a CPU kernel.
_IR_VERSION, _OPSET = 8, 17


def rms_norm_model(rows: int, width: int, eps: float, *, half: bool) -> bytes:
    """Return the model y = RMSNorm(x, weight) with x (rows, width), in fp32, or in fp16 if `half`."""
    kind = _HALF if half else _FLOAT
    node = _text(1, "x") + _text(1, "weight") + _text(2, "y") + _text(4, "SimplifiedLayerNormalization")
    node += _message(5, _text(1, "axis") + _number(3, 2**64 - 1) + _number(20, _ATTRIBUTE_INT))  # -1
    node += _message(5, _text(1, "epsilon") + _real(2, eps) + _number(20, _ATTRIBUTE_FLOAT))
    graph = _message(1, node) + _text(2, "rms_norm")
    graph += _message(11, _tensor("x", kind, rows, width)) + _message(11, _tensor("weight", kind, width))
    graph += _message(12, _tensor("y", kind, rows, width))
    return _number(1, _IR_VERSION) + _message(7, graph) + _message(8, _text(1, "") + _number(2, _OPSET))


def _tensor(name: str, kind: int, *shape: int) -> bytes:
    """Return a ValueInfoProto."""
    sizes = b"".join(_message(1, _number(1, size)) for size in shape)
    return _text(1, name) + _message(2, _message(1, _number(1, kind) + _message(2, sizes)))


def _message(field: int, content: bytes) -> bytes:
    return _varint(field * 8 + 2) + _varint(len(content)) + content


def _text(field: int, content: str) -> bytes:
    return _message(field, content.encode())


def _number(field: int, value: int) -> bytes:
    return _varint(field * 8) + _varint(value)


def _real(field: int, value: float) -> bytes:
    return _varint(field * 8 + 5) + struct.pack("<f", value)


def _varint(value: int) -> bytes:
    """Encode seven bits per byte, lowest first; the top bit marks that more bytes follow."""
    parts = bytearray()
    while value >= 0x80:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    parts.append(value)
    return bytes(parts)
