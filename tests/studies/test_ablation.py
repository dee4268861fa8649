"""Ablations: what is trained and measured, and that the table says what the runs say."""

import json
import pickle
import re
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from cdit.common.cli import parse_config
from cdit.common.errors import UserError
from cdit.data.config import DataConfig
from cdit.evaluate.config import EvaluateConfig
from cdit.evaluate.results import ProtocolResult, Results
from cdit.evaluate.tables import Row
from cdit.studies import ablation
from cdit.studies.__main__ import main
from cdit.studies.ablation import (
    ablate,
    check_comparable,
    check_folder,
    report,
    resolve,
    runs_of,
    train,
)
from cdit.studies.config import AblationConfig
from cdit.training.config import TrainConfig, flat

SPECS = sorted((Path(__file__).parents[2] / "configs" / "ablations").glob("*.yaml"))


def spec(folder: Path, **changes) -> Path:
    values = {
        "name": "trial",
        "base": str(folder / "base.yaml"),
        "variants": {"Four frames": {}, "One frame": {"data.context_frames": 1, "data.min_history": 1}},
        "reference": "Four frames",
        "seconds": [0.25, 1.0],
        "cases": 5,
        "metrics": ["psnr"],
        "launch": sys.executable,
        "output": str(folder / "out"),
    } | changes
    path = folder / "spec.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def config_of(path: Path, *options: str) -> AblationConfig:
    return parse_config(AblationConfig, "", ["--config", str(path), *options])


def base(folder: Path, data: Path) -> None:
    config = {
        "data": {"folder": str(data), "train_split": "test", "image_size": [32, 32], "workers": 0, "min_history": 4},
        "model": {"hidden_size": 24, "depth": 1, "num_heads": 2, "patch_size": 8},
        "sampler": {"steps": 1},
        "steps": 1, "batch_size": 2, "mixed_precision": "no",
        "validation": {"samples": 2},
        "probe": {"samples": 1, "final_samples": 1, "rollouts": 0, "rows": 1, "attention": {"samples": 0}},
        "tracking": "none",
    }  # fmt: skip
    (folder / "base.yaml").write_text(yaml.safe_dump(config))


@pytest.mark.slow
def test_an_ablation_from_end_to_end(walks: Path, tmp_path: Path):
    base(tmp_path, walks)
    ablate(config_of(spec(tmp_path)))
    folder = tmp_path / "out" / "trial"
    # All variants are measured on the same cases, those that the longest context allows.
    index = pickle.loads((folder / "cases.pkl").read_bytes())
    found = {name: Results.load(folder / name / "evaluation") for name in ("four_frames_seed0", "one_frame_seed0")}
    for results in found.values():
        assert results.protocols["time"].cases == [(name, now) for name, now, *_ in index]
        assert len(index) == 5
    assert min(now for _, now, *_ in index) >= 3
    # The table's means are those of the evaluations, and its differences theirs.
    table = (folder / "results.md").read_text()
    four, one = (results.protocols["time"].values("model", "psnr", 1.0) for results in found.values())
    assert re.search(rf"\| Four frames \|.*\| {four.mean():.2f}", table)
    assert re.search(rf"\| One frame \|.*\| {one.mean():.2f}", table)
    differences = json.loads((folder / "results.json").read_text())["differences"]
    last = next(found for found in differences if found["seconds"] == 1.0)
    assert last["variant"] == "One frame"
    assert last["difference"]["mean"] == pytest.approx((one - four).mean())
    assert last["seeds"] == pytest.approx([(one - four).mean()])
    # Asked for something else, it does not give the old runs' numbers for the answer.
    config = config_of(spec(tmp_path))
    run = runs_of(config, "One frame")[0]
    resolved = resolve(run)
    check_folder(run, resolved)
    other = resolved | {"steps": 2, "optimizer": resolved["optimizer"] | {"betas": [0.9, 0.9]}}
    with pytest.raises(UserError, match=r"one_frame_seed0 .* of another config \(other steps, optimizer.betas\)"):
        check_folder(run, other)
    # What is done is not done again: without its config, a run could not be trained.
    (tmp_path / "base.yaml").unlink()
    train(run, config)
    with pytest.raises(UserError, match="variant 'One frame', seed 1: exit code 2"):
        train(runs_of(replace(config, seeds=[1]), "One frame")[0], config)


