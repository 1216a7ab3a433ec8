"""Starts a run on several machines, or on this one: a torchrun on each host of a file, over ssh.

    python scripts/launch.py --hosts hosts.txt --nproc-per-node 8 -m open_lm.main --model open_lm_7b …
    python scripts/launch.py --nproc-per-node 2 -m open_lm.main --model open_lm_160m …     (without hosts: here)

A line of the file is a host, [user@]host[:port], with what differs from the others behind it: slots=N for its ranks,
address=A where the other hosts reach it under another name than ssh does. What follows # is a comment. The first host
holds rank 0 and the rendezvous.

Every host needs the same working directory and Python, ssh without a password, and free ports between the hosts. Of
this environment the hosts get the variables of --env and NCCL_*, GLOO_*, TORCH_*, OMP_NUM_THREADS, AWS_*, HF_*,
WANDB_*; values travel through the connection: they neither stand in a command line nor are they printed.

A signal to stop (SIGTERM, SIGUSR1; an interrupt counts as SIGTERM) goes to all ranks, which save and end; a second one
ends them at once. When a node fails or the connection to it is lost, the others have --grace seconds to end. The exit
code is that of the node that failed first: 2 for a mistake in flags or files, 255 for a lost connection.
"""

from __future__ import annotations

import argparse
import fnmatch
import ipaddress
import os
import shlex
import socket
import sys
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch_run import Nodes

from open_lm.errors import ConfigError, join_problems, run_cli

NODE_PROGRAM = Path(__file__).resolve().with_name("launch_node.py")
PASSED_ON = ("NCCL_*", "GLOO_*", "TORCH_*", "OMP_NUM_THREADS", "AWS_*", "HF_*", "WANDB_*")
# No question is ever asked, and a connection that is gone is noticed in a quarter of a minute.
SSH = "ssh -o BatchMode=yes -o ConnectTimeout=20 -o ServerAliveInterval=5 -o ServerAliveCountMax=3"


@dataclass(frozen=True)
class Host:
    """A line of the hosts file. `name` is as ssh takes it, `address` as the other hosts do."""

    name: str
    address: str
    port: int | None = None
    slots: str | None = None

    def __str__(self) -> str:
        return self.name if self.port is None else f"{self.name}:{self.port}"


# --- hosts ----------------------------------------------------------------------------------------------------------
def read_hosts(path: Path) -> list[Host]:
    """ConfigError with all that is wrong with the file."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        said = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"--hosts {path}: cannot be read ({said}); expected a file with a host on each line"
        ) from error
    hosts: dict[tuple[str, int | None], Host] = {}
    problems = []
    for number, line in enumerate(lines, start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        try:
            host = parse_host(words)
        except ConfigError as error:
            problems.append(f"line {number}: {error}")
            continue
        key = host.name.rpartition("@")[2], host.port
        if key in hosts:
            problems.append(f"line {number}: {words[0]} is there twice; give it once, with slots=N for its ranks")
        hosts[key] = host
    if not hosts and not problems:
        problems.append("names no host; expected one on each line, such as: node1 slots=8")
    if problems:
        raise ConfigError(join_problems(problems, f"--hosts {path}"))
    return list(hosts.values())


def parse_host(words: Sequence[str]) -> Host:
    """[user@]host[:port] [slots=N] [address=A]; an IPv6 address with a port stands in brackets."""
    user, at, rest = words[0].rpartition("@")
    name, port = rest, ""
    if rest.startswith("["):
        name, _, behind = rest[1:].partition("]")
        port = behind.removeprefix(":")
    elif rest.count(":") == 1:
        name, _, port = rest.partition(":")
    if not name or name.startswith("-") or (at and not user) or user.startswith("-"):
        raise ConfigError(f"found {words[0]!r}, expected [user@]host[:port]")
    if port and not (port.isdecimal() and 0 < int(port) < 65536):
        raise ConfigError(f"found the port {port!r}, expected a number from 1 to 65535")
    settings = dict(word.partition("=")[::2] for word in words[1:])
    unknown = [word for word in words[1:] if word.partition("=")[0] not in ("slots", "address") or "=" not in word]
    if unknown:
        raise ConfigError(f"found {' '.join(unknown)!r} behind the host, expected slots=N or address=A")
    slots = settings.get("slots")
    if slots is not None and not (slots.isdecimal() and int(slots) > 0):
        raise ConfigError(f"found slots={slots}, expected a number of ranks, 1 at least")
    return Host(user + at + name, settings.get("address") or name, int(port) if port else None, slots)


def is_here(host: Host) -> bool:
    """Whether a host's name means this machine."""
    name = host.name.rpartition("@")[2]
    return _is_loopback(name) or name in (socket.gethostname(), socket.getfqdn())


