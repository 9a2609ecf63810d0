"""The `pithwood` command: help, errors, recipes, and runs that are finished, stopped, repeated and sampled from."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pithwood.cli import COMMANDS, main
from pithwood.recipes import list_recipes, load_recipe
from tests.command_lines import Server

ROOT = Path(__file__).parents[1]
# The debug recipe made so small that starting it takes longer than training it.
SMALL = ["data.max_bytes=200_000", "seq_len=128", "samples_per_step=2", "samples_per_micro_batch=2", "sample_tokens=2"]


def environment(**more: str) -> dict[str, str]:
    """Without a GPU, as that of the `server`, which goes on with the same runs."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "PITHWOOD_TRACEBACK": "", "CUDA_VISIBLE_DEVICES": "", **more}


def pithwood(*words: str, cwd: Path = ROOT, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """The finished command, run in a process of its own."""
    command = [sys.executable, "-m", "pithwood", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment(), timeout=timeout)


@pytest.mark.quick
@pytest.mark.parametrize("words", [["--help"], *([name, "--help"] for name in COMMANDS)])
def test_help_shows_an_example(words, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 0
    assert "\nexamples:\n  pithwood " in capsys.readouterr().out


@pytest.mark.quick
def test_help_answers_at_once():
    times = []
    for _ in range(6):
        start = time.perf_counter()
        assert pithwood("--help").returncode == 0
        times.append(time.perf_counter() - start)
    assert min(times) < 0.3, times


@pytest.mark.quick
@pytest.mark.parametrize(
    "words", ["--help", "train --help", "recipes --json", "train nothing", "train debug --wrong", "runs --help"]
)
def test_help_lists_and_errors_import_no_torch(words):
    code = f"""
import sys
from pithwood.cli import main
try:
    main({words.split()!r})
except SystemExit:
    pass
heavy = [name for name in ("torch", "numpy", "rich", "tokenizers") if name in sys.modules]
sys.exit(f"imported {{heavy}}" if heavy else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment())
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "words",
    [
        "explain top_k",
        "explain",
        "config --schema",
        "docs tables --check",
        "check op moba --no-tests",
        "bench attention --dry-run",
    ],
)
def test_a_plain_installation_has_no_triton_and_needs_none(words):
    code = f"import sys; sys.modules['triton'] = None; from pithwood.cli import main; sys.exit(main({words.split()!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment())
    assert done.returncode == 0, done.stderr


@pytest.mark.quick
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "which command? "),
        (["trian"], "invalid choice: 'trian'"),
        (["train"], "the following arguments are required: RECIPE"),
        (["train", "debgu"], "unknown recipe 'debgu'; did you mean debug?"),
        (["train", "debug", "steps"], "'steps' is not an override; write path=value"),
        (["train", "debug", "--jsn"], "unknown option --jsn; did you mean --json?"),
        (["train", "missing.py:f"], "recipe file 'missing.py' does not exist"),
        (["recipes", "x"], "unexpected argument 'x'"),
        (["generate"], "the following arguments are required: RUN"),
        (["generate", "r", "--max-tokens", "x"], "--max-tokens: invalid int value: 'x'"),
        (["generate", "r", "--max-tokens", "0"], "--max-tokens=0 must be at least 1"),
        (["generate", "r", "--temperature", "-1"], "--temperature=-1.0 must be 0"),
        (["generate", "r", "--temperature", "nan"], "--temperature=nan must be 0"),
        (["generate", "r", "--top-p", "0"], "--top-p=0.0 must be over 0"),
        (["generate", "r", "--top-k", "-3"], "--top-k=-3 must be 0"),
        (["generate", "r", "--attention", "half"], "--attention: invalid choice: 'half'"),
        (["generate", "r", "--prompt-file", "missing.txt"], "--prompt-file missing.txt cannot be read"),
        (["generate", "r", "--prompt", "a", "--prompt-file", "b"], "not allowed with argument --prompt"),
    ],
)
def test_bad_input_gives_one_clear_line_and_exit_code_2(words, message, capsys, monkeypatch):
    monkeypatch.delenv("PITHWOOD_TRACEBACK", raising=False)
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("pithwood: error: ")
    assert err.count("\n") == 1
    assert message in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("stpes=3", "stpes is unknown: Run has no field 'stpes'; did you mean steps?"),
        ("steps=many", "steps=many is not allowed; give an int"),
        ("steps=0", "steps=0 must be at least 1"),
        ("model.attention.top_kk=3", "did you mean model.attention.top_k?"),
        ("model.attention=NoSuch", 'model.attention.type="NoSuch" is not known'),
        ("precision=fp8", 'precision=fp8 is not allowed; give one of "fp32", "bf16"'),
        ("samples_per_micro_batch=3", "samples_per_micro_batch=3 must divide samples_per_step=8"),
    ],
)
def test_bad_settings_give_one_clear_line_and_exit_code_2(words, message, capsys, monkeypatch, tmp_path):
    monkeypatch.delenv("PITHWOOD_TRACEBACK", raising=False)
    assert main(["train", "debug", words, "--runs-dir", str(tmp_path / "runs")]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message in err
    assert not (tmp_path / "runs").exists()  # refused before any work


@pytest.mark.quick
def test_the_traceback_is_shown_when_asked_for(monkeypatch):
    monkeypatch.setenv("PITHWOOD_TRACEBACK", "1")
    with pytest.raises(ValueError, match="unknown recipe 'debgu'"):
        main(["train", "debgu"])


@pytest.mark.quick
def test_recipes_are_listed_with_what_they_are_for(capsys):
    assert main(["recipes", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["recipes"]
    assert {"debug", "demo", "demo_dense", "lm_100m"} <= {row["name"] for row in rows}
    assert all(row["summary"] for row in rows)
    assert main(["recipes"]) == 0
    text = capsys.readouterr().out
    assert all(row["name"] in text and row["summary"] in text for row in rows)


def test_every_recipe_loads_under_its_own_name_and_passes_its_own_checks():
    from pithwood.config import apply_overrides

    for name, _ in list_recipes():
        assert apply_overrides(load_recipe(name), []).name == name


def test_a_recipe_and_its_neighbours_may_live_in_a_file_of_ones_own(tmp_path, capsys):
    (tmp_path / "neighbour_of_mine.py").write_text("STEPS = 7\n")
    (tmp_path / "recipes_of_mine.py").write_text(
        "from dataclasses import replace\n\nimport neighbour_of_mine\nfrom pithwood.recipes.demo import debug\n"
        "from pithwood.run import Run\n\n\ndef small() -> Run:\n"
        "    return replace(debug(), name='small', steps=neighbour_of_mine.STEPS)\n\n\n"
        "def broken():\n    return 3\n"
    )
    file = tmp_path / "recipes_of_mine.py"
    assert main(["train", f"{file}:small", "--dry-run", "--json", "seed=3"]) == 0
    config = json.loads(capsys.readouterr().out)["config"]
    assert (config["name"], config["steps"], config["seed"]) == ("small", 7, 3)
    for name, message in [
        (f"{file}:smal", "has no function 'smal'; functions annotated -> Run: small"),
        (f"{file}", "names no function; write"),
        (f"{file}:broken", "returned a int; it must return a pithwood.run.Run"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_recipe(name)


def test_a_recipe_file_must_not_shadow_another_module(tmp_path):
    for name in ("json", "this"):  # one that is loaded, one that is not
        (tmp_path / f"{name}.py").write_text("def small():\n    return 3\n")
        with pytest.raises(ValueError, match="has the name of another module"):
            load_recipe(f"{tmp_path / name}.py:small")
    assert "this" not in sys.modules


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str], float]:
    """The issue's own example in a folder of its own: the runs folder, the process, its seconds."""
    folder = tmp_path_factory.mktemp("cli")
    start = time.perf_counter()
    done = pithwood("train", "debug", "--json", "steps=20", cwd=folder)
    return folder, done, time.perf_counter() - start


def test_train_prints_one_json_object_and_leaves_a_run_folder(finished):
    folder, done, seconds = finished
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert 0 < summary["validation_bits_per_byte"] < 8
    assert summary["steps"] == 20
    assert summary["recipe"] == "debug"
    assert "20" in done.stderr  # progress
    run_dir = folder / summary["run_dir"]
    assert run_dir.parent == folder / "runs"
    for name in ("config.json", "events.jsonl", "loss.png", "blocks.png", "sample.txt", "summary.json"):
        assert (run_dir / name).stat().st_size > 0, name
    assert seconds < 60


def test_the_same_command_again_answers_with_the_finished_run(server: Server, finished):
    folder, done, _ = finished
    before = (folder / json.loads(done.stdout)["run_dir"] / "events.jsonl").read_text()
    again = server.call(["train", "debug", "--json", "steps=20"], folder)
    assert again.code == 0, again.err
    old, new = json.loads(done.stdout), json.loads(again.out)
    assert new["run_dir"] == old["run_dir"]
    assert new["validation_bits_per_byte"] == old["validation_bits_per_byte"]
    trained = [
        line for line in (folder / old["run_dir"] / "events.jsonl").read_text().splitlines() if '"train"' in line
    ]
    assert trained == [line for line in before.splitlines() if '"train"' in line]


def test_without_json_the_last_lines_say_what_to_try(server: Server, finished):
    folder, _, _ = finished
    done = server.call(["train", "debug", "steps=20"], folder)
    assert done.code == 0, done.err
    assert "bits per byte" in done.out
    assert "try next:" in done.out
    assert "pithwood generate runs/debug-" in done.out


def test_generate_continues_a_prompt_and_repeats_by_seed(server: Server, finished):
    folder, done, _ = finished
    run = Path(json.loads(done.stdout)["run_dir"]).name
    words = ["generate", run, "--prompt", "import ", "--max-tokens", "5", "--seed", "3"]
    one = server.call([*words, "--json"], folder)
    assert one.code == 0, one.err
    result = json.loads(one.out)
    assert result["text"].startswith("import ")
    assert 0 < result["tokens"] <= 5
    plain = server.call(words, folder)
    assert plain.out == result["text"] + "\n"
    (folder / "prompt.txt").write_text("import ")
    from_file = ["generate", run, "--prompt-file", "prompt.txt", *words[4:], "--attention", "moba"]
    assert server.call(from_file, folder).out.startswith("import ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["generate", "nothing"], "no run 'nothing'"),
        (["generate", "debug", "--step", "7"], "no checkpoint at step '7'"),
        (["train", "debug", "--from", "nothing@3", "seed=5"], "no run 'nothing'"),
    ],
)
def test_runs_and_checkpoints_that_are_not_there_are_named(server: Server, finished, words, message):
    folder, _, _ = finished
    done = server.call(words, folder)
    assert (done.code, done.out) == (2, "")
    assert "Traceback" not in done.err
    assert message in done.err.splitlines()[-1]


def test_from_branches_off_a_checkpoint(server: Server, finished):
    folder, done, _ = finished
    run = Path(json.loads(done.stdout)["run_dir"]).name
    words = ["train", "debug", "--from", f"{run}@20", "optim.lr=0.001", "steps=22", "sample_tokens=2", "--json"]
    branch = server.call(words, folder)
    assert branch.code == 0, branch.err
    summary = json.loads(branch.out)
    assert Path(summary["run_dir"]).name != run
    events = [json.loads(line) for line in (folder / summary["run_dir"] / "events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["kind"] == "train"] == [21, 22]


def test_dry_run_tells_settings_and_cost_and_starts_nothing(tmp_path):
    words = ["train", "debug", "--dry-run", "--json", "steps=1e3"]
    code = f"import sys; from pithwood.cli import main; sys.exit(main({words}) or 'sympy' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment(), timeout=300
    )
    assert done.returncode == 0, done.stderr or "sympy was imported, which takes as long as half of torch"
    result = json.loads(done.stdout)
    assert result["config"]["steps"] == 1000
    assert result["plan"]
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_stopped_run_saves_and_the_same_command_goes_on(server: Server, tmp_path, number):
    words = ["train", "debug", "--json", "steps=60", "log_every=1", "checkpoint_every=1000", *SMALL]
    command = [sys.executable, "-m", "pithwood", *words]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=environment()
    ) as process:
        deadline = time.monotonic() + 120
        while not _trained_steps(tmp_path) and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(number)
        out, err = process.communicate(timeout=240)
    assert process.returncode == 128 + number, err
    summary = json.loads(out)
    assert summary["interrupted"] == number
    assert f"{number.name}: stopping after this step, then saving" in err
    stopped = _trained_steps(tmp_path)
    assert 0 < len(stopped) < 60
    done = server.call(words, tmp_path)
    assert done.code == 0, done.err
    assert _trained_steps(tmp_path) == list(range(1, 61))


def _trained_steps(folder: Path) -> list[int]:
    """Steps in the event log of the only run of a folder, a line that is still being written left out."""
    steps = []
    for path in folder.glob("runs/debug-*/events.jsonl"):
        for line in path.read_text().splitlines():
            if line.endswith("}") and (event := json.loads(line))["kind"] == "train":
                steps.append(event["step"])
    return steps
