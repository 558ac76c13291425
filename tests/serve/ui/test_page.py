"""The page in a real browser, with the built-in model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw
from safetensors.torch import save_file

from vivace.load import load
from vivace.serve.model import Spec

expect = pytest.importorskip("playwright.sync_api", reason="playwright is not installed").expect
pytestmark = pytest.mark.timeout(900)

SIZES = ("desktop", "phone")
PROMPT = "a large red circle left of a small blue square"


@pytest.fixture(scope="module")
def site(launch, lora_of, tmp_path_factory):
    transformer = load("builtin").transformer
    loras = {name: tmp_path_factory.mktemp("loras") / f"{name}.safetensors" for name in ("ink", "lace")}
    for seed, path in enumerate(loras.values()):
        save_file(lora_of(transformer, std=0.02, seed=seed), path)
    found = launch({"builtin": Spec(loras=loras)}, warm=True)
    found.engine.submit(found.engine.model(None) and _request()).result(240)
    return found


def _request() -> Any:
    from vivace.serve import Request

    return Request(prompt=PROMPT, steps=2, seed=0, preview_every=1)


@pytest.fixture
def held(site, hold):
    """The built-in model's denoiser, which can be held."""
    found = hold(site.engine.model(None).pipe.transformer)
    yield found
    found.remove()


def ask(page: Any, prompt: str = PROMPT, *, steps: int = 3, **fields: str) -> None:
    page.locator("#prompt textarea").fill(prompt)
    for name, value in {"steps": str(steps), **fields}.items():
        field = page.locator(f"#{name} :is(input:not([type=range]), textarea)").first
        field.fill(value)
        field.press("Enter" if name == "size" else "Tab")


def done(page: Any, part: str = "stage", state: str = "done") -> Any:
    found = page.locator(f"#{part} [data-state={state}]")
    found.wait_for()
    return found


def loaded(page: Any, selector: str) -> list[int]:
    """The sizes of a picture that the browser has decoded."""
    page.wait_for_function("s => document.querySelector(s)?.naturalWidth > 0", arg=selector)
    return page.evaluate(
        "s => [...document.querySelectorAll(s)].map(p => [p.naturalWidth, p.naturalHeight])[0]", selector
    )


@pytest.mark.parametrize("size", SIZES)
def test_draw(visit, held, size):
    page = visit(size)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "it scrolls sideways"
    ask(page, seed="11")
    held.shut()
    page.locator("#draw").click()
    expect(page.locator("#stage .now")).to_have_text(re.compile("Step 0 of 3|Starting"))
    expect(page.locator("#cancel")).to_be_in_viewport(ratio=1)
    held.open.set()
    done(page)
    assert loaded(page, "#stage .frame img") == [256, 256]
    told = page.locator("#stage .facts").inner_text().split("\n")
    shown = dict(zip(told[::2], told[1::2], strict=True))
    assert shown["seed"] == "11"
    assert (shown["steps"], shown["preset"], shown["model"]) == ("3", "exact", "builtin")
    expect(page.locator("#stage .legend .denoising")).to_have_text(re.compile(r"denoising \d"))
    page.locator("#stage summary").click()
    expect(page.locator("#stage .applied")).to_contain_text("fused" if shown["preset"] == "fast" else "attention")
    expect(page.locator("#stage .applied")).to_contain_text("3 denoiser calls")
    expect(page.locator("#gallery .cards li")).to_have_count(1)
    expect(page.locator("#draw")).to_be_visible()


def test_the_bar_of_parts_is_full_however_quick_they_are(visit):
    page = visit()
    ask(page, steps=2)
    page.locator("#draw").click()
    done(page)
    shares = page.evaluate(
        "() => { const [picture] = JSON.parse(sessionStorage.getItem('vivace.made'));"
        " picture.timings = {queue_s: 0, text_s: 0.01, denoise_s: 0.06, decode_s: 0.03, total_s: 0.1};"
        " window.vivace.show(picture);"
        " const width = selector => document.querySelector(`#stage .bar${selector}`).getBoundingClientRect().width;"
        " return ['.text', '.denoising', '.decoding'].map(part => width(` ${part}`) / width('')); }"
    )
    assert shares == pytest.approx([0.1, 0.6, 0.3], abs=0.02)


