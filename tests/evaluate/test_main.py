import json
import os
import pickle
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from accelerate.state import AcceleratorState, GradientState, PartialState

from cdit.common.cli import run
from cdit.common.errors import UserError
from cdit.evaluate.__main__ import main
from cdit.evaluate.results import Results, difference
from cdit.evaluate.study import Study

SHORT = ["--time.seconds", "[0.5,2]", "--rollout.seconds", "[1,2]", "--time.samples", "7", "--rollout.samples", "3"]
SHORT += ["--batch_size", "2", "--pictures", "2", "--metrics", "[psnr,ssim]"]


class Done(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def evaluate(
    walks: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> Callable[..., Done]:
    """Runs the command in this process, with results in the folder "out" if no other is given."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")

    def call(*options: str) -> Done:
        always = ["--checkpoint", str(checkpoint), "--data", str(walks), "--tracking", "none", "--out", "out"]
        monkeypatch.setattr(sys, "argv", ["evaluate", *always, *SHORT, *options])
        code = 0
        try:
            run(main)
        except SystemExit as end:
            code = end.code
        finally:
            for state in (AcceleratorState, GradientState, PartialState):
                state._reset_state()
        return Done(code, *capsys.readouterr())

    return call


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The protocol and number of every batch that is computed."""
    calls = []
    compute = Study.compute

    def noted(self: Study, batch: int, *arguments):
        calls.append((self.protocol.name, batch))
        return compute(self, batch, *arguments)

    monkeypatch.setattr(Study, "compute", noted)
    return calls


ALL = [("time", i) for i in range(4)] + [(f"rollout_{fps}fps", i) for fps in (1, 4) for i in range(2)]


def results(folder: str = "out") -> dict:
    return json.loads(Path(folder, "results.json").read_text())


def test_what_it_leaves(evaluate: Callable[..., Done], checkpoint: Path):
    done = evaluate()
    assert done.code == 0
    found, text = results(), Path("out/results.md").read_text()
    assert text in done.out
    assert found["checkpoint"] == str(checkpoint)
    assert found["sampler"]["steps"] == 2
    assert found["protocols"].keys() == {"time", "rollout_1fps", "rollout_4fps"}
    for name, protocol in found["protocols"].items():
        samples = 7 if name == "time" else 3
        assert (protocol["samples"], protocol["trajectories"]) == (samples, 3)
        rows = {(row["method"], row["metric"], row["seconds"]): row for row in protocol["rows"]}
        methods, horizons = ("model", "copy_last", "shuffled_actions"), ([0.5, 2] if name == "time" else [1, 2])
        differences = ("model-copy_last", "model-shuffled_actions")
        assert rows.keys() == {(m, k, s) for m in methods + differences for k in ("psnr", "ssim") for s in horizons}
        section = re.search(rf"## {name}\n(.*?)(?=\n## |\Z)", text, re.DOTALL)[1]
        for (method, metric, seconds), row in rows.items():
            values = [np.array(rows[one, metric, seconds]["values"]) for one in method.split("-")]
            assert all(len(value) == samples for value in values)
            assert row["mean"] == pytest.approx((values[0] - values[1] if len(values) == 2 else values[0]).mean())
            assert row["low"] < row["mean"] < row["high"]
            digits = 2 if metric == "psnr" else 3
            assert (
                f"{row['mean']:{'+' * (len(values) - 1)}.{digits}f} ± {(row['high'] - row['low']) / 2:.{digits}f}"
                in section
            )

    page = Path("out/index.html").read_text()
    links = re.findall(r'src="([^"]+)"', page)
    assert all(Path("out", link).is_file() for link in links)
    rollouts = [f"pictures/rollout_{fps}fps{which}" for fps in (1, 4) for which in (".png", "_0.png", "_1.mp4")]
    assert {"pictures/time.png", *rollouts} <= set(links)
    assert (
        page.count("<tr>") == 3 * 2 * 6
    )  # three protocols, two metrics, each with a head, three methods and two differences

    loaded = Results.load("out")
    time = loaded.protocols["time"]
    assert time.cases == [tuple(case) for case in found["protocols"]["time"]["cases"]]
    model, copied = (time.values(method, "psnr", 2.0) for method in ("model", "copy_last"))
    better = difference(time, time, "psnr", 2.0, ("model", "copy_last"))
    assert better.mean == pytest.approx((model - copied).mean())
    (row,) = (row for row in time.rows if (row.method, row.metric, row.seconds) == ("model-copy_last", "psnr", 2.0))
    assert (row.low, row.high) == pytest.approx((better.low, better.high))
    with pytest.raises(UserError, match="different cases"):
        difference(time, loaded.protocols["rollout_4fps"], "psnr", 2.0)
    with pytest.raises(KeyError):
        time.values("model", "psnr", 1.0)


def test_curves_measure_every_second_and_leave_a_plot(evaluate: Callable[..., Done], computed: list):
    options = ["--protocols", "[rollout]", "--rollout.curves", "true", "--rollout.seconds", "[1.5,3]"]
    done = evaluate(*options, "--rollout.fps", "[4]")
    assert done.code == 0
    assert "control is left out" in done.err  # the walks have no camera
    found, text, page = results()["protocols"], Path("out/results.md").read_text(), Path("out/index.html").read_text()
    assert list(found) == ["rollout_4fps", "jump", "return", "curves"]
    seconds = {row["seconds"] for row in found["rollout_4fps"]["rows"] if row["metric"] == "sharpness"}
    assert seconds == {1, 1.5, 2, 3}
    assert "| rollout at 4 fps − in one jump |" in text
    assert "| PSNR ↑ | 1.5 s | 3 s |" in text
    assert 'src="pictures/curves.png"' in page
    assert Path("out/pictures/curves.png").is_file()
    loaded = Results.load("out").protocols
    one = difference(loaded["rollout_4fps"], loaded["jump"], "psnr", 2.0)
    (row,) = (r for r in loaded["curves"].rows if " − " in r.method and (r.metric, r.seconds) == ("psnr", 2.0))
    assert row.mean == pytest.approx(one.mean)
    computed.clear()
    assert evaluate(*options, "--rollout.fps", "[4]").code == 0
    assert not computed


def test_an_interrupted_evaluation_goes_on(evaluate: Callable[..., Done], computed: list, monkeypatch):
    assert evaluate("--out", "straight").code == 0
    assert computed == ALL
    computed.clear()
    compute = Study.compute

    def stops(self: Study, batch: int, *arguments):
        found = compute(self, batch, *arguments)
        if (self.protocol.name, batch) == ("rollout_1fps", 1):
            raise KeyboardInterrupt
        return found

    with monkeypatch.context() as patch:
        patch.setattr(Study, "compute", stops)
        assert evaluate().code == 130
    assert not Path("out/results.json").exists()
    Path("out/parts/rollout_4fps/.00000.safetensors.partial").write_bytes(b"cut sho")
    Path("out/parts/time/00002.safetensors").unlink()
    computed.clear()
    assert evaluate().code == 0
    assert computed == [ALL[2], *ALL[5:]]
    assert results()["protocols"] == results("straight")["protocols"]
    before = Path("out/results.json").read_bytes()
    computed.clear()
    assert evaluate().code == 0
    assert not computed
    assert Path("out/results.json").read_bytes() == before


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--seed", "1"], "seed"),
        (["--metrics", "[sharpness]"], "metrics"),
        (["--sampler.steps", "3"], "sampler"),
        (["--nwm_compat", "true"], "nwm_compat"),
        (["--time.seconds", "[1,2]"], "protocol"),
        (["--time.samples", "5"], "cases"),
        (["--batch_size", "3"], "batch_size"),
        (["--spacing", "0.5"], "spacing"),
    ],
)
def test_parts_of_another_evaluation_are_not_taken(
    evaluate: Callable[..., Done], computed: list, options: list[str], named: str
):
    assert evaluate("--protocols", "[time]").code == 0
    before = Path("out/results.json").read_bytes()
    computed.clear()
    done = evaluate("--protocols", "[time]", *options)
    assert done.code == 2
    assert re.search(rf"error: out/parts/time holds parts of another evaluation \(.*{named}.*--overwrite", done.err)
    assert not computed
    assert Path("out/results.json").read_bytes() == before
    before = json.loads(before)["protocols"]
    assert evaluate("--protocols", "[time]", *options, "--overwrite", "true").code == 0
    assert len(computed) >= 2
    if named != "spacing":  # which this model, trained on one, does not use
        assert results()["protocols"] != before


