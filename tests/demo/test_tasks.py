import random
from collections import Counter

import pytest

from qscope_jax.demo.tasks import Sample, Task, task_document, tasks

NAMES = [task.name for task in tasks()]


def named(name: str) -> Task:
    return next(task for task in tasks() if task.name == name)


def test_twelve_tasks_in_five_families_have_sizes_on_a_geometric_ladder():
    assert len(set(NAMES)) == 12 and len({task.family for task in tasks()}) == 5
    sizes = sorted(len(task.samples) for task in tasks())
    assert sizes == [10, 13, 17, 23, 30, 40, 53, 70, 92, 121, 160, 200]
    assert all(1.2 < b / a < 1.4 for a, b in zip(sizes, sizes[1:], strict=False))


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
    for sample in named("comparison").samples:
        assert int(sample.answer) == (min if sample.prompt.startswith("smaller") else max)(numbers(sample))
    for name, answer in (("copying", lambda x: x), ("reversal", lambda x: x[::-1]), ("last letter", lambda x: x[-1:])):
        assert all(sample.answer.split() == answer(sample.prompt.split()[1:-1]) for sample in named(name).samples)
    for sample in named("agreement").samples:
        assert sample.answer.endswith("s") != sample.prompt.endswith("s")


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
    known = {f"{sample.prompt} {sample.answer}": task.name for task in tasks() for sample in task.samples}
    seen = Counter()
    for document in drawn:
        names = {known[line] for line in document.split("\n") if line in known}
        assert len(names) <= 1
        seen.update(names)
    assert set(seen) == set(NAMES)
