"""Published checkpoints: read, computed with, written back bit by bit; and files that are refused."""

import argparse
import builtins
import os
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from published import TINY, Published, S, published, write_checkpoint
from torch import Tensor

from cdit.common.errors import UserError
from cdit.heads.measures import Layout, extra_share
from cdit.heads.record import record_attention
from cdit.model import CDiT
from cdit.nwm.checkpoint import load_checkpoint, save_checkpoint
from cdit.nwm.tensors import UNKNOWN_ACTION, cdit_arguments, from_nwm, to_nwm


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def read(folder: Path, model: Published, **options: Any) -> CDiT:
    """Our network of that one's tensors, by way of a file."""
    heads = model.blocks[0].attn.heads
    return load_checkpoint(write_checkpoint(folder / "it.pth.tar", model.state_dict()), num_heads=heads, **options)


def forward(cdit: CDiT, sample: Tensor, timestep: Tensor, action: Tensor, time_shift: Tensor, past: Tensor) -> Tensor:
    """Our network on the inputs of the published one."""
    return cdit(sample, timestep, {"action": action, "time_shift": time_shift}, past)


def inputs(size: dict[str, int], frames: int, batch: int = 4) -> tuple[Tensor, ...]:
    """Sample, diffusion time, action, time shift, past frames; goals in past and future, near and far."""
    generator = torch.Generator().manual_seed(frames)
    frame = (size["channels"], size["side"], size["side"])
    return (
        torch.randn(batch, *frame, generator=generator),
        torch.tensor([0.0, 13.0, 500.0, 999.0])[:batch],
        torch.tensor([[-1 / 3, 0.0, 0.0], [16.7, -2.0, 3.1], [-5.0, 0.25, -1.2], [0.2, 1.0, 0.4]])[:batch],
        torch.tensor([1 / 128, 0.5, -0.5, -1 / 128])[:batch],
        torch.randn(batch, frames, *frame, generator=generator),
    )


# --- the network ---


@pytest.mark.parametrize(
    ("size", "slots", "frames"),
    [
        *((TINY, slots, slots) for slots in (1, 2, 4, 8)),
        *((TINY, 4, frames) for frames in (1, 2, 3)),
        *((S, slots, slots) for slots in (1, 2, 4, 8)),
        (S, 8, 3),
    ],
    ids=lambda it: f"width_{it['width']}" if isinstance(it, dict) else str(it),
)
def test_forward_is_the_published_one(size, slots, frames, tmp_path):
    model = published(size, slots)
    sample, t, action, time_shift, past = inputs(size, frames)
    expected = model(sample, t, action, time_shift, past)
    out = forward(read(tmp_path, model), sample, t, action, time_shift, past)
    assert out.shape == (4, 2 * size["channels"], size["side"], size["side"])
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)
    assert 0.3 < expected.std() < 3
    by_condition = expected.flatten(1).std(0)
    assert by_condition.mean() > 0.3  # targets and conditions tell the outputs apart


def test_goals_share_their_past(tmp_path):
    model = published(TINY)
    sample, t, action, time_shift, past = inputs(TINY, 4)
    expected = model(sample, t, action, time_shift, past[[0, 0, 2, 2]])
    grouped = (x.unflatten(0, (2, 2)) for x in (sample, t, action, time_shift))
    out = forward(read(tmp_path, model), *grouped, past[[0, 2]])
    torch.testing.assert_close(out.flatten(0, 1), expected, atol=1e-5, rtol=0)


