"""The server: connections, their pace and their bounds.

One thread computes for all sessions, a step at a time. A session holds one frame to send, the newest: a client that
takes long to acknowledge frames misses some.
"""

import asyncio
import logging
import math
import os
import secrets
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from importlib import resources
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar
from urllib.parse import urlsplit

import numpy as np
import torch
from aiohttp import WSCloseCode, WSMsgType, web

from cdit.common.errors import UserError
from cdit.drive.config import LOCAL, DriveConfig
from cdit.drive.dream import with_heads
from cdit.drive.drive import Begin, Drive, Inside, Stage, View, shown, speeds
from cdit.drive.plan import Cancelled, Planned
from cdit.drive.wire import Malformed, Message, pack

T = TypeVar("T")

IN_FLIGHT = 2
"""Frames that may be sent before one is acknowledged."""
MAX_TEXT = 2**14
"""Largest message in bytes, except for pictures."""
MAX_WAITING = 32
"""Largest number of queued commands and answers; a client that sends more, or reads none, is not the page."""
STALLED = 5.0
"""Seconds without an acknowledgement after which driving pauses."""
PATIENCE = 10.0
"""Seconds within which a connection must have sent its first request."""
SHUTDOWN = 10.0
"""Seconds that sessions have to end when the server stops."""
MAX_SPEED, MAX_TURN, MAX_PACE = 20.0, 2 * math.pi, 60
MAX_STEPS = 64
"""Denoising steps that the page may choose, unless a world has more."""
MAX_HEADS, MAX_SAMPLES = 12, 16
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; object-src 'none'; base-uri 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}

log = logging.getLogger("cdit.drive")


