from qscope_jax.cli.streaming import TextStream


def decode(ids) -> str:
    return bytes(ids).decode("utf-8", "replace")


def shown(steps: list[bytes], **settings) -> list[str]:
    pieces: list[str] = []
    stream = TextStream(decode, pieces.append, **settings)
    for step in steps:
        stream.update(list(step))
    stream.finish(list(steps[-1]))
    return pieces


def test_characters_appear_whole_wherever_tokens_cut_them():
    text = "tea 奶奶 🍵!".encode()
    pieces = shown([text[:length] for length in range(1, len(text) + 1)])
    assert "".join(pieces) == "tea 奶奶 🍵!" and "🍵" in pieces and not any("\ufffd" in piece for piece in pieces)


def test_half_a_character_at_the_end_is_shown_in_the_end():
    assert shown([b"a", b"a\xe5", b"a\xe5\xa5"]) == ["a", "\ufffd"]


def test_a_stop_token_is_not_shown():
    assert "".join(shown([b"ab", b"ab."], stop_ids={ord(".")})) == "ab"
    assert "".join(shown([b"a.", b"a.b"], stop_ids={ord(".")})) == "a.b"


def test_a_model_cannot_steer_the_terminal():
    assert shown([b"a\x1b[2Jb\n\tc"]) == ["a\ufffd[2Jb\n\tc"]


def test_tokenizers_that_treat_a_first_token_apart_keep_their_spaces():
    pieces: list[str] = []
    stream = TextStream(lambda ids: " ".join(map(str, ids)), pieces.append)
    for count in range(1, 5):
        stream.update(list(range(count)))
    assert "".join(pieces) == "0 1 2 3"
