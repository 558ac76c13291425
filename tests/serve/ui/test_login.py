"""The page behind the API key."""

from __future__ import annotations

import json
import time

import pytest

from vivace.families import FAMILIES

KEY = "a-key-of-the-tests-alone"
JOIN = "/ui/gradio_api/queue/join"


@pytest.fixture(scope="module")
def site(launch):
    return launch({"tiny": FAMILIES["sd3"].tiny()}, api_key=KEY)


@pytest.fixture
def http(site):
    with site.http as found:
        yield found


def sign_in(http, key=KEY):
    return http.post("/ui/sign-in", content=json.dumps({"key": key}), headers={"content-type": "application/json"})


def test_strangers_see_the_form_and_nothing_else(http):
    answer = http.get("/ui/")
    assert answer.status_code == 401
    assert "API key" in answer.text
    assert "gradio" not in answer.text
    assert "content-security-policy" in answer.headers
    for method, path in [
        ("GET", "/ui/theme.css"), ("GET", "/ui/assets/x.js"), ("GET", "/ui/gradio_api/queue/data?session_hash=x"),
        ("POST", JOIN), ("POST", "/ui/inputs"), ("GET", "/ui/config"), ("GET", "/v1/models"),
    ]:  # fmt: skip
        assert http.request(method, path, json={} if method == "POST" else None).status_code == 401, path


def test_the_queue_has_nothing_to_do_with_signing_in(http, site, monkeypatch):
    monkeypatch.setattr(type(site.engine), "queued", property(lambda engine: engine.most_queued))
    assert sign_in(http).status_code == 204
    assert sign_in(http, "wrong").status_code == 401
    # What asks for a picture, or brings one, still waits outside.
    assert http.post("/ui/inputs", content=b"x", headers={"content-type": "multipart/form-data"}).status_code == 429


@pytest.mark.parametrize("key", ["", "wrong", None, 5, KEY + " ", "schlüssel", ["x"], "\ud800", f"{KEY}\ud800"])
def test_a_wrong_key_is_refused(http, key):
    answer = sign_in(http, key)
    assert answer.status_code == 401
    assert "set-cookie" not in answer.headers


def test_the_key_opens_the_page_and_no_more(http):
    answer = sign_in(http)
    assert answer.status_code == 204
    flags = answer.headers["set-cookie"].lower()
    assert {"httponly", "samesite=strict", "path=/ui"} <= {part.strip() for part in flags.split(";")}
    assert KEY not in flags
    page = http.get("/ui/")
    assert page.status_code == 200
    assert "gradio_config" in page.text
    assert http.get("/ui/theme.css").status_code == 200
    # The cookie is the page's: the API asks for the key itself.
    cookie = {"cookie": answer.headers["set-cookie"].partition(";")[0]}
    assert http.get("/v1/models", headers=cookie).status_code == 401


def test_a_cookie_cannot_be_made_up(http):
    name, _, value = sign_in(http).headers["set-cookie"].partition(";")[0].partition("=")
    http.cookies.clear()
    expires, _, signature = value.partition(".")
    later, past = str(int(expires) + 1), str(int(time.time()) - 1)
    for made in (
        f"{later}.{signature}", f"{past}.{signature}", f"{expires}.", f"{expires}.{signature[:-1]}0x", ".", "",
        f"{'9' * 400}.{signature}", f"²{expires}.{signature}",
    ):  # fmt: skip
        headers = {"cookie": f"{name}={made}".encode()}
        assert http.get("/ui/theme.css", headers=headers).status_code == 401, made
    assert http.get("/ui/theme.css", headers={"cookie": f"{name}={value}"}).status_code == 200


def test_a_cookie_ends(http, monkeypatch):
    from vivace.serve.ui import login

    value = sign_in(http).headers["set-cookie"].partition(";")[0]
    http.cookies.clear()
    after = time.time() + login.SECONDS + 1
    monkeypatch.setattr(login.time, "time", lambda: after)
    assert http.get("/ui/theme.css", headers={"cookie": value}).status_code == 401


def test_another_site_cannot_sign_in(http):
    answer = http.post("/ui/sign-in", json={"key": KEY}, headers={"Origin": "https://evil.example"})
    assert answer.status_code == 403
    assert http.post("/ui/sign-in", data={"key": KEY}).status_code == 415
