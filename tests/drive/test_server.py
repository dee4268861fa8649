"""The server from outside: who may connect, and that one client does not harm the others."""

import asyncio
import json
import os
import resource
import struct
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace

import aiohttp
import numpy as np
import pytest
import torch
from aiohttp import web

from cdit.data.motion import compose
from cdit.drive.config import DriveConfig
from cdit.drive.drive import Drive, Stage
from cdit.drive.plan import Cancelled, Planned
from cdit.drive.server import Server, threads_of

SIDE = 32


class Client:
    """A page without a browser."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse):
        self.socket, self.frames, self.acknowledges = socket, [], True

    async def send(self, kind: str, **fields: object) -> None:
        await self.socket.send_str(json.dumps({"type": kind, **fields}))

    async def receive(self, timeout: float = 60.0) -> dict:
        message = await self.socket.receive(timeout)
        if message.type is not aiohttp.WSMsgType.BINARY:
            return {"type": "closed", "code": self.socket.close_code}
        (length,) = struct.unpack("<I", message.data[:4])
        facts = json.loads(message.data[4 : 4 + length])
        if facts["type"] == "frame":
            self.frames.append(facts["step"])
            if self.acknowledges:
                await self.send("ack", frame=facts["frame"])
        return facts

    async def until(self, kind: str, holds: Callable[[dict], bool] = lambda facts: True) -> dict:
        while True:
            facts = await self.receive()
            if facts["type"] == kind and holds(facts):
                return facts
            assert facts["type"] not in ("closed", "end"), facts

    async def begin(self) -> None:
        await self.until("hello")
        await self.send("begin", source="data", start=0, truth=False, seed=0)
        await self.until("frame", lambda facts: facts["dreams"])

    async def drive(self, steps: int) -> None:
        """Forward, until so many steps have been shown."""
        await self.send("run", on=True, flows=False, pace=60)
        await self.send("drive", forward=1.0, left=0, turn=0, id=1)
        await self.until("frame", lambda facts: facts["step"] >= steps)
        await self.send("drive", forward=0, left=0, turn=0, id=2)


class Place:
    """A running server, and connections to it."""

    def __init__(self, server: Server, port: int, http: aiohttp.ClientSession):
        self.server, self.http, self.port = server, http, port
        self.address = f"http://127.0.0.1:{port}"

    async def connect(self, origin: str | None = None, **query: str) -> Client:
        socket = await self.http.ws_connect(f"{self.address}/drive", origin=origin or self.address, params=query)
        return Client(socket)


def serving(stage: Stage, test: Callable[[Place], Awaitable[None]], **options: object) -> None:
    async def work() -> None:
        config = replace(stage.config, **options)
        server = Server(config, stage)
        runner = web.AppRunner(server.app, shutdown_timeout=1.0)
        await runner.setup()
        connections = await asyncio.get_running_loop().create_server(server.impatient(runner), "127.0.0.1", 0)
        async with aiohttp.ClientSession() as http:
            port = connections.sockets[0].getsockname()[1]
            await asyncio.wait_for(test(Place(server, port, http)), 240)
        connections.close()
        await runner.cleanup()
        assert not server.sessions

    asyncio.run(work())


async def refused(connecting: Awaitable[Client]) -> bool:
    with suppress(aiohttp.WSServerHandshakeError):
        await connecting
        return False
    return True


def test_the_page_asks_nothing_of_others(stage):
    async def test(place: Place) -> None:
        async with place.http.get(place.address) as answer:
            text = await answer.text()
            assert answer.status == 200
            assert "default-src 'self'" in answer.headers["Content-Security-Policy"]
        assert "http" not in text
        async with place.http.get(f"{place.address}/page/main.js") as answer:
            assert answer.content_type == "text/javascript"
        for name in ("none.js", "../config.py", "%2e%2e%2fconfig.py"):
            async with place.http.get(f"{place.address}/page/{name}") as answer:
                assert answer.status == 404

    serving(stage, test)


def test_pages_of_others_are_refused(stage):
    async def test(place: Place) -> None:
        for origin in ("http://evil.example", f"http://127.0.0.1:{place.port + 1}", "null", "file://", "http://["):
            assert await refused(place.connect(origin)), origin
        headers = {"Host": f"evil.example:{place.port}", "Origin": f"http://evil.example:{place.port}"}
        async with place.http.get(place.address, headers=headers) as answer:
            assert answer.status == 403
        async with place.http.get(f"{place.address}/drive", headers={"Origin": place.address}) as answer:
            assert answer.status == 400  # no websocket
        client = await place.connect()
        assert (await client.receive())["type"] == "hello"

    serving(stage, test)


def test_another_host_needs_the_token(stage):
    async def test(place: Place) -> None:
        token = place.server.token
        assert len(token) >= 16
        assert token in place.server.address(1)
        assert await refused(place.connect())
        assert await refused(place.connect(token=token[:-1]))
        assert await refused(place.connect(token="ü"))
        async with place.http.get(place.address) as answer:
            assert answer.status == 403
        client = await place.connect(token=token)
        assert (await client.receive())["type"] == "hello"

    serving(stage, test, host="0.0.0.0")


def test_steps_are_shown_in_their_order(stage):
    async def test(place: Place) -> None:
        client = await place.connect()
        await client.begin()
        await client.drive(20)
        assert client.frames == sorted(client.frames)

    serving(stage, test)


def test_one_too_many_is_told_so_and_may_come_later(stage):
    async def test(place: Place) -> None:
        first, second = await place.connect(), await place.connect()
        await first.begin()
        third = await place.connect()
        assert (await third.receive())["type"] == "end"
        assert (await third.receive())["code"] == 1013
        await second.socket.close()
        while len(place.server.sessions) > 1:
            await asyncio.sleep(0.01)
        fourth = await place.connect()
        await fourth.begin()

    serving(stage, test, sessions=2)


BAD = [
    "",
    "{",
    "[" * 5000,
    '{"type": "nothing"}',
    '{"type": "picture"}',
    '{"type": "_read"}',
    '{"type": "drive", "forward": 1e9, "left": 0, "turn": 0, "id": 1}',
    '{"type": "drive", "forward": "1", "left": 0, "turn": 0, "id": 1}',
    '{"type": "begin", "source": "data", "start": 1000000, "truth": false, "seed": 0}',
    '{"type": "begin", "source": "picture", "truth": false, "seed": 0}',
    '{"type": "begin", "source": "map", "map": "../..", "truth": false, "seed": 0}',
    '{"type": "inside", "patch": [[9, 9]], "heads": [], "call": -1}',
    '{"type": "off", "heads": [[0, 99]]}',
    '{"type": "doubt", "samples": 100000}',
    '{"type": "compare", "world": 7}',
    '{"type": "plan", "source": "data", "start": 1000000}',
    '{"type": "plan", "source": "picture"}',
    '{"type": "plan", "source": "ahead", "cost": "lpips"}',
    '{"type": "plan", "source": "map"}',
    '{"type": "sampler", "dream": 0, "scheduler": "euler", "steps": 1000000}',
    '{"type": "run", "on": true, "flows": true, "pace": 0}',
    '{"type": "save", "what": "/etc/passwd"}',
    '{"type": "ack", "frame": 99}',
    "x" * 100_000,
    b"",
    b"x" * (3 * SIDE * SIDE - 1),
    b"x" * 300_000_000,
]


def test_what_the_page_does_not_send_ends_that_session_alone(stage):
    async def test(place: Place) -> None:
        good = await place.connect()
        await good.begin()
        for bad in BAD:
            client = await place.connect()
            with suppress(ConnectionError):
                await (client.socket.send_str if isinstance(bad, str) else client.socket.send_bytes)(bad)
            while (answer := await client.receive())["type"] != "closed":
                pass
            assert answer["code"] in (1008, 1009, 1006), (bad[:60], answer)
            assert await ended(place, 1)
        await good.drive(5)

    serving(stage, test)


def test_a_plan_is_made_and_followed(stage):
    async def test(place: Place) -> None:
        client = await place.connect()
        await client.begin()
        await client.send("follow")
        assert "no plan" in (await client.until("notice"))["message"]
        await client.send("plan", source="data", start=20)
        plan = await client.until("plan")
        assert plan["step"] == 0
        assert plan["costs"][0] == min(plan["costs"])
        await client.send("run", on=True, flows=False, pace=60)
        await client.send("follow")
        await client.until("frame", lambda facts: facts["step"] == plan["steps"] and not facts["following"])
        await client.send("save", what="actions")
        actions = np.array((await client.until("actions"))["actions"])
        ((x, y, yaw), *_) = plan_paths[0][:1, plan["steps"] - 1].tolist()
        assert compose(actions)[-1] == pytest.approx((x, y, yaw), abs=1e-4)
        # A plan is for where the dream is: after another step there is none.
        await client.send("plan", source="data", start=20)
        await client.until("plan")
        await client.drive(plan["steps"] + 1)
        await client.send("follow")
        assert "no plan" in (await client.until("notice"))["message"]

    plan_paths = []
    original = Drive.plan

    def kept(drive: Drive, *args: object) -> Planned:
        found = original(drive, *args)
        plan_paths.append(found.paths)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Drive, "plan", kept)
        serving(stage, test)


def test_weights_that_are_missing_are_named_and_pixels_need_none(checkpoint, walks, monkeypatch):
    monkeypatch.setenv("CDIT_LPIPS_BACKBONE", "nowhere.safetensors")
    stage = Stage(DriveConfig(checkpoint=str(checkpoint), data=str(walks)))

    async def test(place: Place) -> None:
        client = await place.connect()
        await client.begin()
        await client.send("plan", source="ahead")
        await client.until("no_plan")
        notice = (await client.until("notice"))["message"]
        assert "nowhere.safetensors" in notice
        assert "pixels" in notice
        await client.send("plan", source="ahead", cost="pixels")
        await client.until("plan")

    serving(stage, test)


def test_a_beginning_stops_the_plan_that_is_being_made(stage, monkeypatch):
    """Planning for ever, in pieces: others drive on, and it ends with the goal that is not wanted any more."""
    began, ends = threading.Event(), []

    def endless(drive: Drive, goal: object, run: Callable, cost: object) -> None:
        try:
            while True:
                run(began.set)
        except BaseException as error:
            ends.append(type(error))
            raise

    monkeypatch.setattr(Drive, "plan", endless)

    async def test(place: Place) -> None:
        client, other = await place.connect(), await place.connect()
        await client.begin()
        await other.begin()
        await client.send("plan", source="data", start=20)
        await asyncio.to_thread(began.wait, 30)
        await other.drive(10)
        assert not ends
        await client.send("begin", source="data", start=1, truth=False, seed=0)
        await client.until("no_plan")
        await client.until("frame", lambda facts: facts["dreams"] and ends)
        await client.send("plan", source="data", start=20)
        began.clear()
        await asyncio.to_thread(began.wait, 30)
        await client.socket.close()
        assert await ended(place, 1)
        while len(ends) < 2:
            await asyncio.sleep(0.01)

    serving(stage, test)
    assert ends == [Cancelled, Cancelled]


def test_a_connection_without_a_request_is_closed(stage, monkeypatch):
    monkeypatch.setattr("cdit.drive.server.PATIENCE", 0.5)

    async def test(place: Place) -> None:
        client = await place.connect()
        await client.begin()
        streams = [await asyncio.open_connection("127.0.0.1", place.port) for _ in range(2)]
        streams[0][1].write(b"GET / HTTP/1.1\r\nHost: 127.0")
        for reader, _ in streams:
            with suppress(ConnectionResetError):
                assert await asyncio.wait_for(reader.read(), 30) == b""
        await client.drive(3)

    serving(stage, test)


async def ended(place: Place, left: int) -> bool:
    for _ in range(1000):
        if len(place.server.sessions) <= left:
            return True
        await asyncio.sleep(0.01)
    return False


def test_a_flood_of_commands_ends_that_session(stage):
    async def test(place: Place) -> None:
        client = await place.connect()
        await client.begin()
        with suppress(ConnectionError):
            for _ in range(1000):
                await client.send("step")
        while (await client.receive())["type"] != "closed":
            pass

    serving(stage, test)


def test_a_client_that_does_not_keep_up_misses_frames_and_gets_the_newest(stage):
    async def test(place: Place) -> None:
        client = await place.connect()
        await client.begin()
        client.acknowledges = False
        await client.send("run", on=True, flows=False, pace=60)
        await client.send("drive", forward=1, left=0, turn=0, id=1)
        first = await client.until("frame", lambda facts: facts["step"] >= 1)
        await asyncio.sleep(2)
        await client.send("drive", forward=0, left=0, turn=0, id=2)
        await asyncio.sleep(0.5)
        client.acknowledges = True
        await client.send("ack", frame=first["frame"])
        seen = [(await client.receive())["step"] for _ in range(2)]
        assert seen[-1] - first["step"] > len(seen)

    serving(stage, test)


def test_driving_pauses_when_nobody_watches(stage, monkeypatch):
    monkeypatch.setattr("cdit.drive.server.STALLED", 0.5)

    async def test(place: Place) -> None:
        client = await place.connect()
        await client.begin()
        client.acknowledges = False
        await client.send("run", on=True, flows=True, pace=60)
        await asyncio.sleep(3)
        [session] = place.server.sessions
        steps = session._drive.steps
        await asyncio.sleep(1)
        assert session._drive.steps == steps > 0

    serving(stage, test)


def test_who_does_nothing_is_sent_away(stage):
    async def test(place: Place) -> None:
        client = await place.connect()
        await client.until("hello")
        assert (await client.receive())["type"] == "end"
        assert await ended(place, 0)

    serving(stage, test, idle_minutes=0.02)


def test_recording_needs_a_folder_of_the_server(stage, tmp_path):
    async def test(place: Place) -> None:
        client = await place.connect()
        await client.begin()
        await client.send("save", what="dataset")
        assert "--record" in (await client.until("notice"))["message"]
        await client.send("save", what="video")
        assert "no step" in (await client.until("notice"))["message"]
        await client.drive(2)

    serving(stage, test)


@pytest.mark.slow
def test_a_crowd_leaves_the_others_be(stage):
    """20 connections, half of which break off, do not read, or send nothing; and raw sockets that speak no HTTP."""

    async def test(place: Place) -> None:
        clients = [await place.connect() for _ in range(20)]
        good, bad = clients[::2], clients[1::2]
        for client in good:
            await client.begin()
        raw = [await asyncio.open_connection("127.0.0.1", place.port) for _ in range(20)]
        for i, (_, writer) in enumerate(raw):
            writer.write([b"GET /drive HT", b"\x00\xff" * 5000, b"", b"GET / HTTP/1.1\r\n"][i % 4])
        for i, client in enumerate(bad):
            await client.send("begin", source="data", start=0, truth=False, seed=0)
            await client.send("run", on=True, flows=True, pace=60)
            if i % 2:
                client.socket._response.connection.transport.abort()  # breaks off without a word
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        await asyncio.gather(*(client.drive(20) for client in good))
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000 * (
            1 if os.uname().sysname == "Linux" else 1024
        )
        for client in good:
            assert client.frames == sorted(client.frames)
        for _, writer in raw:
            writer.close()
        for client in clients:
            await client.socket.close()
        assert await ended(place, 0)

    serving(stage, test, sessions=20)


@pytest.mark.parametrize(
    ("cores", "asked", "variable", "threads"),
    [(8, None, None, 7), (1, None, None, 1), (8, 3, None, 3), (8, None, "8", 8), (8, 3, "8", 3)],
)
def test_a_core_is_left_to_the_browser(monkeypatch, cores, asked, variable, threads):
    monkeypatch.setattr(torch, "get_num_threads", lambda: cores)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    assert threads_of(DriveConfig(threads=asked)) == threads


@pytest.mark.parametrize(
    ("option", "value"),
    [("port", 70000), ("sessions", 0), ("session_mb", 0.0), ("token", "short"), ("token", "&" * 20)],
)
def test_options_out_of_range_are_named(option, value):
    from cdit.common.errors import UserError

    with pytest.raises(UserError, match=option):
        DriveConfig(**{option: value}).check()
