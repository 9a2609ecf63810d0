"""The files of one checkpoint: a manifest, the state, tensors in safetensors files, and the hashes of all of them.

    manifest.json            format version, step, and where each range of elements of each tensor lies
    state.json               the caller's state
    tensors-00000.safetensors  one file for each process that writes, by its rank
    SHA256SUMS               written last; `sha256sum -c SHA256SUMS` checks it too

A tensor that one process holds whole is an entry of its own shape under its own name; a part of one is a flat entry
`NAME@START:STOP`; the manifest lists each as [start, stop, rank of its writer]. Format 1 described a part by offsets
and lengths along each dimension; it is read where those are a range of elements. Nothing here is ever unpickled:
whoever loads a pickle runs its author's code.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pithwood.checkpoint.files import DTYPE_CODES, DTYPES, TensorEntry, hash_file, write_file, write_safetensors
from pithwood.checkpoint.ranges import Chunk, Held, Listing, StoredTensor, complete

FORMAT_VERSION = 2
MANIFEST, STATE, SUMS = "manifest.json", "state.json", "SHA256SUMS"


class DamagedCheckpoint(ValueError):
    """Files of a checkpoint are missing, cut short or altered, or the folder never was one."""


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds."""

    step: int
    torch_version: str
    tensors: dict[str, StoredTensor]
    format_version: int = FORMAT_VERSION

    @property
    def files(self) -> list[str]:
        """Names of the tensor files, sorted."""
        writers = {chunk.writer for tensor in self.tensors.values() for chunk in tensor.chunks}
        return [tensor_file(writer) for writer in sorted(writers)]


def tensor_file(rank: int) -> str:
    """Name of the file that a process writes."""
    return f"tensors-{rank:05d}.safetensors"


def write_tensors(folder: Path, rank: int, tensors: Mapping[str, Held]) -> Listing:
    """Write what a process is the writer of into its file, synced; a process that writes nothing makes no file."""
    entries, stored = [], {}
    for name, held in tensors.items():
        piece, chunks = held.piece, tuple[Chunk, ...]()
        if held.writes and (piece.numel or piece.is_whole):
            key = _key(name, piece.start, piece.stop, piece.shape)
            shape = piece.shape if piece.is_whole else (piece.numel,)
            entries.append(TensorEntry(key, shape, held.tensor.dtype, partial(held.tensor.detach().reshape, shape)))
            chunks = (Chunk(piece.start, piece.stop, rank, key),)
        stored[name] = StoredTensor(held.tensor.dtype, piece.shape, chunks)
    file = tensor_file(rank)
    return Listing(stored, {file: write_safetensors(folder / file, entries)} if entries else {})


def _key(name: str, start: int, stop: int, shape: tuple[int, ...]) -> str:
    """What the entry of a range of a tensor is called in its file."""
    return name if stop - start == math.prod(shape) else f"{name}@{start}:{stop}"


def read_tensors(folder: Path, manifest: Manifest, into: Mapping[str, Held]) -> None:
    """Fill pieces of tensors in place, reading nothing but their elements; the caller has checked names and shapes.

    Raises DamagedCheckpoint if a file does not hold what the manifest says.
    """
    flat = {name: _flat(held.tensor.detach()) for name, held in into.items()}
    by_writer: dict[int, list[tuple[str, Chunk]]] = {}
    for name, held in into.items():
        for chunk in manifest.tensors[name].overlapping(held.piece):
            by_writer.setdefault(chunk.writer, []).append((name, chunk))
    for writer, wanted in sorted(by_writer.items()):
        file = tensor_file(writer)
        try:
            with safe_open(folder / file, framework="pt") as source:
                for name, chunk in wanted:
                    # the file is mapped into memory: only the elements that are copied are read
                    value = source.get_tensor(chunk.key).reshape(-1)
                    if value.dtype != manifest.tensors[name].dtype or value.numel() != chunk.stop - chunk.start:
                        raise damaged(folder, file, f"{chunk.key} is not what {MANIFEST} says")
                    piece = into[name].piece
                    start, stop = max(piece.start, chunk.start), min(piece.stop, chunk.stop)
                    part = value[start - chunk.start : stop - chunk.start]
                    flat[name][start - piece.start : stop - piece.start].copy_(part)
        except SafetensorError as error:
            raise damaged(folder, file, str(error)) from error
    for name, held in into.items():
        if not held.tensor.is_contiguous():
            held.tensor.detach().copy_(flat[name].view(held.tensor.shape))