def _is_loopback(name: str) -> bool:
    with suppress(ValueError):
        return ipaddress.ip_address(name).is_loopback
    return name == "localhost"


def chosen_hosts(args: argparse.Namespace) -> list[Host]:
    """The hosts that take part. ConfigError where there are too few, or where others could not reach the first."""
    if args.hosts is None:
        return [Host("localhost", "127.0.0.1")] * (args.nodes or 1)
    hosts = read_hosts(args.hosts)
    if args.nodes is not None and args.nodes > len(hosts):
        raise ConfigError(f"--nodes {args.nodes}: {args.hosts} names {len(hosts)}")
    hosts = hosts[: args.nodes]
    hidden = [host.name for host in hosts if _is_loopback(host.address)]
    if hidden and args.ssh is None and len(hidden) < len(hosts):
        raise ConfigError(
            f"--hosts {args.hosts}: the other hosts do not reach {' and '.join(hidden)}; give this machine's name or "
            "address there, or address=A behind it"
        )
    return hosts


# --- what is started ------------------------------------------------------------------------------------------------
def remote_command(host: Host, args: argparse.Namespace) -> list[str]:
    """The command, without a shell, that starts the node's program on its host."""
    program = [args.python, str(NODE_PROGRAM)]
    if args.hosts is None or (args.ssh is None and is_here(host)):
        return program
    remote = shlex.split(args.ssh or SSH)
    # What ssh makes of several words is the remote shell's, so that each is quoted for it; most need no quotes.
    quoted = [shlex.quote(word) for word in program]
    if any("{host}" in word for word in remote):
        if host.port is not None:
            raise ConfigError(f"--ssh {args.ssh}: has no place for the port of {host}; leave it out of the hosts file")
        return [*(word.replace("{host}", host.name) for word in remote), *quoted]
    port = [] if host.port is None else ["-p", str(host.port)]
    return [*remote, *port, host.name, *quoted]


def torchrun_command(hosts: Sequence[Host], rank: int, port: int, args: argparse.Namespace) -> list[str]:
    """The package's torchrun on the node `rank`, with the rendezvous at the first host."""
    first, own = hosts[0].address, hosts[rank]
    bracketed = f"[{first}]" if ":" in first else first
    return [
        args.python, "-m", "open_lm.utils.torchrun",
        "--nnodes", str(len(hosts)), "--node-rank", str(rank), "--nproc-per-node", own.slots or args.nproc_per_node,
        "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{bracketed}:{port}", "--rdzv-id", args.rdzv_id,
        "--rdzv-conf", f"is_host={int(rank == 0)}", "--local-addr", own.address,
        "--max-restarts", str(args.max_restarts),
        *args.command,
    ]  # fmt: skip


def passed_on(patterns: Sequence[str], environment: Mapping[str, str]) -> dict[str, str]:
    """The variables whose names fit one of the patterns."""
    return {
        name: value
        for name, value in sorted(environment.items())
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    }


