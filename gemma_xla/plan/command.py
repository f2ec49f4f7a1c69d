"""`gemma-xla plan`."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

from gemma_xla.chips import get_chip
from gemma_xla.config import RunConfig
from gemma_xla.config_file import load_config
from gemma_xla.errors import UserError
from gemma_xla.plan.answer import Planner
from gemma_xla.plan.cache import Cache
from gemma_xla.plan.report import comparison, text, to_json
from gemma_xla.plan.result import Plan
from gemma_xla.plan.setup import Setup, prepare
from gemma_xla.plan.slices import Hardware, hardware
from gemma_xla.storage import reason


def add(verbs: argparse._SubParsersAction) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser("plan", help="ask the TPU compiler whether a run fits, how fast it is and what it costs")
    parser.add_argument("config", metavar="CONFIG", nargs="?", help="the run's YAML file")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a value of it")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--topology", metavar="SLICE", help="such as v5p-128 or 2xv5e-256; default: hardware.topology")
    where.add_argument("--topologies", metavar="SLICES", help="several to compare, such as v5e-64,v5p-128")
    parser.add_argument("--tokens", type=float, help="to train on, such as 6e12; default: those of the run's steps")
    parser.add_argument("--tune", action="store_true", help="look for the fastest mesh, batch and remat that fit")
    parser.add_argument("--by", choices=["dollars", "time"], default="dollars", help="what --tune ranks by")
    parser.add_argument("--finalists", type=int, default=6, metavar="N", help="settings that --tune compiles")
    parser.add_argument("--published", action="store_true", help="compare with Google's published Gemma training")
    parser.add_argument(
        "--price", action="append", default=[], metavar="CHIP=DOLLARS", help="with --published: per chip-hour"
    )
    parser.add_argument("--json", action="store_true", help="print for programs")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw memory and time as .png, .svg or .pdf")
    parser.add_argument("--hlo", type=Path, metavar="DIR", help="keep the compiled programs")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="where answers are kept")
    parser.add_argument("--timeout", type=float, default=3600, metavar="SECONDS", help="for one compilation")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Answer what the command line asks.

    Raises:
        UserError: it asks for nothing, or for what cannot be planned.
    """
    _check(args)
    planner = Planner(Cache(args.cache), timeout=args.timeout)
    if args.published:
        _published(args, planner)
        return
    names = args.topologies.split(",") if args.topologies else [args.topology]
    config = load_config(args.config, args.set)
    if args.tune:
        _tune(args, planner, names)
        return
    setups = [prepare(config, hardware(config, name)) for name in names]
    plans = [planner.plan(setup, args.config, args.tokens) for setup in setups]
    if args.hlo:
        _keep_programs(args.hlo, planner.cache, setups[0])
    if args.plot:
        from gemma_xla.plan.plot import plot

        plot(plans[0], args.plot)
    if args.json:
        print(json.dumps([to_json(plan) for plan in plans] if args.topologies else to_json(plans[0]), indent=2))
    else:
        print(comparison(plans) if args.topologies else text(plans[0]))


def _check(args: argparse.Namespace) -> None:
    if bool(args.config) == args.published:
        raise UserError("plan: name the CONFIG to plan, or ask for --published, which has its own")
    if args.tokens is not None and not 0 < args.tokens < math.inf:
        raise UserError(f"--tokens is {args.tokens}; give a positive number, such as 6e12")
    if not args.timeout > 0:
        raise UserError(f"--timeout is {args.timeout}; give a positive number of seconds")
    if args.finalists < 1:
        raise UserError(f"--finalists is {args.finalists}; give a number from 1")
    for name in ("plot", "hlo"):
        if getattr(args, name) and (args.topologies or args.tune or args.published):
            raise UserError(f"--{name} is of a single plan; leave out --topologies, --tune and --published")
    if args.plot:
        from gemma_xla.plan.plot import check_path

        # Before minutes of work.
        check_path(args.plot)


def _published(args: argparse.Namespace, planner: Planner) -> None:
    from gemma_xla.plan.published import BASELINE_PRICE, ask, table

    prices = _prices(args.price)
    plans = ask(lambda setup, path: planner.plan(setup, path, args.tokens), args.set)
    if args.json:
        print(json.dumps([to_json(plan) for plan in plans.values()], indent=2))
    else:
        print(table(plans, prices, prices.pop("a100-80gb", BASELINE_PRICE)))


def _prices(given: list[str]) -> dict[str, float]:
    """Dollars per chip-hour by chip."""
    prices = {}
    for pair in given:
        chip, _, value = pair.partition("=")
        try:
            prices[get_chip(chip).name] = float(value)
        except ValueError:
            prices[chip] = 0.0
        if not 0 < prices[chip] < math.inf:
            raise UserError(f"--price {pair!r}: write it as a chip and dollars per chip-hour, such as v5e=1.20")
    return prices


def _tune(args: argparse.Namespace, planner: Planner, names: list[str | None]) -> None:
    from gemma_xla.plan.tune import tune
    from gemma_xla.plan.tune_report import text as tuned

    config = load_config(args.config, args.set)

    def ask(changed: RunConfig, where: Hardware) -> Plan:
        return planner.plan(prepare(changed, where), args.config, args.tokens)

    where = [hardware(config, name) for name in names]
    tuning = tune(config, where, ask, by=args.by, finalists=args.finalists, say=planner.progress.say)
    if args.json:
        print(json.dumps([to_json(row.plan) for row in tuning.rows if row.plan], indent=2))
    else:
        print(tuned(tuning, args.config))


def _keep_programs(folder: Path, cache: Cache, setup: Setup) -> None:
    """Write each graph's compiled program as text."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for number, program in enumerate(cache.programs(setup)):
            (folder / f"{number}.hlo.txt").write_text(program, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--hlo: {folder} cannot be written to ({reason(error)}); name another folder") from error
