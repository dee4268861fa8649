"""`python -m cdit.benchmark [PART]`: what each choice costs here.

Parts: attention, forward, training, checkpoints, probes, sampling, latents, all.

Prints Markdown tables of times and ratios. Only ratios travel between machines: the alternatives of a row are timed in
turn, round after round, and a ratio is the median over rounds, with its middle half in brackets. `all` leaves out
latents, which runs an autoencoder of full size: minutes on a CPU.
"""

import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cdit.attention import KeysValues, attention_weights, scaled_dot_product_attention
from cdit.cli import parse_config, run
from cdit.codec import AutoencoderCodec, PixelCodec, latent_size
from cdit.data.latents import Encoding, LatentCache
from cdit.data.layout import write_split, write_trajectory
from cdit.data.loader import collate
from cdit.data.windows import DataConfig, WindowDataset
from cdit.diffusion import TIMESTEPS, Flow, FlowConfig, SamplerConfig
from cdit.errors import UserError
from cdit.inspection.probe import AttentionConfig, inspect_attention
from cdit.model import CDiT, ContextCache, ModelConfig
from cdit.model.blocks import ContextBlock
from cdit.model.describe import flops
from cdit.pictures import to_float
from cdit.training.checkpoints import Checkpoints, RunState
from cdit.training.config import CheckpointConfig, EMAConfig, TrainConfig
from cdit.training.ema import EMA
from cdit.world_model import WorldDescription, WorldModel


@dataclass
class LatentsConfig:
    """The part latents: training in the published dialect, on the latents of an autoencoder like Stable Diffusion's."""

    image_size: tuple[int, int] = (224, 224)
    """Height and width of the frames given to the autoencoder."""
    recorded_size: tuple[int, int] = (480, 640)
    """Height and width of the frames on disk, JPEGs."""
    blocks: list[int] = field(default_factory=lambda: [128, 256, 512, 512])
    """Channels of the autoencoder's blocks; all but the first halve the size."""
    batch_size: int = 1
    """Contexts of a step."""
    model: ModelConfig = field(
        default_factory=lambda: ModelConfig("S", position="learned", context_modulation=True, extra_kv=True)
    )
    """The network."""


@dataclass
class BenchmarkConfig:
    """What is timed, by default small enough for two CPU cores and two minutes."""

    device: str | None = None
    """cpu, cuda, cuda:1, …; by default a GPU where there is one."""
    rounds: int = 5
    """Rounds in which all alternatives are timed, in turn."""
    min_seconds: float = 0.02
    """Shorter calls are repeated within a round to take at least this long."""
    image_size: tuple[int, int] = (64, 64)
    """Height and width of what is denoised."""
    channels: int = 3
    """Channels of what is denoised."""
    context_frames: int = 4
    """Past frames."""
    batch_size: int = 2
    """Contexts."""
    goals: int = 4
    """Goals of each context."""
    steps: int = 4
    """Denoising steps."""
    past_frames: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16])
    """Numbers of past frames for which the FLOPs of CDiT and of a plain DiT are compared."""
    probe_every: int = 1000
    """Training steps between the probes of attention whose share of training time is measured (probe.every)."""
    checkpoint_every: int = 20
    """Training steps between the checkpoints whose cost is measured (checkpoint.every)."""
    compile: bool = True
    """Whether to compile the network too, which takes a while."""
    model: ModelConfig = field(default_factory=lambda: ModelConfig(preset="tiny", patch_size=8))
    """The network."""
    latents: LatentsConfig = field(default_factory=LatentsConfig)
    """What the part latents trains, with context_frames and goals from above."""


@dataclass
class Table:
    """A Markdown table."""

    title: str
    header: list[str]
    rows: list[list[str]]

    def __str__(self) -> str:
        lines = [f"### {self.title}", ""]
        for row in (self.header, ["---", *["---:"] * (len(self.header) - 1)], *self.rows):
            lines.append(f"| {' | '.join(row)} |")
        return "\n".join([*lines, ""])


