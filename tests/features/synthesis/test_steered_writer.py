import numpy as np
import pytest

from qscope_jax.errors import InputError
from qscope_jax.features.steering import steer
from qscope_jax.features.synthesis.steered_writer import SteeredWriter
from qscope_jax.features.synthesis.targets import Target
from qscope_jax.features.synthesis.writers import Request

NORMS = {0: 10.0, 1: 20.0, 2: 40.0}


@pytest.fixture
def writer(character_model, saes):
    def make(**settings) -> SteeredWriter:
        values = {"prompts": ["one", "the other"], "doses": (3.0,), "max_tokens": 6, "temperature": 0.0, "top_p": 1.0, "batch_size": 4, **settings}
        return SteeredWriter(character_model, {sae.layer: sae for sae in saes}, NORMS, **values)

    return make


CHOSEN = [(0, 3, 0), (2, 5, 0), (1, 3, 1), (1, 20, 0), (0, 23, 2), (2, 5, 1), (0, 3, 1), (2, 9, 0)]
REQUESTS = [Request(Target(layer, feature), attempt) for layer, feature, attempt in CHOSEN]


def test_each_row_is_steered_by_its_own_target_and_by_no_other(writer, character_model, saes):
    write = writer(prompts=["one"], doses=(1.5, 3.0))
    found = write(REQUESTS)
    for request, reply in zip(REQUESTS, found, strict=True):
        target, dose = request.target, (1.5, 3.0)[request.attempt % 2]
        edit = steer(saes[target.layer], target.feature, dose, unit="residual", residual_norm=NORMS[target.layer])
        alone = character_model.generate(["one"], max_new_tokens=6, edits=[edit])[0]
        assert reply.text == ("one" + alone.text).strip()
    assert len({reply.text for reply in found}) > 3
    assert [write.dose(request) for request in REQUESTS] == [1.5, 1.5, 3.0, 1.5, 1.5, 3.0, 3.0, 1.5]


def test_other_targets_compile_nothing_new(writer, count_compilations):
    write = writer(prompts=["one"])
    write(REQUESTS[:4])
    with count_compilations() as compiled:
        write([Request(Target(layer, feature), 5) for layer, feature in [(2, 0), (2, 1), (0, 9), (1, 7)]])
    assert compiled.count == 0


def test_whole_batches_hold_the_same_texts_and_compile_for_one_number_of_rows(writer, count_compilations):
    apart, whole = writer(prompts=["one"]), writer(prompts=["one"], whole_batches=True)
    assert whole(REQUESTS[:5]) == apart(REQUESTS[:5])
    with count_compilations() as compiled:
        found = [whole(REQUESTS[:count]) for count in (1, 2, 3)]
    assert compiled.count == 0 and found[2] == apart(REQUESTS[:3])


def test_a_text_depends_on_its_request_and_the_seed_alone(writer):
    write = writer(temperature=1.0)
    together = write(REQUESTS, seed=2)
    assert [write([request], seed=2)[0] for request in REQUESTS[::2]] == together[::2]
    assert write(REQUESTS, seed=3) != together


def test_of_a_context_nothing_is_kept(writer, character_model):
    write = writer(contexts={"0/3": ["a context", "another one"]}, separator="/", doses=(1e-9,))
    first, second, other = write([Request(Target(0, 3), 0), Request(Target(0, 3), 1), Request(Target(0, 4), 0)])
    expected = [answer.text.strip() for answer in character_model.generate(["a context/", "another one/"], max_new_tokens=6)]
    assert [first.text, second.text] == expected
    assert other.text.startswith(("one", "the other"))


def test_the_control_continues_the_same_prompts_without_steering_or_contexts(writer, character_model):
    write = writer(contexts={"0/3": ["a context"]})
    control = write.untargeted()
    prompts = [next(prompt for prompt in ("one", "the other") if reply.text.startswith(prompt)) for reply in control(REQUESTS)]
    plain = [(prompt + character_model.generate([prompt], max_new_tokens=6)[0].text).strip() for prompt in prompts]
    assert [reply.text for reply in control(REQUESTS)] == plain
    assert control.name.endswith("untargeted") and control.dose(REQUESTS[0]) == 0


def test_what_makes_no_sense_is_refused(writer, character_model, saes):
    cases = [
        ("no SAE of layer 7", lambda: writer()([Request(Target(7, 0), 0)])),
        ("feature 24 is out of range", lambda: writer()([Request(Target(0, 24), 0)])),
        ("needs neutral prompts", lambda: writer(prompts=[])),
        ("needs neutral prompts", lambda: writer(prompts=[" "])),
        (r"doses are \[0.0\]", lambda: writer(doses=(0.0,))),
        (r"doses are \[nan\]", lambda: writer(doses=(np.nan,))),
        ("batch_size is 0", lambda: writer(batch_size=0)),
        ("no residual norm for layer 2", lambda: SteeredWriter(character_model, {2: saes[2]}, {0: 1.0}, ["one"])),
    ]
    for line, call in cases:
        with pytest.raises(InputError, match=line):
            call()
