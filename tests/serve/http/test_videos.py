"""Video jobs: the routes through the official client, and what is left of them after a crash."""

import io
import json
import shutil
import sys
import time

import openai
import pytest
from PIL import Image

from vivace.errors import InputError
from vivace.families import FAMILIES
from vivace.generation import video
from vivace.serve import Engine
from vivace.serve.http.app import create_app
from vivace.serve.http.shelf import Shelf, held

BODY = {"steps": 2, "frames": 5, "fps": 8, "seed": 3}


def wait(client, name):
    deadline = time.monotonic() + 60
    while (found := client.videos.retrieve(name)).status in ("queued", "in_progress"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def test_a_video_from_beginning_to_end(client, tmp_path):
    begun = client.videos.create(prompt="a red circle", size="64x64", extra_body=BODY)
    assert begun.object == "video"
    assert begun.status == "queued"
    done = wait(client, begun.id)
    assert (done.status, done.progress, done.size, done.error) == ("completed", 100, "64x64", None)
    assert done.model_extra["seed"] == 3
    assert done.model_extra["frames"] == 5
    assert done.expires_at > done.completed_at >= done.created_at
    path = tmp_path / "x.mp4"
    client.videos.download_content(begun.id).write_to_file(path)
    facts = video.facts(path)
    assert (facts["size"], facts["frames"], facts["seed"]) == ([64, 64], 5, 3)
    assert begun.id in [one.id for one in client.videos.list(limit=5)]
    assert client.videos.delete(begun.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.videos.retrieve(begun.id)


def test_without_what_writes_videos_their_models_are_not_served(monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with Engine(models={"wan": FAMILIES["wan"].tiny()}) as engine, pytest.raises(InputError, match="need PyAV"):
        create_app(engine)


def test_seconds_are_frames(client):
    begun = client.videos.create(prompt="a", size="64x64", seconds="1", extra_body={"steps": 1, "fps": 4})
    done = wait(client, begun.id)
    assert done.model_extra["frames"] == 5  # four, rounded to what the VAE can make
    assert done.seconds == "1.25"
    client.videos.delete(begun.id)


def test_pages(client):
    names = [client.videos.create(prompt="a", size="64x64", extra_body=BODY).id for _ in range(3)]
    for name in names:
        wait(client, name)
    page = client.videos.list(limit=2)
    assert len(page.data) == 2
    assert page.has_more
    everything = [one.id for one in client.videos.list(limit=2)]
    assert set(names) <= set(everything)
    assert len(everything) == len(set(everything))
    for name in names:
        client.videos.delete(name)


def test_deleting_a_running_video_ends_it(client, shared):
    begun = client.videos.create(prompt="a", size="64x64", extra_body={**BODY, "steps": 150})
    client.videos.delete(begun.id)
    deadline = time.monotonic() + 120
    while shared.engine.running + shared.engine.queued and time.monotonic() < deadline:
        time.sleep(0.05)
    assert shared.engine.running == shared.engine.queued == 0


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"seconds": "999"}, "seconds"),
        ({"seconds": "x"}, "seconds"),
        ({"seconds": "0"}, "seconds"),
        ({"extra_body": {"frames": 258}}, "frames"),
        ({"extra_body": {"frames": 5, "seconds": "1"}}, "seconds"),
        ({"size": "60x64"}, "size"),
        ({"model": "tiny"}, "model"),
        ({"extra_body": {"path": "/tmp/x"}}, "path"),
        ({"extra_body": {"image": "x"}}, "image"),
    ],
)
def test_wrong_videos_are_400(client, fields, param):
    with pytest.raises(openai.BadRequestError) as error:
        client.videos.create(**{"prompt": "a", **fields})
    assert error.value.param == param


