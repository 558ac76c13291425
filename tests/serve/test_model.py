"""Models behind aliases: loaded when used, in one mode at a time, unloaded when others need the room."""

import gc
import itertools
import shutil
import threading
import time
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, WanPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import Module

from vivace import Config, InputError
from vivace.accelerate import accelerate, acceleration_of
from vivace.config import resolve
from vivace.evals.sample import draw
from vivace.families import FAMILIES
from vivace.few_step import FOLDER, WEIGHTS, use_few_step
from vivace.load import Source, find, load_source
from vivace.quant import folder as quantised
from vivace.serve import Engine, Request, Spec
from vivace.serve import model as serve_model
from vivace.serve.failures import Cancelled, DeadlineExceeded, FieldError, OutOfMemory, Unavailable
from vivace.serve.model import BUILDING, Mode, Model
from vivace.serve.prepare import prepare
from vivace.serve.room import Room
from vivace.serve.run import Run


@pytest.fixture
def folder(tmp_path, pipe):
    pipe.save_pretrained(tmp_path / "one")
    return tmp_path / "one"


def test_loaded_at_first_use_and_unloaded_least_recently_used_first(folder, order):
    aliases = ("a", "b", "c")
    with Engine(models={alias: str(folder) for alias in aliases}) as engine:
        assert not any(model.pipe for model in engine.models.values())
        first = {alias: engine.submit(order(model=alias, deterministic=True)).result(60) for alias in aliases[:2]}
        one = engine.models["a"].nbytes
        assert one > 0
        engine.room = Room(device=int(2.5 * one))
        engine.submit(order(model="a")).result(60)
        engine.submit(order(model="c")).result(60)
        assert [alias for alias in aliases if engine.models[alias].pipe] == ["a", "c"]
        again = engine.submit(order(model="b", deterministic=True)).result(60)
        assert again.pictures[0].tobytes() == first["b"].pictures[0].tobytes()
        assert engine.models["a"].pipe is None


def test_models_that_are_first_used_at_the_same_time(folder, pipe, order, lora_of, tmp_path):
    """While diffusers, transformers and peft make modules they change torch's own class for all threads."""
    save_file(lora_of(pipe.transformer), tmp_path / "style.safetensors")
    spec, register = (
        Spec(source=str(folder), loras={"style": tmp_path / "style.safetensors"}),
        Module.register_parameter,
    )
    with Engine(models=dict.fromkeys("abcd", spec)) as engine:
        engine.submit(order(model="a")).result(60)
        jobs = [engine.submit(order(model=alias, deterministic=True)) for alias in "bcd"]
        jobs += [engine.submit(order(model="a", lora={"style": weight})) for weight in (0.1, 0.2, 0.3)]
        found = [job.result(60).pictures[0].tobytes() for job in jobs]
    assert found[0] == found[1] == found[2]
    assert Module.register_parameter is register


def test_who_waits_for_anothers_load_can_be_cancelled(folder, order):
    with Engine(models={"a": str(folder)}) as engine:
        with BUILDING:
            job = engine.submit(order())
            deadline = time.monotonic() + 60
            while job.status == "queued":
                assert time.monotonic() < deadline
                time.sleep(0.01)
            job.cancel()
            with pytest.raises(Cancelled):
                job.result(30)
        engine.submit(order()).result(60)


@pytest.mark.parametrize("what", ["load_source", "accelerate"])
def test_a_loaded_model_draws_while_many_wait_for_anothers_load_or_change(folder, order, monkeypatch, what):
    real, at, go = getattr(serve_model, what), threading.Event(), threading.Event()

    def held(subject, *args, **options):
        if getattr(subject, "path", None) == folder or subject is engine.models["slow"].pipe:
            at.set()
            assert go.wait(120)
        return real(subject, *args, **options)

    quick = shutil.copytree(folder, folder.parent / "quick")
    with Engine(models={"quick": str(quick), "slow": str(folder)}, threads=4) as engine:
        engine.load("quick")
        monkeypatch.setattr(serve_model, what, held)
        jobs = [engine.submit(order(model="slow")) for _ in range(8)]
        assert at.wait(120)
        engine.submit(order(model="quick")).result(60)
        assert engine.running + engine.queued == len(jobs)
        assert not any(job.over for job in jobs)
        go.set()
        for job in jobs:
            job.result(60)


