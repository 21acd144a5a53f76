"""Files of ours in SAELens, files of SAELens here."""

import dataclasses

import numpy as np
import pytest

torch = pytest.importorskip("torch")
sae_lens = pytest.importorskip("sae_lens")

from qscope_jax.sae.formats.registry import read_sae_arrays  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

F, D, K = 96, 32, 8


def theirs(sae, x):
    with torch.no_grad():
        codes = sae.encode(torch.from_numpy(x))
        return codes.numpy(), sae.decode(codes).numpy()


def fill(sae, seed=0):
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for parameter in sae.parameters():
            scale = 0.4 if parameter.ndim == 1 else 1 / np.sqrt(D)
            parameter.copy_(torch.from_numpy(scale * rng.standard_normal(tuple(parameter.shape))))
    return sae


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("activation", ["topk", "jumprelu"])
def test_what_we_write_loads_in_sae_lens_and_gives_the_same_features(activation, flag, tiny, converted, codes, assert_agree, x):
    threshold = np.random.default_rng(1).uniform(0, 1, F).astype(np.float32) if activation == "jumprelu" else None
    ours = tiny(activation=activation, threshold=threshold, apply_b_dec_to_input=flag)
    loaded = sae_lens.SAE.load_from_disk(converted(ours, "sae_lens") / "blocks.3.hook_resid_post")
    assert (loaded.cfg.architecture(), loaded.cfg.metadata.hook_name) == (activation, "blocks.3.hook_resid_post")
    assert loaded.cfg.apply_b_dec_to_input is flag
    np.testing.assert_array_equal(loaded.W_enc.detach().numpy(), ours.W_enc.T)
    assert_agree(theirs(loaded, x), codes(ours))


@pytest.mark.parametrize("architecture, rescale", [("topk", False), ("topk", True), ("standard", False), ("jumprelu", False), ("gated", False)])
def test_what_sae_lens_writes_is_read_here_with_the_same_features(architecture, rescale, codes, assert_agree, x, tmp_path):
    settings = {"d_in": D, "d_sae": F, "dtype": "float32", "device": "cpu"}
    kinds = {"topk": ("TopKSAE", {"k": K, "rescale_acts_by_decoder_norm": rescale}), "standard": ("StandardSAE", {})}
    kinds |= {"jumprelu": ("JumpReLUSAE", {}), "gated": ("GatedSAE", {})}
    name, more = kinds[architecture]
    sae = fill(getattr(sae_lens, name)(getattr(sae_lens, f"{name}Config")(**settings, **more)))
    sae.save_model(tmp_path / "out")
    found = read_sae_arrays(tmp_path / "out", 0)
    expected = theirs(sae, x)
    assert (expected[0] > 0).any() and (expected[0] == 0).any()
    assert_agree(codes(found), expected)


def test_a_training_checkpoint_of_batch_topk_gives_the_features_of_the_sae_saved_from_it(codes, assert_agree, x, tmp_path):
    settings = {"d_in": D, "d_sae": F, "k": K, "dtype": "float32", "device": "cpu"}
    sae = fill(sae_lens.BatchTopKTrainingSAE(sae_lens.BatchTopKTrainingSAEConfig(**settings)))
    sae.topk_threshold.fill_(0.3)
    sae.save_model(tmp_path / "training")
    sae.save_inference_model(tmp_path / "inference")
    expected = theirs(sae_lens.SAE.load_from_disk(tmp_path / "inference"), x)
    assert_agree(codes(read_sae_arrays(tmp_path / "training", 0)), expected)
    assert_agree(codes(read_sae_arrays(tmp_path / "inference", 0)), expected)


def test_sae_lens_reads_back_what_went_through_us(tiny, converted, codes, assert_agree, x, tmp_path):
    sae = fill(sae_lens.TopKSAE(sae_lens.TopKSAEConfig(d_in=D, d_sae=F, k=K, apply_b_dec_to_input=True)))
    sae.save_model(tmp_path / "first")
    ours = dataclasses.replace(read_sae_arrays(tmp_path / "first", 3))
    again = sae_lens.SAE.load_from_disk(converted(ours, "sae_lens") / "blocks.3.hook_resid_post")
    for name, parameter in sae.named_parameters():
        assert torch.equal(dict(again.named_parameters())[name], parameter), name
