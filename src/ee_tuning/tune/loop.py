"""A tuning run from its settings to saved exits."""

from __future__ import annotations

import dataclasses
import math
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType

import torch
import yaml
from torch import nn

from ee_tuning.adapter import checkpoints, save, stored
from ee_tuning.config import TuneConfig
from ee_tuning.data import SampleOrder, micro_batches
from ee_tuning.devices import GIB, check_precisions, pick_device, pick_dtype, versions
from ee_tuning.errors import Interrupted, UserError, all_checked
from ee_tuning.exit_config import DRAFT, exit_name
from ee_tuning.files import write_text
from ee_tuning.folders import REPLACED, UNFINISHED, Output, claim, sole_writer
from ee_tuning.model import Network
from ee_tuning.parallel.data import deal, deal_batches, without_labels
from ee_tuning.parallel.mesh import Mesh, restarts
from ee_tuning.parallel.trace import save_timeline
from ee_tuning.plan.advice import refuse_if_too_large
from ee_tuning.plan.check import check, check_dtype, check_model
from ee_tuning.plan.memory import largest_parts
from ee_tuning.plan.shapes import account_of, shapes_of
from ee_tuning.tune.checkpoint import load_checkpoint, save_checkpoint
from ee_tuning.tune.drafts import measure_drafts
from ee_tuning.tune.fitted import fit, fitted_to, tokens_to_fit
from ee_tuning.tune.metrics import Display, MetricsLog, NoLog, OnTheWay, Speed
from ee_tuning.tune.optimizers import learning_rate, loss_weights, set_learning_rate
from ee_tuning.tune.setup import SetUp, digest, set_up
from ee_tuning.tune.step import Batch, Step
from ee_tuning.tune.timing import own_stage


def _nothing(done: int) -> None:
    """What `tune` calls by default."""


def tune(
    config: TuneConfig,
    display: Display | None = None,
    *,
    on_step: Callable[[int], None] = _nothing,
    on_checkpoint: Callable[[int], None] = _nothing,
) -> Network:
    """Tune exits as `config` says and save them to ``config.out``.

    display: what the main process shows. on_step: called on every process with the number of steps
    done, after each. on_checkpoint: the same, when this process's part of a checkpoint is written
    and the checkpoint not yet in its place.

    Raises:
        UserError: a setting that cannot work, or a loss that is not finite.
        Interrupted: after a first Ctrl-C or SIGTERM, once a checkpoint is written.
        ProcessFailed: one of several processes failed.

    Restarted by torchrun, a run goes on from its last checkpoint.
    """
    check(config)
    config = _going_on(config)
    mesh = Mesh(config.dp, config.tp, config.pp)
    device = pick_device(config.device)
    with mesh.connected(device, config.timeout), ExitStack() as held:
        mesh.check_same("settings", digest(dataclasses.asdict(config)))
        reads = config.exits, config.model
        out = mesh.on_main(lambda: claim(config.out, config.overwrite, config.resume, reads))
        mesh.on_main(lambda: held.enter_context(sole_writer(out.folder)))
        shown = display if display and mesh.is_main else Display()
        shapes = mesh.on_all(lambda: shapes_of(config))
        with _largest_parts_named(shapes, config, mesh, out):
            dtype = pick_dtype(config.precision, device)
            _check_all(shapes, config, mesh, device, dtype)
            said = list[str]()  # told when nothing is left that could be a mistake
            stage = own_stage(shapes, config, mesh, device, dtype, said.append)
            made = set_up(config, mesh, device, dtype, stage, said.append)
            run = Run(config, out, mesh, made, shown, on_step, on_checkpoint)
            with out.left_alone_by_failure(keep=mesh.size > 1):  # torchrun may start it again
                first = run.resumed() if config.resume else 0
                all_checked()
                for text in said:
                    shown.say(text)
                run.go(first)
    return made.tuner.model


