"""The page in headless Chromium, from a file, with the network off. Weights are made so that all answers are known."""

import json
import sys
from collections.abc import Collection, Iterator
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cdit.common.statistics import Estimate
from cdit.heads.glossary import HeadType
from cdit.heads.head_statistics import HeadRow
from cdit.heads.measures import Layout
from cdit.heads.page import AttentionPage

sys.path.append(str(Path(__file__).parents[1]))
from browser import launched, needs_a_browser
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

pytestmark = needs_a_browser

LAYOUT = Layout(3, 4, 6)
SAMPLES, TIMES, LAYERS, HEADS = 2, (0.25, 0.75), (1, 3), 2
ENTROPY = {(1, 0): 0.5, (1, 1): 3.0, (3, 0): float("nan"), (3, 1): 2.0}


def looked_at(sample: int, time: float, layer: int, row: int, column: int) -> tuple[int, int, int]:
    """Frame, row and column that head 0 attends to; depends on everything that can be chosen."""
    return (1 if layer == 1 else 2), (row + sample) % 4, (column + (1 if time == 0.25 else 2)) % 6


def true_place(frame: int, row: int, column: int) -> tuple[float, float]:
    return 0.4 * frame + 0.6 * row + 0.25, 0.7 * column + 0.5


def weights_of(sample: int, time: float, layer: int) -> Tensor:
    """Head 0: a quarter on the extra key, 0.45 on one place, 0.3 on the next row. Head 1: even over what exists."""
    weights = torch.zeros(HEADS, 24, 73)
    for patch, (row, column) in enumerate(np.ndindex(4, 6)):
        frame, r, c = looked_at(sample, time, layer, row, column)
        weights[0, patch, (frame * 4 + r) * 6 + c] = 0.45
        weights[0, patch, (frame * 4 + (r + 1) % 4) * 6 + c] = 0.3
    weights[0, :, -1] = 0.25
    weights[1, :, 24 * sample : 72] = 1 / (72 - 24 * sample)  # sample 1 lacks the oldest frame
    return weights


def build(path: Path, top_k: int = 72, measure: str = "entropy") -> str:
    page = AttentionPage("Known attention", LAYOUT, fps=4.0, has_extra=True, top_k=top_k)
    for sample in range(SAMPLES):
        pictures = torch.full((5, 3, 40, 60), 90 + sample, dtype=torch.uint8)
        pictures[3], pictures[4] = 200, 50
        places = torch.tensor(
            [[true_place(frame, row, column) for frame in range(3)] for row, column in np.ndindex(4, 6)]
        )
        places[7, 0] = float("nan")
        exists = torch.tensor([sample == 0, True, True])
        prediction, known = (pictures[4], places) if sample == 0 else (None, None)
        page.add_sample(f"sample {sample}", pictures[:3], exists, pictures[3], prediction, known)
        for time in TIMES:
            for layer in LAYERS:
                page.add_weights(sample, layer, time, weights_of(sample, time, layer))
    heads = [
        HeadRow(
            *("cross", layer, head, time),
            {
                measure: Estimate(value + (time if measure.endswith("accuracy") else 0), None, None),
                "at": Estimate(time, None, None),
            },
            HeadType("even" if head else "copy", "for the test"),
        )
        for time in TIMES
        for (layer, head), value in ENTROPY.items()
    ]
    page.set_heads(heads, [measure, "at"], {"copy": "It copies."})
    page.save(path)
    return path.as_uri()


@pytest.fixture(scope="module")
def addresses(tmp_path_factory) -> dict[int, str]:
    """Of the page with all weights, and with two of each row."""
    folder = tmp_path_factory.mktemp("page")
    return {top_k: build(folder / f"{top_k}.html", top_k) for top_k in (72, 2)}


@pytest.fixture(scope="module")
def chromium() -> Iterator[webdriver.Chrome]:
    with launched() as driver:
        driver.execute_cdp_cmd("Network.enable", {})
        offline = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
        driver.execute_cdp_cmd("Network.emulateNetworkConditions", offline)
        yield driver


