"PaDiM and PatchCore through anomalib (extra `baselines`): real weights, real images. Skipped, in words, where the extra is absent."
import numpy as np
import pytest
from readl_nb.baselines import LAYERS, available, baseline
from readl_nb.inspection import Failure

reason = available()
needs_extra = pytest.mark.skipif(bool(reason), reason=reason or 'the extra is there')

@pytest.fixture(scope='module')
def metal(root):
    "Two normal images to learn from, four normal and four defective ones to test."
    folder = root/'sample_data'/'metal'
    good, bad = sorted((folder/'test/good').iterdir()), sorted(path for path in (folder/'test').glob('*/*') if path.parent.name != 'good')[:4]
    return sorted((folder/'train/good').iterdir()), good + bad, [0] * len(good) + [1] * len(bad)

@pytest.mark.parametrize('name', LAYERS)
def test_refused_in_one_line_before_anything_is_loaded(name):
    for arguments in (([], []), (['only.png'] * (name == 'padim'), [])):
        with pytest.raises(ValueError, match='learns from normal images') as error: baseline(name, *arguments)
        assert '\n' not in str(error.value)

@pytest.mark.skipif(not reason, reason='the extra is there, nothing is absent')
def test_absence_is_one_sentence_and_an_error(metal):
    assert '\n' not in reason and 'pip install "readl_nb[baselines]"' in reason
    with pytest.raises(ValueError, match='anomalib'): baseline('padim', *metal[:2])

@needs_extra
@pytest.mark.parametrize('name', LAYERS)
def test_defects_score_higher_and_runs_repeat(name, metal):
    train, test, labels = metal
    found, again = (baseline(name, train, test, size=128, progress=False) for _ in range(2))
    scores = np.array([score for score, _ in found]); labels = np.array(labels)
    assert scores[labels == 1].mean() > scores[labels == 0].mean()
    for (score, heat), (score2, heat2) in zip(found, again):
        assert heat.shape == (128, 128) and heat.dtype == np.float32 and np.isfinite(heat).all()
        assert score == pytest.approx(score2, rel=1e-4); np.testing.assert_allclose(heat, heat2, rtol=1e-4, atol=1e-4)

@needs_extra
def test_an_unreadable_image_does_not_stop_the_batch(metal, tmp_path):
    broken = tmp_path/'broken.png'; broken.write_text('no picture')
    found = baseline('patchcore', metal[0][:1], [metal[1][0], broken, metal[1][1]], size=64, progress=False)
    assert [isinstance(each, Failure) for each in found] == [False, True, False] and 'broken.png' in str(found[1])

@needs_extra
def test_the_coreset_is_the_one_anomalib_chooses():
    import torch
    from anomalib.models.components.sampling import KCenterGreedy
    from readl_nb.baselines import coreset, seeded
    patches = torch.randn(500, 40, generator=torch.Generator().manual_seed(0))
    with seeded(1, 'cpu'): ours = coreset(patches, .1)
    with seeded(1, 'cpu'): theirs = KCenterGreedy(patches, .1).sample_coreset()
    assert ours.shape == (50, 40) and torch.equal(ours, theirs)
