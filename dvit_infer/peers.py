"""Other projects' runtimes, where they are installed: timm's dense twin, ONNX Runtime, OpenVINO."""

import contextlib
import functools
import importlib.util
import logging
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from dvit_infer.config import Config
from dvit_infer.errors import InputError
from dvit_infer.families import build_reference
from dvit_infer.graph import build_graph
from dvit_infer.images import sample_images
from dvit_infer.reference.vit import VisionTransformer
from dvit_infer.ways import Call, Subject, Way, first_line, mib


def timm_way(subject: Subject) -> Way:
    """The dense twin as timm has it, with the checkpoint's weights."""
    config = subject.dense_config
    if config.family != "deit":
        raise InputError(f"compare: timm has no {config.family}; leave timm out")
    _need("timm")
    try:
        from timm.models.deit import VisionTransformerDistilled
        from timm.models.vision_transformer import VisionTransformer as TimmViT
    except (ImportError, RuntimeError, AttributeError) as error:  # a torchvision built for another torch
        raise InputError(f"compare: timm cannot be imported here: {first_line(error)}") from None
    kind = VisionTransformerDistilled if config.num_prefix == 2 else TimmViT
    twin = kind(
        img_size=config.image_size,
        patch_size=config.patch_size,
        num_classes=config.num_classes,
        embed_dim=config.embed_dim,
        depth=config.depth,
        num_heads=config.num_heads,
        mlp_ratio=config.mlp_dim / config.embed_dim,
        norm_layer=functools.partial(nn.LayerNorm, eps=config.eps),
    )
    dense = build_reference(config, subject.checkpoint)
    twin.load_state_dict({k: w for k, w in dense.state_dict().items() if not k.startswith("score_predictor.")})
    twin = twin.eval().to(subject.device, subject.dtype)
    weights = mib(twin.parameters())
    return Way("timm", None, config, twin, build_graph(dense, config).gflops, lambda: weights)


def onnxruntime_way(subject: Subject) -> Way:
    cuda = subject.device.type == "cuda"
    served = (torch.float32, torch.float16) if cuda else (torch.float32,)
    if subject.dtype not in served:
        names = " and ".join(str(dtype).removeprefix("torch.") for dtype in served)
        raise InputError(f"compare: onnxruntime runs {names} on {subject.device.type}, not {subject.dtype_name}")
    _need("onnx", "onnxscript", "onnxruntime")
    import onnxruntime

    provider = "CUDAExecutionProvider" if cuda else "CPUExecutionProvider"
    if provider not in onnxruntime.get_available_providers():
        raise InputError(f"compare: this onnxruntime has no {provider}; onnxruntime-gpu would")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(_exported(subject, subject.dtype), options, providers=[provider])

    def run(images: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])

    def run_bound(images: torch.Tensor) -> torch.Tensor:
        logits = torch.empty(len(images), subject.config.num_classes, device=images.device, dtype=images.dtype)
        binding = session.io_binding()
        kind = "float16" if images.dtype == torch.float16 else "float32"
        where = "cuda", images.device.index or 0, kind
        binding.bind_input("images", *where, tuple(images.shape), images.data_ptr())
        binding.bind_output("logits", *where, tuple(logits.shape), logits.data_ptr())
        torch.cuda.synchronize(images.device)  # it runs on a stream of its own
        session.run_with_iobinding(binding)
        return logits

    return _of_runtime(subject, "onnxruntime", run_bound if cuda else run)


def openvino_way(subject: Subject) -> Way:
    if subject.device.type != "cpu":
        raise InputError("compare: openvino runs on CPUs; leave it out, or --device cpu")
    hints = {torch.float32: "f32", torch.bfloat16: "bf16"}
    if subject.dtype not in hints:
        raise InputError(f"compare: openvino runs float32 and bfloat16, not {subject.dtype_name}")
    _need("onnx", "onnxscript", "openvino")
    import openvino

    core = openvino.Core()
    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": hints[subject.dtype],
        "PERFORMANCE_HINT": "LATENCY",
    }
    # Its own way to bfloat16 is the hint: weights and pictures come in float32.
    compiled = core.compile_model(core.read_model(_exported(subject, torch.float32)), "CPU", settings)

    def run(images: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(compiled([images.numpy()])[0])

    return replace(_of_runtime(subject, "openvino", run), prepare=torch.Tensor.float)


def _of_runtime(subject: Subject, how: str, call: Call) -> Way:
    return Way(how, None, subject.config, call, subject.plain_gflops, lambda: None)


def _exported(subject: Subject, dtype: torch.dtype) -> bytes:
    return export_onnx(build_reference(subject.config, subject.checkpoint).to(dtype), subject.config)


class _Logits(nn.Module):
    """A reference whose forward gives logits alone, for exporters."""

    def __init__(self, model: VisionTransformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model.evaluate(images).logits


@torch.no_grad()
def export_onnx(model: VisionTransformer, config: Config) -> bytes:
    """A reference as torch.onnx writes it: input `images` (B, 3, H, W), output `logits` (B, K), any B."""
    from onnxscript import opset18 as op

    def stable_sort(x: Any, stable: Any = None, dim: int = -1, descending: bool = False) -> Any:
        """TopK orders equals by position, which makes it a stable sort; the exporter knows none."""
        gather: Any = op.Gather  # its stubs want the type of what is only known when it runs
        size = gather(op.Shape(x), op.Constant(value_ints=[dim]))
        return op.TopK(x, size, axis=dim, largest=int(descending), sorted=1)

    images = sample_images(2, config.image_size).to(model.pos_embed.dtype)
    with _quiet():
        program = torch.onnx.export(
            _Logits(model).eval(),
            (images,),
            dynamo=True,
            verbose=False,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes={"images": {0: torch.export.Dim("batch", min=1)}},
            custom_translation_table={torch.ops.aten.sort.stable: stable_sort},
        )
    assert program is not None
    exported: bytes = program.model_proto.SerializeToString()
    return exported


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter tells of packages that it does not need."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _need(*packages: str) -> None:
    """The last of the packages is what was asked for."""
    if missing := [package for package in packages if importlib.util.find_spec(package) is None]:
        extra = "timm" if packages == ("timm",) else "dvit-infer[peers]"
        raise InputError(
            f"compare: {packages[-1]} needs {', '.join(missing)}, not installed; pip install '{extra}' would do"
        )
