"""`mlx-distributed bench`: how fast the ranks exchange arrays, beside MLX's ring, PyTorch's Gloo and bare sockets."""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_distributed.cli.bench.options import Options, read_options
from mlx_distributed.cli.local import LocalGroup, worker_environment
from mlx_distributed.cli.verb import Verbs, add_verb
from mlx_distributed.config.checks import is_address
from mlx_distributed.errors import ConfigError

if TYPE_CHECKING:
    from mlx_distributed.cli.bench.report import Report

HOST = "127.0.0.1"
GRACE_S = 5.0
"""A rank inside the ring has no deadline; when another one has died, it is ended after this."""

EXAMPLES = """\
examples:
  mlx-distributed bench allreduce --nproc 4 --against ring,gloo,sockets
  mlx-distributed bench allreduce --sizes 1MiB,16MiB --wire fp32,bf16,int8 --json
  mlx-distributed bench latency
  mlx-distributed bench links --nproc 3 --picture links.svg

over several machines, one rank on each:
  mlx-distributed bench allreduce --workers 3 --listen 192.168.1.20:4000 --wire fp32,bf16,int8
  mlx-distributed bench join STRING
"""
EPILOG = f"""\
{EXAMPLES}
The first of the last two is rank 0, shows the figures, and prints the string for the second one, which is given on each
of the other machines. All of ours goes over TLS there; `ring` does not.

With --json there is one object per line: op, backend, wire, num_ranks, size_bytes, median_s, algbw_gb_per_s (10^9 bytes
of float32 per second of median_s), ratio_to_ring, ratio_to_gloo and ratio_to_sockets (time of that / median_s; null
without it) and cpu_s_per_gb (processor seconds of all ranks per 10^9 bytes that have to move, 2 (ranks - 1) times the
size). For links, op is "send 0->1" or "round trip 0->1".

exit status: 0 done; 1 a rank was lost or a sum was wrong; 2 an argument was refused; 130 interrupted
"""
_OPS = {
    "allreduce": (
        "the time of a sum over all ranks",
        "Time the sum of a float32 array over all ranks: ours over gRPC, and what it is compared with. They take "
        "turns; a round takes as long as its slowest rank, and the median of the rounds is shown. Each first sum is "
        "checked.",
        "1KiB,64KiB,1MiB,16MiB,64MiB",
        10,
    ),
    "latency": (
        "the same for arrays so small that only the number of messages counts",
        "Time the sum of a few float32 values over all ranks, where not the bytes count but the messages.",
        "4B,256B,4KiB,64KiB",
        50,
    ),
    "links": (
        "bandwidth and round trip between all pairs of ranks",
        "Time an array from each rank to each other one, and a round trip, one pair at a time.",
        "16MiB",
        10,
    ),
}


