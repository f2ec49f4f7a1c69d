"""The loop: what stays in Python while the devices work."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable
from typing import Any

import torch

from gemma_xla import interrupts
from gemma_xla.checkpoint import CheckpointReader, Saver, complete
from gemma_xla.data.loader import TrainLoader, merge_states
from gemma_xla.errors import TrainingError
from gemma_xla.flops import num_parameters
from gemma_xla.train.build import adapted, build_model, initial, stored, trained
from gemma_xla.train.checks import DiskWatch
from gemma_xla.train.compilations import CompilationWatch
from gemma_xla.train.evaluation import Evaluator, SampleLog, best, is_stale
from gemma_xla.train.metrics import Meter, MetricsLog, summary
from gemma_xla.train.optimizer import MOMENTS, build_optimizer, learning_rate_fraction
from gemma_xla.train.peers import is_lost
from gemma_xla.train.resume import restore_optimizer
from gemma_xla.train.run import Run
from gemma_xla.train.spikes import note_spikes
from gemma_xla.train.step import Batch, make_step


class Trainer:
    """Takes a run from its first step, or its newest checkpoint, to its last step."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.config = run.config
        self.backend = run.backend
        self.watchdog = run.watchdog
        with self.watchdog.during("building the model" if run.newest is None else "bringing the checkpoint back"):
            self._prepare()

    def _prepare(self) -> None:
        run = self.run
        self.rows = run.micro_batch_rows * self.config.train.grad_accum
        self.train_loader = TrainLoader(run.corpus, run.tokenizer, num_rows=self.rows, rows=self._share(self.rows))
        self.meter = Meter(run.flops, run.chip, run.num_chips, self.rows * self.config.data.seq_len)
        self.step = 0
        if run.newest:
            # Before the model takes its time: it refuses other data.
            self.train_loader.load_state_dict(run.newest.state["data"])
        self._build()
        counts = run.flops.num_trainable_parameters, num_parameters(run.model_config)
        self.disk = DiskWatch(run.config, *counts, run.folder)
        run.open_folder()

    def fit(self) -> dict[str, float]:
        """Train to the end, evaluate, save; return the run's summary.

        Raises:
            Interrupted: Ctrl-C or SIGTERM came; the step that was under way is done and saved.
            TrainingError: the loss is no longer a number, or the last checkpoint could not be written.
        """
        with self.watchdog.during("beginning"):
            return self._fit()

    def _fit(self) -> dict[str, float]:
        section = self.config.checkpoint
        self.log = MetricsLog(
            self.run.folder.metrics,
            self.run.accelerator,
            total=self.config.train.steps,
            start=self.step,
            enabled=self.run.is_main,
            heartbeat=self.config.watch.heartbeat,
        )
        self.watchdog.say = self.log.say
        self.saver = Saver(
            self.run.folder.checkpoints,
            self.backend,
            keep_last=section.keep_last,
            keep_every=section.keep_every,
            say=self.log.say,
        )
        self.watch = CompilationWatch(self.backend)
        self._pending: tuple[int, float, Callable[[], tuple[list[float], float]], str] | None = None
        try:
            with interrupts.deferred():
                self._train()
            self.watchdog.doing("writing the last checkpoint")
            self.saver.close()
            if received := self._signal():  # after the last step: all is saved
                raise interrupts.Interrupted(received)
        except RuntimeError as error:
            if is_lost(error):
                self.saver.expect_nobody()
            raise
        finally:
            self.watchdog.doing("closing the log")
            self.saver.wait()
            self.log.close()
            self.train_loader.close()
            if self.run.is_main:
                self.log.attempt("the log", self.run.folder.publish)
        return summary(self.log.records)

    def _train(self) -> None:
        train, total = self.config.train, self.config.train.steps
        self.samples = SampleLog(self.run.folder.samples, self.step)
        evaluated = any(r["step"] == self.step and "eval_loss" in r for r in self.log.records)
        if self._evaluation_is_due() and not evaluated:
            self._evaluate()  # the first, or one that a signal cut short
            self.watch.expect()
        self._finished_at = time.perf_counter()
        while not self._is_over():
            self.watchdog.step(self.step + 1)
            rate = train.optimizer.lr * learning_rate_fraction(self.step, total, train.schedule)
            micro_batches = self._next_micro_batches()
            result = self.train_step(micro_batches, rate)
            self.step += 1
            self.watch.after_step(self.step, micro_batches)
            result = self.backend.result(result)
            # The device works on this step while the host reads the one before.
            self._finish_pending()
            self._pending = (self.step, rate, result, self.train_loader.describe())
            self._between_steps()

    def save(self) -> None:
        """Begin to write a checkpoint; training may go on meanwhile."""
        self.watchdog.doing(f"saving after step {self.step}")
        state = {
            **self.run.state(),
            "tokens": self.meter.tokens,
            "seconds": self.meter.seconds,
            "rng": self.backend.rng_state(),
            "data": merge_states(self.backend.gather_objects(self.train_loader.state_dict())),
        }
        if self.run.is_main:
            self.run.folder.check_claim()
            self.disk.look(self.log.say)
        self.saver.save(self.step, self._tensors(), state, self._kept())
        if self.run.is_main:
            self.log.flush()
            self.log.attempt("TensorBoard's files", self.run.folder.publish_tensorboard)

    def _build(self) -> None:
        run, section = self.run, self.config.train
        reader = CheckpointReader(run.newest.folder) if run.newest else None
        saved = stored(reader, self.backend, "model/") if reader else None
        if self.config.lora:
            make = adapted(run.weights, self.backend, self.config.seed, saved)
        elif saved:
            make = saved
        elif run.weights is not None:
            make = stored(run.weights, self.backend)
        else:
            make = initial(run.model_config, self.backend, self.config.seed)
        self.model, self.specs = build_model(
            run.model_config, self.backend, make, run.attention, self.config.lora, run.compute_dtype
        )
        self.optimizer = build_optimizer(self.model, self.specs, self.backend, section.optimizer)
        self.backend.seed(self.config.seed)
        if reader is not None:
            self._resume(reader, run.newest.state)
        self.train_step = make_step(self.model, self.specs, self.optimizer, self.backend, section, run.compute_dtype)
        self.evaluator = Evaluator(run, self.model, self._share, self._signal)
        self.backend.flush()
        if run.newest:
            # Last: on XLA, handing over what was recorded moves the generator on.
            self.backend.set_rng_state(run.newest.state["rng"])

    def _resume(self, reader: CheckpointReader, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.meter.tokens, self.meter.seconds = state["tokens"], state["seconds"]
        restore_optimizer(reader, self.model, self.specs, self.backend, self.optimizer, self.step)
        self.run.say(f"Continuing from step {self.step} ({reader.folder})")

    def _tensors(self) -> dict[str, torch.Tensor]:
        tensors = {}
        for name, parameter in trained(self.model):
            tensors[f"model/{name}"] = parameter.detach()
            for moment in MOMENTS:
                tensors[f"optimizer/{name}/{moment}"] = self.optimizer.state[parameter][moment]
        return tensors

    def _share(self, rows: int) -> range:
        """This host's rows of a batch."""
        count, index = self.backend.process_count, self.backend.process_index
        return range(rows * index // count, rows * (index + 1) // count)

    def _next_micro_batches(self) -> list[Batch]:
        batch = next(self.train_loader)
        parts = {key: value.chunk(self.config.train.grad_accum) for key, value in batch.items()}
        return [{key: part[i] for key, part in parts.items()} for i in range(self.config.train.grad_accum)]

    def _between_steps(self) -> None:
        evaluate, received = self._evaluation_is_due(), self._signal()
        save = bool(received) or _due(self.step, self.config.checkpoint.every)
        if evaluate or save or self._is_over():
            # Never save what was not seen to be finite.
            self._finish_pending()
            if evaluate and not received:
                save = self._evaluate() or save
                received = self._signal()
            # Last: a run that is interrupted in between evaluates again.
            if save or received or self._is_over():
                self.save()
            self.watch.expect()
            # Time and money of the run, but not of the next step.
            now = time.perf_counter()
            self.meter.seconds += now - self._finished_at
            self._finished_at = now
        if received:
            self.saver.close()
            self.log.say(f"{received.name}: saved at step {self.step}; start again to continue from there")
            raise interrupts.Interrupted(received)

    def _is_over(self) -> bool:
        return self.step >= self.config.train.steps or self._stops_early()

    def _stops_early(self) -> bool:
        return is_stale(self.log.records, self.config.eval.early_stopping_patience)

    def _signal(self) -> signal.Signals | None:
        """The signal that any host has received: all of them must stop after the same step."""
        self.watchdog.progress()
        return next(filter(None, self.backend.gather_objects(interrupts.received())), None)

    def _evaluation_is_due(self) -> bool:
        section = self.config.eval
        if self.step == 0:
            return section.at_start and self.run.corpus.has_eval
        last = self.step == self.config.train.steps
        return self.run.corpus.has_eval and (last or _due(self.step, section.every))

    def _evaluate(self) -> bool:
        """Evaluate and report; return whether the checkpoint of this step is to be kept for it."""
        self.watchdog.doing(f"evaluating after step {self.step}")
        figures = self.evaluator.figures()
        if figures is None:
            return False
        samples = self.evaluator.samples()
        self.log.write({"step": self.step, **figures})
        self.log.say(
            f"step {self.step}: held-out loss {figures['eval_loss']:.4f}, token accuracy {figures['eval_accuracy']:.1%}"
        )
        for prompt, text in zip(self.config.eval.prompts, samples, strict=True):
            self.log.say(f"    {prompt!r} -> {text!r}")
        if samples and self.run.is_main:
            self.log.attempt("samples", lambda: self.samples.write(self.step, self.config.eval.prompts, samples))
        if self._stops_early():
            self.log.say(
                f"step {self.step}: no lower held-out loss since step {best(self.log.records)['step']}; training ends "
                "(eval.early_stopping_patience)"
            )
        return self._kept() == self.step

    def _kept(self) -> int | None:
        """The step whose checkpoint is kept for its held-out loss."""
        # Before the first step there is none.
        lowest = best([r for r in self.log.records if r["step"]]) if self.config.checkpoint.keep_best else None
        return lowest and lowest["step"]

    def _finish_pending(self) -> None:
        """Wait for the step before and report it; its time is that from the end of its predecessor to its own end."""
        if self._pending is None:
            return
        (step, rate, result, rows), self._pending = self._pending, None
        self.watchdog.step(step)
        (loss, grad_norm, trained, real), finished_at = result()
        seconds, self._finished_at = finished_at - self._finished_at, finished_at
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            self._stop_not_finite(step, loss, grad_norm, rows)
        record = {"step": step, "loss": loss, "grad_norm": grad_norm, "learning_rate": rate}
        record |= self.meter.step(seconds, trained, real) | {"compilations": self.watch.count}
        record = note_spikes(record, self.log.records, self.config.watch.spike, rows, self.log.say)
        self.log.write(record)
        self.log.advance(record)
        self.watchdog.took(seconds)

    def _stop_not_finite(self, step: int, loss: float, grad_norm: float, rows: str) -> None:
        self.saver.wait()
        found = complete(self.run.folder.checkpoints)
        kept = f"the newest checkpoint, {found[-1]}, is from before" if found else "there is no checkpoint yet"
        raise TrainingError(
            f"step {step}: the loss is {loss} and the gradient norm {grad_norm}; {kept}. Lower train.optimizer.lr, "
            f"lengthen train.schedule.warmup_steps, or look at the text of this batch:\n{rows}"
        )


def _due(step: int, every: int) -> bool:
    return bool(every) and step % every == 0
