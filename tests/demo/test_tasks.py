import random
from collections import Counter

import numpy as np
import pytest

from qscope_jax.demo.tasks import Sample, Task, task_document, tasks

NAMES = [task.name for task in tasks()]


def named(name: str) -> Task:
    return next(task for task in tasks() if task.name == name)


def questions(task: Task) -> list[Sample]:
    """Each question of a task once, without who asks it, from the easiest on."""
    found = {sample.prompt.split(" : ", 1)[1]: sample for sample in task.samples}
    return [Sample(prompt, sample.answer, sample.options) for prompt, sample in found.items()]


def test_twelve_tasks_in_five_families_grow_in_questions_as_their_askers_become_fewer():
    assert len(set(NAMES)) == 12 and len({task.family for task in tasks()}) == 5
    rungs = sorted((len(questions(task)), task.askers) for task in tasks())
    assert [count for count, _ in rungs] == [6, 8, 10, 12, 15, 18, 22, 26, 30, 34, 37, 40]
    assert [askers for _, askers in rungs] == [40, 27, 19, 13, 9, 6, 4, 3, 2, 1, 1, 1]
    assert all(len(task.samples) == len(questions(task)) * task.askers for task in tasks())


def test_every_family_of_three_has_a_redundant_a_middling_and_a_varied_task():
    for family in ("arithmetic", "letters", "words"):
        few, some, many = sorted(len(questions(task)) for task in tasks() if task.family == family)
        assert few <= 12 and 18 <= some <= 26 and many >= 34


def test_whoever_asks_a_question_its_answer_and_options_are_the_same():
    for task in tasks():
        asked: dict[str, list[Sample]] = {}
        for sample in task.samples:
            asked.setdefault(sample.prompt.split(" : ", 1)[1], []).append(sample)
        assert {len(same) for same in asked.values()} == {task.askers}
        assert all(len({(sample.answer, sample.options) for sample in same}) == 1 for same in asked.values())


@pytest.mark.parametrize("name", NAMES)
def test_no_prompt_stands_twice_and_the_answer_is_among_the_options(name):
    samples = named(name).samples
    assert len({sample.prompt for sample in samples}) == len(samples)
    for sample in samples:
        assert sample.answer in sample.options and 2 <= len(set(sample.options)) == len(sample.options) <= 4


def test_tasks_of_a_family_end_their_prompts_alike():
    ends = {family: {sample.prompt.split()[-1] for task in tasks() if task.family == family for sample in task.samples} for family in
            ("arithmetic", "letters", "words")}  # fmt: skip
    assert ends == {"arithmetic": {"="}, "letters": {":"}, "words": {"->"}}


def numbers(sample: Sample) -> list[int]:
    return [int(word) for word in sample.prompt.split() if word.isdigit()]


def test_answers_are_right():
    assert all(sum(numbers(sample)) == int(sample.answer) for sample in named("addition").samples)
    for sample in named("subtraction").samples:
        assert max(numbers(sample)) - min(numbers(sample)) == int(sample.answer) >= 0
    for sample in questions(named("comparison")):
        assert int(sample.answer) == (min if sample.prompt.startswith("smallest") else max)(numbers(sample))
    for name, answer in (("copying", lambda x: x), ("reversal", lambda x: x[::-1]), ("last letter", lambda x: x[-1:])):
        assert all(sample.answer.split() == answer(sample.prompt.split()[1:-1]) for sample in questions(named(name)))
    for sample in named("agreement").samples:
        assert sample.answer.endswith("s") != sample.prompt.endswith("s")


def test_questions_stand_from_easy_to_hard():
    lengths = {
        name: [len(sample.prompt.split()) for sample in questions(named(name))] for name in ("comparison", "copying", "reversal", "last letter")
    }
    assert all(found == sorted(found) and found[0] < found[-1] for found in lengths.values())
    sums = [sum(numbers(sample)) for sample in questions(named("addition"))]
    assert sums == sorted(sums)
    regular = [sample.answer.endswith("ed") for sample in questions(named("tense"))]
    assert regular == sorted(regular, reverse=True) and len(set(regular)) == 2


def test_no_prompt_begins_with_what_it_asks_about():
    words = {word for name in ("into French", "into English", "opposites") for sample in named(name).samples for word in sample.options}
    for task in tasks():
        firsts = {sample.prompt.split()[0] for sample in task.samples}
        assert not firsts & words and not any(first.isdigit() or len(first) == 1 for first in firsts - {"A"})


def test_the_tasks_are_always_the_same():
    before = tasks()
    tasks.cache_clear()
    assert tasks() == before and tasks() is not before


def test_documents_are_solved_samples_of_one_task():
    rng = random.Random(0)
    drawn = [task_document(rng) for _ in range(600)]
    assert {document.count("\n") for document in drawn} == {5}
    known = {f"{sample.prompt} {sample.answer}": task.name for task in tasks() for sample in questions(task)}
    named_by = [{known[line.split(" : ", 1)[1]] for line in document.split("\n")} for document in drawn]
    assert all(len(names) == 1 for names in named_by) and set.union(*named_by) == set(NAMES)


def test_documents_ask_the_harder_questions_more_rarely_whatever_the_task():
    rng = random.Random(0)
    asked = Counter(line.split(" : ", 1)[1] for _ in range(12_000) for line in task_document(rng).split("\n"))
    for task in tasks():
        counts = [asked[f"{sample.prompt} {sample.answer}"] for sample in questions(task)]
        ladder = np.geomspace(400 / len(counts), 1, len(counts))
        np.testing.assert_allclose(np.array(counts) / sum(counts), ladder / ladder.sum(), atol=0.02)
        assert 10 < counts[-1] < counts[0]
