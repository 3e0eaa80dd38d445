"""Ray Train, once for all training stages: start the workers, the loop, share gradients, checkpoint, resume.

Every training loop of this package is a function of (seed, step): batches, dropout and sampling are keyed by both, and the learning rate
is computed from the step. So a run that was killed and resumed ends with the weights of an undisturbed one.
Checkpoints are safetensors and JSON; nothing is pickled.
"""

from __future__ import annotations

import json
import random
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from retrikt_ray.runtime.cluster import Workers, room
from retrikt_ray.runtime.folders import Folder
from retrikt_ray.runtime.progress import follow

T = TypeVar("T")
CHECKPOINT_S = 300  # at most so much work is lost with a node that vanishes unannounced
NOTICE_S = 2.0  # so often Ray is asked whether a node is about to be taken away
LEAVING_S = 15  # at most so much work is lost with one that is: Ray lets all go on until its time is up


def launch(
    loop: Callable[[dict[str, Any]], None], config: dict[str, Any], workers: Workers, scratch: Folder, name: str, label: str
) -> None:
    """Run `loop` on Ray Train workers and wait. `scratch` keeps its checkpoints: the same name resumes.

    Raises what the loop raised, after Ray's retries of lost workers.
    """
    import ray
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    filesystem, path = scratch.arrow()
    resources = {"CPU": workers.cpus} | ({"GPU": workers.gpus} if workers.gpus else {})
    count: Any = workers.count if workers.least is None else (workers.least, workers.count)
    with room(label, workers.cpus, workers.gpus, workers.fewest, workers.count), follow(label, "steps") as board:
        trainer = TorchTrainer(
            loop,
            train_loop_config=config | {"board": board, "threads": workers.threads},
            torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if workers.gpus else "gloo"),  # figures on the CPU are averaged, too
            scaling_config=ScalingConfig(num_workers=count, use_gpu=workers.gpus > 0, resources_per_worker=resources),
            run_config=RunConfig(
                name=name,
                storage_path=path,
                storage_filesystem=filesystem,
                failure_config=FailureConfig(max_failures=3),
                checkpoint_config=CheckpointConfig(num_to_keep=2),
            ),
        )
        interrupted = signal.getsignal(signal.SIGINT)
        try:
            trainer.fit()
        except ray.train.WorkerGroupError as error:
            first = next(iter(error.worker_failures.values()), error)
            cause = getattr(first, "cause", None) or first.__cause__ or first
            raise RuntimeError(f"{label} failed in a Ray Train worker: {type(cause).__name__}: {cause}") from error
        finally:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGINT, interrupted)  # Ray Train leaves its own there, which swallows Ctrl-C in all that follows


def seed_everything(*key: object) -> None:
    """Seed torch, numpy and random from a key such as (seed, step, rank)."""
    value = random.Random(":".join(map(str, key))).getrandbits(32)
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


def epoch_batches(count: int, batch: int, epochs: int, seed: int) -> Iterator[list[int]]:
    """Row numbers of every step: each epoch a new order that depends on (seed, epoch) alone; the last batch may be short."""
    for epoch in range(epochs):
        order = list(range(count))
        random.Random(f"{seed}:epoch:{epoch}").shuffle(order)
        for start in range(0, count, batch):
            yield order[start : start + batch]


def dealt(batch: list[int], workers: int) -> list[list[int]]:
    """A global batch by worker, one row after another."""
    return [batch[rank::workers] for rank in range(workers)]


class Batches(Protocol):
    """The global batches of a training."""

    def __len__(self) -> int: ...

    def parts(self, step: int, workers: int) -> list[list[int]]:
        """Row numbers of a step's batch by worker; together they do not depend on how many there are."""
        ...


class Steps(list[list[int]]):
    """Global batches that are known in advance, row numbers of one after another."""

    def parts(self, step: int, workers: int) -> list[list[int]]:
        return dealt(self[step], workers)


def warmup_linear(step: int, total: int, warmup: float = 0.1) -> float:
    """Learning-rate factor: linear up over the first `warmup` of the steps, then linear down to zero."""
    up = max(1, int(total * warmup))
    return (step + 1) / up if step < up else max(0.0, (total - step) / max(1, total - up))


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """State of an Adam-type optimizer as flat tensors on the CPU: `{i}.{name}`."""
    state = optimizer.state_dict()["state"]
    return {f"{i}.{k}": torch.as_tensor(v).to("cpu", copy=True) for i, entry in state.items() for k, v in entry.items()}


