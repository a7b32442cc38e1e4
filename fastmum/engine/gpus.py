"""Published dense peak FLOP/s of GPUs, by the name that the driver reports; GPUs of the paper's runs."""

import re
from typing import NamedTuple


class Peak(NamedTuple):
    """Dense matrix products in TFLOP/s, accumulated in float32; fp32 uses no tensor cores. Sparse rates are halved."""

    bf16: float
    tf32: float
    fp32: float
    fp8: float | None
    source: str


_A100 = Peak(312, 156, 19.5, None, "NVIDIA A100 Tensor Core GPU datasheet")
_H100 = Peak(989.4, 494.7, 66.9, 1978.9, "NVIDIA H100 Tensor Core GPU Architecture, v1.04, table 2 (SXM5)")
_HOPPER_NVL = Peak(835.5, 417.5, 60, 1670.5, "NVIDIA H100 NVL and H200 NVL datasheets, halved")

PEAKS: dict[str, Peak] = {
    "a10": Peak(125, 62.5, 31.2, None, "NVIDIA A10 datasheet"),
    "a30": Peak(165, 82, 10.3, None, "NVIDIA A30 datasheet"),
    "a40": Peak(149.7, 74.8, 37.4, None, "NVIDIA A40 datasheet"),
    # SXM and PCIe boards have the same peaks; the A800 differs in its links only.
    **dict.fromkeys(("a100", "a100 pcie", "a800", "a800 pcie"), _A100),
    "b200": Peak(2250, 1125, 75, 4500, "NVIDIA HGX B200 datasheet, an eighth of a board, halved"),
    "gb200": Peak(2500, 1250, 80, 5000, "NVIDIA GB200 NVL72 datasheet, a 72nd of a rack, halved"),
    **dict.fromkeys(("gh200", "h100", "h200", "h800"), _H100),
    **dict.fromkeys(("h100 nvl", "h200 nvl"), _HOPPER_NVL),
    "h100 pcie": Peak(756, 378, 51.2, 1513, "NVIDIA H100 Tensor Core GPU Architecture, v1.04, table 2 (PCIe)"),
    "l4": Peak(121, 60, 30.3, 242.5, "NVIDIA L4 datasheet, halved"),
    "l40": Peak(181.05, 90.5, 90.5, 362, "NVIDIA L40 datasheet"),
    "l40s": Peak(362.05, 183, 91.6, 733, "NVIDIA L40S datasheet"),
    "rtx 3090": Peak(71, 35.6, 35.6, None, "NVIDIA Ampere GA102 GPU Architecture, appendix"),
    "rtx 4090": Peak(165.2, 82.6, 82.6, 330.3, "NVIDIA Ada GPU Architecture, v2, appendix A"),
    "rtx 5090": Peak(209.5, 104.8, 104.8, 419, "NVIDIA RTX Blackwell GPU Architecture, appendix A"),
    "rtx 6000 ada generation": Peak(364.2, 182.1, 91.1, 728.5, "NVIDIA Ada GPU Architecture, v2, appendix"),
    "rtx a6000": Peak(154.8, 77.4, 38.7, None, "NVIDIA Ampere GA102 GPU Architecture, appendix"),
}

# Words that do not change the speed: makers, memory, the socket of the default boards.
_IGNORED = re.compile(r"nvidia|tesla|geforce|\d+gb?|hbm\d\w*|sxm\d?")


def peak_flops(name: str, precision: str) -> float | None:
    """Peak FLOP/s of dense products in bf16, tf32, fp32 or fp8, by the name from `torch.cuda.get_device_name`.

    None for devices that are not in the table, such as MIG partitions and laptop versions.
    """
    words = [word for word in re.split(r"[\s-]+", name.lower()) if word and not _IGNORED.fullmatch(word)]
    peak = PEAKS.get(" ".join(words))
    rate = getattr(peak, precision) if peak else None
    return rate and rate * 1e12


SOURCE = "MuM, supplement, Table 12"


class PaperRun(NamedTuple):
    """A pretraining run of the paper."""

    name: str
    gpus: int
    gpu: str
    days: float

    @property
    def gpu_hours(self) -> float:
        return self.gpus * self.days * 24


# A footnote gives 66 A100 days for the lighter run; its columns, 32 GPUs and 3 days, make 96.
PAPER_RUNS = (PaperRun("MuM", 64, "A100", 3), PaperRun("MuM, lighter", 32, "A100", 3))
