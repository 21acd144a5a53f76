import numpy as np
import pytest

from qscope_jax.errors import InputError
from qscope_jax.features.generation.generators import Message
from qscope_jax.features.generation.local_generator import CONTINUATION, DIALOGUE, LocalGenerator, continue_prompts, text_seeds
from qscope_jax.features.steering import add_directions
from qscope_jax.models.language_model import Completion, LanguageModel
from qscope_jax.models.sampling import SamplingConfig


def ask(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]


def test_an_answer_is_what_the_model_continues_with(character_model):
    generate = LocalGenerator(character_model, template=CONTINUATION)
    texts = ["one", "a longer text", "x"]
    direct = [answer.text.strip() for answer in character_model.generate([*texts, "x"], max_new_tokens=6)[:3]]
    assert [reply.text for reply in generate([ask(text) for text in texts], max_tokens=6)] == direct


def test_an_answer_depends_on_its_conversation_and_the_seed_alone(character_model):
    generate = LocalGenerator(character_model, template=CONTINUATION, batch_size=4)
    texts = [f"text {i} {'.' * (3 * i % 5)}" for i in range(9)]
    together = generate([ask(text) for text in texts], max_tokens=6, temperature=1.0, seed=3)
    assert [generate([ask(text)], max_tokens=6, temperature=1.0, seed=3)[0] for text in texts[::4]] == together[::4]
    assert generate([ask(text) for text in texts], max_tokens=6, temperature=1.0, seed=4) != together


def test_equal_conversations_draw_differently(character_model):
    replies = LocalGenerator(character_model, template=CONTINUATION)([ask("text")] * 4, max_tokens=6, temperature=1.0)
    assert len({reply.text for reply in replies}) > 1


def test_edits_act_on_every_answer(character_model):
    edit = add_directions(1, np.eye(1, 32, 3) * 200, 1.0)
    plain, edited = (LocalGenerator(character_model, template=CONTINUATION, edits=edits) for edits in ((), (edit,)))
    texts = [ask("one"), ask("two"), ask("three")]
    assert plain(texts, max_tokens=6) != edited(texts, max_tokens=6)
    assert edited.name == f"{plain.name}, edited"


def test_a_dialogue_is_written_out_and_ends_at_the_next_turn(character_model, monkeypatch):
    conversation: list[Message] = [{"role": "system", "content": "be brief"}, *ask("why?")]
    assert DIALOGUE.render(conversation) == "System: be brief\nUser: why?\nAssistant:"
    monkeypatch.setattr(character_model, "generate", lambda *a, **k: [Completion("", " so.\nUser: and?", (1,), False)])
    assert LocalGenerator(character_model)([ask("why?")])[0].text == "so."


def test_the_chat_template_is_used_where_there_is_one(character_model):
    class Tokenizer(type(character_model.tokenizer)):
        chat_template = "there"

        def apply_chat_template(self, turns, tokenize, add_generation_prompt, **settings):
            return f"<{turns[-1]['content']}>{settings.get('thinking', '')}"

    model = LanguageModel(character_model.decoder, tokenizer=Tokenizer())
    generate = LocalGenerator(model, chat_settings={"thinking": "!"})
    assert generate([ask("a")], max_tokens=4)[0].text == character_model.generate(["<a>!"], max_new_tokens=4)[0].text.strip()
    assert not LocalGenerator(model, chat=False).chat
    with pytest.raises(InputError, match="no chat template"):
        LocalGenerator(character_model, chat=True)


def test_what_cannot_be_answered_does_not_fail_the_others(character_model):
    room = character_model.config.max_positions
    replies = LocalGenerator(character_model, template=CONTINUATION)([ask("a" * room), ask(" "), [], ask("one")], max_tokens=6)
    assert f"{room} tokens; {room - 6} fit" in replies[0].error and "empty" in replies[1].error and "empty" in replies[2].error
    assert replies[3].text and not replies[3].error


def test_batches_are_filled_up_to_few_sizes(character_model, monkeypatch):
    sizes: list[int] = []
    answer = Completion("a", "b", (1,), False)

    def counted(prompts, *rest, **settings):
        sizes.append(len(prompts))
        return [answer] * len(prompts)

    monkeypatch.setattr(character_model, "generate", counted)
    for count in (1, 3, 4, 11):
        made = continue_prompts(character_model, ["a"] * count, SamplingConfig(2), row_seeds=range(count), batch_size=8)
        assert len(made) == count
    assert sizes == [1, 4, 4, 8, 4]
    sizes.clear()
    made = continue_prompts(character_model, ["a"] * 11, SamplingConfig(2), row_seeds=range(11), batch_size=8, whole_batches=True)
    assert len(made) == 11 and sizes == [8, 8]
    assert continue_prompts(character_model, [], SamplingConfig(2), row_seeds=[]) == []


def test_a_batch_has_rows(character_model):
    with pytest.raises(InputError, match="batch_size is 0"):
        LocalGenerator(character_model, batch_size=0)


def test_seeds_are_stable_and_distinct():
    assert text_seeds(["a", "b", "a"])[:2] == text_seeds(["a", "b"]) and len(set(text_seeds(["a", "b", "a"]))) == 3
