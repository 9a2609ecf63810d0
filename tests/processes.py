"""Several processes for tests of what is spread over a mesh: started once per test process, joined anew for each job.

def job(mesh, number):          # at the top level of a test module; runs in every process
    return mesh.world.rank + number

assert run_on(MeshConfig(dp_shard=2), job, 5) == [5, 6]
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import pickle
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from pithwood.parallel.config import MeshConfig

_started: list[tuple[Any, Connection]] = []


def run_on(
    cfg: MeshConfig, job: Callable[..., Any], *args: Any, device: str = "cpu", seconds: float = 120
) -> list[Any]:
    """What `job(mesh, *args)` returns in each of the mesh's processes, in the order of their ranks.

    job      a function at the top level of a module; it and its arguments and results are pickled; may stop the mesh
    device   "cpu" (gloo) or "cuda" (NCCL, one GPU per process)
    raises   AssertionError with the first process's traceback that failed, or if one does not answer in time; the
             processes are ended then, and the next call starts new ones
    """
    _start(cfg.size)
    folder = Path(tempfile.mkdtemp(prefix="mesh-"))
    try:
        workers = _started[: cfg.size]
        for rank, (_, pipe) in enumerate(workers):
            pipe.send_bytes(pickle.dumps((job, args, cfg, rank, device, str(folder / "store"))))
        return _collect(workers, seconds)
    except BaseException:
        stop_processes()
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def stop_processes() -> None:
    """End all processes that were started; also at exit."""
    for process, pipe in _started:
        process.kill()
        pipe.close()
    for process, _ in _started:
        process.join()
    _started.clear()


def _start(count: int) -> None:
    context = multiprocessing.get_context("spawn")
    while len(_started) < count:
        here, there = context.Pipe()
        process = context.Process(target=_serve, args=(there, sys.path), daemon=True)
        process.start()
        there.close()
        _started.append((process, here))
        atexit.unregister(stop_processes)
        atexit.register(stop_processes)


def _collect(workers: list[tuple[Any, Connection]], seconds: float) -> list[Any]:
    end = time.monotonic() + seconds
    open_pipes = {pipe: rank for rank, (_, pipe) in enumerate(workers)}
    results: list[Any] = [None] * len(workers)
    while open_pipes:
        ready = wait(list(open_pipes), timeout=max(0.0, end - time.monotonic()))
        if not ready:
            raise AssertionError(f"ranks {sorted(open_pipes.values())} did not answer within {seconds:.0f} s")
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = open_pipes.pop(pipe)
            try:
                fine, value = pickle.loads(pipe.recv_bytes())
            except EOFError:
                raise AssertionError(f"rank {rank} died") from None
            if not fine:
                raise AssertionError(f"rank {rank} failed:\n{value}")
            results[rank] = value
    return results


def _serve(pipe: Connection, path: list[str]) -> None:
    """A process's life: one job after another."""
    sys.path[:] = path
    import torch
    import torch.distributed as dist

    from pithwood.parallel.mesh import join_mesh, stop_mesh

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    while True:
        try:
            job, args, cfg, rank, device, store_path = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        except Exception:
            pipe.send_bytes(pickle.dumps((False, traceback.format_exc())))
            continue
        try:
            place = torch.device(device, rank) if device == "cuda" else torch.device(device)
            if place.type == "cuda":
                torch.cuda.set_device(place)
            mesh = join_mesh(cfg, place, rank, cfg.size, dist.FileStore(store_path, cfg.size))
            result = job(mesh, *args)
            if dist.is_initialized():
                mesh.world.barrier()
            stop_mesh(mesh)
            pipe.send_bytes(pickle.dumps((True, result)))
        except BaseException:
            pipe.send_bytes(pickle.dumps((False, traceback.format_exc())))
            return