def test_those_who_wait_for_a_load_leave_a_place_and_take_it_when_it_is_there(folder, order, monkeypatch):
    """All of them at once: the places kept for other models are theirs again."""
    real, go, together = Run.__call__, threading.Event(), threading.Barrier(4)
    slow = shutil.copytree(folder, folder.parent / "slow")

    def held(source, **options):
        assert go.wait(120)
        return load_source(source, **options)

    monkeypatch.setattr(serve_model, "load_source", held)
    with Engine(models={"slow": str(slow), "other": str(folder)}, threads=4) as engine:
        jobs = [engine.submit(order(model="slow")) for _ in range(4)]
        deadline = time.monotonic() + 60
        while (engine.running, engine.queued) != (3, 1):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        monkeypatch.setattr(Run, "__call__", lambda run: (together.wait(60), real(run))[1])
        go.set()
        for job in jobs:
            job.result(60)


def test_no_model_is_parked_while_modules_are_made(folder):
    """Where it is parked, other accelerations hold, and those make modules too."""
    model = Model("a", Spec(source=str(folder)))
    model.ready(model.mode_of(Request()))
    parking = threading.Thread(target=model.park)
    with BUILDING:
        parking.start()
        parking.join(0.2)
        assert parking.is_alive()
    parking.join(60)
    assert model.parked_bytes > 0


def test_what_has_to_leave_is_parked_as_far_as_there_is_room(folder, order):
    """Here the host is the device, too: the weights stay where they are, and count as parked."""
    aliases = ("a", "b", "c", "d")
    with Engine(models={alias: str(folder) for alias in aliases}) as engine:
        models = [engine.models[alias] for alias in aliases]
        first = engine.submit(order(model="a", deterministic=True)).result(60).pictures[0].tobytes()
        one, weights = models[0].nbytes, next(models[0].pipe.transformer.parameters())
        engine.room = Room(device=int(1.5 * one), host=int(2.5 * one))
        for alias in ("b", "c"):
            engine.submit(order(model=alias)).result(60)
        assert [model.parked_bytes for model in models] == [one, one, 0, 0]
        assert [engine.loaded(alias) for alias in aliases] == [False, False, True, False]
        # It comes back with the same weights, as they were accelerated, and without its files.
        again = engine.submit(order(model="a", deterministic=True)).result(60).pictures[0].tobytes()
        assert again == first
        assert next(models[0].pipe.transformer.parameters()) is weights
        # A third one finds no room: who was parked for longest is dropped.
        engine.submit(order(model="d")).result(60)
        assert [model.parked_bytes for model in models] == [one, 0, one, 0]
        assert models[1].pipe is None


def test_a_pipeline_that_cannot_be_loaded_again_is_parked_and_given_back(folder, pipe, order):
    kind = type(pipe)
    with Engine(models={"given": pipe, "other": str(folder)}, memory=1, parked=2**30) as engine:
        engine.submit(order()).result(60)
        engine.submit(order(model="other")).result(60)
        assert engine.models["given"].parked_bytes > 0
        assert engine.models["given"].pipe is pipe
    assert type(pipe) is kind


def test_on_the_host_nothing_is_parked_unasked_and_nobody_leaves_who_works(folder, order):
    with Engine(models={"a": str(folder), "b": str(folder)}, memory=1) as engine:
        model = engine.models["a"]
        engine.submit(order(model="a")).result(60)
        mode = model.mode_of(order())
        assert model.reserve(mode)
        assert not model.park()
        assert not model.unload()
        model.leave()
        engine.submit(order(model="b")).result(60)
        assert model.pipe is None


