"""Launch ranks like torchrun, without parsing the training script's flags, and with time to save on stop signals.

Before Python 3.12.3 `torchrun -m open_lm.main … --logs DIR` fails with "ambiguous option: --logs could match
--logs-specs" (https://github.com/pytorch/pytorch/issues/120601). This launcher splits the command line at the script,
so that torchrun does not parse the arguments after it:

    python -m open_lm.utils.torchrun --nproc-per-node 2 -m open_lm.main --logs logs …

It accepts exactly torchrun's arguments. `make install` installs it as the environment's torchrun.

With --node-rank, ranks are assigned in the order of the node ranks under every rendezvous: node 0 has rank 0. torchrun
itself orders the nodes of a c10d rendezvous by name.

It forwards the signals that ask a run to stop, SIGTERM, SIGUSR1 and interrupts (Ctrl-C), to the workers and waits until
they have saved and exited; a second interrupt ends them at once. The exit code is 0 if theirs is. torchrun itself kills
the workers after 30 seconds and reports a failure, or is terminated by SIGUSR1 without stopping them.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from open_lm.errors import STOP_SIGNALS, WATCHDOG_EXIT_CODE, UserError, run_cli

if TYPE_CHECKING:
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent

REPORTED_EXIT_CODES = (2, 130, WATCHDOG_EXIT_CODE)  # exit codes of errors.run_cli and of the watchdog
FAILURE_FILE = "OPEN_LM_FAILURE_FILE"  # environment variable: path of a file for the time of the first rank failure
_EXIT_DELAY_S = 2  # gives the node that ended, and with it the rendezvous, time to print its error first
_SCRIPT = """#!{python}
import sys

from open_lm.utils.torchrun import main

sys.exit(main(sys.argv[1:]))
"""


def split_command(argv: Sequence[str], parser: argparse.ArgumentParser) -> tuple[list[str], list[str]]:
    """Return torchrun's arguments including the training script, and the arguments of that script.

    A "--" between the two, the common workaround for ambiguous options, is dropped.
    """
    index = 0
    while index < len(argv) and argv[index].startswith("-"):
        name, has_value, _ = argv[index].partition("=")
        action = parser._option_string_actions.get(name)
        takes_next = action is not None and action.nargs != 0 and not has_value
        index += 2 if takes_next else 1
    script_args = list(argv[index + 1 :])
    return list(argv[: index + 1]), script_args[1:] if script_args[:1] == ["--"] else script_args


def agent_class(node_rank: int = 0) -> type[LocalElasticAgent]:
    """Return a subclass of torch's agent, which runs the workers of a node, that forwards stop signals to them.

    Ranks are assigned in the order of `node_rank`; nodes with equal `node_rank` keep the order of the rendezvous.
    """
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent

    class Agent(LocalElasticAgent):
        def _start_workers(self, *args: Any, **kwargs: Any) -> dict[int, Any]:
            pids = super()._start_workers(*args, **kwargs)

            def forward_signal(number: int, _frame: FrameType | None) -> None:
                self._remaining_restarts = 0  # do not restart workers that were asked to stop
                for pid in pids.values():
                    with suppress(ProcessLookupError):  # the worker has already exited
                        os.kill(pid, number)

            for number in STOP_SIGNALS:  # replaces the handlers that torch has just installed
                signal.signal(number, forward_signal)
            return pids

        def _assign_worker_ranks(self, store: Any, group_rank: int, group_world_size: int, spec: Any) -> list[Any]:
            store.set(f"open_lm/node/{group_rank}", str(node_rank))
            nodes = [(int(store.get(f"open_lm/node/{node}")), node) for node in range(group_world_size)]
            position = sorted(nodes).index((node_rank, group_rank))
            return super()._assign_worker_ranks(store, position, group_world_size, spec)

    return Agent


def main(argv: Sequence[str]) -> int:
    """Launch as torchrun does and return the exit code.

    Omit torchrun's traceback if a rank exited after its own error message (exit code 2), an interrupt, its watchdog, or
    a stop signal before it installed its handlers.
    """
    codes: list[int] = []
    return run_cli(lambda words: codes.append(_launch(words)), argv) or codes[0]


def _launch(argv: Sequence[str]) -> int:
    """Launch the ranks and return the exit code. Raise UserError for flags that cannot work on this machine."""
    import torch
    from torch.distributed import DistNetworkError
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousConnectionError
    from torch.distributed.launcher import api
    from torch.distributed.run import get_args_parser, parse_args, run

    torchrun_args, script_args = split_command(argv, get_args_parser())
    args = parse_args(torchrun_args)
    args.training_script_args = script_args
    if args.nproc_per_node == "gpu" and not torch.cuda.is_available():
        raise UserError("--nproc-per-node gpu: torch finds no CUDA device; pass a number of ranks")
    api.LocalElasticAgent = agent_class(args.node_rank)  # type: ignore[misc]
    if args.rdzv_backend != "static":
        args.node_rank = 0  # otherwise torch warns that it ignores the flag
    try:
        run(args)
    except ChildFailedError as error:
        failure = error.get_first_failure()[1]
        if FAILURE_FILE in os.environ:
            Path(os.environ[FAILURE_FILE]).write_text(str(failure.timestamp))
        code = failure.exitcode
        if -code in STOP_SIGNALS:
            return 128 - code
        if code not in REPORTED_EXIT_CODES:
            raise
        return int(code)
    except RendezvousConnectionError as error:
        time.sleep(_EXIT_DELAY_S)
        cause = f"{error.__cause__ or error}".partition("\n")[0]
        print(
            f"error: no connection to the rendezvous at {args.rdzv_endpoint} ({cause}): the node that hosts it is "
            "unreachable or has exited",
            file=sys.stderr,
        )
        return 1
    except DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise UserError(
            f"--master-port {args.master_port}: another process uses this port; choose a free one, or --standalone if "
            "all ranks are on this machine"
        ) from error
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


def install_script(folder: Path) -> None:
    """Install this launcher as `torchrun` into an environment's script folder."""
    path = folder / "torchrun"
    path.write_text(_SCRIPT.format(python=sys.executable))
    path.chmod(0o755)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
