"""How often the pruned model is right about images that it does not learn from."""

from collections.abc import Callable, Mapping, Sequence

import torch

from dvit_infer.config import Config
from dvit_infer.images.preprocess import preprocess_for
from dvit_infer.images.stream import Entry, batches, decode, pixels
from dvit_infer.images.tensors import normalise
from dvit_infer.models.vit.reference import VisionTransformer
from dvit_infer.training.distributed import World
from dvit_infer.training.student import set_training

AT_ONCE = 64


@torch.no_grad()
def top1(
    student: VisionTransformer,
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
    """Percent of the images that the student with these weights is right about; patches are really dropped.

    Every process takes its share of them. Those that cannot be read do not count. The student is in training mode
    afterwards, with the weights that it had.

    Args:
        on_counted: called with how many of this process's images were counted, and how many it has.
        stop: true in any process: None is what comes out.
    """
    own = {name: value.clone() for name, value in student.state_dict().items()}
    student.load_state_dict(weights)
    student.eval()
    mine = [Entry(path, label) for path, label in image_files[world.rank :: world.size]]
    right = total = done = 0
    stopped = False
    for group in batches(decode(mine, preprocess_for(config), workers), AT_ONCE):
        images = pixels(group)
        if images is not None:
            logits = student.evaluate(normalise(images.to(device), config.mean, config.std)).logits
            labels = torch.tensor([image.label for image in group if image.error is None])
            right += int((logits.argmax(dim=1).cpu() == labels).sum())
            total += len(labels)
        done += len(group)
        on_counted(done, len(mine))
        if stopped := stop():
            break
    student.load_state_dict(own)
    set_training(student)
    counts = world.all_reduce(torch.tensor([float(right), float(total), float(stopped)], device=device)).tolist()
    return None if counts[2] else 100 * counts[0] / max(1.0, counts[1])
