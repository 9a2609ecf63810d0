"""Hugging Face folders in and out: safetensors only, experts stacked in memory and apart on disk.

In memory                                              on disk (the layout of the Hub; the stacked one is read too)
    STEM.experts.gate_up_proj  [E, 2F, D]  gate first      STEM.experts.{e}.gate_proj.weight, .up_proj.weight  [F, D]
    STEM.experts.down_proj     [E, D, F]                   STEM.experts.{e}.down_proj.weight                   [D, F]
with STEM as in `model.layers.3.mlp`; all other names are the same. Legend: E experts, F expert width, D model width.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pithwood.checkpoint.files import (
    DTYPES,
    TensorEntry,
    check_storable,
    sync_folder,
    write_file,
    write_safetensors,
)
from pithwood.errors import explain_os_error

INDEX, SINGLE, CONFIG = "model.safetensors.index.json", "model.safetensors", "config.json"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


@dataclass(frozen=True)
class _Place:
    """Where a tensor on disk goes: a canonical tensor, and the expert and rows of it that it fills (None: all)."""

    name: str
    expert: int | None = None
    first_row: int = 0
    num_rows: int = 0


def import_hf(
    folder: Path,
    expected: Mapping[str, Sequence[int]],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """Read a model's weights from a Hugging Face folder, under canonical names.

    expected   canonical name -> shape of every tensor that the model has
    dtype      dtype of the result; None keeps what is on disk
    returns    a tensor for every expected name, on `device`
    raises     ValueError before any data is read, listing the first few tensors that are missing, unexpected or of
               another shape; on a damaged file; on folders that hold pickles only, which could run any code when loaded

    Reads shard by shard: besides the result, one tensor is in memory at a time. Where word embeddings are tied
    (`lm_head.weight` is not on disk, or not expected) the head is taken from, or must equal, the embedding.
    """
    folder = Path(folder)
    on_disk, shards = _read_headers(folder)
    want = {name: tuple(int(n) for n in shape) for name, shape in expected.items()}
    tied = HEAD in want and HEAD not in on_disk and _is_tied(folder)
    extra_head = HEAD in on_disk and HEAD not in want
    places = _match(folder, want, on_disk, skip={HEAD} if tied or extra_head else set())

    result: dict[str, Tensor] = {}
    head: Tensor | None = None
    for shard, names in shards.items():
        with _open(folder / shard) as source:
            for disk_name in names:
                if disk_name == HEAD and extra_head:
                    head = source.get_tensor(HEAD)
                if disk_name not in places:
                    continue
                place, value = places[disk_name], source.get_tensor(disk_name)
                target_dtype = value.dtype if dtype is None else dtype
                if place.expert is None:
                    result[place.name] = value.to(device, target_dtype)
                    continue
                if place.name not in result:
                    result[place.name] = torch.empty(want[place.name], dtype=target_dtype, device=device)
                stack = result[place.name]
                if dtype is None and stack.dtype != value.dtype:
                    raise ValueError(
                        f"{folder}: the experts of {place.name} have several dtypes; choose one with dtype="
                    )
                stack[place.expert, place.first_row : place.first_row + place.num_rows].copy_(value)
    if tied:
        result[HEAD] = result[EMBEDDING].clone()
    if head is not None and not torch.equal(head.to(device, result[EMBEDDING].dtype), result[EMBEDDING]):
        raise ValueError(
            f"{folder} has an {HEAD} that differs from the embedding, but the model's embeddings are tied; "
            "untie them in its config"
        )
    return {name: result[name] for name in want}


def export_hf(
    folder: Path,
    tensors: Mapping[str, Tensor],
    hf_config: Mapping[str, Any],
    dtype: torch.dtype,
    *,
    max_shard_bytes: int = 5_000_000_000,
) -> Path:
    """Write a model as a Hugging Face folder that `from_pretrained` reads; returns the folder.

    tensors           canonical name -> tensor, on any device; stacked experts are written apart
    hf_config         content of config.json, to which `dtype` is added
    dtype             dtype on disk of floating-point tensors
    max_shard_bytes   size limit of one weights file; a single larger tensor gets a file of its own
    raises            ValueError if the folder exists and is not empty, or tensors do not fit; OSError if writing fails

    Written beside and renamed last: the folder is complete or not there. With tied embeddings the head is left out.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists already; export to a new folder or remove this one")
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes={max_shard_bytes} must be >= 1")
    config = {**hf_config, "dtype": str(dtype).removeprefix("torch.")}
    entries = list(_entries(_untie(tensors, config), dtype))
    shards = _split(entries, max_shard_bytes)
    names = (
        [SINGLE]
        if len(shards) == 1
        else [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    )
    tmp = folder.parent / f".tmp-{folder.name}-{os.getpid()}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if tmp.exists():
            shutil.rmtree(tmp)
        tmp.mkdir()
        for name, shard in zip(names, shards, strict=True):
            # transformers refuses files that do not say which framework wrote them.
            write_safetensors(tmp / name, shard, {"format": "pt"})
        if len(shards) > 1:
            weight_map = {e.name: name for name, shard in zip(names, shards, strict=True) for e in shard}
            index = {"metadata": {"total_size": sum(e.num_bytes for e in entries)}, "weight_map": weight_map}
            write_file(tmp / INDEX, [json.dumps(index, indent=2, sort_keys=True).encode()])
        write_file(tmp / CONFIG, [json.dumps(config, indent=2, sort_keys=True).encode()])
        sync_folder(tmp)
        os.rename(tmp, folder)
        sync_folder(folder.parent)
    except BaseException as error:
        shutil.rmtree(tmp, ignore_errors=True)
        if isinstance(error, OSError):
            raise OSError(error.errno, f"export to {folder} failed: {explain_os_error(error)}") from error
        raise
    return folder


def _read_headers(folder: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, list[str]]]:
    """Shapes of all tensors in the folder by their name on disk, and the names in each shard."""
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}; give a local Hugging Face model folder")
    weight_map: dict[str, str] | None = None
    if (folder / INDEX).is_file():
        try:
            weight_map = dict(json.loads((folder / INDEX).read_bytes())["weight_map"])
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{folder / INDEX} is not an index of shards ({error}); download it again") from error
        files = sorted(set(weight_map.values()))
    elif (folder / SINGLE).is_file():
        files = [SINGLE]
    else:
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES)
        if pickles:
            raise ValueError(
                f"{folder} holds pickled weights only ({', '.join(pickles[:3])}), which can run any code when loaded; "
                "convert them to safetensors where you trust them: "
                "AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
            )
        raise ValueError(
            f"{folder} has neither {SINGLE} nor {INDEX}; give a Hugging Face model folder with safetensors"
        )
    shapes: dict[str, tuple[int, ...]] = {}
    shards: dict[str, list[str]] = {}
    for file in files:
        if Path(file).name != file or Path(file).suffix != ".safetensors":
            raise ValueError(f"{folder / INDEX} names {file!r}; only safetensors files in the same folder are read")
        if not (folder / file).is_file():
            raise ValueError(f"{folder / file} is missing, though {INDEX} names it; download it again")
        with _open(folder / file) as source:
            shards[file] = list(source.keys())
            for name in shards[file]:
                view = source.get_slice(name)
                if view.get_dtype() not in DTYPES:
                    raise ValueError(f"{folder / file}: {name} has dtype {view.get_dtype()}, which is not read")
                if name in shapes:
                    raise ValueError(f"{folder}: {name} is in more than one file; keep only one of them")
                shapes[name] = tuple(view.get_shape())
    lost = sorted(set(weight_map or ()) - set(shapes))
    if lost:
        raise ValueError(f"{folder}: {INDEX} names tensors that no file holds: {_first(lost)}; download it again")
    return shapes, shards


