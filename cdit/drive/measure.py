"""Measures the page in headless Chromium: from command to first picture, frames per second, from key to picture.

    python -m cdit.drive.measure
    python -m cdit.drive.measure --pictures docs/images

Starts the server and drives as fast as possible with simulated key presses. Needs chromium, chromedriver and selenium.
Prints a Markdown table. The server, the browser and its drawing share the machine.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cdit.common.cli import parse_config, run
from cdit.common.errors import UserError
from cdit.common.options import CheckpointOptions, check_options
from cdit.common.tables import markdown_table

FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-background-networking")
FASTEST = 60
"""The pace while frames are counted."""
WAIT = 300.0
"""Timeout in seconds for everything that is waited for."""


@dataclass(kw_only=True)
class MeasureConfig(CheckpointOptions):
    """What to measure."""

    checkpoint: str = "maze"
    """Folder of a training run or of a world model, or the name of a world that ships with the package (maze)."""
    data: str | None = None
    """See python -m cdit.drive."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """See python -m cdit.drive."""
    seconds: float = 10.0
    """Seconds for which frames are counted."""
    presses: int = 40
    """Number of key presses whose latency is measured."""
    pictures: str | None = None
    """Folder for pictures of the page, drive.png, drive-plan.png and drive-phone.png, instead of measuring."""


class Browser:
    """The page in headless Chromium."""

    def __init__(self, driver: Any):
        self.driver = driver

    def open(self, address: str) -> None:
        """Waits until the start frame is shown."""
        self.driver.get(address)
        self.until("window.drive?.last?.dreams.length")

    def run(self, script: str, *arguments: Any) -> Any:
        """Runs JavaScript."""
        return self.driver.execute_script(script, *arguments)

    def until(self, condition: str) -> None:
        """Waits for a condition in JavaScript.

        Raises:
            UserError: it did not become true in time.
        """
        end = time.monotonic() + WAIT
        while not self.run(f"return Boolean({condition})"):
            if time.monotonic() > end:
                raise UserError(f"the page was not {condition} after {WAIT:g} s")
            time.sleep(0.02)

    def key(self, kind: str, code: str) -> None:
        """Presses (keyDown) or releases (keyUp) a key."""
        self.driver.execute_cdp_cmd("Input.dispatchKeyEvent", {"type": kind, "code": code, "key": code})

    def click(self, selector: str) -> None:
        """Clicks the middle of an element."""
        element = self.driver.find_element("css selector", selector)
        self.run("arguments[0].scrollIntoView({block: 'center'})", element)
        element.click()

    def choose(self, selector: str, value: object) -> None:
        """Sets the value of a field, as a user would."""
        element = self.driver.find_element("css selector", selector)
        script = "Object.assign(arguments[0], {value: arguments[1]}).dispatchEvent(new Event(arguments[2]))"
        for event in ("input", "change"):
            self.run(script, element, value, event)

    def frames_per_second(self, seconds: float) -> float:
        """Frames drawn while a key is held, at the fastest pace."""
        self.run("drive.send('run', {on: true, flows: false, pace: arguments[0]})", FASTEST)
        self.run(
            "window.shown = []; drive.listeners.push((message) =>"
            " message.milliseconds && requestAnimationFrame(() => shown.push(performance.now())))"
        )
        self.key("keyDown", "KeyA")
        self.until("shown.length > 3")
        self.run("shown.length = 0")
        time.sleep(seconds)
        self.key("keyUp", "KeyA")
        count, first, last = self.run("drive.listeners.pop(); return [shown.length, shown[0], shown.at(-1)]")
        time.sleep(0.5)
        return 1000 * (count - 1) / (last - first) if count > 1 else 0.0

    def latencies(self, presses: int) -> list[float]:
        """Milliseconds from presses of a key, at rest, to the picture, sorted."""
        self.run("drive.latencies.length = 0")
        for i in range(presses):
            self.key("keyDown", "KeyA" if i % 2 else "KeyD")
            self.until(f"drive.latencies.length > {i}")
            self.key("keyUp", "KeyA" if i % 2 else "KeyD")
            time.sleep(0.15)
        return sorted(self.run("return drive.latencies"))


def main() -> None:
    """The command line."""
    config = parse_config(MeasureConfig, __doc__)
    check_options(config)
    began = time.perf_counter()
    with serving(config) as address, browsing() as browser:
        browser.open(address)
        first = time.perf_counter() - began
        if config.pictures is not None:
            draw(browser, Path(config.pictures))
            return
        print(f"{machine()}, {config.checkpoint}\n")
        print(markdown_table(("", "value"), measure(browser, config, first)))


def measure(browser: Browser, config: MeasureConfig, first: float) -> list[tuple[str, str]]:
    """The rows of the table."""
    latencies = browser.latencies(config.presses)
    rows = [
        ("from the command to the first picture, with the browser's start", f"{first:.1f} s"),
        ("key to picture, median", f"{latencies[len(latencies) // 2]:.0f} ms"),
        ("key to picture, 95th percentile", f"{latencies[int(0.95 * (len(latencies) - 1))]:.0f} ms"),
        ("frames per second", f"{browser.frames_per_second(config.seconds):.1f}"),
    ]
    browser.click("[data-name='dream 0'] .picture")
    browser.until("drive.last.arrays.attention")
    rows.append(("frames per second with one head's attention", f"{browser.frames_per_second(config.seconds):.1f}"))
    browser.click("[data-panel=inside] summary")
    browser.choose("#samples", "4")
    rows.append(
        ("frames per second with four samples of the next second", f"{browser.frames_per_second(config.seconds):.1f}")
    )
    browser.choose("#samples", "0")
    if not browser.run("return drive.hello.no_truth"):
        browser.click("[data-panel=truth] summary")
        browser.click("#with-truth")
        browser.until("drive.last.arrays.truth")
        rows.append(("frames per second beside the truth", f"{browser.frames_per_second(config.seconds):.1f}"))
    return rows


def draw(browser: Browser, folder: Path) -> None:
    """Pictures of the page: large, with the truth and attention; with a plan; and on a phone."""
    folder.mkdir(parents=True, exist_ok=True)
    if not browser.run("return drive.hello.no_truth"):
        browser.click("[data-panel=truth] summary")
        browser.click("#with-truth")
        browser.until("drive.last.arrays.truth")
    for code, until in (("KeyW", 5), ("KeyD", 7)):
        browser.key("keyDown", code)
        browser.until(f"drive.last.step >= {until}")
        browser.key("keyUp", code)
    browser.click("[data-name='dream 0'] .picture")
    browser.until("drive.last.arrays.attention")
    browser.click(".head button")
    browser.choose("#layer", 2)
    browser.until("drive.last.heads.length === 2")
    browser.click("[data-panel=start] summary")
    browser.run("scrollTo(0, 0); document.activeElement.blur()")
    time.sleep(0.5)
    browser.driver.save_screenshot(str(folder / "drive.png"))
    for panel in ("truth", "inside", "plan"):
        browser.click(f"[data-panel={panel}] summary")
    browser.click("[data-panel=plan] .thumbnails button:nth-child(1)")
    browser.until("!document.querySelector('#follow').disabled")
    browser.run("scrollTo(0, 0); document.activeElement.blur()")
    time.sleep(0.5)
    browser.driver.save_screenshot(str(folder / "drive-plan.png"))
    phone = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    browser.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    time.sleep(0.5)
    browser.driver.save_screenshot(str(folder / "drive-phone.png"))
    print(f"{folder}/drive.png, {folder}/drive-plan.png, {folder}/drive-phone.png")


@contextmanager
def serving(config: MeasureConfig) -> Iterator[str]:
    """The address of a server in a process of its own.

    Raises:
        UserError: it has not started.
    """
    command = [sys.executable, "-m", "cdit.drive", "--port", "0", "--checkpoint", config.checkpoint]
    command += ["--device", config.device, "--mixed_precision", config.mixed_precision]
    command += ["--data", config.data] if config.data else []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            found = re.search(r"http://\S+", server.stdout.readline())
            if found is None:
                raise UserError("the server has not started")
            yield found[0]
        finally:
            server.terminate()
            server.communicate()


@contextmanager
def browsing() -> Iterator[Browser]:
    """A browser.

    Raises:
        UserError: it is not installed.
    """
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    try:
        from selenium import webdriver
    except ImportError as error:
        raise UserError("measuring needs selenium: pip install 'cdit[dev]'") from error
    if not (chromium and driver):
        raise UserError("measuring needs chromium and chromedriver on the PATH")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, "--window-size=1440,1000"):
        options.add_argument(flag)
    browser = webdriver.Chrome(options, webdriver.ChromeService(driver))
    try:
        yield Browser(browser)
    finally:
        browser.quit()


def machine() -> str:
    """The processor's name and the number of cores that this process may use."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{models[0] if models else platform.processor()}, {cores} cores"


if __name__ == "__main__":
    run(main)
