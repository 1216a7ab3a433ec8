"""Start a run on several machines with torchrun over ssh, or on this machine.

    open-lm launch --hosts hosts.txt --nproc-per-node 8 train --model open_lm_7b …
    open-lm launch --nproc-per-node 2 train --model open_lm_160m …     (no hosts: this machine)
    open-lm launch --nproc-per-node 2 -m open_lm.main --model open_lm_160m …     (the same, by the module's name)

After its own options comes what every rank runs: a command of open-lm (train, evaluate, …), a script, or -m MODULE.

Each line of the hosts file is [user@]host[:port] [slots=N] [address=A]. slots is the number of ranks on this host.
address is the name or IP address at which the other hosts reach it, if it differs from its ssh name. # starts a
comment. The first host runs rank 0 and the rendezvous.

Every host needs the same working directory and Python, ssh without a password, and open ports between the hosts. The
hosts receive the environment variables in --env and NCCL_*, GLOO_*, TORCH_*, OMP_NUM_THREADS, AWS_*, HF_* and WANDB_*.
Their values are sent over the connection. They do not appear on a command line and are not printed.

SIGTERM, SIGUSR1 and an interrupt (Ctrl-C) ask all ranks to save and stop; a second signal kills them. If a node fails
or its connection is lost, the other nodes have --grace seconds to stop. The exit code is that of the first node to
fail, for example 2 for invalid flags or files, or 255 for a lost connection.
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
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from open_lm import storage
from open_lm.cli.commands import COMMANDS
from open_lm.cli.launch_run import Nodes
from open_lm.errors import ConfigError, UserError, join_problems, run_cli
from open_lm.system.names import user_file, user_path
from open_lm.system.program import program_name

NODE_PROGRAM = Path(__file__).resolve().with_name("launch_node.py")
FORWARDED_VARIABLES = ("NCCL_*", "GLOO_*", "TORCH_*", "OMP_NUM_THREADS", "AWS_*", "HF_*", "WANDB_*")
# Never prompt, and detect a lost connection within 15 seconds.
SSH = "ssh -o BatchMode=yes -o ConnectTimeout=20 -o ServerAliveInterval=5 -o ServerAliveCountMax=3"


@dataclass(frozen=True)
class Host:
    """A host of the hosts file: ssh connects to `name`, the other hosts connect to `address`."""

    name: str
    address: str
    port: int | None = None
    slots: str | None = None

    def __str__(self) -> str:
        return self.name if self.port is None else f"{self.name}:{self.port}"


# --- hosts ----------------------------------------------------------------------------------------------------------
def read_hosts(path: Path) -> list[Host]:
    """Read a hosts file. Raise ConfigError with all its problems."""
    try:
        lines = storage.read_lines(path)
    except UserError as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise ConfigError(
            f"--hosts {path}: cannot read the file ({reason}); expected a text file with one host per line"
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
            problems.append(
                f"line {number}: {words[0]} is listed twice; list each host once, with slots=N for its number of ranks"
            )
        hosts[key] = host
    if not hosts and not problems:
        problems.append("found no hosts; expected one host per line, such as: node1 slots=8")
    if problems:
        raise ConfigError(join_problems(problems, f"--hosts {path}"))
    return list(hosts.values())


def parse_host(words: Sequence[str]) -> Host:
    """Parse [user@]host[:port] [slots=N] [address=A]. An IPv6 address with a port must be in brackets."""
    user, at, rest = words[0].rpartition("@")
    name, port = rest, ""
    if rest.startswith("["):
        name, _, suffix = rest[1:].partition("]")
        port = suffix.removeprefix(":")
    elif rest.count(":") == 1:
        name, _, port = rest.partition(":")
    if not name or name.startswith("-") or (at and not user) or user.startswith("-"):
        raise ConfigError(f"found {words[0]!r}, expected [user@]host[:port]")
    if port and not (port.isdecimal() and 0 < int(port) < 65536):
        raise ConfigError(f"found port {port!r}, expected a number from 1 to 65535")
    settings = dict(word.partition("=")[::2] for word in words[1:])
    unknown = [word for word in words[1:] if word.partition("=")[0] not in ("slots", "address") or "=" not in word]
    if unknown:
        raise ConfigError(f"found {' '.join(unknown)!r} after the host, expected slots=N or address=A")
    slots = settings.get("slots")
    if slots is not None and not (slots.isdecimal() and int(slots) > 0):
        raise ConfigError(f"found slots={slots}, expected a number of ranks, at least 1")
    return Host(user + at + name, settings.get("address") or name, int(port) if port else None, slots)


def is_local(host: Host) -> bool:
    """Return whether the host is this machine."""
    name = host.name.rpartition("@")[2]
    return _is_loopback(name) or name in (socket.gethostname(), socket.getfqdn())


def _is_loopback(name: str) -> bool:
    with suppress(ValueError):
        return ipaddress.ip_address(name).is_loopback
    return name == "localhost"


def select_hosts(args: argparse.Namespace) -> list[Host]:
    """Return the hosts of the run. Raise ConfigError if there are too few or if others cannot reach one of them."""
    if args.hosts is None:
        return [Host("localhost", "127.0.0.1")] * (args.nodes or 1)
    hosts = read_hosts(args.hosts)
    if args.nodes is not None and args.nodes > len(hosts):
        raise ConfigError(f"--nodes {args.nodes}: found only {len(hosts)} hosts in {args.hosts}")
    hosts = hosts[: args.nodes]
    loopback = [host.name for host in hosts if _is_loopback(host.address)]
    if loopback and args.ssh is None and len(loopback) < len(hosts):
        raise ConfigError(
            f"--hosts {args.hosts}: the other hosts cannot reach {' and '.join(loopback)}; use this machine's name or "
            "IP address instead, or append address=A"
        )
    return hosts


# --- commands -------------------------------------------------------------------------------------------------------
def remote_command(host: Host, args: argparse.Namespace) -> list[str]:
    """Return the command line that starts launch_node.py on a host."""
    program = [args.python, str(NODE_PROGRAM)]
    if args.hosts is None or (args.ssh is None and is_local(host)):
        return program
    remote = shlex.split(args.ssh or SSH)
    # ssh joins the words and passes them to the remote shell, so each word must be quoted.
    quoted = [shlex.quote(word) for word in program]
    if any("{host}" in word for word in remote):
        if host.port is not None:
            raise ConfigError(
                f"--ssh {args.ssh}: cannot pass the port of {host} to this command; remove the port from the hosts file"
            )
        return [*(word.replace("{host}", host.name) for word in remote), *quoted]
    port = [] if host.port is None else ["-p", str(host.port)]
    return [*remote, *port, host.name, *quoted]


def torchrun_command(hosts: Sequence[Host], rank: int, port: int, args: argparse.Namespace) -> list[str]:
    """Return the torchrun command of node `rank`, with the rendezvous on the first host."""
    first, host = hosts[0].address, hosts[rank]
    bracketed = f"[{first}]" if ":" in first else first
    return [
        args.python, "-m", "open_lm.utils.torchrun",
        "--nnodes", str(len(hosts)), "--node-rank", str(rank), "--nproc-per-node", host.slots or args.nproc_per_node,
        "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{bracketed}:{port}", "--rdzv-id", args.rdzv_id,
        "--rdzv-conf", f"is_host={int(rank == 0)}", "--local-addr", host.address,
        "--max-restarts", str(args.max_restarts),
        *args.command,
    ]  # fmt: skip


def matching_variables(patterns: Sequence[str], environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables whose names match one of the patterns."""
    return {
        name: value
        for name, value in sorted(environment.items())
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    }


