import csv
from html.parser import HTMLParser
from pathlib import Path

from cdit.common.tables import html_table, markdown_table, write_csv

COLUMNS = ["name", "a|b", "<c>"]
ROWS = [["one", 1 / 3, None], ["p|q & r", 7, float("nan")], ["", "x", -12345.678]]


def test_markdown():
    lines = markdown_table(COLUMNS, ROWS).splitlines()
    assert lines[0] == r"| name | a\|b | <c> |"
    assert lines[1] == "| --- | ---: | ---: |"
    assert lines[2] == "| one | 0.3333 | – |"
    assert lines[3] == r"| p\|q & r | 7 | – |"
    assert lines[4] == "|  | x | -1.235e+04 |"
    assert markdown_table(COLUMNS, ROWS, left=3).splitlines()[1] == "| --- | --- | --- |"


def test_html_shows_what_was_given():
    class Reader(HTMLParser):
        def __init__(self):
            super().__init__()
            self.cells: list[tuple[str, str]] = []

        def handle_starttag(self, tag, attrs):
            if tag in ("th", "td"):
                self.cells.append((tag, ""))

        def handle_data(self, data):
            if data.strip():
                self.cells[-1] = (self.cells[-1][0], data)

    reader = Reader()
    reader.feed(html_table(COLUMNS, ROWS))
    assert [text for _, text in reader.cells] == [*COLUMNS, "one", "0.3333", "–", "p|q & r", "7", "–", "", "x",
                                                  "-1.235e+04"]  # fmt: skip
    assert [tag for tag, _ in reader.cells] == ["th"] * 3 + ["th", "td", "td"] * 3


def test_csv_keeps_all_digits(tmp_path: Path):
    write_csv(tmp_path / "table.csv", COLUMNS, ROWS)
    with open(tmp_path / "table.csv", newline="", encoding="utf-8") as file:
        head, *rows = csv.reader(file)
    assert head == COLUMNS
    assert float(rows[0][1]) == 1 / 3
    assert rows[0][2] == ""
    assert rows[1][0] == "p|q & r"
