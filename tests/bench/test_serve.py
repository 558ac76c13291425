"""The load on three servers: the same requests for each, and every figure beside its quality."""

import json

import pytest

from vivace.accelerate import acceleration_of
from vivace.bench import rounds, serve
from vivace.bench.allowance import Allowance, NoTime
from vivace.bench.serve import Load, up
from vivace.cli import main
from vivace.families import FAMILIES

SERVERS = ("stock, one lock", "exact, one lock", "exact, our engine")


def test_both_of_ours_are_around_one_pipeline_that_keeps_no_prompt_and_is_given_back():
    pipe = FAMILIES["sd3"].tiny()
    pipe.set_progress_bar_config(disable=True)
    load = Load(title="sd3", size=(32, 32), steps=(1, 1), pictures=4, rounds=1, preset="exact")
    with up(pipe, load, clients=2) as servers:
        assert tuple(servers) == SERVERS
        engine = servers[SERVERS[2]].engine
        assert engine is not None
        assert engine.model(None).pipe is pipe
        acceleration = acceleration_of(pipe)
        assert acceleration is not None
        request = load.requests(2, number=0)[0]
        for name in SERVERS:
            servers[name].ask(request)
        # Else the second of them would not have to encode what the first was asked for.
        assert acceleration.target.prompts is None
    assert acceleration_of(pipe) is None


def test_three_servers_in_one_run(tmp_path, capsys):
    options = [
        "--tiny",
        "--steps",
        "4",
        "--pictures",
        "4",
        "--rounds",
        "2",
        "--concurrency",
        "1,3",
        "-o",
        str(tmp_path),
    ]
    with pytest.raises(SystemExit) as end:
        main(["bench", "--serve", "sd3", "--device", "cpu", *options])
    assert end.value.code == 0
    (path,) = tmp_path.glob("*-serve-sd3.json")
    found = json.loads(path.read_text())
    lines = found["results"]
    assert [(line["concurrency"], line["server"]) for line in lines] == [(n, name) for n in (1, 3) for name in SERVERS]
    assert found["load"]["steps"] == [3, 5]
    # Three for each client and round.
    assert [(line["pictures"], line["failed"]) for line in lines] == [(6, 0)] * 3 + [(18, 0)] * 3
    # All were asked in turns, none always after the same one, and for pictures that nobody had been asked for.
    order = [(one["concurrency"], one["round"], one["server"]) for one in found["rounds"]]
    assert order == [(n, turn, SERVERS[(turn + i) % 3]) for n in (1, 3) for turn in (0, 1) for i in range(3)]
    assert all(len(one["latencies"]) == 3 * one["concurrency"] for one in found["rounds"])
    assert all(line["from_stock"] < 2 and line["noise_floor"] < 2 for line in lines)
    assert lines[0]["from_stock"] == 0
    assert (lines[0]["over_stock"], lines[1]["over_ours_locked"]) == (1, 1)
    assert 0 < lines[-1]["device_busy"] <= 1
    assert lines[-1]["requests_per_call"] >= 1
    assert found["machine"]["processor"]
    assert capsys.readouterr().out.count("| 3 |") == 3


def test_it_goes_on_where_it_stopped_and_says_what_python_costs(tmp_path, capsys):
    def bench(*options):
        shape = ["--tiny", "--device", "cpu", "--steps", "2", "--pictures", "4", "-o", str(tmp_path)]
        with pytest.raises(SystemExit) as end:
            main(["bench", "--serve", "sd3", *shape, *options])
        assert end.value.code == 0
        (path,) = tmp_path.glob("*-serve-sd3.json")
        return json.loads(path.read_text()), capsys.readouterr().out

    first, said = bench("--concurrency", "2", "--rounds", "1")
    assert [one["server"] for one in first["rounds"]] == list(SERVERS)
    # What a kill leaves of a round: two of three, the last not compared yet.
    (path,) = tmp_path.glob("*-serve-sd3.json")
    cut = [dict(one, from_stock=None) if one["server"] == SERVERS[1] else one for one in first["rounds"][:2]]
    path.write_text(json.dumps({**first, "rounds": cut}))
    again, said = bench("--concurrency", "2", "--rounds", "1")
    assert again["rounds"][:2] == cut
    assert [one["server"] for one in again["rounds"]] == list(SERVERS)
    # Stock was asked in another run: it drew what is needed to compare once more.
    assert 0 <= again["rounds"][2]["from_stock"] < 2
    assert again["rounds"][2]["noise_floor"] == first["rounds"][0]["noise_floor"]
    whole = again
    # Another number of clients is another turn of the same load; a profile is made where there is none yet.
    more, said = bench("--concurrency", "1,2", "--rounds", "1", "--profile")
    assert [line["concurrency"] for line in more["results"]] == [1, 1, 1, 2, 2, 2]
    assert more["rounds"][:3] == whole["rounds"]
    assert [one["concurrency"] for one in more["profiles"]] == [1, 2]
    for found in more["profiles"]:
        assert found["computing"] + found["python"] + found["joining"] + found["empty"] == pytest.approx(1, abs=0.01)
        assert 0 < found["computing"] <= 1
        assert found["device"] == 0  # there is no GPU to wait for
        assert found["cpu_s_per_image"]["worker"] > 0
        assert found["lock_wait_ms"] >= 0
    assert "idle for Python" in said
    # A different load is in a file of its own.
    with pytest.raises(SystemExit):
        main(["bench", "--serve", "sd3", "--tiny", "--device", "cpu", "--steps", "1", "--concurrency", "1",
              "--pictures", "4", "-o", str(tmp_path)])  # fmt: skip
    assert len(list(tmp_path.glob("*-serve-sd3*.json"))) == 2


