"""The metrics file of a run that was killed and goes on."""

from pathlib import Path

from metrics import FIELDS, Record, open_reports


def record(step: int) -> Record:
    return Record(step=step, loss=1.0 / step, gradient_norm=2.0, tokens_per_s=100.0)


def test_a_run_that_goes_on_keeps_what_was_written_before_its_first_step(tmp_path: Path) -> None:
    """Rows that are done again are replaced, and a row that was cut off by the kill is dropped."""
    path = tmp_path / "metrics.csv"
    with open_reports(steps=9, every=10, metrics=str(path)) as report:
        for step in (1, 2, 3):
            report(record(step))
        assert len(path.read_text().splitlines()) == 4  # each row is there as soon as it is reported
    path.write_text(path.read_text() + "4,0.2")
    with open_reports(steps=9, every=10, first_step=3, metrics=str(path)) as report:
        report(record(3))
        report(record(4))
    lines = path.read_text().splitlines()
    assert lines[0] == ",".join(FIELDS)
    assert [line.split(",")[0] for line in lines[1:]] == ["1", "2", "3", "4"]
    with open_reports(steps=9, every=10, metrics=str(path)):
        pass
    assert len(path.read_text().splitlines()) == 1