class Page:
    """The page as a person uses it, and reads it."""

    def __init__(self, driver: webdriver.Chrome, files: Collection[str]):
        self.driver = driver
        self.files = set(files)
        """Addresses that may be requested."""

    def open(self, address: str) -> None:
        self.driver.get("about:blank")  # so that an address that differs in its hash alone is loaded anew
        self.driver.get(address)
        self.wait()

    def wait(self) -> None:
        """Until the page has rendered."""
        self.driver.execute_async_script("window.page.ready.then(() => window.page.update({})).then(arguments[0])")

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def find(self, selector: str) -> Any:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        return self.find(selector).text

    def texts(self, selector: str) -> list[str]:
        return [found.text for found in self.driver.find_elements(By.CSS_SELECTOR, selector)]

    def click(self, selector: str) -> None:
        self.run("arguments[0].scrollIntoView({block: 'center'})", self.find(selector))
        self.find(selector).click()
        self.wait()

    def choose(self, name: str, index: int) -> None:
        """A radio button."""
        self.driver.find_elements(By.CSS_SELECTOR, f"input[name={name}]")[index].click()
        self.wait()

    def press(self, selector: str, *keys: str) -> None:
        self.run("arguments[0].focus()", self.find(selector))
        for key in keys:
            self.driver.switch_to.active_element.send_keys(key)
            self.wait()

    def middle_of_patch(self, row: int, column: int) -> tuple[float, float]:
        """In the window, of the large frame."""
        target = self.find("#target")
        self.run("arguments[0].scrollIntoView({block: 'center'})", target)
        box = self.run("return arguments[0].getBoundingClientRect().toJSON()", target)
        return box["x"] + box["width"] * (column + 0.5) / 6, box["y"] + box["height"] * (row + 0.5) / 4

    def click_patch(self, row: int, column: int) -> None:
        x, y = self.middle_of_patch(row, column)
        for kind in ("mousePressed", "mouseReleased"):
            event = {"type": kind, "x": x, "y": y, "button": "left", "clickCount": 1}
            self.driver.execute_cdp_cmd("Input.dispatchMouseEvent", event)
        self.wait()

    def pixels(self, selector: str) -> list[np.ndarray]:
        """(height, width, 4) of each canvas or image, by way of a copy: canvases that are read often warn of it."""
        pictures = self.run(
            """return [...document.querySelectorAll(arguments[0])].map((picture) => {
                const width = picture.naturalWidth ?? picture.width, height = picture.naturalHeight ?? picture.height;
                const context = Object.assign(document.createElement("canvas"), { width, height }).getContext("2d");
                context.drawImage(picture, 0, 0);
                return [height, width, ...context.getImageData(0, 0, width, height).data];
            })""",
            selector,
        )
        return [np.array(pixels).reshape(height, width, 4) for height, width, *pixels in pictures]

    def heat(self) -> np.ndarray:
        """(T, rows, columns, 4) what is drawn over the past frames."""
        return np.stack(self.pixels("#past canvas"))

    def brightest(self) -> tuple[int, int, int]:
        """Frame, row and column."""
        opacity = self.heat()[..., 3]
        [place] = np.argwhere(opacity == opacity.max())
        return tuple(place.tolist())

    def order(self) -> list[str]:
        return self.texts("#table tbody th")


@pytest.fixture
def page(chromium, addresses) -> Iterator[Page]:
    """The page with all weights, fresh; checks that it logged nothing and requested nothing."""
    for kind in ("browser", "performance"):
        chromium.get_log(kind)
    page = Page(chromium, addresses.values())
    page.open(addresses[72])
    yield page
    assert chromium.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in chromium.get_log("performance")]
    asked = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert {url.partition(":")[0] for url in asked} <= {"file", "data", "about"}
    assert {url.partition("#")[0] for url in asked if url.startswith("file")} <= page.files


def test_a_click_on_a_patch_shows_where_it_looks(page):
    for row, column in ((0, 0), (3, 5), (2, 1)):
        page.click_patch(row, column)
        assert page.brightest() == looked_at(0, 0.25, 3, row, column)
        assert f"patch at row {row}, column {column}" in page.text("#status")
    heat = page.heat()
    assert heat[looked_at(0, 0.25, 3, 2, 1)].tolist()[:3] == pytest.approx([252, 255, 164], abs=2)  # inferno's last
    cold = heat[0, 0, 0]
    assert cold[3] < 50  # places without attention stay visible