class Bench:
    """The network of a config, data for it, and the stopwatch."""

    def __init__(self, config: BenchmarkConfig):
        self.config = config
        self.device = torch.device(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.manual_seed(0)
        self.cdit = CDiT(config.image_size, config.channels, config.context_frames, **config.model.arguments())
        for p in self.cdit.parameters():  # closed gates would multiply zeros
            nn.init.normal_(p, std=0.02)
        self.cdit.to(self.device)
        shape = (config.channels, *config.image_size)
        batch = (config.batch_size, config.goals)
        self.sample = self.randn(*batch, *shape)
        self.timestep = torch.full(batch, 500.0, device=self.device)
        self.action, self.time_shift = self.randn(*batch, 3), self.randn(*batch)
        self.context = self.randn(config.batch_size, config.context_frames, *shape)

    def randn(self, *shape: int) -> Tensor:
        """Standard normal numbers on the device."""
        return torch.randn(*shape, device=self.device)

    def forward(self, cdit: nn.Module, context: Tensor | ContextCache) -> Tensor:
        """The network's output for all goals."""
        return cdit(self.sample, self.timestep, self.action, self.time_shift, context)

    def times(self, alternatives: dict[str, Callable[[], object]]) -> dict[str, np.ndarray]:
        """Seconds of one call of each alternative, (rounds,)."""
        repeats = {}
        for name, call in alternatives.items():
            self._seconds(call, 1)  # allocations, compilation
            repeats[name] = 1 + int(self.config.min_seconds / min(self._seconds(call, 1) for _ in range(2)))
        seconds: dict[str, list[float]] = {name: [] for name in alternatives}
        names = list(alternatives)
        for i in range(
            self.config.rounds
        ):  # another one first in each round: a call finds the caches of its predecessor
            for name in names[i % len(names) :] + names[: i % len(names)]:
                seconds[name].append(self._seconds(alternatives[name], repeats[name]))
        return {name: np.array(values) for name, values in seconds.items()}

    def compare(self, case: str, alternatives: dict[str, Callable[[], object]]) -> list[str]:
        """A row: the case, milliseconds of each alternative, and the ratios of the others to the first."""
        first, *others = self.times(alternatives).values()
        milliseconds = [f"{1000 * np.median(t):.3g}" for t in (first, *others)]
        return [case, *milliseconds, *(ratio(other / first) for other in others)]

    def rate_table(self, title: str, unit: str, entries: list[tuple[str, int, Callable[[], object]]]) -> Table:
        """Things a second of each entry (name, things per call, call), and how many times those of the first."""
        seconds = self.times({name: call for name, _, call in entries})
        per_second = {name: count / seconds[name] for name, count, _ in entries}
        first = per_second[entries[0][0]]
        rows = [[name, f"{np.median(rate):.4g}", ratio(rate / first)] for name, rate in per_second.items()]
        return Table(title, ["", unit, "relative"], rows)

    def _seconds(self, call: Callable[[], object], repeats: int) -> float:
        self._wait()
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        self._wait()
        return (time.perf_counter() - start) / repeats

    def _wait(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)


def ratio(values: np.ndarray) -> str:
    """Median and middle half."""
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75))
    return f"{middle:.2f} ({low:.2f}–{high:.2f})"


def header(case: str, *names: str) -> list[str]:
    """Of rows made by `Bench.compare`."""
    return [case, *(f"{name} [ms]" for name in names), *(f"{name} / {names[0]}" for name in names[1:])]


