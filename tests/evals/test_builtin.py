import pytest
import torch

from vivace.builtin.captions import facts
from vivace.builtin.judge import PARTS, judge
from vivace.builtin.reader import Reader, Reading, Seen
from vivace.errors import InputError
from vivace.evals.builtin import Answers, Exam, distribution, draw_exam, metrics, rendered, take


def perfect_reading(exam: Exam, row: int) -> Reading:
    """What a reader without error would read in the true render of one scene."""
    count, background, ground, *rest = facts(exam.scenes)[row]
    centres = exam.scenes.centre[row].tolist()
    objects = [(*rest[4 * slot : 4 * slot + 3], bool(rest[4 * slot + 3]), *centres[slot]) for slot in range(count)]
    return Reading(tuple(Seen(*each) for each in objects), background, ground, doubtful=False)


@pytest.fixture(scope="module")
def reader() -> Reader:
    torch.manual_seed(0)
    return Reader().eval().requires_grad_(False)


def test_an_exam_is_a_third_each_and_repeats_itself():
    exam = draw_exam(100, seed=5)
    assert [exam.counts.count(name) for name in ("1 object", "2 objects", "3 objects")] == [34, 33, 33]
    assert len(exam.scenes) == len(exam.captions) == 100
    assert draw_exam(100, seed=5).captions == exam.captions
    assert draw_exam(100, seed=6).captions != exam.captions
    with pytest.raises(InputError, match="got 2"):
        draw_exam(2)


def test_an_exam_asks_for_held_out_combinations_too():
    groups = draw_exam(600).combinations
    assert groups.count("1 object") == 200
    assert 20 < groups.count("2-3 objects, held-out combinations") < 200


def test_perfect_pictures_get_full_marks_and_shuffled_ones_do_not(reader):
    exam = draw_exam(60)
    readings = [perfect_reading(exam, row) for row in range(60)]
    assert all(reading["right"] for reading in map(judge, readings, exam.said))
    assert sum(reading["right"] for reading in map(judge, readings[1:] + readings[:1], exam.said)) <= 3


def test_metrics_count_by_group_and_put_a_floor_beside_the_distance(reader):
    exam = draw_exam(20)
    verdicts = tuple(dict.fromkeys((*PARTS, "right"), len(said.things) < 3) for said in exam.said)
    rows = metrics(exam, Answers(verdicts=verdicts, features=rendered(exam, reader), seconds=9.0), reader)
    accuracy = {row.of: (row.value, row.count) for row in rows if row.name == "caption accuracy"}
    assert accuracy["all"] == (70.0, 20)
    assert [accuracy[n] for n in ("1 object", "2 objects", "3 objects")] == [(100.0, 7), (100.0, 7), (0.0, 6)]
    assert {row.of: row.value for row in rows if row.name == "part right"} == dict.fromkeys(PARTS, 70.0)
    # These pictures are the renders of the exam's own scenes, so they stand on the floor; twenty are too few for FID.
    kids = [row.value for row in rows if row.name == "KID"]
    assert len(kids) == 2
    assert kids[0] == kids[1]
    assert not any(row.name == "FID" for row in rows)
    assert rows[-1].value == 0.45


def test_distribution_finds_a_set_that_is_elsewhere():
    features = [torch.randn(200, 64, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    (near, near_kid), (far, far_kid) = (distribution(features[0] + shift, features[1], of="x") for shift in (0, 0.5))
    assert (near.name, near_kid.name) == ("FID", "KID")
    assert far.value - near.value == pytest.approx(64 * 0.25, rel=0.2)
    assert near_kid.low < 0 < near_kid.high
    assert far_kid.low > 0
    # The unit of the features is the reader's own affair.
    _, large = distribution(100 * (features[0] + 0.5), 100 * features[1], of="x")
    assert large.value == pytest.approx(far_kid.value, rel=1e-4)


def test_a_pipeline_takes_an_exam(pipe, reader):
    exam, told = draw_exam(60), []
    answers = take(exam, pipe, reader, steps=1, on_pictures=told.append, height=64, width=64)
    assert told == [50, 60]
    assert len(answers.verdicts) == 60
    assert answers.features.shape == (60, 64)
    assert not any(verdict["right"] for verdict in answers.verdicts)
