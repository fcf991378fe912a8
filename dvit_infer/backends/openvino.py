"""The OpenVINO backend: runs the whole graph as one OpenVINO model, on CPUs."""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dvit_infer.backends.cpu import CpuRunner
from dvit_infer.backends.openvino_cache import LEAST_BYTES, cached_model
from dvit_infer.backends.openvino_model import (
    PRECISIONS,
    VARIANTS,
    Variant,
    compile_model,
    constants_of,
    core,
    first_reason,
    no_images,
    only,
    openvino_model,
)
from dvit_infer.backends.state import Hook, State, follow
from dvit_infer.errors import InputError
from dvit_infer.graph.graph import Graph
from dvit_infer.graph.heads import OF_ALL_TOKENS, Wanted
from dvit_infer.graph.maps import Depthwise
from dvit_infer.graph.reductions import Reduce
from dvit_infer.graph.tokens import Tokens
from dvit_infer.images.tensors import prepare
from dvit_infer.utils.mapping import release_file, released_meanwhile
from dvit_infer.utils.memory import return_freed

# Values of a row that share a range in dynamic quantisation. DeiT-S/0.7 on two threads of a Xeon, batch 1, 8, 32: with
# 32 of them 1.3 x float32, with 64 1.5 x, with 128 1.65, 1.67 and 1.54 x, as with 384.
_GROUP = 128


class Form(NamedTuple):
    """A compiled model: of a variant, for a number of images; None: for any."""

    variant: Variant
    images: int | None = None

    def replaced_by(self, other: "Form") -> bool:
        """Return whether there is to be only one of the two: of one variant, for different numbers of images."""
        return self.variant == other.variant and None not in (self.images, other.images) and self != other