def attention(bench: Bench) -> Iterator[Table]:
    """Fused against explicit attention: torch's kernel, what `cdit.attention` picks, and two products and a softmax."""
    config, heads = bench.config, bench.cdit.config.num_heads
    patches, width = bench.cdit.grid[0] * bench.cdit.grid[1], bench.cdit.config.hidden_size // heads

    def fused(q: Tensor, kv: KeysValues) -> Tensor:
        return F.scaled_dot_product_attention(q, *kv)

    def explicit(q: Tensor, kv: KeysValues) -> Tensor:
        return ((q * width**-0.5) @ kv.k_BHMK.transpose(-1, -2)).softmax(-1) @ kv.v_BHMK

    def observed(q: Tensor, kv: KeysValues) -> Tensor:
        attention_weights(q, kv.k_BHMK)
        return scaled_dot_product_attention(q, kv)

    functions = {"fused": fused, "ours": scaled_dot_product_attention, "explicit": explicit, "ours, observed": observed}
    rows = []
    for kind, queries, keys, batch in (
        ("self", patches, patches, config.batch_size * config.goals),
        ("cross", patches * config.goals, patches * config.context_frames, config.batch_size),
    ):
        for dtype in (torch.float32, torch.bfloat16):
            q, k, v, grad = (
                bench.randn(batch, heads, n, width).to(dtype).requires_grad_() for n in (queries, keys, keys, queries)
            )

            def forward(function: Callable, q=q, k=k, v=v) -> None:
                with torch.no_grad():
                    function(q, KeysValues(k, v))

            def both(function: Callable, q=q, k=k, v=v, grad=grad) -> None:
                torch.autograd.grad(function(q, KeysValues(k, v)), (q, k, v), grad)

            for passes, call in (("forward", forward), ("forward + backward", both)):
                case = f"{kind} {queries}×{keys}, {str(dtype).removeprefix('torch.')}, {passes}"
                alternatives = {name: lambda call=call, f=f: call(f) for name, f in functions.items()}
                rows.append(bench.compare(case, alternatives))
    yield Table(f"Attention, {heads} heads of {width}", header("queries × keys", *functions), rows)


@torch.no_grad()
def forward(bench: Bench) -> Iterator[Table]:
    """What the cached context, shared goals, recording and compiling change; CDiT against a plain DiT."""
    config, cdit = bench.config, bench.cdit.eval()
    cache = cdit.encode_context(bench.context)

    def encoded_once() -> None:
        cache = cdit.encode_context(bench.context)
        for _ in range(config.steps):
            bench.forward(cdit, cache)

    def encoded_each_step() -> None:
        for _ in range(config.steps):
            bench.forward(cdit, bench.context)

    row = bench.compare(f"{config.steps} steps", {"once": encoded_once, "at each step": encoded_each_step})
    yield Table("Context encoded once or at each denoising step", header("", "once", "at each step"), [row])

    repeated = bench.context.repeat_interleave(config.goals, 0)
    flat = [x.flatten(0, 1) for x in (bench.sample, bench.timestep, bench.action, bench.time_shift)]
    row = bench.compare(
        f"{config.batch_size} contexts of {config.goals} goals",
        {"shared": lambda: bench.forward(cdit, bench.context), "repeated": lambda: cdit(*flat, repeated)},
    )
    yield Table("Goals that share a context, or each with a copy of it", header("", "shared", "repeated"), [row])

    def recorded() -> None:
        with observers(cdit):
            bench.forward(cdit, cache)

    row = bench.compare("cross-attention of all blocks", {"off": lambda: bench.forward(cdit, cache), "on": recorded})
    yield Table("Recording attention weights", header("", "off", "on"), [row])

    if config.compile:
        compiled = torch.compile(cdit)
        row = bench.compare(
            "forward, cached context",
            {"eager": lambda: bench.forward(cdit, cache), "compiled": lambda: bench.forward(compiled, cache)},
        )
        yield Table("torch.compile", header("", "eager", "compiled"), [row])

    yield against_dit(config)


def against_dit(config: BenchmarkConfig) -> Table:
    """FLOPs of one target: CDiT, and as many self-attention blocks of that width over past and target together."""
    rows = []
    for frames in config.past_frames:
        with torch.device("meta"):
            cdit = CDiT(config.image_size, config.channels, frames, **config.model.arguments())
            block = ContextBlock(cdit.config.hidden_size, cdit.config.num_heads, cdit.config.mlp_ratio)
            tokens = torch.zeros(1, (frames + 1) * cdit.grid[0] * cdit.grid[1], cdit.config.hidden_size)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            block(tokens)
        plain = counter.get_total_flops() * len(cdit.blocks)
        cost = flops(cdit, frames, 1)
        cached, whole = cost["forward with the cached context"], cost["forward, context included"]
        giga = [f"{n / 1e9:.3g}" for n in (whole, cached, plain)]
        rows.append([str(frames), *giga, f"{plain / whole:.2f}", f"{plain / cached:.2f}"])
    names = ["past frames", "CDiT [GFLOP]", "CDiT, cached [GFLOP]", "DiT [GFLOP]", "DiT / CDiT", "DiT / CDiT, cached"]
    return Table("CDiT against a plain DiT over past and target, one target, counted", names, rows)


