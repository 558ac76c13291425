"""Contestants on disk: resumable, beside floor and controls, and judged by what they drew."""

import csv
import json
from dataclasses import replace

import pytest
import torch
from PIL import Image

from vivace import Config, InputError
from vivace.accelerate import acceleration_of
from vivace.evals.comparison import draw_all, write_all
from vivace.evals.contest import Contest, Contestant, contestants, controls_of
from vivace.evals.instruments import Dataset, Instruments
from vivace.evals.store import Record, Store
from vivace.evals.verdict import judge, temporal_error
from vivace.families import FAMILIES

PROMPTS = ("a fox", "a red house", "seven cats")
CACHES = {"gentle": Config(cache="steps:compute=0-5,7"), "bold": Config(cache="steps:compute=0-1,5")}


@pytest.fixture(scope="module")
def tiny():
    return FAMILIES["sd3"].tiny()


def contest_in(folder, pipe, **fields) -> Contest:
    call = {"height": 64, "width": 64, "guidance_scale": 4.0}
    fields = {"model": "tiny", "prediction": "flow", "prompts": PROMPTS, "steps": 8, "call": call, **fields}
    return Contest(pipe=pipe, store=Store(folder, rank=fields.get("rank", 0)), **fields)


@pytest.fixture(scope="module")
def compared(tiny, tmp_path_factory):
    contest = contest_in(tmp_path_factory.mktemp("contest"), tiny)
    reference, others = draw_all(contest, presets=["exact"], configs=CACHES)
    return contest, write_all(contest, reference, others, about={"model": "tiny", "seed": 0})


def test_the_closer_cache_is_closer_and_the_floor_is_closest(compared):
    _, written = compared
    mean = {v.contestant.name: v.distances["PSNR"].mean() for v in written.verdicts if v.distances}
    assert mean["floor: stock, in pairs"] > mean["gentle"] > mean["bold"]
    shares = {v.contestant.name: v.computed for v in written.verdicts}
    assert (shares["gentle"], shares["bold"], shares["exact"]) == (7 / 8, 3 / 8, None)


def test_what_is_written(compared):
    contest, written = compared
    folder = contest.store.folder
    document = json.loads((folder / "metrics.json").read_text())
    assert [v["name"] for v in document["verdicts"]][:4] == ["exact", "floor: stock, in pairs", "gentle", "bold"]
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    assert len(rows) == len(PROMPTS) * len(written.verdicts)
    assert {float(row["PSNR"]) > 20 for row in rows if row["contestant"] == "gentle"} == {True}
    page = written.report.read_text()
    assert page.count("data:image/jpeg;base64,") >= 3 * len(PROMPTS)
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")
    for name in ("gentle", "bold", "a red house"):
        assert name in page
    sheet = Image.open(written.sheet)
    assert sheet.width > sheet.height > 3 * 192
    assert Image.open(folder / "speed_quality.png").width > 1000


def test_a_second_run_draws_nothing_and_the_pipeline_is_stock(compared, tiny):
    contest, _ = compared
    before = contest.store.records()
    again = contest_in(contest.store.folder, tiny)

    def fail(*args):
        raise AssertionError("drawn again")

    again._draw = fail
    reference, candidates = contestants(presets=["exact"], configs=CACHES, steps=8)
    for contestant in (reference, *candidates):
        again.run(contestant)
    assert again.store.records() == before
    assert acceleration_of(tiny) is None


def test_times_and_memory_are_of_the_pipelines_own_gpu(tiny, tmp_path, monkeypatch):
    """`--device cuda:1`: waiting for the current GPU, which is the first, would time the launches alone."""
    asked: list[tuple[str, torch.device | None]] = []
    for name in ("synchronize", "reset_peak_memory_stats", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda device=None, name=name: asked.append((name, device)) or 1)
    second = torch.device("cuda", 1)
    contest = contest_in(tmp_path, tiny, prompts=PROMPTS[:1], device=second)
    contest.run(Contestant(name="exact", role="reference", config=None, steps=2))
    assert {name for name, _ in asked} == {"synchronize", "reset_peak_memory_stats", "max_memory_allocated"}
    assert {device for _, device in asked} == {second}


def test_other_settings_are_drawn_anew(compared, tiny):
    contest, _ = compared
    reference, _ = contestants(presets=["exact"], configs={}, steps=8)
    other = contest_in(contest.store.folder, tiny, seed=5)
    assert len(contest.of(reference)) == 3
    assert other.of(reference) == []


