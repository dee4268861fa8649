"""The page in headless Chromium, served by the command. What is seen is compared with the world model itself."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av
import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from cdit.batch import Condition
from cdit.common.frames import to_float, to_uint8
from cdit.common.randomness import generator
from cdit.data.actions import read_actions
from cdit.data.trajectory import read_split
from cdit.data.windows import WindowDataset
from cdit.heads.importance import Head, ablate_heads
from cdit.heads.record import record_attention
from cdit.loading import spread
from cdit.world_model import WorldModel

sys.path.append(str(Path(__file__).parents[1]))
from browser import launched, needs_a_browser
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from two_joints import arm_world

pytestmark = needs_a_browser

KEEP = """
window.kept = {steps: [], files: []};
drive.listeners.push((message) => {
  if (message.type === "frame" && message.arrays["dream 0"]) {
    const picture = [...message.arrays["dream 0"]].map((x) => String.fromCharCode(x)).join("");
    kept.steps.push([message.step, message.action, btoa(picture)]);
  } else if (message.type !== "frame") kept.files.push(message);
});
"""


@contextmanager
def served(*options: str) -> Iterator[tuple[str, subprocess.Popen]]:
    """The command's address and process; ended by Ctrl-C, which it must take well, with its engines in its group."""
    command = [sys.executable, "-m", "cdit.drive", "--port", "0", *options]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        yield re.search(r"http://\S+", process.stdout.readline())[0], process
    finally:
        children = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.SIGINT)
        out, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        assert out.strip() == "stopped"
        assert "Traceback" not in errors, errors
        assert not any(child.is_running() for child in children)


@pytest.fixture(scope="module")
def site(checkpoint: Path, walks: Path, tmp_path_factory) -> Iterator[tuple[str, subprocess.Popen]]:
    folder = tmp_path_factory.mktemp("recorded")
    options = ("--checkpoint", str(checkpoint), "--data", str(walks), "--planner.cost", "pixels")
    with served(*options, "--record", str(folder)) as started:
        started[1].recorded = folder
        yield started


@pytest.fixture(scope="module")
def chromium(tmp_path_factory) -> Iterator[webdriver.Chrome]:
    with launched() as driver:
        driver.downloads = tmp_path_factory.mktemp("downloads")
        where = {"behavior": "allow", "downloadPath": str(driver.downloads)}
        driver.execute_cdp_cmd("Browser.setDownloadBehavior", where)
        yield driver