def test_a_model_comes_when_those_that_work_have_made_room(folder, order, gated):
    aliases = ("a", "b", "c")
    with Engine(models={alias: str(folder) for alias in aliases}) as engine:
        models = [engine.models[alias] for alias in aliases]
        engine.load("a")
        one = models[0].nbytes
        engine.room = Room(device=int(1.5 * one))
        gate = gated(models[0].pipe.transformer)
        gate.shut()
        jobs = [engine.submit(order(model="a"))]
        assert gate.reached.wait(60)
        jobs.append(engine.submit(order(model="b")))
        while not models[0].closing:
            assert not jobs[1].over
        # It has been used all the time, and yet it takes nobody new before the other one had its turn.
        jobs.append(engine.submit(order(model="a")))
        given_up = engine.submit(order(model="c"))
        given_up.cancel()
        with pytest.raises(Cancelled):
            given_up.result(60)
        assert jobs[2].status == "queued"
        assert models[1].pipe is None
        gate.open.set()
        assert [job.result(60).effective["model"] for job in jobs] == ["a", "b", "a"]
        assert jobs[2].started > jobs[1].started
        assert sum(model.nbytes for model in models) == one


def test_at_the_start_no_model_drives_another_one_out(folder):
    with Engine(models={"a": str(folder), "b": str(folder)}, memory=1) as engine:
        engine.load()
        assert [engine.loaded(alias) for alias in engine.models] == [True, False]
        assert engine.health().ready
        engine.load("b")
        assert [engine.loaded(alias) for alias in engine.models] == [False, True]


def test_dropped_weights_are_gone_also_where_their_originals_were_not_kept(folder, order):
    few = Config(quant="int8", keep_base="no")
    with Engine(models={"a": Spec(source=str(folder), preset=few), "b": str(folder)}) as engine:
        engine.submit(order(model="a")).result(120)
        parts = engine.models["a"].pipe.components.items()
        held = {name: weakref.ref(part) for name, part in parts if isinstance(part, torch.nn.Module)}
        assert {"transformer", "text_encoder", "vae"} <= held.keys()
        del parts
        engine.room = Room(device=1)
        engine.submit(order(model="b")).result(60)
        assert engine.models["a"].pipe is None
        assert [name for name, one in held.items() if one() is not None] == []


def test_a_model_that_came_in_few_bits_takes_loras(order, lora_of, tmp_path):
    made = FAMILIES["sd3"].tiny()
    save_file(lora_of(made.transformer), tmp_path / "style.safetensors")
    accelerate(made, quant="int8", keep_base="no", fuse="off")
    quantised.write(made, tmp_path / "few", denoisers={"transformer": made.transformer})
    spec = Spec(source=str(tmp_path / "few"), loras={"style": str(tmp_path / "style.safetensors")})
    with Engine(models={"a": spec}) as engine:
        jobs = [engine.submit(order(model="a", deterministic=True, lora=lora)) for lora in ({}, {"style": 1.0}, {})]
        plain, styled, again = (job.result(120).pictures[0].tobytes() for job in jobs)
    assert styled != plain == again


def test_nobody_is_held_up_while_weights_are_parked(folder):
    model = Model("a", Spec(source=str(folder)))
    mode = model.mode_of(Request())
    assert model.reserve(mode)
    model.ready(mode)
    model.leave()
    move, on_the_way, arrive = model.pipe.to, threading.Event(), threading.Event()

    def slowly(*args):
        on_the_way.set()
        assert arrive.wait(60)
        return move(*args)

    model.pipe.to = slowly
    parking = threading.Thread(target=model.park)
    parking.start()
    assert on_the_way.wait(60)
    asked: list[bool] = []
    asking = threading.Thread(target=lambda: asked.append(model.reserve(mode)))
    asking.start()
    asking.join(5)
    assert asked == [False]
    assert not model.park()
    assert not model.unload()
    arrive.set()
    parking.join(60)
    assert model.parked_bytes > 0
    assert model.reserve(mode)


