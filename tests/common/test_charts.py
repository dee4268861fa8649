"""Line charts: every line is drawn in its colour, in its panel."""

import numpy as np

from cdit.common.charts import Line, line_chart

RED, BLUE = (255, 0, 0), (0, 0, 255)


def share(image, colour) -> float:
    return float((np.asarray(image) == colour).all(-1).mean())


def test_lines_are_drawn_in_their_panels():
    lines = [Line("a", [1, 2, 4], [3, 1, 2], "#ff0000"), Line("", [1, 4], [2, 3], "#0000ff")]
    one = line_chart({"one": lines[:1]}, "x", "y")
    both = line_chart({"one": lines[:1], "two": lines}, "x", "y", log=True, from_zero=True)
    assert share(one, RED) > 0.001
    assert share(one, BLUE) == 0
    assert both.width > one.width
    middle = both.width // 2
    assert share(both.crop((0, 0, middle, both.height)), BLUE) == 0
    assert share(both.crop((middle, 0, both.width, both.height)), BLUE) > 0.001


def test_bands_surround_their_line():
    plain, banded = (
        line_chart({"": [Line("a", [0, 1], [1, 1], "#ff0000", band=band)]}, "x") for band in (None, ([0, 0], [2, 2]))
    )
    reddish = [float(((np.asarray(x)[..., 0] > 250) & (np.asarray(x)[..., 1] < 250)).mean()) for x in (plain, banded)]
    assert reddish[1] > 10 * reddish[0]
