"""tests/results/history.py: figures over time, and which got worse on the same machine."""

import json
import pathlib
import subprocess
import sys

HISTORY = pathlib.Path(__file__).parents[1] / "results/history.py"
ROW = {"shape": "1 x 8", "threads": 2, "ms": 2.0, "read_GB_s": 30.0, "attend_GB_s": 20.0,
       "relative_error": 1e-7}


def write(folder, date, rows, benchmark="attend", processor="P 9000", machine="p", load=0.0):
    result = {"benchmark": benchmark, "version": "0.1.0", "date": f"{date}T00:00:00Z",
              "machine": {"processor": processor, "processors": 2, "memory_GiB": 8,
                          "load_before": load},
              "command": ["tsbench", benchmark], "rows": rows}
    (folder / f"{date}-{machine}-{benchmark}.json").write_text(json.dumps(result), encoding="utf-8")


def run(folder, *options):
    done = subprocess.run([sys.executable, HISTORY, folder, *options], text=True, check=False,
                          capture_output=True)
    return done.returncode, done.stdout + done.stderr


def test_a_figure_is_shown_over_time_by_machine(tmp_path):
    write(tmp_path, "2026-01-02", [{**ROW, "attend_GB_s": 21.0}])
    write(tmp_path, "2026-01-01", [ROW])
    write(tmp_path, "2026-01-03", [{**ROW, "attend_GB_s": 1.0}], processor="Q", machine="q",
          load=3.0)
    status, text = run(tmp_path)
    assert status == 0
    p, q = text.split("Q, 2 processors\n")
    assert p.startswith("P 9000, 2 processors\n  attend: 1 x 8 threads=2: ms\n")
    assert "attend: 1 x 8 threads=2: attend_GB_s\n    2026-01-01 20  2026-01-02 21\n" in p
    assert "attend: 1 x 8 threads=2: attend_GB_s\n    2026-01-03 1*\n" in q
    assert "relative_error" not in text
    assert "0 figures are worse by more than 15 %" in text


def test_the_last_figure_is_held_against_the_median_of_the_earlier_ones(tmp_path):
    for day, rate, ms in ((1, 20.0, 2.0), (2, 20.0, 2.0), (3, 5.0, 2.0), (4, 16.0, 2.4)):
        write(tmp_path, f"2026-01-0{day}", [{**ROW, "attend_GB_s": rate, "ms": ms}])
    status, text = run(tmp_path, "--worse", "19")
    assert status == 1
    assert "attend_GB_s\n    2026-01-01 20  2026-01-02 20  2026-01-03 5  2026-01-04 16\n" \
           "    WORSE by 25 %\n" in text
    assert "2026-01-04 2.4\n    WORSE by 20 %\n" in text  # ms: less is better
    assert "2 figures are worse by more than 19 %" in text
    assert run(tmp_path, "--worse", "30")[0] == 0


def test_what_is_better_goes_by_the_unit_and_the_machine_itself_is_never_worse(tmp_path):
    def step(us, rate, bare):
        return [{"what": "a step", "value": us, "unit": "µs", "by ring": us},
                {"what": "one worker", "value": rate, "unit": "/s"},
                {"what": "bare round trip", "value": bare, "unit": "µs"}]
    write(tmp_path, "2026-01-01", step(10.0, 100.0, 1.0), benchmark="step")
    write(tmp_path, "2026-01-02", step(5.0, 200.0, 9.0), benchmark="step")
    assert run(tmp_path)[0] == 0
    write(tmp_path, "2026-01-03", step(20.0, 50.0, 9.0), benchmark="step")
    status, text = run(tmp_path)
    assert status == 1 and text.count("WORSE") == 2


def test_a_file_that_is_no_result_is_named(tmp_path):
    (tmp_path / "today.json").write_text("{}", encoding="utf-8")
    status, text = run(tmp_path)
    assert status == 2 and "today.json: the name isn't DATE-MACHINE-BENCHMARK.json" in text
    (tmp_path / "today.json").rename(tmp_path / "2026-01-01-p-attend.json")
    status, text = run(tmp_path)
    assert status == 2 and "2026-01-01-p-attend.json: not what tsbench --json writes" in text
    write(tmp_path, "2026-01-01", [ROW], benchmark="step")
    (tmp_path / "2026-01-01-p-step.json").rename(tmp_path / "2026-01-01-p-attend.json")
    status, text = run(tmp_path)
    assert status == 2 and "it is of step on 2026-01-01" in text


def test_the_kept_results_can_be_read():
    status, text = run(HISTORY.parent / "json")
    assert status in (0, 1) and "processors\n  " in text