@pytest.mark.parametrize("name", ["planned", "teacache", "firstblock"])
def test_with_a_calibration_made_anew_a_cache_is_another(tiny, tmp_path, name):
    contest, file = contest_in(tmp_path, tiny), tmp_path / "calibration.json"
    keys = []
    for text in ("one", "two", "two"):
        file.write_text(text)
        cache = Config(cache=f"{name}:file={file}")
        keys.append(contest.key(Contestant(name=name, role="candidate", config=cache, steps=8), 0))
    assert keys[0] != keys[1] == keys[2]


def test_a_long_name_is_a_folder_of_its_own(tiny, tmp_path):
    contest = contest_in(tmp_path, tiny, steps=2, prompts=("a fox",))
    names = [f"planned:file=/{'long' * 90}/{end}" for end in "ab"]
    for name in names:
        contest.run(Contestant(name=name, role="candidate", config=Config(), steps=2))
    assert len({contest.store.picture(name, 0) for name in names}) == 2
    assert all(contest.store.picture(name, 0).is_file() for name in names)


def test_names_that_differ_in_what_no_folder_has_are_folders_of_their_own(tmp_path):
    store = Store(tmp_path)
    names = ["planned:file=a/c.json", "planned:file=a_c.json", "planned_file=a_c.json", "exact", "EXACT é"]
    assert len({store.picture(name, 0) for name in names}) == len(names)


def test_a_picture_that_is_gone_is_drawn_anew(tiny, tmp_path):
    contest = contest_in(tmp_path, tiny, steps=2, prompts=("a fox",))
    reference, _ = contestants(presets=["exact"], configs={}, steps=2)
    contest.run(reference)
    contest.store.picture(reference.name, 0).unlink()
    contest.run(reference)
    assert contest.store.picture(reference.name, 0).is_file()


def test_stopped_and_resumed(tiny, tmp_path):
    contest = contest_in(tmp_path, tiny)
    reference, _ = contestants(presets=["exact"], configs={}, steps=8)
    stock, count = contest._draw, []

    def draw(*args):
        count.append(1)
        if len(count) == 3:
            raise KeyboardInterrupt
        return stock(*args)

    contest._draw = draw
    with pytest.raises(KeyboardInterrupt):
        contest.run(reference)
    assert len(contest.of(reference)) == 1
    (tmp_path / "records-0.jsonl").open("a").write('{"contestant": "exact", "ind')
    contest._draw = stock
    contest.run(reference)
    assert len(contest.of(reference)) == 3


def test_two_processes_draw_their_shares(tiny, tmp_path):
    reference, _ = contestants(presets=["exact"], configs={}, steps=4)
    for rank in range(2):
        contest = contest_in(tmp_path, tiny, steps=4, rank=rank, ranks=2)
        contest.run(reference)
    assert [record.index for record in contest.of(reference)] == [0, 1, 2]
    alone = contest_in(tmp_path, tiny, steps=4, seed=7)
    alone.run(reference)
    assert [record.seed for record in alone.of(reference)] == [7, 8, 9]


def test_controls_have_the_candidates_time(tiny, tmp_path):
    contest = contest_in(tmp_path, tiny)
    reference = Contestant(name="exact", role="reference", config=Config(), steps=8)
    half = replace(reference, name="half", role="candidate")
    slow = replace(half, name="slow")

    def keep(contestant: Contestant, *, seconds: float, level: float) -> None:
        # A machine's other work falls upon the last one, which says nothing about the contestants.
        for index, taken in enumerate((seconds, seconds, 9.0)):
            record = Record(
                contestant=contestant.name, index=index, prompt=contest.prompts[index], seed=index, seconds=taken,
                computed=None, key=contest.key(contestant, index),
            )  # fmt: skip
            contest.store.keep(record, latents=torch.ones(1, 2), frames=torch.full((1, 3, 16, 16), level))

    keep(reference, seconds=2.0, level=0.5)
    keep(half, seconds=0.8, level=0.4)
    keep(slow, seconds=2.1, level=0.5)
    controls = controls_of(contest, reference, [half, slow])
    assert {(c.scheduler, c.steps) for c in controls} == {(None, 4), ("unipc", 4), ("dpmsolvermultistep", 4)}
    _, first, second = judge(contest, reference, [half, slow])
    assert first.speedup == pytest.approx(2.5)
    assert (first.wins, second.wins) == ("no control was drawn", "saves less than a step")
    # The controls' 4 steps take longer than the candidate: they were rounded up, and count all the same.
    for control, level in zip(controls, (0.3, 0.45, 0.3), strict=True):
        keep(control, seconds=1.0, level=level)
    assert judge(contest, reference, [half, *controls])[1].wins == "loses to unipc, 4 steps"


