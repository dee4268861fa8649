"""Texts as a condition: from datasets through a tiny text encoder of transformers to predictions."""

import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gradients import randomise
from torch import Tensor

from cdit.batch import Batch, Condition, KeyedDraws
from cdit.common.errors import UserError
from cdit.common.randomness import generator
from cdit.data.config import DataConfig, Source
from cdit.data.shard_writer import convert
from cdit.data.text import encode_texts
from cdit.data.to_lerobot import to_lerobot
from cdit.data.windows import WindowDataset
from cdit.plan.planner import WorldScore
from cdit.plan.prediction import Predictor
from cdit.sample.config import SampleConfig
from cdit.sample.futures import sample
from cdit.training.config import TrainConfig
from cdit.training.setup import build_world
from cdit.world_model import WorldModel

TEXTS = {"a": "walk to the red door", "b": "", "c": "turn around", "d": "turn around"}
NAMES = {"train": ["a", "b"], "test": ["c", "d"]}
WORDS = [word for text in TEXTS.values() for word in text.split()]


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Text models with random weights and a vocabulary of a few words."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(["<pad>", "<unk>", "<start>", "<end>", *WORDS]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = [("<start>", vocabulary["<start>"]), ("<end>", vocabulary["<end>"])]
    tokenizer.post_processor = processors.TemplateProcessing(single="<start> $A <end>", special_tokens=special)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": len(vocabulary), **sizes}
    t5 = {"d_model": 32, "d_ff": 48, "d_kv": 16, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
    ids = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = {
            "bert": transformers.BertModel(transformers.BertConfig(**text)),
            "t5": transformers.T5Model(transformers.T5Config(vocab_size=len(vocabulary), **t5)),
            "clip": transformers.CLIPModel(
                transformers.CLIPConfig(
                    text_config={**text, **ids}, vision_config={**sizes, "image_size": 16, "patch_size": 8}
                )
            ),
        }
    folder = tmp_path_factory.mktemp("encoders")
    for name, model in made.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return {name: folder / name for name in made}


@pytest.fixture(scope="module")
def walks(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset in folders that says what is done in all walks but one."""
    folder = shutil.copytree(dataset, tmp_path_factory.mktemp("texts") / "walks")
    for name, text in TEXTS.items():
        if text:
            (folder / name / "text.txt").write_text(f"{text}\n")
    return folder


@pytest.fixture(scope="module")
def run(train: Callable[..., Path], walks: Path, encoders: dict[str, Path], tmp_path_factory) -> Path:
    """A few steps."""
    data = ["--data.folder", str(walks), "--data.text_encoder", str(encoders["bert"])]
    return train(tmp_path_factory.mktemp("runs"), *data, "--action_dropout", "0.3")


@pytest.fixture
def world(run: Path) -> WorldModel:
    """The trained world, with weights that make a difference."""
    world = WorldModel.from_pretrained(run)
    randomise(world.cdit)
    return world


def masked_means(kind: str, folder: Path, texts: list[str]) -> Tensor:
    """Padded texts at once, and the mean where the mask is 1."""
    import transformers

    model = {"bert": "BertModel", "t5": "T5EncoderModel", "clip": "CLIPTextModel"}[kind]
    model = getattr(transformers, model).from_pretrained(folder).eval()
    tokens = transformers.PreTrainedTokenizerFast.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    mask = tokens["attention_mask"]
    with torch.no_grad():
        hidden = model(input_ids=tokens["input_ids"], attention_mask=mask).last_hidden_state
    return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


@pytest.mark.parametrize("kind", ["bert", "t5", "clip"])
def test_vectors_are_masked_means_of_the_last_hidden_state(encoders: dict[str, Path], kind: str):
    texts = ["turn around", "walk to the red door", "walk"]
    vectors = encode_texts(str(encoders[kind]), texts)
    torch.testing.assert_close(vectors, masked_means(kind, encoders[kind], texts), rtol=1e-4, atol=1e-5)


def check_texts(folder: Path, source: str, texts: dict[str, str], encoder: Path) -> None:
    """Compares the vectors of windows with those of their trajectories' texts."""
    for split, names in NAMES.items():
        config = DataConfig(str(folder), source=source, text_encoder=str(encoder), image_size=(32, 32))
        windows = WindowDataset(config, split)
        for index in (0, len(windows) - 1):
            text = texts[names[windows.locate(index)[0]]]
            expected = masked_means("bert", encoder, [text])[0] if text else torch.zeros(32)
            torch.testing.assert_close(windows[index].condition.text, expected, rtol=1e-4, atol=1e-5)
        assert WindowDataset(replace(config, text_encoder=None), split)[0].condition.text is None


def test_windows_have_the_text_of_their_trajectory(walks: Path, encoders: dict[str, Path], tmp_path: Path):
    check_texts(walks, "auto", TEXTS, encoders["bert"])
    convert(Source(str(walks)), tmp_path / "shards", None)
    check_texts(tmp_path / "shards", "auto", TEXTS, encoders["bert"])


def test_tasks_of_lerobot_are_texts(train: Callable[..., Path], walks: Path, encoders: dict[str, Path], tmp_path: Path):
    pytest.importorskip("pyarrow")
    to_lerobot(Source(str(walks)), tmp_path / "lerobot", ["train", "test"], task="stroll")
    check_texts(tmp_path / "lerobot", "lerobot", {**TEXTS, "b": "stroll"}, encoders["bert"])
    options = {"folder": tmp_path / "lerobot", "source": "lerobot", "text_encoder": encoders["bert"]}
    run = train(tmp_path, *(part for name, value in options.items() for part in (f"--data.{name}", str(value))))
    assert WorldModel.from_pretrained(run).cdit.conditioners["text"].mlp.fc2.weight.abs().max() > 0


def test_the_world_knows_its_encoder_and_predicts_by_text(world: WorldModel, encoders: dict[str, Path], tmp_path: Path):
    assert world.description.text_encoder == str(encoders["bert"])
    assert world.cdit.config.text_size == 32
    world.save_pretrained(tmp_path)
    again, context = WorldModel.from_pretrained(tmp_path), torch.zeros(1, 3, 3, 32, 32)
    texts = ["turn around", "walk to the red door"]
    condition = Condition(action=torch.full((1, 1, 3), 0.1))

    def frames(text: Tensor | None, world: WorldModel = world, condition: Condition = condition) -> Tensor:
        state = world.begin(context, text=text)
        return world.predict(state, condition, generator=generator(0))

    one, other = (frames(world.encode_text(text)) for text in texts)
    assert (one - other).abs().max() > 1e-3
    torch.testing.assert_close(frames(again.encode_text(texts[0]), again), one)
    torch.testing.assert_close(frames(None, condition=replace(condition, text=world.encode_text(texts[0])[None])), one)
    # Without a text, a learned vector.
    none = frames(None)
    torch.testing.assert_close(frames(world.encode_text("")), none)
    with torch.no_grad():
        world.cdit.conditioners["text"].unknown += 1
    assert (frames(None) - none).abs().max() > 1e-3
    torch.testing.assert_close(frames(world.encode_text(texts[0])), one)


def test_dropout_hides_texts_with_actions(world: WorldModel):
    count = 64
    text = torch.randn(count, 32)
    condition = Condition(torch.ones(count, 2), torch.ones(count, 2, 3), text=text)
    frames = torch.zeros(count, 3, 3, 32, 32, dtype=torch.uint8)
    mask = torch.ones(count, 3, dtype=torch.bool)
    batch = world.encode(Batch(frames, mask, frames[:, :2], condition), action_dropout=0.5)
    dropped = batch.dropped(KeyedDraws(range(count), torch.device("cpu")))
    known = dropped["action_known"]
    assert 0.3 < known.float().mean() < 0.7
    torch.testing.assert_close(dropped["text"], torch.where(known[..., None], text[:, None], 0.0))


def test_guidance_extrapolates_from_no_action_and_no_text(world: WorldModel):
    state = world.begin(torch.zeros(1, 3, 3, 32, 32), text=world.encode_text("turn around"))
    sampler = replace(world.description.sampler, steps=1, guidance=3.0)
    action, noise = torch.full((1, 1, 3), 0.1), torch.randn(1, 1, 3, 32, 32)

    def sampled(guidance: float, known: bool = True, **changes: Tensor) -> Tensor:
        condition = Condition(action=action, known=torch.full((1, 1), known))
        options = replace(sampler, guidance=guidance)
        return world.sample(replace(state, **changes), condition, options, noise=noise)

    without, plain = sampled(1.0, False, text=torch.zeros(32)), sampled(1.0)
    torch.testing.assert_close(sampled(3.0), without + 3 * (plain - without), rtol=1e-4, atol=1e-4)
    text_alone, nothing = sampled(1.0, False), without
    torch.testing.assert_close(sampled(3.0, False), nothing + 3 * (text_alone - nothing), rtol=1e-4, atol=1e-4)


def test_samples_follow_the_dataset_or_the_given_text(world: WorldModel, walks: Path, tmp_path: Path):
    world.save_pretrained(tmp_path / "world")

    def drawn(name: str, **options: str) -> list[bytes]:
        source = {"data": str(walks), "checkpoint": str(tmp_path / "world"), "device": "cpu"}
        sample(SampleConfig(out=str(tmp_path / name), **source, samples=2, length=2, horizons=[1, 2], **options))
        return [path.read_bytes() for path in sorted((tmp_path / name).glob("*.png"))]

    own = drawn("own")
    assert len(own) == 3
    assert drawn("same", text=TEXTS["c"]) == own
    assert all(one != two for one, two in zip(drawn("other", text="walk to the red door"), own, strict=True))


def test_plans_follow_the_text(world: WorldModel):
    score = WorldScore(Predictor(world, [1, 2]), cost=None)
    context, goals = torch.zeros(1, 3, 3, 32, 32), torch.zeros(1, 3, 32, 32)
    actions, text = torch.full((1, 2, 2, 3), 0.1), world.encode_text("turn around")[None]
    found = score.to_goals(context, goals, generator(0), text=text).latents(actions)
    plain = score.to_goals(context, goals, generator(0))
    assert (found - plain.latents(actions)).abs().max() > 1e-3
    world.text = text[0]  # as --text of the commands
    torch.testing.assert_close(plain.latents(actions), found)


def test_a_trained_world_takes_texts_without_a_change_at_first(
    train: Callable[..., Path],
    config: Callable[..., TrainConfig],
    walks: Path,
    encoders: dict[str, Path],
    tmp_path: Path,
):
    before = train(tmp_path, "--data.folder", str(walks), "--steps", "3")
    more = ["--data.folder", str(walks), "--data.text_encoder", str(encoders["bert"]), "--init_from", str(before)]
    settings = config(*more)
    world = build_world(settings, WindowDataset(settings.data, "train")).eval()
    condition, context = Condition(action=torch.full((1, 1, 3), 0.1)), torch.rand(1, 3, 3, 32, 32)
    expected = WorldModel.from_pretrained(before).predict(context, condition, generator=generator(0))
    state = world.begin(context, text=world.encode_text("turn around"))
    torch.testing.assert_close(world.predict(state, condition, generator=generator(0)), expected)


def test_a_trained_world_keeps_its_encoder(
    config: Callable[..., TrainConfig], run: Path, walks: Path, encoders: dict[str, Path]
):
    options = ["--data.folder", str(walks), "--init_from", str(run), "--data.text_encoder"]
    same, other = (config(*options, str(encoders[name])) for name in ("bert", "t5"))  # of the same width
    dataset = WindowDataset(same.data, "train")
    assert build_world(same, dataset).description.text_encoder == str(encoders["bert"])
    with pytest.raises(UserError, match=r"init_from .* text encoder is .*bert, but data\.text_encoder is .*t5"):
        build_world(other, WindowDataset(other.data, "train"))


def test_what_is_missing_is_named(config: Callable[..., TrainConfig], encoders: dict[str, Path], tmp_path: Path):
    with pytest.raises(UserError, match=r"no/such/encoder"):
        encode_texts(str(tmp_path / "no/such/encoder"), ["turn around"])
    settings = config("--data.text_encoder", str(encoders["bert"]))
    with pytest.raises(UserError, match=r"data\.text_encoder .* no texts"):
        build_world(settings, WindowDataset(settings.data, "train"))
    textless = build_world(config(), WindowDataset(config().data, "train"))
    with pytest.raises(UserError, match="trained without texts"):
        textless.encode_text("turn around")


def test_without_transformers_the_extra_is_named(
    train: Callable[..., Path], walks: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys
):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(SystemExit) as stopped:
        train(tmp_path, "--data.folder", str(walks), "--data.text_encoder", "some/encoder")
    assert stopped.value.code == 2
    assert 'pip install "cdit[text]"' in capsys.readouterr().err
