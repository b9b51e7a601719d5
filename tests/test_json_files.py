"""JSON of dataclasses: numbers that are not finite are refused, wherever they stand."""

from dataclasses import dataclass

import pytest

from sparse_adv import json_files


@dataclass(frozen=True)
class Numbers:
    value: float = 0.0
    values: tuple[float, ...] = ()


@pytest.mark.parametrize("number", ["1e999", "-1e999", "NaN", "Infinity", "-Infinity"])
@pytest.mark.parametrize("content", ['{{"value": {}}}', '{{"values": [0.5, {}]}}'])
def test_a_number_that_is_not_finite_is_refused(tmp_path, number, content):
    file = tmp_path / "numbers.json"
    file.write_text(content.format(number))
    with pytest.raises(ValueError, match=f"numbers.json is not JSON: {number} is not a finite number"):
        json_files.read(Numbers, file)
    file.write_text('{"value": 1e300}\n' + content.format(number))
    with pytest.raises(ValueError, match=f"numbers.json, line 2 is not JSON: {number} is not a finite number"):
        json_files.read_lines(Numbers, file)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_is_not_written(tmp_path, number):
    for record in (Numbers(number), Numbers(values=(number,))):
        with pytest.raises(ValueError):
            json_files.write(tmp_path / "numbers.json", record)
    assert not list(tmp_path.iterdir())


def test_the_largest_and_smallest_floats_are_read_back(tmp_path):
    record = Numbers(1.7976931348623157e308, (5e-324, 0.1, -0.0))
    json_files.write(tmp_path / "numbers.json", record)
    assert json_files.read(Numbers, tmp_path / "numbers.json") == record