class _open:
    """safe_open whose errors are ValueErrors that name the file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> Any:
        try:
            self.source = safe_open(self.path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{self.path} is not a complete safetensors file ({error}); download it again") from error
        return self.source.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.source.__exit__(*error)


def _match(
    folder: Path, want: dict[str, tuple[int, ...]], on_disk: dict[str, tuple[int, ...]], skip: set[str]
) -> dict[str, _Place]:
    """The place of every tensor on disk; raises ValueError unless they fill every expected tensor exactly once."""
    places: dict[str, _Place] = {}
    filled: dict[str, int] = {}
    unexpected, wrong = [], []
    for disk_name, shape in on_disk.items():
        # Old checkpoints carry RoPE frequencies, which follow from the config.
        if disk_name in skip or disk_name.endswith("rotary_emb.inv_freq"):
            continue
        place = _place(disk_name, want)
        if place is None:
            unexpected.append(disk_name)
            continue
        need = want[place.name]
        if place.expert is not None:
            need = (place.num_rows, need[2])
        if shape != need:
            wrong.append(f"{disk_name} {list(shape)} instead of {list(need)}")
        places[disk_name] = place
        filled[place.name] = filled.get(place.name, 0) + math.prod(shape)
    missing = [name for name, shape in want.items() if name not in skip and filled.get(name, -1) < math.prod(shape)]
    doubled = [name for name, count in filled.items() if count > math.prod(want[name]) and not wrong]
    problems = [
        f"{len(names)} {what}: {_first(names)}"
        for what, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", wrong),
            ("given twice", doubled),
        )
        if names
    ]
    if problems:
        raise ValueError(
            f"{folder} does not fit the model: {'; '.join(problems)}; use the configuration that it was made with"
        )
    return places


def _place(disk_name: str, want: dict[str, tuple[int, ...]]) -> _Place | None:
    if disk_name in want:
        return _Place(disk_name)
    match = re.fullmatch(r"(.+\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight", disk_name)
    if match is None:
        return None
    expert, kind = int(match[2]), match[3]
    name = f"{match[1]}.{'down_proj' if kind == 'down_proj' else 'gate_up_proj'}"
    shape = want.get(name, ())
    if len(shape) != 3 or expert >= shape[0]:
        return None
    if kind == "down_proj":
        return _Place(name, expert, 0, shape[1])
    width = shape[1] // 2
    return _Place(name, expert, 0 if kind == "gate_proj" else width, width)


def _is_tied(folder: Path) -> bool:
    """Whether config.json ties head and embedding; without a word on it, a missing head means that they are tied."""
    try:
        return bool(json.loads((folder / CONFIG).read_bytes()).get("tie_word_embeddings", True))
    except FileNotFoundError:
        return True
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{folder / CONFIG} is not a JSON object ({error}); download it again") from error


def _untie(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors to write: without the head if it is tied to the embedding."""
    if EMBEDDING not in tensors:
        raise ValueError(f"there is no {EMBEDDING} to export; give tensors under their canonical names")
    if not config.get("tie_word_embeddings", False):
        if HEAD not in tensors:
            raise ValueError(f"there is no {HEAD} to export; add it, or set tie_word_embeddings to true in hf_config")
        return dict(tensors)
    if HEAD in tensors and not torch.equal(tensors[HEAD], tensors[EMBEDDING]):
        raise ValueError(
            f"hf_config ties the embeddings, but {HEAD} differs from {EMBEDDING}; set tie_word_embeddings to false"
        )
    return {name: tensor for name, tensor in tensors.items() if name != HEAD}


