"""Runs side by side, from files as pretrain.py leaves them."""

import json
import sys
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from complexity_deep.scripts import compare_runs
from complexity_deep.workflow.command import InputError
from complexity_deep.workflow.evaluation.evaluation_report import draw as draw_scores
from complexity_deep.workflow.evaluation.run_comparison import draw, read


def write_run(folder: Path, loss: float, tokens: int = 1000, **options) -> Path:
    folder.mkdir()
    held_out = [{"step": step, "loss": loss + 2 - step, "perplexity": 9.0} for step in (0, 1, 2)]
    summary = {"model_type": "llama", "parameters": 12345, "active_parameters": 6789, "tokens": tokens}
    summary |= {"text": ["some text", "and more"], "tokens_per_second": 10.0, "device": "a CPU"}
    summary |= {"held_out": held_out, "options": {"seed": 7, **options}}
    (folder / "training_summary.json").write_text(json.dumps(summary))
    history = [{"step": 1, "loss": loss + 1}, {"step": 1, "eval_loss": loss + 1}, {"step": 2, "loss": loss}]
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    return folder


def write_evaluation(folder: Path, accuracy: float, questions: int = 200, **facts) -> dict:
    """The report of evaluate.py for a model in `folder`."""
    task = {"task": "arc_easy", "metric": "acc", "value": accuracy, "stderr": 0.01, "random": 0.25, "num_fewshot": 0}
    task |= {"note": "of a file"}
    text = {"corpus": "wikitext", "nll_per_token": 3.5, "stderr": None, "random": 9.7, "bits_per_byte": 1.25}
    text |= {"tokens": 1000, "documents": 3, "context": 64, "stride": 64, "note": ""}
    report = {"model": folder.name, "dtype": "float32", "device": "a CPU", "limit": None}
    report |= {"harness": {"name": "lm-eval", "version": "0.4"}, "versions": {"torch": "2.13"}, **facts}
    report |= {"tasks": [task | {"n": questions}], "perplexity": [text]}
    (folder / "evaluation").mkdir(parents=True, exist_ok=True)
    (folder / "evaluation" / "evaluation.json").write_text(json.dumps(report))
    return report


def compare(monkeypatch, output, *runs):
    monkeypatch.setattr(sys, "argv", ["compare_runs.py", *map(str, runs), "--output", str(output)])
    compare_runs.main(compare_runs.parse_args())


def test_table_and_picture(tmp_path, monkeypatch):
    runs = [write_run(tmp_path / "ours", 1.25), write_run(tmp_path / "dense", 1.5)]
    compare(monkeypatch, tmp_path / "out" / "1.5b", *runs)
    text = (tmp_path / "out" / "1.5b.md").read_text()
    assert "| held-out loss, nats per token | 1.2500 | 1.5000 |" in text and "| parameters | 12,345 | 12,345 |" in text
    assert (
        "text some text, and more; tokens 1,000; device a CPU" in text and "differs" not in text and "None" not in text
    )
    assert (tmp_path / "out" / "1.5b.png").stat().st_size > 1000


def test_held_out_points_are_on_the_chart(tmp_path):
    """The loss of the untrained model is left out, and every other point lies between the limits."""
    run = write_run(tmp_path / "run", 1.25)
    summary = json.loads((run / "training_summary.json").read_text())
    summary["held_out"] = [{"step": step, "loss": loss, "perplexity": 9.0} for step, loss in ((0, 10), (1, 5), (2, 3))]
    (run / "training_summary.json").write_text(json.dumps(summary))
    axes = draw([read(run, "run")]).axes[0]
    low, high = axes.get_ylim()
    held_out = next(line for line in axes.lines if line.get_marker() == "o")
    assert list(held_out.get_ydata()) == [5, 3] and low < 3 and 5 < high < 6


def test_what_differs_is_said(tmp_path, monkeypatch):
    compare(monkeypatch, tmp_path / "out", write_run(tmp_path / "a", 1.0), write_run(tmp_path / "b", 1.0, tokens=2000))
    assert "| **differs: tokens** | 1,000 | 2,000 |" in (tmp_path / "out.md").read_text()


def test_losses_of_other_text_or_in_other_tokens_are_told_apart(tmp_path, monkeypatch):
    options = {"tokenizer": "runs/tokenizer", "held_out_rows": 256, "validation_sources": None}
    other = {"tokenizer": "runs/other", "held_out_rows": 4, "validation_sources": None}
    runs = [write_run(tmp_path / "a", 1.0, **options), write_run(tmp_path / "b", 1.0, **other)]
    compare(monkeypatch, tmp_path / "out", *runs)
    text = (tmp_path / "out.md").read_text()
    assert "| **differs: tokenizer** | runs/tokenizer | runs/other |" in text
    assert "| **differs: held out rows** | 256 | 4 |" in text and "validation" not in text


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path, monkeypatch):
    runs = [tmp_path / place / "model" for place in ("a", "b")]
    for run in runs:
        run.parent.mkdir()
        write_run(run, 1.0)
    compare(monkeypatch, tmp_path / "out", *runs)
    assert f"| {runs[0]} | {runs[1]} |" in (tmp_path / "out.md").read_text()


