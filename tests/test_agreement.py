"""Where targets of one plan agree, by hand: widening, all-reduce for reduce-scatter, permutes for gathers."""

from __future__ import annotations

import io
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
from case_reports import analysis, case, collective, report

from shardlab.agreement import Agreement, AgreementRow, agreement
from shardlab.analysis import CollectiveRow, ModuleFacts, analyze
from shardlab.case_report import CaseReport
from shardlab.compare import comparison_json, rank
from shardlab.report.comparison import comparison_page
from shardlab.report.markdown import to_markdown
from shardlab.report.terminal import print_page

MACHINES = {"cpu": "cpu:8", "gpu": "h100:1x8", "tpu": "v5e:4x2"}


def on(backend: str, *rows: CollectiveRow, plan: str = "fsdp8") -> CaseReport:
    """The plan on a target of this backend, with these collectives."""
    facts = ModuleFacts(name="jit_step", backend=backend, num_devices=8, scheduled=True)
    found = replace(analysis(*rows), modules=(facts,))
    return report(plan, case=case(plan, MACHINES[backend]), analysis=found, emulated=backend == "cpu")


def sends(kind: str, wire_bytes: int, **changes: object) -> CollectiveRow:
    """One collective over fsdp, twice a step."""
    return collective(kind, kind=kind, wire_bytes=Fraction(wire_bytes), **changes)


def only(*reports: CaseReport) -> AgreementRow:
    """The one row of what these targets send."""
    (row,) = of(*reports).rows
    return row


def of(*reports: CaseReport) -> Agreement:
    found = agreement(reports)
    assert found is not None
    return found


def test_equal_bytes_agree() -> None:
    row = only(on("gpu", sends("all-gather", 700)), on("tpu", sends("all-gather", 700)))
    assert (row.kind, row.axes, row.agree, row.why) == ("all-gather", "fsdp", True, ())
    assert row.wire_bytes == ((1400, 1400), (1400, 1400))


def test_two_halves_agree_with_a_whole() -> None:
    halves = (sends("all-gather", 350), sends("all-gather", 350))
    assert only(on("gpu", *halves), on("tpu", sends("all-gather", 700))).agree


@pytest.mark.parametrize(("there", "as_on"), [(700, ", as on h100:1x8"), (701, "")], ids=["same", "other"])
def test_wider_types_are_told_and_proved(there: int, as_on: str) -> None:
    """What is left open is said to be."""
    wide = sends("all-gather", 1400, logical_payload_bytes=800, logical_wire_bytes=Fraction(700))
    row = only(on("cpu", wide), on("gpu", sends("all-gather", there)))
    assert not row.agree
    rest = () if as_on else ("the rest is not known",)
    assert row.why == (f"cpu:8: in wider types than the source's, where it is 1.4 kB{as_on}", *rest)


@pytest.mark.parametrize(
    ("reduced", "wanted"),
    [
        (1400 + 30, "cpu:8: all-reduces what h100:1x8 reduce-scatters"),
        (1400 + 31, "cpu:8: no reduce-scatter over fsdp"),
    ],
    ids=["proved", "does-not-add-up"],
)
def test_an_all_reduce_for_a_reduce_scatter(reduced: int, wanted: str) -> None:
    """Reduce-scatter of S sends (n-1)/n · S = 700, all-reduce twice that; both also all-reduce 30 bytes."""
    found = of(
        on("cpu", sends("all-reduce", reduced)),
        on("gpu", sends("reduce-scatter", 700), sends("all-reduce", 30)),
    )
    why = {row.kind: row.why for row in found.rows}
    proved = reduced == 1430
    assert why["reduce-scatter"] == ((wanted,) if proved else (wanted, "the rest is not known"))
    assert why["all-reduce"] == ((wanted,) if proved else ("not known",))
    assert found.rows[1].wire_bytes == ((0, 0), (1400, 1400))


def test_widening_and_all_reduce_at_once() -> None:
    """In f32 2 · 1400 for a bf16 reduce-scatter of 700: the source's types are compared."""
    wide = sends("all-reduce", 2800, logical_payload_bytes=800, logical_wire_bytes=Fraction(1400))
    found = of(on("cpu", wide), on("gpu", sends("reduce-scatter", 700)))
    assert all("cpu:8: all-reduces what h100:1x8 reduce-scatters" in row.why for row in found.rows)


