"""The interface between the training engine and what it trains."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, cast

from PIL import Image
from torch import Tensor, nn

from fastmum.config.schema import ConfigError, EngineConfig, OptimSection
from fastmum.engine.distributed import DistContext


class Metric(NamedTuple):
    """A mean that a task reports, reduced as a sum and a count over micro-batches and processes.

    With a `size` there are several sums: `loss` with the `index_name` views is reported as `loss`, the mean over all,
    and `loss/views_<i>`.
    """

    size: int = 0
    index_name: str = ""


class StepOutput(NamedTuple):
    """Loss of a micro-batch, as a sum and its weight, so that accumulation and data parallelism are exact.

    Args:
        loss_sum: 0-d, differentiable: the sum of all terms. The loss of a step is the sum over its micro-batches on
            all processes, divided by the sum of their weights.
        weight: number of terms in the sum (pixels, frames, ...): a float, or 0-d on the device.
        step_weight: total weight of the step if it is known beforehand, which saves a pass over the gradients.
        metrics: sum and count of each of the task's `metrics`, (size,) or 0-d each, detached.
    """

    loss_sum: Tensor
    weight: Tensor | float
    step_weight: float | None = None
    metrics: Mapping[str, tuple[Tensor, Tensor]] = {}


@dataclass
class ParamGroup:
    """Parameters that share settings. Every trainable parameter is in exactly one group, frozen ones are in none."""

    parameters: list[nn.Parameter]  # in the order of the forward pass
    name: str = "all"  # in the log: `grad_norm/<name>`, if there are several groups
    lr_scale: float = 1.0
    weight_decay: float = 0.0
    decay_vectors: bool = False  # whether biases, norms and other 1-D parameters decay, too
    clip: float | None = None  # largest norm of the group's gradient,
    clip_all: bool = False  # or of that of all groups together


def default_groups(model: nn.Module, optim: OptimSection) -> list[ParamGroup]:
    """All trainable parameters in one group."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [ParamGroup(parameters, weight_decay=optim.weight_decay, clip=optim.clip)]


FUSED = {"qkv": 3, "kv": 2}  # projections that hold several matrices, one below the other


def matrices_of(blocks: Iterable[nn.Module]) -> dict[nn.Parameter, int]:
    """The trained weights of linear layers, and the number of matrices in each, as `FUSED` says by the layer's name."""
    named = [each for block in blocks for each in block.named_modules() if isinstance(each[1], nn.Linear)]
    weights = ((name, cast(nn.Parameter, linear.weight)) for name, linear in named)
    return {weight: FUSED.get(name.rpartition(".")[2], 1) for name, weight in weights if weight.requires_grad}


@dataclass
class Samples:
    """Size of a step."""

    micro_batch: int  # samples that a device computes at once
    step: int | None  # samples of a step over all devices; None: one micro-batch per device, or as in the resumed run
    unit: str = "samples"  # as in `frames_per_s`
    keys: tuple[str, str] = ("data.batch", "data.batch_per_step")  # of `micro_batch` and `step` in the configuration