def training(bench: Bench) -> Iterator[Table]:
    """Training steps: forward, backward and AdamW."""
    config = bench.config
    cdit = bench.cdit.train()
    count = config.batch_size * config.goals
    entries = [(name, count, training_step(bench, cdit, name != "float32")) for name in ("float32", "bfloat16")]
    if config.compile:
        entries.append(("bfloat16, compiled", count, training_step(bench, torch.compile(cdit), True)))
    title = f"Training, {config.batch_size} contexts of {config.goals} goals, {config.context_frames} past frames"
    yield bench.rate_table(title, "samples/s", entries)


def training_step(
    bench: Bench, network: nn.Module, bfloat16: bool, optimizer: torch.optim.Optimizer | None = None
) -> Callable[[], None]:
    """A step of the network, which may be compiled, with an optimizer of its own if none is given."""
    flow, generator = Flow(FlowConfig()), torch.Generator(bench.device).manual_seed(0)
    optimizer = optimizer or torch.optim.AdamW(network.parameters(), 1e-6, fused=True)

    def step() -> None:
        noise, when = torch.randn_like(bench.sample), flow.draw_time(bench.timestep.shape, generator)
        with autocast(bench.device, bfloat16):
            noisy = flow.add_noise(bench.sample, noise, when)
            out = network(noisy, when * TIMESTEPS, bench.action, bench.time_shift, bench.context)
        optimizer.zero_grad()
        flow.loss(out, bench.sample, noise, when).mean().backward()
        optimizer.step()

    return step


def checkpoints(bench: Bench) -> Iterator[Table]:
    """Training steps with a checkpoint among them: none, one that a thread writes, one that the steps wait for."""
    accelerator = Accelerator(cpu=bench.device.type == "cpu", mixed_precision="no")
    cdit, steps = bench.cdit.train(), bench.config.checkpoint_every
    optimizer = torch.optim.AdamW(cdit.parameters(), 1e-6, fused=True)
    step, ema = training_step(bench, cdit, True, optimizer), EMA(cdit, EMAConfig())
    with TemporaryDirectory() as folder, ExitStack() as stack:

        def with_checkpoint(background: bool) -> Callable[[], None]:
            config = TrainConfig(name=str(background), output=folder, checkpoint=CheckpointConfig(keep=1))
            config.checkpoint.background = background
            written = stack.enter_context(Checkpoints(accelerator, config, cdit, optimizer, ema))

            def call() -> None:
                written.save(RunState())
                for _ in range(steps):
                    step()
                written.wait()

            return call

        def without() -> None:
            for _ in range(steps):
                step()

        row = bench.compare(
            f"{steps} steps and a checkpoint",
            {"no checkpoint": without, "by a thread": with_checkpoint(True), "waited for": with_checkpoint(False)},
        )
        size = sum(path.stat().st_size for path in Path(folder).rglob("*.safetensors")) / 2
    yield Table(f"Checkpoints of {size / 1e6:.3g} MB", header("", "no checkpoint", "by a thread", "waited for"), [row])


def probes(bench: Bench) -> Iterator[Table]:
    """A probe of attention, all that it measures, draws and writes, against the training steps from one to the next."""
    config, attention = bench.config, AttentionConfig()
    world = WorldModel(bench.cdit, PixelCodec(), WorldDescription(tuple(config.image_size), fps=4.0))
    world.description.sampler.steps = config.steps
    samples, goals = attention.samples, config.goals
    batch = {
        "context": torch.randint(256, (samples, config.context_frames, 3, *config.image_size), dtype=torch.uint8),
        "context_mask": torch.ones(samples, config.context_frames, dtype=torch.bool),
        "target": torch.randint(256, (samples, goals, 3, *config.image_size), dtype=torch.uint8),
        "action": torch.randn(samples, goals, 3),
        "action_mask": torch.ones(samples, goals, dtype=torch.bool),
        "time_shift": torch.rand(samples, goals),
        "spacing": torch.ones(samples),
    }
    grid = world.cdit.grid
    shape = (samples, goals, grid[0] * grid[1], config.context_frames, 2)
    places = torch.rand(shape) * torch.tensor(grid)  # as a dataset gives them that knows them

    with TemporaryDirectory() as folder:

        def probe() -> None:
            report = inspect_attention(world, batch, attention, 0, list(map(str, range(samples))), places)
            report.save(folder)
            report.to_wandb(folder)

        seconds = bench.times({"step": training_step(bench, bench.cdit.train(), False), "probe": probe})
    share = 100 * seconds["probe"] / (config.probe_every * seconds["step"])
    contexts = f"{config.batch_size} contexts of {goals} goals"
    names = [f"step of {contexts} [ms]", f"probe of {samples} contexts [ms]", "probe / training time [%]"]
    row = [f"{1000 * np.median(value):.3g}" for value in seconds.values()]
    title = f"Probes of attention, one every {config.probe_every} steps"
    yield Table(title, ["", *names], [["float32", *row, ratio(share)]])