class Page:
    """The page as a person uses it, and reads it."""

    def __init__(self, driver: webdriver.Chrome, address: str):
        self.driver, self.address = driver, address

    def open(self) -> None:
        self.driver.get("about:blank")
        self.driver.get(self.address)
        self.until("window.drive?.last?.dreams.length")
        self.run(KEEP)

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def until(self, condition: str, timeout: float = 300) -> None:
        end = time.monotonic() + timeout
        while not self.run(f"return Boolean({condition})"):
            assert time.monotonic() < end, (condition, self.text("#notice"))
            time.sleep(0.02)

    def find(self, selector: str) -> Any:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        return self.run("return document.querySelector(arguments[0]).textContent", selector)

    def click(self, selector: str) -> None:
        self.run("arguments[0].scrollIntoView({block: 'center'})", self.find(selector))
        self.find(selector).click()

    def set(self, selector: str, value: object) -> None:
        script = "Object.assign(arguments[0], {value: arguments[1]}).dispatchEvent(new Event(arguments[2]))"
        for event in ("input", "change"):
            self.run(script, self.find(selector), value, event)

    def key(self, kind: str, code: str) -> None:
        self.driver.execute_cdp_cmd("Input.dispatchKeyEvent", {"type": kind, "code": code, "key": code})

    def hold(self, code: str, until: str) -> None:
        self.key("keyDown", code)
        self.until(until)
        self.key("keyUp", code)
        self.rest()

    def rest(self) -> None:
        """Until the server has taken all that was sent, and shows nothing new."""
        count = len(self.files("actions"))
        self.click("#save-actions")
        self.until(f"kept.files.filter((f) => f.type === 'actions').length > {count}")
        self.until(f"drive.last.step === {len(self.actions())}")

    def files(self, kind: str) -> list[dict]:
        return [file for file in self.run("return kept.files.map(({arrays, ...rest}) => rest)") if file["type"] == kind]

    def actions(self) -> list[list[float]]:
        return self.files("actions")[-1]["actions"]

    def steps(self) -> list[tuple[int, list[float], np.ndarray]]:
        """What was shown since the last call."""
        import base64

        found = self.run("const {steps} = kept; kept.steps = []; return steps")
        return [(step, action, np.frombuffer(base64.b64decode(text), np.uint8)) for step, action, text in found]

    def middle_of_patch(self, row: int, column: int) -> tuple[float, float]:
        picture = self.find("[data-name='dream 0'] .picture")
        self.run("arguments[0].scrollIntoView({block: 'center'})", picture)
        box = self.run("return arguments[0].getBoundingClientRect().toJSON()", picture)
        return box["x"] + box["width"] * (column + 0.5) / 4, box["y"] + box["height"] * (row + 0.5) / 4

    def click_patch(self, row: int, column: int) -> None:
        x, y = self.middle_of_patch(row, column)
        for kind in ("mousePressed", "mouseReleased"):
            event = {"type": kind, "x": x, "y": y, "button": "left", "clickCount": 1}
            self.driver.execute_cdp_cmd("Input.dispatchMouseEvent", event)

    def pixels(self, selector: str) -> np.ndarray:
        """(height, width, 4) of a canvas, by way of a copy."""
        height, width, *pixels = self.run(
            """const {width, height} = arguments[0];
            const context = Object.assign(document.createElement("canvas"), {width, height}).getContext("2d");
            context.drawImage(arguments[0], 0, 0);
            return [height, width, ...context.getImageData(0, 0, width, height).data];""",
            self.find(selector),
        )
        return np.array(pixels).reshape(height, width, 4)


@pytest.fixture
def page(chromium, site) -> Iterator[Page]:
    for kind in ("browser", "performance"):
        chromium.get_log(kind)
    page = Page(chromium, site[0])
    page.open()
    yield page
    assert chromium.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in chromium.get_log("performance")]
    asked = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    asked += [event["params"]["url"] for event in events if event["method"] == "Network.webSocketCreated"]
    assert len(asked) > 5
    allowed = (site[0], site[0].replace("http", "ws"), "data:", "about:", f"blob:{site[0]}")
    assert [url for url in asked if not url.startswith(allowed)] == []


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> WorldModel:
    return WorldModel.from_pretrained(checkpoint)


@pytest.fixture
def context(dataset: WindowDataset) -> torch.Tensor:
    """Of the first start on the page."""
    return to_float(dataset.window(spread(dataset.windows_with([0]), 8)[0], []).context)[None]


def rolled_out(model: WorldModel, context: torch.Tensor, actions: list[list[float]]) -> np.ndarray:
    """(L, pixels), the frames as the page gets them."""
    condition = Condition(action=torch.tensor(actions)[None, None])
    frames = to_uint8(model.rollout(context, condition, generator=generator(0))[0, 0])
    return frames.permute(0, 2, 3, 1).flatten(1).numpy()


def test_two_hundred_frames_are_those_of_a_rollout_and_so_after_going_back(page, model, context):
    page.set("#pace", 30)
    page.hold("KeyW", "drive.last.step >= 120")
    page.hold("ArrowLeft", "drive.last.step >= 200")
    actions, shown = page.actions(), page.steps()
    assert len(actions) >= 200
    truth = rolled_out(model, context, actions)
    steps = [step for step, _, _ in shown]
    assert steps == sorted(steps)
    assert len(set(steps)) > 150
    for step, action, picture in shown:
        if step:
            assert np.array_equal(picture, truth[step - 1]), step
            assert np.float32(action) == pytest.approx(actions[step - 1])
    assert np.array_equal(page.pixels("[data-name='dream 0'] canvas")[..., :3].flatten(), truth[-1])

    for count in range(1, 8):
        page.key("keyDown", "Backspace")
        page.key("keyUp", "Backspace")
        page.until(f"drive.last.step === {len(actions) - count}")
    assert np.array_equal(page.pixels("[data-name='dream 0'] canvas")[..., :3].flatten(), truth[-8])
    assert page.text("#pause") == "Resume"
    page.key("keyDown", "Space")
    page.key("keyUp", "Space")
    page.steps()
    page.hold("KeyE", f"drive.last.step >= {len(actions) + 5}")
    again = page.actions()
    assert again[: len(actions) - 7] == actions[:-7]
    truth = rolled_out(model, context, again)
    for step, _, picture in page.steps():
        assert np.array_equal(picture, truth[step - 1]), step


