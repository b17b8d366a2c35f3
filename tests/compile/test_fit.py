import pytest
from compile.cases import tiny_case

from shardlab.compile.fit import batch_unit, largest_batch


@pytest.mark.parametrize(
    ("unit", "refused", "limit", "max_tries", "expected", "tried"),
    [
        pytest.param(4, 4, 100, 6, None, [], id="refused at one unit"),
        pytest.param(4, 32, 3, 6, None, [4], id="not even one unit"),
        pytest.param(4, 8, 4, 6, 4, [4], id="only one unit"),
        pytest.param(4, 32, 20, 6, 20, [4, 16, 24, 20], id="bisected"),
        pytest.param(1, 16, 15, 6, 15, [1, 8, 12, 14, 15], id="all but one"),
        pytest.param(1, 1024, 1000, 3, 768, [1, 512, 768], id="out of tries"),
        pytest.param(3, 10, 10, 6, 9, [3, 6, 9], id="refused between units"),
    ],
)
def test_largest_batch(
    unit: int, refused: int, limit: int, max_tries: int, expected: int | None, tried: list[int]
) -> None:
    asked: list[int] = []

    def fits(batch: int) -> bool:
        asked.append(batch)
        return batch <= limit

    assert largest_batch(unit, refused, fits, max_tries) == expected
    assert asked == tried


def test_batch_unit_is_shards_times_accumulation() -> None:
    assert batch_unit(tiny_case("cpu:8")) == 4
    assert batch_unit(tiny_case("cpu:8", plan={"method": {"accumulate": 3}})) == 12
    assert batch_unit(tiny_case("cpu:8", plan={"activations": {}})) == 1
