"""Every reader of files from elsewhere, with valid files and a strategy for files like them."""

import contextlib
import io
import json
import pickle
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from mutations import json_file, mutated, yaml_file
from PIL import Image

from cdit.codec import PixelCodec
from cdit.common.cli import parse_config
from cdit.common.errors import UserError
from cdit.data import safe_pickle
from cdit.data.actions import read_actions
from cdit.data.config import DataConfig
from cdit.data.frames import crop_and_resize, decode
from cdit.data.latents import Encoding, LatentCache
from cdit.data.layout import DatasetInfo, split_file, write_split, write_trajectory
from cdit.data.shard_writer import convert
from cdit.data.sources import Source
from cdit.data.trajectory import read_split
from cdit.data.windows import WindowDataset
from cdit.diffusion import SamplerConfig
from cdit.evaluate.cases import read_index
from cdit.evaluate.results import Results
from cdit.model import CDiT
from cdit.nwm.checkpoint import load_checkpoint
from cdit.training.config import TrainConfig
from cdit.training.durable import manifest
from cdit.training.durable.checkpoints import Checkpoints, RunState, check_config
from cdit.world_model import WorldDescription, WorldModel


@dataclass
class Reader:
    """A reader and its inputs."""

    path: Path
    seeds: list[bytes]
    """Valid files."""
    read: Callable[[], Any]
    built: SearchStrategy[bytes] | None = None
    """Further files, nearly valid."""

    @property
    def inputs(self) -> SearchStrategy[bytes]:
        return mutated(self.seeds) if self.built is None else st.one_of(mutated(self.seeds), self.built)


@dataclass
class Part:
    """A part of a config."""

    size: tuple[int, int] = (8, 8)
    """Two numbers."""
    kind: Literal["a", "b"] = "a"
    """One of two."""


@dataclass
class Config:
    """A config with all the types of fields that configs of cdit have."""

    part: Part = field(default_factory=Part)
    """A group."""
    mix: list[Source] = field(default_factory=list)
    """Groups."""
    rate: float | None = 0.5
    """A number."""
    steps: int = 1
    """A count."""
    name: str = "x"
    """A text."""
    offsets: list[int] = field(default_factory=list)
    """Numbers."""
    source: dict[str, Any] = field(default_factory=dict)
    """Anything."""
    yes: bool = False
    """A truth."""


def make(name: str, folder: Path) -> Reader:
    """The reader of that name, with its files in an empty folder."""
    return READERS[name](folder)


