"""Counts against sums over tensors, FLOPs written out by hand, and the published network's figures."""

import json
from pathlib import Path

import pytest
import torch
from dialects import DIALECTS, build

from cdit.codec.autoencoder import latent_shape
from cdit.codec.config import CodecConfig
from cdit.common.errors import UserError
from cdit.model import PRESETS, CDiT
from cdit.model.__main__ import main
from cdit.model.describe import describe, flops, parameters, table


@pytest.mark.parametrize("dialect", DIALECTS)
def test_the_parts_are_all_parameters(dialect):
    model = build(dialect)
    assert sum(parameters(model).values()) == sum(p.numel() for p in model.parameters())


def test_each_part_has_its_tensors():
    width, depth, model = 32, 2, build("encoder", position="learned")
    parts = parameters(model)
    for attention in ("self", "cross"):
        for matrix in "QKVO":
            assert parts[f"{attention}-attention {matrix}"] == depth * (width**2 + width)
        assert parts[f"{attention}-attention q, k norm"] == depth * width  # two heads of 16, q and k
    assert parts["cross-attention extra key, value"] == depth * 2 * width
    assert parts["MLP"] == depth * (8 * width**2 + 5 * width)
    assert parts["AdaLN"] == depth * 9 * (width**2 + width)
    assert parts["context blocks"] == 2 * (12 * width**2 + 13 * width + width)  # norms too: 2·2·width, and q, k: width
    assert parts["position table"] == 4 * 6 * width
    levers = parameters(build("levers"))
    assert levers["steered queries"] == depth * (width + 1) * 4 * 2
    assert levers["output convolutions"] == 5 * (9 * 7 + 1) + 5 * (9 * 5 + 1) + 2 * (9 * 5 + 1)
    assert parts["action embedding"] == 2 * (10 * 257 + 10 * 11) + 12 * 257 + 12 * 13 + width


@pytest.mark.parametrize("levers", [False, True])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_flops_are_those_counted_by_hand(device, levers):
    """Two goals of three past frames; six patches of 2·2·2 values, width 32, depth 2, two heads."""
    d, depth, goals, patches, values, context = 32, 2, 2, 6, 8, 3 * 6
    features, pixels = 5, 24
    encoding = context * values * d + depth * context * d * 2 * d
    embeddings = 2 * (256 * d + d * d) + sum(256 * part + part * part for part in (10, 10, 12))
    self_attention = 4 * patches * d * d + 2 * patches * patches * d
    cross_attention = 2 * patches * d * d + 2 * patches * context * d
    block = d * 9 * d + self_attention + cross_attention + 2 * patches * d * 4 * d
    last = patches * d * values
    if levers:
        block += d * 4 * 2  # a shift and a zoom along rows and columns of each head
        convolutions = (features + 2) * features + features * features + features * 2
        last = patches * d * 4 * features + pixels * 9 * convolutions
    forward = patches * values * d + embeddings + depth * block + d * 2 * d + last
    options = {"steered_queries": True, "context_norm": "keys", "output_channels": features} if levers else {}
    assert flops(build("native", **options).to(device), context_frames=3, goals=goals) == {
        "encoding the context, once": 2 * encoding,
        "forward with the cached context": 2 * goals * forward,
        "forward, context included": 2 * (encoding + goals * forward),
    }


def test_a_wide_head_is_counted():
    """Six patches of eight values, one goal; width 32 and 48, two blocks."""
    wide, d, patches, values, context = 48, 32, 6, 8, 3
    model, plain = (build("native", wide_head_depth=depth, wide_head_width=wide) for depth in (2, 0))
    block = 6 * (wide**2 + wide) + 4 * (wide**2 + wide) + 8 * wide**2 + 5 * wide
    parts, before = parameters(model), parameters(plain)
    assert parts.pop("wide head") == (values + 1) * wide + (d + 1) * wide + 2 * block
    assert parts.pop("final layer") == 2 * (wide**2 + wide) + (wide + 1) * values
    before.pop("final layer")
    assert parts == before
    block = patches * (6 * wide**2 + 12 * wide**2) + 2 * patches**2 * wide
    last = patches * 2 * wide**2 + patches * wide * values
    more = patches * (values + d) * wide + 2 * block + last - (2 * d**2 + patches * d * values)
    name = "forward with the cached context"
    assert flops(model, context, 1)[name] - flops(plain, context, 1)[name] == 2 * more


