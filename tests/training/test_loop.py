import json
import os
import signal
import threading

import numpy as np
import pytest

from qscope_jax.errors import ConfigError, SourceError
from qscope_jax.training.loop import MetricsLog, best_state, train
from tests.training.walk import Walk, lines, settings


def interrupt(number=signal.SIGTERM):
    return lambda: os.kill(os.getpid(), number)


def fail():
    raise RuntimeError("a defect")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """State and metrics of the uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return train(Walk(), settings(folder)), lines(folder)


def assert_same_run(state, folder, whole):
    np.testing.assert_array_equal(state["sum"], whole[0]["sum"])
    assert state["steps"] == 10
    assert lines(folder) == whole[1]


def test_metrics_are_written_every_so_often_and_evaluations_between(whole):
    assert [line["step"] for line in whole[1]] == [2, 4, 4, 6, 8, 8, 10, 10]
    assert [set(line) - {"step"} for line in whole[1][:3]] == [{"loss", "parts"}, {"loss", "parts"}, {"held_out", "spread"}]
    assert whole[1][-2]["loss"] == float(whole[0]["sum"][0]) and len(whole[1][-2]["parts"]) == 2
    assert whole[1][-1]["held_out"] == float(whole[0]["sum"].sum())


def test_nothing_is_kept_without_a_folder(whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.testing.assert_array_equal(train(Walk(), settings())["sum"], whole[0]["sum"])
    assert not list(tmp_path.iterdir())


def test_sigterm_saves_and_the_resumed_run_equals_the_uninterrupted_one(whole, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    stopped = train(Walk(at={5: interrupt()}), settings(tmp_path / "run"))
    assert stopped["steps"] == 5 and signal.getsignal(signal.SIGTERM) is before
    assert_same_run(train(Walk(), settings(tmp_path / "run", resume=True)), tmp_path / "run", whole)


def test_sigterm_at_a_step_that_saves_anyway(whole, tmp_path):
    train(Walk(at={6: interrupt()}), settings(tmp_path / "run"))
    assert_same_run(train(Walk(), settings(tmp_path / "run", resume=True)), tmp_path / "run", whole)


def test_sigterm_at_the_last_step(whole, tmp_path):
    assert_same_run(train(Walk(at={10: interrupt()}), settings(tmp_path / "run")), tmp_path / "run", whole)


def test_metrics_written_after_the_checkpoint_are_cut_on_resume(whole, tmp_path):
    with pytest.raises(RuntimeError, match="a defect"):
        train(Walk(at={9: fail}), settings(tmp_path / "run"))
    assert [line["step"] for line in lines(tmp_path / "run")] == [2, 4, 4, 6, 8, 8]
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "lo')
    assert_same_run(train(Walk(), settings(tmp_path / "run", resume=True)), tmp_path / "run", whole)


def test_a_finished_run_that_is_resumed_changes_nothing(whole, tmp_path):
    train(Walk(), settings(tmp_path / "run"))
    assert_same_run(train(Walk(), settings(tmp_path / "run", resume=True)), tmp_path / "run", whole)


def test_a_longer_run_continues_a_shorter_one(whole, tmp_path):
    train(Walk(), settings(tmp_path / "run", steps=6))
    state = train(Walk(), settings(tmp_path / "run", resume=True))
    np.testing.assert_array_equal(state["sum"], whole[0]["sum"])


def test_resume_of_an_empty_folder_begins_anew(whole, tmp_path):
    assert_same_run(train(Walk(), settings(tmp_path / "run", resume=True)), tmp_path / "run", whole)


def test_a_folder_that_holds_a_run_is_refused_and_left_alone(whole, tmp_path):
    train(Walk(), settings(tmp_path / "run"))
    with pytest.raises(SourceError, match="run: already holds a run at step 10; resume it, or choose another run_dir"):
        train(Walk(), settings(tmp_path / "run"))
    assert lines(tmp_path / "run") == whole[1]


def test_the_checkpoint_of_another_run_is_refused_in_one_line(tmp_path):
    train(Walk(), settings(tmp_path / "run", steps=2))
    with pytest.raises(SourceError, match=r"checkpoint 2 does not fit this run \(sum is float32\[3\], this run has float32\[5\]\)") as caught:
        train(Walk(width=5), settings(tmp_path / "run", resume=True))
    assert "\n" not in str(caught.value)
    assert [line["step"] for line in lines(tmp_path / "run")] == [2, 2]


def test_a_loop_outside_the_main_thread_runs_without_listening_for_signals(whole):
    results = []
    thread = threading.Thread(target=lambda: results.append(train(Walk(), settings())))
    thread.start()
    thread.join()
    np.testing.assert_array_equal(results[0]["sum"], whole[0]["sum"])


def test_the_progress_bar_says_what_is_trained_how_fast_and_how_well(capsys):
    train(Walk(), settings(progress=True))
    shown = capsys.readouterr().out
    assert "walk" in shown and "10/10" in shown and "steps/s" in shown and "loss " in shown


@pytest.mark.parametrize(
    "changes, message", [({"steps": 0}, "steps is 0"), ({"log_every": 0}, "log_every 0"), ({"resume": True}, "resume needs run_dir")]
)
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        settings(**changes)


def test_a_log_without_a_file_remembers_the_last_numbers():
    log = MetricsLog(None)
    log.write(1, {"loss": 2.0, "parts": [1.0]})
    log.write(2, {})
    assert log.last == {"loss": 2.0}


def test_a_metric_that_is_not_a_number_is_null_in_the_log(tmp_path):
    MetricsLog(tmp_path / "metrics.jsonl").write(1, {"loss": float("nan"), "parts": [1.0, float("inf")]})
    line = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8")
    assert json.loads(line, parse_constant=pytest.fail) == {"step": 1, "loss": None, "parts": [1.0, None]}
