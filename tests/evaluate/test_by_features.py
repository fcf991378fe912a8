"""Classifiers on features: k-NN against a plain loop in float64, folds of the probe, and what cannot be classified."""

import numpy as np
import pytest
import torch

import dvit_infer as dvit
from dvit_infer.evaluate import neighbours
from dvit_infer.evaluate.by_features import _scored
from dvit_infer.evaluate.neighbours import nearest, vote
from dvit_infer.evaluate.probe import FOLDS, probe

NAMES = ("a", "b", "c")


@pytest.fixture
def rows() -> tuple[torch.Tensor, torch.Tensor]:
    """Features (60, 8) and classes (60,)."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    return torch.randn(60, 8, generator=generator) + 2 * torch.eye(3, 8)[labels], labels


@pytest.mark.parametrize("blocks", [(1024, 16384), (7, 11), (11, 7), (60, 1)])
def test_neighbours_are_those_of_a_plain_loop(blocks, rows, monkeypatch):
    monkeypatch.setattr(neighbours, "_QUERIES", blocks[0])
    monkeypatch.setattr(neighbours, "_OTHERS", blocks[1])
    features, labels = rows
    unit = (features / features.norm(dim=1, keepdim=True)).double()
    for asked in (None, features[20:33] * 3):
        cosines = unit @ unit.T if asked is None else unit[20:33] @ unit.T
        if asked is None:
            cosines.fill_diagonal_(-2)
        expected = cosines.sort(dim=1, descending=True)
        found, places = nearest(features, asked, 9)
        torch.testing.assert_close(found.double(), expected.values[:, :9], atol=1e-6, rtol=0)
        assert torch.equal(places, expected.indices[:, :9])
        weights = torch.nn.functional.one_hot(labels[places]) * (cosines.gather(1, places) / 0.07).exp()[..., None]
        torch.testing.assert_close(vote(features, labels, asked, 9).double(), weights.sum(dim=1), rtol=1e-4, atol=0)


def test_fewer_images_than_neighbours(rows):
    features, labels = rows
    assert vote(features, labels, k=59).shape == vote(features, labels, features, k=60).shape == (60, 3)
    for asked, k, others in ((None, 60, 59), (features, 61, 60), (None, 0, 59)):
        with pytest.raises(dvit.InputError, match=f"^knn: {k} neighbours cannot .* {others} images; at most {others}"):
            vote(features, labels, asked, k)
    with pytest.raises(dvit.InputError, match="among 0 images; give more images"):
        vote(features[:1], labels[:1], k=1)


def test_scores_count_classes_with_votes_alone():
    votes = torch.tensor([[3.0, 2.0, 1.0], [0.0, 0.0, 1.0], [2.0, 1.0, 0.0]])
    found = _scored("knn", 2, votes, torch.tensor([0, 0, 1]))
    assert (found.top1, found.top5) == (pytest.approx(100 / 3), pytest.approx(200 / 3))


def test_a_probe_is_fitted_to_other_images(rows):
    features, labels = (part.numpy() for part in rows)
    given = probe(features[:30], labels[:30], NAMES, features[30:])
    assert (given.argmax(axis=1) == labels[30:]).mean() > 0.7
    np.testing.assert_allclose(given.sum(axis=1), 1, rtol=1e-5)
    held = probe(features, labels, NAMES)
    assert 0.7 < (held.argmax(axis=1) == labels).mean() < 1
    np.testing.assert_array_equal(held, probe(features, labels, NAMES))
    # 200 features of noise: what a probe has seen it knows, what it has not it cannot.
    noise = np.random.default_rng(0).standard_normal((60, 200))
    assert (probe(noise, labels, NAMES, noise).argmax(axis=1) == labels).all()
    assert (probe(noise, labels, NAMES).argmax(axis=1) == labels).mean() < 0.6
    few = np.r_[0:3, 3:9]  # three of each class: three folds
    assert FOLDS > 3
    assert probe(features[few], labels[few], NAMES).shape == (9, 3)


def test_what_no_probe_is_fitted_to(rows, monkeypatch):
    features, labels = (part.numpy() for part in rows)
    one = labels == 1
    for asked in (None, features):
        with pytest.raises(dvit.InputError, match=r"^probe: all 20 images are of one class, 'b'; two are needed"):
            probe(features[one], labels[one], NAMES, asked)
    with pytest.raises(dvit.InputError, match=r"^probe: one image alone in 1 class: 'a'; --train FOLDER"):
        probe(features[:4], labels[[0, 2, 2, 2]], NAMES)
    with pytest.raises(dvit.InputError, match=r"^probe: -1 is no strength"):
        probe(features, labels, NAMES, strength=-1)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(dvit.InputError, match=r"^probe: .* needs sklearn, not installed; .*'dvit-infer\[probe\]'"):
        probe(features, labels, NAMES)