def test_previews_and_seconds_left(visit):
    page = visit()
    page.evaluate(
        "() => { window.seen = []; const stage = document.querySelector('#stage');"
        " new MutationObserver(() => { const left = stage.querySelector('.left')?.textContent;"
        " const part = name => stage.querySelector(name)?.getBoundingClientRect().width;"
        " const [step, total] = (stage.querySelector('.now')?.textContent.match(/\\d+/g) || []).map(Number);"
        " if (left) window.seen.push([left, stage.querySelector('.preview')?.src.slice(0, 22),"
        " part('.fill') / part('.track') - step / total]); })"
        ".observe(stage, {subtree: true, childList: true, attributes: true, characterData: true}); }"
    )
    ask(page, steps=20)
    page.locator("#draw").click()
    done(page)
    seen = page.evaluate("window.seen")
    assert any(re.fullmatch(r"[\d.]+ s left", left) for left, *_ in seen)
    assert any(preview == "data:image/jpeg;base64" for _, preview, _ in seen)
    assert max(abs(behind) for *_, behind in seen) < 0.01, "the bar is not where the text says"


@pytest.mark.parametrize("size", SIZES)
def test_cancel(visit, site, held, until, size):
    page = visit(size)
    ask(page, steps=50)
    held.shut()
    page.locator("#draw").click()
    until(lambda: (page.wait_for_timeout(50), held.reached.is_set())[1])
    page.locator("#cancel").click()
    done(page, state="cancelled")
    held.open.set()
    until(lambda: site.engine.running == 0)
    expect(page.locator("#draw")).to_be_visible()
    expect(page.locator("#cancel")).to_be_hidden()
    ask(page, steps=2)
    page.locator("#draw").click()
    done(page)


def test_cancel_stays_while_anything_is_drawn(visit, held, until):
    page = visit()
    ask(page, steps=2)
    held.shut()
    page.get_by_role("tab", name="Compare").click()
    page.locator("#both").click()
    until(lambda: (page.wait_for_timeout(50), held.reached.is_set())[1])
    ask(page, "", steps=2)
    page.locator("#prompt textarea").press("Shift+Enter")
    # Of the part that is not shown.
    page.locator("#stage [data-state=error]").wait_for(state="attached")
    expect(page.locator("#cancel")).to_be_visible()
    held.open.set()
    done(page, "compare", "compared")
    expect(page.locator("#draw")).to_be_visible()


def test_leaving_ends_what_is_drawn(visit, site, held, until):
    page = visit()
    ask(page, steps=50)
    held.shut()
    page.locator("#draw").click()
    until(lambda: (page.wait_for_timeout(50), held.reached.is_set())[1])
    page.close()
    # It is held at its first step: only a cancel ends it.
    until(lambda: site.engine.running == 0)


@pytest.mark.parametrize("size", SIZES)
def test_a_mistake_is_told_where_it_is(visit, size):
    page = visit(size)
    ask(page, size="100x100")
    page.locator("#draw").click()
    done(page, state="error")
    expect(page.locator("#stage [role=alert]")).to_contain_text("multiples of 16; the nearest is 96x96")
    expect(page.locator("#size")).to_have_class(re.compile("wrong"))
    expect(page.locator("#stage [role=alert]")).to_be_in_viewport()
    ask(page, size="64x64")
    page.locator("#draw").click()
    done(page)
    assert page.locator(".wrong").count() == 0
    ask(page, "")
    page.locator("#draw").click()
    done(page, state="error")
    expect(page.locator("#prompt")).to_have_class(re.compile("wrong"))


