"""That each mode prints its tables and leaves its files; what they say depends on the machine."""

import json
import re
from functools import partial
from typing import get_args

import pytest
import torch
from PIL import Image

from cdit.benchmark.__main__ import main
from cdit.benchmark.bench import MODES
from cdit.benchmark.config import ModeName
from cdit.benchmark.training import REST, kind_of
from cdit.common.errors import UserError

SMALL = [
    "--device=cpu", "--rounds=2", "--min_seconds=0", "--image_size=[8, 8]", "--channels=3", "--batch_size=1",
    "--goals=2", "--steps=[1, 2]", "--context_frames=2", "--model.patch_size=4", "--model.hidden_size=16",
    "--model.depth=1", "--model.num_heads=2", "--codec.blocks=[32, 32]", "--data.recorded_size=[24, 32]",
    "--data.frames=12", "--data.batches=2", "--data.workers=[0, 1]", "--scale.past_frames=[1, 2, 3]",
    "--scale.sides=[4, 8]", "--scale.batches=[1, 2]", "--scale.candidates=[1, 2]",
]  # fmt: skip
TABLES = {
    "train": 1, "sample": 3, "rollout": 1, "plan": 2, "data": 1, "scale": 5, "attention": 1, "context": 3,
    "probes": 1, "latents": 1, "profile": 1, "frames": 1,
}  # fmt: skip


def test_every_mode_is_known():
    assert set(TABLES) == set(MODES) == set(get_args(ModeName))


@pytest.mark.slow
@pytest.mark.parametrize("mode", TABLES)
def test_each_mode_prints_its_tables(mode, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("sys.argv", ["cdit.benchmark", mode, *SMALL, f"--out={tmp_path / 'out'}"])
    main()
    printed = capsys.readouterr().out
    machine, *lines = printed.splitlines()
    assert re.search(r"threads, torch \d+\.\d+", machine)
    tables = [block.splitlines() for block in "\n".join(lines).split("\n\n") if block.lstrip().startswith("|")]
    assert len(tables) == sum(line.startswith("### ") for line in lines) == TABLES[mode]
    for header, _, *rows in tables:
        assert rows
        assert {row.count("|") for row in rows} == {header.count("|")}
    assert (tmp_path / "out" / "tables.md").read_text().rstrip() == printed.rstrip()
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [len(table["rows"]) for table in results["tables"]] == [len(table) - 2 for table in tables]
    for plot in (tmp_path / "out").glob("*.png"):
        assert min(Image.open(plot).size) > 300
    assert len(list((tmp_path / "out").glob("*.png"))) == (4 if mode == "scale" else 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--rounds=0"], "rounds is 0"),
        (["sample", "--steps=[]"], r"steps is \[\]"),
        (["scale", "--scale.past_frames=[1, 2]"], "scale.past_frames"),
        (["plan", "--plan.candidates=0"], "plan.candidates is 0"),
        (["sample", "--measured_steps=1"], "measured_steps is 1"),
        (["probes", "--channels=4", "--device=cpu"], "channels is 4"),
    ],
)
def test_what_cannot_be_is_refused(arguments, message, monkeypatch):
    monkeypatch.setattr("sys.argv", ["cdit.benchmark", *arguments])
    with pytest.raises(UserError, match=message):
        main()


def test_real_frames_are_held_once_for_all_candidates(monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["cdit.benchmark", "plan", *SMALL, f"--out={tmp_path}", "--contenders=[ours]"])
    main()
    rows = json.loads((tmp_path / "results.json").read_text())["tables"][1]["rows"]
    assert [row["candidates"] for row in rows] == ["2", "12", "120"]
    real, predicted = ([row[f"of {whose} frames [MB]"] for row in rows] for whose in ("real", "predicted"))
    keys_values = 2 * 4 * 16 * 4 / 1e6  # K and V of 4 patches, 16 wide, float32, of each frame
    assert real == [2 * keys_values] * 3
    assert predicted == pytest.approx([n * keys_values for n in (2, 12, 120)])


def test_networks_whose_context_cannot_be_pushed_have_no_table_of_memory(monkeypatch, tmp_path):
    options = ("--contenders=[ours]", "--model.position=learned")
    monkeypatch.setattr("sys.argv", ["cdit.benchmark", "plan", *SMALL, f"--out={tmp_path}", *options])
    main()
    assert len(json.loads((tmp_path / "results.json").read_text())["tables"]) == 1


@pytest.mark.parametrize("mode", ["context", "train"])
def test_what_is_called_compiled_is(mode, monkeypatch, tmp_path):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    arguments = ["--contenders=[ours]", "--compile=true", f"--out={tmp_path}"]
    monkeypatch.setattr("sys.argv", ["cdit.benchmark", mode, *SMALL, *arguments])
    main()
    assert graphs
    assert "compiled" in (tmp_path / "tables.md").read_text()


def test_kinds_of_a_profile():
    for name, kind in {
        "aten::mm": "products",
        "aten::convolution_backward": "products",
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward": "fused attention",
        "aten::_softmax_backward_data": "softmax",
        "aten::copy_": "copies and casts",
        "aten::_fused_adamw_": "optimizer, average, norm of gradients",
        "aten::mul": "other element-wise operations and sums",
        "graph_0_cpp_fused__to_copy_mul_3": "compiled kernels",
        "triton_poi_fused_add_0": "compiled kernels",
        "## Call CompiledFxGraph f5x ##": "compiled kernels",
        "AddmmBackward0": REST,
    }.items():
        assert kind_of(name) == kind


def test_a_profile_is_of_whole_steps(monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["cdit.benchmark", "profile", *SMALL, f"--out={tmp_path / 'out'}"])
    main()
    (table,) = json.loads((tmp_path / "out" / "results.json").read_text())["tables"]
    for name in ("ours", "NWM-as-published"):
        shares = {row[""]: row[f"{name} [%]"] for row in table["rows"]}
        assert sum(shares.values()) == pytest.approx(100)
        assert all(shares[kind] > 0 for kind in ("products", "layer norm", "other element-wise operations and sums"))
