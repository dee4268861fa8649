"""Parses action sequences: words such as `forward*8,turn_left*4`, or a file of numbers."""

import csv
import io
import json
import math
import re
from pathlib import Path

import numpy as np

from cdit.common.errors import DataError, UserError
from cdit.common.files import MAX_TEXT, read_bytes
from cdit.data.action_space import ActionSpace

DEFAULT_STEP = 0.3
"""Default metres of a word such as `forward`."""
DEFAULT_TURN = 15.0
"""Degrees of `turn_left` and `turn_right` without a number."""

MOVES = {
    "forward": (1.0, 0.0),
    "back": (-1.0, 0.0),
    "left": (0.0, 1.0),
    "right": (0.0, -1.0),
}
"""Direction (dx, dy) of the words that move; their number is in metres."""
TURNS = {"turn_left": 1.0, "turn_right": -1.0}
"""Sign of the words that turn; their number is in degrees."""
MAX_STEPS = 100_000
MAX_ACTION = 1e6
"""Largest number in a file."""
WORDS = [*MOVES, *TURNS, "stay"]

_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_WORD = re.compile(rf"([a-z_]+)\s*(?:\(\s*({_NUMBER})\s*\))?")
_NAMED = re.compile(rf"(.*?)\s*\(\s*({_NUMBER})\s*\)")
_STEP = re.compile(r"(.*?)(?:\*\s*(\d+))?", re.DOTALL)


def parse_actions(text: str, step: float = DEFAULT_STEP) -> np.ndarray:
    """Reads a sequence of action words.

    Words, separated by commas, are forward, back, left, right (sideways), turn_left, turn_right and stay. A number in
    brackets is the size, in metres or degrees per frame: `forward(0.5)`, `turn_left(30)`. `*8` repeats for 8 frames,
    `+` does two things at once: `forward+turn_left(5)*8`.

    Args:
        text: the sequence.
        step: metres of a move without a number.

    Returns:
        (L, 3) float32: dx and dy in metres, dyaw in radians, per frame, in the local frame at its start.

    Raises:
        UserError: the text is not such a sequence; the message quotes the part.
    """
    actions: list[np.ndarray] = []
    for part in text.split(","):
        phrase, repeats = _STEP.fullmatch(part.strip()).groups()
        count = 1 if repeats is None else int(repeats[:9])
        if not 1 <= count <= MAX_STEPS - len(actions):
            raise UserError(f"actions: {part.strip()[:100]!r}: expected 1 to {MAX_STEPS} steps in all")
        action = sum((_action(word, part.strip(), step) for word in phrase.split("+")), np.zeros(3))
        actions += [action] * count
    return np.array(actions, np.float32)


def read_actions(source: str, step: float = DEFAULT_STEP, space: ActionSpace | None = None) -> np.ndarray:
    """Reads a sequence from a file, if it ends in .csv, .json or .npy, otherwise from words.

    Words are those of `parse_actions`, or of `parse_numbers` for actions other than motion.

    Files hold one row of numbers per frame, by default dx, dy, dyaw (metres, metres, radians): `.csv` (with an optional
    header line; the names in another order reorder the columns), `.json` (a list of rows) or `.npy`.

    Returns:
        (L, K) float32.

    Raises:
        UserError: the file is missing or damaged, or a word is unknown.
    """
    path, space = Path(source), space or ActionSpace()
    names = space.names
    expected = f"expected rows of {len(names)} numbers {', '.join(names)}"
    if path.suffix not in (".csv", ".json", ".npy"):
        return parse_actions(source, step) if space.kind == "motion" else parse_numbers(source, space)
    try:
        content = read_bytes(path, MAX_TEXT)
    except DataError as error:
        raise UserError(f"{error}: not a readable file of actions") from error
    try:
        actions = np.asarray(_READERS[path.suffix](content, names), np.float64)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except Exception as error:  # numpy and json raise many types, for huge shapes or deep nesting
        raise UserError(f"{path}: {expected} ({error})") from error
    if actions.ndim != 2 or actions.shape[1] != len(names) or not len(actions):
        raise UserError(f"{path}: {expected}, not an array of shape {actions.shape}")
    broken = np.flatnonzero(~(np.abs(actions) <= MAX_ACTION).all(axis=1))
    if len(broken):
        raise UserError(f"{path}: row {broken[0]} (from 0) is not finite, or beyond {MAX_ACTION:g}")
    return actions.astype(np.float32)