def check_entries(folder: Path, manifest: Manifest) -> None:
    """Raise DamagedCheckpoint unless every tensor file holds just the entries that the manifest says, in their dtypes
    and with as many elements; hashes and ranges are `read_manifest`'s.
    """
    expected: dict[str, dict[str, str]] = {}
    for stored in manifest.tensors.values():
        for chunk in stored.chunks:
            entry = _entry(DTYPE_CODES[stored.dtype], chunk.stop - chunk.start)
            expected.setdefault(tensor_file(chunk.writer), {})[chunk.key] = entry
    for file, entries in expected.items():
        found = {}
        try:
            with safe_open(folder / file, framework="pt") as source:
                for key in source.keys():  # noqa: SIM118
                    part = source.get_slice(key)
                    found[key] = _entry(part.get_dtype(), math.prod(part.get_shape()))
        except SafetensorError as error:
            raise damaged(folder, file, str(error)) from error
        for key in sorted(entries.keys() | found.keys()):
            is_, should = found.get(key, "absent"), entries.get(key, "absent")
            if is_ != should:
                raise damaged(folder, file, f"entry {key} is {is_}, but {should} in {MANIFEST}")


def _entry(dtype: str, num_elements: int) -> str:
    return f"{num_elements} x {dtype}"


def _flat(tensor: Tensor) -> Tensor:
    """A flat view, or memory for as many elements where none is possible."""
    return tensor.view(-1) if tensor.is_contiguous() else torch.empty(tensor.numel(), dtype=tensor.dtype)


def write_manifest(folder: Path, manifest: Manifest, state: bytes, tensor_sums: dict[str, str]) -> None:
    """Write manifest, state (JSON) and, last, the hashes of all files; each is synced."""
    tensors = {
        name: {
            "dtype": DTYPE_CODES[tensor.dtype],
            "shape": tensor.shape,
            "chunks": [(c.start, c.stop, c.writer) for c in tensor.chunks],
        }
        for name, tensor in manifest.tensors.items()
    }
    head = {"format_version": FORMAT_VERSION, "step": manifest.step, "torch_version": manifest.torch_version}
    sums = {
        MANIFEST: write_file(folder / MANIFEST, [json.dumps({**head, "tensors": tensors}).encode()]),
        STATE: write_file(folder / STATE, [state]),
        **tensor_sums,
    }
    write_file(folder / SUMS, ["".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items())).encode()])