def test_the_picture_of_a_name_with_a_space_is_linked(tmp_path, monkeypatch):
    compare(monkeypatch, tmp_path / "two runs", write_run(tmp_path / "a", 1.0))
    assert "](two%20runs.png)" in (tmp_path / "two runs.md").read_text()


def test_a_bar_in_a_name_does_not_break_the_table(tmp_path, monkeypatch):
    compare(monkeypatch, tmp_path / "out", write_run(tmp_path / "a|b", 1.0))
    assert "|  | a\\|b |\n" in (tmp_path / "out.md").read_text()


def test_standard_errors_are_shown_where_the_runs_have_them(tmp_path, monkeypatch):
    runs = [write_run(tmp_path / "old", 1.25), write_run(tmp_path / "new", 1.5)]
    summary = json.loads((runs[1] / "training_summary.json").read_text())
    summary["held_out"][-1] |= {"loss_stderr": 0.0123, "perplexity_stderr": 0.11}
    (runs[1] / "training_summary.json").write_text(json.dumps(summary))
    compare(monkeypatch, tmp_path / "out", *runs)
    text = (tmp_path / "out.md").read_text()
    assert "| held-out loss, nats per token | 1.2500 | 1.5000 ± 0.0123 |" in text
    assert "| held-out perplexity | 9.00 | 9.00 ± 0.11 |" in text
    assert "\n\n± is one standard error" in text


def test_a_page_without_standard_errors_does_not_explain_them(tmp_path, monkeypatch):
    compare(monkeypatch, tmp_path / "out", write_run(tmp_path / "a", 1.0))
    assert "±" not in (tmp_path / "out.md").read_text()


def test_runs_without_an_evaluation_are_named(tmp_path, monkeypatch):
    runs = [write_run(tmp_path / name, 1.0) for name in ("a", "b")]
    write_evaluation(runs[0], 0.5)
    compare(monkeypatch, tmp_path / "out", *runs)
    assert "\n\nWithout an evaluation: b.\n" in (tmp_path / "out.md").read_text()


def test_a_run_that_is_named_twice_is_refused(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run", 1.0)
    with pytest.raises(InputError, match="is named twice"):
        compare(monkeypatch, tmp_path / "out", run, tmp_path / "other" / ".." / "run")


def test_a_suffix_of_the_output_is_left_out(tmp_path, monkeypatch):
    compare(monkeypatch, tmp_path / "out.md", write_run(tmp_path / "a", 1.0))
    assert (tmp_path / "out.md").read_text().startswith("# out\n") and (tmp_path / "out.png").is_file()


@pytest.mark.parametrize("output", (".", "", "..", "/"))
def test_an_output_without_a_name_is_refused(tmp_path, monkeypatch, output):
    run = write_run(tmp_path / "run", 1.0)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="is a folder: name a file in it"):
        compare(monkeypatch, output, run)