def test_what_a_cached_context_saves():
    """Keys and values that follow the condition are made anew for every goal and step."""
    cached, modulated = (flops(build(dialect).to("meta"), 3, 2) for dialect in ("native", "modulated_rotary"))
    keys_values = 2 * 2 * 18 * 32 * 64  # depth, 2 per multiply-add, tokens, width in, width out
    more_modulation = 2 * 2 * 2 * 32 * 64  # depth, 2 per multiply-add, goals, width in, two chunks out
    name = "forward with the cached context"
    assert modulated[name] - cached[name] == 2 * keys_values + more_modulation


@pytest.mark.parametrize(
    ("preset", "millions", "giga_flops"),
    [
        ("S", 49.2, {1: 12.6, 2: 14.7, 4: 18.9, 8: 27.3}),
        ("B", 195.3, {4: 68.3}),
        ("L", 686.5, {4: 237}),
        ("XL", 1012, {4: 346}),
    ],
)
def test_the_published_network_has_its_published_size_and_cost(preset, millions, giga_flops):
    """Ours has one vector of its width more, the unknown action, which does not show in these digits."""
    for frames, cost in giga_flops.items():
        with torch.device("meta"):
            model = CDiT(
                (28, 28), 4, frames, **PRESETS[preset], position="learned", context_modulation=True, extra_kv=True,
                learn_variance=True, embedding_scale=1.0,
            )  # fmt: skip
        assert flops(model, frames, 1)["forward, context included"] / 1e9 == pytest.approx(cost, rel=4e-3)
        if frames == 4:
            assert sum(parameters(model).values()) / 1e6 == pytest.approx(millions, rel=1e-3)


def test_the_table_lines_up():
    lines = table(describe(build("native"), 3, 2)).splitlines()
    groups = {line for line in lines if line and not line.startswith(" ")}
    assert groups == {"parameters", "tokens", "FLOPs"}
    rows = [line for line in lines if line.startswith("  ")]
    assert any(line.split() == ["target", "6"] for line in rows)
    assert any(line.split() == ["context", "18"] for line in rows)
    plain = {len(line) for line in rows if line.split()[-2] in ("target", "context")}
    shared = {line.index("%") for line in rows if "%" in line}
    assert len(plain) == len(shared) == 1


@pytest.mark.parametrize(
    ("codec", "shape"),
    [
        (CodecConfig("pixels"), (3, 32, 64)),
        (CodecConfig("kl"), (4, 4, 8)),
        (CodecConfig("tiny", "madebyollin/taesd"), (4, 4, 8)),
    ],
)
def test_latent_shapes_need_no_download(codec, shape):
    assert latent_shape(codec, (32, 64)) == shape


def test_a_folder_says_its_own_latent_shape(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({"latent_channels": 16, "block_out_channels": [8, 8, 8]}))
    assert latent_shape(CodecConfig("kl", str(tmp_path)), (32, 64)) == (16, 8, 16)
    with pytest.raises(UserError, match=r"data\.image_size is 30×64.*multiples of .*4"):
        latent_shape(CodecConfig("kl", str(tmp_path)), (30, 64))


def test_the_command_line(monkeypatch, capsys):
    arguments = ["describe", "--config", "configs/smoke.yaml", "--model.depth", "3", "--data.goals", "5"]
    monkeypatch.setattr("sys.argv", ["cdit.model", *arguments])
    monkeypatch.chdir(Path(__file__).parents[2])
    main()
    out = capsys.readouterr().out
    assert "goals per context: 5" in out
    assert "self-attention Q" in out
    monkeypatch.setattr("sys.argv", ["cdit.model", "explain"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert "explain" in capsys.readouterr().err
