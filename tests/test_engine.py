"""The engine: golden answers, batches, inputs, kept sets given, save and load."""

import os
import threading

import pytest
import torch
from golden_cases import EVERY_CASE, answers, case_images, official_checkpoint, options, same_kept

import dvit_infer as dvit
from dvit_infer.images.synthetic import sample_images
from dvit_infer.models.checkpoint import read_checkpoint
from dvit_infer.utils.devices import micro_batch

TINY = "tiny-deit-r0.7-s1"


@pytest.fixture(scope="module")
def tiny() -> dvit.Engine:
    return dvit.convert(official_checkpoint(TINY), device="cpu", **options(TINY))


@pytest.mark.parametrize("case_id", EVERY_CASE)
def test_agrees_with_the_golden_case(case_id, device):
    logits, kept, margin = answers(case_id)
    engine = dvit.convert(official_checkpoint(case_id), device=device, dtype="float32", **options(case_id))
    ours, ours_kept = engine(case_images(case_id), return_kept=True)
    assert ours.dtype == torch.float32
    assert (ours.cpu() - logits).abs().max() < 2e-5
    assert same_kept([k.cpu() for k in ours_kept], kept, margin)


def test_small_models_take_more_images_at_a_time(tiny):
    cpu = torch.device("cpu")
    assert [micro_batch(cpu, 196, width) for width in (768, 384, 192, 8)] == [16, 16, 32, 256]
    assert tiny.micro_batch == micro_batch(tiny.device, 196, 64)


def test_a_images_answer_does_not_depend_on_its_batch(tiny, monkeypatch):
    monkeypatch.setattr(tiny, "micro_batch", 8)
    images = case_images(TINY).repeat(7, 1, 1, 1)[:19] + 0.01 * torch.arange(19).view(19, 1, 1, 1)
    logits, kept = tiny(images, return_kept=True)
    for batch in (1, 2, 7, 8, 9, 16, 17):
        part, part_kept = tiny(images[:batch], return_kept=True)
        assert torch.allclose(part, logits[:batch], rtol=0, atol=5e-5)
        assert all(torch.equal(a, b[:batch]) for a, b in zip(part_kept, kept, strict=True))


def test_uint8_is_normalised_inside(tiny):
    raw = (case_images(TINY) * 60 + 120).clamp(0, 255).to(torch.uint8)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (tiny.config.mean, tiny.config.std))
    assert torch.allclose(tiny(raw), tiny((raw / 255 - mean) / std), atol=1e-5)


def test_any_strides_and_any_floating_dtype(tiny):
    images = case_images(TINY)
    expected = tiny(images)
    for same in (
        images.to(memory_format=torch.channels_last),
        images.flip(0).flip(0).permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
        torch.cat([images, images], dim=3)[..., :224],
        images.double(),
    ):
        assert torch.allclose(tiny(same), expected, atol=1e-5)
    assert torch.allclose(tiny(images.bfloat16()), expected, atol=0.2)


def test_given_kept_sets(tiny):
    images = case_images(TINY)
    logits, kept = tiny(images, return_kept=True)
    assert torch.allclose(tiny(images, kept=kept), logits, atol=1e-6)
    reference = dvit.load_reference(official_checkpoint(TINY), **options(TINY))
    others = [torch.arange(stage.shape[1]).expand_as(stage) for stage in kept]
    with torch.no_grad():
        assert torch.allclose(tiny(images, kept=others), reference(images, kept=others), atol=2e-5)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(3, 224, 224), "shape"),
        (torch.zeros(1, 1, 3, 224, 224), "shape"),
        (torch.zeros(1, 4, 224, 224), "shape"),
        (torch.zeros(1, 224, 224, 3), "shape"),
        (torch.zeros(1, 3, 224, 240), "shape"),
        (torch.zeros(0, 3, 224, 224), "shape"),
        (torch.zeros(1, 3, 224, 224, dtype=torch.int32), "int32"),
        (torch.zeros(1, 3, 224, 224, dtype=torch.bool), "bool"),
        (torch.zeros(1, 3, 224, 224, dtype=torch.complex64), "complex64"),
        ([[1.0]], "list"),
        (torch.zeros(1, 3, 224, 224).to_sparse(), "dense"),
        (torch.zeros(1, 3, 224, 224, device="meta"), "dense"),
        (torch.nested.nested_tensor([torch.zeros(3, 224, 224)]), "dense"),
    ],
)
def test_images_that_do_not_fit_are_refused(tiny, images, message):
    with pytest.raises(ValueError, match=message):
        tiny(images)


