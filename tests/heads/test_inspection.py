import csv
import json
import math
import weakref

import numpy as np
import pytest
import torch
from PIL import Image

from cdit.batch import Batch
from cdit.common.errors import UserError
from cdit.heads import draw
from cdit.heads.config import AttentionConfig
from cdit.heads.inspection import inspect_attention
from cdit.heads.measures import Layout
from cdit.heads.record import LayerAttention
from cdit.heads.report import AttentionReport
from cdit.world_model import WorldModel


def look(world: WorldModel, batch: Batch, config: AttentionConfig | None = None, seed: int = 0,
         **options) -> AttentionReport:  # fmt: skip
    """Each sample of a trajectory of its own."""
    names = [str(i) for i in range(len(batch))]
    return inspect_attention(world, batch, config or AttentionConfig(), seed, names, **options)


def figures(report: AttentionReport) -> set[str]:
    """The names of those that show one layer."""
    return {name for name in report.images if "/sample" in name}


def test_the_report_names_and_captions_what_it_shows(make_world, make_batch):
    config = AttentionConfig(layers=[0, 2], times=[0.25, 0.75], drawn=2, patch=(1, 2))
    report = look(make_world(extra_kv=True), make_batch(), config)
    assert figures(report) == {
        f"attention/layer{layer}/t{time}/sample{i}" for layer in ("00", "02") for time in (0.25, 0.75) for i in (0, 1)
    }
    image, caption = report.images["attention/layer02/t0.75/sample1"]
    assert isinstance(image, Image.Image)
    assert "Layer 2" in caption
    assert "(1, 2)" in caption
    columns, lines = report.table
    assert columns[:6] == ["kind", "layer", "head", "time", "type", "reason"]
    assert [line[:4] for line in lines] == [
        ["cross", layer, head, t] for layer in (0, 2) for t in (0.25, 0.75) for head in range(4)
    ]
    masses = ["mass frame -2", "mass frame -1", "mass frame 0", "mass extra"]
    for row in report.rows:
        assert sum(row.measures[name].mean for name in masses) == pytest.approx(1, abs=1e-5)
    rows = [row for row in report.rows if (row.layer, row.head) == (2, 1)]
    for name in ("entropy", "mass frame -2"):
        expected = np.mean([row.measures[name].mean for row in rows])
        assert report.scalars[f"attention/layer02/head1/{name.replace(' ', '_')}"] == pytest.approx(expected)
    assert not any("moved" in name for name in report.scalars)
    heads = {name.split("/")[2] for name in report.scalars}
    assert heads == {f"head{i}" for i in range(4)}


def test_by_default_all_layers_are_measured_and_the_first_middle_and_last_drawn(make_world, make_batch):
    report = look(make_world(depth=5), make_batch())
    assert {name.split("/")[1] for name in figures(report)} == {"layer00", "layer02", "layer04"}
    assert len(figures(report)) == 6
    assert {row.layer for row in report.rows} == set(range(5))


def test_of_a_large_batch_some_samples_are_measured(make_world, make_batch):
    """Two of six, spread: those of index 1 and 4."""
    world, batch = make_world(), make_batch(samples=6)
    chosen = batch[[1, 4]]
    config = AttentionConfig(layers=[1], times=[0.5], samples=2)
    assert look(world, batch, config).scalars == look(world, chosen, config).scalars


def test_it_is_repeatable_and_leaves_the_model_and_global_randomness_alone(make_world, make_batch):
    world, batch = make_world(dropout=0.5).train(), make_batch()
    state = torch.get_rng_state()
    first, second = (look(world, batch, seed=3) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert first.scalars == second.scalars
    assert all(first.images[name][0].tobytes() == second.images[name][0].tobytes() for name in first.images)
    assert world.cdit.training
    assert first.scalars != look(world, batch, seed=4).scalars


@pytest.mark.parametrize("frames", [1, 2, 5])
def test_any_number_of_past_frames(make_world, make_batch, frames):
    report = look(make_world(), make_batch(frames=frames), AttentionConfig(layers=[0], times=[0.5]))
    assert sum("/head0/mass_frame" in name for name in report.scalars) == min(frames, 3)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (AttentionConfig(layers=[]), r"attention\.layers is \[\]"),
        (AttentionConfig(kinds=["self", "self"]), r"attention\.kinds"),
        (AttentionConfig(drawn=-1), r"attention\.drawn is -1, expected at least 0"),
        (AttentionConfig(layers=[0, 7]), r"attention\.layers is .* numbers from 0 to 2"),
        (AttentionConfig(times=[0.5, 1.0]), r"attention\.times is .*1\.0.*between 0 and 1"),
        (AttentionConfig(patch=(4, 0)), r"attention\.patch is \(4, 0\).*4 × 6 patches"),
    ],
)
def test_mistakes_are_named(make_world, make_batch, config, message):
    with pytest.raises(UserError, match=message):
        look(make_world(), make_batch(), config)


def test_both_kinds_stand_side_by_side(make_world, make_batch):
    config = AttentionConfig(kinds=["cross", "self"], layers=[1], times=[0.5])
    world, batch = make_world(), make_batch()
    both, cross = look(world, batch, config), look(world, batch, AttentionConfig(layers=[1], times=[0.5]))
    columns, lines = both.table
    assert [line[0] for line in lines] == ["cross"] * 4 + ["self"] * 4
    older = [line[columns.index("mass frame -1")] for line in lines]
    assert [value is None for value in older] == [False] * 4 + [True] * 4  # the target is one frame
    assert "attention/self/layer01/t0.5/sample0" in both.images
    assert {name: value for name, value in both.scalars.items() if "/self/" not in name} == cross.scalars
    assert both.page.html() == cross.page.html()