def parse_numbers(text: str, space: ActionSpace) -> np.ndarray:
    """Reads a sequence of actions that are not motion, such as `arm(0.3)+grip(1)*8,arm(0.5)+grip(0)`.

    Each step gives names with numbers; `*8` repeats it for 8 frames. Names that are left out are 0, unless the actions
    are absolute.

    Returns:
        (L, K) float32.

    Raises:
        UserError: the text is not such a sequence; the message quotes the part.
    """
    actions: list[list[float]] = []
    for part in text.split(","):
        phrase, repeats = _STEP.fullmatch(part.strip()).groups()
        count = 1 if repeats is None else int(repeats[:9])
        matches = [_NAMED.fullmatch(word.strip()) for word in re.split(r"(?<=\))\s*\+", phrase)]
        values = {match[1]: float(match[2]) for match in matches if match}
        complete = space.kind != "absolute" or values.keys() == set(space.names)
        if len(values) < len(matches) or not values.keys() <= set(space.names) or not complete:
            raise UserError(
                f"actions: cannot read {part.strip()[:100]!r}, expected {'+'.join(f'{n}(NUMBER)' for n in space.names)}"
                f"{'' if space.kind == 'absolute' else ', or some of these'}; or a file ending in .csv, .json or .npy"
            )
        if not 1 <= count <= MAX_STEPS - len(actions):
            raise UserError(f"actions: {part.strip()[:100]!r}: expected 1 to {MAX_STEPS} steps in all")
        if max(map(abs, values.values())) > MAX_ACTION:
            raise UserError(f"actions: {part.strip()[:100]!r}: a number beyond {MAX_ACTION:g}")
        actions += [[values.get(name, 0.0) for name in space.names]] * count
    return np.array(actions, np.float32)


def _action(word: str, part: str, step: float) -> np.ndarray:
    match = _WORD.fullmatch(word.strip())
    if match is None or match[1] not in WORDS:
        raise UserError(
            f"actions: cannot read {part!r}, expected words such as forward*8 or turn_left(30)*4 ({', '.join(WORDS)}) "
            "separated by commas, or a file ending in .csv, .json or .npy"
        )
    name, size = match[1], None if match[2] is None else float(match[2])
    if name in MOVES:
        return np.array([*MOVES[name], 0.0]) * (step if size is None else size)
    if name in TURNS:
        return np.array([0.0, 0.0, TURNS[name] * math.radians(DEFAULT_TURN if size is None else size)])
    if size is not None:
        raise UserError(f"actions: {part!r}: stay takes no number")
    return np.zeros(3)


def _read_csv(content: bytes, names: list[str]) -> list[list[float]]:
    lines = [(i, line) for i, line in enumerate(csv.reader(io.StringIO(content.decode())), start=1) if line]
    columns, rows = list(range(len(names))), []
    for number, line in lines:
        try:
            row = [float(value) for value in line]
        except ValueError as error:
            if number == lines[0][0]:  # a header
                header = [name.strip() for name in line]
                if sorted(header) != sorted(names):
                    raise UserError(f"line {number} is {','.join(line)!r}, expected {','.join(names)}") from error
                columns = [header.index(name) for name in names]
                continue
            raise UserError(f"line {number} is {','.join(line)!r}, expected {','.join(names)}") from error
        if len(row) != len(names):
            raise UserError(f"line {number} has {len(row)} numbers, expected {','.join(names)}")
        rows.append([row[column] for column in columns])
    return rows


def _read_npy(content: bytes, names: list[str]) -> np.ndarray:
    return np.load(io.BytesIO(content), allow_pickle=False)


_READERS = {".csv": _read_csv, ".json": lambda content, names: json.loads(content), ".npy": _read_npy}