def load_optimizer_state(optimizer: torch.optim.Optimizer, flat: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in flat.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def run(
    session: Solo,
    batches: Batches,
    loss_of: Callable[[int, list[int]], tuple[Tensor, str]],
    after: Callable[[int], None] | None = None,
    together: bool = False,
) -> None:
    """Train over `batches` of row numbers, one update each, from where the session starts.

    loss_of(step, rows) gives the mean loss of this worker's rows of a batch and a note for the progress, with torch, numpy and random seeded by
    (seed, step, rank). after(steps): what is done between an update and its checkpoint; `steps` updates are done. together: loss_of gathers from
    all workers, so those without rows are asked, too.
    """
    for step in range(session.start, len(batches)):
        parts, note = batches.parts(step, session.world), ""
        rows = parts[session.rank]
        session.set_rate(step)
        seed_everything(session.seed, step, session.rank)
        if rows or together:  # a batch may have fewer rows than there are workers
            loss, note = loss_of(step, rows)
            loss.backward()
        session.update(len(rows) / sum(map(len, parts)))
        if after is not None:
            after(step + 1)
        session.done(step + 1, note)


class Solo:
    """A training that runs alone in this process, without checkpoints: small baselines. The face that `Session` has, too."""

    rank, world, start = 0, 1, 0

    def __init__(self, optimizer: torch.optim.Optimizer, total: int, seed: int) -> None:
        self.optimizer, self.total, self.seed = optimizer, total, seed
        self.base_rates = [group["lr"] for group in optimizer.param_groups]

    def share(self, rows: list[int]) -> list[int]:
        """This worker's part of a global batch."""
        return dealt(rows, self.world)[self.rank]

    def gather(self, sizes: list[int], *parts: Tensor) -> tuple[Tensor, ...]:
        """Tensors (n, k_i) of this worker's rows of a batch as (sum of sizes, k_i) of all workers' rows, in the order of the workers.

        sizes: rows of the batch by worker. Only this worker's rows have gradients: a loss over all rows gives each worker its own rows' part of the gradient, and the sum over the
        workers is the gradient that one worker would have. float32; a collective.
        """
        if self.world == 1:
            return parts
        widths = [p.shape[1] for p in parts]
        own = torch.cat([p.float() for p in parts], 1)
        padded = own.new_zeros(max(sizes), sum(widths))
        padded[: len(own)] = own.detach()
        found = [torch.empty_like(padded) for _ in range(self.world)]
        dist.all_gather(found, padded)
        rows = [part[:size] for part, size in zip(found, sizes, strict=True)]
        rows[self.rank] = own
        return torch.cat(rows).split(widths, 1)

    def gather_rows(self, rows: list[T], count: int) -> list[T]:
        """This worker's rows of a batch of `count`, as those of all workers, in the order before `share` cut them. A collective."""
        if self.world == 1:
            return rows
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, rows)
        return [found[i % self.world][i // self.world] for i in range(count)]

    def sum(self, value: Tensor) -> Tensor:
        """Sum of a tensor over the workers. A collective."""
        if self.world > 1:
            value = value.clone()
            dist.all_reduce(value)
        return value

    def set_rate(self, step: int) -> None:
        for group, rate in zip(self.optimizer.param_groups, self.base_rates, strict=True):
            group["lr"] = rate * warmup_linear(step, self.total)

    def update(self, weight: float = 1.0, clip: float = 1.0) -> None:
        """Average the gradients over the workers, clip, and update. weight: this worker's share of the global batch's rows."""
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        if self.world > 1:
            for p in params:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad.mul_(weight)
                dist.all_reduce(p.grad)
        torch.nn.utils.clip_grad_norm_(params, clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def done(self, step: int, note: str = "") -> None:
        """`step` steps are done."""


class Session(Solo):
    """A training loop inside a Ray Train worker."""

    def __init__(self, config: dict[str, Any], optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], total: int) -> None:
        """tensors: everything that a checkpoint holds beside the optimizer, by name; restored in place."""
        import ray.train

        super().__init__(optimizer, total, config["seed"])
        torch.set_num_threads(config["threads"])
        context = ray.train.get_context()
        self.rank, self.world = context.get_world_rank(), context.get_world_size()
        self.board, self.tensors = config["board"], tensors
        self.every = max(1, total // 8)
        self.saved = self.asked = time.monotonic()
        self.leaving: set[str] = set()  # nodes that are known to be taken away
        self.notes: dict[str, Any] = {}
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is not None:
            with checkpoint.as_directory() as folder:
                self._restore(Path(folder))

    def _restore(self, folder: Path) -> None:
        saved = load_file(folder / "tensors.safetensors")
        with torch.no_grad():
            for name, tensor in self.tensors.items():
                tensor.copy_(saved[name])
        load_optimizer_state(self.optimizer, load_file(folder / "optimizer.safetensors"))
        state = json.loads((folder / "state.json").read_text())
        self.start, self.notes = state["step"], state["notes"]

    def done(self, step: int, note: str = "") -> None:
        """Tell the driver that `step` steps are done; checkpoint every eighth of the way, every five minutes, and as a node is about to go."""
        if self.rank == 0:
            self.board.post.remote(step, self.total, note)
        if step % self.every == 0 or step == self.total or self.due():
            self.save(step)
            self.saved = time.monotonic()

    def due(self) -> bool:
        """Whether a checkpoint is due between two eighths. By the first worker's clock: all of them save, or none. A collective."""
        now = time.monotonic()
        flags = torch.tensor([now - self.saved, now - self.asked])
        if self.world > 1:
            dist.broadcast(flags, 0)
        unsaved, unasked = flags.tolist()
        if unasked > NOTICE_S:
            self.asked = now
            if self.announced():
                return True
        return bool(unsaved > (LEAVING_S if self.leaving else CHECKPOINT_S))

    def announced(self) -> bool:
        """Whether Ray says for the first time that the node of a worker is being drained, as of spot instances that are reclaimed. A collective."""
        import ray.train

        info = ray.train.get_preemption_info()
        new = set(info.preempted_node_ids) - self.leaving if info else set()
        self.leaving |= new
        return bool(new)

    def save(self, step: int) -> None:
        import ray.train

        if self.rank:
            ray.train.report({"step": step})
            return
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            save_file({k: v.detach().contiguous().cpu() for k, v in self.tensors.items()}, folder / "tensors.safetensors")
            save_file({k: v.contiguous() for k, v in optimizer_state(self.optimizer).items()}, folder / "optimizer.safetensors")
            (folder / "state.json").write_text(json.dumps({"step": step, "notes": self.notes}))
            ray.train.report({"step": step}, checkpoint=ray.train.Checkpoint.from_directory(name))