def test_no_more_than_one_layer_is_held(make_world, make_batch, monkeypatch):
    """At each new layer, all weights that an earlier one gave out are gone."""
    given = []
    weights = LayerAttention.weights

    def counted(self: LayerAttention) -> torch.Tensor:
        alive = {layer for layer, reference in given if reference() is not None}
        assert alive <= {self.layer}, f"layer {self.layer} begins while weights of {alive} are held"
        found = weights(self)
        given.append((self.layer, weakref.ref(found)))
        return found

    monkeypatch.setattr(LayerAttention, "weights", counted)
    config = AttentionConfig(kinds=["cross", "self"], times=[0.3, 0.6], drawn=2)
    look(make_world(), make_batch(), config)
    assert len(given) >= 2 * 3 * 2 * 2  # kinds, layers, times, samples


def test_a_model_without_actions_sees_none(make_world, make_batch):
    """Whatever the batch says; with actions it looks elsewhere."""
    world, config = make_world(), AttentionConfig(layers=[1], times=[0.5])
    batches = [make_batch(), make_batch()]
    batches[1].condition.action += 3
    with_actions = [look(world, batch, config).scalars["attention/layer01/head0/entropy"] for batch in batches]
    world.description.has_actions = False
    silent = [look(world, batch, config).scalars["attention/layer01/head0/entropy"] for batch in batches]
    assert with_actions[0] != with_actions[1]
    assert silent[0] == silent[1]


def marching(make_world, make_batch) -> tuple[WorldModel, Batch, torch.Tensor]:
    """A world, and true places of which every target patch has one, in the newest frame alone."""
    places = torch.full((2, 2, 24, 3, 2), float("nan"))
    places[..., 2, :] = Layout(3, 4, 6).positions().float() + 0.5
    return make_world(), make_batch(), places


def test_with_true_places_heads_are_judged_beside_baselines(make_world, make_batch):
    world, batch, places = marching(make_world, make_batch)
    config = AttentionConfig(layers=[0, 1], times=[0.5])
    report = look(world, batch, config, places=places, untrained=world)
    _, _, table = report.summary.partition("## Do heads attend")
    lines = {line.split(" | ")[0].strip("| "): line.split(" | ")[1:] for line in table.splitlines() if " | " in line}
    # The same place, of which a third lies in the one frame that shows the point.
    assert [float(cell.strip(" |").split()[0]) for cell in lines["same place"]][1:] == pytest.approx(
        [1 / 3, 1 / 3], abs=6e-4
    )
    assert float(lines["uniform"][0].split()[0]) == pytest.approx(1)
    best = next(name for name in lines if name.startswith("best head"))
    same = next(name for name in lines if name.startswith("untrained, best head"))
    assert lines[best] == lines[same]  # here it is the same network
    assert report.table[0][6] == "correspondence lift"
    assert all("correspondence" not in column for column in look(world, batch, config).table[0])


def test_a_folder_holds_everything(make_world, make_batch, tmp_path):
    report = look(make_world(), make_batch(), AttentionConfig(layers=[1], times=[0.5]))
    folder = tmp_path / "new" / "folder"
    report.save(folder)
    image, _ = report.images["attention/layer01/t0.5/sample0"]
    assert np.array_equal(np.asarray(Image.open(folder / "layer01_t0.5_sample0.png")), np.asarray(image))
    captions = json.loads((folder / "captions.json").read_text("utf-8"))
    assert sorted(captions) == sorted(file.name for file in folder.glob("*.png"))
    assert sorted(captions.values()) == sorted(caption for _, caption in report.images.values())
    assert {"types.png", "head_distances.png", "measures_edge_lift.png"} <= set(captions)
    scalars = json.loads((folder / "scalars.json").read_text())
    assert scalars == {name: value if math.isfinite(value) else None for name, value in report.scalars.items()}
    with (folder / "table.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert list(table[0]) == report.table[0]
    assert [float(row["entropy"]) for row in table] == [row.measures["entropy"].mean for row in report.rows]
    assert (folder / "index.html").read_text("utf-8") == report.page.html()
    assert (folder / "summary.md").read_text("utf-8") == report.summary
    thumbnails = sorted(file.name for file in (folder / "thumbnails").iterdir())
    assert thumbnails == [f"cross_layer01_head{i}_t0.5.png" for i in range(4)]


def test_what_is_not_drawn_is_measured_all_the_same(make_world, make_batch, tmp_path):
    world, batch = make_world(), make_batch()
    drawn, plain = (look(world, batch, AttentionConfig(layers=[1], times=[0.5], drawn=count)) for count in (1, 0))
    assert (drawn.table, drawn.scalars) == (plain.table, plain.scalars)
    assert plain.page is None
    assert not figures(plain)
    plain.save(tmp_path)
    assert not (tmp_path / "index.html").exists()
    assert "attention/page" not in plain.to_wandb(tmp_path)


def test_examples_are_the_first_head_of_each_type_and_the_mixed_last(make_world, make_batch, monkeypatch):
    shown = []
    monkeypatch.setattr(draw, "examples_figure", lambda scene, predicted, rows, maps, places: shown.extend(rows))
    report = look(make_world(depth=5), make_batch(), AttentionConfig(times=[0.5, 0.75]))
    first = {}
    for row in report.rows:
        if row.time == 0.5:
            first.setdefault(row.type.name, row)
    assert shown == sorted(first.values(), key=lambda row: row.type.name == "mixed")[:4]
