"""What a server may be told, apart from its models."""

from dataclasses import dataclass

from dvit_infer.errors import InputError
from dvit_infer.images.decode import MAX_PIXELS
from dvit_infer.utils.bounds import check_bound


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Limits and times of a server; the defaults are those of dvit-serve.

    Attributes:
        max_batch: images that run together, and of a request, at most.
        max_delay_ms: the longest that an image waits for others while the engine is idle.
        max_queue: images that may wait; None: four batches.
        timeout_s: the deadline of a request that names none.
        body_timeout_s: the longest that a request's body, and before that its headers, may take to arrive.
        max_body: bytes of a body.
        max_pixels: pixels of an image file.
        token: clients have to send it; None: any client may.

    Raises:
        InputError: A value is out of range.
    """

    max_batch: int = 64
    max_delay_ms: float = 3.0
    max_queue: int | None = None
    timeout_s: float = 30.0
    body_timeout_s: float = 20.0
    max_body: int = 64 << 20
    max_pixels: int = 50_000_000
    token: str | None = None

    def __post_init__(self) -> None:
        for what, least, most in (
            ("max_batch", 1, 1 << 16),
            ("max_delay_ms", 0, 60_000),
            ("timeout_s", 0.001, 86_400),
            ("body_timeout_s", 0.001, 86_400),
            ("max_body", 1, 1 << 34),
            ("max_pixels", 1, MAX_PIXELS),
        ):
            value = getattr(self, what)
            check_bound(what, value, most)
            if not value >= least:
                raise InputError(f"{what}: {value:g}; {least:g} or more is expected")
        if self.max_queue is not None and not self.max_batch <= self.max_queue <= 1 << 20:
            raise InputError(f"max_queue: {self.max_queue}; {self.max_batch}, a batch, to {1 << 20} are expected")

    @property
    def places(self) -> int:
        """The images that may wait."""
        return 4 * self.max_batch if self.max_queue is None else self.max_queue

    @property
    def max_held(self) -> int:
        """The bytes of bodies that a process may hold at a time: requests beyond are told to come again."""
        return 8 * self.max_body