def test_a_held_backspace_goes_back_and_the_session_goes_on(page):
    page.hold("KeyW", "drive.last.step >= 8")
    press = "dispatchEvent(new KeyboardEvent('keydown', {code: 'Backspace', repeat: arguments[0] > 0}))"
    page.run(f"for (let i = 0; i < 200; i++) ((...arguments) => {press})(i)")
    page.until("drive.last.step < 8")
    for _ in range(20):
        page.run(press, 1)
        time.sleep(0.05)
    page.rest()
    assert len(page.actions()) == 0
    assert page.text("#status") == "connected"


def test_a_seed_of_the_page_is_within_what_the_server_takes(page):
    page.set("[data-panel=start] input[type=number]", 3e9)
    page.hold("KeyW", "drive.last.step >= 2")
    assert page.text("#status") == "connected"


def test_a_reset_gives_the_same_drive_again(page):
    page.hold("KeyW", "drive.last.step >= 5")
    first = {step: picture for step, _, picture in page.steps()}
    page.key("keyDown", "KeyR")
    page.key("keyUp", "KeyR")
    page.until("drive.last.step === 0")
    page.steps()
    page.hold("KeyW", "drive.last.step >= 5")
    for step, _, picture in page.steps():
        if step in first:
            assert np.array_equal(picture, first[step])


def test_pause_holds_and_single_steps_go_on(page):
    page.hold("KeyW", "drive.last.step >= 3")
    page.click("#pause")
    page.rest()
    step = len(page.actions())
    page.key("keyDown", "KeyW")
    time.sleep(0.5)
    page.rest()
    assert len(page.actions()) == step
    page.click("#step")
    page.until(f"drive.last.step === {step + 1}")
    page.key("keyUp", "KeyW")
    assert page.run("return drive.last.action[0]") > 0


def test_a_click_shows_the_attention_of_cdit_heads(page, model, context):
    page.hold("KeyW", "drive.last.step >= 6")
    page.click_patch(1, 2)
    page.until("drive.last.arrays.attention")
    page.set("#head", 1)
    page.until("drive.last.heads[0].head === 1")

    def attention(actions: list[list[float]]) -> torch.Tensor:
        state, noise = model.begin(context), generator(0)
        with record_attention(model.cdit, [0]) as recorded:
            for action in torch.tensor(actions):
                state, _ = model.step(state, Condition(action=action[None, None]), generator=noise)
        return recorded[0][0, 0, 1, 1 * 4 + 2]

    def shown() -> np.ndarray:
        return np.array(page.run("return [...drive.last.arrays.attention]"), np.float32)

    expected = attention(page.actions())
    assert np.array_equal(shown(), expected.numpy())
    frame, row, column = np.unravel_index(int(expected.argmax()), (3, 4, 4))
    heat = page.pixels(f".head .frames figure:nth-child({frame + 1}) canvas.heat")
    assert heat[..., 3].argmax() == row * 4 + column

    page.hold("KeyD", "drive.last.step >= 12")  # live, while it runs
    assert np.array_equal(shown(), attention(page.actions()).numpy())
    page.key("keyDown", "Backspace")
    page.key("keyUp", "Backspace")
    page.until(f"drive.last.step === {len(page.actions()) - 1}")
    assert np.array_equal(shown(), attention(page.actions()[:-1]).numpy())


