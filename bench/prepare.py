"""`pithwood prepare` on a large corpus: speed beside `datasets` + `tokenizers`, memory, busy cores, and ten kills.

    python -m bench.prepare [--mb 1000] [--compare-mb 100] [--runs 3] [--kills 10] [--kill-mb 1000] [--folder FOLDER]

The text is the installed Python source, repeated with a third of its words renamed (`bench/text.py`). Rows:

tokenize    a given tokenizer, no deduplication: pithwood, and datasets' `map` over the same file with as many processes
whole       train the tokenizer, drop near-duplicates, encode; once
kills       the same while the process is killed again and again; the hashes must be those of `whole`

Memory is the sum of the proportional set sizes of all processes, sampled. `cores_busy` is the time they computed over
the wall time; `runnable_threads`, the mean of samples, counts those that wait for a core which others have, too. Writes
bench/results/<device>/prepare.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import resource
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench.results import write_results
from bench.text import write_json_lines

_PLAIN = """
import sys
import datasets, numpy as np, tokenizers
source, tokenizer, cache, processes = sys.argv[1:]
made = tokenizers.Tokenizer.from_file(tokenizer)
def encode(batch):
    return {"ids": [np.array(e.ids, dtype=np.uint16) for e in made.encode_batch_fast(batch["text"])]}
rows = datasets.load_dataset("json", data_files=source, split="train", cache_dir=cache)
rows = rows.map(encode, batched=True, remove_columns=["text"], num_proc=int(processes))
rows.save_to_disk(cache + "/out")
print(sum(len(batch["ids"].combine_chunks().values) for batch in rows.with_format("arrow").iter(1000)))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=int, default=1000, help="text of `whole`, in 10^6 bytes")
    parser.add_argument("--compare-mb", type=int, default=100, help="text of `tokenize`")
    parser.add_argument("--runs", type=int, default=3, help="runs of `tokenize`, each tool by turns")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--kill-mb", type=int, help="text of `kills` (default: that of `whole`)")
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    args = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = args.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        rows = [_whole(folder, args.mb)]
        write_results("prepare", rows)
        rows += _tokenize(folder, args.compare_mb, args.runs)
        path = write_results("prepare", rows)
        if args.kills:
            if args.kill_mb not in (None, args.mb):
                rows.append(_whole(folder, args.kill_mb))
            rows.append(_kills(folder, args.kills, rows[-1 if len(rows) > 3 else 0], args.kill_mb or args.mb))
            path = write_results("prepare", rows)
    print(path)


def _prepare(source: Path, out: Path, *settings: str) -> list[str]:
    command = [
        sys.executable,
        "-m",
        "pithwood",
        "prepare",
        str(source),
        "--recipe",
        "demo",
        "--out",
        str(out),
        "--json",
    ]
    return [*command, *settings]


def _text(folder: Path, megabytes: int) -> tuple[Path, dict[str, int]]:
    """The file of so much text, written if a run in the same folder did not do it before, and what is in it."""
    source, counts = folder / f"text-{megabytes}.jsonl", folder / f"text-{megabytes}.json"
    if not counts.exists():
        counts.write_text(json.dumps(write_json_lines(source, megabytes * 1_000_000)))
    return source, json.loads(counts.read_text())


def _whole(folder: Path, megabytes: int) -> dict[str, Any]:
    source, text = _text(folder, megabytes)
    shutil.rmtree(folder / "whole", ignore_errors=True)
    result, measured = _measure(_prepare(source, folder / "whole"))
    made = json.loads(result)
    row = {"case": "whole", "tool": "pithwood", **text, **measured, **_counts(made), "fingerprint": made["fingerprint"]}
    row["text_mb_per_s"] = text["bytes"] / 1e6 / row["seconds"]
    row["tokens_per_s"] = row["tokens"] / row["seconds"]
    print(_told(row), flush=True)
    return row


