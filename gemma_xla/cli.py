"""The console command `gemma-xla`, and what recipes share with it: arguments in, one clear line out on a mistake."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable
from typing import Any, TextIO

from gemma_xla import interrupts
from gemma_xla.config import RunConfig
from gemma_xla.config_file import load_config
from gemma_xla.errors import UserError
from gemma_xla.plan import command as plan_command
from gemma_xla.storage import location


def main(argv: list[str] | None = None) -> None:
    """Run `gemma-xla`."""
    parser = argparse.ArgumentParser(prog="gemma-xla", description="Tools around Gemma training with PyTorch/XLA.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    for add in (plan_command.add, _add_export, _add_generate, _add_preview, _add_flops, _add_chips):
        add(verbs)
    for verb in verbs.choices.values():
        verb.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)
    # No verb needs devices, and loading torch_xla takes seconds.
    os.environ.setdefault("USE_TORCH_XLA", "0")
    _guarded(lambda: args.run(args), args.debug)


def recipe(
    description: str, run: Callable[[RunConfig], None], argv: list[str] | None = None, *, finetunes: bool = False
) -> None:
    """Run a recipe: read ``--config`` and ``--set key=value``, then call ``run`` with the config.

    Args:
        finetunes: whether it needs weights to start from.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--config", required=True, help="the run's YAML file, such as those in recipes/configs")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change a value, such as train.steps=10"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("--resume", choices=["auto", "never"], help="the same as --set checkpoint.resume=...")
    args = parser.parse_args(argv)
    overrides = [*args.set, *([f"checkpoint.resume={args.resume}"] if args.resume else [])]

    def start() -> None:
        config = load_config(args.config, overrides)
        if finetunes and config.model.init_from is None:
            raise UserError(
                f"config {args.config}: model.init_from is missing; name the model to fine-tune: a Hugging Face folder "
                "or hub id, or a run"
            )
        from gemma_xla.xla import configure_environment  # it loads PyTorch, which some verbs do without

        configure_environment(config.mesh.virtual_devices)
        with contextlib.redirect_stdout(_Lossy(sys.stdout)), contextlib.redirect_stderr(_Lossy(sys.stderr)):
            run(config)

    _guarded(start, args.debug)


class _Lossy:
    """A stream that loses what cannot be written: a run must not end because its log is on a full disk."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()


def _guarded(action: Callable[[], None], debug: bool) -> None:
    try:
        with interrupts.handled():
            action()
    except (UserError, KeyboardInterrupt) as error:
        if debug:
            raise
        mistake = isinstance(error, UserError)
        print(f"error: {error}" if mistake else str(error) or "interrupted", file=sys.stderr)
        sys.exit(getattr(error, "exit_code", 130))


def _add_export(verbs: argparse._SubParsersAction) -> None:
    parser = verbs.add_parser("export", help="write a run's checkpoint as a Hugging Face folder or a peft adapter")
    parser.add_argument("folder", type=location, metavar="RUN", help="the run's output_dir, or an adapter to --merge")
    parser.add_argument("out", type=location, metavar="OUT", help="the folder to write")
    parser.add_argument(
        "--checkpoint", default="last", metavar="last|best|STEP", help="best: the lowest held-out loss; default: last"
    )
    parser.add_argument("--merge", action="store_true", help="with LoRA: write the whole model, the adapter merged in")
    parser.add_argument("--dtype", help="float32 (default of adapters), bfloat16 (default of models) or float16")
    parser.add_argument("--max-shard-size", default="5GB", help="the largest weight file (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace a folder of the same kind that is there")
    parser.add_argument("--push-to-hub", metavar="NAME", help="then upload it; a new repository is private")
    parser.set_defaults(run=_export)


def _export(args: argparse.Namespace) -> None:
    from gemma_xla.hf import check_push, push
    from gemma_xla.train.export import export_run

    if args.push_to_hub:
        check_push(args.push_to_hub)
    options = {key: getattr(args, key) for key in ("checkpoint", "merge", "dtype", "max_shard_size", "overwrite")}
    print(export_run(args.folder, args.out, name=args.push_to_hub, **options))
    if args.push_to_hub:
        print(push(args.out, args.push_to_hub))


def _add_generate(verbs: argparse._SubParsersAction) -> None:
    parser = verbs.add_parser("generate", help="continue a prompt with a run, an adapter or a Hugging Face model")
    parser.add_argument("model", metavar="MODEL", help="a run, a peft adapter, a Hugging Face folder or a hub name")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--chat", action="store_true", help="the prompt is a user's turn; answer it")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default): always the likeliest token")
    parser.add_argument("--top-k", type=int, help="draw from the k likeliest tokens")
    parser.add_argument("--top-p", type=float, help="draw from the likeliest tokens that make up this probability")
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(run=_generate)


def _generate(args: argparse.Namespace) -> None:
    from gemma_xla.infer.text import open_model, stream

    model, tokenizer, ends = open_model(args.model)
    options = {key: getattr(args, key) for key in ("chat", "max_new_tokens", "temperature", "top_k", "top_p", "seed")}
    if not args.chat:
        print(args.prompt, end="", flush=True)
    for text in stream(model, tokenizer, args.prompt, eos_token_id=ends, **options):
        print(text, end="", flush=True)
    print()


def _add_preview(verbs: argparse._SubParsersAction) -> None:
    parser = verbs.add_parser("preview", help="show what a run trains on, and which of its tokens are learnt")
    parser.add_argument("config", metavar="CONFIG", help="the run's YAML file")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a value of it")
    parser.add_argument("-n", type=int, default=3, help="how many examples (default: %(default)s)")
    parser.set_defaults(run=_preview)


def _preview(args: argparse.Namespace) -> None:
    from gemma_xla.data.preview import preview

    preview(load_config(args.config, args.set), args.n, sys.stdout)


def _add_flops(verbs: argparse._SubParsersAction) -> None:
    parser = verbs.add_parser("flops", help="count a model's FLOPs, term by term")
    parser.add_argument("preset", metavar="MODEL", help="a preset, such as gemma-7b")
    parser.add_argument("--seq-len", type=int, default=8192, help="tokens per row (default: %(default)s)")
    parser.add_argument("--lora-rank", type=int, help="count LoRA fine-tuning with adapters of this rank")
    parser.add_argument("--json", action="store_true", help="print for programs")
    parser.set_defaults(run=_flops)


def _flops(args: argparse.Namespace) -> None:
    from gemma_xla.flops import FlopCounter, report, table
    from gemma_xla.model.config import preset

    counter = FlopCounter(preset(args.preset), args.seq_len, args.lora_rank)
    print(json.dumps(report(counter), indent=2) if args.json else table(counter))


def _add_chips(verbs: argparse._SubParsersAction) -> None:
    parser = verbs.add_parser("chips", help="list the chips, their peaks and prices, and where the figures are from")
    parser.set_defaults(run=_chips)


def _chips(args: argparse.Namespace) -> None:
    from gemma_xla.chips import CHIPS

    for chip in CHIPS.values():
        print(f"{chip.name}: {chip.peak_flops.value / 1e12:.4g} TFLOP/s bf16, ${chip.price.value:.2f} per hour")
        print(f"    peak: {chip.peak_flops.source} ({chip.peak_flops.date})")
        print(f"    price: {chip.price.source} ({chip.price.date})")


if __name__ == "__main__":
    main()