@pytest.mark.slow
def test_a_variant_that_cannot_be_trained_is_found_before_anything_is(walks: Path, tmp_path: Path):
    base(tmp_path, walks)
    variants = {"fine": {}, "wrong": {"model.num_haeds": 3}}
    with pytest.raises(UserError, match=r"(?s)variant 'wrong'.*num_haeds"):
        ablate(config_of(spec(tmp_path, variants=variants, reference="fine")))
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_evaluated_is_found_before_anything_is_trained(
    walks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    data = {
        "folder": "somewhere",
        "test_split": "test",
        "splits": None,
        "mix": [],
        "fps": None,
        "follow_links": False,
        "source": "auto",
        "camera": None,
        "action_key": "action",
    }
    monkeypatch.setattr(ablation, "resolve", lambda run: {"data": data})
    monkeypatch.setattr(ablation, "train", lambda run, config: pytest.fail("trained"))
    with pytest.raises(UserError, match="batch_size is 0"):
        ablate(config_of(spec(tmp_path, evaluate={"batch_size": 0})))
    with pytest.raises(SystemExit):
        ablate(config_of(spec(tmp_path, metrics=["pnsr"])))
    with pytest.raises(UserError, match="expected one protocol each, at one"):
        ablate(config_of(spec(tmp_path, evaluations={"rollouts": {"protocols": ["rollout"]}})))
    with pytest.raises(UserError, match="fid cannot be compared sample by sample"):
        ablate(config_of(spec(tmp_path, metrics=["psnr", "fid"])))
    data["folder"] = None
    with pytest.raises(UserError, match=r"expected a data\.folder"):
        ablate(config_of(spec(tmp_path)))
    data |= {"folder": str(walks), "context_frames": 4, "image_size": [32, 32]}
    slow = {"rollouts": {"protocols": ["rollout"], "rollout.fps": [1.0]}}
    with pytest.raises(UserError, match=r"0.25 s is not a positive whole number of frames at 1 "):
        ablate(config_of(spec(tmp_path, evaluations=slow)))
    with pytest.raises(UserError, match=r"0.3 s is not a positive whole number of frames"):
        ablate(config_of(spec(tmp_path, seconds=[0.3])))
    with pytest.raises(UserError, match="long enough"):
        ablate(config_of(spec(tmp_path, seconds=[100.0])))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"metrics": ["ssim"]}, "metrics"),
        ({"time.seconds": [1.0]}, "time.seconds"),
        ({"time": {"index": "a"}}, "time.i"),
    ],
)
def test_evaluations_that_could_not_be_compared_are_refused(tmp_path: Path, options: dict, named: str):
    for choice in ({"evaluate": options}, {"evaluations": {"one": {}, "other": options}}):
        with pytest.raises(UserError, match=f"evaluate, evaluations: {named}"):
            ablate(config_of(spec(tmp_path, **choice)))


def test_a_variant_wins_over_options_for_all(tmp_path: Path):
    """Also over those of the command line, which are nested: of two options for one field the last one counts."""
    path = spec(
        tmp_path, variants={"Muon": {"optimizer.name": "muon"}}, reference="Muon", train={"optimizer.name": "muon"}
    )
    options = runs_of(config_of(path, "--train.optimizer.name", "adamw"), "Muon")[0].options
    values = [options[i + 1] for i, option in enumerate(options) if option.startswith("--optimizer")]
    assert "{name: adamw}" in values
    assert values[-1] == "muon"


def test_a_launcher_that_is_not_there(tmp_path: Path):
    config = config_of(spec(tmp_path, launch="no_such_launcher --fast"))
    with pytest.raises(UserError, match="launch: no_such_launcher cannot be started"):
        train(runs_of(config, "One frame")[0], config)