def test_every_tensor_has_its_say(tmp_path):
    """Else the comparison above could not see one that is put in the wrong place. Blocks are taken together."""
    model = published(TINY)
    arguments, tensors = inputs(TINY, 4), model.state_dict()
    before = forward(read(tmp_path, model), *arguments)
    groups = {re.sub(r"\.\d+\.(?=attn|cttn|mlp|adaLN)", ".*.", name) for name in tensors}
    assert len(groups) == 43
    for group in groups:
        pattern = re.escape(group).replace(r"\*", r"\d+")
        without = {n: torch.zeros_like(x) if re.fullmatch(pattern, n) else x for n, x in tensors.items()}
        cdit = load_checkpoint(write_checkpoint(tmp_path / "zeroed.pth.tar", without), num_heads=3)
        assert (forward(cdit, *arguments) - before).abs().max() > 1e-2, group


def test_the_chunks_of_adaln_are_told_apart(tmp_path):
    """Each of the eleven moves the output, and ours moves as theirs does."""
    model = published(TINY)
    arguments = inputs(TINY, 4)
    before = model(*arguments)
    bias = model.blocks[1].adaLN_modulation[1].bias
    for chunk in bias.chunk(11):
        chunk.mul_(-1.5).add_(torch.linspace(-1, 1, len(chunk)))
        after = model(*arguments)
        assert (after - before).abs().max() > 1e-2
        torch.testing.assert_close(forward(read(tmp_path, model), *arguments), after, atol=1e-5, rtol=0)
        before = after


def test_attention_is_recorded_as_torch_reports_it(tmp_path):
    model = published(TINY)
    arguments = inputs(TINY, 4)
    cdit = read(tmp_path, model)
    model(*arguments)
    plain = forward(cdit, *arguments)
    with record_attention(cdit, layers=[0, 1]) as recording:
        assert torch.equal(forward(cdit, *arguments), plain)
    for layer, block in enumerate(model.blocks):
        weights = block.weights  # (B, heads, 4 patches, 4·4 tokens + 1)
        torch.testing.assert_close(recording[layer][:, 0], weights, atol=1e-5, rtol=0)
        share = extra_share(recording[layer], Layout(4, 2, 2))[:, 0]
        torch.testing.assert_close(share, weights[..., -1], atol=1e-5, rtol=0)
        assert 0.01 < share.mean() < 0.5
        assert share.std() > 0.01


# --- back and forth ---


@pytest.mark.parametrize("size", [TINY, S], ids=["tiny", "S"])
@pytest.mark.parametrize("weights", ["ema", "model"])
def test_there_and_back_is_bit_equal(size, weights, tmp_path):
    tensors = published(size).state_dict()
    path = write_checkpoint(tmp_path / "theirs.pth.tar", tensors)
    expected = {name: tensor + (weights == "model") for name, tensor in tensors.items()}
    cdit = load_checkpoint(path, weights, num_heads=None if size is S else size["heads"])
    assert cdit.config.num_heads == size["heads"]
    assert not cdit.training
    save_checkpoint(cdit, tmp_path / "ours.pth.tar")
    with torch.serialization.safe_globals([argparse.Namespace]):
        written = torch.load(tmp_path / "ours.pth.tar", weights_only=True)
    assert written.keys() == {"model", "ema", "args", "epoch", "train_steps"}
    assert (written["args"], written["epoch"], written["train_steps"]) == (argparse.Namespace(), 0, 0)
    for key in ("model", "ema"):
        assert written[key].keys() == expected.keys()
        assert all(torch.equal(written[key][name], expected[name]) for name in expected)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ours.pth.tar", "theirs.pth.tar"]


def test_the_two_maps_are_inverse_and_know_all_of_ours():
    tensors = published(TINY).state_dict()
    ours = from_nwm(tensors, 3)
    reference = CDiT(**cdit_arguments(tensors, 3))
    assert {n: x.shape for n, x in ours.items()} == {n: x.shape for n, x in reference.state_dict().items()}
    assert not ours[UNKNOWN_ACTION].any()
    again = from_nwm(to_nwm(ours), 3)
    assert ours.keys() == again.keys()
    assert all(torch.equal(ours[name], again[name]) for name in ours)