def test_permutes_that_realize_a_gather_stand_in_its_row() -> None:
    permutes = sends("collective-permute", 100, executions=(7, 7), realizes="all-gather")
    row = only(on("tpu", permutes), on("gpu", sends("all-gather", 700, executions=(1, 1))))
    assert (row.kind, row.agree) == ("all-gather", True)
    more = replace(permutes, executions=(8, 8))
    row = only(on("tpu", more), on("gpu", sends("all-gather", 700, executions=(1, 1))))
    assert row.why == ("v5e:4x2: carried out by collective-permutes", "the rest is not known")


def test_what_is_not_exact_never_agrees() -> None:
    unknown = sends("all-gather", 700, executions=(1, None))
    row = only(on("gpu", unknown), on("tpu", unknown))
    assert not row.agree
    assert row.wire_bytes == ((700, None), (700, None))
    assert all("not exact" in why for why in row.why)


def test_what_moves_nothing_has_no_row() -> None:
    still = sends("all-reduce", 0, axes=())
    assert of(on("gpu", still), on("tpu", still)).rows == ()


GOLDEN = Path(__file__).parent / "golden"


def compiled(name: str, *backends: str) -> AgreementRow:
    """The one row of a program of golden/audit/make.py, compiled for a mesh of x=4, y=2 on each of these."""
    reports = []
    for backend in backends:
        found = analyze(GOLDEN / f"{name}.{backend}.hlo", axes={"x": 4, "y": 2})
        machine = MACHINES[backend]
        reports.append(report("plan", case=case("plan", machine), analysis=found, emulated=backend == "cpu"))
    return only(*reports)


def test_a_sum_moved_out_of_a_loop() -> None:
    """f32[256,256] over 4: 2 · 3/4 · 256 KiB on each of 4 microbatches, or once where XLA moves it."""
    row = compiled("agreement/accumulate_sums", "cpu", "gpu", "tpu")
    assert row.wire_bytes == ((4 * 393_216,) * 2, (393_216,) * 2, (393_216,) * 2)
    assert row.collectives == ((4, 4), (1, 1), (1, 1))
    assert row.why == (
        "h100:1x8: moved out of a loop, 1x a step for 4x on cpu:8",
        "v5e:4x2: moved out of a loop, 1x a step for 4x on cpu:8",
    )


def test_a_gather_moved_out_of_a_loop() -> None:
    """f32[64,256] shards over 4: XLA:CPU gathers once before the loop, XLA:GPU on each of 4 trips."""
    row = compiled("audit/gather_in_loop", "cpu", "gpu")
    assert row.wire_bytes == ((196_608,) * 2, (4 * 196_608,) * 2)
    assert row.why == ("cpu:8: moved out of a loop, 1x a step for 4x on h100:1x8",)


def test_other_bytes_on_as_many_trips_are_not_moved() -> None:
    """libtpu gathers in bf16 what XLA:GPU gathers in f32."""
    row = compiled("audit/gather_in_loop", "gpu", "tpu")
    assert row.wire_bytes == ((4 * 196_608,) * 2, (4 * 98_304,) * 2)
    assert row.why == ("not known",)


def test_gathers_combined_into_one() -> None:
    """f32[8,256], [16,256] and [24,256] over 4: 3 · 48 KiB in three gathers, or in one."""
    row = compiled("agreement/gather_three", "cpu", "gpu", "tpu")
    assert row.agree
    assert row.wire_bytes == ((3 * 49_152,) * 2,) * 3
    assert row.collectives == ((3, 3), (1, 1), (3, 3))
    assert row.why == ("h100:1x8: combined, 1 a step for 3 on cpu:8",)


def test_combining_is_shown_beside_what_agrees() -> None:
    halves = (sends("all-gather", 350), sends("all-gather", 350))
    page = to_markdown(comparison_page(rank([on("gpu", sends("all-gather", 700)), on("tpu", *halves)])))
    assert "the same<br>h100:1x8: combined, 2 a step for 4 on v5e:4x2" in page


