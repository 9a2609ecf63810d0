"""The files of one checkpoint: a manifest, the state, tensors in safetensors files, and the hashes of all of them.

    manifest.json            format version, step, and where each chunk of each tensor lies
    state.json               the caller's state
    tensors-00000.safetensors  one file for each writing process
    SHA256SUMS               written last; `sha256sum -c SHA256SUMS` checks it too

Tensors go through the planners of torch.distributed.checkpoint, which know how to save from and load onto any mesh,
with storage of our own below them: the library's own file storage keeps its metadata as a pickle, and whoever loads a
pickle runs its author's code. Nothing here is ever unpickled.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint import CheckpointException, StorageReader, StorageWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from pithwood.checkpoint.files import DTYPE_CODES, DTYPES, TensorEntry, hash_file, write_file, write_safetensors

FORMAT_VERSION = 1
MANIFEST, STATE, SUMS = "manifest.json", "state.json", "SHA256SUMS"


class DamagedCheckpoint(ValueError):
    """Files of a checkpoint are missing, cut short or altered, or the folder never was one."""


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor and the safetensors entry that holds it."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    key: str


@dataclass(frozen=True)
class StoredTensor:
    """Shape and dtype of a whole tensor, and the chunks that it was written in."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds."""

    step: int
    torch_version: str
    tensors: dict[str, StoredTensor]

    @property
    def files(self) -> list[str]:
        """Names of the tensor files, sorted."""
        return sorted({chunk.file for tensor in self.tensors.values() for chunk in tensor.chunks})


class CheckpointWriter(StorageWriter):
    """Storage writer: one safetensors file for each rank; the coordinator sets `tensors` and `sums` at the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors: dict[str, StoredTensor] = {}
        self.sums: dict[str, str] = {}

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def storage_meta(self) -> StorageMeta | None:
        return None

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return [replace(plan, storage_data=f"tensors-{rank:05d}.safetensors") for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        file = plan.storage_data
        entries, results = [], []
        for item in plan.items:
            assert item.tensor_data is not None, f"{item.index.fqn} is no tensor"
            data, offsets = item.tensor_data, tuple(item.tensor_data.chunk.offsets)
            shape = tuple(data.chunk.sizes)
            whole = shape == tuple(data.size)
            key = item.index.fqn if whole else f"{item.index.fqn}@{','.join(map(str, offsets))}"

            def fetch(item: Any = item) -> torch.Tensor:
                tensor = planner.resolve_data(item)
                assert isinstance(tensor, torch.Tensor)
                return tensor

            entries.append(TensorEntry(key, shape, data.properties.dtype, fetch))
            results.append(WriteResult(item.index, entries[-1].num_bytes, Chunk(offsets, shape, file, key)))
        done: Future[list[WriteResult]] = Future()
        if entries:
            digest = write_safetensors(self.folder / file, entries)
            results = [replace(result, storage_data=(result.storage_data, digest)) for result in results]
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        chunks: dict[str, list[Chunk]] = {}
        for result in (r for rank in results for r in rank):
            chunk, digest = result.storage_data
            chunks.setdefault(result.index.fqn, []).append(chunk)
            self.sums[chunk.file] = digest
        for name, stored in metadata.state_dict_metadata.items():
            assert isinstance(stored, TensorStorageMetadata)
            self.tensors[name] = StoredTensor(stored.properties.dtype, tuple(stored.size), tuple(chunks[name]))


class CheckpointReader(StorageReader):
    """Storage reader: reads the boxes that the planner asks for, which need not be those that were written."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self.where = {
            MetadataIndex(name, chunk.offsets): chunk
            for name, tensor in manifest.tensors.items()
            for chunk in tensor.chunks
        }

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        tensors: dict[str, Any] = {
            name: TensorStorageMetadata(
                TensorProperties(dtype=tensor.dtype),
                torch.Size(tensor.shape),
                [ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.shape)) for c in tensor.chunks],
            )
            for name, tensor in self.manifest.tensors.items()
        }
        return Metadata(tensors)

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        by_file: dict[str, list[Any]] = {}
        for item in plan.items:
            by_file.setdefault(self.where[item.storage_index].file, []).append(item)
        for file, items in by_file.items():
            try:
                with safe_open(self.folder / file, framework="pt") as source:
                    for item in items:
                        chunk = self.where[item.storage_index]
                        box = tuple(slice(o, o + n) for o, n in zip(item.storage_offsets, item.lengths, strict=True))
                        whole = tuple(item.lengths) == chunk.shape
                        value = source.get_tensor(chunk.key) if whole else source.get_slice(chunk.key)[box]
                        target = planner.resolve_tensor(item)
                        target.detach().copy_(value)
                        planner.commit_tensor(item, target)
            except SafetensorError as error:
                raise damaged(self.folder, file, str(error)) from error
        done: Future[None] = Future()
        done.set_result(None)
        return done


def write_manifest(folder: Path, manifest: Manifest, state: dict[str, Any], tensor_sums: dict[str, str]) -> None:
    """Write manifest, state and, last, the hashes of all files; each is synced."""
    tensors = {
        name: {
            "dtype": DTYPE_CODES[tensor.dtype],
            "shape": tensor.shape,
            "chunks": [{"offsets": c.offsets, "shape": c.shape, "file": c.file, "key": c.key} for c in tensor.chunks],
        }
        for name, tensor in manifest.tensors.items()
    }
    head = {"format_version": FORMAT_VERSION, "step": manifest.step, "torch_version": manifest.torch_version}
    sums = {
        MANIFEST: write_file(folder / MANIFEST, [json.dumps({**head, "tensors": tensors}).encode()]),
        STATE: write_file(folder / STATE, [json.dumps(state).encode()]),
        **tensor_sums,
    }
    write_file(folder / SUMS, ["".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items())).encode()])


def read_manifest(folder: Path, *, hashes: bool = True) -> Manifest:
    """Read and check the manifest; with `hashes` every other file is checked against SHA256SUMS too.

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
    for name in (MANIFEST, STATE, *manifest.files):
        if name not in sums:
            raise damaged(folder, SUMS, f"has no hash of {name}")
        if hashes or name == STATE:
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


def reraise_first(wrapped: CheckpointException) -> NoReturn:
    """Raise the exception that a rank met, which torch.distributed.checkpoint wraps into a BaseException of its own."""
    error, _ = wrapped.failures[min(wrapped.failures)]
    raise error from wrapped


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
    def chunk(c: dict[str, Any]) -> Chunk:
        if re.fullmatch(r"tensors-\d+\.safetensors", c["file"]) is None:
            raise ValueError(f"{c['file']!r} is no tensor file")
        return Chunk(_ints(c["offsets"]), _ints(c["shape"]), c["file"], c["key"])

    tensors = {
        name: StoredTensor(DTYPES[t["dtype"]], _ints(t["shape"]), tuple(chunk(c) for c in t["chunks"]))
        for name, t in data["tensors"].items()
    }
    return Manifest(int(data["step"]), str(data["torch_version"]), tensors)


def _ints(values: Sequence[int]) -> tuple[int, ...]:
    return tuple(int(v) for v in values)