def _going_on(config: TuneConfig) -> TuneConfig:
    """`config`, but going on with what this run saved if torchrun has started it again.

    A run that was cut off before it could take the place of an earlier one begins again.
    """
    folder = Path(config.out)
    cut_off = (folder / UNFINISHED / "run.yaml").is_file()
    if not restarts() and not (config.resume and cut_off):
        return config
    own = not cut_off and (not config.overwrite or (folder / REPLACED).exists())
    return dataclasses.replace(config, resume=own, overwrite=not own)


def _check_all(
    shapes: Network,
    config: TuneConfig,
    mesh: Mesh,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Refuse what cannot work with this device or backbone, before weights are read."""
    check_precisions(config, device)
    check_dtype(config, dtype)
    mesh.on_all(lambda: check_model(shapes, config))
    if device.type == "cuda" and config.dp == config.tp == 1:
        refuse_if_too_large(shapes, config, torch.cuda.mem_get_info(device)[0] / GIB)


@contextmanager
def _largest_parts_named(
    shapes: Network, config: TuneConfig, mesh: Mesh, out: Output
) -> Iterator[None]:
    """Say what takes the memory when there is none left, and what is not lost."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        saved = checkpoints(out.path / "checkpoints")
        kept = f"{saved[-1]} is good, go on with --resume" if saved else "nothing was saved yet"
        raise UserError(
            f"out of memory at {mesh.doing}: {kept}; the largest parts are "
            f"{largest_parts(account_of(shapes, config), config)}; see ee-tuning plan"
        ) from error


class Run:
    """The steps of one tuning run, from its first or its last checkpoint's to its end."""

    def __init__(
        self,
        config: TuneConfig,
        out: Output,
        mesh: Mesh,
        made: SetUp,
        display: Display,
        on_step: Callable[[int], None] = _nothing,
        on_checkpoint: Callable[[int], None] = _nothing,
    ) -> None:
        """See `tune`."""
        self.config, self.out, self.mesh, self.made = config, out, mesh, made
        self.display, self.speed = display, Speed()
        self.on_step, self.on_checkpoint = on_step, on_checkpoint
        self.tuner, self.model = made.tuner, made.tuner.model
        self.layers, self.contents = self.model.all_exit_layers, made.contents()
        self.order = SampleOrder(made.train, config.global_batch_size, config.seed, config.steps)
        self.log: MetricsLog | NoLog = NoLog()
        self.unread: tuple[int, OnTheWay] | None = None  # the last step's losses and norms
        self.stopping = False  # every process knows that one of them was asked to stop

    @property
    def checkpoints(self) -> Path:
        """Where this run's are."""
        return self.out.path / "checkpoints"

    def go(self, first: int) -> None:
        """Every step from `first`, counted from 0, to the end."""
        config = self.config
        if not first:
            self._fit()
        self.mesh.on_main(lambda: self._begin(first))
        log = self.log
        validated = self.mesh.on_main(lambda: log.validations)
        before = validated.get(0) or self.validate(log, 0)
        self._check_before(before)
        timeline, self.speed = self.made.pipeline.timeline, Speed()
        with self.display.running(first, config.steps), stop_requests(self.mesh.size) as stopped:
            for step in range(first, config.steps):
                self.mesh.doing = f"step {step + 1}"
                traced = config.trace and step == first + 1
                if traced:  # stages may be at different steps
                    self.mesh.barrier()
                timeline.on = traced
                self.step(step, log, stopped())
                timeline.on = False
                done = step + 1
                self.on_step(done)
                last = done == config.steps
                evaluates = not last and config.eval_every and done % config.eval_every == 0
                saves = last or (config.save_every and done % config.save_every == 0)
                if evaluates or saves or self.stopping:
                    self._report(log)
                if evaluates:
                    self.validate(log, done)
                if saves or self.stopping:
                    self._save(done, log)
                if self.stopping and not last:
                    raise Interrupted(f"stopped after step {done}; go on with --resume")
        after = validated.get(config.steps) or self.validate(log, config.steps)
        if config.trace and config.steps > first + 1:
            idle = save_timeline(timeline, self.mesh, self.out.path)
            self.display.say(
                f"second step: {idle:.0%} idle, drawn in {self.out.path / 'trace.png'}"
            )
        if self.mesh.is_main:
            state = stored(checkpoints(self.checkpoints)[-1])
            save(self.model, self.out.path, self.model.dtype, state)
            self.out.finish()
        log.close()
        self.display.result(before, after)

    def resumed(self) -> int:
        """The steps that are done: those of the last checkpoint, which is put into place."""
        saved = self.mesh.on_main(lambda: checkpoints(self.checkpoints))
        if not saved:
            self.display.say(
                f"{self.out.folder} holds no checkpoint yet: the run starts at its first step"
            )
            return 0
        given = saved[-1], self.model, self.tuner.optimizers, self.config, self.contents
        first, steps = self.mesh.on_all(lambda: load_checkpoint(*given))
        if steps != self.config.steps:
            self.display.say(
                f"{self.config.steps} steps in place of {steps}: from step {first + 1} on the "
                f"learning rate is that of a run of {self.config.steps}"
            )
        return first

    def _fit(self) -> None:
        """Give new exits the start that is wanted, from no more data than the run is tuned on."""
        config, train = self.config, self.made.train
        if config.exits or config.start != "fitted":
            return
        most = config.steps * config.global_batch_size
        rows = train.count(min(most, max(1, tokens_to_fit(self.model) // config.seq_length)))
        batches = list(micro_batches(train, range(rows), config.micro_batch_size))
        self.mesh.doing = "fitting the exits"
        started = time.perf_counter()
        # By default a `layer` exit begins as a copy: see docs/tuning.md.
        fit(self.tuner, deal_batches(batches, self.mesh), "layer" if config.init == "auto" else "")
        took = time.perf_counter() - started
        self.display.say(fitted_to(self.model, rows * config.seq_length, took))

    def step(self, step: int, log: MetricsLog | NoLog, stop: bool) -> None:
        """One optimizer step, counted from 0. stop: this process was asked to stop."""
        config = self.config
        for optimizer in self.tuner.optimizers.values():
            set_learning_rate(optimizer, learning_rate(config, step))
        weights = loss_weights(config, self.layers, step)
        found = self.tuner.step(self._micro_batches(step), weights)
        self._report(log)
        self.unread = step, OnTheWay(self._numbers(found, stop))
        self.speed.add(config.global_batch_size * config.seq_length)
        self.display.advance(step + 1, self.speed())

    def _numbers(self, found: Step, stop: bool) -> torch.Tensor:
        """This process's terms of the run's: each exit's loss, its norm, and stop requests."""
        mesh, none = self.mesh, torch.zeros((), device=self.tuner.device)
        losses = found.losses if mesh.tp_rank == 0 else {}
        norms = found.norms if mesh.tp_rank == mesh.dp_rank == 0 else {}
        values = [by.get(layer, none) for by in (losses, norms) for layer in self.layers]
        return torch.stack([*values, none + stop])

    def _report(self, log: MetricsLog | NoLog) -> None:
        """Check, and now and then show and record, the losses that have not been read yet.

        They are read one step late, and before anything is saved, so that the host never waits
        for the step that is under way, nor a stage for the next one's end of it.
        """
        if self.unread is None:
            return
        (step, values), self.unread = self.unread, None
        *numbers, stops = self.mesh.sum_on_host(values.read())
        self.stopping = self.stopping or stops > 0
        losses = dict(zip(self.layers, numbers, strict=False))
        norms = dict(zip(self.layers, numbers[len(self.layers) :], strict=True))
        self._check_finite(step, losses, norms)
        config, done = self.config, step + 1
        if done % config.log_every == 0 or done == config.steps:
            self.display.losses(done, self.speed(), losses)
            log.write(
                done, lr=learning_rate(config, step), loss=losses, grad_norm=norms,
                tokens=done * config.global_batch_size * config.seq_length,
                tokens_per_second=round(self.speed(), 1),
            )  # fmt: skip

    def _micro_batches(self, step: int) -> list[Batch]:
        config, indices = self.config, deal(self.order.indices(step), self.mesh)
        batches = list(micro_batches(self.made.train, indices, config.micro_batch_size))
        most = math.ceil(config.global_batch_size / self.mesh.dp / config.micro_batch_size)
        if config.shard_backbone and len(batches) < most:
            batches.append(without_labels(batches[0]))
        return batches

    def _check_before(self, losses: dict[int, float]) -> None:
        """Refuse weights that give no loss before they are changed."""
        for layer, loss in losses.items():
            if not math.isfinite(loss):
                raise UserError(
                    f"the loss of exit {exit_name(layer)} is {loss} before the first step: "
                    f"{_without_numbers(self.model) or 'the data or the precision are at fault'}"
                )

    def _check_finite(self, step: int, losses: dict[int, float], norms: dict[int, float]) -> None:
        for layer in self.layers:
            if not math.isfinite(losses[layer] + norms[layer]):
                advice = _without_numbers(self.model.model) or "try a lower --lr"
                raise UserError(
                    f"the loss of exit {exit_name(layer)} is {losses[layer]} with gradient norm "
                    f"{norms[layer]} at step {step + 1}: stopped before it could be saved, "
                    f"checkpoints in {self.checkpoints} are good; {advice}"
                )

    def validate(self, log: MetricsLog | NoLog, step: int) -> dict[int, float]:
        """Held-out loss per exit, recorded at `step`."""
        size = self.config.micro_batch_size
        rows = self.made.valid.count(self.config.eval_batches * size)
        batches = deal_batches(list(micro_batches(self.made.valid, range(rows), size)), self.mesh)
        losses = self.tuner.mean_losses(batches)
        log.write(step, valid_loss=losses)
        text = "  ".join(f"exit {exit_name(layer)} {loss:.3f}" for layer, loss in losses.items())
        self.display.say(f"held-out loss at step {step}: {text}")
        if DRAFT in self.layers:
            found = measure_drafts(self.tuner, batches, self.config.draft_steps)
            log.write(step, draft_loss=found.loss, draft_agreement=found.agreement)
            text = "  ".join(f"{share:.1%}" for share in found.agreement.values())
            self.display.say(
                f"drafts that agree with the final exit, the first of a chain on: {text}"
            )
        return losses

    def _begin(self, first: int) -> None:
        """Everything is there and was checked: the run's files begin, or go on at step `first`."""
        self.out.begin()
        if first < self.config.steps:  # else no step is of these settings
            write_text(self.out.path / "run.yaml", describe_run(self.config))
        self.log = MetricsLog(self.out, self.config.log_to, first)

    def _save(self, step: int, log: MetricsLog | NoLog) -> None:
        """Write a checkpoint; with the first one the run takes the place of an earlier one."""
        given = self.model, self.tuner.optimizers, self.config, self.contents, self.mesh
        save_checkpoint(self.checkpoints, step, *given, on_written=self.on_checkpoint)
        if self.out.replaces:
            log.let_go()
            self.mesh.on_main(self.out.take_place)
            self.out.replaces = False  # in every process


def _without_numbers(module: nn.Module) -> str:
    """What to say of the first parameter with infinite values or none; empty if all are good."""
    for name, p in module.named_parameters():
        if p.is_floating_point() and not p.detach().float().isfinite().all():
            return f"{name} has values that are no numbers, fetch or make these weights again"
    return ""


@contextmanager
def stop_requests(processes: int) -> Iterator[Callable[[], bool]]:
    """Turns a first Ctrl-C or SIGTERM into a request, read by calling what this gives.

    A second one stops at once. Outside of the main thread, which alone is told of signals, they are
    left to it.

    processes: that run together, which torchrun ends with SIGTERM when one of them has failed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    asked: list[int] = []

    def ask(number: int, frame: FrameType | None) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    except Exception:
        if processes > 1:  # torchrun's signal must not come before the line on what went wrong
            del before[signal.SIGTERM]
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def describe_run(config: TuneConfig) -> str:
    """``run.yaml``: every setting as resolved; versions and command as comments."""
    lines = [
        f"# {versions()}",
        f"# {shlex.join(sys.argv)}",
    ]
    values = dataclasses.asdict(config) | {"resume": False, "overwrite": False}
    return "\n".join(lines) + "\n" + yaml.safe_dump(values, sort_keys=False)