@pytest.mark.parametrize("wrong", ["many", "1,x", "0", ""])
def test_clients_are_numbers(wrong, capsys):
    with pytest.raises(SystemExit) as end:
        main(["bench", "--serve", "--concurrency", wrong])
    assert end.value.code == 2
    assert "like 1,4,16" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--serve", "--kernels"], "takes no --kernels"),
        (["--serve", "--peers", "eager", "--batch", "2"], "takes no --batch, --peers"),
        (["--serve", "--ray", "--profile", "--device", "cpu"], "takes no --profile, --device"),
        (["--ray"], "--ray needs --serve"),
        (["--serve", "--limit-s", "9"], "takes no --limit-s"),
        (["--serve", "--presets", "none"], "nobody to time"),
        (["--serve", "--presets", "exact,nope"], "unknown preset 'nope'"),
        (["--serve", "wan"], "makes none; name another model"),
        (["--serve", "svd"], "makes none; name another model"),
    ],
)
def test_what_it_would_ignore_is_refused(options, said, capsys):
    with pytest.raises(SystemExit) as end:
        main(["bench", *options])
    assert end.value.code == 2
    assert said in capsys.readouterr().err


def test_a_size_that_the_model_cannot_make_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main(["bench", "--serve", "sd3", "--tiny", "--device", "cpu", "--size", "63x64", "-o", str(tmp_path)])
    assert end.value.code == 2
    assert "StableDiffusion3Pipeline refused: `height` and `width`" in capsys.readouterr().err


def test_rounds_of_other_code_are_not_gone_on_with(tmp_path, monkeypatch):
    same = {"command": "vivace bench --serve x", "facts": {"machine": "this"}, "servers": SERVERS, "again": False}
    first = rounds.record(tmp_path, "x", **same)
    first.write()
    assert rounds.record(tmp_path, "x", **same).path == first.path
    monkeypatch.setattr(rounds, "code", lambda: "another")
    assert rounds.record(tmp_path, "x", **same).path != first.path


class Clock(Allowance):
    """A budget on a clock that goes on by ten seconds with each picture of one step."""

    now, pace = 0.0, 10.0

    @property
    def taken(self):
        return self.now

    def check(self):
        super().check()
        self.now += 10

    def learn(self, server, requests, *, seconds):
        super().learn(server, requests, seconds=self.pace * len(requests))


def budgeted(folder, clock, rounds=1):
    """Four pictures of each server in a round; it is ready after eight, of which four are for the noise floor."""
    shape = {"concurrency": (1,), "pictures": 4 * rounds, "rounds": rounds}
    shape |= {"device": "cpu", "tiny": True, "steps": (1, 1)}
    path, left = serve.run("sd3", folder=folder, command="", allowed=clock, **shape)
    return json.loads(path.read_text())["rounds"], path.with_suffix(".md").read_text(), left


def test_a_budget_ends_between_two_servers_and_the_next_run_goes_on_with_the_other(tmp_path):
    lines, said, left = budgeted(tmp_path, clock := Clock(155))
    assert ([line["server"] for line in lines], left) == ([SERVERS[0]], 2)
    assert clock.now == 120  # the next would have taken 44 s more
    assert f"| {SERVERS[0]} |" in said
    lines, said, left = budgeted(tmp_path, clock := Clock(155))
    assert ([line["server"] for line in lines], left) == ([*SERVERS[:2]], 1)
    # Four of stock's pictures were drawn once more, to compare with, within the budget.
    assert clock.now == 150
    assert lines[0]["from_stock"] == 0
    assert 0 <= lines[1]["from_stock"] < 2
    lines, said, left = budgeted(tmp_path, Clock(200))
    assert ([line["server"] for line in lines], left) == ([*SERVERS], 0)
    assert said.count("| 1 |") == 3


def test_a_round_without_all_its_servers_is_shown_without_the_ratios_it_lacks(tmp_path):
    _, said, _ = budgeted(tmp_path, Clock(155))
    assert [cell.strip() for cell in said.splitlines()[2].split("|")][4:6] == ["1.000", "-"]


def test_pictures_that_take_longer_than_foreseen_end_with_the_budget(tmp_path):
    class Slower(Clock):
        pace = 1.0

    with pytest.raises(NoTime, match="over before a server of sd3 is measured"):
        budgeted(tmp_path, clock := Slower(85))
    assert clock.now == 90  # the picture that was under way was finished
    assert not list(tmp_path.glob("*.json"))


def test_a_budget_that_is_known_to_be_too_small_loads_nothing(tmp_path, monkeypatch):
    assert budgeted(tmp_path, Clock(240), rounds=2)[2] == 3
    monkeypatch.setattr(serve, "measure", None)
    with pytest.raises(NoTime, match="raise --budget-s"):
        budgeted(tmp_path, Clock(40), rounds=2)


def test_a_budget_is_that_of_all_models_together(tmp_path, monkeypatch, capsys):
    given = []

    def run(name, *, allowed, **options):
        given.append(allowed)
        if len(given) > 1:
            raise NoTime("over")
        path = tmp_path / "x.json"
        path.with_suffix(".md").write_text("")
        return path, 0

    monkeypatch.setattr(serve, "run", run)
    with pytest.raises(SystemExit) as end:
        main(["bench", "--serve", "sd3", "sd:1.5", "--budget-s", "9", "--device", "cpu", "-o", str(tmp_path)])
    assert end.value.code == 0
    assert given[0] is given[1]
    assert "sd:1.5 with exact is left for the next time" in capsys.readouterr().out


def test_one_command_says_when_nothing_fits(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main(["bench", "--serve", "sd3", "--tiny", "--device", "cpu", "--budget-s", "0", "-o", str(tmp_path)])
    assert end.value.code == 2
    assert "raise --budget-s" in capsys.readouterr().err