def test_use_again(visit):
    page = visit()
    page.locator("#die").click()
    expect(page.locator("#seed input, #seed textarea")).to_have_value(re.compile(r"^\d+$"))
    seed = page.locator("#seed input, #seed textarea").input_value()
    ask(page, steps=2, guidance="4.5", negative="a star")
    page.locator("#draw").click()
    done(page)
    first = page.locator("#stage .frame img").get_attribute("src")
    ask(page, "a green star", steps=4, seed="5", guidance="1", negative="")
    page.locator("#draw").click()
    page.wait_for_function("s => document.querySelector('#stage .frame img')?.getAttribute('src') !== s", arg=first)
    expect(page.locator("#gallery .cards li")).to_have_count(2)
    page.locator("#gallery .cards li").nth(1).get_by_text("Use again").click()
    expect(page.locator("#prompt textarea")).to_have_value(PROMPT)
    expect(page.locator("#seed input, #seed textarea")).to_have_value(seed)
    expect(page.locator("#steps input[type=number]")).to_have_value("2")
    expect(page.locator("#guidance input[type=number]")).to_have_value("4.5")
    expect(page.locator("#negative textarea, #negative input")).to_have_value("a star")


def test_every_lora_has_a_weight_of_its_own(visit):
    page = visit()
    ask(page, steps=2, seed="5")
    page.locator("#more > button").click()
    row = page.locator("#lora li")
    expect(row).to_have_count(2)
    row.nth(0).locator("input[type=checkbox]").check()
    row.nth(1).locator("input[type=range]").fill("-0.5")
    expect(row.nth(1).locator("input[type=checkbox]")).to_be_checked()
    page.locator("#draw").click()
    done(page)
    expect(page.locator("#stage .facts")).to_contain_text("ink 1, lace -0.5")
    row.nth(0).locator("input[type=checkbox]").uncheck()
    page.locator("#gallery .cards li").first.get_by_text("Use again").click()
    expect(row.nth(0).locator("input[type=checkbox]")).to_be_checked()
    expect(row.nth(1).locator(".weight")).to_have_text("-0.5")


def test_the_gallery_outlives_a_reload(visit):
    page = visit()
    ask(page, steps=2)
    page.locator("#draw").click()
    done(page)
    page.reload()
    page.locator("body[data-ready]").wait_for()
    page.locator("#gallery .thumb").click()
    done(page)
    assert loaded(page, "#stage .frame img") == [256, 256]


def paint(page: Any, *, right: float, top: float, bottom: float, touch: bool) -> None:
    """A stroke down the picture, with a finger or the mouse; places are shares of its sides."""
    easel = page.locator("#input canvas")
    easel.scroll_into_view_if_needed()
    box = easel.bounding_box()
    x, (begin, end) = box["x"] + right * box["width"], (box["y"] + at * box["height"] for at in (top, bottom))
    along = [{"x": x, "y": begin + (end - begin) * step / 6} for step in range(7)]
    if not touch:
        page.mouse.move(*along[0].values())
        page.mouse.down()
        for at in along:
            page.mouse.move(*at.values())
        page.mouse.up()
        return
    finger = page.context.new_cdp_session(page)  # playwright's own finger only taps
    for kind, points in [("touchStart", along[:1]), *(("touchMove", [at]) for at in along), ("touchEnd", [])]:
        finger.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})


@pytest.mark.parametrize("size", SIZES)
def test_edit_with_a_mask(visit, site, tmp_path, monkeypatch, size):
    asked, submit = [], site.engine.submit
    monkeypatch.setattr(site.engine, "submit", lambda request, **more: asked.append(request) or submit(request, **more))
    picture = Image.new("RGB", (320, 256), "#ffd800")
    ImageDraw.Draw(picture).ellipse((40, 60, 140, 160), fill="#ee2222")
    picture.save(tmp_path / "in.png")
    page = visit(size)
    ask(page, "a blue square", steps=4)
    page.locator("#editing > button").click()
    page.locator("#input input[type=file]").set_input_files(tmp_path / "in.png")
    paint(page, right=0.75, top=0.2, bottom=0.8, touch=size == "phone")
    expect(page.locator("#input .note")).to_have_text("Only what you painted is drawn anew.")
    if size == "phone":
        expect(page.locator("#draw")).to_be_in_viewport(ratio=1)
    page.locator("#draw").click()
    done(page)
    (request,) = asked
    # Brought to the size that the model makes of such proportions, four fifths of its own.
    assert request.images[0].size == request.mask.size == (256, 208)
    assert [request.mask.getpixel(at) for at in ((192, 104), (64, 104))] == [255, 0]
    assert request.images[0].getpixel((72, 88)) == (0xEE, 0x22, 0x22)
    expect(page.locator("#stage .facts")).to_contain_text("0.7")
    # The edit keeps its picture's shape, whatever the field says.
    assert loaded(page, "#stage .frame img") == [256, 208]
    page.locator("#gallery .cards li").get_by_text("Use again").click()
    expect(page.locator("#input canvas")).to_be_visible()


