import json

import pytest

from qscope_jax.errors import ConfigError, InputError, SourceError
from qscope_jax.features.explain.feature_card import Context, FeatureCard, QuantileContexts
from qscope_jax.features.explain.neuronpedia import NeuronpediaSource, source_of, write_neuronpedia
from tests.features.made_store import make_store

SOURCE = NeuronpediaSource("qwen3-1.7b", "qwenscope-res", 4, 6, 100, 37, "a corpus")
# What Neuronpedia's converter reads of each feature and of each activation without asking whether it is there.
FEATURE = {
    "feature_index", "neuron_alignment_indices", "neuron_alignment_values", "neuron_alignment_l1", "correlated_neurons_indices",
    "correlated_neurons_pearson", "correlated_neurons_l1", "correlated_features_indices", "correlated_features_pearson", "correlated_features_l1",
    "neg_str", "neg_values", "pos_str", "pos_values", "frac_nonzero", "freq_hist_data_bar_heights", "freq_hist_data_bar_values",
    "logits_hist_data_bar_heights", "logits_hist_data_bar_values", "decoder_weights_dist", "activations",
}  # fmt: skip
ACTIVATION = {"tokens", "values", "bin_min", "bin_max", "bin_contains", "qualifying_token_index"}


def card(feature: int, **more) -> FeatureCard:
    top = (Context(3, 1, 0, (5, 6, 7), (0.0, 9.00049, 1.0)),)
    quantiles = (QuantileContexts(4.0, 9.0, 3, (Context(8, 0, 2, (6, 5), (5.0, 0.0)),)), QuantileContexts(1.0, 3.0, 1, ()))
    found = dict(histogram=((0.0, 4.0, 1), (4.0, 9.0, 3)), top=top, quantiles=quantiles, promoted=((5, 1.5),), suppressed=((7, -2.0), (6, -1.0)))
    return FeatureCard(4, feature, 0.25, 0.5, 9.0, 4.0, **found | more)


def silent(feature: int) -> FeatureCard:
    return FeatureCard(4, feature, 0.0, 0.0, 0.0, 0.0)


def token_text(token: int) -> str:
    return f"<{token}>"


def written(folder) -> dict[str, dict]:
    return {path.name: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}


def test_a_batch_has_every_field_that_neuronpedia_reads(tmp_path):
    found = written(write_neuronpedia(tmp_path / "np", [card(2)], SOURCE, token_text=token_text))
    batch = found["batch-0.json"]
    assert (batch["model_id"], batch["layer"], batch["sae_set"], batch["sae_id_suffix"]) == ("qwen3-1.7b", 4, "qwenscope-res", None)
    (feature,) = batch["features"]
    assert feature.keys() >= FEATURE and all(one.keys() >= ACTIVATION for one in feature["activations"])
    assert (feature["feature_index"], feature["frac_nonzero"], feature["dataset"], feature["n_prompts_total"]) == (2, 0.25, "a corpus", 100)
    assert feature["pos_str"] == ["<5>"] and feature["neg_values"] == [-2.0, -1.0]
    assert (feature["freq_hist_data_bar_values"], feature["freq_hist_data_bar_heights"]) == ([2.0, 6.5], [1, 3])


def test_top_contexts_and_intervals_are_told_apart_by_their_bins(tmp_path):
    (feature,) = written(write_neuronpedia(tmp_path / "np", [card(2)], SOURCE, token_text=token_text))["batch-0.json"]["features"]
    top, interval = feature["activations"]
    assert (top["bin_min"], top["bin_max"], top["bin_contains"], top["qualifying_token_index"]) == (-1, 9.0, -1, 1)
    assert top["tokens"] == ["<5>", "<6>", "<7>"] and top["values"] == [0.0, 9.0, 1.0]
    assert (interval["bin_min"], interval["bin_max"], interval["bin_contains"]) == (4.0, 9.0, 0.75)


def test_features_are_split_into_batches_and_those_that_never_fire_are_listed(tmp_path):
    cards = (silent(feature) if feature == 3 else card(feature) for feature in range(5))
    found = written(write_neuronpedia(tmp_path / "np", cards, SOURCE, token_text=token_text, batch_features=3))
    batches = [[feature["feature_index"] for feature in found[f"batch-{i}.json"]["features"]] for i in range(2)]
    assert batches == [[0, 1, 2], [4]] and len(found) == 3
    assert found["skipped_indexes.json"]["skipped_indexes"] == [3, 5]


def test_explanations_stand_in_the_columns_of_neuronpedias_exports(tmp_path):
    cards = [card(1), card(2, explanation="words for 茶", scores={"detection": 0.8}), card(4, explanation="x")]
    folder = write_neuronpedia(tmp_path / "np", cards, SOURCE, token_text=token_text, explained_by={2: "a model"})
    line, other = (folder / "explanations.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(other)["index"] == "4" and json.loads(other)["explanationModelName"] is None
    assert json.loads(line) == {
        "modelId": "qwen3-1.7b", "layer": "4-qwenscope-res", "index": "2", "description": "words for 茶", "explanationModelName": "a model",
        "scores": {"detection": 0.8},
    }  # fmt: skip


def test_an_older_export_is_replaced_and_anything_else_is_not(tmp_path):
    folder = tmp_path / "np"
    write_neuronpedia(folder, [card(0), card(1)], SOURCE, token_text=token_text, batch_features=1)
    write_neuronpedia(folder, [card(0)], SOURCE, token_text=token_text)
    assert set(written(folder)) == {"batch-0.json", "skipped_indexes.json"}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(SourceError, match="holds something else"):
        write_neuronpedia(tmp_path / "mine", [card(0)], SOURCE, token_text=token_text)
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"


def test_a_failure_leaves_the_older_export(tmp_path):
    write_neuronpedia(tmp_path / "np", [card(0)], SOURCE, token_text=token_text)
    other = FeatureCard(5, 1, 0.1, 0.1, 1.0, 1.0)
    with pytest.raises(InputError, match="feature 1 is of layer 5"):
        write_neuronpedia(tmp_path / "np", [card(3), other], SOURCE, token_text=token_text)
    assert written(tmp_path / "np")["batch-0.json"]["features"][0]["feature_index"] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["np"]


def test_names_are_made_from_the_store(readout_of, tmp_path):
    store = make_store(tmp_path / "s", readout_of([[1, 0], [0, 2]], layer=4))
    source = source_of(store, 4, 37)
    assert (source.model_id, source.sae_set, source.num_features, source.texts) == ("made", "made-saes", 2, 1)
    assert source_of(store, 4, 37, model_id="m", sae_set="s").sae_set == "s"
    with pytest.raises(ConfigError, match="needs the names"):
        NeuronpediaSource("", "s", 0, 1, 1, 1)
