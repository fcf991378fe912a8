"""The outcome of `verify`, and its table."""

from dataclasses import dataclass
from typing import Literal

from dvit_infer.utils.tables import table


@dataclass(frozen=True)
class Report:
    """The outcome of `verify`; `str()` is the table. Errors are against the reference in float32.

    Attributes:
        model: the architecture and its reduction: what the parity is of.
        max_error: of the engine's logits, with the reference's kept sets where its own differ (float32)
            or everywhere (bfloat16 and float16); int8 always by its own choice, whose flips are part of its error.
        rms_error: likewise.
        plain_max_error: the same for plain PyTorch in the engine's dtype.
        plain_rms_error: likewise.
        top1_agreement: share of images with the reference's first class.
        plain_top1_agreement: the same for plain PyTorch.
        kept_compared: per stage, images whose cut is clear.
        kept_equal: per stage, those of them with the same kept set.
        kept_overlap: per stage, mean share of the reference's tokens that the engine keeps by its own choice; where
            tokens are merged, of patches in a group with the same lowest patch.
        choice: what a stage does with tokens, for the table.
        wrong_weight: the first of the engine's tensors that does not follow from the checkpoint, or None.
        first_difference: the first node whose output differs, or None.
        failures: the reasons why it did not pass; empty if it passed.
        features_error: the same for what the classifier reads, max in float32, else rms; None: not compared, as
            tokens are dropped, features are the output, or an ONNX file has none.
        plain_features_error: likewise of plain PyTorch.
        output: the output of the model, which errors are of.
    """

    model: str
    dtype: str
    device: str
    num_images: int
    max_error: float
    rms_error: float
    plain_max_error: float
    plain_rms_error: float
    top1_agreement: float
    plain_top1_agreement: float
    kept_compared: tuple[int, ...]
    kept_equal: tuple[int, ...]
    kept_overlap: tuple[float, ...]
    wrong_weight: str | None
    first_difference: str | None
    failures: tuple[str, ...]
    features_error: float | None = None
    plain_features_error: float | None = None
    output: Literal["logits", "embedding"] = "logits"
    choice: Literal["kept", "merged"] = "kept"

    @property
    def passed(self) -> bool:
        """Whether there are no failures."""
        return not self.failures

    def __str__(self) -> str:
        verdict = "passed" if self.passed else "FAILED"
        title = f"parity {verdict}: {self.model}; {self.num_images} images, {self.dtype} on {self.device}"
        rows: list[tuple[str, ...]] = [
            (f"{self.output}, max error", f"{self.max_error:.2e}", f"{self.plain_max_error:.2e}"),
            (f"{self.output}, rms error", f"{self.rms_error:.2e}", f"{self.plain_rms_error:.2e}"),
        ]
        if self.output == "logits":
            rows.append(("top-1 agreement", f"{self.top1_agreement:.1%}", f"{self.plain_top1_agreement:.1%}"))
        if self.features_error is not None:
            what = "features, max error" if self.dtype == "float32" else "features, rms error"
            rows.append((what, f"{self.features_error:.2e}", f"{self.plain_features_error:.2e}"))
        for stage, overlap in enumerate(self.kept_overlap):
            clear = f"{self.kept_equal[stage]} of {self.kept_compared[stage]} clear sets equal"
            rows.append((f"{self.choice} tokens, stage {stage}", f"{overlap:.2%}, {clear}", ""))
        quantised = self.dtype == "int8"  # there is no plain PyTorch in it, and every node differs
        follow = "all follow from the file, to half a step" if quantised else "all follow from the file"
        rows.append(("weights", self.wrong_weight or follow, ""))
        if not quantised:
            rows.append(("first node that differs", self.first_difference or "none", ""))
        columns: tuple[str, ...] = ("against the reference in float32", ">engine", f">plain PyTorch, {self.dtype}")
        if quantised:
            columns, rows = columns[:2], [row[:2] for row in rows]
        return "\n".join([title, table(columns, rows), *(f"failed: {failure}" for failure in self.failures)])
