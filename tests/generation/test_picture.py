"""Pictures on disk."""

import pytest
from PIL import Image

from vivace.errors import InputError
from vivace.generation import picture

RED = Image.new("RGB", (16, 8), "red")


def test_a_picture_carries_what_made_it(tmp_path):
    path = tmp_path / "out.png"
    settings = {"steps": 28, "model": "builtin"}
    picture.write(RED, path, prompt="ein rotes Quadrat, größer als 赤い円", seed=7, settings=settings)
    made = picture.facts(path)
    assert (made["prompt"], made["seed"], made["settings"]) == ("ein rotes Quadrat, größer als 赤い円", 7, settings)
    assert made["size"] == [16, 8]
    assert list(Image.open(path).get_flattened_data()) == list(RED.get_flattened_data())


def test_the_same_picture_is_the_same_file(tmp_path):
    for name in ("a.png", "b.png"):
        picture.write(RED, tmp_path / name, prompt="red", seed=1, settings={"b": 1, "a": 2})
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_nothing_half_written_is_left_and_nothing_lost(tmp_path, error):
    path = tmp_path / "out.png"
    path.write_text("before")

    class Full(Image.Image):
        def save(self, file, **options):
            file.write_text("half")
            raise error

    with pytest.raises(error):
        picture.write(Full(), path, prompt="", seed=0, settings={})
    assert [file.name for file in tmp_path.iterdir()] == ["out.png"]
    assert path.read_text() == "before"


def test_a_failing_disk_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="cannot write"):
        picture.write(RED, tmp_path / "no" / "out.png", prompt="", seed=0, settings={})


def test_a_foreign_picture_says_nothing(tmp_path):
    Image.new("RGB", (16, 8), "red").save(tmp_path / "plain.png")  # Pillow remembers what RED was saved with
    (tmp_path / "text.png").write_text("not a picture")
    with pytest.raises(InputError, match="does not say how it was made"):
        picture.facts(tmp_path / "plain.png")
    with pytest.raises(InputError, match="not a picture"):
        picture.facts(tmp_path / "text.png")
    with pytest.raises(InputError, match="no picture"):
        picture.facts(tmp_path / "none.png")


@pytest.mark.parametrize(
    ("size", "said"),
    [((4, 400), "sides of at least 8"), ((8, 200), "longer than 16 to 1"), ((20000, 6000), "megapixels")],
)
def test_absurd_pictures_are_refused(tmp_path, size, said):
    Image.new("1", size).save(tmp_path / "odd.png")
    with pytest.raises(InputError, match=said):
        picture.read(tmp_path / "odd.png")


def test_reading_turns_upright_and_checks_the_file(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a camera held sideways
    RED.save(tmp_path / "side.jpg", exif=exif)
    assert picture.read(tmp_path / "side.jpg").size == (8, 16)
    assert picture.read(tmp_path / "side.jpg", mode="L").mode == "L"
    whole = (tmp_path / "side.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="not a picture that can be read"):
        picture.read(tmp_path / "cut.jpg")