@pytest.mark.gpu
def test_a_parked_model_leaves_the_card_and_comes_back_the_same(folder, order):
    with Engine(models={"a": str(folder), "b": str(folder)}, memory=1, parked=2**30) as engine:
        first = engine.submit(order(model="a", deterministic=True)).result(120).pictures[0].tobytes()
        engine.submit(order(model="b")).result(120)
        parked = engine.models["a"]
        assert parked.parked_bytes > 0
        assert {p.device.type for p in parked.pipe.transformer.parameters()} == {"cpu"}
        assert parked.device.type == "cuda"
        again = engine.submit(order(model="a", deterministic=True)).result(120).pictures[0].tobytes()
        assert again == first
        assert {p.device.type for p in parked.pipe.transformer.parameters()} == {"cuda"}


def test_an_unknown_preset_is_said_before_anything_is_served(folder):
    with pytest.raises(InputError, match="unknown preset 'fsat'"):
        Engine(models={"tiny": Spec(source=str(folder), preset="fsat")})


def test_a_model_that_cannot_be_loaded_tells_no_path(folder, order):
    engine = Engine(models={"tiny": str(folder)})
    for file in folder.rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-100])
    assert engine.health().ready
    with engine:
        with pytest.raises(Unavailable) as error:
            engine.submit(order()).result(60)
        assert str(error.value) == "the model tiny cannot be loaded"
        assert engine.health().reason == "no model can be loaded"


def test_a_model_that_has_no_room_is_said_where_it_is_loaded(folder, monkeypatch):
    def no_room(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    with Engine(models={"tiny": str(folder)}) as engine:
        monkeypatch.setattr("vivace.serve.model.load_source", no_room)
        with pytest.raises(OutOfMemory, match="too little memory for the model tiny"):
            engine.load()
        assert engine.health().reason == "no model can be loaded"
        monkeypatch.undo()
        engine.load()
        assert engine.health().ready


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, OSError])
def test_what_was_loaded_of_a_model_goes_with_the_load_that_failed(folder, order, monkeypatch, error):
    loaded: list[weakref.ref[torch.nn.Module]] = []

    def half(*args, **kwargs):
        pipe = load_source(*args, **kwargs)
        loaded.append(weakref.ref(pipe.transformer))
        raise error

    monkeypatch.setattr("vivace.serve.model.load_source", half)
    with Engine(models={"tiny": str(folder)}) as engine:
        job = engine.submit(order())
        with pytest.raises((OutOfMemory, Unavailable)):
            job.result(60)
        gc.collect()
        assert [one() for one in loaded] == [None]


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"), OutOfMemory),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), Unavailable),
    ],
)
def test_what_befalls_the_device_while_weights_are_read_is_not_the_models_fault(
    folder, order, monkeypatch, error, told
):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", fail)
    with Engine(models={"tiny": str(folder)}) as engine:
        with pytest.raises(told):
            engine.submit(order()).result(60)
        assert engine.lost == (told is Unavailable)


@pytest.mark.parametrize("told", [Cancelled, DeadlineExceeded])
def test_the_end_of_a_request_does_not_wait_for_the_load_that_it_began(folder, order, monkeypatch, told):
    begun, over = threading.Event(), threading.Event()

    def slowly(*args, **kwargs):
        begun.set()
        assert over.wait(60)
        return load_source(*args, **kwargs)

    monkeypatch.setattr("vivace.serve.model.load_source", slowly)
    with Engine(models={"tiny": str(folder)}) as engine:
        job = engine.submit(order(run_seconds=0.5 if told is DeadlineExceeded else None))
        assert begun.wait(60)
        if told is Cancelled:
            job.cancel()
        try:
            with pytest.raises(told):
                job.result(10)
        finally:
            over.set()
        assert engine.submit(order()).result(60).pictures