@pytest.mark.parametrize("options", [["--sampler.steps", "3"], ["--sampler.hold", "2"], ["--nwm_compat", "true"]])
def test_options_of_rollouts_change_what_is_predicted(evaluate: Callable[..., Done], options: list[str]):
    assert evaluate("--protocols", "[rollout]").code == 0
    assert evaluate("--protocols", "[rollout]", "--out", "other", *options).code == 0
    before, after = (Results.load(folder).protocols["rollout_4fps"] for folder in ("out", "other"))
    assert not np.allclose(before.values("model", "psnr", 2.0), after.values("model", "psnr", 2.0), atol=1e-4)
    assert np.allclose(before.values("copy_last", "psnr", 2.0), after.values("copy_last", "psnr", 2.0), atol=0.1)


def test_other_weights_are_noticed(evaluate: Callable[..., Done], world, tmp_path: Path):
    assert evaluate("--protocols", "[time]").code == 0
    other = world()
    next(other.cdit.parameters()).data += 1e-3
    other.save_pretrained(tmp_path / "other")
    done = evaluate("--protocols", "[time]", "--checkpoint", str(tmp_path / "other"))
    assert done.code == 2
    assert "other weights" in done.err


def test_a_dataset_recorded_anew_in_place_is_noticed(evaluate: Callable[..., Done], computed: list, walks: Path):
    """With the names and lengths of before; one that was moved is the same."""
    shutil.copytree(walks, "moving")
    options = ["--protocols", "[time]", "--data"]
    assert evaluate(*options, "moving").code == 0
    Path("moving").rename("moved")
    computed.clear()
    assert evaluate(*options, "moved").code == 0
    assert not computed
    pictures = sorted(Path("moved/a").glob("*.jpg"))
    for file, content in zip(pictures, [file.read_bytes() for file in reversed(pictures)], strict=True):
        file.write_bytes(content)
    done = evaluate(*options, "moved")
    assert done.code == 2
    assert "out/parts/time holds parts of another evaluation (other data)" in done.err
    assert evaluate(*options, "moved", "--overwrite").code == 0
    poses = Path("moved/b/traj_data.pkl")
    poses.write_bytes(pickle.dumps({name: -value for name, value in pickle.loads(poses.read_bytes()).items()}))
    assert "(other data)" in evaluate(*options, "moved").err