class Task(ABC):
    """What is trained: model, data and loss. Subclasses override what they need; `fastmum.tasks` lists them.

    All processes of a run construct the task and call its methods in the same order.

    Attributes:
        Config: class of the configuration.
        metrics: what `loss` reports. `loss` itself is always reported, by default as the mean of the step's losses.
        samples: size of a step.
        batches_per_step: micro-batches per step on this process, set before `open_data`.
    """

    Config: ClassVar[type[EngineConfig]] = EngineConfig
    metrics: Mapping[str, Metric] = {"loss": Metric()}
    samples: Samples

    def __init__(self, config: Any, world: DistContext) -> None:
        self.config, self.world = config, world
        self.batches_per_step = 1
        self.stopping: Callable[[], bool] = lambda: False  # whether a stop signal has arrived: long waits for data end

    @abstractmethod
    def build(self) -> nn.Module:
        """The model on `world.device`, in float32. Frozen parts have `requires_grad=False` and are in `eval()`.

        Checkpoints do not contain frozen weights: a resumed run builds them again, so they must be the same.
        """

    def blocks(self, model: Any) -> list[nn.Module]:
        """Modules whose matrices FSDP gathers one after another."""
        return []

    def exact(self, model: Any) -> list[nn.Module]:
        """Modules that compute in float32, with autocast off: their matrices are neither split nor cast."""
        return []

    def groups(self, model: Any) -> list[ParamGroup]:
        """Parameter groups; the default is one group with the settings of `optim`."""
        return default_groups(model, self.config.optim)

    def matrices(self, model: Any) -> dict[nn.Parameter, int]:
        """Weights that Muon orthogonalises (`matrices_of` the blocks). All need a gradient at every step."""
        return matrices_of(self.blocks(model))

    def buffers(self, model: Any) -> dict[str, Tensor]:
        """Buffers that training changes (statistics of batch norm, ...): saved, and restored after skipped steps.

        After each step they are averaged over all processes.
        """
        return {}

    def manifest(self) -> dict[str, Any]:
        """JSON that a checkpoint must agree with to be resumed: sizes of the model."""
        return {}

    def compile(self, model: Any, steps: int) -> None:
        """Compile the model in place; `steps` are still to be done. The default refuses CUDA graphs (ConfigError)."""
        if self.config.train.cuda_graphs:
            raise ConfigError(f"train.cuda_graphs is true, but the task '{self.config.run.task}' records none")

    def open_data(self, folder: Path, start: int, samples_per_step: int) -> None:  # noqa: B027
        """Open the data sets after `start` steps, in the first process first; may write files into the run's folder."""

    def data_digests(self) -> dict[str, str]:
        """Digests of the open data sets by name, which must be the same in all processes."""
        return {}

    def prepare(self) -> None:  # noqa: B027
        """Read what is used again and again (held-out batches); called by all processes after `open_data`."""

    @abstractmethod
    def batches(self, start: int, stop: int) -> Iterator[Any]:
        """`batches_per_step` micro-batches for every step in [start, stop), counted from 0: pytrees of tensors.

        A pure function of (seed, step, rank, world size): resuming needs no other state. A FastmumError ends the run
        after all processes have saved; so does a StoppedError if a batch is late and `stopping` is true.
        """

    @abstractmethod
    def loss(self, model: Any, batch: Any) -> StepOutput:
        """Forward pass of a micro-batch on the device, under autocast. Must not wait for the device."""

    def sizes(self, batch: Any) -> tuple[int, float]:
        """Samples of a micro-batch and its model FLOPs, forward and backward, without looking at the device."""
        return self.samples.micro_batch, 0.0

    def tokens(self, samples: int) -> float:
        """Tokens in a number of samples; 0 if the task has none."""
        return 0.0

    @property
    def evaluates(self) -> bool:
        """Whether there is data to evaluate on."""
        return False

    def evaluate(self, model: Any) -> dict[str, float]:
        """Metrics on held-out data, reduced over all processes; called under autocast, like `loss`."""
        return {}

    def pictures(self, model: Any, step: int) -> dict[str, Image.Image]:
        """Pictures by name after `step` steps; all processes call it, the first one writes them."""
        return {}

    def tally(self) -> Tensor | None:
        """Counts of this process, float64 on the CPU, to be summed over processes in every step; None: there are none.

        They are of one shape on all processes.
        """
        return None

    def pool(self, total: Tensor) -> None:  # noqa: B027
        """Take the sum of the `tally` of all processes, one step late."""

    def counters(self) -> dict[str, float | None]:
        """More numbers for a log line, such as bad frames."""
        return {}

    def describe_steps(self, steps: range) -> str:
        """The data of these steps, counted from 0, for the message about non-finite steps."""
        return ""

    def summary(self, values: Mapping[str, float | None]) -> str:
        """One line at the end of a run from its last log line."""
        return "loss none" if values.get("loss") is None else f"loss {values['loss']:.4g}"

    def close(self) -> None:  # noqa: B027
        """Release threads and files."""
