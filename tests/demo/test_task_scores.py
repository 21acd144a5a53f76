import json
from functools import partial

import jax
import numpy as np
import pytest

from qscope_jax.demo import task_scores
from qscope_jax.demo.embedded import TINY
from qscope_jax.demo.recipe import CHECKPOINTS, SCORES
from qscope_jax.demo.task_scores import CheckpointScores, answered, read_scores, write_scores
from qscope_jax.demo.tasks import Sample, Task, tasks
from qscope_jax.errors import SourceError


def options_losses(model, sample: Sample) -> list[float]:
    """The loss of each option, from the logits of whole texts."""
    start = len(model.tokenize([sample.prompt])[0])
    texts = [f"{sample.prompt} {option}\n" for option in sample.options]
    chances = jax.nn.log_softmax(model.logits(texts)[0], axis=-1)
    return [-sum(float(chances[row, i - 1, ids[i]]) for i in range(start, len(ids))) for row, ids in enumerate(model.tokenize(texts))]


def test_a_sample_is_right_where_the_answer_is_likelier_than_every_other_option(small_model):
    task = next(task for task in tasks() if task.name == "facts")
    task = Task(task.name, task.family, task.samples[:4])
    expected = [sample.options[int(np.argmin(options_losses(small_model, sample)))] == sample.answer for sample in task.samples]
    found = answered(small_model.decoder, lambda text: small_model.tokenize([text])[0], task)
    assert found.tolist() == expected and found.dtype == bool


def test_options_of_several_tokens_are_judged_by_their_sum(small_model):
    losses = options_losses(small_model, Sample("copy b t k :", "", ("b t k", "t", "k")))
    # A random model gives every token about the same, so that the shortest option wins.
    sample = Sample("copy b t k :", ("t", "k")[int(losses[2] < losses[1])], ("b t k", "t", "k"))
    assert answered(small_model.decoder, lambda text: small_model.tokenize([text])[0], Task("x", "y", (sample,))).tolist() == [True]


def test_an_option_that_begins_another_loses_to_it_where_its_line_does_not_end_there(small_model, monkeypatch):
    """Losses as of a model that is sure of `t k` and of nothing else: a line that ends after `t` surprises it."""
    tokenize = partial(_one, small_model)
    sure = {
        tuple(tokenize(f"copy t k : {option}{end}")): loss for option, end, loss in (("t", "", 0), ("t", "\n", 9), ("t k", "", 0), ("t k", "\n", 0))
    }

    def losses_after(decoder, tokens_BT, segment_ids, starts_B):
        rows = [tuple(np.asarray(row)[np.asarray(segments) > 0].tolist()) for row, segments in zip(tokens_BT, segment_ids, strict=True)]
        return np.array([float(sure.get(row, 99)) for row in rows])

    monkeypatch.setattr(task_scores, "_losses_after", losses_after)
    task = Task("x", "y", (Sample("copy t k :", "t k", ("t", "t k")),))
    assert answered(small_model.decoder, tokenize, task).tolist() == [True]


def _one(model, text: str) -> list[int]:
    return model.tokenize([text])[0]


def test_scores_come_back_as_they_were_written(tmp_path):
    rng = np.random.default_rng(0)
    scores = CheckpointScores(np.array([10, 20]), np.array([7.0, 6.0]), {"last letter": rng.random((2, 17)) < 0.5, "facts": rng.random((2, 3)) < 0.5})
    write_scores(tmp_path / "scores.npz", scores)
    back = read_scores(tmp_path / "scores.npz")
    np.testing.assert_array_equal(back.steps, scores.steps)
    np.testing.assert_array_equal(back.losses, scores.losses)
    assert list(back.correct) == ["last letter", "facts"]
    for name, correct in scores.correct.items():
        np.testing.assert_array_equal(back.correct[name], correct)


@pytest.mark.parametrize("content", [None, b"", b"PK no zip", b"not an archive"])
def test_a_file_of_something_else_is_refused_in_one_line(tmp_path, content):
    path = tmp_path / "scores.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SourceError, match=r"scores\.npz: not the scores of checkpoints") as error:
        read_scores(path)
    assert "\n" not in str(error.value)


@pytest.mark.skipif(not (TINY / SCORES).is_file(), reason="the embedded model is not there")
def test_the_embedded_models_scores_are_of_its_own_run_and_small():
    scores, record = read_scores(TINY / SCORES), json.loads((TINY / "recipe.json").read_text(encoding="utf-8"))
    assert (TINY / SCORES).stat().st_size < 50_000
    assert len(scores.steps) == CHECKPOINTS and scores.steps[-1] == record["training"]["steps"]
    assert scores.losses[-1] == pytest.approx(record["metrics"]["held_out_loss"])
    assert {name: correct.shape for name, correct in scores.correct.items()} == {task.name: (CHECKPOINTS, len(task.samples)) for task in tasks()}
    for name, correct in scores.correct.items():
        assert correct[-1].mean() == pytest.approx(record["metrics"][f"accuracy {name}"])
