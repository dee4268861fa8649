"""A graph of remembered frames, for goals that are out of sight.

Nodes are frames of recorded walks. Edges lead from a frame to the next of its walk, and to frames of other walks that
the learned distance says are close. Dijkstra's algorithm finds the way; its weights are steps.
"""

import heapq
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from cdit.common.frames import to_float
from cdit.data.windows import WindowDataset
from cdit.plan.goal_network import GoalNetwork

SIMILAR = 32
"""Frames that may be close to a frame, by small pictures, and are compared by the network."""
CLOSE = 2.0
"""Distance within which two frames of different walks are connected, in multiples of what counts as reached."""
EQUAL = 1.0
"""Frames whose distances differ by less may be where the walker is."""
WELD = 1.5
"""How many times more steps such an edge costs: the network may be wrong."""
AHEAD = 8.0
"""Steps within which the farthest frame of the way is the next target."""


@dataclass
class Graph:
    """N remembered frames and the edges between them."""

    frames: Tensor
    """(N, 3, H, W) uint8."""
    edges: list[list[tuple[int, float]]]
    """Of each node: neighbours and steps to them."""
    network: GoalNetwork

    @classmethod
    def build(cls, dataset: WindowDataset, network: GoalNetwork, count: int, every: int = 3) -> "Graph":
        """The graph of the first walks of a dataset.

        Args:
            dataset: of walks.
            network: tells the steps between frames.
            count: about how many frames to remember.
            every: remember every so many frames of a walk.
        """
        frames, edges = [], []
        for index, trajectory in enumerate(dataset.trajectories):
            times = list(range(0, len(trajectory), every))
            first = len(edges)
            frames.append(dataset.frames.read(index, times))
            edges += [[(first + i + 1, float(every))] if i + 1 < len(times) else [] for i in range(len(times))]
            if len(edges) >= count:
                break
        graph = cls(torch.cat(frames), edges, network)
        graph._weld(every)
        return graph

    def _weld(self, every: int) -> None:
        for node in tqdm(range(len(self.frames)), desc="graph", unit="frame"):
            for other, steps, distance in zip(*self.similar(to_float(self.frames[node]), leaving=True), strict=True):
                if abs(other - node) > 2 and distance < CLOSE:
                    self.edges[node].append((other, WELD * max(steps, 1.0)))

    def nearest(self, frame: Tensor, leaving: bool) -> list[tuple[int, float]]:
        """The remembered frames closest to one, and the steps from it to them (leaving), or from them to it."""
        found = list(zip(*self.similar(frame, leaving), strict=True))
        least = min(distance for _, _, distance in found)
        return [(node, steps) for node, steps, distance in found if distance < least + EQUAL]

    def similar(self, frame: Tensor, leaving: bool) -> tuple[list[int], list[float], list[float]]:
        """The remembered frames that look like one, and steps and distances from it to them (leaving), or back."""
        if not hasattr(self, "_small"):
            self._small = _small(to_float(self.frames))
        far = (self._small - _small(frame[None])).square().mean((1, 2, 3))
        nodes = far.topk(min(SIMILAR, len(far)), largest=False).indices
        device = self.network.head.weight.device
        there = to_float(self.frames[nodes]).to(device)
        here = frame[None].to(device).expand_as(there)
        with torch.no_grad():
            found = self.network(here, there) if leaving else self.network(there, here)
        return nodes.tolist(), found.steps().tolist(), found.distance().tolist()

    def to_goal(self, goal: Tensor) -> "Route":
        """The ways from every node to a goal image (3, H, W)."""
        backwards: list[list[tuple[int, float]]] = [[] for _ in self.edges]
        for node, out in enumerate(self.edges):
            for other, weight in out:
                backwards[other].append((node, weight))
        distance = [float("inf")] * len(self.edges)
        following: list[int | None] = [None] * len(self.edges)
        queue = [(steps, node) for node, steps in self.nearest(goal, leaving=False)]
        for steps, node in queue:
            distance[node] = steps
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
    """The ways to one goal."""

    graph: Graph
    goal: Tensor
    distance: list[float]
    """Steps from each node."""
    following: list[int | None]
    """The next node on the way."""
    node: int | None = None
    """Where the walker last was."""
    target: int | None = None
    """Where it was last sent to."""

    def next(self, frame: Tensor) -> tuple[int | None, Tensor]:
        """The node to walk to, and its frame (3, H, W) in [-1, 1]; None and the goal image at the end of the way."""
        at, _ = min(self.graph.nearest(frame, leaving=True), key=lambda found: found[1] + self.distance[found[0]])
        if self.node is not None and self.distance[self.node] < self.distance[at]:
            at = self.node  # does not go back
        return self._ahead_of(at)

    def skip(self) -> tuple[int | None, Tensor]:
        """As `next`, from the node that was the target last, which counts as reached."""
        return self._ahead_of(self.target)

    def _ahead_of(self, at: int) -> tuple[int | None, Tensor]:
        self.node, gone = at, 0.0
        while self.following[at] is not None and gone < AHEAD:
            gone += self.distance[at] - self.distance[self.following[at]]
            at = self.following[at]
        self.target = at
        if self.following[at] is None:
            return None, self.goal
        return at, to_float(self.graph.frames[at])


def _small(frames: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(frames, (8, 8))