class OpenVinoRunner:
    """Runs a graph in OpenVINO.

    It holds one compiled model, with weights packed for this processor, for each output that was asked for (logits,
    features, tokens, feature map) and for given kept sets, made when it is first needed. PyTorch runs the nodes one by
    one where a hook is given, with weights that are read again. Threads may share it: each has its own infer requests.

    Around the convolutions of maps, OpenVINO copies them to another layout and back, unless it knows the number of
    images (a fifth of ConvNeXt-T's time at batch 8). So a second call in a row with the same number compiles a model
    for it, in a second or so; there is one such model for each output, beside the one for any number.

    Args:
        graph: the graph with its weights, which are not kept unless they are few.
        weights: returns the same again.
        key: identifies the weights and the config, for the cache of models; None: do not use it.
        int8: linears in int8: static quantisation by the config's `ranges`, dynamic without them.
        take: whether weights that it does not need may be taken out of the graph.

    Raises:
        InputError: a node kind is not known here, or OpenVINO cannot compile the model.
    """

    def __init__(
        self,
        graph: Graph,
        weights: Callable[[], Graph],
        key: bytes | None = None,
        int8: bool = False,
        take: bool = False,
    ) -> None:
        self.config, self.device, self.dtype, self.int8 = graph.config, graph.device, graph.dtype, int8
        size = graph.weight_bytes
        self._weights, self._held = weights, graph if size < LEAST_BYTES else None
        self._key = key if size >= LEAST_BYTES else None
        self._nodes = graph.to(torch.device("meta"), graph.dtype).nodes
        self._reductions = [node for node in self._nodes if isinstance(node, Reduce)]
        self._lock, self._local = threading.Lock(), threading.local()
        self._models: dict[Form, Any] = {}
        self._mapped: dict[Form, Path] = {}  # whose weights are mapped and not all packed yet
        self._note = ""
        self._fixes = any(isinstance(node, Depthwise) for node in self._nodes)
        self._last: dict[Variant, int] = {}  # the number of images of the last call
        self._compile(Form(VARIANTS[0]), graph, take)

    def __deepcopy__(self, memo: object) -> "OpenVinoRunner":
        return self  # nothing in it changes

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, (self._weights, self._key, self.int8)

    @property
    def runtime(self) -> str:
        import openvino

        name = str(self.dtype).removeprefix("torch.")
        if self.int8:
            rest = {"f32": "float32", "bf16": "bfloat16"}[self._settings["INFERENCE_PRECISION_HINT"]]
            name = f"int8 ({'static' if self.config.ranges else 'dynamic'}; scores float32, the rest {rest})"
        return f"OpenVINO {openvino.__version__.split('-')[0]}, {name}{self._note}"

    @property
    def _settings(self) -> dict[str, Any]:
        if not self.int8:
            return {"INFERENCE_PRECISION_HINT": PRECISIONS[self.dtype]}
        fast = "BF16" in core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        return {
            "INFERENCE_PRECISION_HINT": "bf16" if fast else "f32",
            # With bfloat16 on a CPU with AMX only the weights are int8 then: products in bfloat16 are faster there.
            **({} if self.config.ranges else {"DYNAMIC_QUANTIZATION_GROUP_SIZE": _GROUP}),
        }

    @property
    def buffer_bytes(self) -> int:
        """0: OpenVINO does not report it."""
        return 0

    def release(self) -> None:
        """Do nothing: OpenVINO manages its own memory."""

    def plain(self) -> CpuRunner:
        """Return a runner of the same graph in PyTorch, node by node, which holds its own weights."""
        return CpuRunner(self._held or self._weights())

    def constants(self) -> dict[str, torch.Tensor]:
        """Return the weights of the model, in float32, by their names in it."""
        return constants_of(self._model(VARIANTS[0], None)[0], self._nodes)

    @torch.no_grad()
    def run(
        self,
        images: torch.Tensor,
        given: Sequence[torch.Tensor] | None = None,
        hook: Hook | None = None,
        return_choices: bool = True,
        output: Wanted = "logits",
    ) -> State:
        """Run the graph; arguments and result are as for every runner.

        Raises:
            MemoryError: out of memory.
        """
        if hook is not None:
            return self.plain().run(images, given, hook, return_choices, output)
        images = prepare(images, self.config, self.device, torch.float32)
        form = self._form(Variant(output, bool(given)), len(images))
        try:
            choices = self._choices(given or ())
            x, *own = self._infer(self._request(form), [images, *choices])
        except RuntimeError as error:
            if "alloc" in str(error):
                raise MemoryError(str(error)) from None
            raise
        if (path := self._mapped.pop(form, None)) is not None:
            release_file(path)
        if not (given or return_choices or output in OF_ALL_TOKENS):
            return State(x)
        return follow(x, zip(self._reductions, choices or own, strict=True))

    def _choices(self, given: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the choice of each stage, as its node states it, that does what is given."""
        tokens, choices = Tokens(torch.empty(0)), []
        for node, stage in zip(self._reductions, given, strict=False):
            choices.append(node.choice_of(tokens, stage))
            node.note(tokens, choices[-1])
        return choices

    def _form(self, variant: Variant, images: int) -> Form:
        """Return the form of a model for a call with that number of images."""
        last, self._last[variant] = self._last.get(variant), images
        return Form(variant, images if self._fixes and images == last else None)

    def _infer(self, request: Any, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return copies of the outputs; the inputs are read where they are, and let go of then."""
        import numpy as np
        from openvino import Tensor

        shared = [Tensor(tensor.detach().numpy(), shared_memory=True) for tensor in inputs]
        try:
            for i, tensor in enumerate(shared):
                request.set_input_tensor(i, tensor)
            request.infer()
            return [torch.from_numpy(np.array(tensor.data)) for tensor in request.output_tensors]
        finally:
            request.set_input_tensor(0, no_images(self.config, len(inputs[0]) if self._fixes else 1))

    def _request(self, form: Form) -> Any:
        """Return the calling thread's infer request for a form; those for other numbers of images are let go of."""
        requests = self._local.__dict__.setdefault("requests", {})
        if form not in requests:
            with self._lock:
                if form not in self._models:
                    self._compile(form)
                model = self._models[form]
            for other in [other for other in requests if other.replaced_by(form)]:
                del requests[other]
            requests[form] = model.create_infer_request()
        return requests[form]

    def _compile(self, form: Form, graph: Graph | None = None, take: bool = False) -> None:
        """Compile a form of the model; `graph` saves reading the weights again, if they are needed.

        With `take`, weights that are in the cache are taken out of it before.
        """
        try:
            model, path = self._model(form.variant, graph)
            if take and path is not None and graph is not None:
                graph.forget()
                return_freed()  # what the heap keeps of them would stand beside the packed weights
            if form.images is not None:
                model.reshape({given: [form.images, *list(given.partial_shape)[1:]] for given in model.inputs})
            with released_meanwhile(path):
                compiled = compile_model(model, self._settings)
        except RuntimeError as error:  # OpenVINO's only class
            raise InputError(f"backend: openvino cannot compile {self.config.arch}: {first_reason(error)}") from None
        if path is not None:
            self._mapped[form] = path  # the first call packs more of them
        for other in [other for other in self._models if other.replaced_by(form)]:
            del self._models[other]
        self._models[form] = compiled

    def _model(self, variant: Variant, graph: Graph | None) -> tuple[Any, Path | None]:
        """Return a variant's model, and the file from which its weights are mapped, if they are."""
        import openvino

        if self._key is not None:
            path, note = cached_model(
                self._key,
                lambda path: openvino.serialize(self._built(VARIANTS, graph), path, path.with_suffix(".bin")),
            )
            self._note = self._note or note
            if path is not None:
                try:
                    return only(core().read_model(path), variant), path.with_suffix(".bin")
                except RuntimeError:
                    pass  # another process may just be replacing it
        return self._built([variant], graph), None

    def _built(self, variants: Sequence[Variant], graph: Graph | None) -> Any:
        graph = graph or self._held or self._weights()
        try:
            return openvino_model(graph, variants, self.int8)
        except InputError as error:
            raise InputError(f"backend: {error} for openvino") from None


def _unpickled(weights: Callable[[], Graph], key: bytes | None, int8: bool) -> Any:
    """Return a runner of the same graph, in PyTorch if there is no OpenVINO here."""
    from dvit_infer.backends import runner_for  # which imports this module

    return runner_for(weights(), None, weights, key, int8)