def _entries(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Iterator[TensorEntry]:
    """What goes on disk, in order, stacked experts apart."""
    for name, tensor in tensors.items():
        out_dtype = dtype if tensor.is_floating_point() else tensor.dtype
        check_storable(name, out_dtype)
        match = re.fullmatch(r"(.+\.experts)\.(gate_up_proj|down_proj)", name)
        if match is None:
            yield TensorEntry(name, tuple(tensor.shape), out_dtype, partial(_same, tensor))
            continue
        if tensor.dim() != 3 or (match[2] == "gate_up_proj" and tensor.shape[1] % 2):
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}; stacked experts are [E, 2F, D] (gate_up) or [E, D, F] (down)"
            )
        for e in range(tensor.shape[0]):
            parts = {"down_proj": tensor[e]}
            if match[2] == "gate_up_proj":
                parts = dict(zip(("gate_proj", "up_proj"), tensor[e].chunk(2), strict=True))
            for kind, part in parts.items():
                key = f"{match[1]}.{e}.{kind}.weight"
                yield TensorEntry(key, tuple(part.shape), out_dtype, partial(_same, part))


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _split(entries: Sequence[TensorEntry], max_bytes: int) -> list[list[TensorEntry]]:
    shards: list[list[TensorEntry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.num_bytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.num_bytes
    return shards


def _first(names: Sequence[str], limit: int = 4) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown}, ..."
