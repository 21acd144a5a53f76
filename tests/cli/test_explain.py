import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from qscope_jax.features.readout import Readout
from tests.features.made_store import make_store

VOCABULARY = [" tea", " sun", " run", " old"]
TEXTS, LENGTH = 40, 8


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> str:
    """Texts of eight words at layer 2; feature 0 fires at tea, feature 1 at sun, feature 2 never."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 4, (TEXTS, LENGTH))
    ids[::2] = np.maximum(ids[::2], 1)
    dense = np.stack([(ids == 0) * 8.0, (ids == 1) * 4.0, ids * 0.0], axis=-1).astype(np.float32)
    order = np.argsort(-dense, axis=-1, kind="stable")
    values = np.take_along_axis(dense, order, axis=-1)
    texts = tuple("".join(VOCABULARY[i] for i in row) for row in ids)
    readout = Readout(
        2, 3, texts, tuple(tuple(row.tolist()) for row in ids), tuple(values), tuple(order), (np.ones(LENGTH),) * TEXTS,
        (np.arange(LENGTH) > 0,) * TEXTS,
    )  # fmt: skip
    dictionary = {name: np.array([[1, 0], [2, 3], [0, 1]], np.int32) for name in ("promoted", "suppressed", "neighbours")}
    dictionary |= {name: np.full((3, 2), 0.5, np.float32) for name in ("promoted_logits", "suppressed_logits", "cosines")}
    folder = tmp_path_factory.mktemp("explain") / "store"
    make_store(folder, readout, columns={"kind": ["odd", "even"] * 20}, vocabulary=VOCABULARY, shard_texts=7, dictionary=dictionary)
    return str(folder)


@pytest.fixture
def endpoint():
    """A server of chat completions that explains all as tea and judges by that; `refused` makes it fail on matching questions."""

    class Handler(BaseHTTPRequestHandler):
        refused, models, calls, tokens = "", set(), 0, set()

        def do_POST(self):  # noqa: N802
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            rule, question = (message["content"] for message in request["messages"])
            Handler.models.add(request["model"])
            Handler.tokens.add(request["max_tokens"])
            Handler.calls += 1
            failed = Handler.refused and re.search(Handler.refused, question)
            answer = json.dumps({"choices": [{"message": {"role": "assistant", "content": self.answer(rule, question)}, "finish_reason": "stop"}]})
            self.send_response(400 if failed else 200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(b'{"error": {"message": "no"}}' if failed else answer.encode())

        def answer(self, rule: str, question: str) -> str:
            if "Explanation: <the" in rule:
                return "Explanation: the word tea"
            pattern = "⟦ tea" if "marked" in rule else " tea"
            return str([int(pattern in line) for line in re.findall(r"^\d+\. (.*)$", question, re.MULTILINE)])

        def log_message(self, format, *arguments):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        Handler.url = f"http://127.0.0.1:{server.server_port}/v1"
        yield Handler
        server.shutdown()
        thread.join()


def test_cards_are_shown_saved_and_put_on_a_page(qscope, store, tmp_path):
    page, out = tmp_path / "p.html", tmp_path / "o.json"
    answer = qscope("explain", "--store", store, "--layer", 2, "--features", "1,0", "--page", page, "--out", out, "--before", 1, "--after", 1)
    assert answer.status == 0 and not answer.err
    assert answer.out.index("Layer 2, feature 1") < answer.out.index("Layer 2, feature 0") and "⟦ tea⟧" in answer.out
    saved = json.loads(out.read_text())
    assert [card["feature"] for card in saved["features"]] == [1, 0] and saved["verb"] == "explain"
    assert saved["features"][1]["promoted"] == [[" sun", 0.5], [" tea", 0.5]] and saved["features"][1]["maximum"] == 8
    assert len(saved["features"][0]["top"][0]["token_ids"]) <= 3 and set(saved["features"][0]["groups"]) == {"kind"}
    assert "feature 1" in page.read_text() and f"Page: {page}" in answer.out


def test_a_whole_layer_becomes_a_site_an_export_and_a_table(qscope, store, tmp_path):
    site, export, out = tmp_path / "site", tmp_path / "np", tmp_path / "o.json"
    answer = qscope("explain", "--store", store, "--layer", 2, "--all", "--site", site, "--neuronpedia", export, "--out", out)
    assert answer.status == 0 and not answer.err and "silent" in answer.out
    assert (site / "index.html").is_file() and f"Site: {site / 'index.html'}" in answer.out
    assert [feature["feature_index"] for feature in json.loads((export / "batch-0.json").read_text())["features"]] == [0, 1]
    rows = json.loads(out.read_text())["features"]
    assert [row["maximum"] for row in rows] == [8, 4, 0] and rows[0]["promoted"] == [" sun", " tea"] and "top" not in rows[0]


def test_what_stands_in_a_file_of_explanations_is_shown(qscope, store, tmp_path):
    (tmp_path / "e.jsonl").write_text('{"layer": 2, "feature": 0, "explanation": "hot drinks", "score": 0.5}\n')
    answer = qscope("explain", "--store", store, "--layer", 2, "--features", 0, "--explanations", tmp_path / "e.jsonl")
    assert "Layer 2, feature 0: hot drinks (score 0.50)" in answer.out


def test_an_endpoint_explains_and_scores_and_only_what_is_missing(qscope, store, endpoint, tmp_path):
    path = tmp_path / "e.jsonl"
    options = ("explain", "--store", store, "--layer", 2, "--explanations", path, "--endpoint", endpoint.url, "--endpoint-model", "m")
    answer = qscope(*options, "--features", 0, "--judge-model", "j", "--max-tokens", 4000)
    assert answer.status == 0 and not answer.err and "the word tea (detection 1.00, fuzzing 1.00)" in answer.out
    (row,) = map(json.loads, path.read_text().splitlines())
    assert (row["layer"], row["feature"], row["explanation"], row["score"]) == (2, 0, "the word tea", 1.0) and row["by"].startswith("m")
    assert endpoint.models == {"m", "j"} and endpoint.tokens == {4000}
    calls = endpoint.calls
    assert qscope(*options, "--features", 0).status == 0 and endpoint.calls == calls
    assert qscope(*options, "--all").err.count("never fires") == 1
    rows = {row["feature"]: row for row in map(json.loads, path.read_text().splitlines())}
    assert set(rows) == {0, 1} and rows[1]["scores"]["detection"] <= 0.6
    assert qscope("explain", "--store", store, "--layer", 2, "--all", "--explanations", path, "--neuronpedia", tmp_path / "np").status == 0
    exported = [json.loads(line) for line in (tmp_path / "np" / "explanations.jsonl").read_text().splitlines()]
    assert [line["explanationModelName"] for line in exported] == [row["by"], rows[1]["by"]]


def test_what_fails_is_reported_and_what_is_finished_is_kept(qscope, store, endpoint, tmp_path, monkeypatch):
    endpoint.refused = r"\A10 .*⟦ sun"
    path = tmp_path / "e.jsonl"
    options = (
        "explain",
        "--store",
        store,
        "--layer",
        2,
        "--explanations",
        path,
        "--endpoint",
        endpoint.url,
        "--endpoint-model",
        "m",
        "--features",
        "0,1",
    )
    answer = qscope(*options)
    assert answer.status == 0 and "1 of 2 features lack an explanation or a score" in answer.err and "feature 1: no explanation" in answer.err
    assert [json.loads(line)["feature"] for line in path.read_text().splitlines()] == [0]
    endpoint.refused = ""
    assert not qscope(*options).err
    assert [json.loads(line)["feature"] for line in path.read_text().splitlines()] == [0, 1]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "give either --features or --all"),
        (["--features", 1, "--all"], "give either --features or --all"),
        (["--all", "--page", "p.html"], "use --site with --all"),
        (["--features", 3], "feature 3 is out of range"),
        (["--features", 0, "--by", "nation"], "has no column 'nation'; it has 'kind'"),
        (["--features", 0, "--top", -1], "top is -1"),
        (["--features", 0, "--max-tokens", 0], "max_tokens is 0"),
        (["--features", 0, "--explanations", "none.jsonl"], "none.jsonl: no such file"),
        (["--features", 0, "--endpoint", "http://h/v1"], "--endpoint-model is missing"),
        (["--features", 0, "--endpoint", "http://h/v1", "--endpoint-model", "m"], "--explanations is missing"),
        (["--features", 0, "--endpoint", "http://h/v1", "--endpoint-model", "m", "--explanations", "e.csv"], "give a file of .jsonl"),
        (["--features", 0, "--judge-model", "m"], "--endpoint is missing"),
        (["--features", 0, "--out", "/proc/none/o.json"], "cannot be written"),
        (["--all", "--neuronpedia", "/proc/none/np"], "cannot be written"),
    ],
)
def test_bad_requests_are_refused(refused, store, options, said):
    assert said in refused("explain", "--store", store, "--layer", 2, *options)


def test_a_store_without_the_layer_or_none_at_all_is_refused(refused, store, tmp_path):
    assert "has no layer 3" in refused("explain", "--store", store, "--layer", 3, "--all")
    assert "holds no feature store" in refused("explain", "--store", tmp_path, "--layer", 3, "--all")
    assert "--layer is missing" in refused("explain", "--store", store)