def test_distances_of_distributions(evaluate: Callable[..., Done], monkeypatch: pytest.MonkeyPatch):
    """By networks of one's own; the 1-FPS rollouts, two frames, are too short for that of films."""
    code = "def forward(self, x):\n        return x.mean((-2, -1)).flatten(1)\n"
    code = f"import torch\nclass Net(torch.nn.Module):\n    {code}class FilmNet(Net):\n    min_frames = 3\n"
    Path("nets.py").write_text(code)
    monkeypatch.syspath_prepend(".")
    networks = ["--fid_network", "nets:Net", "--fvd_network", "nets:FilmNet"]
    done = evaluate("--metrics", "[psnr,fid,fvd]", *networks)
    assert done.code == 0
    assert "FVD is left out of rollout_1fps: nets:FilmNet needs videos of 3 frames, not 2" in done.err
    tables = {name: {row["metric"] for row in found["rows"]} for name, found in results()["protocols"].items()}
    assert tables == {"time": {"psnr", "fid"}, "rollout_1fps": {"psnr", "fid"}, "rollout_4fps": {"psnr", "fid", "fvd"}}
    text = Path("out/results.md").read_text()
    assert "| FVD ↓ | 2 s |" in text
    assert "FID and FVD of these 7 samples" in text


def test_bf16(evaluate: Callable[..., Done]):
    assert evaluate("--protocols", "[time]").code == 0
    assert evaluate("--protocols", "[time]", "--mixed_precision", "bf16", "--out", "bf16").code == 0
    exact, rough = (Results.load(folder).protocols["time"] for folder in ("out", "bf16"))
    assert not np.array_equal(exact.values("model", "psnr", 2.0), rough.values("model", "psnr", 2.0))
    np.testing.assert_allclose(exact.values("model", "psnr", 2.0), rough.values("model", "psnr", 2.0), rtol=0.01)
    assert np.array_equal(exact.values("copy_last", "psnr", 2.0), rough.values("copy_last", "psnr", 2.0))