def test_heads_are_pinned_and_turned_off(page, model, context):
    page.hold("KeyW", "drive.last.step >= 3")
    page.click_patch(0, 0)
    page.until("drive.last.arrays.attention")
    page.click(".head button")
    page.set("#head", 1)
    page.until("drive.last.heads.length === 2")
    assert page.run("return drive.last.heads.map((head) => head.head)") == [1, 0]
    before = len(page.actions())
    page.click(".head[data-head='0,1'] button:last-child")
    page.until("drive.last.off.length")
    page.until("document.querySelector('.head.off')")
    page.steps()
    page.hold("KeyW", f"drive.last.step >= {before + 3}")
    actions = torch.tensor(page.actions())
    state, noise, frames = model.begin(context), generator(0), []
    for i, action in enumerate(actions):
        with ablate_heads(model.cdit, {Head(0, "cross", 1)} if i >= before else ()):
            state, sampled = model.step(state, Condition(action=action[None, None]), generator=noise)
        frames.append(to_uint8(model.decode(sampled)[0, 0]).permute(1, 2, 0).flatten().numpy())
    for step, _, picture in page.steps():
        assert np.array_equal(picture, frames[step - 1])


def test_a_drag_steers_and_a_phone_shows_everything(page):
    screen = {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    page.driver.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": True})
    try:
        for panel in page.driver.find_elements(By.CSS_SELECTOR, "details"):
            page.run("arguments[0].open = true", panel)
        assert page.run("return document.documentElement.scrollWidth") <= 360
        x, y = page.middle_of_patch(2, 1)

        def touch(kind: str, *points: tuple[float, float]) -> None:
            event = {"type": kind, "touchPoints": [{"x": x, "y": y} for x, y in points]}
            page.driver.execute_cdp_cmd("Input.dispatchTouchEvent", event)

        touch("touchStart", (x, y))
        for i in range(1, 9):
            touch("touchMove", (x, y - 10 * i))
        page.until("drive.last.step >= 3")
        touch("touchMove", (x + 80, y))
        page.until("drive.last.action[2] < 0")
        touch("touchEnd")
        page.rest()
        steps = len(page.actions())
        time.sleep(0.5)
        page.rest()
        assert len(page.actions()) == steps
        assert page.run("return drive.last.arrays.attention") is None  # a drag is no click
        touch("touchStart", (x, y))
        touch("touchEnd")
        page.until("drive.last.arrays.attention")
    finally:
        page.driver.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": False})
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_picture_of_a_hundred_megapixels_is_cropped_in_the_browser(page, site, tmp_path):
    picture = Image.new("RGB", (12_500, 8_000), (250, 0, 0))
    picture.paste((20, 120, 220), (2250, 0, 10_250, 8_000))
    picture.save(tmp_path / "large.png", compress_level=1)
    before = psutil.Process(site[1].pid).memory_info().rss
    page.steps()
    page.find("input[type=file]").send_keys(str(tmp_path / "large.png"))
    page.until("drive.last.step === 0 && drive.last.arrays['dream 0'][3 * (16 * 32 + 16)] === 20", timeout=600)
    shown = page.pixels("[data-name='dream 0'] canvas")[..., :3]
    assert (shown[1:-1, 1:-1] == (20, 120, 220)).all()  # the browser's filter reaches beyond the border
    assert psutil.Process(site[1].pid).memory_info().rss - before < 100e6
    page.hold("KeyW", "drive.last.step >= 2")

    (tmp_path / "none.png").write_bytes(b"not a picture")
    page.find("input[type=file]").send_keys(str(tmp_path / "none.png"))
    page.until("document.querySelector('#notice').textContent.includes('none.png')")


def test_drives_are_saved_and_recorded(page, site, chromium):
    page.hold("KeyW", "drive.last.step >= 4")
    steps = len(page.actions())
    page.click("#save-video")
    page.click("#record")
    page.until("document.querySelector('#notice').textContent.includes('recorded')")
    [trajectory], problems = read_split(site[1].recorded / "dream", "train")
    assert (problems, len(trajectory)) == ([], steps + 1)
    end = time.monotonic() + 30
    while not (chromium.downloads / "drive.mp4").exists():
        assert time.monotonic() < end
        time.sleep(0.1)
    with av.open(io.BytesIO((chromium.downloads / "drive.mp4").read_bytes())) as video:
        assert sum(1 for _ in video.decode(video=0)) == 3 + steps
    saved = read_actions(str(chromium.downloads / "drive.json"))
    assert np.array_equal(saved, np.float32(page.actions()))


def test_doubt_and_a_second_dream_are_shown(page):
    page.run("document.querySelectorAll('details').forEach((panel) => panel.open = true)")
    page.set("#second", "0")
    page.until("drive.last.arrays['dream 1']")
    page.set("#samples", "4")
    page.until("drive.last.arrays.spread")
    page.hold("KeyW", "drive.last.step >= 3")
    assert len(page.driver.find_elements(By.CSS_SELECTOR, ".screen:not([hidden])")) == 2
    assert np.array_equal(page.pixels("[data-name='dream 0'] canvas"), page.pixels("[data-name='dream 1'] canvas"))
    assert page.pixels(".overlay")[..., 3].max() > 0
    assert len(page.driver.find_elements(By.CSS_SELECTOR, "[data-panel=doubt] .thumbnails canvas")) == 4
    page.set("#second", "")
    page.until("!drive.last.arrays['dream 1']")
    assert len(page.driver.find_elements(By.CSS_SELECTOR, ".screen:not([hidden])")) == 1


def test_a_plan_is_shown_and_driven(page, model, context):
    page.hold("KeyW", "drive.last.step >= 2")
    before = page.actions()
    page.run("document.querySelectorAll('details').forEach((panel) => panel.open = true)")
    assert page.run("return document.querySelector('#follow').disabled")
    page.click("[data-panel=plan] .thumbnails button:nth-child(5)")
    page.until("!document.querySelector('#follow').disabled")
    assert len(page.driver.find_elements(By.CSS_SELECTOR, "[data-panel=plan] figure")) == 9
    assert page.pixels(".above")[..., 3].max() > 0
    goal, start = (
        page.pixels(f"[data-panel=plan] .thumbnails {of} canvas") for of in ("figure", "button:nth-child(5)")
    )
    assert np.array_equal(goal, start)
    page.click("#follow")
    page.until(f"drive.last.step > {len(before)} && drive.last.following === 0")
    page.rest()
    actions = page.actions()
    assert actions[: len(before)] == before
    assert f"the plan, {len(actions) - len(before)} steps" in page.text("[data-panel=plan]")
    assert page.run("return document.querySelector('#follow').disabled")
    assert np.array_equal(
        page.pixels("[data-name='dream 0'] canvas")[..., :3].flatten(), rolled_out(model, context, actions)[-1]
    )


def test_a_reset_begins_with_the_picture_of_the_start_not_of_a_goal(page, tmp_path):
    for name, colour in (("start", (20, 120, 220)), ("goal", (200, 30, 60))):
        Image.new("RGB", (64, 64), colour).save(tmp_path / f"{name}.png")
    page.find("[data-panel=start] input[type=file]").send_keys(str(tmp_path / "start.png"))
    page.until("drive.last.step === 0 && drive.last.arrays['dream 0'][0] === 20")
    page.run("document.querySelector('[data-panel=plan]').open = true")
    page.find("[data-panel=plan] input[type=file]").send_keys(str(tmp_path / "goal.png"))
    page.until("!document.querySelector('#follow').disabled")
    assert (page.pixels("[data-panel=plan] figure canvas")[..., :3] == (200, 30, 60)).all()
    page.hold("KeyW", "drive.last.step >= 2")
    page.click("#again")
    page.until("!document.querySelector('#follow').disabled")
    assert (page.pixels("[data-panel=plan] figure canvas")[..., :3] == (200, 30, 60)).all()
    page.click("#reset")
    page.until("drive.last.step === 0")
    assert (page.pixels("[data-name='dream 0'] canvas")[..., :3] == (20, 120, 220)).all()
    page.click("#goal-ahead")  # there is none after a picture
    page.until("document.querySelector('#notice').textContent.includes('nothing was recorded')")
    assert "Planning" not in page.text("[data-panel=plan]")


def test_the_keys_of_a_page_that_loses_the_focus_are_let_go(page):
    page.key("keyDown", "KeyW")
    page.until("drive.last.step >= 2")
    page.run("window.dispatchEvent(new Event('blur'))")
    page.rest()
    steps = len(page.actions())
    time.sleep(0.5)
    page.rest()
    assert len(page.actions()) == steps
    page.key("keyUp", "KeyW")


def test_a_server_that_ends_is_noticed(chromium, checkpoint, walks):
    with served("--checkpoint", str(checkpoint), "--data", str(walks)) as (address, _):
        page = Page(chromium, address)
        page.open()
        page.key("keyDown", "KeyW")
        page.until("drive.last.step >= 2")
    page.until("document.querySelector('#status').textContent === 'not connected'")
    assert "stopped" in page.text("#notice")
    page.key("keyUp", "KeyW")
    chromium.get_log("browser")


def test_the_shipped_world_beside_the_truth(chromium):
    pytest.importorskip("vizdoom", reason="the engine is part of the extra 'doom'")
    with served() as (address, _):
        page = Page(chromium, address)
        page.open()
        page.run("document.querySelector('[data-panel=truth]').open = true")
        page.click("#with-truth")
        page.until("drive.last.arrays.truth")
        page.hold("KeyW", "drive.last.step >= 6")
        assert page.run("return drive.last.dreams[0].psnr") > 5
        assert "dB" in page.text("[data-name='dream 0'] output")
        page.click("#from-here")
        page.until("drive.last.step === 0")
        assert np.array_equal(page.pixels("[data-name=truth] canvas"), page.pixels("[data-name='dream 0'] canvas"))
        page.hold("KeyW", "drive.last.step >= 2")
        assert chromium.get_log("browser") == []


@contextmanager
def numbers_page(kind: str, driver: webdriver.Chrome, folder: Path, patch: pytest.MonkeyPatch) -> Iterator[Page]:
    patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[1]), *sys.path]))
    arm_world(kind).save_pretrained(folder / "best")
    with served("--checkpoint", str(folder), "--data", "none", "--source", "two_joints:Arms") as (address, _):
        page = Page(driver, address)
        page.open()
        yield page