def test_size_is_read_from_the_tensors(tmp_path):
    size = {"width": 30, "depth": 3, "heads": 5, "side": 12, "patch": 4, "channels": 5}
    config = read(tmp_path, published(size, context=7)).config
    expected = {
        "image_size": (12, 12), "in_channels": 5, "max_context": 7, "patch_size": 4, "hidden_size": 30, "depth": 3,
        "num_heads": 5, "position": "learned", "context_modulation": True, "extra_kv": True, "learn_variance": True,
        "embedding_scale": 1.0, "context_depth": 0, "qk_norm": False, "norm": "pre",
    }  # fmt: skip
    assert {name: config[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("width", "depth", "heads"), [(384, 12, 6), (768, 12, 12), (1024, 24, 16), (1152, 28, 16), (192, 6, None)]
)
def test_heads_of_the_published_sizes(width, depth, heads):
    with torch.device("meta"):
        tensors = Published(width, depth, heads or 6, side=4, patch=2, channels=4, context=4).state_dict()
    if heads is None:  # one of our own presets, but none of theirs
        with pytest.raises(UserError, match="width 192 and 6 blocks: give num_heads"):
            cdit_arguments(tensors)
    else:
        assert cdit_arguments(tensors)["num_heads"] == heads
    assert cdit_arguments(tensors, 2)["num_heads"] == 2


def test_half_precision_becomes_float32_exactly(tmp_path):
    tensors = {name: tensor.bfloat16() for name, tensor in published(TINY).state_dict().items()}
    cdit = load_checkpoint(write_checkpoint(tmp_path / "it.pth.tar", tensors), num_heads=3)
    assert {p.dtype for p in cdit.parameters()} == {torch.float32}
    assert torch.equal(to_nwm(cdit.state_dict())["pos_embed"], tensors["pos_embed"].float())


def test_the_network_outlives_its_file(tmp_path):
    cdit = read(tmp_path, published(TINY))
    before = {name: tensor.clone() for name, tensor in cdit.state_dict().items()}
    with open(tmp_path / "it.pth.tar", "r+b") as file:  # in place: a map of the file would follow
        file.write(bytes((tmp_path / "it.pth.tar").stat().st_size))
    assert all(torch.equal(tensor, before[name]) for name, tensor in cdit.state_dict().items())


# --- what is written over ---


def test_only_a_checkpoint_is_replaced(tmp_path):
    cdit = read(tmp_path, published(TINY))
    other = read(tmp_path, published(TINY, seed=1))
    save_checkpoint(cdit, tmp_path / "new" / "it.pth.tar")  # the folder is made
    save_checkpoint(other, tmp_path / "new" / "it.pth.tar")
    again = load_checkpoint(tmp_path / "new" / "it.pth.tar", num_heads=3)
    assert torch.equal(again.pos_embed, other.pos_embed)
    assert not torch.equal(again.pos_embed, cdit.pos_embed)
    (tmp_path / "thesis.txt").write_text("words")
    for taken in ("thesis.txt", "new"):
        with pytest.raises(UserError, match=rf"{taken}: exists and is not a checkpoint"):
            save_checkpoint(cdit, tmp_path / taken)
    assert (tmp_path / "thesis.txt").read_text() == "words"
    with pytest.raises(UserError, match="cannot be written"):
        save_checkpoint(cdit, tmp_path / "thesis.txt" / "it.pth.tar")


def test_a_broken_write_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "it.pth.tar"
    cdit = read(tmp_path, published(TINY))
    before = path.read_bytes()

    def full_disk(checkpoint: Any, file: Path) -> None:
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(UserError, match="No space left"):
        save_checkpoint(cdit, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("context_depth", 1), ("context_modulation", False), ("position", "rotary"), ("extra_kv", False),
        ("qk_norm", True), ("norm", "post"), ("mlp_ratio", 3.0), ("use_action", False), ("use_time_shift", False),
        ("embedding_scale", 30.0), ("learn_variance", False), ("image_size", (8, 4)), ("context_noise", 0.3),
        ("place_embedding", True), ("output_channels", 8), ("wide_head_depth", 1), ("action_size", 4),
        ("text_size", 16),
    ],
)  # fmt: skip
def test_other_networks_are_not_exported(setting, value, tmp_path):
    arguments = cdit_arguments(published(TINY).state_dict(), 3) | {setting: value}
    with pytest.raises(UserError, match=rf"not the network of NWM: {setting} is {re.escape(str(value))}, not [^;]*$"):
        save_checkpoint(CDiT(**arguments), tmp_path / "it.pth.tar")
    assert not list(tmp_path.iterdir())