def test_an_index_file_says_what_is_measured(evaluate: Callable[..., Done]):
    Path("time.pkl").write_bytes(pickle.dumps([("b", 7, -7, 8), ("a", 4, -4, 12), ("b", 3, 0, 8)]))
    assert evaluate("--protocols", "[time]", "--time.index", "time.pkl").code == 0
    assert results()["protocols"]["time"]["cases"] == [["b", 7], ["a", 4], ["b", 3]]


def test_a_spacing_that_nobody_knows_is_asked_for(evaluate: Callable[..., Done], world, walks: Path, tmp_path: Path):
    """Where the model was trained on several and dataset.json is missing, or silent."""
    mixed = world()
    mixed.description.units.spacing = None
    mixed.save_pretrained(tmp_path / "mixed")
    shutil.copytree(walks, "bare")
    Path("bare/dataset.json").unlink()
    options = ["--protocols", "[time]", "--checkpoint", "mixed"]
    done = evaluate(*options, "--data", "bare")
    assert done.code == 2
    assert re.search(r"error: spacing: .* bare gives none", done.err)
    assert not Path("out").exists()
    assert evaluate(*options, "--data", "bare", "--spacing", "0.25").code == 0
    assert evaluate(*options, "--out", "told").code == 0
    assert results()["protocols"]["time"] == results("told")["protocols"]["time"]


def test_out_that_is_a_file(evaluate: Callable[..., Done], computed: list):
    Path("out").write_text("words")
    done = evaluate()
    assert done.code == 2
    assert "error: out is out, but out is not a folder" in done.err
    assert not computed


class Poison:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("poisoned",)


