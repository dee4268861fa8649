import base64
import io
import json
import math
import re
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from cdit.common.statistics import Estimate
from cdit.heads.glossary import HeadType
from cdit.heads.head_statistics import HeadRow
from cdit.heads.measures import Layout
from cdit.heads.page import AttentionPage, affordable_top_k, compress

LAYOUT = Layout(3, 2, 4)


def head_row(layer: int, head: int, type_name: str, measures: dict[str, float], time: float = 0.25) -> HeadRow:
    estimates = {name: Estimate(value, None, None) for name, value in measures.items()}
    return HeadRow("cross", layer, head, time, estimates, HeadType(type_name, "reason"))


def random_weights(layout: Layout, heads: int = 2, extra: bool = False, sharpness: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    keys = layout.frames * layout.patches + extra
    return (torch.randn(heads, layout.patches, keys, generator=generator) * sharpness).softmax(-1)


def read(packed: bytes, layout: Layout, heads: int, top_k: int, extra: bool) -> list[dict[str, np.ndarray]]:
    """The two sections, read as the module's docstring says; kept weights dense, NaN where not kept."""
    data, sections = zlib.decompress(packed), []
    for rows, kept in ((heads * layout.patches, top_k), (heads, layout.frames * layout.patches)):

        def plane(width: int, rows: int = rows) -> np.ndarray:
            nonlocal data
            taken, data = data[: rows * width], data[rows * width :]
            return np.frombuffer(taken, np.uint8).reshape(rows, width).astype(np.float64)

        peak = ((plane(1) + 256 * plane(1)) / 65535) ** 2
        masses = np.concatenate([plane(1) for _ in range(layout.frames + extra)], axis=1) / 255
        values = peak * (plane(kept) / 255) ** 2
        tokens = np.cumsum(plane(kept) + 256 * plane(kept), axis=1) - 1
        dense = np.full((rows, layout.frames * layout.patches), np.nan)
        np.put_along_axis(dense, tokens.astype(np.int64), values, axis=1)
        sections.append({"weights": dense, "masses": masses})
    assert not data
    return sections


def assert_rows(section: dict[str, np.ndarray], weights: Tensor, layout: Layout, kept: int) -> None:
    """Within the bounds that are documented, and nothing left out that is larger than what is kept."""
    true = weights.flatten(0, 1).double().numpy()
    on_frames = true[:, : layout.frames * layout.patches]
    peak = on_frames.max(1, keepdims=True)
    bound = np.sqrt(on_frames * peak) / 255 + peak / 510**2 + np.sqrt(peak) / 65535 + 131070.0**-2 + 1e-9
    is_kept = ~np.isnan(section["weights"])
    assert (is_kept.sum(1) == kept).all()
    assert (np.abs(section["weights"] - on_frames) <= bound)[is_kept].all()
    left_out = np.where(is_kept, -1, on_frames).max(1)
    assert (left_out <= np.where(is_kept, on_frames, 2).min(1)).all()
    frames = on_frames.reshape(-1, layout.frames, layout.patches).sum(-1)
    masses = np.concatenate([frames, true[:, on_frames.shape[1] :]], axis=1)
    np.testing.assert_allclose(section["masses"], masses, atol=1 / 510 + 1e-6)


@pytest.mark.parametrize("extra", [False, True])
@pytest.mark.parametrize("top_k", [1, 5, 24])
@pytest.mark.parametrize("sharpness", [0.0, 1.0, 8.0])
def test_weights_come_back_within_the_stated_bounds(top_k: int, extra: bool, sharpness: float):
    weights = random_weights(LAYOUT, 3, extra, sharpness)
    rows, means = read(compress(weights, LAYOUT, top_k), LAYOUT, 3, top_k, extra)
    assert_rows(rows, weights, LAYOUT, top_k)
    assert_rows(means, weights.mean(1, keepdim=True), LAYOUT, 24)


def test_tokens_further_apart_than_a_byte_are_found():
    layout = Layout(5, 10, 20)
    weights = torch.zeros(1, 200, 1000)
    weights[0, :, 999] = 0.75
    weights[0, torch.arange(200), torch.arange(200)] = 0.25
    rows, _ = read(compress(weights, layout, 2), layout, 1, 2, False)
    assert_rows(rows, weights, layout, 2)
    np.testing.assert_array_equal(np.flatnonzero(~np.isnan(rows["weights"][7])), [7, 999])


def test_rows_that_see_nothing_are_zero():
    weights = random_weights(LAYOUT)
    weights[1, 3] = 0
    rows, _ = read(compress(weights, LAYOUT, 4), LAYOUT, 2, 4, False)
    assert np.nansum(rows["weights"][LAYOUT.patches + 3]) == 0
    assert (rows["masses"][LAYOUT.patches + 3] == 0).all()


@pytest.mark.parametrize(
    ("layout", "maps", "sharpness"),
    [(Layout(4, 8, 8), 48, 0.5), (Layout(4, 8, 8), 96, 2.0), (Layout(4, 16, 16), 8, 1.0), (Layout(4, 14, 14), 32, 4.0)],
)
def test_affordable_weights_fit(layout: Layout, maps: int, sharpness: float):
    """Independent weights are the worst case: their places and values are the hardest to compress."""
    size = maps * layout.patches * 80
    top_k = affordable_top_k(layout, maps, size)
    assert 1 < top_k < layout.frames * layout.patches
    weights = random_weights(layout, maps, sharpness=sharpness)
    packed = 4 / 3 * sum(len(compress(part, layout, top_k)) for part in weights.split(8))
    assert 0.7 * size < packed <= size


def test_everything_is_affordable_where_there_is_little():
    assert affordable_top_k(LAYOUT, maps=4) == 24
    assert affordable_top_k(LAYOUT, maps=10**9) == 1


def frames(count: int, size: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, 3, size, 2 * size), generator=generator, dtype=torch.uint8)


