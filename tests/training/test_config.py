import ast
import dataclasses
import inspect
import itertools
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cdit.common.cli import parse_config
from cdit.common.errors import UserError
from cdit.training.config import TrainConfig

WRONG = [  # option, value, what the message names if not the option
    *[(f"{name}", value) for name in ("steps", "batch_size", "micro_batch_size", "stop_at") for value in ("0", "-1")],
    ("sampler.steps", "0"),
    ("optimizer.learning_rate", "0"),
    ("optimizer.learning_rate", ".nan"),
    ("optimizer.max_grad_norm", "-1.0"),
    ("optimizer.warmup_steps", "-1"),
    ("optimizer.betas", "[0.9, 1.0]"),
    ("optimizer.decay_share", "0"),
    ("optimizer.weight_decay", "-0.1"),
    ("ema.decay", "1.5"),
    ("ema.warmup_power", "-1.0"),
    ("validation.every", "0"),
    ("validation.samples", "0"),
    ("validation.time_bins", "0"),
    ("probe.every", "-1"),
    ("probe.samples", "0"),
    ("probe.final_samples", "0"),
    ("probe.offsets", "[]"),
    ("probe.offsets", "[1, 0]"),
    ("probe.rows", "0"),
    ("probe.rollouts", "-1"),
    ("probe.rollout_frames", "-1"),
    ("probe.attention.samples", "-1"),
    ("checkpoint.every", "0"),
    ("checkpoint.keep", "0"),
    ("log_every", "0"),
    ("seed", "-1"),
    ("action_dropout", "1.0"),
    ("action_dropout", "-0.1"),
    ("model.dropout", "1.0"),
    ("model.dropout", "-0.1"),
    ("model.patch_size", "0"),
    ("model.num_heads", "0"),
    ("model.hidden_size", "0"),
    ("model.depth", "0"),
    ("model.mlp_ratio", "0.0"),
    ("model.context_depth", "-1"),
    ("model.wide_head_depth", "-1"),
    ("model.wide_head_width", "0"),
    ("flow.min_time", "0.0"),
    ("flow.time_std", "-1.0"),
    ("sampler.shift", "0.0"),
    ("name", ""),
    ("name", "a/b"),
    ("name", ".."),
    ("sampler.guidance", "2.0"),
    ("few_step.difference", "0"),
    ("objective_options", "{decay: 0.5}"),
]


@pytest.mark.parametrize(("option", "value"), WRONG)
def test_a_value_out_of_range_is_named(config: Callable[..., TrainConfig], option: str, value: str):
    with pytest.raises(UserError, match=option.replace(".", r"\.")) as caught:
        config(f"--{option}", value).validate()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("objective", ["ddpm", "regression"])
def test_a_perceptual_loss_needs_a_flow(config: Callable[..., TrainConfig], objective: str):
    sampler = {"ddpm": ("ddim", "4"), "regression": ("direct", "1")}[objective]
    options = ("--objective", objective, "--sampler.scheduler", sampler[0], "--sampler.steps", sampler[1])
    config(*options).validate()
    with pytest.raises(UserError, match=r"flow\.perceptual\.weight is 0\.1"):
        config(*options, "--flow.perceptual.weight", "0.1").validate()


def test_the_sampler_of_a_self_rollout_is_that_of_its_base(config: Callable[..., TrainConfig]):
    options = ("--objective", "self_rollout", "--data.rollout", "2")
    config(*options).validate()
    with pytest.raises(UserError, match=r"sampler\.scheduler is ddim"):
        config(*options, "--sampler.scheduler", "ddim").validate()
    config(*options, "--self_rollout.base", "mine:TaughtFlow").validate()  # imported


def test_values_in_range_are_fine(config: Callable[..., TrainConfig]):
    config().validate()
    config("--probe.every", "0", "--probe.rollouts", "0", "--ema.warmup_power", "0", "--stop_at", "9").validate()
    config("--sampler.guidance", "2.0", "--action_dropout", "0.1").validate()


@pytest.mark.parametrize(
    ("yaml", "named"),
    [
        ("learning_rate: 1.0", "learning_rate"),
        ("optimizer:\n  lr: 1.0", "lr"),
        ("steps: many", "steps"),
        ("model:\n  norm: middle", "norm"),
        ("data:\n  image_size: [32]", "image_size"),
    ],
)
def test_unknown_and_ill_typed_fields_end_with_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], yaml: str, named: str
):
    (tmp_path / "wrong.yaml").write_text(yaml + "\n")
    with pytest.raises(SystemExit) as ended:
        parse_config(TrainConfig, "", ["--config", str(tmp_path / "wrong.yaml")])
    assert ended.value.code == 2
    assert named in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--optimizer.lr", "1"], ["--steps", "many"], ["--resume"]])
def test_unknown_and_ill_typed_options_end_with_code_2(capsys: pytest.CaptureFixture[str], arguments: list[str]):
    with pytest.raises(SystemExit) as ended:
        parse_config(TrainConfig, "", arguments)
    assert ended.value.code == 2
    assert arguments[0].rpartition(".")[2].lstrip("-") in capsys.readouterr().err


def test_a_saved_config_says_the_same_again(config: Callable[..., TrainConfig], tmp_path: Path):
    options = ("--data.image_size", "[32, 64]", "--optimizer.betas", "[0.8, 0.95]", "--stop_at", "3", "--seed", "9")
    first = config(*options, "--probe.offsets", "[-1, 3]", "--probe.attention.patch", "[1, 2]", "--data.fps", "7.5")
    first.save(tmp_path / "config.yaml")
    again = parse_config(TrainConfig, "", ["--config", str(tmp_path / "config.yaml")])
    assert again == first
    assert again != config()


def fields(config_class: type, prefix: str = "") -> Iterator[tuple[str, str | None]]:
    """Every option that is no section, with the docstring that the source has for it."""
    classes = [base for base in reversed(config_class.__mro__) if dataclasses.is_dataclass(base)]
    bodies = [ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body for base in classes]
    texts = {
        a.target.id: b.value.value
        for a, b in itertools.chain.from_iterable(map(itertools.pairwise, bodies))
        if isinstance(a, ast.AnnAssign) and isinstance(b, ast.Expr) and isinstance(b.value, ast.Constant)
    }
    for field in dataclasses.fields(config_class):
        if dataclasses.is_dataclass(field.type):
            yield from fields(field.type, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, texts.get(field.name)


def test_help_tells_of_every_field(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit) as ended:
        parse_config(TrainConfig, "What it does.", ["--help"])
    assert ended.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    documented = dict(fields(TrainConfig))
    assert {"data.folder", "probe.attention.layers", "optimizer.betas", "flow.loss", "stop_at"} <= set(documented)
    for name, text in documented.items():
        assert text, f"{name} has no docstring"
        after = shown.rpartition(f"--{name} ")[2]  # the usage names it before
        assert " ".join(text.split()) in after[: len(text) + 150], name