def test_what_every_target_combines_is_no_difference() -> None:
    """f32[8,8], [16,16] and [24,24]: 2 · 3/4 · 3,584 bytes in one all-reduce, of a tuple or of one array."""
    row = compiled("agreement/reduce_three", "cpu", "gpu")
    assert (row.agree, row.wire_bytes[0], row.why) == (True, (5376, 5376), ())


@pytest.mark.parametrize(
    ("here", "there", "why"),
    [
        pytest.param([(100, 8)], [(100, 2)], "moved", id="of each of four trips"),
        pytest.param([(100, 8), (7, 3)], [(100, 2), (7, 3)], "moved", id="beside what stays"),
        pytest.param([(100, 8), (50, 8)], [(150, 2)], "moved", id="and combined"),
        pytest.param([(100, 8), (50, 8)], [(100, 2), (50, 8)], "moved", id="one of two"),
        pytest.param([(100, 8)], [(200, 2)], "not known", id="other bytes"),
        pytest.param([(100, 8)], [(100, 3)], "not known", id="no whole number of trips"),
        pytest.param([(100, 8), (10, 8)], [(100, 2), (10, 4)], "not known", id="out of different loops"),
        pytest.param([(100, 8)], [], "not known", id="not there at all"),
        pytest.param([(100, 2)], [(50, 2), (50, 2)], "combined", id="combined"),
        pytest.param([(100, 2)], [(100, 2)], "", id="the same"),
    ],
)
def test_moved_and_combined_are_proved(
    here: list[tuple[int, int]], there: list[tuple[int, int]], why: str
) -> None:
    """Each collective: bytes of one execution, executions."""
    rows = [
        [sends("all-gather", sent, executions=(runs, runs)) for sent, runs in each] for each in (here, there)
    ]
    other = [sends("all-reduce", 8)]  # so that a target without gathers is analysed too
    found = of(on("gpu", *rows[0], *other), on("tpu", *rows[1], *other))
    (row,) = [one for one in found.rows if one.kind == "all-gather"]
    assert [word for word in ("moved", "combined", "not known") if word in " ".join(row.why)] == [
        *filter(None, [why])
    ]


def test_permutes_are_not_combined_gathers() -> None:
    permutes = sends("collective-permute", 100, executions=(7, 7), realizes="all-gather")
    row = only(on("tpu", permutes), on("gpu", sends("all-gather", 700, executions=(1, 1))))
    assert (row.agree, row.why, row.collectives) == (True, (), ((7, 7), (1, 1)))


@pytest.mark.parametrize(
    "reports",
    [
        (on("gpu"),),
        (on("gpu"), on("gpu")),
        (on("gpu"), on("tpu", plan="other")),
        (on("gpu"), replace(on("tpu"), analysis=None)),
        (),
    ],
    ids=["one", "one-backend", "two-plans", "one-analysed", "none"],
)
def test_no_agreement_without_one_plan_on_two_backends(reports: tuple[CaseReport, ...]) -> None:
    assert agreement(reports) is None


def test_the_comparison_shows_it_everywhere() -> None:
    wide = sends("all-gather", 1400, logical_payload_bytes=800, logical_wire_bytes=Fraction(700))
    compared = rank([on("cpu", wide), on("gpu", sends("all-gather", 700))])
    assert comparison_json(compared)["agreement"] == {
        "targets": ["cpu:8", "h100:1x8"],
        "rows": [
            {
                "kind": "all-gather",
                "axes": "fsdp",
                "wire_bytes": {"cpu:8": [2800, 2800], "h100:1x8": [1400, 1400]},
                "collectives": {"cpu:8": [2, 2], "h100:1x8": [2, 2]},
                "agree": False,
                "why": ["cpu:8: in wider types than the source's, where it is 1.4 kB, as on h100:1x8"],
            }
        ],
    }
    page = comparison_page(compared)
    stream = io.StringIO()
    print_page(page, stream, width=150)
    for text in (stream.getvalue(), to_markdown(page)):
        assert "Where targets agree" in text
        assert "2.8 kB" in text
    assert "agreement" not in comparison_json(rank([on("gpu")]))
    assert "Where targets agree" not in to_markdown(comparison_page(rank([on("gpu")])))