def test_all_that_differs_is_listed(tmp_path):
    with pytest.raises(UserError, match=r"context_modulation is False.*position is rotary.*learn_variance is False"):
        save_checkpoint(CDiT((4, 4), hidden_size=32, depth=1, num_heads=2), tmp_path / "it.pth.tar")


# --- what is refused ---


class Call:
    """Pickles as a call."""

    def __init__(self, function: Any, *arguments: Any):
        self.call = (function, arguments)

    def __reduce__(self) -> tuple:
        return self.call


POISONS = {
    "os.system": lambda marker: Call(os.system, f"touch {marker}"),
    "builtins.exec": lambda marker: Call(builtins.exec, f"open({str(marker)!r}, 'w')"),
    "builtins.open": lambda marker: Call(open, str(marker), "w"),
}
PLACES = {
    "in args": lambda it: {"args": argparse.Namespace(config="x.yaml", seed=it)},
    "nested in opt": lambda it: {"opt": {"state": {0: {"step": [(it,)]}}}},
    "beside the tensors": lambda it: {"model": {"pos_embed": it}},
}


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("place", [*PLACES, "at top level", "a bare pickle"])
def test_nothing_in_a_file_is_run(place, poison, tmp_path):
    path, marker = tmp_path / "it.pth.tar", tmp_path / "it_ran"
    it = POISONS[poison](marker)
    if place in PLACES:
        write_checkpoint(path, published(TINY).state_dict(), **PLACES[place](it))
    elif place == "at top level":
        torch.save(it, path)
    else:
        path.write_bytes(pickle.dumps({"ema": it}))
    with pytest.raises(UserError, match=r"it\.pth\.tar: .*expected a checkpoint of Navigation World Models") as caught:
        load_checkpoint(path, num_heads=3)
    if place != "a bare pickle":
        name = poison.partition(".")[2]
        assert re.search(rf"it refers to (\w+\.)?{name},", str(caught.value))
    assert "weights_only" not in str(caught.value)
    assert not marker.exists()

    if place == "a bare pickle":  # the poison works
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert marker.exists()


def test_only_one_class_is_admitted_and_only_while_reading(tmp_path):
    read(tmp_path, published(TINY))
    assert argparse.Namespace not in torch.serialization.get_safe_globals()
    path = write_checkpoint(tmp_path / "it.pth.tar", published(TINY).state_dict(), args=Path("a"))
    with pytest.raises(UserError, match="it refers to pathlib"):
        load_checkpoint(path, num_heads=3)