def test_the_output_is_checked_before_the_runs_are_read(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    (tmp_path / "taken.png").mkdir()
    for output, sentence in (("file/out", "is a file"), ("taken", "is a folder"), ("/proc/out", "cannot be written")):
        with pytest.raises(InputError, match=sentence):
            compare(monkeypatch, tmp_path / output, tmp_path / "absent")


def test_scores_stand_beside_each_other_and_beside_guessing(tmp_path, monkeypatch):
    write_evaluation(write_run(tmp_path / "ours", 1.25), 0.5)
    write_evaluation(tmp_path / "base", 0.375, dtype="bfloat16")  # a model that was trained elsewhere
    compare(monkeypatch, tmp_path / "out", tmp_path / "ours", tmp_path / "base")
    text = (tmp_path / "out.md").read_text()
    assert "|  | ours |\n" in text and "|  | ours | base | guessing | note |\n" in text
    assert "| arc_easy, acc (200 questions, 0 examples) | 50.00% ± 1.00% | 37.50% ± 1.00% | 25.00% | 1 |" in text
    assert "(3 documents, context 64, stride 64) | 3.5000 | 3.5000 | 9.7000 |" in text
    assert "| wikitext, bits per byte (3 documents, context 64, stride 64) | 1.2500 | 1.2500 |  |  |" in text
    assert "| **differs: dtype** | float32 | bfloat16 |  |  |" in text and "waiting for data" not in text
    assert "\n\n1. of a file\n\n" in text
    assert "](out.png)" in text and "](out_scores.png)" in text
    assert (tmp_path / "out_scores.png").stat().st_size > 1000


def test_what_evaluate_wrote_to_a_folder_of_its_own_is_read(tmp_path, monkeypatch):
    write_evaluation(tmp_path / "run", 0.5)
    compare(monkeypatch, tmp_path / "out", tmp_path / "run" / "evaluation")
    assert "|  | evaluation | guessing | note |" in (tmp_path / "out.md").read_text()
    assert not (tmp_path / "out.png").exists()


def test_scores_of_other_questions_are_not_in_one_row(tmp_path, monkeypatch):
    write_evaluation(tmp_path / "a", 0.5)
    write_evaluation(tmp_path / "b", 0.25, questions=20)
    compare(monkeypatch, tmp_path / "out", tmp_path / "a", tmp_path / "b")
    text = (tmp_path / "out.md").read_text()
    assert "| arc_easy, acc (200 questions, 0 examples) | 50.00% ± 1.00% |  | 25.00% |" in text
    assert "| arc_easy, acc (20 questions, 0 examples) |  | 25.00% ± 1.00% | 25.00% |" in text


def test_a_note_on_one_model_stands_with_its_name(tmp_path, monkeypatch):
    """The last model's empty note once replaced what the first one was fine-tuned on."""
    for name, note in (("a", "fine-tuned on <it>"), ("b", "")):
        report = write_evaluation(tmp_path / name, 0.5)
        report["tasks"][0]["note"] = note
        (tmp_path / name / "evaluation" / "evaluation.json").write_text(json.dumps(report))
    compare(monkeypatch, tmp_path / "out", tmp_path / "a", tmp_path / "b")
    text = (tmp_path / "out.md").read_text()
    assert (
        "| 50.00% ± 1.00% | 50.00% ± 1.00% | 25.00% | 1 |" in text and "\n\n1. a: fine-tuned on &lt;it&gt;\n\n" in text
    )


def test_every_model_has_its_bars(tmp_path):
    reports = {name: write_evaluation(tmp_path / name, score) for name, score in (("a", 0.5), ("b", 0.75))}
    reports["b"]["perplexity"] = []
    left, right = draw_scores(reports).axes
    assert [bar.get_height() for bar in left.patches] == [0.5, 0.75] and len(right.patches) == 1
    assert left.patches[0].get_x() + left.patches[0].get_width() <= left.patches[1].get_x() + 1e-9


def test_the_legend_has_models_that_are_in_one_panel_alone_and_covers_none(tmp_path):
    reports = {name: write_evaluation(tmp_path / name, 0.5) for name in ("a", "b")}
    reports["b"]["tasks"] = []
    figure = draw_scores(reports)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["guessing", "a", "b"]
    FigureCanvasAgg(figure).draw()
    box = figure.legends[0].get_window_extent()
    assert not any(box.overlaps(axes.get_window_extent()) for axes in figure.axes)


def test_the_title_is_not_cut_off(tmp_path):
    report = write_evaluation(tmp_path / "a", 0.5)
    report["tasks"] = []
    figure = draw_scores({"a name of a model that is longer than its only bar": report})
    FigureCanvasAgg(figure).draw()
    box, whole = figure._suptitle.get_window_extent(), figure.bbox
    assert whole.x0 <= box.x0 and box.x1 <= whole.x1


def test_scores_of_other_questions_are_not_in_one_place_of_the_picture(tmp_path):
    reports = {"a": write_evaluation(tmp_path / "a", 0.5), "b": write_evaluation(tmp_path / "b", 0.25, questions=20)}
    left, right = draw_scores(reports).axes
    names = ["arc_easy\nacc\n200 questions, 0 examples", "arc_easy\nacc\n20 questions, 0 examples"]
    assert [label.get_text() for label in left.get_xticklabels()] == names
    assert [label.get_text() for label in right.get_xticklabels()] == ["wikitext"]


def test_an_unusable_evaluation_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    runs = [write_run(tmp_path / "a", 1.0), write_run(tmp_path / "b", 1.0)]
    write_evaluation(runs[1], 0.5)
    for text in ("{", "{}", "[]", '{"tasks": [], "perplexity": []}'):
        (runs[1] / "evaluation" / "evaluation.json").write_text(text)
        with pytest.raises(InputError, match=r"is not a report of evaluate\.py .*: evaluate again, or remove it"):
            compare(monkeypatch, tmp_path / "out", *runs)
    assert not (tmp_path / "out.md").exists() and not (tmp_path / "out.png").exists()


def test_unusable_runs_are_refused(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run", 1.0)
    with pytest.raises(InputError, match="is not the output folder of a finished run"):
        compare(monkeypatch, tmp_path / "out", run, tmp_path / "absent")
    (run / "training_summary.json").write_text("{}")
    with pytest.raises(InputError, match="is not the output folder of a finished run"):
        compare(monkeypatch, tmp_path / "out", run)
    assert not (tmp_path / "out.md").exists()
