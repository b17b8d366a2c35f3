import pytest
from compile.cases import tiny_case

from shardlab.compile.fit import Try, batch_unit, largest_batch


@pytest.mark.parametrize(
    ("unit", "refused", "limit", "max_tries", "expected", "tried"),
    [
        pytest.param(4, 4, 100, 5, None, [], id="refused at one unit"),
        pytest.param(4, 32, 3, 5, None, [4], id="not even one unit"),
        pytest.param(4, 8, 4, 5, 4, [4], id="only one unit"),
        pytest.param(4, 32, 20, 5, 20, [4, 20, 24], id="the line meets the limit, the next is over"),
        pytest.param(1, 16, 15, 5, 15, [1, 15], id="all but one"),
        pytest.param(1, 1024, 1000, 1, 1, [1], id="out of tries"),
        pytest.param(3, 10, 10, 5, 9, [3, 9], id="refused between units"),
    ],
)
def test_largest_batch_when_memory_is_a_line(
    unit: int, refused: int, limit: int, max_tries: int, expected: int | None, tried: list[int]
) -> None:
    """Memory of 1000 + 10 a sequence: what fits is exactly batch <= limit."""
    asked: list[int] = []

    def attempt(batch: int) -> Try:
        asked.append(batch)
        return Try(batch=batch, fits=batch <= limit, needed_bytes=1000 + 10 * batch)

    first = Try(batch=refused, fits=False, needed_bytes=1000 + 10 * refused)
    assert largest_batch(unit, first, 1000 + 10 * limit, attempt, max_tries) == expected
    assert asked == tried


@pytest.mark.parametrize("limit", range(1, 16))
def test_largest_batch_when_memory_says_nothing(limit: int) -> None:
    """A compiler that gives no bytes is bisected: 5 tries are enough for 16 units."""

    def attempt(batch: int) -> Try:
        return Try(batch=batch, fits=batch <= limit, needed_bytes=0)

    assert largest_batch(1, Try(batch=16, fits=False, needed_bytes=0), 99, attempt, 5) == limit


def test_batch_unit_is_shards_times_accumulation() -> None:
    assert batch_unit(tiny_case("cpu:8")) == 4
    assert batch_unit(tiny_case("cpu:8", plan={"method": {"accumulate": 3}})) == 12
    assert batch_unit(tiny_case("cpu:8", plan={"activations": {}})) == 1