def not_a_checkpoint(kind: str, path: Path) -> None:
    if kind == "a text file":
        path.write_text("a text file")
    elif kind == "an empty file":
        path.write_bytes(b"")
    elif kind == "safetensors":
        safetensors.torch.save_file(published(TINY).state_dict(), path)
    elif kind == "a zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("it/data.pkl", "nothing")
    elif kind == "a tensor":
        torch.save(torch.ones(3), path)
    elif kind == "a state dict":
        torch.save(published(TINY).state_dict(), path)
    elif kind == "an old format":
        torch.save({"ema": published(TINY).state_dict()}, path, _use_new_zipfile_serialization=False)
    elif kind == "a module":
        torch.save({"ema": published(TINY)}, path)
    elif kind == "a folder":
        path.mkdir()
    elif kind.startswith("cut"):
        write_checkpoint(path, published(TINY).state_dict())
        share = {"cut short": 0.999, "cut in half": 0.5, "cut to its head": 0.001}[kind]
        os.truncate(path, int(path.stat().st_size * share))
    elif kind == "ema of numbers":
        torch.save({"ema": {1: torch.ones(3)}}, path)
    elif kind == "a list for ema":
        torch.save({"ema": [torch.ones(3)]}, path)
    elif kind == "an empty ema":
        torch.save({"ema": {}}, path)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("a text file", "damaged, or not in torch.save's zip format"),
        ("an empty file", "damaged, or not in torch.save's zip format"),
        ("safetensors", "damaged, or not in torch.save's zip format"),
        ("a zip", "damaged, or not in torch.save's zip format"),
        ("an old format", "damaged, or not in torch.save's zip format"),
        ("cut short", "damaged, or not in torch.save's zip format"),
        ("cut in half", "damaged, or not in torch.save's zip format"),
        ("cut to its head", "damaged, or not in torch.save's zip format"),
        ("a module", "it refers to published.Published"),
        ("a tensor", "no 'ema' in it"),
        ("a state dict", "no 'ema' in it"),
        ("ema of numbers", "no 'ema' in it"),
        ("a list for ema", "no 'ema' in it"),
        ("an empty ema", "no 'ema' in it"),
        ("a folder", "Is a directory"),
        ("nothing", "No such file or directory"),
    ],
)
def test_other_files_are_refused(kind, reason, tmp_path):
    path = tmp_path / "it.pth.tar"
    not_a_checkpoint(kind, path)
    with pytest.raises(UserError) as caught:
        load_checkpoint(path, num_heads=3)
    assert str(caught.value).startswith(f"{path}: {reason}")
    assert "expected a checkpoint of Navigation World Models" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_tensor_beyond_its_numbers_is_refused(tmp_path):
    path = write_checkpoint(tmp_path / "it.pth.tar", published(TINY).state_dict())
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            # pos_embed states (10005, 4, 48) in place of (5, 4, 48)
            archive.writestr(name, content.replace(b"K\x05K\x04K0\x87", b"M\x15\x27K\x04K0\x87"))
    with pytest.raises(UserError, match=r"it\.pth\.tar: damaged"):
        load_checkpoint(path, num_heads=3)


def without(*names: str):
    return lambda tensors: {name: x for name, x in tensors.items() if name not in names}


def instead(**changes: Any):
    """Tensors by name, "__" for "."."""
    return lambda tensors: tensors | {name.replace("__", "."): value for name, value in changes.items()}


