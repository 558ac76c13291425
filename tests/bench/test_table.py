"""The figures of a table, from lines written by hand."""

import pytest

from vivace.bench.chart import draw
from vivace.bench.results import write
from vivace.bench.table import duration, markdown, rows, verdicts

H200 = {"gpus": [{"name": "NVIDIA H200"}], "processor": "p", "versions": {"torch": "2.11.0"}}


def line(contestant, ms=None, **values):
    done = {"status": "done", "median_ms": ms, "cold_seconds": 5.0, "peak_bytes": 2**31, "detail": "how", "tflop": 74.4}
    done["power"] = {"clock_mhz": 1500, "watts": 691, "capped": 1.0}
    return {
        "contestant": contestant,
        "ours": contestant.startswith("vivace"),
        "workload": {"dtype": "bfloat16"},
        "machine": H200,
        "command": "vivace bench flux",
        **(done if ms else {"status": "not finished", "why": "not finished in 200 s"}),
        **values,
    }


LINES = [
    line("compile-full", 128.0, error=0.011),
    line("torchao"),
    line("vivace exact", 100.0, error=0.012),
    line("eager", 160.0, error=0.01),
    line("compile", 125.0, error=None),
]


def test_rows_fastest_first_beside_eager_and_the_roofline():
    found = rows(LINES)
    assert [row["contestant"] for row in found] == ["vivace exact", "compile", "compile-full", "eager", "torchao"]
    ours = found[0]
    assert ours["x eager"] == pytest.approx(1.6)
    assert ours["x eager's"] == pytest.approx(1.2)
    assert ours["TFLOP/s"] == pytest.approx(744)
    assert ours["roofline"] == pytest.approx(744 / 802)
    assert ours["peak GiB"] == 2
    assert rows([line("vivace fast", 100.0, rate="fp8")])[0]["roofline"] == pytest.approx(744 / 1500)
    assert (found[-1]["ms"], found[-1]["how"]) == (None, "not finished in 200 s")


def test_the_verdict_is_against_the_better_compiled_peer():
    assert verdicts(LINES) == [
        "vivace exact is 1.25 times as fast as compile, the better compiled peer, "
        "after a cold start of 5.0 s against 5.0 s."
    ]
    assert verdicts([one for one in LINES if not one["contestant"].startswith("compile")]) == []


def test_markdown():
    text = markdown({"flux on NVIDIA H200": LINES})
    assert "| vivace exact | 100.00 ms | 1.60 | 5.0 | 2.00 | 744 | 93% | 1500 | 691 | 1.20e-02 | 1.20 | how |" in text
    assert "| torchao | - | - | - | - | - | - | - | - | - | - | not finished in 200 s |" in text


def test_durations_read_well():
    assert [duration(ms) for ms in (2.905, 114.0, 3610.5)] == ["2.90 ms", "114.00 ms", "3.61 s"]


def test_a_chart_of_nothing_finished(tmp_path):
    draw({"flux": [line("torchao")]}, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").stat().st_size > 1000


def test_kernels_and_profiles_have_their_sections(tmp_path):
    from vivace.bench.book import Book

    book = Book(tmp_path)
    told = {"machine": H200, "command": "vivace bench --kernels"}
    times = {"microseconds": 20.0, "bound_microseconds": 17.0, "share": 0.85, "copy_tb_per_second": 4.3}
    book.append({"kernel": "geglu", "case": "SDXL", "status": "done", **times, **told})
    book.append({"kernel": "rope", "case": "FLUX", "status": "failed", "why": "illegal access", **told})
    profile = [{"name": "gemm|kernel", "launches": 57.0, "ms": 76.0, "share": 0.7}]
    book.append({**LINES[2], "title": "flux", "profile": profile})
    write(tmp_path)
    text = (tmp_path / "bench.md").read_text()
    assert "| geglu | SDXL | 20.0 | 17.0 | 85% | a copy's 4.30 TB/s |" in text
    assert "| rope | FLUX | - | - | - | illegal access |" in text
    assert "| `gemm/kernel` | 57 | 76.000 | 70.0% |" in text


def test_the_parts_of_a_picture_have_their_section(tmp_path):
    from vivace.bench.book import Book

    book = Book(tmp_path)
    ours = {"text_encoder": {"seconds": 0.03, "share": 0.03}, "unet": {"seconds": 0.97, "share": 0.97}}
    book.append({**LINES[2], "title": "sdxl", "parts": ours})
    book.append({**LINES[3], "title": "sdxl", "parts": {"unet": {"seconds": 2.0, "share": 1.0}}})
    book.append({**LINES[4], "title": "flux"})
    write(tmp_path)
    text = (tmp_path / "bench.md").read_text()
    assert "| contestant | text_encoder | unet |" in text
    assert "| vivace exact | 0.030 s, 3.0% | 0.970 s, 97.0% |" in text
    assert "| eager | - | 2.000 s, 100.0% |" in text
    assert text.count("### ") == 1