def test_every_size_can_be_made(visit, site):
    from vivace.serve.ui.form import sizes

    page = visit()
    for size in sizes(site.engine.model(None)):
        ask(page, steps=1, size=size)
        page.locator("#draw").click()
        page.wait_for_function(
            "size => document.querySelector('#stage .facts')?.innerText.includes(size)", arg=size.replace("x", " × ")
        )


@pytest.mark.parametrize("size", SIZES)
def test_a_finished_picture_can_be_edited(visit, size):
    page = visit(size)
    ask(page, steps=2)
    page.locator("#draw").click()
    done(page)
    page.locator("#stage").get_by_text("Edit", exact=True).click()
    expect(page.locator("#input canvas")).to_be_in_viewport(ratio=1)
    page.locator("#input").get_by_text("Remove").click()
    expect(page.locator("#input .drop")).to_be_visible()
    # Nor is it in the way of one that was drawn from words alone.
    page.locator("#stage").get_by_text("Edit", exact=True).click()
    expect(page.locator("#input canvas")).to_be_visible()
    page.locator("#gallery .cards li").get_by_text("Use again").click()
    expect(page.locator("#input .drop")).to_be_visible()


@pytest.mark.parametrize("size", SIZES)
def test_what_is_no_picture(visit, tmp_path, size):
    (tmp_path / "no.png").write_bytes(b"no picture")
    page = visit(size)
    page.locator("#editing > button").click()
    page.locator("#input input[type=file]").set_input_files(tmp_path / "no.png")
    expect(page.locator("#input [role=alert]")).to_contain_text("no picture")


@pytest.mark.parametrize("size", SIZES)
def test_compare(visit, size):
    page = visit(size)
    ask(page, steps=6, seed="3")
    page.get_by_role("tab", name="Compare").click()
    page.locator("#right-cache input").click()
    page.locator("#right-cache").get_by_role("option", name="teacache").click()
    page.locator("#both").click()
    done(page, "compare", "compared")
    expect(page.locator("#compare .side")).to_have_count(2)
    for number, title in enumerate(("exact", "fast + teacache")):
        expect(page.locator("#compare .side .title").nth(number)).to_have_text(title)
        assert re.search(r"\d s$", page.locator("#compare .side .took").nth(number).inner_text())
    expect(page.locator("#compare .verdict")).to_contain_text("Same seed, 3;")
    if size == "phone":
        expect(page.locator("#compare .verdict")).to_be_in_viewport(ratio=1)
        expect(page.locator("#draw")).to_be_in_viewport(ratio=1)
    page.wait_for_function("() => [...document.querySelectorAll('#compare .overlay img')].every(p => p.naturalWidth)")
    page.locator("#compare .overlay input").fill("20")
    cut = "() => getComputedStyle(document.querySelector('#compare .over')).clipPath"
    assert page.evaluate(cut) == "inset(0px 0px 0px 20%)"
    expect(page.locator("#gallery .cards li")).to_have_count(2)


def test_light_and_dark(visit):
    colour = "() => getComputedStyle(document.querySelector('.gradio-container')).backgroundColor"
    page = visit(color_scheme="light")
    light = page.evaluate(colour)
    page.locator("#shade").click()
    dark = page.evaluate(colour)
    assert sum(map(int, re.findall(r"\d+", dark)[:3])) < 200 < sum(map(int, re.findall(r"\d+", light)[:3]))
    page.reload()
    page.locator("body[data-ready]").wait_for()
    assert page.evaluate(colour) == dark
    assert visit(color_scheme="dark").evaluate(colour) == dark


def test_nothing_is_left_on_disk(site):
    """Last: everything above was drawn, uploaded and shown without a file."""
    from gradio.utils import get_upload_folder

    folder = Path(get_upload_folder())
    assert not folder.exists() or not [path for path in folder.rglob("*") if path.is_file()]