def test_parts_of_a_video(client, http):
    """As players ask for them."""
    name = client.videos.create(prompt="a", size="64x64", extra_body=BODY).id
    wait(client, name)
    path = f"/v1/videos/{name}/content"
    whole = http.get(path).content
    part = http.get(path, headers={"range": "bytes=4-7"})
    assert (part.status_code, part.content) == (206, whole[4:8])
    for wrong, status in (("bytes=99999999-", 416), ("bytes=x", 400), ("parts=0-1", 400)):
        answer = http.get(path, headers={"range": wrong})
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, "invalid_range"), wrong
        assert ("content-range" in answer.headers) == (status == 416)
    client.videos.delete(name)


def test_content_before_it_is_there(client):
    begun = client.videos.create(prompt="a", size="64x64", extra_body={**BODY, "steps": 100})
    with pytest.raises(openai.ConflictError) as error:
        client.videos.download_content(begun.id)
    assert error.value.code == "video_not_ready"
    client.videos.delete(begun.id)


def record(number: int, **fields):
    return {"id": f"video_{number:024x}", "object": "video", "status": "queued", "created_at": number, **fields}


def test_unfinished_jobs_are_failed_after_a_crash(tmp_path):
    shelf = Shelf(tmp_path, seconds=1000, most_bytes=10**9)
    shelf.put(record(1))
    shelf.put(record(2, status="in_progress"))
    shelf.put(record(3, status="completed"))
    shelf.put(record(4, status="completed"))
    shelf.video(record(3)["id"]).write_bytes(b"mp4")
    (tmp_path / ".x.part.json").write_text("{")
    (tmp_path / "video_broken.json").write_text("{")
    again = Shelf(tmp_path, seconds=1000, most_bytes=10**9)
    found = {one["created_at"]: one for one in again.all()}
    assert [found[number]["status"] for number in (1, 2, 3, 4)] == ["failed", "failed", "completed", "failed"]
    assert found[1]["error"]["code"] == "server_restarted"
    assert json.loads((tmp_path / f"{record(1)['id']}.json").read_text())["status"] == "failed"
    assert not (tmp_path / ".x.part.json").exists()
    assert (tmp_path / "video_broken.json").exists()


def test_a_folder_is_one_servers_at_a_time(tmp_path):
    with held(tmp_path / "videos"):
        with pytest.raises(InputError, match="another server keeps its videos"), held(tmp_path / "videos"):
            pass
        with held(tmp_path / "others"), held(None):
            pass
    with held(tmp_path / "videos"):
        pass
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be a folder of videos"), held(tmp_path / "file"):
        pass


def test_time_and_quota(tmp_path):
    shelf = Shelf(tmp_path, seconds=1000, most_bytes=3000)
    for number in range(4):
        shelf.put(record(number, status="completed"))
        shelf.video(record(number)["id"]).write_bytes(bytes(1000))
    shelf.put(record(9, status="completed", expires_at=int(time.time()) - 1))
    shelf.put(record(10, status="in_progress"))
    shelf.sweep()
    assert shelf.nbytes <= 3000
    assert [one["created_at"] for one in shelf.all()] == [10, 3, 2]


def test_what_the_disk_does_not_let_go_of_keeps_nothing_else(tmp_path):
    """A folder stands for a file that cannot be deleted, which root can all."""
    for name in (record(2)["id"], record(9)["id"], ".x.part"):
        (tmp_path / f"{name}.mp4").mkdir()
    stale = {"status": "failed", "expires_at": int(time.time()) - 1}
    for number in (1, 2, 3):
        (tmp_path / f"{record(number)['id']}.json").write_text(json.dumps(record(number, **stale)))
    shelf = Shelf(tmp_path, seconds=1000, most_bytes=10**9)
    assert [one["created_at"] for one in shelf.all()] == [2]
    for number in (4, 5):
        shelf.put(record(number, status="completed"))
        shelf.video(record(number)["id"]).write_bytes(bytes(1000))
    shelf = Shelf(tmp_path, seconds=1000, most_bytes=shelf.nbytes - 500)
    assert [one["created_at"] for one in shelf.all()] == [5, 2]