def test_what_is_not_finite_is_no_contestant(tmp_path):
    """In 8 bits NaN would be black: as near to another black picture as can be."""
    broken = FAMILIES["sd3"].tiny()
    contest = contest_in(tmp_path, broken, steps=2)
    reference, _ = contestants(presets=["exact"], configs={}, steps=2)
    with torch.no_grad():
        broken.transformer.proj_out.bias.fill_(torch.nan)
    with pytest.raises(InputError, match="exact draws numbers that are not finite"):
        contest.run(reference)
    assert contest.store.records() == {}
    assert acceleration_of(broken) is None


def test_a_candidate_that_cannot_be_is_said_before_anything_is_drawn(tiny, tmp_path):
    contest = contest_in(tmp_path, tiny)
    with pytest.raises(InputError, match="no TeaCache polynomial"):
        draw_all(contest, presets=["exact"], configs={"tea": Config(cache="teacache")})
    assert contest.store.records() == {}
    assert acceleration_of(tiny) is None


def test_what_does_not_fit_is_said_and_the_floor_goes_on_one_by_one(tmp_path, caplog):
    """A card on which two prompts at a time, or that cache, run out of memory."""
    small = FAMILIES["sd3"].tiny()
    contest = contest_in(tmp_path, small, steps=2)
    reference, _ = contestants(presets=["exact"], configs={}, steps=2)
    rows = []

    def full(module, args, kwargs):
        rows.append(len(kwargs["hidden_states"]))
        if rows[-1] > contest.room:
            raise torch.OutOfMemoryError("CUDA out of memory")

    contest.room = 2  # with guidance one picture is two rows
    small.transformer.register_forward_pre_hook(full, with_kwargs=True)
    floor = contest.floor(reference)
    assert (floor.name, len(contest.of(floor))) == ("floor: stock, one by one", 3)
    assert max(rows) == 4
    assert "the floor is drawn one by one" in caplog.text
    contest.room = 1
    with pytest.raises(InputError, match="bold needs more memory than there is"):
        contest.run(Contestant(name="bold", role="candidate", config=CACHES["bold"], steps=8))
    assert acceleration_of(small) is None


def test_a_floor_in_pairs_has_no_time_of_its_own(compared):
    """Three prompts: the last one is drawn alone."""
    _, written = compared
    (floor,) = (v for v in written.verdicts if v.contestant.role == "floor")
    assert floor.seconds is None


def test_a_flicker_is_seen_by_no_frame_but_by_their_order():
    from vivace.evals.store import Drawn

    still = Drawn(latents=torch.zeros(1), frames=torch.rand(5, 3, 16, 16))
    flicker = Drawn(
        latents=torch.zeros(1), frames=still.frames + 0.1 * torch.tensor([1, -1, 1, -1, 1]).view(5, 1, 1, 1)
    )
    brighter = Drawn(latents=torch.zeros(1), frames=still.frames + 0.1)
    assert temporal_error(still, still).item() == 0
    assert temporal_error(brighter, still).item() == pytest.approx(0, abs=1e-6)
    assert temporal_error(flicker, still).item() > 0.3
    frozen = Drawn(latents=torch.zeros(1), frames=torch.full((3, 3, 16, 16), 0.5))
    assert temporal_error(frozen, frozen).item() == 0
    a_level = Drawn(latents=torch.zeros(1), frames=frozen.frames + torch.tensor([0, 1, 0]).view(3, 1, 1, 1) / 255)
    assert temporal_error(a_level, frozen).item() == pytest.approx(1)


def test_mistakes_are_said():
    with pytest.raises(InputError, match="unknown preset 'fastest'"):
        contestants(presets=["exact", "fastest"], configs={}, steps=8)
    with pytest.raises(InputError, match="a candidate too"):
        contestants(presets=["exact"], configs={"exact": Config()}, steps=8)


def test_captions_and_datasets_are_measured_for_the_reference_too(compared, tiny, tmp_path):
    contest, _ = compared
    for index, level in enumerate((0, 60, 120, 180, 240, 250)):
        Image.new("RGB", (8, 8), (level, index, 9)).save(tmp_path / f"{index}.png")
    dataset = Dataset.of(tmp_path, lambda pictures: pictures.mean((1, 2, 3))[:, None], distances=("FID",))
    lengths = Instruments(
        captioned={"letters": lambda frames, said: torch.tensor([float(len(s)) for s in said])}, dataset=dataset
    )
    reference = Contestant(name="exact", role="reference", config=Config(), steps=8)
    (verdict,) = judge(contest, reference, [], instruments=lengths)
    assert verdict.distances["letters"].tolist() == [len(prompt) for prompt in PROMPTS]
    assert [row.name for row in verdict.metrics] == ["letters", "FID", "time"]
    assert '"FID"' in json.dumps(verdict.to_dict())
