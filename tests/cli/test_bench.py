"""`vivace bench` on the command line: a whole run on a tiny model, and what it refuses."""

import json

import pytest

from vivace import cli


def bench(*arguments: object) -> object:
    with pytest.raises(SystemExit) as end:
        cli.main(["bench", *map(str, arguments)])
    return end.value.code


def test_a_run_says_each_result_and_where_the_table_is(tmp_path, capsys, monkeypatch):
    told = ["vivace", "bench", "sd3", "--tiny", "--device", "cpu", "--peers", "none", "-o", str(tmp_path)]
    monkeypatch.setattr("sys.argv", told)
    assert bench(*told[2:]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("sd3:")
    assert "vivace exact" in said[0]
    assert said[-1] == str(tmp_path / "bench.md")
    line = json.loads((tmp_path / "bench.jsonl").read_text())
    assert line["command"] == "vivace bench sd3 --tiny --device cpu --peers none"
    assert line["machine"]["versions"]["torch"]
    assert {path.name for path in tmp_path.iterdir()} == {"bench.jsonl", "bench.csv", "bench.md", "bench.png"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "nothing to time; name a family"),
        (("fluks", "--tiny"), "unknown family 'fluks'"),
        (("flux:huge",), "flux has no variant 'huge'"),
        (("flux", "--model", "x", "--random"), "--model and --random exclude each other"),
        (("flux", "--tiny", "--random"), "--tiny and --random exclude each other"),
        (("flux", "--size", "big"), "is not WxH"),
        (("flux", "--peers", "tensorrt", "--device", "cpu"), "unknown peer 'tensorrt'"),
        (("flux", "--presets", "exakt", "--device", "cpu"), "unknown preset 'exakt'; the nearest is 'exact'"),
        (("flux", "--set", "grafs=on", "--device", "cpu"), "unknown Config field 'grafs'"),
        (("flux", "--batch", "0"), "greater than or equal to 1"),
        (("--kernels", "--device", "cpu"), "the device is cpu"),
        (("flux", "--steps", "4"), "--steps 4 says nothing about one denoiser forward; add --end-to-end"),
        (("sdxl", "--frames", "5"), "--frames 5: Stable Diffusion XL draws single pictures; leave it out"),
        (("wan", "--frames", "6"), "--frames 6: Wan 2.1 and 2.2 makes multiples of 4 and one; the nearest is 5"),
        (("sdxl", "--end-to-end", "--batch", "3"), "--end-to-end makes one picture, so leave it out"),
        (("flux", "--device", "cpu", "--presets", "none", "--peers", "none"), "nobody to time"),
        (("flux", "--ladder", "sdxl", "--batch", "2"), "takes no FAMILY, --batch; leave it out"),
        (("flux", "--device", "tpu"), "no device 'tpu'"),
    ],
)
def test_a_mistake_is_one_line(arguments, said, tmp_path, capsys):
    assert bench(*arguments, "-o", tmp_path / "out") == 2
    caught = capsys.readouterr()
    assert caught.out == ""
    assert caught.err.count("\n") == 1
    assert said in caught.err
    assert not (tmp_path / "out").exists()


def test_results_cannot_go_into_a_file(tmp_path, capsys):
    file = tmp_path / "mine"
    file.write_text("mine")
    for where in (file, file / "inside"):
        assert bench("sd", "--tiny", "--device", "cpu", "-o", where) == 2
        assert "mine is a file; name another" in capsys.readouterr().err
    assert file.read_text() == "mine"


def test_a_full_disk_is_one_line(tmp_path, capsys):
    (tmp_path / "bench.jsonl").symlink_to("/dev/full")
    assert bench("sd3", "--tiny", "--device", "cpu", "--peers", "none", "--no-reference", "-o", tmp_path) == 2
    caught = capsys.readouterr()
    assert caught.out == ""
    assert caught.err.startswith("vivace: the disk is full; free some of it, then give the same command again")
    assert caught.err.count("\n") == 1


def test_a_ladder_has_all_presets_on_top(tmp_path, capsys):
    told = ("--ladder", "sd15", "--tiny", "--device", "cpu", "--budget-s", "0", "-o", tmp_path)
    for presets, rungs in (((), 8), (("--presets", "fast"), 6)):
        assert bench(*told, *presets) == 0
        assert capsys.readouterr().out == f"{rungs} rungs left for the next time, when the same command goes on\n"
