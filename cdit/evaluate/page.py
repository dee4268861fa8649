"""The pages of an evaluation: tables as Markdown, and a web page of tables and pictures."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from torch import Tensor

from cdit.common.pictures import comparison_grid, rollout_video, save_mp4, strip
from cdit.evaluate.protocols import Protocol, Rollout
from cdit.evaluate.results import FRECHET, ProtocolResult, Results
from cdit.evaluate.tables import html, markdown

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2328; max-width: 72rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .8rem; border-bottom: 1px solid #d0d7de; text-align: right; font-weight: normal }
th:first-child { text-align: left }
tr:first-child th { font-weight: 600 }
img, video { max-width: 100%; display: block; margin: .5rem 0 }
video { width: 34rem }
.note { color: #59636e }
"""


def draw(protocol: Protocol, found: Mapping[str, Tensor], folder: Path) -> dict[str, Path]:
    """Draws the shown cases of a protocol, from the `shown/…` of `Study.compute`.

    Returns:
        Files by caption: a grid with truth and prediction at each horizon, and what `draw_rollouts` draws.
    """
    if "shown/model" not in found:
        return {}
    folder.mkdir(parents=True, exist_ok=True)
    files = {"last frame seen, truth and prediction at each horizon": folder / f"{protocol.name}.png"}
    horizons = [f"{seconds:+g} s" for seconds in protocol.shown]
    truth, prediction = (found[f"shown/{name}"][:, protocol.indices(protocol.shown)] for name in ("truth", "model"))
    comparison_grid(found["shown/context"], truth, prediction, horizons).save(*files.values())
    return files | (draw_rollouts(protocol, found, folder) if isinstance(protocol, Rollout) else {})


def draw_rollouts(protocol: Rollout, found: Mapping[str, Tensor], folder: Path) -> dict[str, Path]:
    """Draws a strip `<name>_<i>.png` and a video `<name>_<i>.mp4` of each shown rollout; see `draw`."""
    context, mask, fps, files = found["shown/context"], found["shown/context_mask"], protocol.fps / protocol.stride, {}
    if protocol.stride > 1:  # earlier frames are not as far apart as the predicted ones
        context, mask = context[:, -1:], mask[:, -1:]
    for i, (seen, true, predicted) in enumerate(zip(context, found["shown/truth"], found["shown/model"], strict=True)):
        picture, video = (folder / f"{protocol.name}_{i}.{suffix}" for suffix in ("png", "mp4"))
        strip(seen, true, predicted, fps, context_mask=mask[i]).save(picture)
        save_mp4(rollout_video(seen[mask[i]], true, predicted, fps), video, fps)
        files |= {f"rollout {i}": picture, f"rollout {i}, truth beside prediction": video}
    return files


def write_markdown(results: Results, path: Path) -> str:
    """Writes the tables of all protocols, and returns the text."""
    parts = [_about(results.about)]
    for result in results.protocols.values():
        parts += [f"## {result.name}", describe_samples(result), markdown(result.shown_rows).rstrip()]
    text = "\n\n".join(parts) + "\n"
    path.write_text(text)
    return text


def write_page(results: Results, pictures: Mapping[str, Mapping[str, Path]], path: Path) -> None:
    """Writes a page of tables and, for each protocol, pictures by caption, with relative links to their files."""
    title = f"Evaluation of {results.about['checkpoint']}"
    parts = [f"<h1>{escape(title)}</h1>", f'<p class="note">{escape(_about(results.about))}</p>']
    for name, result in results.protocols.items():
        parts += [
            f"<h2>{escape(name)}</h2>",
            f'<p class="note">{escape(describe_samples(result))}</p>',
            html(result.shown_rows),
        ]
        parts += [figure(file, caption, path.parent) for caption, file in pictures[name].items()]
    path.write_text(html_page(title, parts))


def html_page(title: str, parts: Sequence[str]) -> str:
    """A page of these pieces of HTML, one below the other."""
    head = f'<meta charset="utf-8">\n<title>{escape(title)}</title>\n<style>{STYLE}</style>'
    body = "\n".join(parts)
    return f'<!doctype html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{body}\n</body>\n</html>\n'


def figure(file: Path, caption: str, folder: Path) -> str:
    """HTML of a picture, or of an .mp4, that a page in the folder links to, with its caption above."""
    link = escape(file.relative_to(folder).as_posix())
    is_video = file.suffix == ".mp4"
    shown = f'<video src="{link}" controls loop muted></video>' if is_video else f'<img src="{link}">'
    return f'<p class="note">{escape(caption)}</p>\n{shown}'


def describe_samples(result: ProtocolResult) -> str:
    """A sentence on the samples that the numbers are over."""
    trajectories = len(set(result.trajectories))
    text = f"{len(result.cases)} samples of {trajectories} trajectories"
    if any(row.low is not None for row in result.rows):
        text += "; ± is half the width of the 95 % interval (bootstrap over trajectories)"
    if any(row.metric in FRECHET for row in result.rows):
        text += (
            f"; FID and FVD of these {len(result.cases)} samples are comparable only with those of equally many samples"
        )
    return text + "."


def _about(about: Mapping[str, Any]) -> str:
    sampler = about["sampler"]
    text = (
        f"{about['checkpoint']} on split {about['config']['split']} of {about['config']['data']}: "
        f"{sampler['steps']} steps of {sampler['scheduler']}, guidance {sampler['guidance']:g}, "
        f"seed {about['config']['seed']}, mixed precision {about['config']['mixed_precision']}."
    )
    if about.get("trained_on"):
        text += f" The model was trained on {about['trained_on'].upper()}, which favours it: compare by other metrics."
    if about["config"]["nwm_compat"]:
        text += " Actions of rollouts and 8-bit pictures as in the NWM release."
    return text