WIDTH = TINY["width"]


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without("blocks.1.cttn.bias_k"), r"missing: blocks\.1\.cttn\.bias_k$"),
        (without("t_embedder.mlp.2.bias", "pos_embed"), "pos_embed is missing"),
        (without("x_embedder.proj.weight"), r"x_embedder\.proj\.weight is missing"),
        (without(*(f"blocks.1.mlp.fc{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias"))),
         r"missing: blocks\.1\.mlp\.fc1\.weight, .*blocks\.1\.mlp\.fc2\.bias$"),
        (lambda tensors: {n: x for n, x in tensors.items() if not n.startswith("blocks.0.")},
         r"missing: blocks\.0\..* and 12 more; unexpected: blocks\.1\..* and 12 more$"),
        (lambda tensors: {n: x for n, x in tensors.items() if not n.startswith("blocks.")}, "0 blocks"),
        (lambda tensors: tensors | {f"blocks.{i}.x": torch.ones(1) for i in range(2000)}, r"2000 blocks .* 1 to 1000"),
        (lambda tensors: tensors | {f"x.{i}": tensors["pos_embed"] for i in range(999)},
         "share their numbers"),
        (instead(blocks__7__mlp__fc1__bias=torch.ones(4)), r"unexpected: blocks\.7\.mlp\.fc1\.bias"),
        (instead(blocks__0__attn__q_norm__weight=torch.ones(16)), r"unexpected: blocks\.0\.attn\.q_norm\.weight$"),
        (instead(module__pos_embed=torch.ones(1)), r"unexpected: module\.pos_embed$"),
        (instead(_orig_mod__pos_embed=torch.ones(5, 4, WIDTH)), "tensors twice"),
        (instead(final_layer__linear__bias=torch.ones(12)),
         r"wrong shape: final_layer\.linear\.bias \(12,\), expected \(24,\)$"),
        (instead(blocks__0__attn__proj__weight=torch.ones(WIDTH, WIDTH, 1)), r"\(48, 48, 1\), expected \(48, 48\)$"),
        (instead(blocks__1__adaLN_modulation__1__weight=torch.ones(9 * WIDTH, WIDTH)), r"expected \(528, 48\)$"),
        (instead(x_embedder__proj__weight=torch.ones(WIDTH, 3, 2, 3)), r"\(48, 3, 2, 3\), expected \(48, 3, 2, 2\)$"),
        (instead(x_embedder__proj__weight=torch.ones(WIDTH, 12)), r"weight has shape \(48, 12\), expected 4 dim"),
        (instead(pos_embed=torch.ones(5, 6, WIDTH)), r"pos_embed of shape \(5, 6, 48\), expected .* square number"),
        (instead(pos_embed=torch.ones(1, 4, WIDTH)), r"pos_embed of shape \(1, 4, 48\), expected .* two frames"),
        (instead(pos_embed=torch.ones(5, 4, 45)), r"wrong shape: x_embedder\.proj\.weight .* and \d+ more$"),
        (instead(pos_embed=torch.ones(5, 4, 47)), r"hidden_size 47 must be a multiple of num_heads 3"),
        (instead(pos_embed=torch.ones(5, 0, WIDTH)), "pos_embed of 'ema': expected tensors of floating"),
        (instead(pos_embed=torch.ones(5, 4, WIDTH, dtype=torch.int32)), "pos_embed of 'ema': expected tensors of fl"),
        (instead(pos_embed=torch.ones(1).expand(5, 4, WIDTH)), "pos_embed of 'ema': expected tensors of floating"),
        (instead(pos_embed=torch.ones(5, 4, WIDTH, device="meta")), "pos_embed of 'ema': expected tensors of floating"),
        (instead(pos_embed=torch.ones(5, 4, WIDTH).to_sparse()), "pos_embed of 'ema': expected tensors of floating"),
        (instead(pos_embed=[[1.0]], step=3), "pos_embed, step of 'ema': expected tensors of floating"),
    ],
)  # fmt: skip
def test_every_damage_is_named(damage, message, tmp_path):
    path = tmp_path / "it.pth.tar"
    torch.save({"ema": damage(published(TINY).state_dict())}, path)
    with pytest.raises(UserError, match=rf"^{re.escape(str(path))}: .*{message}") as caught:
        load_checkpoint(path, num_heads=3)
    assert len(str(caught.value)) < len(str(path)) + 400


@pytest.mark.parametrize("heads", [0, -3, 5])
def test_heads_that_cannot_be(heads, tmp_path):
    path = write_checkpoint(tmp_path / "it.pth.tar", published(TINY).state_dict())
    with pytest.raises(UserError, match=rf"it\.pth\.tar: .*num_heads (is )?{heads}"):
        load_checkpoint(path, num_heads=heads)


def test_what_is_not_in_it(tmp_path):
    path = tmp_path / "it.pth.tar"
    torch.save({"ema": published(TINY).state_dict()}, path)
    with pytest.raises(UserError, match=r"it\.pth\.tar: no 'model' in it; .* tensors in 'model'"):
        load_checkpoint(path, "model", num_heads=3)