def job_of(hosts: Sequence[Host], rank: int, port: int, args: argparse.Namespace) -> dict[str, Any]:
    """Return the job of a node; launch_node.py describes the format."""
    return {
        "command": torchrun_command(hosts, rank, port, args),
        "directory": str(args.directory),
        "environment": matching_variables([*FORWARDED_VARIABLES, *args.env.split(",")], os.environ),
        "grace_s": args.grace,
    }


def make_parser() -> argparse.ArgumentParser:
    name = program_name("launch.py")
    parser = argparse.ArgumentParser(
        prog=name,
        usage=f"{name} [options] (COMMAND | SCRIPT | -m MODULE) …",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--hosts", type=user_file, metavar="FILE", help="file with one host per line (default: this machine)")
    add(
        "--nodes",
        type=int,
        metavar="N",
        help="use only the first N hosts; without --hosts, start N nodes on this machine",
    )
    add(
        "--nproc-per-node",
        default="gpu",
        metavar="N",
        help="number of ranks on hosts without slots; gpu: one rank per GPU (default)",
    )
    add("--ssh", metavar="COMMAND", help=f"remote shell (default: {SSH!r}); the host is appended, or replaces {{host}}")
    add(
        "--python",
        type=user_path,
        default=sys.executable,
        help="Python interpreter on the hosts (default: the current one)",
    )
    add(
        "--directory",
        type=user_file,
        default=Path.cwd(),
        help="working directory on the hosts (default: the current one)",
    )
    add("--env", default="", metavar="NAMES", help="comma-separated names or patterns (*) of further variables to send")
    add("--port", type=int, help="rendezvous port on the first host (default: a free port)")
    add("--grace", type=float, default=60.0, metavar="S", help="seconds to stop after a failure (default: 60)")
    add("--max-restarts", type=int, default=0, metavar="N", help="number of restarts of failed ranks (default: 0)")
    add(
        "--output",
        choices=["all", "first"],
        default="all",
        help="show the output of all nodes, or only of the node with rank 0 and of the first node that fails",
    )
    add("--dry-run", action="store_true", help="print the commands without starting them")
    add("-m", dest="module", nargs=argparse.REMAINDER, help="Python module and its arguments")
    add("script", nargs=argparse.REMAINDER, help="command of open-lm or Python script, and its arguments")
    return parser


def _module_command(words: list[str]) -> list[str]:
    """Return the words with -m MODULE in place of the name of a command of open-lm that is not an existing file."""
    command = COMMANDS.get(words[0]) if words else None
    return words if command is None or os.path.isfile(words[0]) else ["-m", command.full_module, *words[1:]]


def _is_unknown_word(word: str) -> bool:
    """Return whether a word is a mistake: no flag, no file here, and no path or Python file of other machines."""
    return not (word.startswith("-") or "/" in word or word.endswith(".py") or os.path.isfile(word))


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the options. Raise ConfigError with all their problems."""
    args = make_parser().parse_args(argv)
    args.command = ["-m", *args.module] if args.module else _module_command(args.script)
    args.rdzv_id = uuid.uuid4().hex
    problems = []
    if not args.command:
        problems.append("nothing to run: expected a command, a script or -m MODULE after the options, such as train")
    elif _is_unknown_word(args.command[0]):
        similar = get_close_matches(args.command[0], COMMANDS, n=1)
        hint = f"; did you mean {similar[0]}?" if similar else ""
        problems.append(f"{args.command[0]!r} is neither a command of open-lm nor a file{hint}")
    if args.nproc_per_node != "gpu" and not (args.nproc_per_node.isdecimal() and int(args.nproc_per_node) > 0):
        problems.append(f"--nproc-per-node: found {args.nproc_per_node!r}, expected a number of ranks or gpu")
    if args.nodes is not None and args.nodes < 1:
        problems.append(f"--nodes: found {args.nodes}, expected at least 1")
    if args.grace <= 0:
        problems.append(f"--grace: found {args.grace:g}, expected a number of seconds above 0")
    if args.hosts is None and args.ssh is not None:
        problems.append("--ssh: requires --hosts")
    if problems:
        raise ConfigError(join_problems(problems, "invalid options"))
    return args


def print_jobs(hosts: Sequence[Host], args: argparse.Namespace) -> None:
    """Print the command, directory and variable names of each host, without the values of the variables."""
    for rank, host in enumerate(hosts):
        job = job_of(hosts, rank, args.port or 0, args)
        print(f"{host}: {shlex.join(remote_command(host, args))}")
        print(f"  in {job['directory']}: {shlex.join(job['command'])}")
        print(f"  with {', '.join(job['environment']) or 'no environment variables'}")


def launch(argv: Sequence[str]) -> int:
    """Run the job, and return its exit code."""
    args = parse(argv)
    hosts = select_hosts(args)
    if args.dry_run:
        print_jobs(hosts, args)
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
