"""The application around the routes: what it does by itself."""

import threading


def test_a_model_that_could_not_be_loaded_is_tried_again(launch, pipe, wanted, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("vivace.serve.http.app.AGAIN", 0.2)
    pipe.save_pretrained(tmp_path / "one")
    config = tmp_path / "one" / "text_encoder" / "config.json"
    content = config.read_text("utf-8")
    config.write_text("{", "utf-8")
    mending = threading.Timer(3.0, config.write_text, (content, "utf-8"))
    mending.start()
    server = launch({"tiny": str(tmp_path / "one")})  # comes back when it is ready
    mending.join()
    said = [record.getMessage() for record in caplog.records if "not all models are loaded" in record.getMessage()]
    assert said[0] == "not all models are loaded: the model tiny cannot be loaded"
    assert server.engine.loaded("tiny")
    assert server.http.post("/v1/images/generations", json=wanted).status_code == 200
