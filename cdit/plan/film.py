"""Videos of episodes: the current frame, the goal, the frame that the plan predicts, and the map."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from cdit.common.motion import placed
from cdit.common.pictures import EMPTY, PAPER, save_mp4
from cdit.doom.engine import FPS
from cdit.plan.agents import Task
from cdit.plan.draw import OTHER, PLAN, TRUTH, beside, frame, from_above
from cdit.plan.free_space import FreeSpace, walls

if TYPE_CHECKING:
    from cdit.plan.act import Outcome, Trace

HEIGHT = 256


def film(trace: "Trace", task: Task, outcome: "Outcome", space: FreeSpace, path: Path) -> None:
    """Writes the video of an episode, one frame per step from the start on."""
    poses = np.array([seen.pose for seen in trace.past])
    lines, images = walls(space.geometry), []
    way = task.distances.path(poses[trace.moves[0][0], :2])
    goal = np.array(task.episode.goal)
    begin, move = trace.moves[0]
    for now in range(begin, len(poses)):
        move = next((m for i, m in reversed(trace.moves) if i <= now), move)
        made = max(i for i, _ in trace.moves if i <= now)
        paths = [
            (poses[begin:], PAPER, 0.0, None),  # so that the map does not move
            (way, TRUTH, 1.0, None),
            (poses[begin : now + 1], OTHER, 2.0, None),
        ]
        if move.path is not None:
            start = torch.from_numpy(poses[made]).float()
            paths.append((placed(move.path.float(), start).numpy(), PLAN, 2.0, None))
        above = from_above(paths, [(poses[now], OTHER), (goal, TRUTH)], lines, size=HEIGHT)
        dream = Image.new("RGB", (HEIGHT, HEIGHT), EMPTY) if move.dream is None else frame(move.dream, HEIGHT)
        shown = [frame(trace.past[now].frame, HEIGHT), frame(task.goal, HEIGHT), dream, above]
        left = task.distances.left(poses[now, :2])
        images.append(beside(shown, ["seen", "goal", "expected", f"{left:.1f} m to go"], HEIGHT))
    images += [images[-1]] * FPS
    save_mp4(images, path, FPS)
