"""Matrix products against the tables that were measured, and against what tiles and waves must do."""

from __future__ import annotations

from statistics import median

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardlab.cost.compute_time import compute_times
from shardlab.cost.fit_errors import fit_errors, print_fit_errors
from shardlab.cost.matmul_time import MatmulTimes, dtype_class, shape_of
from shardlab.cost.products import MatmulShape
from shardlab.hardware.data_files import load_chip, shipped
from shardlab.hardware.measured import product_grid, single_products

CHIPS = shipped("chips")
OF_TABLE = {"sm_90": "h100", "sm_100": "b200"}


def times_of(chip: str) -> MatmulTimes:
    found = compute_times(load_chip(chip))
    assert found is not None
    return found.matmul


def test_every_point_of_a_grid_is_what_was_measured() -> None:
    for row in product_grid():
        assert times_of(OF_TABLE[row.table]).time_s(shape_of(row)) == pytest.approx(row.time_s)


def test_rows_above_the_peak_are_left_out() -> None:
    """sm_90's f8 rows reach 2,424 TFLOP/s where the chip's dense peak is 1,979."""
    assert not [row for row in product_grid() if (row.table, row.dtype) == ("sm_90", "f8")]
    peaks = {"sm_90": 989.5e12, "sm_100": 2250e12}
    factor = {"bf16": 1.0, "f32": 0.5, "f8": 2.0}
    assert all(row.flops_per_s < peaks[row.table] * factor[row.dtype] for row in product_grid())


def test_a_tpu_cube_is_what_was_measured() -> None:
    rows = [row for row in single_products() if row.table in ("tpu7x", "v6e")]
    assert len(rows) == 9
    for row in rows:
        assert times_of(row.table).time_s(shape_of(row)) == pytest.approx(row.time_s)


@pytest.mark.parametrize(
    ("chip", "dtype"), [("a100", "bf16"), ("h100", "f8"), ("h200", "f8"), ("gb200", "f8")]
)
def test_a_chip_without_a_grid_is_scaled_to_the_median_of_its_rows(chip: str, dtype: str) -> None:
    rows = [row for row in single_products() if (row.table, row.dtype) == (chip, dtype)]
    ratios = [row.time_s / times_of(chip).time_s(shape_of(row)) for row in rows]
    assert median(ratios) == pytest.approx(1)


@pytest.mark.parametrize("chip", CHIPS)
@given(
    m=st.integers(1, 1 << 17),
    n=st.integers(1, 1 << 17),
    k=st.integers(1, 1 << 17),
    batch=st.integers(1, 64),
    dtype=st.sampled_from(["bf16", "f16", "f32"]),
)
@settings(max_examples=40, deadline=None)
def test_nothing_is_faster_than_the_datasheet(
    chip: str, m: int, n: int, k: int, batch: int, dtype: str
) -> None:
    peak = load_chip(chip).bf16_flops_per_s
    assert peak is not None
    assert 2 * batch * m * n * k / times_of(chip).time_s(MatmulShape(batch, m, n, k, dtype)) < peak


@pytest.mark.parametrize("chip", CHIPS)
def test_a_large_product_comes_near_the_peak_but_not_to_it(chip: str) -> None:
    """Published ceilings are 73 to 90 % (ml-engineering's MAMF table, Azure, tpu-recipes); MI300X: 51 %."""
    peak = load_chip(chip).bf16_flops_per_s
    assert peak is not None
    share = 2 * 16384**3 / times_of(chip).time_s(MatmulShape(1, 16384, 16384, 16384, "bf16")) / peak
    assert (0.5 if chip == "mi300x" else 0.6) < share < 0.95


def test_time_rises_in_steps_of_waves() -> None:
    """Beyond the grid only tiles and waves vary: a wave costs the same whether it is full or not."""
    times = times_of("h100")
    extents = range(4096, 16384, 64)
    found = [times.time_s(MatmulShape(1, m, 4096, 8192, "bf16")) for m in extents]
    assert found == sorted(found)
    assert len(set(found)) < len(found) / 2
    rates = [m / time_s for m, time_s in zip(extents, found, strict=True)]
    assert max(rates) > 1.03 * min(rates[len(rates) // 2 :])


def test_extents_are_padded_to_the_matrix_unit() -> None:
    """129 columns keep a 128-wide unit as busy as 256 do."""
    times = times_of("v5p")
    wide, narrow = (times.time_s(MatmulShape(1, 65536, n, 65536, "bf16")) for n in (256, 129))
    assert narrow / wide == pytest.approx(1, rel=0.02)


def test_dtypes_of_hlo_have_a_column() -> None:
    assert [dtype_class(one) for one in ("f8e4m3fn", "bf16", "f16", "s8", "f32", "f64")] == [
        "f8",
        "bf16",
        "bf16",
        "s8",
        "f32",
        "f32",
    ]


@pytest.mark.parametrize(("chip", "times"), [("v4", 1), ("v5e", 2), ("v5p", 2), ("v6e", 2), ("a100", 2)])
def test_integers_are_as_much_faster_as_their_peak(chip: str, times: float) -> None:
    """Datasheets, int8 / bf16: v4 275 / 275, v5e 394 / 197, v5p 918 / 459, v6e 1836 / 918, A100 624 / 312."""
    bf16, s8 = (times_of(chip).time_s(MatmulShape(1, 65536, 65536, 65536, dtype)) for dtype in ("bf16", "s8"))
    assert bf16 / s8 == pytest.approx(times, rel=0.01)


def test_the_error_of_every_table_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    errors = {one.table: one for one in fit_errors()}
    assert len(errors) == len(fit_errors())
    assert errors["sm_90 bf16 grid"].rows == 3 * 5 * 5 * 3 * 3  # batches, other extents, inner points, axes
    assert errors["sm_90 bf16 grid"].held_out and errors["sm_90 bf16 grid"].mean < 0.05
    assert errors["h100 bf16 products"].held_out and errors["h100 bf16 products"].worst < 0.1
    print_fit_errors()
    assert len(capsys.readouterr().out.splitlines()) == len(errors)