def test_kept_sets_that_do_not_fit_are_refused(tiny):
    images = case_images(TINY)
    _, kept = tiny(images, return_kept=True)
    gone = next(i for i in range(196) if i not in kept[0][0].tolist())
    foreign = kept[1].clone()
    foreign[0, 0] = gone
    for wrong, message in (
        (kept[:2], "2 stages"),
        (3, "not a int"),
        ([k.tolist() for k in kept], "not a list|is a list"),
        ([k.to("meta") for k in kept], "dense"),
        ([kept[0][:1], *kept[1:]], "stage 0"),
        ([kept[0].int(), *kept[1:]], "int32"),
        ([kept[0].flip(1), *kept[1:]], "ascending"),
        ([kept[0] + 100, *kept[1:]], "ascending"),
        ([kept[0], foreign.sort(dim=1).values, kept[2]], "dropped"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny(images, kept=wrong)


def test_threads_may_share_an_engine(tiny):
    images, expected, wrong = case_images(TINY), tiny(case_images(TINY)), []

    def work() -> None:
        for _ in range(3):
            if not torch.allclose(tiny(images), expected, atol=1e-5):
                wrong.append(True)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("case_id", [TINY, "tiny-lvvit-r0.5-s2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_saved_files_give_back_the_same_engine(case_id, dtype, tmp_path):
    checkpoint = official_checkpoint(case_id)
    source = {"model": {k: v.to(dtype) if v.is_floating_point() else v for k, v in checkpoint["model"].items()}}
    engine = dvit.convert(source | {"args": checkpoint["args"]}, device="cpu", **options(case_id))
    engine.save(tmp_path / "m.safetensors")
    saved = dvit.load(tmp_path / "m.safetensors", device="cpu")
    assert saved.config == engine.config
    assert torch.equal(saved(case_images(case_id)), engine(case_images(case_id)))
    state = read_checkpoint(tmp_path / "m.safetensors").state
    assert state.keys() == source["model"].keys()
    for key, value in source["model"].items():
        assert state[key].dtype == value.dtype
        assert torch.equal(state[key], value)
    assert os.listdir(tmp_path) == ["m.safetensors"]


def test_everything_else_can_be_built_from_a_saved_file(tiny, tmp_path):
    tiny.save(tmp_path / "m.safetensors")
    path, images = tmp_path / "m.safetensors", case_images(TINY)
    dense = dvit.load(path, device="cpu", method="none")
    assert torch.allclose(
        dense(images), dvit.convert(official_checkpoint(TINY), method="none", device="cpu", **options(TINY))(images)
    )
    half = dvit.load(path, device="cpu", keep_rate=0.5)
    assert [k.shape[1] for k in half(images, return_kept=True)[1]] == [98, 49, 24]
    assert dvit.load(path, device="cpu", dtype="bfloat16").dtype == torch.bfloat16
    reference = dvit.load_reference(path)
    with torch.no_grad():
        assert torch.allclose(reference(images), tiny(images), atol=2e-5)
    dense.save(tmp_path / "d.safetensors")
    assert dvit.load(tmp_path / "d.safetensors", device="cpu").config.method == "none"
    assert dvit.load(tmp_path / "d.safetensors", device="cpu", method="predictor").config == tiny.config
    assert dvit.convert(path, device="cpu").config == tiny.config


def test_saving_over_the_file_it_came_from(tiny, tmp_path):
    path = tmp_path / "m.safetensors"
    tiny.save(path)
    again = dvit.load(path, device="cpu")
    again.save(path)
    assert torch.equal(dvit.load(path, device="cpu")(case_images(TINY)), tiny(case_images(TINY)))


def test_load_takes_only_what_save_wrote(tmp_path):
    torch.save(official_checkpoint(TINY), tmp_path / "c.pth")
    with pytest.raises(dvit.InputError, match="no saved engine"):
        dvit.load(tmp_path / "c.pth")


def test_image_size_tuple_and_resampling():
    case_id = "timm-deit_tiny_patch16_224-at-192x256"
    engine = dvit.convert(official_checkpoint(case_id), image_size=(192, 256), device="cpu")
    assert engine.config.grid == (12, 16)
    assert engine.config.trained_size == (224, 224)
    with pytest.raises(ValueError, match="shape"):
        engine(torch.zeros(1, 3, 256, 192))


def test_dtype_and_device_are_named_when_unknown(tiny):
    for arguments in (
        {"dtype": "int4"},
        {"dtype": torch.float64},
        {"device": "tpu"},
        {"device": "mps"},
        {"device": "cuda:99"},
    ):
        with pytest.raises(dvit.InputError, match=next(iter(arguments))):
            dvit.convert(official_checkpoint(TINY), **arguments, **options(TINY))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_reduced_dtypes_keep_float32_logits_near(dtype, device):
    engine = dvit.convert(official_checkpoint(TINY), device=device, dtype=dtype, **options(TINY))
    logits, kept, _ = answers(TINY)
    ours = engine(case_images(TINY), kept=kept)
    assert ours.dtype == torch.float32
    assert (ours.cpu() - logits).abs().max() < 0.1


def test_pruning_before_the_first_and_the_last_block():
    checkpoint = official_checkpoint(TINY)
    for prune_at in ((0, 1, 3), (1, 2, 3), (0, 1, 2)):
        chosen = options(TINY) | {"prune_at": prune_at}
        engine, reference = dvit.convert(checkpoint, device="cpu", **chosen), dvit.load_reference(checkpoint, **chosen)
        logits, kept = engine(case_images(TINY), return_kept=True)
        with torch.no_grad():
            expected, expected_kept = reference(case_images(TINY), return_kept=True)
        assert torch.allclose(logits, expected, atol=2e-5)
        assert all(torch.equal(a, b) for a, b in zip(kept, expected_kept, strict=True))


def test_keep_rate_of_one_keeps_everything():
    chosen = options(TINY) | {"device": "cpu"}
    engine = dvit.convert(official_checkpoint(TINY), keep_rate=1.0, **chosen)
    logits, kept = engine(case_images(TINY), return_kept=True)
    assert all(torch.equal(k, torch.arange(196).expand(3, -1)) for k in kept)
    dense = dvit.convert(official_checkpoint(TINY), method="none", **chosen)
    assert torch.allclose(logits, dense(case_images(TINY)), atol=2e-5)


def test_autocast_around_the_call_changes_nothing(tiny):
    images = case_images(TINY)
    expected = tiny(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(tiny(images), expected)
        assert dvit.verify(tiny, official_checkpoint(TINY), num_images=2).passed


def test_a_saved_file_is_loaded_for_another_size(tmp_path):
    checkpoint = official_checkpoint("tiny-deit-r0.7-s1")
    dvit.convert(checkpoint, device="cpu", assume={"num_heads": 2}).save(tmp_path / "m.safetensors")
    engine = dvit.load(tmp_path / "m.safetensors", device="cpu", image_size=(96, 128))
    expected = dvit.convert(checkpoint, device="cpu", image_size=(96, 128), assume={"num_heads": 2})
    assert (engine.config.image_size, engine.config.num_keep) == ((96, 128), (33, 23, 16))
    images = sample_images(2, (96, 128))
    assert torch.equal(engine(images), expected(images))
    with pytest.raises(dvit.InputError, match="image_size: 100x100 is not a multiple"):
        dvit.load(tmp_path / "m.safetensors", device="cpu", image_size=100)
