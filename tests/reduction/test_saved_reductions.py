"""Saved files of EViT and ToMe: what they were told is in the header, which is checked; other methods can be loaded."""

import json

import pytest
import torch
from golden_cases import case_images, state_dict
from safetensors import safe_open
from safetensors.torch import save_file

import dvit_infer as dvit

HEADS = {"num_heads": 2}
RATES, MERGES = [1.0, 0.7, 40], [0, 9, 0, 200]
SETTINGS = [
    ("evit", {}, {}),
    ("evit", {"keep_rate": RATES, "prune_at": [0, 1, 3]}, {"fuse": False, "score": "pooled"}),
    ("evit", {"keep_rate": 120, "prune_at": [2]}, {}),
    ("tome", {}, {}),
    ("tome", {"merge": MERGES}, {"prop_attn": False}),
    ("tome", {"merge": 0}, {}),
]


@pytest.fixture(scope="module")
def images():
    return case_images("tiny-deit-r0.7-s1")[:2]


def converted(method, assume=None, learned=True, **given):
    state = {key: w for key, w in state_dict("tiny-deit", 1).items() if learned or "predictor" not in key}
    return dvit.convert(state, device="cpu", backend="torch", method=method, assume=HEADS | (assume or {}), **given)


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize(("method", "given", "assume"), SETTINGS)
def test_it_is_loaded_as_it_was_saved(method, given, assume, learned, images, tmp_path):
    path = tmp_path / "m.safetensors"
    engine = converted(method, assume, learned, **given)
    engine.save(path)
    again = dvit.load(path, device="cpu", backend="torch")
    assert again.config == engine.config
    assert again.config.learned.method == ("predictor" if learned else "none")
    logits, kept = engine(images, return_kept=True)
    found, same = again(images, return_kept=True)
    assert torch.equal(found, logits)
    assert all(map(torch.equal, same, kept))
    with torch.no_grad():
        expected = dvit.load_reference(path).evaluate(images)
    torch.testing.assert_close(expected.logits, logits, atol=2e-5, rtol=0)
    again.save(tmp_path / "again.safetensors")
    assert dvit.convert(tmp_path / "again.safetensors", device="cpu").config == engine.config


def test_a_saved_file_is_loaded_as_another_method_or_by_other_settings(images, tmp_path):
    path = tmp_path / "m.safetensors"
    converted("none", learned=False).save(path)

    def loaded(**given):
        return dvit.load(path, device="cpu", backend="torch", **given)

    for given in ({"method": "tome", "merge": 20}, {"method": "tome", "merge": MERGES}, {"method": "tome"}):
        assert torch.equal(loaded(**given)(images), converted(learned=False, **given)(images))
    for rate in (0.5, RATES):
        found = loaded(method="evit", keep_rate=rate)
        assert found.config.reduction == converted("evit", keep_rate=rate).config.reduction
    converted("tome", merge=20).save(path)
    assert loaded(merge=7).config.reduction == converted("tome", merge=7).config.reduction
    assert loaded(image_size=96).config.num_keep == (18, 9, 5, 3)
    assert str(loaded(method="none").config.reduction) == "dense"
    assert loaded(method="predictor").config.reduction == converted("predictor").config.reduction
    converted("evit", {"fuse": False}, keep_rate=0.5).save(path)
    assert loaded(keep_rate=0.9).config.reduction == converted("evit", {"fuse": False}, keep_rate=0.9).config.reduction
    assert loaded(method="random").config.reduction == converted("random").config.reduction


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "tome", "keep_rate": 0.5}, "keep_rate: is for methods evit and random, not tome"),
        ({"merge": 3}, "so it runs dense; method tome takes it"),
        ({"method": "evit", "merge": 3}, "merge: is for method tome, not evit"),
        (
            {"method": "tome", "merge": [1, 2]},
            "merge: 2 numbers are given; the model has 4 blocks, one for each is needed",
        ),
        ({"method": "evit", "keep_rate": [0.5]}, "keep_rate: 1 given, but 3 stages"),
        ({"method": "evit", "keep_rate": [200, 9, 9]}, "keep_rate: 200 tokens are to be kept in block 1, where there"),
        ({"method": "predictor"}, "'predictor' needs score predictors"),
    ],
)
def test_what_cannot_be_is_named(given, message, tmp_path):
    path = tmp_path / "m.safetensors"
    converted("none", learned=False).save(path)
    with pytest.raises(dvit.InputError, match=message):
        dvit.load(path, device="cpu", **given)


