"""Measure the top-1 accuracy of the pruned model on held-out images."""

from collections.abc import Callable, Mapping, Sequence

import torch

from dvit_infer.config import Config
from dvit_infer.images.stream import Entry, batches, decode, pixels
from dvit_infer.images.tensors import normalise
from dvit_infer.models.preprocessing import preprocess_for
from dvit_infer.models.reference import Reference
from dvit_infer.training.distributed import World
from dvit_infer.training.student import set_training

AT_ONCE = 64


@torch.no_grad()
def top1(
    student: Reference,
    weights: Mapping[str, torch.Tensor],
    config: Config,
    image_files: Sequence[tuple[str, int]],
    *,
    workers: int,
    world: World,
    device: torch.device,
    on_counted: Callable[[int, int], None],
    stop: Callable[[], bool],
) -> float | None:
    """Return the top-1 accuracy in percent of the student with these weights, with patches really dropped.

    Every process takes its share of the images. Unreadable ones do not count. Afterwards the student is in training
    mode with its previous weights.

    Args:
        on_counted: called with the number of this process's images done, and their total.
        stop: if it returns True in any process, the result is None.
    """
    own = {name: value.clone() for name, value in student.state_dict().items()}
    student.load_state_dict(weights)
    student.eval()
    mine = [Entry(path, label) for path, label in image_files[world.rank :: world.size]]
    correct = total = done = 0
    stopped = False
    for group in batches(decode(mine, preprocess_for(config), workers), AT_ONCE):
        images = pixels(group)
        if images is not None:
            logits = student.evaluate(normalise(images.to(device), config.mean, config.std)).logits
            labels = torch.tensor([image.label for image in group if image.error is None])
            correct += int((logits.argmax(dim=1).cpu() == labels).sum())
            total += len(labels)
        done += len(group)
        on_counted(done, len(mine))
        if stopped := stop():
            break
    student.load_state_dict(own)
    set_training(student)
    counts = world.all_reduce(torch.tensor([float(correct), float(total), float(stopped)], device=device)).tolist()
    return None if counts[2] else 100 * counts[0] / max(1.0, counts[1])
