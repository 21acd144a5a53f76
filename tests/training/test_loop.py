import json
import os
import shutil
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


def test_a_recipe_may_end_the_run_which_is_evaluated_and_saved_there(whole, tmp_path):
    ending = Walk()
    ending.at = {5: lambda: setattr(ending, "ended", "enough")}
    state = train(ending, settings(tmp_path / "run"))
    assert state["steps"] == 5 and [line["step"] for line in lines(tmp_path / "run")] == [2, 4, 4, 5, 5]
    assert lines(tmp_path / "run")[-1]["held_out"] == float(state["sum"].sum())
    np.testing.assert_array_equal(train(Walk(), settings(tmp_path / "run", resume=True))["sum"], whole[0]["sum"])


def test_nothing_is_kept_without_a_folder(whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.testing.assert_array_equal(train(Walk(), settings())["sum"], whole[0]["sum"])
    assert not list(tmp_path.iterdir())


def test_sigterm_saves_and_the_resumed_run_equals_the_uninterrupted_one(whole, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    stopped = train(Walk(at={5: interrupt()}), settings(tmp_path / "run"))
    assert stopped["steps"] == 5 and signal.getsignal(signal.SIGTERM) is before
    assert_same_run(train(Walk(), settings(tmp_path / "run", resume=True)), tmp_path / "run", whole)


def test_one_interrupt_saves_and_stops_too(whole, tmp_path, capfd):
    stopped = train(Walk(at={5: interrupt(signal.SIGINT)}), settings(tmp_path / "run"))
    assert stopped["steps"] == 5
    assert capfd.readouterr().err == "SIGINT: the run saves and stops after this step; a second SIGINT stops it at once\n"
    assert_same_run(train(Walk(), settings(tmp_path / "run", resume=True)), tmp_path / "run", whole)


def test_a_second_interrupt_saves_nothing_more(whole, tmp_path):
    def twice():
        for _ in range(2):
            interrupt(signal.SIGINT)()

    with pytest.raises(KeyboardInterrupt):
        train(Walk(at={5: twice}), settings(tmp_path / "run"))
    assert not (tmp_path / "run/checkpoints/5").exists()
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


def harmed(path, kind):
    content = path.read_bytes()
    middle = len(content) // 2
    if kind == "altered":
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    elif kind == "cut":
        path.write_bytes(content[:middle])
    elif kind == "missing":
        path.unlink()
    else:
        path.with_name("junk").write_bytes(content)


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """A run that stopped at step 7, whose last whole checkpoint but one is of step 6."""
    folder = tmp_path_factory.mktemp("half") / "run"
    train(Walk(at={7: interrupt()}), settings(folder))
    return folder


@pytest.mark.parametrize("index", range(8))
def test_a_torn_checkpoint_costs_the_steps_since_the_one_before_and_no_more(index, whole, half, tmp_path, capfd):
    run = tmp_path / "run"
    shutil.copytree(half, run)
    files = sorted(path for path in (run / "checkpoints/7").rglob("*") if path.is_file() and path.stat().st_size)
    harmed(files[index * len(files) // 8], ("altered", "cut", "missing", "junk")[index % 4])
    assert_same_run(train(Walk(), settings(run, resume=True)), run, whole)
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and "checkpoint 7 is torn (" in said and said.endswith("the run goes on from step 6\n")


def test_a_run_whose_checkpoints_are_all_torn_begins_anew(whole, half, tmp_path, capfd):
    shutil.copytree(half, tmp_path / "run")
    for step in (6, 7):
        (tmp_path / f"run/checkpoints/{step}/record.json").unlink()
    assert_same_run(train(Walk(), settings(tmp_path / "run", resume=True)), tmp_path / "run", whole)
    first, second = capfd.readouterr().err.splitlines()
    assert first.endswith("checkpoint 7 is torn (it was not finished) and set aside as torn-7; the run goes on from step 6")
    assert second.endswith("checkpoint 6 is torn (it was not finished) and set aside as torn-6; none is left, the run begins anew")


class Valley(Walk):
    """A walk whose held-out metric, a list over two layers, is least at step 6."""

    def evaluate(self, state):
        distance = abs(int(state["steps"]) - 6.0)
        return {"held_out": True, "fvu": [distance, distance + 1]}


def test_the_best_checkpoint_is_kept_and_can_be_had(tmp_path):
    config = settings(tmp_path / "run", steps=18, eval_every=3, keep_best="fvu")
    last = train(Valley(), config)
    assert sorted(int(path.name) for path in (tmp_path / "run/checkpoints").iterdir()) == [6, 15, 18]
    for like in (None, last):
        state, step, value = best_state(Valley(), config, like)
        assert (step, value, state["steps"], last["steps"]) == (6, 0.5, 6, 18)
    # It outlives a later run as well, which asks for the greatest only afterwards.
    train(Valley(), settings(tmp_path / "run", steps=24, eval_every=3, keep_best="fvu", resume=True))
    assert best_state(Valley(), config)[1] == 6
    assert best_state(Valley(), settings(tmp_path / "run", keep_best="fvu", keep_best_mode="max"))[1:] == (24, 18.5)


def test_a_run_that_is_stopped_and_resumed_keeps_the_same_best(tmp_path):
    config = settings(tmp_path / "run", steps=18, eval_every=3, keep_best="fvu", resume=True)
    train(Valley(at={10: interrupt()}), config)
    assert best_state(Valley(), config)[1] == 6
    train(Valley(), config)
    assert sorted(int(path.name) for path in (tmp_path / "run/checkpoints").iterdir()) == [6, 15, 18]


def test_without_an_evaluated_checkpoint_there_is_no_best(tmp_path):
    train(Walk(at={2: interrupt()}), settings(tmp_path / "run"))
    with pytest.raises(SourceError, match="run: holds no checkpoint with an evaluation of fvu"):
        best_state(Walk(), settings(tmp_path / "run", keep_best="fvu"))
    with pytest.raises(ConfigError, match="keep_best is not set"):
        best_state(Walk(), settings(tmp_path / "run"))


def test_a_metric_that_the_evaluation_lacks_is_named_with_those_it_has(tmp_path):
    with pytest.raises(ConfigError, match="keep_best is fvu, but the evaluation gives held_out, spread; choose one of these"):
        train(Walk(), settings(tmp_path / "run", keep_best="fvu"))


def test_a_last_evaluation_that_fails_does_not_lose_the_run(tmp_path):
    class Broken(Walk):
        def evaluate(self, state):
            fail()

    with pytest.raises(RuntimeError, match="a defect"):
        train(Broken(), settings(tmp_path / "run", eval_every=0, checkpoint_every=0))
    assert train(Walk(), settings(tmp_path / "run", resume=True))["steps"] == 10
    assert [line["step"] for line in lines(tmp_path / "run")][-2:] == [10, 10]


def test_rates_are_written_beside_the_metrics_and_cut_like_them(tmp_path):
    train(Walk(at={7: interrupt()}), settings(tmp_path / "run", checkpoint_every=0))
    train(Walk(), settings(tmp_path / "run", resume=True))
    rates = [json.loads(line) for line in (tmp_path / "run/rates.jsonl").read_text().splitlines()]
    assert [line["step"] for line in rates] == [2, 4, 6, 8, 10]
    assert all(line["steps_per_second"] > 0 for line in rates)


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SourceError, match="file/run/checkpoints: cannot be written") as caught:
        train(Walk(), settings(tmp_path / "file/run"))
    assert "\n" not in str(caught.value)


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
    "changes, message",
    [
        ({"steps": 0}, "steps is 0"),
        ({"log_every": 0}, "log_every 0"),
        ({"keep_checkpoints": 0}, "keep_checkpoints is 0"),
        ({"keep_best_mode": "least"}, "keep_best_mode is least, expected min or max"),
        ({"resume": True}, "resume needs run_dir"),
        ({"keep_best": "fvu"}, "keep_best needs run_dir"),
        ({"tensorboard": True}, "tensorboard needs run_dir"),
        ({"wandb": "project"}, "wandb needs run_dir"),
    ],
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