def test_a_video_that_came_after_its_record_was_deleted_goes(tmp_path):
    shelf = Shelf(tmp_path, seconds=1000, most_bytes=10**9)
    for number in (1, 2):
        shelf.put(record(number, status="in_progress"))
        with shelf.whole(shelf.video(record(number)["id"])) as part:
            part.write_bytes(b"mp4")
            if number == 1:
                shelf.delete(record(1)["id"])
    (tmp_path / "video_of_somebody.json").write_text("{")
    (tmp_path / "video_of_somebody.mp4").write_bytes(b"mp4")
    shelf.sweep()
    assert {path.name for path in tmp_path.glob("*.mp4")} == {f"{record(2)['id']}.mp4", "video_of_somebody.mp4"}


def test_a_temporary_folder_that_the_system_cleared_is_made_again():
    shelf = Shelf(None, seconds=1000, most_bytes=10**9)
    shutil.rmtree(shelf.folder)
    shelf.put(record(1))
    with shelf.whole(shelf.video(record(1)["id"])) as part:
        part.write_bytes(b"mp4")
    assert shelf.nbytes > 3
    shelf.close()
    assert not shelf.folder.exists()


def test_a_folder_that_was_named_is_not_made_anew_where_its_disk_is_gone(tmp_path):
    shelf = Shelf(tmp_path / "mounted", seconds=1000, most_bytes=10**9)
    shelf.folder.rmdir()
    with pytest.raises(FileNotFoundError):
        shelf.put(record(1))
    assert not shelf.folder.exists()


def test_a_video_whose_file_is_gone_is_not_found(client, shared):
    done = client.videos.create_and_poll(prompt="a", size="64x64", extra_body=BODY, poll_interval_ms=50)
    assert done.status == "completed"
    shared.app.state.server.shelf.video(done.id).unlink()
    with pytest.raises(openai.NotFoundError) as error:
        client.videos.download_content(done.id)
    assert error.value.code == "video_not_found"
    client.videos.delete(done.id)


def test_nobody_waits_while_the_folder_is_swept(client, shared):
    shelf = shared.app.state.server.shelf
    with shelf._sweeping:  # as long as the disk is asked for thousands of files
        begun = client.videos.create(prompt="a", size="64x64", extra_body=BODY)
        assert wait(client, begun.id).status == "completed"
        assert client.videos.list().data[0].id == begun.id
        assert shared.http.get("/livez").status_code == 200
    client.videos.delete(begun.id)


def test_a_video_that_cannot_be_deleted_is_still_there(client, shared):
    done = client.videos.create_and_poll(prompt="a", size="64x64", extra_body=BODY, poll_interval_ms=50)
    path = shared.app.state.server.shelf.video(done.id)
    path.unlink()
    path.mkdir()  # which is deleted in another way
    with pytest.raises(openai.APIStatusError) as error:
        client.videos.delete(done.id)
    assert (error.value.status_code, error.value.code) == (507, "disk_full")
    assert client.videos.retrieve(done.id).status == "completed"
    path.rmdir()
    assert client.videos.delete(done.id).deleted


def test_a_failed_write_changes_nothing(tmp_path):
    shelf = Shelf(tmp_path, seconds=1000, most_bytes=10**9)
    shelf.put(record(1))
    path = shelf.video(record(1)["id"])
    path.write_bytes(b"before")

    def write():
        with shelf.whole(path) as part:
            part.write_bytes(b"half")
            raise OSError(28, "disk full")

    with pytest.raises(OSError, match="full"):
        write()
    assert path.read_bytes() == b"before"
    assert not list(tmp_path.glob("*.part.*"))
    assert not list(tmp_path.glob(".*"))


def test_an_input_picture_needs_a_model_that_takes_one(http):
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, "PNG")
    answer = http.post("/v1/videos", files={"input_reference": ("x.png", buffer.getvalue())}, data={"prompt": "a"})
    # This one's denoiser has no channels for a picture.
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "input_reference")
    assert "WanPipeline cannot take image" in answer.json()["error"]["message"]
