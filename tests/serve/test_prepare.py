"""What a request becomes for its pipeline."""

from PIL import Image

from vivace.errors import InputError
from vivace.families import FAMILIES
from vivace.serve import Request, Spec
from vivace.serve.model import Model
from vivace.serve.prepare import fitted, prepare


def test_a_picture_that_is_fitted_beforehand_makes_the_same_request():
    seen: list[str] = []
    for name in FAMILIES:
        source = Model(name, Spec(source=FAMILIES[name].tiny())).source
        if not {"image", "prompt"} <= source.family.takes:
            continue
        seen.append(name)
        for size in ((70, 50), (640, 300), (123, 457)):
            request = Request(prompt="a", images=(Image.linear_gradient("L").resize(size).convert("RGB"),))
            try:
                plain = prepare(request, source)
            except InputError:
                continue
            early = prepare(fitted(request, source), source)
            assert early.size == plain.size
            assert early.call.keys() == plain.call.keys()
            assert early.call["image"].tobytes() == plain.call["image"].tobytes()
    assert {"sd", "sdxl", "sd3", "flux"} <= set(seen)


def test_pictures_that_are_looked_at_are_not_copied_for_each_that_is_made_of_them():
    source = Model("flux2", Spec(source=FAMILIES["flux2"].tiny())).source
    images = tuple(Image.new("RGB", (640, 480), colour) for colour in ("red", "blue"))
    found = prepare(fitted(Request(prompt="a", images=images), source), source).call["image"]
    assert [*map(id, found)] == [*map(id, images)]