class Server:
    """Serves the page, and sessions on it.

    Args:
        config: the options.
        stage: the worlds and their starts.
    """

    def __init__(self, config: DriveConfig, stage: Stage):
        self.config, self.stage = config, stage
        self.token = config.token or (None if config.host in LOCAL else secrets.token_urlsafe(16))
        self.sessions: set[Session] = set()
        self._compute = ThreadPoolExecutor(1, "compute")
        page = resources.files("cdit.drive") / "page"
        self._files = {file.name: file.read_bytes() for file in page.iterdir() if Path(file.name).suffix in TYPES}
        self._silent: set[asyncio.BaseProtocol] = set()
        """Connections younger than `PATIENCE` that have sent no request."""
        self.app = web.Application(client_max_size=MAX_TEXT, middlewares=[self._note])
        self.app.router.add_get("/", self._index)
        self.app.router.add_get("/page/{name}", self._file)
        self.app.router.add_get("/drive", self._connect)
        self.app.on_response_prepare.append(self._add_headers)
        self.app.on_shutdown.append(self._end_sessions)
        self.app.on_cleanup.append(self._end_threads)

    def address(self, port: int) -> str:
        """The page's address."""
        host = f"[{self.config.host}]" if ":" in self.config.host else self.config.host
        return f"http://{host}:{port}/" + (f"?token={self.token}" if self.token else "")

    def impatient(self, runner: web.AppRunner) -> Callable[[], asyncio.BaseProtocol]:
        """Makes the protocol of a connection, which is closed if it sends no complete request within `PATIENCE`."""
        loop = asyncio.get_running_loop()

        def expire(protocol: web.RequestHandler) -> None:
            if protocol in self._silent and protocol.transport is not None:
                protocol.transport.abort()
            self._silent.discard(protocol)

        def connect() -> asyncio.BaseProtocol:
            protocol = runner.server()
            self._silent.add(protocol)
            loop.call_later(PATIENCE, expire, protocol)
            return protocol

        return connect

    @web.middleware
    async def _note(self, request: web.Request, handler: Callable[..., Awaitable[web.StreamResponse]]) -> Any:
        self._silent.discard(request.protocol)
        return await handler(request)

    async def compute(self, function: Callable[..., T], *args: Any) -> T:
        """Runs a function in the thread that computes for all sessions."""

        def call() -> T:
            enabled = self.config.mixed_precision == "bf16"
            with torch.autocast(self.stage.worlds[0].device.type, torch.bfloat16, enabled=enabled):
                return function(*args)

        return await asyncio.get_running_loop().run_in_executor(self._compute, call)

    async def _add_headers(self, request: web.Request, response: web.StreamResponse) -> None:
        response.headers.update(HEADERS)

    async def _index(self, request: web.Request) -> web.Response:
        self._check(request)
        return self._response("index.html")

    async def _file(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        if name not in self._files:
            raise web.HTTPNotFound
        return self._response(name)

    def _response(self, name: str) -> web.Response:
        return web.Response(body=self._files[name], content_type=TYPES[Path(name).suffix], charset="utf-8")

    def _check(self, request: web.Request) -> None:
        """Rejects host names that are not this server's own (DNS rebinding), and requests without the token."""
        if self.config.host in LOCAL and _host(f"//{request.host}") not in LOCAL:
            raise web.HTTPForbidden(text=f"expected the host {self.config.host}")
        given = request.query.get("token", "")
        if self.token and not secrets.compare_digest(given.encode(), self.token.encode()):
            raise web.HTTPForbidden(text="expected the token that the server printed, as ?token=…")

    async def _connect(self, request: web.Request) -> web.StreamResponse:
        self._check(request)
        if urlsplit(request.headers.get("Origin", "")).netloc != request.host:
            raise web.HTTPForbidden(text="expected a page of this server")
        height, width = self.stage.description.image_size
        limit = max(MAX_TEXT, 3 * height * width)
        socket = web.WebSocketResponse(timeout=2.0, heartbeat=20.0, max_msg_size=limit, compress=False)
        if not socket.can_prepare(request):
            raise web.HTTPBadRequest(text="expected a websocket")
        await socket.prepare(request)
        if len(self.sessions) >= self.config.sessions:
            text = f"{len(self.sessions)} people are already driving, the most that this server accepts"
            await socket.send_bytes(pack("end", {"message": text}))
            await socket.close(code=WSCloseCode.TRY_AGAIN_LATER)
            return socket
        session = Session(self, socket)
        self.sessions.add(session)
        try:
            await session.run()
        finally:
            self.sessions.discard(session)
        return socket

    async def _end_sessions(self, app: web.Application) -> None:
        """Ends all sessions, and waits for their engines to end."""
        ending = [session.end("the server has stopped", WSCloseCode.GOING_AWAY) for session in self.sessions]
        await asyncio.gather(*ending, return_exceptions=True)
        until = perf_counter() + SHUTDOWN
        while self.sessions and perf_counter() < until:
            await asyncio.sleep(0.02)

    async def _end_threads(self, app: web.Application) -> None:
        self._compute.shutdown(cancel_futures=True)


class Session:
    """One page: reads the user's input, steps the drive at the chosen pace, and sends the newest frame.

    Args:
        server: whose.
        socket: the connection.
    """

    def __init__(self, server: Server, socket: web.WebSocketResponse):
        self._server, self._socket, self._stage = server, socket, server.stage
        self._drive = Drive(server.stage)
        self._running, self._flows, self._pace, self._runs = True, False, 12.0, 0
        self._command, self._input = (0.0,) * len(server.stage.space.names), 0
        self._planned: Planned | None = None
        self._following: deque[tuple[float, ...]] = deque()
        """Commands of the plan that is being followed."""
        self._stale = threading.Event()
        """Set when the plan that is being made is no longer needed."""
        self._todo: deque[Callable[[], Awaitable[None]]] = deque()
        self._settings: dict[str, Callable[[], Any]] = {}
        """Settings that are waiting to be applied."""
        self._wake = asyncio.Event()
        self._answers: deque[bytes] = deque()
        self._newest: tuple[View, dict[str, Any]] | None = None
        self._ready = asyncio.Event()
        self._sent = self._acknowledged = 0
        self._picture: torch.Tensor | None = None
        stage = server.stage
        self._fastest = max(MAX_SPEED, 3 * stage.spacing * stage.description.fps)
        self._most_steps = max(MAX_STEPS, *(world.description.sampler.steps for world in stage.worlds))
        self._active = self._heard = perf_counter()

    async def run(self) -> None:
        """Runs until the connection ends."""
        self._answers.append(await self._server.compute(self._hello))
        self._ready.set()
        tasks = [asyncio.create_task(work) for work in (self._drives(), self._sends())]
        try:
            await self._reads()
        finally:
            self._stale.set()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.shield(self._server.compute(self._drive.close))

    async def end(self, reason: str, code: int) -> None:
        """Ends the session with a message to the user."""
        with suppress(ConnectionError, asyncio.TimeoutError):
            await asyncio.wait_for(self._socket.send_bytes(pack("end", {"message": reason})), 1.0)
        await self._socket.close(code=code, message=reason.encode()[:100])

    # ---- reading ----

    async def _reads(self) -> None:
        async for message in self._socket:
            try:
                if message.type == WSMsgType.TEXT:
                    self._read(message.data)
                elif message.type == WSMsgType.BINARY:
                    self._read_picture(message.data)
                if max(len(self._todo), len(self._answers)) > MAX_WAITING:
                    raise Malformed("too many commands at once")
            except Malformed as error:
                await self.end(f"not understood: {error}", WSCloseCode.POLICY_VIOLATION)
                return

    def _read_picture(self, data: bytes) -> None:
        height, width = self._stage.description.image_size
        if len(data) != height * width * 3:
            raise Malformed(f"expected a picture of {width}×{height} pixels, three bytes each")
        self._picture = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(height, width, 3).permute(2, 0, 1)

    def _read(self, text: str) -> None:
        message, now = Message(text), perf_counter()
        if message.type == "ack":
            self._acknowledged = max(self._acknowledged, message.integer("frame", 0, self._sent))
            self._heard = now
            self._ready.set()
            return
        self._active = self._heard = now
        read = getattr(self, f"_read_{message.type}", None)
        if read is None or message.type not in COMMANDS:
            raise Malformed("unknown type")
        read(message)
        self._wake.set()

    def _read_drive(self, message: Message) -> None:
        if self._stage.drives:
            self._command = (
                message.number("forward", -self._fastest, self._fastest),
                message.number("left", -self._fastest, self._fastest),
                message.number("turn", -MAX_TURN, MAX_TURN),
            )
        elif message.integer("begun", 0) == self._drive.begun:  # otherwise the sliders are those of an earlier drive
            self._command = message.numbers("numbers", self._stage.bounds)
        self._input = message.integer("id", 0, 2**53)
        if any(self._command):
            self._forget_plan()

    def _read_run(self, message: Message) -> None:
        self._running = message.flag("on")
        self._flows = message.flag("flows")
        self._pace = message.number("pace", 0.1, MAX_PACE)
        self._runs += 1

    def _read_step(self, message: Message) -> None:
        self._todo.append(self._step)

    def _read_back(self, message: Message) -> None:
        self._running = False
        self._forget_plan()
        self._do(self._drive.back)

    def _read_begin(self, message: Message) -> None:
        how = Begin(truth=message.flag("truth"), seed=message.integer("seed", 0, 2**31 - 1))
        source = message.choice("source", ("data", "picture", "map"))
        if source == "data":
            how.start = message.integer("start", 0, len(self._stage.starts) - 1)
        elif source == "map":
            how.map_name = message.choice("map", self._stage.maps)
        elif self._picture is None:
            raise Malformed("expected a picture first")
        else:
            how.picture = self._picture
        self._forget_plan()
        self._running = True
        self._do(self._begin, how)

    def _begin(self, how: Begin) -> None:
        self._drive.begin(how)
        self._rest()

    def _compare(self, world: int | None) -> None:
        self._drive.compare(world)
        self._rest()

    def _rest(self) -> None:
        if not self._stage.drives:
            self._command = self._drive.action  # the page moves its sliders there

    def _read_plan(self, message: Message) -> None:
        source = message.choice("source", ("data", "ahead", "picture"))
        cost = message.choice("cost", self._stage.costs) if message.has("cost") else None
        if source == "data":
            goal = partial(self._drive.goal, message.integer("start", 0, len(self._stage.starts) - 1))
        elif source == "ahead":
            goal = self._drive.ahead
        elif self._picture is None:
            raise Malformed("expected a picture first")
        else:
            goal = partial(torch.Tensor.clone, self._picture)
        self._forget_plan()
        self._todo.append(partial(self._plan, goal, cost, self._stale))

    def _read_follow(self, message: Message) -> None:
        self._todo.append(self._follow)

    def _read_from_here(self, message: Message) -> None:
        self._forget_plan()
        self._do(self._drive.from_here)

    def _read_inside(self, message: Message) -> None:
        cdit = self._stage.worlds[0].cdit
        heads = message.pairs("heads", (len(cdit.blocks), cdit.config.num_heads), MAX_HEADS)
        patch = message.pairs("patch", cdit.grid, 1)
        inside = Inside(patch[0] if patch else None, heads, message.integer("call", -1, 2 * self._most_steps))
        self._set("inside", setattr, self._drive, "inside", inside)

    def _read_off(self, message: Message) -> None:
        cdit = self._stage.worlds[0].cdit
        heads = message.pairs("heads", (len(cdit.blocks), cdit.config.num_heads), 10_000)
        self._set("off", setattr, self._drive.dreams[0], "off", with_heads(heads))

    def _read_doubt(self, message: Message) -> None:
        samples = message.integer("samples", 0, MAX_SAMPLES)
        if samples == 1:
            raise Malformed("samples: expected 0, or at least 2")
        self._set("doubt", setattr, self._drive, "doubt", samples)

    def _read_compare(self, message: Message) -> None:
        world = message.integer("world", 0, len(self._stage.worlds) - 1) if message.has("world") else None
        self._forget_plan()
        self._do(self._compare, world)

    def _read_sampler(self, message: Message) -> None:
        known = {name for world in self._stage.worlds for name in world.objective.schedulers}
        scheduler, steps = message.choice("scheduler", sorted(known)), message.integer("steps", 1, self._most_steps)
        dream = message.integer("dream", 0, 1)
        self._set(f"sampler {dream}", self._drive.sample_with, dream, scheduler, steps)

    def _read_save(self, message: Message) -> None:
        self._todo.append(partial(self._save, message.choice("what", ("video", "actions", "dataset"))))

    # ---- driving ----

    def _do(self, function: Callable[..., Any], *args: Any) -> None:
        """Runs a command on the drive, then shows the result."""
        self._todo.append(partial(self._done, partial(function, *args)))

    def _set(self, name: str, function: Callable[..., Any], *args: Any) -> None:
        """Like `_do`, for a setting: a setting that is still waiting is replaced."""
        if name not in self._settings:
            self._todo.append(lambda: self._done(self._settings.pop(name)))
        self._settings[name] = partial(function, *args)

    async def _done(self, function: Callable[[], Any]) -> None:
        await self._server.compute(function)
        await self._show()

    async def _drives(self) -> None:
        """Executes the user's commands, and steps at the chosen pace in between."""
        due = 0.0
        while True:
            now = perf_counter()
            if self._todo:
                await self._careful(self._todo.popleft()())
            elif self._running and self._moves and self._drive.beginning is not None:
                if now < due:
                    await _set_or_after(self._wake, due - now)
                    continue
                due = max(due + 1 / self._pace, now)
                await self._careful(self._step())
            else:
                self._wake.clear()
                await self._wake.wait()

    @property
    def _moves(self) -> bool:
        if self._stage.space.kind == "absolute":
            return self._flows or self._command != self._drive.action
        return self._flows or any(self._command) or bool(self._following)

    async def _careful(self, work: Coroutine[Any, Any, None]) -> None:
        """Reports what went wrong to the user; ends the session after an unexpected error."""
        try:
            await work
        except UserError as error:
            self._running = False
            self._answer("notice", {"message": str(error)})
            await self._show()
        except Exception:
            log.exception("a session has failed")
            await self.end("the server has failed; its log says why", WSCloseCode.INTERNAL_ERROR)
            raise

    async def _step(self) -> None:
        command, number, began = self._command, self._input, perf_counter()
        if self._following:
            command = self._following.popleft()
        else:
            self._planned = None  # it starts where the dream no longer is
        went = await self._server.compute(self._drive.step, *command)
        if not went:
            self._running = False
            self._following.clear()
            full = self._drive.steps >= self._drive.limit
            text = f"a drive has at most {self._drive.limit} frames here" if full else "the walk has ended here"
            self._answer("notice", {"message": f"{text}: step back, save it, or start again"})
        self._active = perf_counter()
        await self._show(number, 1000 * (self._active - began))
        if self._sent > self._acknowledged and self._active - self._heard > STALLED:
            self._running = False  # nobody watches

    async def _show(self, number: int | None = None, milliseconds: float | None = None) -> None:
        view = await self._server.compute(self._drive.view, self._command)
        status = {"running": self._running, "runs": self._runs, "input": number, "milliseconds": milliseconds}
        status |= {"following": len(self._following), "planned": self._planned is not None}
        self._newest = view, status
        self._ready.set()

    # ---- planning ----

    def _forget_plan(self) -> None:
        """Stops making and following a plan, because the drive or the goal changes."""
        self._stale.set()
        self._stale, self._planned = threading.Event(), None
        self._following.clear()

    async def _plan(self, goal: Callable[[], torch.Tensor], cost: str | None, stale: threading.Event) -> None:
        """Plans in a separate thread, whose computations run piece by piece in the shared one."""
        loop, began = asyncio.get_running_loop(), perf_counter()

        def run(function: Callable[..., T], *args: Any) -> T:
            if stale.is_set():
                raise Cancelled
            return asyncio.run_coroutine_threadsafe(self._server.compute(function, *args), loop).result()

        try:
            found = await asyncio.to_thread(self._drive.plan, await self._server.compute(goal), run, cost)
            if stale.is_set():
                raise Cancelled
        except Cancelled:
            self._answer("no_plan", {})
            return
        except UserError:
            self._answer("no_plan", {})
            raise
        self._planned, self._active = found, perf_counter()
        facts = {
            "step": self._drive.steps,
            "costs": found.costs.tolist(),
            "shown": found.shown,
            "steps": len(found.actions),
            "seconds": perf_counter() - began,
        }
        arrays = {"goal": shown(found.goal), "ends": shown(found.ends), "paths": found.paths.float().numpy()}
        self._answer("plan", facts, arrays)
        if self._flows:
            self._running = False  # the next step would be elsewhere
        await self._show()

    async def _follow(self) -> None:
        if self._following:
            return
        if self._planned is None:
            raise UserError("there is no plan to follow: plan from here first")
        fps = self._stage.description.fps
        self._following.extend(speeds(action, fps) for action in self._planned.actions.tolist())
        self._planned, self._running = None, True
        await self._show()

    async def _save(self, what: str) -> None:
        if what == "dataset":
            if self._server.config.record is None:
                raise UserError("start the server with --record FOLDER to record drives")
            where = await asyncio.to_thread(self._drive.record, Path(self._server.config.record))
            self._answer("notice", {"message": f"recorded as {where}"})
        elif what == "video":
            content = await asyncio.to_thread(self._drive.video)
            self._answer("file", {"name": "drive.mp4"}, {"content": np.frombuffer(content, np.uint8)})
        else:
            self._answer("actions", {"name": "drive.json", "actions": self._drive.actions()})

    # ---- sending ----

    def _answer(self, kind: str, facts: dict[str, Any], arrays: dict[str, np.ndarray] | None = None) -> None:
        self._answers.append(pack(kind, facts, arrays))
        self._ready.set()

    async def _sends(self) -> None:
        """Sends answers in order, and the newest frame whenever few frames are unacknowledged."""
        idle = 60 * self._server.config.idle_minutes
        while True:
            while self._answers:
                await self._socket.send_bytes(self._answers.popleft())
            if self._newest is not None and self._sent - self._acknowledged < IN_FLIGHT:
                (view, status), self._newest = self._newest, None
                self._sent += 1
                facts = {**view.facts, **status, "frame": self._sent}
                await self._socket.send_bytes(pack("frame", facts, view.arrays))
            else:
                await _set_or_after(self._ready, 1.0)
            if perf_counter() - self._active > idle:
                await self.end("the session has ended because nobody was driving", WSCloseCode.OK)
                return

    def _hello(self) -> bytes:
        stage = self._stage
        chosen, names, pictures = stage.thumbnails()
        worlds = [
            {
                "name": Path(name).name or name,
                "sampler": asdict(world.description.sampler),
                "schedulers": list(world.objective.schedulers),
                "layers": len(world.cdit.blocks),
                "heads": world.cdit.config.num_heads,
                "grid": world.cdit.grid,
            }
            for name, world in zip(stage.names, stage.worlds, strict=True)
        ]
        height, width = stage.description.image_size
        facts = {
            "worlds": worlds,
            "fps": stage.description.fps,
            "crop": stage.description.crop,
            "size": [height, width],
            "spacing": stage.spacing,
            "starts": [{"start": i, "name": name} for i, name in zip(chosen, names, strict=True)],
            "count": len(stage.starts),
            "numbers": None if stage.drives else _numbers(stage),
            "absolute": stage.space.kind == "absolute",
            "maps": stage.maps,
            "no_truth": stage.no_truth,
            "costs": stage.costs,
            "records": self._server.config.record is not None,
        }
        return pack("hello", facts, {"starts": shown(pictures)})


def _numbers(stage: Stage) -> list[dict[str, Any]]:
    """Name, unit and range of each number of an action."""
    each = zip(stage.space.names, stage.space.units, stage.bounds, strict=True)
    return [{"name": name, "unit": unit, "low": low, "high": high} for name, unit, (low, high) in each]


COMMANDS = {name.removeprefix("_read_") for name in vars(Session) if name.startswith("_read_")} - {"picture"}


async def _set_or_after(event: asyncio.Event, seconds: float) -> None:
    """Waits until the event is set, or some time has passed. (Python 3.11's `wait_for` may overlook a cancellation.)"""
    timer = asyncio.get_running_loop().call_later(seconds, event.set)
    try:
        await event.wait()
        event.clear()
    finally:
        timer.cancel()


def _host(address: str) -> str | None:
    try:
        return urlsplit(address).hostname
    except ValueError:
        return None


def threads_of(config: DriveConfig) -> int:
    """The threads of the network; see `DriveConfig.threads`."""
    most = torch.get_num_threads()
    return config.threads or (most if "OMP_NUM_THREADS" in os.environ else max(1, most - 1))


def serve(config: DriveConfig) -> None:
    """Loads the worlds and serves until Ctrl-C.

    Raises:
        UserError: a checkpoint or the dataset cannot be used, or the port is taken.
    """
    torch.set_num_threads(threads_of(config))
    server = Server(config, Stage(config))
    asyncio.run(_serve(server))


async def _serve(server: Server) -> None:
    """Serves until a signal."""
    import signal

    runner = web.AppRunner(server.app, access_log=None, shutdown_timeout=2.0)
    await runner.setup()
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    try:
        listening = await loop.create_server(server.impatient(runner), server.config.host, server.config.port)
    except OSError as error:
        await runner.cleanup()
        raise UserError(f"host, port: cannot listen on {server.config.host}:{server.config.port} ({error})") from error
    for name in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(name, stop.set)
    print(f"drive at {server.address(listening.sockets[0].getsockname()[1])}  (Ctrl-C ends it)", flush=True)
    await stop.wait()
    listening.close()
    await runner.cleanup()
    print("stopped")
