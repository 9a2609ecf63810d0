"""Durable files: written, hashed and synced in one pass, and the safetensors writer built on them.

The safetensors format: 8 bytes little-endian header length, a JSON header padded with spaces to a multiple of 8, then
the bytes of the tensors without gaps (https://github.com/huggingface/safetensors). Our own writer streams: one tensor
is in flight at a time, so a cast or a copy from a GPU costs the memory of the largest tensor, and the hash of the file
falls out of the same pass.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The dtypes that can be stored, by their safetensors code."""
DTYPE_CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a safetensors file to be written; `fetch` makes it when its turn comes."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    """Dtype on disk; the fetched tensor is cast to it."""
    fetch: Callable[[], Tensor]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def check_storable(name: str, dtype: torch.dtype) -> None:
    """Raise ValueError if a tensor of this dtype cannot be stored."""
    if dtype not in DTYPE_CODES:
        allowed = ", ".join(str(d).removeprefix("torch.") for d in DTYPE_CODES)
        raise ValueError(f"tensor {name!r} has dtype {dtype}, which cannot be stored; cast it to one of {allowed}")


def write_file(path: Path, parts: Iterable[bytes | memoryview]) -> str:
    """Write the parts to a new file, sync it to disk, and return the SHA-256 of its content in hex."""
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        for part in parts:
            digest.update(part)
            file.write(part)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def write_safetensors(path: Path, entries: Sequence[TensorEntry], metadata: dict[str, str] | None = None) -> str:
    """Write a safetensors file, synced; returns its SHA-256 in hex. Raises ValueError on dtypes that have no code."""
    # Wide dtypes first: with the padded header every tensor is then aligned to its item size.
    ordered = sorted(entries, key=lambda entry: -entry.dtype.itemsize)
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for entry in ordered:
        check_storable(entry.name, entry.dtype)
        assert entry.name not in header, f"two tensors named {entry.name}"
        end = offset + entry.num_bytes
        header[entry.name] = {
            "dtype": DTYPE_CODES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)

    def parts() -> Iterable[bytes | memoryview]:
        yield len(encoded).to_bytes(8, "little")
        yield encoded
        for entry in ordered:
            tensor = entry.fetch().detach()
            assert tuple(tensor.shape) == entry.shape, f"{entry.name}: {tuple(tensor.shape)} is not {entry.shape}"
            yield tensor_bytes(tensor.to("cpu", entry.dtype))

    return write_file(path, parts())


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a CPU tensor in row-major order, without a copy where it is contiguous."""
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def hash_file(path: Path) -> str:
    """SHA-256 of a file's content in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable; renames in it are on disk when this returns."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