def add_bench(verbs: Verbs[argparse.ArgumentParser]) -> None:
    """Register the verb."""
    bench = verbs.add_parser(
        "bench",
        help="measure how fast workers exchange arrays",
        description="Measure how fast workers exchange arrays, several on one machine or one on each of several.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    ops = bench.add_subparsers(dest="op", metavar="WHAT", required=True)
    for op, (summary, description, sizes, num_rounds) in _OPS.items():
        parser = add_verb(ops, op, _bench, summary=summary, description=description, epilog=EPILOG)
        parser.add_argument("--nproc", metavar="N", help="ranks to start on this machine (default: 2)")
        parser.add_argument("--workers", metavar="N", help="ranks on as many machines, of which this is one")
        where = "address of this machine that the others reach; with --workers"
        parser.add_argument("--listen", metavar="HOST:PORT", help=where)
        parser.add_argument("--sizes", default=sizes, help=f"of the arrays, such as 64KiB (default: {sizes})")
        if op == "links":
            parser.add_argument("--picture", type=Path, metavar="FILE", help="also write the tables as an SVG file")
            parser.set_defaults(wire="fp32", against="none", tls=False)
        else:
            formats = "wire formats of ours: fp32, bf16, fp16, int8, int4 (default: fp32)"
            parser.add_argument("--wire", default="fp32", metavar="FORMATS", help=formats)
            others = (
                "what to compare with: ring, gloo (needs PyTorch), sockets or none (default: ring); over several "
                "machines ring or none (default: none)"
            )
            parser.add_argument("--against", metavar="BACKENDS", help=others)
            parser.add_argument("--tls", action="store_true", help="also time ours over TLS")
            parser.set_defaults(picture=None)
        rounds = f"the median of so many is taken (default: {num_rounds})"
        parser.add_argument("--rounds", default=str(num_rounds), metavar="N", help=rounds)
        parser.add_argument("--json", action="store_true", help="print one JSON object per row and nothing else")
    parser = add_verb(
        ops,
        "join",
        _join,
        summary="take part in a benchmark that another machine has begun",
        description="Be one of the ranks of a benchmark over several machines.",
        epilog=EPILOG,
    )
    parser.add_argument("string", metavar="STRING", help="that it has printed; - reads it from standard input")


def _bench(args: argparse.Namespace) -> int:
    # These import numpy, which `--help` need not wait for.
    from mlx_distributed.cli.bench.report import Report
    from mlx_distributed.comm.compress import CODECS

    over_network = _over_network(args)
    against = args.against or ("none" if over_network else "ring")
    words = ((args.workers if over_network else args.nproc) or "2", args.sizes, args.wire, against, args.rounds)
    options = read_options(args.op, *words, args.tls, tuple(CODECS), over_network)
    if args.picture is not None:
        _check_picture(args.picture)
    report = Report(options, args.json, args.picture)
    if over_network:
        status = _host(options, args.listen, report, args.debug)
    else:
        report.begin()
        status = _run_ranks(options, report.hear, args.debug)
    if status == 0:
        report.end()
    return status


def _over_network(args: argparse.Namespace) -> bool:
    """Whether ranks are on several machines."""
    if args.workers is None and args.listen is None:
        return False
    if args.workers is None or args.listen is None:
        given, lacks = ("--workers", "--listen") if args.listen is None else ("--listen", "--workers")
        raise ConfigError(
            f"{given} needs {lacks}: a benchmark over several machines is begun with both, as in --workers 3 --listen "
            "192.168.1.20:4000"
        )
    if args.nproc is not None:
        raise ConfigError(f"--nproc {args.nproc} cannot stand beside --workers, of which there is one on each machine")
    if not is_address(args.listen):
        raise ConfigError(
            f"--listen {args.listen}: must be a host and a port that other machines reach, such as 192.168.1.20:4000"
        )
    return True


def _host(options: Options, listen: str, report: Report, debug: bool) -> int:
    from mlx_distributed.cli.bench.several import host
    from mlx_distributed.cli.meeting.host import Meeting

    def tell(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    report.where = "on as many machines, over TLS"
    with contextlib.closing(Meeting(listen, "benchmark", "--listen ")) as meeting:
        return host(options, meeting, tell, report, debug)


def _join(args: argparse.Namespace) -> int:
    from mlx_distributed.cli.bench.several import join
    from mlx_distributed.cli.elastic.attended import read_line

    return join(read_line(sys.stdin.fileno()) if args.string == "-" else args.string, args.debug)


def _run_ranks(options: Options, hear: Callable[[Mapping[str, Any]], None], debug: bool) -> int:
    env, _ = worker_environment(os.environ, sys.platform)  # no hint: nothing here multiplies matrices
    secret = secrets.token_hex(16)
    same = {
        "secret": secret,
        "host": HOST,
        "options": asdict(options),
        "identity": _new_identity() if options.tls else None,
    }
    jobs = [{"rank": rank, **same} for rank in range(options.num_ranks)]
    program = "mlx_distributed.cli.bench.rank"
    return LocalGroup(jobs, [None] * options.num_ranks, env, debug, program, GRACE_S, hear).run()


def _new_identity() -> dict[str, str]:
    # It imports a library that a group without TLS need not wait for.
    from mlx_distributed.comm.tls import Identity

    return asdict(Identity.create(datetime.now(UTC)))


def _check_picture(file: Path) -> None:
    """Refuse what could not be written at the end."""
    if file.suffix != ".svg":
        raise ConfigError(f"--picture {file}: the picture is an SVG; name it {file.with_suffix('.svg')}")
    if file.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK):
        raise ConfigError(f"--picture {file}: cannot be written; give a file in a folder that exists and is yours")
