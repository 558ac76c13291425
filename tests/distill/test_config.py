"""Values that cannot be are refused before any model is read."""

from datetime import date
from pathlib import Path

import pytest

from vivace.distill import Conditioner, Critic, Data, Discriminator, DistillConfig, Optimizer, Records, Stage, Student
from vivace.errors import InputError

GOOD = {"output": "out", "stages": (Stage(batches=1),), "data": Data(kind="builtin")}


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        ({"steps": 30}, r"stages\[0\]\.steps is 30, which does not divide into 4 modes; the nearest that does is 32"),
        ({"steps": 2}, "the nearest that does is 4"),
        ({"batches": 0}, "both have to be 1 or more"),
        ({"guidance": (7.0, 3.0)}, r"guidance is \[7\.0, 3\.0\]; it takes \[least, most\]"),
        ({"modes": (0.0, 0.0)}, "not all 0"),
        ({"modes": (0.5, -0.5)}, "weights of 0 or more"),
        ({"matching": -1.0}, "negative weight"),
        ({"simulated": 1.5}, r"stages\[0\].simulated is 1.5; it is a share from 0 to 1"),
        ({"distillation": 0.0}, "weighs nothing"),
    ],
)
def test_stages(stage, said):
    with pytest.raises(InputError, match=said):
        DistillConfig(**{**GOOD, "stages": (Stage(**{"batches": 1, **stage}),)})


def test_steps_need_not_divide_where_modes_are_not_used():
    DistillConfig(**{**GOOD, "stages": (Stage(batches=1, steps=30),)}, timesteps="uniform")


def test_no_modes_at_all_leave_no_steps_of_the_student_under_any_mixture():
    with pytest.raises(InputError, match=r"modes is \[\]; it takes weights of 0 or more, not all 0"):
        DistillConfig(**{**GOOD, "stages": (Stage(batches=1, modes=()),)}, timesteps="uniform")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"stages": ()}, "stages is empty"),
        (
            {"conditioners": (Conditioner(join="vector", source="x"),), "records": Records(prompts=("a",))},
            "with conditioners sample grids show the data's first pictures",
        ),
        (
            {"conditioners": (Conditioner(join="argument", source="x"),)},
            r"conditioners\[0\]: join: argument and argument",
        ),
        (
            {"conditioners": (Conditioner(join="vector", source="x", options={"since": date(2024, 1, 1)}),)},
            r"conditioners\[0\]\.options is \{'since': datetime.date.* it takes text, numbers and lists",
        ),
        ({"accelerate": "exakt"}, "unknown preset 'exakt'; the nearest is 'exact'"),
        (
            {"stages": (Stage(batches=1, distillation=float("nan")),)},
            r"stages\[0\]\.distillation is nan; it takes a fin",
        ),
        ({"stages": (Stage(batches=1, modes=(0, 0, 0, float("nan"))),)}, r"stages\[0\]\.modes\[3\] is nan"),
        ({"optimizer": Optimizer(lr=float("inf"))}, r"optimizer\.lr is inf; it takes a finite number"),
        ({"discriminator": Discriminator(times=())}, r"discriminator\.times is \[\]; it takes noise levels from 0"),
        ({"discriminator": Discriminator(times=(10, 2000))}, r"discriminator\.times is \[10.0, 2000.0\]"),
        ({"critic": Critic()}, "serves distribution matching, which no stage weighs"),
        ({"critic": Critic(updates=0)}, r"critic\.updates is 0; it has to be 1 or more"),
        ({"student": Student(targets=())}, r"student\.targets is empty; give endings of module names"),
        ({"batch": 0}, "batch is 0; it has to be 1 or more"),
        ({"size": (0, 64)}, "size is"),
        ({"distance": "lpips"}, "lpips_weights go together"),
        ({"data": Data(kind="shards")}, r"data\.path is missing"),
        ({"data": Data(kind="builtin", ratios=(0.5, 1.0))}, r"data\.ratios is for pictures that lie somewhere"),
        ({"method": "consistency", "solver": "multistep"}, "method: consistency takes one solver step"),
        (
            {
                "method": "consistency",
                "stages": (Stage(batches=1, adversarial=0.1),),
                "discriminator": Discriminator(real="teacher"),
            },
            r"the teacher reaches no picture; set discriminator\.real: data",
        ),
        ({"data": Data(kind="builtin", ratios=(0.0,))}, r"data\.ratios is \[0\.0\]"),
    ],
)
def test_fields(fields, said):
    with pytest.raises(InputError, match=said):
        DistillConfig(**{**GOOD, **fields})


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"method": "consistancy"}, "method is 'consistancy'; it is one of flash, consistency"),
        ({"timesteps": "unifrom"}, "timesteps is 'unifrom'; it is one of modes"),
        ({"solver": "eulr"}, "solver is 'eulr'; it is one of auto"),
        ({"distance": "l3"}, "distance is 'l3'; it is one of l2"),
        ({"parallel": "fsdp3"}, "parallel is 'fsdp3'; it is one of ddp"),
        ({"precision": "float16"}, "precision is 'float16'; it is one of float32"),
        ({"student": Student(kind="lroa")}, r"student\.kind is 'lroa'; it is one of lora, full"),  # type: ignore[arg-type]
        ({"student": Student(targets="to_q")}, r"student\.targets is 'to_q'; it takes a list"),  # type: ignore[arg-type]
        ({"student": {"rnk": 3}}, r"unknown key student\.rnk; the nearest is student\.rank"),
        ({"discriminator": Discriminator(loss="hing")}, r"discriminator\.loss is 'hing'; it is one of hinge"),  # type: ignore[arg-type]
        ({"batch": "2"}, "batch is '2'; it takes a whole number"),
        ({"size": (64, 64, 64)}, r"size is \(64, 64, 64\); it takes 2 values"),
        ({"output": Path("out")}, r"output is PosixPath\('out'\); it takes text"),
        ({"stages": (Stage(batches=1.5),)}, r"stages\[0\]\.batches is 1\.5; it takes a whole number"),  # type: ignore[arg-type]
    ],
)
def test_what_python_gives_is_held_against_its_type_too(fields, said):
    with pytest.raises(InputError, match=said):
        DistillConfig(**{**GOOD, **fields})


def test_lists_and_mappings_become_what_they_stand_for():
    made = DistillConfig(**{**GOOD, "stages": [Stage(batches=1, guidance=[2, 3])], "student": {"rank": 8}})  # type: ignore[arg-type]
    assert made.stages == (Stage(batches=1, guidance=(2.0, 3.0)),)
    assert made.student == Student(rank=8)


def test_batches_are_those_of_all_stages():
    assert DistillConfig(**{**GOOD, "stages": (Stage(batches=3), Stage(batches=4))}).batches == 7