def job_of(hosts: Sequence[Host], rank: int, port: int, args: argparse.Namespace) -> dict[str, Any]:
    """What the node's program is told; see launch_node.py."""
    return {
        "command": torchrun_command(hosts, rank, port, args),
        "directory": str(args.directory),
        "environment": passed_on([*PASSED_ON, *args.env.split(",")], os.environ),
        "grace_s": args.grace,
    }


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        usage="launch.py [options] (-m MODULE | SCRIPT) …",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--hosts", type=Path, metavar="FILE", help="a host on each line; default: this machine")
    add("--nodes", type=int, metavar="N", help="the first N hosts only; without --hosts, N nodes on this machine")
    add(
        "--nproc-per-node",
        default="gpu",
        metavar="N",
        help="ranks of a host without slots; gpu: one for each (default)",
    )
    add("--ssh", metavar="COMMAND", help=f"in place of {SSH!r}; the host follows, or stands where it holds {{host}}")
    add("--python", default=sys.executable, help="on the hosts (default: this one)")
    add("--directory", type=Path, default=Path.cwd(), help="where the run starts on the hosts (default: this one)")
    add("--env", default="", metavar="NAMES", help="further variables to hand on, joined by commas; * fits anything")
    add("--port", type=int, help="of the rendezvous on the first host (default: one that is free)")
    add("--grace", type=float, default=60.0, metavar="S", help="seconds to end after a failure (default: 60)")
    add("--max-restarts", type=int, default=0, metavar="N", help="how often failed ranks are started anew (default: 0)")
    add("--output", choices=["all", "first"], default="all", help="of all nodes, or of rank 0's and the first to fail")
    add("--dry-run", action="store_true", help="print what would be started")
    add("-m", dest="module", nargs=argparse.REMAINDER, help="module with its arguments")
    add("script", nargs=argparse.REMAINDER, help="script with its arguments")
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """ConfigError with all that is wrong with the options."""
    args = make_parser().parse_args(argv)
    args.command = ["-m", *args.module] if args.module else args.script
    args.rdzv_id = uuid.uuid4().hex
    problems = []
    if not args.command:
        problems.append("nothing to run: expected -m MODULE or a script behind the options, such as -m open_lm.main")
    if args.nproc_per_node != "gpu" and not (args.nproc_per_node.isdecimal() and int(args.nproc_per_node) > 0):
        problems.append(f"--nproc-per-node: found {args.nproc_per_node!r}, expected a number of ranks or gpu")
    if args.nodes is not None and args.nodes < 1:
        problems.append(f"--nodes: found {args.nodes}, expected 1 at least")
    if args.grace <= 0:
        problems.append(f"--grace: found {args.grace:g}, expected a number of seconds above 0")
    if args.hosts is None and args.ssh is not None:
        problems.append("--ssh: goes with --hosts")
    if problems:
        raise ConfigError(join_problems(problems, "the options cannot be used"))
    return args


def show(hosts: Sequence[Host], args: argparse.Namespace) -> None:
    """Print what each host would be told, with the names of variables alone."""
    for rank, host in enumerate(hosts):
        job = job_of(hosts, rank, args.port or 0, args)
        print(f"{host}: {shlex.join(remote_command(host, args))}")
        print(f"  in {job['directory']}: {shlex.join(job['command'])}")
        print(f"  with {', '.join(job['environment']) or 'no variables'}")


def launch(argv: Sequence[str]) -> int:
    """The run's exit code."""
    args = parse(argv)
    hosts = chosen_hosts(args)
    if args.dry_run:
        show(hosts, args)
        return 0
    names = [str(host) if args.hosts else f"node {rank}" for rank, host in enumerate(hosts)]
    commands = [(name, remote_command(host, args)) for name, host in zip(names, hosts, strict=True)]
    with Nodes(commands, args.output, args.grace) as nodes:
        ports = nodes.connect()
        port = args.port or ports[0]
        return nodes.run([job_of(hosts, rank, port, args) for rank in range(len(hosts))])


def main(argv: Sequence[str]) -> None:
    raise SystemExit(launch(argv))


if __name__ == "__main__":
    sys.exit(run_cli(main))