def test_a_poisoned_index_file_is_refused_and_not_run(evaluate: Callable[..., Done], computed: list):
    entries = [("a", 5, -5, 8), ("b", Poison(), 0, 8)]
    for protocol in ("time", "rollout"):  # whichever the file is for, the other is not begun, either
        Path("index.pkl").write_bytes(pickle.dumps(entries))
        done = evaluate(f"--{protocol}.index", "index.pkl")
        assert done.code == 2
        assert "index.pkl: not a readable pickle" in done.err
        assert "mkdir" in done.err
    assert not Path("poisoned").exists()
    assert not Path("out").exists()
    assert not computed


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--time.seconds", "[1,16]"], r"time.seconds: no trajectory .* 16 s .* the longest possible is 6.75 s"),
        (["--rollout.seconds", "[16]"], r"rollout.seconds: no trajectory .* the longest possible is 6.75 s"),
        (["--time.seconds", "[-1]"], "time.seconds is .*more than 0"),
        (["--time.seconds", "[1,1]"], "time.seconds is .*each of them once"),
        (["--protocols", "[]"], "protocols is .*at least one"),
        (["--rollout.fps", "[3]"], "rollout.fps is 3"),
        (["--time.samples", "0"], "time.samples is 0"),
        (["--time.index", "none.pkl"], "none.pkl: not readable"),
        (["--metrics", "[psnr,beauty]"], "beauty"),
        (["--metrics", "[fid]", "--fid_network", "nowhere:net"], "fid_network is 'nowhere:net'"),
        (["--sampler.scheduler", "ddpm"], "ddpm"),
        (["--checkpoint", "nowhere"], "checkpoint is nowhere, which does not exist"),
        (["--split", "train"], "split 'train'"),
    ],
)
def test_mistakes_are_found_before_anything_is_written(
    evaluate: Callable[..., Done], computed: list, options: list[str], complaint: str
):
    done = evaluate(*options)
    assert done.code == 2
    assert re.search(complaint, done.err)
    assert not Path("out").exists()
    assert not computed


@pytest.mark.slow
@pytest.mark.parametrize("fate", ["os.kill(os.getpid(), 9)", "time.sleep(600)"])
def test_a_lost_process_is_not_waited_for(walks: Path, checkpoint: Path, tmp_path: Path, fate: str):
    """Started without a launcher, which would end the others; the second process dies or hangs in its first batch."""
    (tmp_path / "lost.py").write_text(
        f"import os, sys, time\nfrom cdit.evaluate.study import Study\n"
        f"if os.environ['RANK'] == '1':\n    Study.compute = lambda *_: {fate}\n"
        "from cdit.common.cli import run\nfrom cdit.evaluate.__main__ import main\nrun(main)\n"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    options = ["--checkpoint", str(checkpoint), "--data", str(walks), *SHORT, "--protocols", "[time]", "--out", "out"]
    together = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
    processes = [
        subprocess.Popen(
            [sys.executable, "lost.py", *options, "--timeout_minutes", "0.2"],
            cwd=tmp_path,
            env={**os.environ, **together, "RANK": rank, "LOCAL_RANK": rank, "CUDA_VISIBLE_DEVICES": ""},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    try:
        _, output = processes[0].communicate(timeout=300)
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert processes[0].returncode == 75, output
    assert "stopped: another process does not answer (" in output


@pytest.mark.slow
def test_two_processes_find_what_one_does(walks: Path, checkpoint: Path, tmp_path: Path):
    """Seven samples in batches of two on two processes: a batch is short, and the processes have unequal shares."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "ACCELERATE_", "HF_"))}
    home = {"HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    environment = {**kept, **home, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    options = ["-m", "cdit.evaluate", "--checkpoint", str(checkpoint), "--data", str(walks), *SHORT]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]  # accelerate's needs GPUs
    printed, shares = {}, {}
    for name, command, tracking in (("one", [], "wandb"), ("two", launch, "none")):
        done = subprocess.run(
            [sys.executable, *command, *options, "--out", str(tmp_path / name), "--tracking", tracking],
            cwd=tmp_path,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        printed[name] = done.stdout
        shares[name] = set(re.findall(r"/(\d+) \[", done.stderr))
    assert shares == {"one": {"13"}, "two": {"8"}}  # every other batch of 2, 2, 2, 1, 2, 1, 2, 1 samples
    one, two = (results(str(tmp_path / name)) for name in ("one", "two"))
    assert one["protocols"] == two["protocols"]
    assert (tmp_path / "one/results.md").read_bytes() == (tmp_path / "two/results.md").read_bytes()
    assert printed["two"].count("## time") == 1
    assert "W&B offline" in printed["one"]
    (logged,) = (tmp_path / "one/wandb").glob("offline-run-*/*.wandb")
    assert logged.stat().st_size > 1000
