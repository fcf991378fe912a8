"""The launches of a runner by node, which are not run: kernels, and operators of PyTorch."""

from dvit_kernels.launch import collecting
from torch.utils._python_dispatch import TorchDispatchMode

# Operators of PyTorch that launch nothing on a GPU.
_VIEWS = {
    "alias",
    "detach",
    "empty",
    "expand",
    "lift_fresh",
    "new_empty",
    "permute",
    "select",
    "slice",
    "transpose",
    "unbind",
    "view",
}


class Launched(TorchDispatchMode):
    """The launches of a runner, which are not run, by the name of the node: kernels, and operators of PyTorch."""

    def __init__(self, kernels):
        super().__init__()
        self.by_node, self._kernels, self._others = {}, kernels, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, name, _ = str(func).split(".")
        if namespace == "aten" and name.removeprefix("_") not in _VIEWS:
            self._others.append(name)
        return func(*args, **(kwargs or {}))

    def hook(self, node, x):
        names = [launch.kernel.__name__ for launch in self._kernels]
        self.by_node[node.name] = names + self._others
        self._kernels.clear()
        self._others.clear()


def launched(runner, images, choices=False):
    """The launches of a call, by the name of the node; what they would compute is not there."""
    with collecting() as kernels, Launched(kernels) as seen:
        runner.run(images, None, seen.hook, return_choices=choices)
    return seen.by_node
