"""Files of ours in dictionary_learning, files of dictionary_learning here."""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("dictionary_learning")
utils = pytest.importorskip("dictionary_learning.utils")

from dictionary_learning.dictionary import AutoEncoder, AutoEncoderNew, GatedAutoEncoder, JumpReluAutoEncoder  # noqa: E402
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE  # noqa: E402
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE  # noqa: E402
from dictionary_learning.trainers.top_k import AutoEncoderTopK  # noqa: E402

from qscope_jax.sae.formats.registry import read_sae_arrays  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

F, D, K = 96, 32, 8


def theirs(sae, x):
    with torch.no_grad():
        codes = sae.encode(torch.from_numpy(x))
        return codes.numpy(), sae.decode(codes).numpy()


@pytest.mark.parametrize("flag", [True, False])
def test_what_we_write_loads_in_dictionary_learning_and_gives_the_same_features(flag, tiny, converted, codes, assert_agree, x):
    ours = tiny(apply_b_dec_to_input=flag)
    loaded, config = utils.load_dictionary(str(converted(ours, "dictionary_learning") / "resid_post_layer_3" / "trainer_0"), device="cpu")
    assert type(loaded) is AutoEncoderTopK and config["trainer"]["layer"] == 3
    assert_agree(theirs(loaded, x), codes(ours))


@pytest.mark.parametrize(
    "make",
    [
        lambda: AutoEncoderTopK(D, F, K),
        lambda: BatchTopKSAE(D, F, K),
        lambda: MatryoshkaBatchTopKSAE(D, F, K, [32, 64]),
        lambda: JumpReluAutoEncoder(D, F),
        lambda: GatedAutoEncoder(D, F),
        lambda: AutoEncoder(D, F),
        lambda: AutoEncoderNew(D, F),
    ],
    ids=["topk", "batch_topk", "matryoshka", "jumprelu", "gated", "standard", "standard_new"],
)
@pytest.mark.parametrize("norm_factor", [1.0, 3.0])
def test_what_dictionary_learning_writes_is_read_here_with_the_same_features(make, norm_factor, codes, assert_agree, x, tmp_path):
    sae, rng = make(), np.random.default_rng(0)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            if parameter.ndim == 1:
                parameter.copy_(torch.from_numpy(rng.uniform(0, 1, parameter.shape) * (1 if name == "threshold" else -0.3)))
        for name, value in sae.named_buffers():
            if name == "threshold":
                value.fill_(0.2)
    class_name = type(sae).__name__
    trainer = {"dict_class": class_name, "k": K, "layer": 5, "lm_name": "x"}
    bundle = {"step": 3, "ae": {name: value.clone() for name, value in sae.state_dict().items()}, "optimizer": {}, "config": trainer}
    if hasattr(sae, "scale_biases"):
        sae.scale_biases(norm_factor)  # as the library does when it saves a finished run
    else:
        bundle["norm_factor"] = norm_factor = 1.0  # the library trains this class without normalisation only
    expected = theirs(sae, x)
    assert (expected[0] > 0).any() and (expected[0] == 0).any()
    torch.save(sae.state_dict(), tmp_path / "ae.pt")
    (tmp_path / "config.json").write_text(json.dumps({"trainer": trainer}))
    assert_agree(codes(read_sae_arrays(tmp_path, None)), expected)
    torch.save({**bundle, "norm_factor": norm_factor}, tmp_path / "ae.pt")  # the interrupted run of the same weights
    assert_agree(codes(read_sae_arrays(tmp_path, None)), expected)
