"""What came out of a conversion, as a record and in words."""

import dataclasses

from dydit_jax.diffusion.process import Flow
from dydit_jax.models.cost import format_count


@dataclasses.dataclass(frozen=True)
class Report:
    """What came out of a conversion; also written as JSON.

    Attributes:
      source, out: files.
      kind: "dit" or "autoencoder".
      tensors: number of source tensors, each used exactly once.
      parameters: numbers in them, the position table included.
      dtypes: of the source.
      checksum: SHA-256 of the converted weights.
      config: of a DiT, as a dict; None for an autoencoder.
      process: of a DiT, by name; None for an autoencoder.
      sources: where the value of each field comes from that the tensors leave open.
      doubts: what is guessed, a sentence each: look at them.
      macs: of one image and pass with every gate open; None for an autoencoder.
      largest_difference: to PyTorch, relative to the output's scale; None if not verified.
      seconds: that it took.
    """

    source: str
    out: str
    kind: str
    tensors: int
    parameters: int
    dtypes: list
    checksum: str
    config: dict | None
    process: str | None
    sources: dict
    doubts: list
    macs: int | None
    largest_difference: float | None
    seconds: float

    def in_words(self) -> str:
        """Return the report as a sentence or two."""
        what = "autoencoder" if self.config is None else _in_words(self.config, self.process)
        cost = "" if self.macs is None else f" {format_count(self.macs)} MACs per image and pass with every gate open."
        difference = (
            ""
            if self.largest_difference is None
            else f" Largest difference to PyTorch: {self.largest_difference:.1e} of the output's scale."
        )
        doubts = f" Not certain: {'; '.join(self.doubts)}." if self.doubts else ""
        return (
            f"{self.source}: {what}, {self.parameters:,} parameters in {self.tensors} tensors "
            f"({', '.join(self.dtypes)}), each used once.{cost}{difference}{doubts} Wrote {self.out}, SHA-256 "
            f"{self.checksum}, in {self.seconds:.0f} s."
        )


def _in_words(config: dict, process: str) -> str:
    kind = "SiT" if process == Flow.name else "DiT"
    kind = f"static {kind}" if config["routers"] == "none" else f"Dy{kind} with routers {config['routers']!r}"
    side, channels = config["side"], config["channels"]
    return (
        f"{kind}, process {process}, depth {config['depth']}, width {config['width']}, {config['heads']} heads, patch "
        f"{config['patch']}, input {side} x {side} x {channels}, {config['classes']} classes"
    )