def test_numbers_are_those_of_the_weights(page):
    page.click_patch(2, 1)
    assert page.texts("#past output") == ["0 %", "0 %", "75 %"]
    assert page.text("#extra output") == "25 %"
    assert page.text("#peak") == "45 %"
    assert "most to frame 0 (now): 75 %" in page.text("#status")
    assert "stored individually" not in page.text("#status")


def test_attention_on_true_places_is_reported(page):
    # From (1, 3), head 0 of layer 3 attends to (1, 4) and (2, 4) of frame 2. The truth there is (1.65, 2.6).
    page.click_patch(1, 3)
    assert "0 % is on the true places" in page.text("#status")
    # From (0, 0), it attends to (0, 1) and (1, 1). The truth there is (1.05, 0.5): both are next to it.
    page.click_patch(0, 0)
    assert "75 % is on the true places" in page.text("#status")


def test_true_places_are_ringed_and_hidden_ones_named(page):
    def rings() -> list[tuple[float, float] | None]:
        """Middles of the rings in patches."""
        script = """return [...document.querySelectorAll('#past .frame')].map((frame) => {
            const [outer, ring] = [frame.getBoundingClientRect(), frame.querySelector('.ring').getBoundingClientRect()];
            if (!ring.width) return null;
            return [(ring.y + ring.height / 2 - outer.y) / outer.height * 4,
                    (ring.x + ring.width / 2 - outer.x) / outer.width * 6];
        })"""
        return page.run(script)

    page.click_patch(2, 4)
    for frame, ring in enumerate(rings()):
        assert ring == pytest.approx(true_place(frame, 2, 4), abs=0.05)
    assert page.texts("#past .note") == ["", "", ""]
    page.click_patch(1, 1)  # patch 7
    assert rings()[0] is None
    assert rings()[1] == pytest.approx(true_place(1, 1, 1), abs=0.05)
    assert page.texts("#past .note") == ["true place not visible", "", ""]
    page.choose("mean", 1)
    assert rings() == [None, None, None]
    page.choose("sample", 1)  # for which they are not known
    page.choose("mean", 0)
    assert rings() == [None, None, None]
    assert not page.find("#ring-legend").is_displayed()