def test_a_device_that_is_lost_while_a_model_is_loaded_is_lost(folder, order, monkeypatch):
    def illegal(*args, **kwargs):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr("vivace.serve.model.load_source", illegal)
    for load in (Engine.load, lambda engine: engine.submit(order()).result(60)):
        with Engine(models={"tiny": str(folder)}) as engine:
            with pytest.raises(Unavailable, match="the device is lost"):
                load(engine)
            assert engine.lost


def test_a_model_that_could_not_be_parked_is_brought_back_whole(folder):
    model = Model("a", Spec(source=str(folder)))
    mode = model.mode_of(Request())
    model.ready(mode)
    move, asked = model.pipe.to, list[object]()

    def to(place):
        asked.append(place)
        if len(asked) == 1:
            raise MemoryError
        return move(place)

    model.pipe.to = to
    with pytest.raises(MemoryError):
        model.park()
    model.ready(mode)
    assert asked == ["cpu", torch.device("cpu")]
    assert model.nbytes > 0


def test_a_place_that_this_machine_lacks_is_said_before_anything_is_served(folder):
    with pytest.raises(InputError, match="no device cuda:99"):
        Engine(models={"tiny": Spec(source=str(folder), device="cuda:99")})
    with pytest.raises(InputError, match="no dtype 'float99'"):
        Engine(models={"tiny": Spec(source=str(folder), dtype="float99")})


def test_one_mode_at_a_time(pipe):
    model = Model("tiny", Spec(source=pipe))
    plain, styled, alone = Mode(preset=Config()), Mode(preset=Config(), loras=(("x", 1.0),)), Mode(preset=None, alone=1)
    assert model.reserve(plain)
    assert model.reserve(plain)
    assert not model.reserve(styled)
    model.leave()
    model.leave()
    assert model.reserve(alone)
    assert not model.reserve(alone)
    assert not model.unload()
    model.leave()
    assert model.reserve(styled)
    model.leave()


def test_the_same_by_another_spelling_is_the_same_mode(pipe):
    model = Model("tiny", Spec(source=pipe))
    plain, *others = map(model.mode_of, (Request(), Request(quality="exact"), Request(cache="none")))
    assert others == [plain, plain]
    assert model.mode_of(Request(cache="firstblock")) != plain


def test_what_changes_the_shared_denoiser_runs_alone(start, order):
    engine = start(FAMILIES["sd3"].tiny("StableDiffusion3PAGPipeline"))
    jobs = [engine.submit(order(seed=seed, arguments={"pag_scale": 2.0})) for seed in range(3)]
    spans = [(job.result(60), job.started, job.finished) for job in jobs]
    ordered = sorted(spans, key=lambda span: span[1])
    assert all(after[1] >= before[2] - 0.05 for before, after in itertools.pairwise(ordered))
    assert all(span[0].calls["requests_per_call"] == 1 for span in spans)


def test_another_class_knows_what_the_model_says_of_itself(start, order):
    """Wan 2.2 TI2V 5B makes videos of text and of pictures: for these its denoiser needs no channels of their own."""
    parts = FAMILIES["wan"].tiny("WanVideoToVideoPipeline").components
    engine = start(WanPipeline(**parts, transformer_2=None, expand_timesteps=True))
    picture = Image.linear_gradient("L").convert("RGB")
    plain, moved = (engine.submit(order(frames=5, images=some)).result(60) for some in ((), (picture,)))
    assert len(moved.pictures) == 5
    assert moved.pictures[0].tobytes() != plain.pictures[0].tobytes()