def make_page(title: str = "Title", name: str = "sample", size: int = 8) -> AttentionPage:
    page = AttentionPage(title, LAYOUT, fps=4.0, has_extra=False, top_k=5)
    pictures = frames(5, size)
    places = torch.rand(LAYOUT.patches, LAYOUT.frames, 2, generator=torch.Generator().manual_seed(0)) * 2
    places[2, 1] = math.nan
    sample = page.add_sample(
        name, pictures[:3], torch.tensor([False, True, True]), pictures[3], pictures[4], places=places
    )
    for time in (0.75, 0.25):
        for layer in (3, 0):
            page.add_weights(sample, layer, time, random_weights(LAYOUT))
    return page


def data_of(page: str) -> dict:
    scripts = re.findall(r"<script([^>]*)>(.*?)</script>", page, re.DOTALL)
    assert len(scripts) == 2
    return json.loads(next(content for attributes, content in scripts if 'id="data"' in attributes))


def test_names_cannot_break_out_of_the_page():
    nasty = "</script><script>alert(1)</script><!-- data --> & \"'"
    page = make_page(title=nasty, name=nasty)
    page.set_heads([head_row(0, 1, nasty, {nasty: 1.0})], [nasty], {nasty: nasty})
    html = page.html()
    data = data_of(html)
    assert "<script>alert" not in html
    assert data["samples"][0]["name"] == data["table"][0]["type"] == data["explanations"][nasty] == nasty
    escaped = "&lt;/script&gt;&lt;script&gt;alert(1)&lt;/script&gt;&lt;!-- data --&gt; &amp; &quot;&#x27;"
    assert f"<title>{escaped}</title>" in html


def test_the_page_asks_for_nothing_from_elsewhere():
    html = make_page().html()
    assert not re.search(r"https?:|//[a-z]+\.|@import|url\(|\bfetch\(|XMLHttpRequest|WebSocket|sendBeacon", html)
    assert not re.search(r"<(script|link|img|iframe)[^>]*\b(src|href)=\"(?!data:)", html)
    assert "default-src 'none'; img-src data:;" in html


def test_frames_and_places_are_what_was_given():
    data = data_of(make_page().html())
    sample, pictures = data["samples"][0], frames(5)
    assert sample["context"][0] is None  # the missing one
    shown = [*sample["context"][1:], sample["target"], sample["prediction"]]
    for uri, frame in zip(shown, pictures[1:], strict=True):
        kind, _, content = uri.partition(",")
        assert kind == "data:image/png;base64"
        image = Image.open(io.BytesIO(base64.b64decode(content)))
        np.testing.assert_array_equal(np.asarray(image), frame.permute(1, 2, 0))
    assert sample["correspondence"][2][1] is None
    places = torch.rand(LAYOUT.patches, LAYOUT.frames, 2, generator=torch.Generator().manual_seed(0)) * 2
    np.testing.assert_allclose(sample["correspondence"][5], places[5], atol=0.005)
    assert data["aspect"] == 2
    assert data["pixelated"]


def test_large_frames_are_jpegs():
    data = data_of(make_page(size=200).html())
    assert data["samples"][0]["target"].startswith("data:image/jpeg;base64,")
    assert not data["pixelated"]


def test_weights_are_in_the_order_of_samples_times_and_layers():
    page = AttentionPage("Title", LAYOUT, fps=4.0, has_extra=False)
    weights = {}
    for sample in range(2):
        page.add_sample("", frames(3), torch.ones(3, dtype=torch.bool), frames(1)[0])
        for layer in (4, 1):
            for time in (0.9, 0.5):
                weight = torch.zeros(1, 8, 24)
                weight[..., len(weights)] = 1
                weights[sample, time, layer] = len(weights)
                page.add_weights(sample, layer, time, weight)
    data = data_of(page.html())
    assert (data["times"], data["layers"], data["heads"], data["kept"]) == ([0.5, 0.9], [1, 4], 1, 24)
    tokens = []
    for packed in data["weights"]:
        rows, _ = read(base64.b64decode(packed), LAYOUT, 1, 24, False)
        tokens.append(rows["weights"][0].argmax())
    assert tokens == [weights[key] for key in sorted(weights)]


def test_heads_without_a_number_have_none():
    page = make_page()
    page.set_heads([head_row(0, 1, "copy", {"lift": math.nan, "entropy": 1.5})], ["lift", "entropy"], {})
    assert data_of(page.html())["table"][0]["measures"] == {"lift": None, "entropy": 1.5}


def test_weights_that_are_missing_are_named():
    page = make_page()
    page.add_weights(0, 5, 0.25, random_weights(LAYOUT))
    with pytest.raises(ValueError, match=r"\[\(0, 0\.75, 5\)\]"):
        page.html()
