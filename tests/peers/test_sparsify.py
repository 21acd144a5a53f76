"""Files of ours in sparsify, files of sparsify here."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
sparsify = pytest.importorskip("sparsify")

from qscope_jax.sae.formats.registry import read_sae_arrays  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

F, D, K = 96, 32, 8


def theirs(sae, x):
    with torch.no_grad():
        found = sae.encode(torch.from_numpy(x))
        codes = torch.zeros(len(x), F).scatter_(1, found.top_indices, found.top_acts)
        return codes.numpy(), sae.decode(found.top_acts, found.top_indices).numpy()


@pytest.mark.parametrize("flag", [True, False])
def test_what_we_write_loads_in_sparsify_and_gives_the_same_features(flag, tiny, converted, codes, assert_agree, x):
    ours = tiny(apply_b_dec_to_input=flag)
    folder = converted(ours, "sparsify")
    loaded = sparsify.Sae.load_from_disk(folder / "layers.3")
    assert_agree(theirs(loaded, x), codes(ours))
    assert list(sparsify.Sae.load_many(str(folder), local=True)) == ["layers.3"]
    assert loaded.cfg.normalize_decoder is False


def test_what_sparsify_writes_is_read_here_with_the_same_features(codes, assert_agree, x, tmp_path):
    sae = sparsify.Sae(D, sparsify.SparseCoderConfig(k=K, expansion_factor=3))
    rng = np.random.default_rng(0)
    with torch.no_grad():
        sae.encoder.bias.copy_(torch.from_numpy(rng.uniform(-1, 0, F)))
        sae.b_dec.copy_(torch.from_numpy(rng.standard_normal(D)))
        sae.W_dec.mul_(torch.from_numpy(rng.uniform(0.5, 2, (F, 1))))
    sae.save_to_disk(tmp_path / "layers.7")
    found = read_sae_arrays(tmp_path / "layers.7", None)
    assert (found.metadata["layer"], found.k) == (7, K)
    assert_agree(codes(found), theirs(sae, x))


def test_a_transcoder_of_sparsify_is_refused_by_name(tmp_path):
    from qscope_jax.errors import ArchitectureError

    sparsify.Sae(D, sparsify.SparseCoderConfig(k=K, expansion_factor=3, transcode=True)).save_to_disk(tmp_path / "layers.0")
    with pytest.raises(ArchitectureError, match="transcoder"):
        read_sae_arrays(tmp_path / "layers.0", None)