def test_a_size_that_a_class_goes_without_is_no_request_for_it():
    source = Source(name="edit", path=None, pipeline="QwenImageEditInpaintPipeline", family=FAMILIES["qwen_image"])
    picture = Image.new("RGB", (64, 64))
    request = Request(prompt="a", images=(picture,), mask=picture.convert("L"))
    assert prepare(request, source).pipeline.__name__ == source.pipeline
    with pytest.raises(FieldError, match="goes by the shape of its image"):
        prepare(replace(request, size=(64, 64)), source)


@pytest.mark.parametrize("given", [None, Config(cache="firstblock:threshold=0.01", quant="int8")])
def test_without_a_preset_a_request_gets_the_pipeline_as_it_came_whoever_was_before(pipe, order, given):
    if given is not None:
        accelerate(pipe, given)
    plain, rough = order(steps=8, deterministic=True), order(steps=8, cache="firstblock:threshold=0.5")
    with Engine(models={"tiny": Spec(source=pipe, preset=None)}) as engine:
        before = engine.submit(plain).result(60)
        assert engine.submit(rough).result(60).calls["skipped"] > 0
        assert acceleration_of(pipe).target.config == resolve(given, cache=rough.cache)  # and else as it came
        after = engine.submit(plain).result(60)
        assert after.effective == before.effective
        assert after.pictures[0].tobytes() == before.pictures[0].tobytes()
        engine.submit(rough).result(60)
    acceleration = acceleration_of(pipe)
    assert (acceleration and acceleration.target.config.cache) == (resolve(given).cache if given else None)


def test_the_engine_gives_a_pipeline_back_as_it_was(pipe, order):
    kind, threads = type(pipe), threading.active_count()
    with Engine(models={"tiny": pipe}) as engine:
        engine.submit(order()).result(60)
        assert type(pipe) is not kind
    assert type(pipe) is kind
    assert threading.active_count() == threads


def test_a_models_few_step_student_is_served():
    """At its own steps and guidance, beside the model itself, and as the pipeline alone draws it."""
    orders = [Request(prompt=prompt, model="quick", seed=seed, deterministic=True) for prompt, seed in
              (("a red circle", 3), ("a blue ring above a green star", 4))]  # fmt: skip
    with Engine(models={"full": "builtin", "quick": Spec(few_step=True)}) as engine:
        found = [job.result(300) for job in [engine.submit(order) for order in orders]]
        with pytest.raises(InputError, match="brings its own scheduler; leave this one out"):
            engine.submit(Request(prompt="a red circle", model="quick", scheduler="euler"))
        assert engine.models["full"].pipe is None
        assert engine.models["full"].source.defaults["steps"] > 4
    source = find("builtin")
    pipe = use_few_step(load_source(source), source.path / FOLDER)
    for order, result in zip(orders, found, strict=True):
        (alone,) = draw(pipe, [order.prompt], steps=4, seeds=[order.seed], guidance_scale=1.0, output_type="pil")
        apart = np.asarray(alone, np.int16) - np.asarray(result.pictures[0], np.int16)
        assert np.abs(apart).max() <= 3


def test_a_few_step_student_that_is_not_there_is_said_at_once(folder, pipe):
    with pytest.raises(InputError, match="has no few-step student"):
        Engine(models={"quick": Spec(source=str(folder), few_step=True)})
    with pytest.raises(InputError, match="put the student in"):
        Engine(models={"quick": Spec(source=pipe, few_step=True)})


def test_a_few_step_student_that_does_not_fit_leaves_no_model_to_draw_without_it(tmp_path):
    shutil.copytree(find("builtin").path, tmp_path / "model")
    weights = tmp_path / "model" / FOLDER / WEIGHTS
    save_file({name.replace("blocks.0", "blocks.99"): value for name, value in load_file(weights).items()}, weights)
    with Engine(models={"quick": Spec(source=str(tmp_path / "model"), few_step=True)}) as engine:
        for _ in range(2):
            with pytest.raises(Unavailable, match="quick cannot be loaded"):
                engine.submit(Request(prompt="a red circle")).result(100)
        assert not engine.health().ready