def test_sliders_drive_absolute_numbers(chromium, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A frame is made for each change, and none while the sliders rest."""
    with numbers_page("absolute", chromium, tmp_path, monkeypatch) as page:
        names = "[...document.querySelectorAll('#numbers input')].map((x) => x.dataset.number).join()"
        assert page.run(f"return {names}") == "lift,grip"
        assert not page.find("#speed").is_displayed()
        assert not page.run("return document.querySelector('[data-panel=plan], [data-panel=truth]')")
        resting = page.run("return drive.last.action")
        for i, x in enumerate(resting):
            assert page.run("return Number(drive.numbers[arguments[0]].slider.value)", i) == pytest.approx(x)
        page.set("#numbers [data-number=grip]", 0.5)
        page.until("drive.last.step === 1")
        assert page.run("return drive.last.action") == pytest.approx([resting[0], 0.5])
        time.sleep(0.5)
        assert page.run("return drive.last.step") == 1
        dream = page.find("[data-name='dream 0'] .picture")
        ActionChains(page.driver).click_and_hold(dream).move_by_offset(30, 0).perform()
        assert not page.run("return document.querySelector('.stick')")  # no joystick for numbers
        ActionChains(page.driver).release().perform()
        page.click("#reset")
        page.until("drive.last.step === 0")
        page.until(f"Math.abs(drive.numbers[1].slider.value - {resting[1]}) < 1e-6")
        time.sleep(0.5)
        assert page.run("return drive.last.step") == 0


def test_sliders_drive_numbers_that_are_added(chromium, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Frames are made until the sliders are back near zero, or the drive begins again."""
    with numbers_page("sum", chromium, tmp_path, monkeypatch) as page:
        page.set("#numbers [data-number=grip]", 0.05)
        page.until("drive.last.step >= 2")
        assert page.run("return drive.last.action") == pytest.approx([0, 0.05])
        page.set("#numbers [data-number=grip]", 0.003)  # within a fiftieth of the range
        time.sleep(1)
        steps = page.run("return drive.last.step")
        time.sleep(0.5)
        assert page.run("return drive.last.step") == steps
        page.set("#numbers [data-number=lift]", 0.05)
        page.until(f"drive.last.step > {steps}")
        page.run("drive.send('compare', {world: 0})")  # begins again
        page.until("drive.last.step === 0 && drive.last.dreams.length === 2")
        time.sleep(0.5)
        assert page.run("return [drive.last.step, Number(drive.numbers[0].slider.value)]") == [0, 0]
