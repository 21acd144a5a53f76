import numpy as np
import pytest

from qscope_jax.data.text_splits import distinct_texts, split_as_given, split_at_random
from qscope_jax.errors import InputError


def test_repeats_stay_once_and_contradictions_not_at_all():
    found = distinct_texts(["a", "b", " a\n", "c", "b", "c"], ["x", "x", "x", "y", "y", "y"])
    assert found.kept.tolist() == [0, 3] and (found.repeated, found.contradictory) == (2, 2)


def test_every_class_of_every_language_is_held_out_in_its_share():
    texts = [f"text {i}" for i in range(100)]
    labels = ["rude" if i % 2 else "polite" for i in range(100)]
    languages = ["en" if i < 60 else "fr" for i in range(100)]
    split = split_at_random(texts, labels, languages, share=0.2, seed=3)
    held = [(languages[i], labels[i]) for i in split.evaluation]
    assert {stratum: held.count(stratum) for stratum in set(held)} == {("en", "rude"): 6, ("en", "polite"): 6, ("fr", "rude"): 4, ("fr", "polite"): 4}
    assert sorted([*split.discovery, *split.evaluation]) == list(range(100)) and not split.removed()
    again, other = (split_at_random(texts, labels, languages, share=0.2, seed=seed).evaluation.tolist() for seed in (3, 4))
    assert again == split.evaluation.tolist() != other


def test_no_text_is_in_both_halves_whatever_repeats():
    rng = np.random.default_rng(0)
    texts = [f"text {i}" for i in rng.integers(0, 60, 200)]
    labels = [("a", "b")[int(text[5:]) % 2] for text in texts]
    split = split_at_random(texts, labels)
    halves = [{texts[i] for i in half} for half in (split.discovery, split.evaluation)]
    assert not halves[0] & halves[1] and halves[0] | halves[1] == set(texts)
    assert split.repeated == 200 - len(set(texts)) and f"{split.repeated} repeated" in split.removed()


def test_a_given_split_keeps_its_evaluation_texts_and_loses_what_discovery_shares_with_them():
    #        0    1    2    3    4    5    6     7    8    9    10
    texts = ["a", "b", "c", "d", "a", "e", "e ", "f", "g", "d", "h"]
    labels = ["x", "y", "x", "y", "x", "x", "x", "y", "x", "x", "y"]
    halves = ["train", "Train", "train", "train", "test", "test", "test", "test", "validation", "test", "train"]
    split = split_as_given(texts, labels, halves)
    assert split.discovery.tolist() == [1, 2, 10] and split.evaluation.tolist() == [4, 5, 7]
    assert (split.repeated, split.contradictory, split.crossing, split.unused) == (1, 2, 1, 1)
    assert split.removed() == "1 repeated, 2 with several classes, 1 of discovery that evaluation has too, 1 of neither half"


def test_texts_that_cannot_be_split_are_refused_in_words():
    texts, labels = [f"text {i}" for i in range(20)], ["a", "b"] * 10
    with pytest.raises(InputError, match="20 texts came with 19 labels"):
        split_at_random(texts, labels[1:])
    with pytest.raises(InputError, match="20 texts came with 19 labels"):
        split_as_given(texts, labels[1:], ["train", "test"] * 10)
    with pytest.raises(InputError, match="have class 'a' only; two classes"):
        split_at_random(texts, ["a"] * 20)
    with pytest.raises(InputError, match="class 'b' of 'fr' has 0 texts .*expected 5 or more"):
        split_at_random(texts, labels, ["fr" if i in (0, 2, 4, 6, 8) else "en" for i in range(20)])
    with pytest.raises(InputError, match="share held out is 1"):
        split_at_random(texts, labels, share=1.0)
    with pytest.raises(InputError, match="names 'train'; expected some texts of evaluation, which is called evaluation or eval"):
        split_as_given(texts, labels, ["train"] * 20)
    with pytest.raises(InputError, match=r"10 texts for discovery \(none removed\) have class 'a' only"):
        split_as_given(texts, labels, ["train" if label == "a" else "test" for label in labels][:20])