def _settings(**changed):
    return lambda r: r["settings"].update(changed)


@pytest.mark.parametrize(
    ("method", "change", "message"),
    [
        ("evit", _settings(keep_rate=0.6), "do not keep what its settings say"),
        ("evit", _settings(keep_rate=[0.7, 0.7]), "keep_rate: 2 given, but 3 stages"),
        ("evit", _settings(keep_rate=300), "300 tokens are to be kept"),
        ("evit", _settings(keep_rate=None), "keep_rate: None is neither"),
        ("evit", _settings(fuse=False), "do not keep what its settings say"),
        ("evit", _settings(fuse=1), "fuse: 1 is not true or false"),
        ("evit", _settings(score="q"), "score: 'q' is not one of class, pooled"),
        ("evit", _settings(merge=1), "its settings are not keep_rate, fuse, score"),
        ("evit", lambda r: r["settings"].pop("fuse"), "its settings are not keep_rate, fuse, score"),
        ("evit", lambda r: r["stages"][0].update(where="before"), "do not keep what its settings say"),
        ("evit", lambda r: r["stages"][0].update(where=3), "do not keep what its settings say"),
        ("evit", lambda r: r["stages"][0].update(block=7), "prune_at: there is no block 7"),
        ("evit", lambda r: r.update(merges=True), "'merges' is not known"),
        ("evit", lambda r: r.update(method="tome"), "its settings are not merge, prop_attn"),
        ("evit", lambda r: r.update(method="random"), "its settings are not keep_rate"),
        ("tome", _settings(merge=5), "do not keep what its settings say"),
        ("tome", _settings(merge=0), "do not keep what its settings say"),
        ("tome", _settings(merge=[1, 2]), "merge: 2 numbers are given"),
        ("tome", _settings(merge=-1), "merge: -1 is not a number of tokens to merge"),
        ("tome", _settings(merge=10**20), "merge"),
        ("tome", _settings(prop_attn="yes"), "prop_attn: 'yes' is not true or false"),
        ("tome", lambda r: r.update(merges=3), "'merges' is not known"),
        ("tome", lambda r: r["stages"][1].update(block=2), "do not keep what its settings say"),
        ("tome", lambda r: r["stages"][1].update(keep=1), "do not keep what its settings say"),
        ("tome", lambda r: r["stages"].append(r["stages"][0]), "do not keep what its settings say"),
        ("tome", lambda r: r.update(num_patches=9), "num_patches is 9"),
        ("predictor", lambda r: r.update(merges=True), "'merges' is not known"),
    ],
)
def test_a_damaged_header_is_refused(method, change, message, tmp_path):
    path = tmp_path / "m.safetensors"
    converted(method, **({"merge": 20} if method == "tome" else {})).save(path)
    rewrite(path, lambda config: change(config["reduction"]))
    with pytest.raises(dvit.InputError, match=message) as caught:
        dvit.load(path, device="cpu")
    assert str(caught.value).startswith(f"{path}: ")


def test_neither_is_one_that_says_that_they_were_learned(tmp_path):
    path = tmp_path / "m.safetensors"
    converted("evit", learned=False).save(path)
    rewrite(path, lambda config: config.update(learned=config["reduction"]))
    with pytest.raises(dvit.InputError, match="method: 'evit' is not one of"):
        dvit.load(path, device="cpu")


def rewrite(path, change):
    with safe_open(path, "pt") as file:
        header, tensors = json.loads(file.metadata()["dvit_infer"]), {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    change(header["config"])
    save_file(tensors, path, {"dvit_infer": json.dumps(header)})