def test_runs_of_equal_time_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Slice by slice, each turn beginning with another run; one that is ahead after an interruption is not called."""
    config = config_of(spec(tmp_path, train_seconds=60.0, slices=3, seeds=[0, 1]))
    calls: list[tuple[str, float]] = []

    def called(command: list[str], run: ablation.Run) -> None:
        assert command[command.index("--train_seconds") + 1] == "60.0"
        until = float(command[command.index("--stop_at_seconds") + 1]) if "--stop_at_seconds" in command else 60.0
        calls.append((run.folder.name, until))
        trained(run.folder, until + 0.5)

    def trained(folder: Path, seconds: float) -> None:
        for path in ("last", "checkpoints/step_00000001"):
            (folder / path).mkdir(parents=True, exist_ok=True)
        (folder / "last/world_model.json").write_text("{}")
        (folder / "checkpoints/latest").write_text("step_00000001\n")
        state = {"step": round(10 * seconds), "seconds": seconds}
        (folder / "checkpoints/step_00000001/state.json").write_text(json.dumps(state))

    monkeypatch.setattr(ablation, "_call", called)
    monkeypatch.setattr(ablation, "resolve", lambda run: {"data": {"folder": "nowhere", "source": "auto"}})
    monkeypatch.setattr(ablation, "choose_cases", lambda *_: ([], 4.0))
    for name in ("check_comparable", "check_folder", "evaluate"):
        monkeypatch.setattr(ablation, name, lambda *_: None)
    monkeypatch.setattr(
        ablation,
        "evaluation_options",
        lambda *_: ["--checkpoint", "", "--data", "", "--out", "", "--protocols", "[time]"],
    )
    monkeypatch.setattr(ablation, "report", lambda *_: "")
    names = ["four_frames_seed0", "four_frames_seed1", "one_frame_seed0", "one_frame_seed1"]
    trained(config.folder / names[1], 41.0)
    ablate(config)
    first, second, third = ([name for name, until in calls if until == end] for end in (20.0, 40.0, 60.0))
    assert first == [names[0], *names[2:]]
    assert second == [*names[2:], names[0]]
    assert third == [*names[2:], *names[:2]]
    assert calls == [*((name, 20.0) for name in first), *((n, 40.0) for n in second), *((n, 60.0) for n in third)]
    assert [ablation._trained(run)["step"] for run in runs_of(config, "One frame")] == [605, 605]


def test_what_is_compared_is_named(tmp_path: Path):
    with pytest.raises(UserError, match="reference is 'five', expected one of Four frames, One frame"):
        ablate(config_of(spec(tmp_path, reference="five")))
    with pytest.raises(UserError, match="seeds is "):
        ablate(config_of(spec(tmp_path), "--seeds", "[]"))
    with pytest.raises(UserError, match="two runs would share a folder"):
        ablate(config_of(spec(tmp_path, variants={"Four frames": {}, "four-frames": {"steps": 2}})))
    with pytest.raises(UserError, match="evaluations: two would share a folder"):
        ablate(config_of(spec(tmp_path, evaluations={"one call": {}, "one_call": {}})))


def test_the_command_takes_the_spec_by_position(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    given = []
    monkeypatch.setattr(ablation, "ablate", given.append)
    monkeypatch.setattr(sys, "argv", ["studies", "ablate", str(spec(tmp_path)), "--seeds", "[3,4]"])
    main()
    assert given == [config_of(spec(tmp_path), "--seeds", "[3,4]")]


def test_variants_are_measured_on_one_dataset(tmp_path: Path):
    config = config_of(spec(tmp_path))
    one = {"data": asdict(DataConfig("a"))}
    check_comparable(config, {"Four frames": one, "One frame": one})
    different = "different datasets"
    for key, value, message in [
        ("mix", [{"folder": "b"}], "one dataset"), ("fps", 2.0, different), ("camera", "left", different),
    ]:  # fmt: skip
        other = {"data": one["data"] | {key: value}}
        with pytest.raises(UserError, match=message):
            check_comparable(config, {"Four frames": one, "One frame": other})


def logged(run: Path, rate: float, loss: float) -> None:
    """The config and the log of a run of batches of 4 contexts with 4 goals."""
    (run / "config.yaml").write_text(yaml.safe_dump({"batch_size": 4, "data": {"goals": 4}, "log_every": 10}))
    rows = [{"step": step, "train/samples_per_second": rate} for step in (10, 20)] + [
        {"step": 20, "validation/loss": loss}
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def results_of(values: dict[float, np.ndarray], trajectories: list[str]) -> Results:
    rows = [Row("model", seconds, 1, "psnr", 0.0, found.tolist()) for seconds, found in values.items()]
    cases = [(name, now) for now, name in enumerate(trajectories)]
    return Results({}, {"time": ProtocolResult("time", 4.0, cases, rows)})


def test_means_over_seeds_and_paired_intervals(tmp_path: Path):
    """Samples differ by far more than the variants do, which are 0.6 and 0.4 apart, by seed."""
    random = np.random.default_rng(0)
    trajectories = [f"walk {i // 10}" for i in range(100)]
    difficulty = random.normal(20, 5, 100)
    config = AblationConfig("demo", "", {"plain": {}, "better": {}}, "plain", seeds=[3, 4], seconds=[1.0],
                            metrics=["psnr"], output=str(tmp_path))  # fmt: skip
    runs = [run for name in config.variants for run in runs_of(config, name)]
    gain = {("plain", 3): 0.0, ("plain", 4): 0.0, ("better", 3): 0.6, ("better", 4): 0.4}
    for run in runs:
        folder = run.folder / ablation.EVALUATION
        folder.mkdir(parents=True)
        noise = random.normal(0, 0.01, 100)
        results_of({1.0: difficulty + gain[run.variant, run.seed] + noise}, trajectories).save(folder)
        logged(run.folder, rate={3: 32.0, 4: 64.0}[run.seed], loss={3: 0.02, 4: 0.01}[run.seed])
    text = report(config, runs)
    assert "| plain | 20." in text
    assert "| better | +0.50 [+0.50, +0.50] (+0.60, +0.40) |" in text
    written = json.loads((tmp_path / "demo" / "results.json").read_text())
    means = {row["method"]: row for row in written["means"]}
    assert means["better"]["mean"] == pytest.approx(difficulty.mean() + 0.5, abs=0.01)
    error = difficulty.reshape(10, 10).mean(1).std(ddof=1) / 10**0.5  # of the mean of ten equally long walks
    assert means["plain"]["high"] - means["plain"]["low"] == pytest.approx(2 * 2.262 * error, rel=0.1)
    assert written["differences"][0]["seeds"] == pytest.approx([0.6, 0.4], abs=0.01)
    # Over two seeds, Student's interval is ± 12.706 · |a - b| / 2.
    better = written["summary"]["better"]
    assert better["psnr"]["mean"] == pytest.approx(difficulty.mean() + 0.5, abs=0.01)
    assert better["validation loss"]["mean"] == pytest.approx(0.015)
    assert better["validation loss"]["high"] == pytest.approx(0.015 + 12.706 * 0.005, rel=1e-4)
    assert better["steps/s"]["mean"] == pytest.approx((32 + 64) / 2 / 16)
    assert "| better | 2" in text.partition("samples of")[0]
    assert "0.01500 ± 0.06353 | 3.00 ± 12.71 |" in text


def test_each_variant_is_measured_in_several_ways(tmp_path: Path):
    """Every evaluation of every variant has a row of its own, compared with the same evaluation of the reference."""
    evaluations = {"jump": {"sampler.steps": 2}, "rollout": {"protocols": ["rollout"], "rollout.fps": [4.0]}}
    config = config_of(spec(tmp_path, seconds=[1.0], evaluations=evaluations))
    values = {("Four frames", "jump"): 20, ("Four frames", "rollout"): 18, ("One frame", "jump"): 19,
              ("One frame", "rollout"): 14}  # fmt: skip
    data = asdict(DataConfig("a", test_split="b", source="lerobot", camera="left", action_key="joints"))
    for (variant, evaluation), value in values.items():
        run = runs_of(config, variant)[0]
        asked = parse_config(EvaluateConfig, "", ablation.evaluation_options(run, config, data, evaluation))
        assert (asked.source, asked.camera, asked.action_key) == ("lerobot", "left", "joints")
        assert asked.protocols == (["time"] if evaluation == "jump" else ["rollout"])
        assert asked.sampler.steps == (2 if evaluation == "jump" else None)
        assert asked.rollout.index == asked.time.index == str(config.index)
        assert asked.rollout.seconds == [1.0]
        found = results_of({1.0: np.array([value, value + 2.0])}, ["a", "b"])
        if evaluation == "rollout":
            found = Results({}, {"rollout_4fps": found.protocols["time"]})
        Path(asked.out).mkdir(parents=True)
        found.save(Path(asked.out))
        logged(run.folder, rate=32.0, loss=0.02)
    text = report(config, [runs_of(config, variant)[0] for variant in config.variants])
    for (variant, evaluation), value in values.items():
        assert f"| {variant}, {evaluation} | {value + 1:.2f} |" in text
    assert re.search(r"\| One frame, jump \| -1.00", text)
    assert re.search(r"\| One frame, rollout \| -4.00", text)
    assert not re.search(r"\| Four frames, \w+ \| [+-]", text)


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)
def test_the_specs_in_the_repository_are_understood_by_training(path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(path.parents[2])
    config = config_of(path)
    assert config.reference in config.variants
    assert config.name == path.stem
    for name, changed in config.variants.items():
        for run in runs_of(config, name):
            resolved = parse_config(TrainConfig, "", run.options)
            resolved.validate()
            values = flat(resolved.plain())
            assert values["seed"] == run.seed
            assert {field: values[field] for field in config.train | changed} == config.train | changed


def test_the_papers_ablations_and_ours_are_there():
    names = {path.stem for path in SPECS}
    assert names == {
        "goals", "context", "conditioning", "heads", "keys_values", "positions", "context_depth", "recipe",
        "recipe_without", "rollouts", "spaces", "spaces_latents", "spaces_features",
    }  # fmt: skip