def read_manifest(folder: Path, *, hashes: bool = True, share: tuple[int, int] = (0, 1)) -> Manifest:
    """Read and check the manifest; with `hashes` every other file is checked against SHA256SUMS too.

    share    (i, n): of the tensor files check only every n-th from the i-th on, for n processes that divide them

    Raises ValueError if there is no such folder or its format is newer, DamagedCheckpoint naming the file
    if it is damaged or no checkpoint of ours.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no checkpoint folder {folder}; give a folder such as RUN/checkpoints/step-00001200")
    content = _read(folder, MANIFEST) if (folder / MANIFEST).exists() else None
    sums = _read_sums(folder) if (folder / SUMS).exists() else None
    if content is None and sums is None:
        raise DamagedCheckpoint(
            f"{folder} is not a Pithwood checkpoint: it has neither {MANIFEST} nor {SUMS}; give a folder "
            "that was saved by a run, or import Hugging Face safetensors instead"
        )
    if content is None:
        raise damaged(folder, MANIFEST, "missing")
    if sums is not None and MANIFEST in sums:
        _check_hash(folder, MANIFEST, sums)
    try:
        data = json.loads(content)
        version = data["format_version"]
    except (ValueError, TypeError, KeyError) as error:
        raise damaged(folder, MANIFEST, f"not a manifest ({type(error).__name__}: {error})") from error
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise ValueError(
            f"{folder} has checkpoint format {version}, this version of Pithwood reads up to {FORMAT_VERSION}; "
            "upgrade Pithwood to the version that wrote it"
        )
    if sums is None:
        raise damaged(folder, SUMS, "missing")
    try:
        manifest = _parse_manifest(data)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise damaged(folder, MANIFEST, f"not a manifest ({type(error).__name__}: {error})") from error
    mine = {MANIFEST, STATE, *manifest.files[share[0] :: share[1]]} if hashes else {STATE}
    for name in (MANIFEST, STATE, *manifest.files):
        if name not in sums:
            raise damaged(folder, SUMS, f"has no hash of {name}")
        if name in mine:
            _check_hash(folder, name, sums)
        elif not (folder / name).is_file():
            raise damaged(folder, name, "missing")
    return manifest


def read_state(folder: Path) -> dict[str, Any]:
    """The state as it was saved; check the folder with `read_manifest` first."""
    try:
        state = json.loads(_read(folder, STATE))
    except ValueError as error:
        raise damaged(folder, STATE, f"not JSON ({error})") from error
    if not isinstance(state, dict):
        raise damaged(folder, STATE, "not a JSON object")
    return state


def damaged(folder: Path, file: str, why: str) -> DamagedCheckpoint:
    return DamagedCheckpoint(
        f"checkpoint {folder} is damaged: {file}: {why}; restore it from a copy, "
        "or remove the folder to go on from an older one"
    )


def _read(folder: Path, name: str) -> bytes:
    try:
        return (folder / name).read_bytes()
    except OSError as error:
        raise damaged(folder, name, error.strerror or str(error)) from error


def _read_sums(folder: Path) -> dict[str, str]:
    sums = {}
    for line in _read(folder, SUMS).decode(errors="replace").split("\n")[:-1]:
        match = re.fullmatch(r"([0-9a-f]{64})  (\S+)", line)
        if match is None:
            raise damaged(folder, SUMS, f"not a line of hashes: {line[:80]!r}")
        sums[match[2]] = match[1]
    return sums


def _check_hash(folder: Path, name: str, sums: dict[str, str]) -> None:
    try:
        digest = hash_file(folder / name)
    except OSError as error:
        raise damaged(folder, name, "missing" if isinstance(error, FileNotFoundError) else str(error)) from error
    if digest != sums[name]:
        raise damaged(folder, name, f"content does not match its SHA-256 in {SUMS}")


def _parse_manifest(data: dict[str, Any]) -> Manifest:
    version = int(data["format_version"])

    def chunk(c: Any, name: str, shape: tuple[int, ...]) -> Chunk:
        if version < 2:
            return _chunk_of_box(c, shape)
        start, stop, writer = _ints(c)
        return Chunk(start, stop, writer, _key(name, start, stop, shape))

    def tensor(name: str, t: dict[str, Any]) -> StoredTensor:
        shape = _ints(t["shape"])
        return complete(name, DTYPES[t["dtype"]], shape, [chunk(c, name, shape) for c in t["chunks"]])

    tensors = {name: tensor(name, t) for name, t in data["tensors"].items()}
    return Manifest(int(data["step"]), str(data["torch_version"]), tensors, version)


def _chunk_of_box(chunk: dict[str, Any], shape: tuple[int, ...]) -> Chunk:
    """The elements of a box of format 1: whole rows of a tensor; ValueError if it is another part."""
    file = re.fullmatch(r"tensors-(\d{5})\.safetensors", chunk["file"])
    if file is None:
        raise ValueError(f"{chunk['file']!r} is no tensor file")
    offsets, lengths = _ints(chunk["offsets"]), _ints(chunk["shape"])
    if any(offsets[1:]) or lengths[1:] != shape[1:] or len(lengths) != len(shape):
        raise ValueError(f"a part at {offsets} of {lengths} is not a range of the elements of {shape}")
    row = math.prod(shape[1:])
    start, stop = (offsets[0] * row, (offsets[0] + lengths[0]) * row) if shape else (0, 1)
    return Chunk(start, stop, int(file[1]), str(chunk["key"]))


def _ints(values: Sequence[int]) -> tuple[int, ...]:
    return tuple(int(v) for v in values)
