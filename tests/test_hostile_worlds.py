"""World models that somebody else uploaded: nothing in them is run, and none takes more memory than its files."""

import json
import os
import pickle
import resource
import time

import pytest
import safetensors.torch
import torch

from cdit.codec import PixelCodec
from cdit.common.errors import UserError
from cdit.diffusion import SamplerConfig
from cdit.model import CDiT
from cdit.world_model import WorldDescription, WorldModel


@pytest.fixture
def folder(tmp_path):
    """A small world model."""
    cdit = CDiT((8, 8), max_context=2, hidden_size=16, depth=2, num_heads=2)
    description = WorldDescription((8, 8), fps=4.0, sampler=SamplerConfig(steps=2))
    WorldModel(cdit, PixelCodec(), description).save_pretrained(tmp_path)
    assert WorldModel.from_pretrained(tmp_path).description.fps == 4.0
    return tmp_path


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    "values",
    [
        {"image_size": [10**6, 10**6]}, {"image_size": [0, 8]}, {"image_size": [8]}, {"fps": 0}, {"fps": float("nan")},
        {"units": {"time_scale": float("nan")}}, {"units": {"action_scale": [1, float("inf"), 1]}}, {"units": []},
        {"sampler": {"steps": 10**9}}, {"sampler": {"steps": 0}}, {"sampler": {"scheduler": "ddpm"}},
        {"units": {"class_path": "subprocess.Popen"}}, {"codec": "zip"}, {"codec": ["kl"]}, {"codec": None},
        {"min_history": 0}, {"action_dropout": 2}, {"objective": "x"}, {"flow": {"min_time": "a"}}, {"unknown": 1},
    ],
)  # fmt: skip
def test_descriptions_with_other_values_are_refused(folder, values):
    change(folder / "world_model.json", **values)
    with pytest.raises(UserError, match=r"not a readable world model|world_model\.json: not "):
        WorldModel.from_pretrained(folder)


def test_a_newer_format_is_named_whatever_else_it_holds(folder):
    change(folder / "world_model.json", version=2, new_field=1, image_size="large")
    with pytest.raises(UserError, match=r"world_model\.json: format version 2, but this code reads up to 1"):
        WorldModel.from_pretrained(folder)


@pytest.mark.parametrize(
    "values",
    [
        {"depth": 10**9}, {"depth": 3}, {"context_depth": 10**9}, {"hidden_size": 2**16}, {"hidden_size": 10**12},
        {"mlp_ratio": 60000.0}, {"mlp_ratio": 1e300}, {"image_size": [2**16, 2**16], "position": "learned"},
        {"patch_size": 0}, {"num_heads": 0}, {"num_heads": -2}, {"max_context": 2**16, "position": "learned"},
        {"in_channels": -1}, {"depth": "2"}, {"depth": None}, {"image_size": 8},
        {"_class_name": "AutoencoderKL", "depth": 60_000},
    ],
)  # fmt: skip
def test_networks_are_not_built_beyond_their_weights(folder, values):
    change(folder / "cdit" / "config.json", **values)
    before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(UserError, match=r"not a readable world model|world_model\.json: not "):
        WorldModel.from_pretrained(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000
    assert time.process_time() - begun < 10


@pytest.mark.parametrize("name", ["os:_exit", "subprocess:Popen", "builtins:exit", "this_is_not_imported:Class"])
def test_nothing_that_a_file_names_is_called(folder, name):
    """But subclasses of what they stand for, in modules that are imported already."""
    for file, values in (
        ("world_model.json", {"codec": name}), ("world_model.json", {"codec": "pixels", "objective": name}),
        ("cdit/config.json", {"extra_conditioners": {"x": name}}),
    ):  # fmt: skip
        change(folder / file, **values)
        with pytest.raises(
            UserError, match="set CDIT_PLUGINS=this_is_not_imported" if "not" in name else "subclass of"
        ):
            WorldModel.from_pretrained(folder)


def test_a_pickle_beside_the_weights_is_not_read(folder, monkeypatch):
    """Which diffusers would, where there are no safetensors."""

    class Poison:
        def __reduce__(self):
            return os.system, (f"touch {folder / 'it_ran'}",)

    weights = folder / "cdit" / "diffusion_pytorch_model.safetensors"
    weights.unlink()
    torch.save({"a": torch.ones(1)}, folder / "cdit" / "diffusion_pytorch_model.bin")
    (folder / "cdit" / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Poison()))
    monkeypatch.setattr(torch, "load", lambda *args, **options: pytest.fail("torch.load was called"))
    with pytest.raises(UserError, match=r"expected \*\.safetensors"):
        WorldModel.from_pretrained(folder)
    assert not (folder / "it_ran").exists()


def header(text: bytes, numbers: bytes = b"") -> bytes:
    return len(text).to_bytes(8, "little") + text + numbers


@pytest.mark.parametrize(
    "content",
    [
        b"", b"\0" * 8, (2**63).to_bytes(8, "little"), header(b"{" * 100_000), header(b"{}"), header(b"[]"),
        header(b'{"a": {"dtype": "F32", "shape": [4294967296, 4294967296], "data_offsets": [0, 0]}}'),
        header(b'{"a": {"dtype": "F32", "shape": [1000000], "data_offsets": [0, 4]}}', bytes(4)),
        header(b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}', bytes(4)),
        header(b'{"a": {"dtype": "F32", "shape": [0, 9223372036854775807], "data_offsets": [0, 0]}}'),
        header(b'{"a": {"dtype": "Q9", "shape": [1], "data_offsets": [0, 4]}}', bytes(4)),
    ],
    ids=range(11),
)  # fmt: skip
def test_hostile_safetensors_are_refused(folder, content):
    (folder / "cdit" / "diffusion_pytorch_model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"not a readable world model|world_model\.json: not "):
        WorldModel.from_pretrained(folder)


def test_bfloat16_weights_become_float32_of_the_same_value(folder):
    path = folder / "cdit" / "diffusion_pytorch_model.safetensors"
    tensors = safetensors.torch.load_file(path)
    halves = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    safetensors.torch.save_file(halves, path, {"format": "pt"})
    for name, parameter in WorldModel.from_pretrained(folder).cdit.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, halves[name].float())


@pytest.mark.parametrize("text", ["", "[]", "null", "{}", "[" * 100_000, "\udcff", '{"codec": "pixels"}'], ids=range(7))
def test_files_that_are_no_descriptions(folder, text):
    (folder / "world_model.json").write_text(text, errors="surrogateescape")
    with pytest.raises(UserError, match=r"not a readable world model|world_model\.json: not "):
        WorldModel.from_pretrained(folder)
