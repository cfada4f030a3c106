"""The README's table of what converts is the one that the converter tables make."""

from pathlib import Path

from convert.compatibility import END, START, table
from convert.components import COMPONENTS


def test_the_readme_has_the_table_of_the_converters():
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    assert readme.count(START) == readme.count(END) == 1
    found = readme.partition(START)[2].partition(END)[0].strip()
    assert found == table(), "run `python -m convert.compatibility` and put what it prints between the two comments"


def test_every_converter_has_a_row():
    rows = [line for line in table().splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == list(COMPONENTS)
