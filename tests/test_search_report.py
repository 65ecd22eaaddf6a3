"""Metrics, report and picture of a search."""

import json

import attacks
import pytest
from searches import SEARCH, STEPS, fresh, run, unrendered
from transformers import TrainerCallback
from zoo.training import trainer

from peft_eas import EASCallback, plot_search
from peft_eas.search.held_out import PARTS
from peft_eas.search.report import write_report


def test_reporters_see_the_metrics_and_files_are_left(tmp_path):
    seen = []

    class Reporter(TrainerCallback):  # as TensorBoard's, which stands before the callbacks of the user
        def on_log(self, args, state, control, logs, **kwargs):
            seen.append(dict(logs))

    model = fresh()
    search = EASCallback(**SEARCH)
    made = trainer(
        tmp_path, model, callbacks=[Reporter(), search], max_steps=STEPS, logging_strategy="steps", logging_steps=1,
        save_strategy="no",
    )  # fmt: skip
    made.train()
    logged = [logs for logs in seen if "eas/loss" in logs]
    entries = search.report["rounds"]
    assert len(logged) == len(entries) == 3
    for logs, entry in zip(logged, entries, strict=True):
        means = [sum(cost) / len(cost) for cost in entry["costs"]]
        assert logs["eas/cost_min"] == pytest.approx(min(means))
        assert logs["eas/cost_max"] == pytest.approx(max(means))
        assert logs["eas/loss"] == pytest.approx(sum(entry["losses"]) / PARTS)
        assert logs["eas/skipped"] == 2
        assert logs["eas/exchanges"] == sum(len(e["exchanged"]) for e in entries[: entries.index(entry) + 1])
        assert all(isinstance(value, (int, float)) for value in logs.values())
        assert next(h for h in made.state.log_history if h["step"] == entry["step"])["eas/skipped"] == 2
    sets = [[logs["eas/skip_layers/1"], logs["eas/skip_layers/2"]] for logs in seen if "eas/skip_layers/1" in logs]
    assert sets[0] == [4, 5]  # when the warm-up ends
    assert sets[1:] == [entry["skip_layers"] for entry in entries if entry["exchanged"]]
    assert json.loads((tmp_path / "report.json").read_text()) == search.report
    assert (tmp_path / "search.png").stat().st_size > 10_000
    for given in (search.report, tmp_path, str(tmp_path / "report.json")):
        assert len(plot_search(given).axes) == 4  # scores, sets, costs, losses
    plot_search(tmp_path, tmp_path / "again.png")
    assert (tmp_path / "again.png").exists()
    with pytest.raises(FileNotFoundError):
        plot_search(tmp_path / "nowhere")
    # one that somebody changed
    report, odd = json.loads((tmp_path / "report.json").read_text()), tmp_path / "odd.json"

    def drawn(text):
        odd.write_text(text)
        return lambda: plot_search(odd)

    seen = attacks.outcomes(("a report", drawn(text)) for text in attacks.changed_json(report, seed=5, count=30))
    assert set(seen) == {"works", "refused"}
    with pytest.raises(ValueError, match="not the report of a search"):
        plot_search({"layers": [1]})


@unrendered()
def test_a_full_disk_leaves_the_report_and_the_picture_that_were_there(tmp_path):
    run(tmp_path / "run", fresh(), save_strategy="no")
    before, report = attacks.contents(tmp_path), json.loads((tmp_path / "run" / "report.json").read_text())
    moments = []
    for moment, failed in attacks.full_disks(tmp_path, lambda: write_report(report | {"seed": 1}, tmp_path / "run")):
        moments.append(moment)
        assert failed
        after = attacks.contents(tmp_path)
        assert after.keys() == before.keys()
        assert after["run/search.png"] == before["run/search.png"]
        # a new report stands as soon as it is whole
        assert json.loads(after["run/report.json"])["seed"] == (1 if "search.png" in moment else 7)
        (tmp_path / "run" / "report.json").write_bytes(before["run/report.json"])
    assert {"open report.json", "write report.json", "replace report.json", "replace search.png"} <= {*moments}
    before = attacks.contents(tmp_path)  # with the new report, of the last time, when the disk was large enough
    for moment, failed in attacks.full_disks(tmp_path, lambda: plot_search(report, tmp_path / "run" / "search.png")):
        assert failed, moment
        assert attacks.contents(tmp_path) == before
