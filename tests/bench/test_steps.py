"""What a step costs under a cache, on a tiny model."""

import json

from vivace.bench import steps


def test_every_policy_skips_what_it_should_and_its_times_are_there(tmp_path):
    path = tmp_path / "steps.json"
    steps.main(["flux", "--tiny", "-o", str(path)])
    found = json.loads(path.read_text())
    rows, counted = found["rows"], steps.STEPS - steps.WARM
    assert found["machine"]["versions"]["torch"]
    assert list(rows) == list(steps.policies())
    # Its polynomial is FLUX.1-dev's alone.
    assert [name for name, row in rows.items() if "refused" in row] == ["TeaCache"]
    shares = {name: row.get("skipped", {"steps": 0})["steps"] / steps.REQUESTS for name, row in rows.items()}
    half = counted / 2
    assert (shares["none"], shares["FirstBlock, all computed"], shares["Planned"]) == (0, 0, half)
    assert shares["FirstBlock"] == counted
    assert shares["fixed mask"] == shares["TaylorSeer"] == half
    assert all(row[kind]["device_s"] > 0 for row in rows.values() for kind in ("computed", "skipped") if kind in row)
    before = path.read_text()
    steps.main(["flux", "--tiny", "-o", str(path)])
    assert path.read_text() == before or json.loads(path.read_text())["rows"] == rows
