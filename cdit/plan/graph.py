"""A graph of remembered frames, for goals that are out of sight.

Nodes are frames of recorded walks. Edges lead from a frame to the next of its walk, and to frames of other walks, or
of another part of the same one, that look alike, as do the frames around them. Dijkstra's algorithm finds routes; edge
weights are steps.
"""

import heapq
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from cdit.common.frames import to_float, to_uint8
from cdit.data.windows import WindowDataset
from cdit.plan.goal_network import GoalNetwork

SIMILAR = 32
"""Number of frames, the most similar at 8 × 8 pixels, that the network compares with each frame."""
CLOSE = 2.0
"""Distance within which two frames of different walks may be connected, see `Compared.apart`."""
AROUND = 2
"""Frames before and after each that are compared as well, because many places look alike in one frame."""
ALIKE = 1.0
"""Largest mean distance of these; SeqSLAM (Milford and Wyeth 2012) compares sequences for the same reason."""
WELD = 1.5
"""Factor on the steps of such an edge, because the network may be wrong."""
AHEAD = 8.0
"""The next target is the farthest frame of the route within this many steps."""
CHUNK = 256
"""Pairs compared at a time."""
LOST = 4.0
"""Beyond this distance from the route the agent is localised again, among all nodes."""
WORTH = 16.0
"""Steps that one unit of distance counts for at the start and the end of a route, so that, among places that look
alike, the route connects those close to each other."""


@dataclass
class Graph:
    """N frames of recorded walks and the edges between them."""

    frames: Tensor
    """(N, 3, H, W) uint8."""
    walks: Tensor
    """(N,) the walk of each frame."""
    edges: list[list[tuple[int, float]]]
    """For each node, its neighbours and the steps to them."""
    network: GoalNetwork

    @classmethod
    def build(cls, dataset: WindowDataset, network: GoalNetwork, count: int, every: int = 3) -> "Graph":
        """The graph of the first walks of a dataset.

        Args:
            dataset: of walks.
            network: compares frames.
            count: approximate number of frames.
            every: spacing of the frames along a walk.
        """
        frames, walks, edges = [], [], []
        for index, trajectory in enumerate(dataset.trajectories):
            times = list(range(0, len(trajectory), every))
            first = len(edges)
            frames.append(dataset.frames.read(index, times))
            walks += [index] * len(times)
            edges += [[(first + i + 1, float(every))] if i + 1 < len(times) else [] for i in range(len(times))]
            if len(edges) >= count:
                break
        graph = cls(torch.cat(frames), torch.tensor(walks), edges, network)
        graph._weld()
        return graph

    def _weld(self) -> None:
        small = F.adaptive_avg_pool2d(to_float(self.frames), (8, 8))
        for node in tqdm(range(len(small)), desc="graph", unit="frame"):
            similar = (small - small[node]).square().mean((1, 2, 3)).topk(min(SIMILAR, len(small)), largest=False)
            others = [
                i for i in similar.indices.tolist() if abs(i - node) > AROUND or self.walks[i] != self.walks[node]
            ]
            if not others:
                continue
            found = (values.tolist() for values in self._compare((node, other) for other in others))
            for other, steps, distance in zip(others, *found, strict=True):
                if distance < CLOSE and self._difference(node, other) < ALIKE:
                    self.edges[node].append((other, WELD * max(steps, 1.0)))

    def _difference(self, node: int, other: int) -> float:
        """Mean distance of the frames around a node to those around another, which may be a frame faster or slower."""
        pairs = []
        for shift in range(-AROUND, AROUND + 1):
            there = self._of_walk(other, (other + shift + late for late in (-1, 0, 1)))
            pairs += [[(here, t) for t in there] for here in self._of_walk(node, [node + shift]) if there]
        _, distances = self._compare(pair for group in pairs for pair in group)
        return torch.stack([far.min() for far in distances.split([len(group) for group in pairs])]).mean().item()

    def _of_walk(self, node: int, others: Iterable[int]) -> list[int]:
        return [i for i in others if 0 <= i < len(self.walks) and self.walks[i] == self.walks[node]]

    def _compare(self, pairs: Iterable[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        here, there = (self.frames[list(nodes)] for nodes in zip(*pairs, strict=True))
        return self.compare(here, there)

    @torch.no_grad()
    def compare(self, here: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
        """Steps and distances from frames to goals, (n, 3, H, W) uint8 each, or one of them without n."""
        device, (here, there) = self.network.head.weight.device, torch.broadcast_tensors(here, there)
        chunks = zip(here.split(CHUNK), there.split(CHUNK), strict=True)
        found = [self.network(to_float(a).to(device), to_float(b).to(device)) for a, b in chunks]
        return torch.cat([x.steps() for x in found]).cpu(), torch.cat([x.apart() for x in found]).cpu()

    def to_goal(self, goal: Tensor) -> "Route":
        """The routes from every node to a goal image (3, H, W)."""
        _, distances = self.compare(self.frames, to_uint8(goal))
        backwards: list[list[tuple[int, float]]] = [[] for _ in self.edges]
        for node, out in enumerate(self.edges):
            for other, weight in out:
                backwards[other].append((node, weight))
        distance = (WORTH * distances).tolist()  # a route may end anywhere
        following: list[int | None] = [None] * len(self.edges)
        queue = list(zip(distance, range(len(distance)), strict=True))
        heapq.heapify(queue)
        while queue:
            far, node = heapq.heappop(queue)
            if far > distance[node]:
                continue
            for before, weight in backwards[node]:
                if far + weight < distance[before]:
                    distance[before], following[before] = far + weight, node
                    heapq.heappush(queue, (far + weight, before))
        return Route(self, goal, distance, following)


@dataclass
class Route:
    """The routes to one goal."""

    graph: Graph
    goal: Tensor
    distance: list[float]
    """Steps from each node, and `WORTH` times the distance that remains at the end."""
    following: list[int | None]
    """The next node on the route."""
    node: int | None = None
    """Where the agent was last."""
    target: int | None = None
    """Where it was last sent."""

    def next(self, frame: Tensor) -> tuple[int | None, Tensor]:
        """The node to walk to, and its frame (3, H, W) in [-1, 1]; None and the goal image at the end of the route."""
        at = None
        if self.node is not None:
            at, far = self._closest(frame, self._way(self.node, 2 * AHEAD))
            at = at if far < LOST else None
        if at is None:
            _, far = self.graph.compare(to_uint8(frame), self.graph.frames)
            at = (WORTH * far + torch.tensor(self.distance)).argmin().item()
        return self._towards(at)

    def skip(self) -> tuple[int | None, Tensor]:
        """As `next`, from the last target, which counts as reached."""
        return self._towards(self.target)

    def _closest(self, frame: Tensor, nodes: list[int]) -> tuple[int, float]:
        _, distances = self.graph.compare(to_uint8(frame), self.graph.frames[nodes])
        return nodes[distances.argmin()], distances.min().item()

    def _way(self, node: int, steps: float) -> list[int]:
        """A node, then those that follow it within this many steps."""
        way = [node]
        while (after := self.following[way[-1]]) is not None and self.distance[node] - self.distance[after] < steps:
            way.append(after)
        return way

    def _towards(self, at: int) -> tuple[int | None, Tensor]:
        way = self._way(at, AHEAD)
        if len(way) == 1 and self.following[at] is not None:  # farther than AHEAD
            way.append(self.following[at])
        self.node, self.target = at, way[-1]
        if self.following[self.target] is None:
            return None, self.goal
        return self.target, to_float(self.graph.frames[self.target])
