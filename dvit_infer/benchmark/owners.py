"""Candidates of the owners' own code, if installed: the dense model of timm or transformers with the same weights."""

import re

from dvit_infer.benchmark.candidates import Candidate, Subject, compiled, first_line, mib
from dvit_infer.errors import InputError
from dvit_infer.models.registry import build_graph, build_reference, family_of
from dvit_infer.utils.packages import import_beside_torchvision, need


def owner_candidate(subject: Subject, package: str, compiles: bool = False) -> Candidate:
    """The model in the code of timm or transformers, eager or under torch.compile.

    Raises:
        InputError: The package cannot be imported, or has no such model.
    """
    config = subject.dense_config
    family = family_of(config)
    build = family.owners.get(package)
    if build is None:
        raise InputError(f"compare: {package} has no {config.family}; leave {package} out")
    need(f"compare: {package}", package, extra=package)
    try:
        import_beside_torchvision(package)
    except (ImportError, RuntimeError, AttributeError) as error:
        raise InputError(f"compare: {package} cannot be imported here: {first_line(error)}") from None
    dense = build_reference(config, subject.checkpoint)
    weights = {key: w for key, w in dense.state_dict().items() if not re.match(family.of_reduction, key)}
    model = build(config, weights, subject.checkpoint.beside, subject.source.tensors_in_file)
    model = model.eval().to(subject.device, subject.dtype)
    held = mib(model.parameters())
    call, variant = (compiled(subject, model), "compile") if compiles else (model, None)
    return Candidate(package, variant, config, call, build_graph(dense, config).gmacs, lambda: held)