def sampling(bench: Bench) -> Iterator[Table]:
    """Sampling through `WorldModel.predict`, with and without guidance, and one candidate against many."""
    config = bench.config
    description = WorldDescription(tuple(config.image_size), fps=4.0)
    world = WorldModel(bench.cdit, PixelCodec(), description).eval()

    def predict(sampler: SamplerConfig, bfloat16: bool = False, goals: int = config.goals) -> Callable[[], None]:
        def call() -> None:
            with autocast(bench.device, bfloat16):
                world.predict(bench.context, bench.action[:, :goals], bench.time_shift[:, :goals], sampler=sampler)

        return call

    count = config.batch_size * config.goals
    euler = SamplerConfig("euler", config.steps)
    entries = [("euler", count, predict(euler)), ("euler, bfloat16", count, predict(euler, True))]
    entries += [(name, count, predict(SamplerConfig(name, config.steps))) for name in ("heun", "dpm", "unipc")]
    entries.append(("euler, guidance 2", count, predict(SamplerConfig("euler", config.steps, guidance=2.0))))
    entries.append(("euler, one goal a context", config.batch_size, predict(euler, goals=1)))
    title = f"Sampling in {config.steps} steps, {config.batch_size} contexts of {config.goals} goals"
    yield bench.rate_table(title, "frames/s", entries)


def latents(bench: Bench) -> Iterator[Table]:
    """Training steps from the images of a dataset, loading included, and from its latent cache."""
    config, device = bench.config.latents, bench.device
    past, goals = bench.config.context_frames, bench.config.goals
    torch.manual_seed(0)
    codec = AutoencoderCodec("kl", random_autoencoder(config.blocks)).to(device)
    shape = (codec.channels, *latent_size(codec, config.image_size))
    cdit = CDiT(shape[1:], shape[0], past, **config.model.arguments()).to(device).train()
    optimizer = torch.optim.AdamW(cdit.parameters(), 1e-6, fused=True)
    flow, generator = Flow(FlowConfig()), torch.Generator(device).manual_seed(0)

    with TemporaryDirectory() as folder:
        images, cached = recorded_windows(Path(folder), bench.config, codec)

        def load(dataset: WindowDataset) -> dict[str, Tensor]:
            return collate([dataset[window] for window in range(config.batch_size)])

        def step(dataset: WindowDataset) -> None:
            items = load(dataset)
            recorded = torch.cat((items["context"], items["target"]), dim=1).to(device)
            noise = bench.randn(config.batch_size, past + goals, *shape)
            seen = codec.draw(recorded, noise) if dataset is cached else codec.encode(to_float(recorded), noise)
            target, noise = seen[:, past:], torch.randn_like(seen[:, past:])
            when = flow.draw_time(target.shape[:2], generator)
            with autocast(device, device.type != "cpu"):
                out = cdit(
                    flow.add_noise(target, noise, when),
                    when * TIMESTEPS,
                    items["action"].to(device),
                    items["time_shift"].to(device),
                    seen[:, :past],
                )
            optimizer.zero_grad()
            flow.loss(out, target, noise, when).mean().backward()
            optimizer.step()

        rows = [
            bench.compare(
                case, {name: partial(call, dataset) for name, dataset in (("latents", cached), ("images", images))}
            )
            for case, call in (("loading alone", load), ("whole step", step))
        ]
    title = (
        f"Training from cached latents or from images: CDiT {config.model.preset}/{config.model.patch_size} on "
        f"{'×'.join(map(str, shape))}, frames of {'×'.join(map(str, config.image_size))}, contexts a step: "
        f"{config.batch_size}, past frames: {past}, goals: {goals}"
    )
    yield Table(title, header("", "latents", "images"), rows)