def test_arrow_keys_move_the_patch_and_stop_at_the_border(page):
    page.click_patch(0, 1)
    page.press("#target", Keys.ARROW_DOWN, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert page.brightest() == looked_at(0, 0.25, 3, 1, 3)
    page.press("#target", *[Keys.ARROW_UP] * 3, *[Keys.ARROW_LEFT] * 5)
    assert page.brightest() == looked_at(0, 0.25, 3, 0, 0)
    assert "row 0, column 0" in page.find("#target").get_attribute("aria-label")


def test_a_drag_follows_the_pointer(page):
    x, y = page.middle_of_patch(0, 0)
    x2, y2 = page.middle_of_patch(2, 3)
    for kind, at in (("mousePressed", (x, y)), ("mouseMoved", (x2, y2)), ("mouseReleased", (x2, y2))):
        event = {"type": kind, "x": at[0], "y": at[1], "button": "left", "buttons": 1, "clickCount": 1}
        page.driver.execute_cdp_cmd("Input.dispatchMouseEvent", event)
    page.wait()
    assert page.brightest() == looked_at(0, 0.25, 3, 2, 3)


def test_thumbnails_show_and_choose_heads(page):
    page.click_patch(1, 2)
    page.click('.thumbnail[data-layer="1"][data-head="0"]')
    assert page.brightest() == looked_at(0, 0.25, 1, 1, 2)
    assert page.text("#status").startswith("Layer 1, head 0 copy")
    page.press('.thumbnail[aria-checked="true"]', Keys.ARROW_RIGHT)
    assert "Layer 1, head 1" in page.text("#status")
    page.press('.thumbnail[aria-checked="true"]', Keys.ARROW_DOWN, Keys.ARROW_DOWN, Keys.ARROW_LEFT)
    assert "Layer 3, head 0" in page.text("#status")
    assert page.run("return document.activeElement.getAttribute('aria-label')") == "layer 3, head 0, copy"
    # Thumbnails hold the frames side by side with a pixel between them.
    for layer in LAYERS:
        [image] = page.pixels(f'.thumbnail[data-layer="{layer}"][data-head="0"] canvas')
        image = image[..., :3].sum(-1)
        frame, row, column = looked_at(0, 0.25, layer, 1, 2)
        assert np.argwhere(image == image.max()).tolist() == [[row, frame * 7 + column]]


def test_heads_sort_by_a_measure_both_ways_and_those_without_it_come_last(page):
    assert page.order() == ["L1 H0", "L1 H1", "L3 H0", "L3 H1"]
    header = page.find("#table thead th:nth-child(3)")
    assert header.text.startswith("entropy")
    page.click("#table thead th:nth-child(3) button")
    assert page.order() == ["L1 H1", "L3 H1", "L1 H0", "L3 H0"]
    assert header.get_attribute("aria-sort") == "descending"
    page.press("#table thead th:nth-child(3) button", Keys.ENTER)
    assert page.order() == ["L1 H0", "L3 H1", "L1 H1", "L3 H0"]
    assert header.get_attribute("aria-sort") == "ascending"
    page.click("#table thead th:nth-child(2) button")
    assert page.order() == ["L1 H0", "L3 H0", "L1 H1", "L3 H1"]
    assert header.get_attribute("aria-sort") == "none"


def test_the_page_opens_on_the_most_accurate_head(page, tmp_path: Path):
    assert "Layer 3, head 0" in page.text("#status")  # the first of the middle layer: accuracies are unknown
    address = build(tmp_path / "accuracies.html", measure="correspondence accuracy")
    page.files.add(address)
    page.open(address)
    assert "Layer 1, head 1" in page.text("#status")
    assert page.text("#table tbody tr.chosen th") == "L1 H1"
    assert page.text("#times label:has(:checked)") == "t = 0.75"  # where it is most accurate


def test_rows_of_the_table_choose_heads(page):
    page.click("#table thead th:nth-child(3) button")
    page.click("#table tbody tr:nth-child(3)")
    assert "Layer 1, head 0" in page.text("#status")
    page.press("#table tbody tr.chosen button", Keys.ARROW_UP)
    assert "Layer 3, head 1" in page.text("#status")
    assert page.text("#table tbody tr.chosen th") == "L3 H1"
    assert page.run("return document.activeElement.textContent") == "L3 H1"


def test_sample_and_time_change_what_is_shown(page):
    page.click_patch(1, 1)
    page.choose("time", 1)
    assert page.brightest() == looked_at(0, 0.75, 3, 1, 1)
    assert page.texts("#table tbody td:last-child") == ["0.75"] * 4  # the measures, too, are of that time
    page.choose("sample", 1)
    assert page.brightest() == looked_at(1, 0.75, 3, 1, 1)
    page.choose("time", 0)
    assert page.brightest() == looked_at(1, 0.25, 3, 1, 1)
    assert page.texts("#table tbody td:last-child") == ["0.25"] * 4


def test_missing_frames_are_shown_as_such(page):
    assert not page.find("#past figure:nth-child(1) .missing").is_displayed()
    page.choose("sample", 1)
    assert page.find("#past figure:nth-child(1) .missing").is_displayed()
    assert not page.find("#past figure:nth-child(2) .missing").is_displayed()
    page.click('.thumbnail[data-layer="3"][data-head="1"]')
    opacity = page.heat()[..., 3]
    assert (opacity[0] == 0).all()
    assert opacity[1:].min() == opacity[1:].max() > 200
    assert page.texts("#past output") == ["0 %", "50 %", "50 %"]


def test_predicted_and_true_frame(page):
    def shade() -> int:
        [image] = page.pixels("#target-image")
        return image[5, 5, 0]

    assert (page.text("#target-name"), shade()) == ("Predicted frame", 50)
    page.choose("truth", 1)
    assert (page.text("#target-name"), shade()) == ("True next frame", 200)
    page.choose("truth", 0)
    page.choose("sample", 1)  # without prediction
    assert (page.text("#target-name"), shade()) == ("True next frame", 200)
    assert not page.find("#pictures").is_displayed()


def test_mean_over_all_patches(page):
    page.choose("mean", 1)
    opacity = page.heat()[..., 3]
    assert opacity[2].min() == opacity[2].max() > opacity[0].max()  # equal attention to all places of the frame
    assert page.texts("#past output") == ["0 %", "0 %", "75 %"]
    assert page.text("#peak") == "3.1 %"  # 0.75 / 24
    assert not page.find("#patch").is_displayed()
    page.click_patch(1, 1)
    assert page.brightest() == looked_at(0, 0.25, 3, 1, 1)


def test_what_is_not_stored_is_spread_evenly_and_reported(page, addresses):
    page.open(addresses[2])
    page.click_patch(2, 2)
    assert page.brightest() == looked_at(0, 0.25, 3, 2, 2)
    assert "stored individually" not in page.text("#status")  # head 0 attends to two places
    page.click('.thumbnail[data-layer="3"][data-head="1"]')
    opacity = page.heat()[..., 3]
    assert opacity.min() == pytest.approx(opacity.max(), abs=1)  # even, though two of 72 are stored
    assert "97 % is on places too faint to be stored individually" in page.text("#status")  # 70 of 72
    assert "the largest 2 are stored" in page.text("#facts")
    page.choose("mean", 1)
    assert "stored individually" not in page.text("#status")  # the mean is stored in full


@pytest.mark.parametrize("top_k", [9, 479, 480])
def test_the_browser_reads_the_weights_within_the_stated_bounds(page, tmp_path, top_k):
    layout = Layout(4, 10, 12)
    generator = torch.Generator().manual_seed(0)
    scores = 3 * torch.randn(2, 2, 120, 481, generator=generator)
    scores[0, ..., 30:450] -= 20  # what is kept of the first layer's is more than a byte apart
    weights = dict(zip(LAYERS, scores.softmax(-1), strict=True))
    made = AttentionPage("Random attention", layout, fps=4.0, has_extra=True, top_k=top_k)
    made.add_sample(
        "", torch.zeros(4, 3, 10, 12).byte(), torch.ones(4, dtype=torch.bool), torch.zeros(3, 10, 12).byte()
    )
    for layer, weight in weights.items():
        made.add_weights(0, layer, 0.5, weight)
    made.save(tmp_path / "index.html")
    page.files.add((tmp_path / "index.html").as_uri())
    page.open((tmp_path / "index.html").as_uri())
    for layer, head, row, column, mean in (
        (1, 0, 0, 0, False),
        (3, 1, 9, 11, False),
        (3, 0, 4, 7, False),
        (1, 1, 0, 0, True),
    ):
        page.driver.execute_async_script(
            "window.page.update(arguments[0]).then(arguments[1])", {"row": row, "column": column, "mean": mean}
        )
        read = page.run(
            "const row = window.page.rowOf(arguments[0], arguments[1]); return {...row, map: [...row.map]}", layer, head
        )
        true = (weights[layer][head].mean(0) if mean else weights[layer][head, row * 12 + column]).double().numpy()
        on_frames, peak = true[:480], true[:480].max()
        kept = np.argsort(-on_frames)[: 480 if mean else top_k]
        bound = np.sqrt(on_frames * peak) / 255 + peak / 510**2 + np.sqrt(peak) / 65535 + 131070.0**-2 + 1e-7
        assert (np.abs(np.array(read["map"]) - on_frames) <= bound)[kept].all()
        assert read["extra"] == pytest.approx(true[480], abs=1 / 510 + 1e-6)
        assert read["masses"] == pytest.approx(on_frames.reshape(4, 120).sum(1).tolist(), abs=1 / 510 + 1e-6)
        assert read["kept"] == pytest.approx(on_frames[kept].sum(), rel=0.01)
        rest = np.ones(480, dtype=bool)
        rest[kept] = False
        for frame in range(4):
            left_out = rest & (np.arange(480) // 120 == frame)
            if left_out.any():
                shown = np.unique(np.array(read["map"])[left_out])
                assert len(shown) == 1
                assert shown[0] == pytest.approx(on_frames[left_out].mean(), abs=0.005 / 110)
                assert shown[0] <= np.array(read["map"])[kept].min()


def test_letters_go_through_what_can_be_chosen(page):
    page.press("body", "l")
    assert "Layer 1, head 0" in page.text("#status")
    page.press("body", "h", "t", "s", "m")
    state = page.run("return window.page.state")
    assert [state[name] for name in ("sample", "time", "layer", "head", "mean", "truth")] == [1, 1, 1, 1, True, False]
    page.press("body", "p", "m", "t")
    state = page.run("return window.page.state")
    assert [state[name] for name in ("sample", "time", "layer", "head", "mean", "truth")] == [1, 0, 1, 1, False, True]


def test_hovering_shows_the_weight(page):
    page.click_patch(0, 0)
    frame, row, column = looked_at(0, 0.25, 3, 0, 0)
    box = page.run(
        "return document.querySelectorAll('#past .frame')[arguments[0]].getBoundingClientRect().toJSON()", frame
    )
    x, y = box["x"] + box["width"] * (column + 0.5) / 6, box["y"] + box["height"] * (row + 0.5) / 4
    page.driver.execute_cdp_cmd("Input.dispatchMouseEvent", {"type": "mouseMoved", "x": x, "y": y})
    assert page.text("#readout") == "frame 0, row 0, column 1: 45 %"


def test_the_address_remembers_what_was_chosen(page):
    page.choose("sample", 1)
    page.choose("time", 1)
    page.click_patch(3, 2)
    page.click('.thumbnail[data-layer="1"][data-head="0"]')
    page.click("#table thead th:nth-child(3) button")
    address, state = page.driver.current_url, page.run("return window.page.state")
    page.open(address)
    assert page.run("return window.page.state") == state
    assert page.brightest() == looked_at(1, 0.75, 1, 3, 2)
    assert page.order() == ["L1 H1", "L3 H1", "L1 H0", "L3 H0"]
    page.run("location.hash = '#row=0&column=4'")  # as by a link, or by going back
    page.wait()
    assert page.brightest() == looked_at(0, 0.25, 3, 0, 4)
    page.open(address.partition("#")[0] + "#sample=9&layer=2&row=x&sort=nothing&column=5")
    state = page.run("return window.page.state")
    assert [state[name] for name in ("sample", "layer", "row", "sort", "column")] == [0, 3, 2, "head", 5]


def test_on_a_phone_a_tap_chooses_and_nothing_is_cut_off(page):
    screen = {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    page.driver.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": True})
    try:
        assert page.run("return document.documentElement.scrollWidth") <= 360
        x, y = page.middle_of_patch(3, 4)
        for kind, points in (("touchStart", [{"x": x, "y": y}]), ("touchEnd", [])):
            page.driver.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
        page.wait()
        assert page.brightest() == looked_at(0, 0.25, 3, 3, 4)
        x2, _ = page.middle_of_patch(3, 1)
        for kind, at in (
            ("touchStart", x),
            *(("touchMove", x + (x2 - x) * i / 8) for i in range(1, 9)),
            ("touchEnd", None),
        ):
            points = [] if at is None else [{"x": at, "y": y}]
            page.driver.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
        page.wait()
        assert page.brightest() == looked_at(0, 0.25, 3, 3, 1)
    finally:
        page.driver.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": False})
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_it_works_in_a_frame_without_an_address(page, addresses, tmp_path):
    """As tools embed it that show HTML within their own pages."""
    content = Path(addresses[72].removeprefix("file://")).read_text("utf-8")
    host = tmp_path / "host.html"
    host.write_text(
        f'<meta charset="utf-8"><iframe width=900 height=900 sandbox="allow-scripts" srcdoc="{escape(content)}">'
    )
    page.files.add(host.as_uri())
    page.driver.get(host.as_uri())
    page.driver.switch_to.frame(0)
    page.wait()
    page.press("#target", Keys.ARROW_RIGHT)
    assert page.brightest() == looked_at(0, 0.25, 3, 2, 4)
    page.driver.switch_to.default_content()