def _image(folder: Path) -> Reader:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (10, 14, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds = [{}, {"progressive": True}, {"mode": "L"}, {"mode": "CMYK"}, {"subsampling": 0, "restart_marker_blocks": 1}]
    kinds += [{"mode": mode, "format": "png"} for mode in ("RGB", "RGBA", "L", "LA", "P", "1")]
    seeds = []
    for options in kinds:
        buffer = io.BytesIO()
        options = {"format": "jpeg", "mode": "RGB", **options}
        picture.convert(options.pop("mode")).save(buffer, exif=exif, **options)
        seeds.append(buffer.getvalue())
    path = folder / "0.jpg"
    return Reader(path, seeds, lambda: crop_and_resize(decode(path), (8, 8), "4:3"))


def _dataset(folder: Path) -> Path:
    frames = np.zeros((8, 6, 8, 3), np.uint8)
    for split, name in {"train": "a", "test": "b"}.items():
        write_trajectory(folder, name, frames, np.zeros((8, 2)), np.zeros(8))
        write_split(folder, split, [name])
    DatasetInfo("it", metric_waypoint_spacing=0.5).save(folder)
    return folder


def _read_all(dataset: Path) -> None:
    trajectories, problems = read_split(dataset, "train")
    assert trajectories or problems


def _pickle(folder: Path) -> Reader:
    values = {"position": np.zeros((4, 2)), "s": {1, "x"}, "t": (b"x", [np.float32(1)]), "n": 2**70}
    seeds = [pickle.dumps(values, protocol) for protocol in range(6)]
    path = folder / "it.pkl"
    return Reader(path, seeds, lambda: safe_pickle.load(path))


def _poses(folder: Path) -> Reader:
    dataset = _dataset(folder)
    seeds = [
        pickle.dumps({"position": np.ones((8, 2), kind), "yaw": np.ones(shape, kind)}, protocol)
        for kind, shape, protocol in (("f8", 8, 5), ("f4", (8, 1), 2), ("i1", 8, 0), ("f2", 8, 4))
    ]
    numbers = st.one_of(st.floats(), st.integers(-(2**63), 2**63 - 1), st.just(1e308))
    arrays = st.lists(numbers, max_size=16).flatmap(
        lambda row: st.sampled_from(["f8", "f2", "i8", "U3", "c8", "b1", "g"]).map(lambda kind: _array(row, kind))
    )
    built = st.dictionaries(st.sampled_from(["position", "yaw", "x"]), arrays).map(pickle.dumps)
    return Reader(dataset / "a" / "traj_data.pkl", seeds, lambda: _read_all(dataset), built)


def _array(row: list[float], kind: str) -> np.ndarray:
    with np.errstate(all="ignore"):
        array = np.array(row, object).astype(np.float64).astype(kind)
    return array.reshape(-1, 2) if len(row) % 2 == 0 else array


def _index(folder: Path) -> Reader:
    windows = WindowDataset(DataConfig(folder=str(_dataset(folder)), image_size=(6, 8)), "train")
    seeds = [pickle.dumps([("a", time, -2, 2) for time in (0, 1, np.int64(2))], protocol) for protocol in range(6)]
    anything = st.one_of(
        st.sampled_from(["a", "", "\x1b", "x" * 999, None, True, 1.5, b"a", (), 2**70, -(2**70), 10**5000]),
        st.integers(-3, 9),
    )
    near = st.tuples(
        st.just("a"), *3 * [st.integers(-3, 9) | st.sampled_from([2**70, -(10**5000), np.int8(1), np.uint64(2**63)])]
    )
    entries = st.lists(st.one_of(near, near, st.lists(anything, max_size=5).map(tuple), anything), max_size=4)
    path = folder / "index.pkl"
    return Reader(path, seeds, lambda: read_index(path, windows, 2), entries.map(pickle.dumps))


def _names(folder: Path) -> Reader:
    dataset = _dataset(folder)
    names = st.lists(st.sampled_from(["a", "b", "..", "/", ".", "\\", "\0", "\n", "é", "\u2028", "x" * 300, "~", " "]))
    built = names.map(lambda parts: "".join(parts).encode())
    return Reader(split_file(dataset, "train"), [b"a\n", b"a\nb\n", b"a\r\n"], lambda: _read_all(dataset), built)


def _description(folder: Path) -> Reader:
    dataset = _dataset(folder)
    value = json.loads((dataset / "dataset.json").read_text())
    value["camera"] = {"width": 64, "height": 48, "horizontal_fov": 1.5, "eye_height": 1.0, "pitch": 0.0}
    names = [*value, *value["camera"], "class_path", "init_args"]
    seeds = [json.dumps(value).encode()]
    return Reader(dataset / "dataset.json", seeds, lambda: DatasetInfo.load(dataset), json_file(value, names))


def _config(folder: Path) -> Reader:
    value = {
        "part": {"size": [4, 6], "kind": "b"}, "mix": [{"folder": "a", "fps": 4.0}], "rate": 0.25, "steps": 3,
        "name": "it", "offsets": [1, 2], "source": {"a": [1, {"b": None}]}, "yes": True,
    }  # fmt: skip
    path = folder / "it.yaml"

    def read() -> Config:
        with contextlib.redirect_stderr(io.StringIO()) as printed:
            try:
                return parse_config(Config, "A config.", ["--config", str(path)])
            except SystemExit as stop:  # which is how a command line ends
                if stop.code == 2 and "it.yaml" in printed.getvalue():
                    raise UserError(printed.getvalue()[-1000:]) from stop
                raise

    names = [*value, *value["part"], "folder", "fps", "class_path", "init_args"]
    return Reader(path, [yaml.safe_dump(value).encode(), json.dumps(value).encode()], read, yaml_file(value, names))


def _actions(folder: Path, suffix: str) -> Reader:
    path, rows = folder / f"it.{suffix}", np.ones((3, 3))
    npy = io.BytesIO()
    np.save(npy, rows)
    seeds = {
        "csv": [b"dx,dy,dyaw\n1,2,3\n", b"1,2,3\n4,5,6"],
        "json": [json.dumps(rows.tolist()).encode()],
        "npy": [npy.getvalue()],
    }[suffix]
    built = json_file(rows.tolist(), ["a"]) if suffix == "json" else None
    return Reader(path, seeds, lambda: read_actions(str(path)), built)


def _results(folder: Path) -> Reader:
    row = {
        "method": "model", "seconds": 1.0, "frames": 4, "metric": "psnr", "mean": 1.0, "values": [1.0, 2.0], "low": 0.0,
        "high": 2.0,
    }  # fmt: skip
    value = {"config": {}, "protocols": {"time": {"fps": 4.0, "cases": [["a", 1]], "rows": [row]}}}
    names = ["protocols", "fps", "cases", "rows", *row]
    return Reader(
        folder / "results.json", [json.dumps(value).encode()], lambda: Results.load(folder), json_file(value, names)
    )


def _world(folder: Path) -> Path:
    cdit = CDiT((4, 4), max_context=1, hidden_size=8, depth=1, num_heads=1)
    world = WorldModel(cdit, PixelCodec(), WorldDescription((4, 4), fps=4.0, sampler=SamplerConfig(steps=2)))
    world.save_pretrained(folder)
    return folder


def _world_file(folder: Path, name: str) -> Reader:
    path = _world(folder) / name
    seed = path.read_bytes()
    built = None
    if path.suffix == ".json":
        value = json.loads(seed)
        built = json_file(value, [*value, "class_path", "quantization_config"])
    return Reader(path, [seed], lambda: WorldModel.from_pretrained(folder), built)


def _latents(folder: Path, name: str) -> Reader:
    trajectory = read_split(_dataset(folder), "train")[0][0]
    cache = LatentCache.create(folder, Encoding("kl", "x", "f" * 64, (8, 8), "aspect"), "float32")
    cache.write(trajectory, torch.ones(8, 2, 1, 2, 2))
    path = cache.folder / name

    def read() -> Any:
        opened = LatentCache.open(folder)
        return opened.problem(trajectory), opened.problem(trajectory, checksum=True)

    seed = path.read_bytes()
    built = json_file(json.loads(seed), ["name"]) if name.endswith("json") else None
    return Reader(path, [seed], read, built)


def _shards(folder: Path, name: str) -> Reader:
    dataset, shards = _dataset(folder / "dataset"), folder / "shards"
    encoding = Encoding("kl", "x", "f" * 64, (8, 8), "aspect")
    cache = LatentCache.create(dataset, encoding, "float32")
    for split in ("train", "test"):
        for trajectory in read_split(dataset, split)[0]:
            cache.write(trajectory, torch.ones(8, 2, 1, 2, 2))
    convert(Source(str(dataset)), shards, None, "both", 1.0)
    path = shards / name

    def read() -> None:
        windows = WindowDataset(DataConfig(folder=str(shards), image_size=(6, 8), cache_gb=0), "train")
        windows[0], windows[len(windows) - 1]
        windows.use_latents(encoding)
        windows[0], windows[len(windows) - 1]

    seed = path.read_bytes()
    if path.suffix == ".json":
        value = json.loads(seed)
        record = value["splits"]["train"]
        names = [*value, *record, *record["shards"][0], "train-00000.tar", "../x.tar", "a/b.safetensors"]
        built = json_file(value, names)
    else:
        built = None
    return Reader(path, [seed], read, built)


def _nwm(folder: Path) -> Reader:
    path = folder / "it.pth.tar"
    tensors = {"pos_embed": torch.ones(2, 4, 6), "x_embedder.proj.weight": torch.ones(6, 1, 1, 1)}
    torch.save({"ema": tensors, "epoch": 1, "opt": {"state": {0: {"step": torch.ones(())}}}}, path)
    seed = path.read_bytes()

    def read() -> Any:
        return load_checkpoint(path, num_heads=1)

    return Reader(path, [seed], read)


def _checkpoint(folder: Path, name: str) -> Reader:
    """A training checkpoint: the manifest by itself, the others as if they had been given a manifest that fits."""
    run = TrainConfig(output=str(folder), name="run")
    network = torch.nn.Linear(2, 2)
    ema = types.SimpleNamespace(tensors=lambda: dict(network.named_parameters()), resume=lambda step: step + 1)
    accelerator = types.SimpleNamespace(
        process_index=0, num_processes=1, scaler=None, is_main_process=True, wait_for_everyone=lambda: None
    )
    with Checkpoints(accelerator, run, {"model": network}, torch.optim.AdamW(network.parameters()), ema) as checkpoints:
        checkpoints.save(RunState(step=7, schedule={"last_epoch": 7}, losses=[1.0]))
    checkpoint = folder / "run" / "checkpoints" / "step_00000007"
    path = checkpoint / name

    def read() -> Any:
        if name == "manifest.json":
            return manifest.problem(checkpoint)
        if name == "config.yaml":
            return check_config(run, checkpoint)
        return checkpoints.load(checkpoint)

    seed = path.read_bytes()
    if path.suffix == ".json":
        value = json.loads(seed)
        built = json_file(value, [*value, "files", "bytes", "sha256", "../state.json"])
    elif path.suffix == ".yaml":
        built = yaml_file(yaml.safe_load(seed), ["data", "steps", "model", "depth"])
    else:
        built = None
    return Reader(path, [seed], read, built)


READERS: dict[str, Callable[[Path], Reader]] = {
    "pickle": _pickle,
    "image": _image,
    "poses": _poses,
    "index of cases": _index,
    "names of trajectories": _names,
    "dataset.json": _description,
    "config": _config,
    "actions.csv": lambda folder: _actions(folder, "csv"),
    "actions.json": lambda folder: _actions(folder, "json"),
    "actions.npy": lambda folder: _actions(folder, "npy"),
    "results.json": _results,
    "world_model.json": lambda folder: _world_file(folder, "world_model.json"),
    "network's config.json": lambda folder: _world_file(folder, "cdit/config.json"),
    "network's safetensors": lambda folder: _world_file(folder, "cdit/diffusion_pytorch_model.safetensors"),
    "latents.json": lambda folder: _latents(folder, "latents.json"),
    "latents": lambda folder: _latents(folder, "a.safetensors"),
    "shards.json": lambda folder: _shards(folder, "shards.json"),
    "shards' table": lambda folder: _shards(folder, "train.safetensors"),
    "shard": lambda folder: _shards(folder, "train-00000.tar"),
    "checkpoint of NWM": _nwm,
    "manifest": lambda folder: _checkpoint(folder, "manifest.json"),
    "checkpoint's state": lambda folder: _checkpoint(folder, "state.json"),
    "checkpoint's random states": lambda folder: _checkpoint(folder, "process_00000.json"),
    "checkpoint's config": lambda folder: _checkpoint(folder, "config.yaml"),
    "checkpoint's safetensors": lambda folder: _checkpoint(folder, "model.safetensors"),
}