def _tokenize(folder: Path, megabytes: int, runs: int) -> list[dict[str, Any]]:
    source, text = _text(folder, megabytes)
    tokenizer = folder / "whole" / "tokenizer.json"
    processes = len(os.sched_getaffinity(0))
    measured: dict[str, list[dict[str, Any]]] = {"pithwood": [], "datasets": []}
    for _ in range(runs):
        out = folder / "tokenized"
        shutil.rmtree(out, ignore_errors=True)
        ours = _prepare(source, out, f"tokenizer={tokenizer}", "dedup_threshold=none", "validation_fraction=0.001")
        result, found = _measure(ours)
        # Documents begin with an end-of-text token, which the other does not count.
        counts = _counts(json.loads(result))
        measured["pithwood"].append({**found, "tokens": counts["tokens"] - counts["kept_documents"]})
        shutil.rmtree(out, ignore_errors=True)
        command = [sys.executable, "-c", _PLAIN, str(source), str(tokenizer), str(out), str(processes)]
        result, found = _measure(command, HF_HOME=str(folder / "home"), HF_DATASETS_OFFLINE="1")
        measured["datasets"].append({**found, "tokens": int(result.split()[-1])})
        shutil.rmtree(out, ignore_errors=True)
    rows = []
    for tool, taken in measured.items():
        speeds = [run["tokens"] / run["seconds"] for run in taken]
        middle = sorted(taken, key=lambda run: run["seconds"])[len(taken) // 2]
        versions = {} if tool == "pithwood" else {name: version(name) for name in ("datasets", "tokenizers")}
        row = {"case": "tokenize", "tool": tool, **text, **middle, "tokens_per_s": statistics.median(speeds)}
        rows.append({**row, "spread": [min(speeds), max(speeds)], "runs": runs, "versions": versions})
        print(_told(rows[-1]), flush=True)
    rows[0]["speed_over_datasets"] = rows[0]["tokens_per_s"] / rows[1]["tokens_per_s"]
    return rows


def _kills(folder: Path, kills: int, whole: dict[str, Any], megabytes: int) -> dict[str, Any]:
    """Kill it at random moments; the last attempt may finish."""
    source, _ = _text(folder, megabytes)
    out, generator, done, resumed = folder / "killed", random.Random(0), 0, 0
    shutil.rmtree(out, ignore_errors=True)
    shutil.rmtree(folder / ".killed.partial", ignore_errors=True)
    began = time.monotonic()
    while True:
        # Moments spread over the whole work: every attempt gets on by at most its share.
        seconds = generator.uniform(0.5, 1.5) * whole["seconds"] / (kills + 1) if done < kills else None
        process = subprocess.Popen(
            _prepare(source, out), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        try:
            result, lines = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            _, lines = process.communicate()
            resumed += "resuming the prepare" in lines
            done += 1
            print(f"kill {done} after {seconds:.0f} s", flush=True)
            continue
        if process.returncode:
            raise SystemExit(lines)
        resumed += "resuming the prepare" in lines
        break
    made = json.loads(result)
    names = json.loads((out / "manifest.json").read_text())["files"]
    first = json.loads((folder / "whole" / "manifest.json").read_text())["files"]
    row = {
        "case": "kills",
        "tool": "pithwood",
        "bytes": whole["bytes"],
        "kills": done,
        "attempts_that_resumed": resumed,
        "seconds": time.monotonic() - began,
        "seconds_unbroken": whole["seconds"],
        "fingerprint": made["fingerprint"],
        "hashes_equal": names == first,
    }
    print(_told(row), flush=True)
    return row


def _measure(command: list[str], **more: str) -> tuple[str, dict[str, Any]]:
    """(standard output, seconds, cores busy, peak memory) of a command; stops everything if it fails."""
    load = os.getloadavg()[0]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.monotonic()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, env={**os.environ, **more})
        peak, runnable = 0, []
        while process.poll() is None:
            memory, threads = _sample(process.pid)
            peak = max(peak, memory)
            runnable.append(threads)
            time.sleep(0.2)
        seconds = time.monotonic() - began
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        out.seek(0), err.seek(0)
        if process.returncode:
            raise SystemExit(f"{shlex.join(command)} failed:\n{err.read()[-3000:]}")
        result = out.read()
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return result, {
        "seconds": seconds,
        "cores": len(os.sched_getaffinity(0)),
        "cores_busy": used / seconds,
        # Beside work of others a run gets less than it asks for.
        "runnable_threads": statistics.mean(runnable),
        "samples_with_two_runnable": statistics.mean(threads >= 2 for threads in runnable),
        "load_before": load,
        "load_after": os.getloadavg()[0],
        "peak_gib": peak / 2**30,
    }


def _sample(process: int) -> tuple[int, int]:
    """(bytes of a process and all below it, pages that several share counted once; their threads that can run)."""
    memory, runnable, waiting = 0, 0, [process]
    while waiting:
        folder = Path(f"/proc/{waiting.pop()}")
        try:
            lines = (folder / "smaps_rollup").read_text().splitlines()
            memory += 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
            for task in (folder / "task").iterdir():
                runnable += (task / "stat").read_text().rpartition(")")[2].split()[0] == "R"
                waiting += [int(child) for child in (task / "children").read_text().split()]
        except (OSError, ValueError):
            continue  # it has ended meanwhile
    return memory, runnable


def _counts(made: dict[str, Any]) -> dict[str, int]:
    splits = made["splits"].values()
    return {
        "tokens": sum(split["tokens"] for split in splits),
        "kept_documents": sum(split["documents"] for split in splits),
        "duplicates_dropped": made["source"]["duplicates_dropped"],
    }


def _told(row: dict[str, Any]) -> str:
    return json.dumps({key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()})


if __name__ == "__main__":
    main()