def random_autoencoder(blocks: list[int]) -> AutoencoderKL:
    """Of Stable Diffusion's architecture, with random weights."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(blocks),
        up_block_types=("UpDecoderBlock2D",) * len(blocks),
        block_out_channels=blocks,
        layers_per_block=2,
        latent_channels=4,
    )


def recorded_windows(
    folder: Path, config: BenchmarkConfig, codec: AutoencoderCodec
) -> tuple[WindowDataset, WindowDataset]:
    """Windows of a few random frames: from images that are decoded each time, and from their latents."""
    coarse = torch.rand(config.context_frames + 8, 3, 30, 40)
    frames = F.interpolate(coarse, config.latents.recorded_size, mode="bilinear").mul(255).byte()
    write_trajectory(folder, "walk", frames.permute(0, 2, 3, 1).numpy())
    write_split(folder, "train", ["walk"])
    data = DataConfig(
        str(folder),
        image_size=config.latents.image_size,
        crop="4:3",
        context_frames=config.context_frames,
        min_history=config.context_frames,
        goals=config.goals,
        min_offset=-4,
        max_offset=4,
        cache_gb=0,
    )
    images, cached = WindowDataset(data, "train"), WindowDataset(data, "train")
    encoding = Encoding(codec.kind, "random weights", codec.fingerprint(), data.image_size, data.crop)
    device = next(codec.parameters()).device
    moments = [codec.moments(to_float(images.frames.read(0, [time]).to(device))) for time in range(len(frames))]
    LatentCache.create(folder, encoding, "float16").write(images.trajectories[0], torch.cat(moments))
    cached.use_latents(encoding)
    return images, cached


@contextmanager
def observers(cdit: CDiT) -> Iterator[None]:
    """Computes the cross-attention weights of all blocks, as recording does."""
    for block in cdit.blocks:
        block.cross_attn.observer = lambda observation: observation.weights()
    try:
        yield
    finally:
        for block in cdit.blocks:
            block.cross_attn.observer = None


def autocast(device: torch.device, bfloat16: bool) -> torch.autocast | nullcontext:
    """bfloat16 autocast, or none."""
    return torch.autocast(device.type, torch.bfloat16) if bfloat16 else nullcontext()


def machine(device: torch.device) -> str:
    """The processor's name, its threads, and torch's version."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        info = Path("/proc/cpuinfo")
        lines = info.read_text().splitlines() if info.is_file() else []
        models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        name = models[0] if models else platform.processor() or platform.machine()
        name += f", {torch.get_num_threads()} threads"
    return f"{name}, torch {torch.__version__}"


PARTS = {part.__name__: part for part in (attention, forward, training, checkpoints, probes, sampling, latents)}


def benchmark(bench: Bench, part: str = "all") -> Iterator[Table]:
    """The tables of one part, or of all but latents."""
    for name, tables in PARTS.items():
        if name == part or (part == "all" and tables is not latents):
            yield from tables(bench)


def main() -> None:
    """The command line."""
    part, argv = "all", sys.argv[1:]
    if argv and not argv[0].startswith("-"):
        part, *argv = argv
    if part not in ("all", *PARTS):
        raise UserError(f"{part!r}: expected one of {', '.join(PARTS)} or all")
    config = parse_config(BenchmarkConfig, __doc__, argv)
    bench = Bench(config)
    size = "×".join(map(str, bench.sample.shape[2:]))
    network = f"; CDiT {config.model.preset}, patch {config.model.patch_size}, on {size}" if part != "latents" else ""
    print(f"{machine(bench.device)}{network}\n")
    for table in benchmark(bench, part):
        print(table, flush=True)


if __name__ == "__main__":
    run(main)
